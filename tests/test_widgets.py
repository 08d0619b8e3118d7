"""Slider figures without a browser: setting a value in Python fires the same callbacks as a reader's hand."""

import base64
import builtins
import re

import pytest

from diffusion_edu import viz
from diffusion_edu.widgets import Choice, Scrub, Slider, SliderFigure

PNG = b"\x89PNG\r\n\x1a\n"


def figure(**controls):
    """A figure whose picture and caption depend on every value."""

    def draw(fig, **values):
        numbers = [v if isinstance(v, int | float) else len(v) for v in values.values()]
        viz.curves(range(len(numbers) + 1), {"model": [0, *numbers]}, xlabel="control", ylabel="value", fig=fig)

    return SliderFigure(draw, lambda **values: f"Values <{values}>", size=(3, 2), **controls)


def test_a_slider_is_redrawn_and_described_when_it_moves():
    shown = figure(t=(0.0, 2.0, 1.0))
    assert shown.image.value == shown.first and shown.first.startswith(PNG)
    shown.controls["t"].value = 1.5
    assert shown.image.value != shown.first and bytes(shown.image.value).startswith(PNG)
    assert shown.values == {"t": 1.5} and "Values &lt;{&#x27;t&#x27;: 1.5}&gt;" in shown.text.value
    assert 'aria-live="polite"' in shown.text.value
    shown.controls["t"].value = 1.0
    assert shown.image.value == shown.first, "the same values give the same bytes"


def test_bar_and_number_box_move_together():
    shown = figure(t=(0.0, 2.0, 1.0))
    box, bar = shown.widget.children[0].children
    assert box is shown.controls["t"] and box.description == "t"
    bar.value = 0.1 + 0.2
    assert box.value == 0.3 and shown.values == {"t": 0.3}
    box.value = 1.255
    assert bar.value == 1.26 and box.value == 1.255 and shown.values == {"t": 1.255}


def test_a_scrub_plays_through_the_frames():
    shown = figure(i=Scrub(12, start=3, interval=50, label="step"))
    box, bar, play = shown.widget.children[0].children
    assert (bar.min, bar.max, bar.value, play.interval, box.description) == (0, 11, 3, 50, "step")
    play.value = 4
    assert box.value == bar.value == 4 and shown.values == {"i": 4} and shown.image.value != shown.first
    assert isinstance(shown.values["i"], int)


def test_a_choice_is_buttons_or_a_list():
    shown = figure(law=["a", "bb"], power=list("vwxyz"), T=(1, 5))
    buttons, dropdown, T = shown.controls.values()
    assert [type(w).__name__ for w in (buttons, dropdown)] == ["ToggleButtons", "Dropdown"]
    buttons.value = "bb"
    assert shown.values == {"law": "bb", "power": "v", "T": 1} and shown.image.value != shown.first
    T.value = 5
    assert shown.values == {"law": "bb", "power": "v", "T": 5}


def test_options_keep_their_type():
    shown = figure(n=Choice((1, 10, 100), start=10))
    assert shown.values == {"n": 10} and shown.controls["n"].value == 10


@pytest.mark.parametrize(
    "slider, step, whole",
    [
        (Slider(0, 10), 1, True),
        (Slider(0.0, 1.0), 0.01, False),
        (Slider(-2.0, 2.0, 0.0), 0.05, False),
        (Slider(0.2, 2.0, 1.0), 0.02, False),
        (Slider(0, 5000.0), 50, False),
        (Slider(0, 10, step=0.5), 0.5, False),
    ],
)
def test_steps_are_round_numbers(slider, step, whole):
    assert slider.width == step and slider.whole is whole
    assert slider.on_grid(slider.low + 3.2 * step) == pytest.approx(slider.low + 3 * step, rel=1e-15)


def test_static_figure_is_the_first_frame_with_a_fixed_text():
    shown = figure(t=(0, 4), law=["a", "bb"])
    before = shown._repr_mimebundle_()
    shown.set(t=3, law="bb")
    data, metadata = shown._repr_mimebundle_()
    assert data["text/plain"] == "SliderFigure(t, law)"
    assert base64.b64decode(data["image/png"]) == shown.first
    assert metadata == {"image/png": {"alt": "Values <{'t': 0, 'law': 'a'}>"}}
    assert (data, metadata) == before
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == shown.widget.model_id
    assert not re.search("[0-9a-f]{8}", data["text/plain"])


def test_without_ipywidgets_the_first_frame_is_shown(monkeypatch):
    real = builtins.__import__

    def no_ipywidgets(name, *args, **kwargs):
        if name == "ipywidgets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_ipywidgets)
    shown = figure(t=(0, 4))
    data, _ = shown._repr_mimebundle_()
    assert set(data) == {"text/plain", "image/png"} and shown.widget is None
    assert shown.set(t=3).startswith(PNG) and shown.values == {"t": 3} and shown.png() != shown.first


def test_the_style_does_not_leak():
    import matplotlib.pyplot as plt

    plt.rcdefaults()
    figure(t=(0, 4))
    assert plt.rcParams["axes.grid"] is False and not plt.get_fignums()


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: figure(t=(2, 1)), ValueError, "t.high must be greater than 2; got 1"),
        (lambda: figure(t=(0, 1, 5)), ValueError, r"t must be in \[0, 1\]; got 5"),
        (lambda: figure(t=(0.0, float("nan"))), ValueError, "t.high must be finite"),
        (lambda: figure(t=Slider(0.0, 1.0, step=-1.0)), ValueError, "t.step must be greater than 0"),
        (lambda: figure(t=[]), ValueError, "t.options must hold at least one option"),
        (lambda: figure(t=Choice(("data", "model"), "modle")), ValueError, "t must be one of .*'model'"),
        (lambda: figure(t=Scrub(1)), ValueError, "n must be at least 2; got 1"),
        (lambda: figure(t=3), TypeError, "t must be a Slider, a Choice, a Scrub, a tuple or a list; got 3"),
        (lambda: figure(t=("a", "b")), TypeError, "t.low must be a real number"),
        (lambda: SliderFigure(None, str, t=(0, 1)), TypeError, "draw must be a function"),
        (lambda: figure(t=(0, 4)).set(t=9), ValueError, r"t must be in \[0, 4\]; got 9"),
        (lambda: figure(t=(0, 4)).set(t=1.5), TypeError, "t must be an integer; got 1.5"),
        (lambda: figure(t=["a", "b"]).set(t="c"), ValueError, "t must be one of 'a', 'b'; got 'c'"),
        (lambda: figure(t=(0, 4)).set(s=1), ValueError, "control must be one of 't'; got 's'"),
    ],
)
def test_bad_controls_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()
