"""Widgets in a real browser, by keyboard: JupyterLab on this machine, one test per widget pattern."""

import json
import os
import shutil
import subprocess
import sys
import time

import nbformat
import pytest

pytestmark = pytest.mark.browser
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync"
).split()
CELLS = (
    """import torch
from diffusion_edu import viz, widgets
x = torch.linspace(-4, 4, 200)
width = torch.linspace(3, 1, 30)[:, None, None]
frames = width * torch.randn(30, 200, 2, generator=torch.Generator().manual_seed(0))
""",
    """def draw(fig, mean, std):
    bell = torch.exp(-(((x - mean) / std) ** 2) / 2) / std
    viz.densities(x, {"model": bell}, fig=fig, title="A Gaussian")
widgets.SliderFigure(draw, lambda mean, std: f"A bell around {mean:.2f}, {std:.2f} wide.",
    mean=(-2.0, 2.0, 0.0), std=widgets.Slider(0.2, 2.0, 1.0, label="width"))
""",
    """widgets.SliderFigure(
    lambda fig, i: viz.clouds([("model", frames[i])], limit=6, fig=fig),
    lambda i: f"After {i} steps the cloud has radius {frames[i].norm(dim=1).mean():.1f}.",
    size=(3.4, 3.6), i=widgets.Scrub(30, label="step"))
""",
    """def draw(fig, law, power, k):
    viz.curves(x, {law: k * (x if law == "data" else -x) ** int(power)}, xlabel="x", ylabel="y", fig=fig)
widgets.SliderFigure(draw, lambda law, power, k: f"{law} to the power {power}, times {k}.",
    law=["data", "model"], power=list("12345"), k=(1, 5))
""",
)


def find_chromium():
    return os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")


def unavailable(reason):
    """Skip on a laptop, fail in CI: a browser test that never runs proves nothing."""
    if os.environ.get("CI") and os.environ.get("DIFFUSION_EDU_NO_BROWSER") != "1":
        pytest.fail(f"{reason}; set DIFFUSION_EDU_NO_BROWSER=1 to do without")
    pytest.skip(reason)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """URL of a JupyterLab that serves the demonstration notebook; its settings live in a temporary folder."""
    folder = tmp_path_factory.mktemp("lab")
    cells = [nbformat.v4.new_code_cell(source, id=f"cell{i}") for i, source in enumerate(CELLS)]
    kernel = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / "demo.ipynb")
    quiet = {"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False}}
    (folder / "config" / "labconfig").mkdir(parents=True)
    (folder / "config" / "labconfig" / "default_setting_overrides.json").write_text(json.dumps(quiet))
    places = {f"JUPYTER_{k}_DIR": str(folder / k.lower()) for k in ("CONFIG", "DATA", "RUNTIME")}
    places |= {"JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"), "HOME": str(folder)}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"]
    command += ["--ip=127.0.0.1", "--port=0", f"--ServerApp.root_dir={folder}", "--IdentityProvider.token="]
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(command, env=os.environ | places, stdout=log, stderr=log, cwd=folder)
    try:
        yield wait_for_server(server, folder)
    finally:
        server.terminate()
        server.wait(20)


def wait_for_server(server, folder, seconds=60):
    for _ in range(seconds * 10):
        for file in (folder / "runtime").glob("jpserver-*.json"):
            return json.loads(file.read_text())["url"]
        assert server.poll() is None, (folder / "server.log").read_text()
        time.sleep(0.1)
    raise TimeoutError((folder / "server.log").read_text())


@pytest.fixture(scope="module")
def page(request):
    """The demonstration notebook in a browser, all its cells run."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        unavailable("playwright is not installed")
    chromium = find_chromium() or unavailable("no chromium on this machine")
    url = request.getfixturevalue("lab")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1500})
        page.set_default_timeout(30_000)
        page.goto(f"{url}lab/tree/demo.ipynb?reset")
        page.wait_for_function(
            "window.jupyterapp?.shell?.currentWidget?.sessionContext?.session?.kernel?.connectionStatus == 'connected'"
        )
        page.evaluate("void window.jupyterapp.commands.execute('notebook:run-all-cells')")
        page.wait_for_function("document.querySelectorAll('.jp-OutputArea img.widget-image').length == 3")
        yield page
        browser.close()


class Figure:
    """One slider figure on the page."""

    def __init__(self, page, number):
        self.page, self.root = page, page.locator(".jp-OutputArea .widget-vbox").nth(number)
        self.root.scroll_into_view_if_needed()

    @property
    def source(self):
        return self.root.locator("img").get_attribute("src")

    @property
    def caption(self):
        return self.root.get_by_role("status").inner_text()

    def changes(self, act):
        """Do something; wait until both picture and caption are other ones, else fail; returns the caption."""
        source, caption = self.source, self.caption
        act()
        deadline = time.monotonic() + 15
        while self.source == source or self.caption == caption:
            assert time.monotonic() < deadline, "neither picture nor caption changed"
            self.page.wait_for_timeout(30)
        return self.caption


def test_sliders_by_arrow_key_and_by_number(page):
    figure = Figure(page, 0)
    handle = figure.root.locator(".noUi-handle").first
    handle.focus()
    assert figure.changes(lambda: page.keyboard.press("ArrowRight")) == "A bell around 0.05, 1.00 wide."
    assert figure.root.get_by_label("mean").input_value() == "0.05"
    number = figure.root.get_by_label("width")
    assert figure.changes(lambda: (number.fill("0.5"), number.press("Enter"))) == "A bell around 0.05, 0.50 wide."


def test_scrubbing_and_playing_through_frames(page):
    figure = Figure(page, 1)
    figure.root.locator(".noUi-handle").focus()
    assert figure.changes(lambda: page.keyboard.press("ArrowRight")).startswith("After 1 steps")
    play = figure.root.locator(".widget-play button").first
    play.focus()
    seen = [figure.changes(lambda: page.keyboard.press("Enter"))]
    seen += [figure.changes(lambda: None) for _ in range(3)]
    play.press("Enter")
    assert len(set(seen)) == 4


def test_choices_by_keyboard(page):
    figure = Figure(page, 2)
    figure.root.get_by_role("button", name="model").focus()
    assert figure.changes(lambda: page.keyboard.press("Enter")) == "model to the power 1, times 1."
    power = figure.root.get_by_label("power")
    assert figure.changes(lambda: power.select_option("3")) == "model to the power 3, times 1."
    figure.root.locator(".noUi-handle").focus()
    assert figure.changes(lambda: page.keyboard.press("ArrowRight")) == "model to the power 3, times 2."


def test_every_control_has_an_accessible_name(page):
    for number, names in enumerate((["mean", "width"], ["step"], ["power", "k"])):
        for name in names:
            assert Figure(page, number).root.get_by_label(name, exact=True).count() == 1, name
