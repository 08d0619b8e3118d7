"""Every figure function draws one figure, wherever it is told to, in colours that everybody can tell apart."""

import itertools
import math

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from diffusion_edu import viz

X = torch.linspace(-2, 2, 30, dtype=torch.float64)
POINTS = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
DIGITS = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = {"xlabel": "step", "ylabel": "error"}

# name: (call(**keywords), how many axes it draws)
FIGURES = {
    "clouds": (lambda **k: viz.clouds([("data", POINTS), ("both", {"data": POINTS, "model": -POINTS})], **k), 2),
    "trajectories in the plane": (lambda **k: viz.trajectories(POINTS.view(10, 4, 2), **k), 1),
    "trajectories in time": (lambda **k: viz.trajectories(POINTS.view(10, 8, 1), torch.arange(10, 0, -1), **k), 1),
    "densities": (
        lambda **k: viz.densities(X, {"exact": (-X.square()).exp()}, samples={"model": POINTS[:, 0]}, **k),
        1,
    ),
    "field": (
        lambda **k: viz.field(lambda x: (-x.square().sum(1)).exp(), lambda x: -2 * x, samples=POINTS, **k),
        1,
    ),
    "images": (lambda **k: viz.images(DIGITS, torch.arange(6), ncol=3, title="digits", **k), 6),
    "filmstrip": (lambda **k: viz.filmstrip([DIGITS[:2]] * 4, [3, 2, 1, 0], rows=["a", "b"], **k), 8),
    "curves": (
        lambda **k: viz.curves(X, {"DDIM": X, "Heun": -X}, bands={"DDIM": X.abs()}, floor=0.1, **LABELS, **k),
        1,
    ),
    "loss_curve": (lambda **k: viz.loss_curve(X.abs(), floor=0.1, **k), 1),
    "loss_by_t": (lambda **k: viz.loss_by_t(torch.arange(30), X.abs(), X.abs() / 2, yscale="log", **k), 1),
    "bars": (lambda **k: viz.bars(["a", "b"], {"p": [1, 2], "q": [2, 1]}, stacked=True, ylabel="bits", **k), 1),
    "heatmap": (lambda **k: viz.heatmap(torch.eye(3), "abc", "xyz", annotate=True, **LABELS, **k), 2),
}


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FIGURES)
def test_opens_one_figure_and_returns_it(name):
    draw, n_axes = FIGURES[name]
    with plt.rc_context():
        viz.style()
        figure = draw()
        figure.canvas.draw()
    assert plt.get_fignums() == [figure.number] and len(figure.axes) == n_axes
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
    assert 0.01 < (pixels < 250).any(-1).mean(), "an empty picture"
    assert pixels.shape[1] <= 1150, "wider than a notebook's column"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FIGURES)
def test_draws_into_a_given_figure_and_opens_none(name):
    draw, n_axes = FIGURES[name]
    figure = Figure(layout="constrained")
    assert draw(fig=figure) is figure
    figure.canvas.draw()
    assert len(figure.axes) == n_axes and not plt.get_fignums()


def test_two_figures_side_by_side():
    left, right = viz.side_by_side(2)
    viz.curves(X, {"model": X}, fig=left, title="left", **LABELS)
    viz.clouds([("data", POINTS)], fig=right)
    plt.gcf().canvas.draw()
    assert [len(left.axes), len(right.axes)] == [1, 1] and len(plt.get_fignums()) == 1


def test_the_same_call_gives_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        FIGURES["clouds"][0](fig=Figure(layout="constrained")).savefig(tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_name_has_one_colour_in_every_figure():
    cloud = viz.clouds([("both", {"model": POINTS, "data": POINTS})]).axes[0]
    colors = [matplotlib.colors.to_hex(c.get_facecolor()[0]).upper() for c in cloud.collections]
    lines = viz.curves(X, {"guided w = 3": X, "model": X}, **LABELS).axes[0].lines
    assert colors == [viz.MODEL, viz.DATA] and [line.get_color() for line in lines] == [viz.GUIDED, viz.MODEL]
    assert viz.color("heun", 1) == viz.CYCLE[1] and viz.color("", 0) == viz.CYCLE[0]


def test_images_show_minus_one_black_and_one_white():
    x = torch.tensor([-1.0, 1.0, 0.0, 5.0]).view(1, 1, 2, 2)
    shown = viz.images(x).axes[0].images[0]
    assert shown.get_array().ravel().tolist() == [0, 1, 0.5, 1] and shown.get_clim() == (0, 1)
    rgb = viz.images(torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1)).axes[0].images[0]
    assert rgb.get_array().ravel().tolist() == [0, 0.5, 1]


def test_filmstrip_puts_frames_in_columns_and_samples_in_rows():
    frames = [torch.full((2, 1, 2, 2), f) + torch.tensor([0.0, 0.5]).view(2, 1, 1, 1) for f in (-1.0, 0.0, 0.5)]
    axes = viz.filmstrip(frames, ["T", "T/2", "0"], rows=["first", "second"]).axes
    assert [ax.images[0].get_array()[0, 0] for ax in axes] == [0, 0.5, 0.75, 0.25, 0.75, 1]
    assert [ax.get_title() for ax in axes] == ["T", "T/2", "0", "", "", ""]
    assert [ax.get_ylabel() for ax in axes] == ["first", "", "", "second", "", ""]


def test_loss_curve_mean_and_floor():
    lines = viz.loss_curve(torch.arange(100.0), floor=7, smooth=10).axes[0].lines
    assert np.allclose(lines[1].get_xydata(), [[k, k - 4.5] for k in range(9, 100)], atol=1e-12)
    assert lines[2].get_ydata() == [7, 7]


def test_score_arrows_point_along_the_score():
    quiver = viz.field(score=lambda x: -x).axes[0].collections[0]
    inward = quiver.U * quiver.X + quiver.V * quiver.Y
    norm = np.hypot(quiver.U, quiver.V) * np.hypot(quiver.X, quiver.Y)
    assert np.allclose(inward, -norm, atol=1e-9) and norm.max() > 0


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: viz.clouds([("data", DIGITS)]), ValueError, r"data must be points of shape \(N, 2\)"),
        (lambda: viz.images(DIGITS[0]), ValueError, r"x must be images .* got shape \(1, 8, 8\)"),
        (lambda: viz.curves(X, {"a": X}, xlabel="x"), TypeError, "ylabel must be given"),
        (lambda: viz.heatmap(torch.eye(2), ylabel="y"), TypeError, "xlabel must be given"),
        (lambda: viz.side_by_side(0), ValueError, "n must be at least 1"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Machado et al., "A physiologically-based model for simulation of color vision deficiency", 2009, severity 1.0
BLINDNESS = {
    "none": np.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


def lab(color, blindness):
    """CIELAB coordinates of a colour as somebody with this deficiency sees it."""
    rgb = np.array(matplotlib.colors.to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(blindness) @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    f = np.cbrt(to_xyz @ linear / [0.9505, 1, 1.089])
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("kind", BLINDNESS)
def test_the_palette_can_be_told_apart(kind):
    """A CIELAB distance of 2.3 is just noticeable; six times that is plain to see."""
    palette = (viz.DATA, viz.NOISE, viz.MODEL, viz.GUIDED, viz.EXACT)
    for a, b in itertools.combinations(palette, 2):
        assert math.dist(lab(a, BLINDNESS[kind]), lab(b, BLINDNESS[kind])) > 15, (a, b)
