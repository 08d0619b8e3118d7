"""Slider figures: controls, a picture, and a sentence that says what the picture shows.

A control is described by :class:`Slider`, :class:`Choice` or :class:`Scrub`; the picture is drawn by a
function ``draw(fig, **values)`` into a plain ``matplotlib.figure.Figure`` (the functions of
:mod:`diffusion_edu.viz` take it as ``fig=``). Nothing is trained or sampled in a callback: compute first,
then index into the result.

    frames = torch.stack(list(sample(step, model, x_T, times, noise)))
    SliderFigure(
        lambda fig, i: viz.clouds([("model", frames[i])], limit=3, fig=fig),
        lambda i: f"After {i} steps the cloud has radius {frames[i].norm(dim=1).mean():.1f}.",
        i=Scrub(len(frames), label="step"),
    )

The figure also carries its first frame as a PNG and a fixed text: it is there before a kernel runs, on GitHub
and in exported HTML, and nbval can compare it. Without ipywidgets only that first frame is shown.
"""

import html
import io
import math
from base64 import b64encode
from dataclasses import KW_ONLY, dataclass
from decimal import Decimal

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from diffusion_edu import checks, viz


@dataclass(frozen=True)
class Slider:
    """A number from ``low`` to ``high``: whole if all its numbers are ints, else real.

    ``start`` defaults to ``low``; ``step`` to 1 (whole) or to a round number near a hundredth of the range (real).
    The bar moves on the grid low, low + step, ...; the number box takes any value between.
    """

    low: float
    high: float
    start: float | None = None
    _: KW_ONLY
    step: float | None = None
    label: str | None = None

    @property
    def whole(self):
        return all(isinstance(v, int | None) for v in (self.low, self.high, self.start, self.step))

    @property
    def width(self):
        """The step."""
        if self.step is not None or self.whole:
            return 1 if self.step is None else self.step
        largest = (self.high - self.low) / 79.9  # 80 steps at least, whatever the rounding
        power = math.floor(math.log10(largest))
        return max(float(f"{m}e{power}") for m in (1, 2, 5) if float(f"{m}e{power}") <= largest)

    def initial(self, name):
        """The first value, after a check of the description."""
        checks.real(f"{name}.low", self.low)
        checks.real(f"{name}.high", self.high, self.low, open_low=True)
        checks.real(f"{name}.step", self.width, 0, open_low=True)
        return self.check(name, self.low if self.start is None else self.start)

    def check(self, name, value):
        kind = checks.integer if self.whole else checks.real
        return kind(name, value, self.low, self.high)

    def on_grid(self, value):
        """The grid value next to ``value``, without the last digits of binary arithmetic."""
        digits = max(-Decimal(str(v)).as_tuple().exponent for v in (self.low, self.width))
        value = self.low + round((value - self.low) / self.width) * self.width
        return value if self.whole else min(round(value, max(digits, 0)), self.high)

    def build(self, ipw, name, value):
        """The widget that holds the value, and what is shown: a number box (the name) and the bar."""
        kinds = (ipw.BoundedIntText, ipw.IntSlider) if self.whole else (ipw.BoundedFloatText, ipw.FloatSlider)
        limits = {"min": self.low, "max": self.high, "step": self.width}
        box = kinds[0](value, description=self.label or name, **limits, **_NAMED, layout={"width": "15em"})
        bar = kinds[1](readout=False, **limits, layout={"width": "22em"}, tooltip=self.label or name)
        ipw.link((box, "value"), (bar, "value"), (self.on_grid, self.on_grid))
        return box, [box, bar]


@dataclass(frozen=True)
class Scrub(Slider):
    """An index 0..n-1 into precomputed frames, with a Play button; ``interval`` is milliseconds a frame."""

    def __init__(self, n, start=0, *, interval=150, label=None):
        checks.integer("n", n, 2)
        checks.integer("interval", interval, 20)
        super().__init__(0, n - 1, start, step=1, label=label)
        object.__setattr__(self, "interval", interval)

    def build(self, ipw, name, value):
        box, shown = super().build(ipw, name, value)
        play = ipw.Play(min=self.low, max=self.high, value=value, interval=self.interval)
        ipw.link((play, "value"), (box, "value"))
        return box, [*shown, play]


@dataclass(frozen=True)
class Choice:
    """One of a few options: a row of buttons up to four, a drop-down list beyond."""

    options: tuple
    start: object = None
    _: KW_ONLY
    label: str | None = None

    def initial(self, name):
        if not self.options:
            checks.fail(f"{name}.options", "hold at least one option", self.options)
        return self.check(name, self.options[0] if self.start is None else self.start)

    def check(self, name, value):
        return checks.one_of(name, value, list(self.options))

    def build(self, ipw, name, value):
        kind = ipw.ToggleButtons if len(self.options) <= 4 else ipw.Dropdown
        options = [(str(o), o) for o in self.options]
        box = kind(options=options, value=value, description=self.label or name, **_NAMED, layout={"width": "auto"})
        box.style.button_width = "auto"
        box.add_class("jupyter-widgets")
        box.add_class("widget-inline-hbox")  # a row of buttons lacks it: its label would stand above
        return box, [box]


_NAMED = {"style": {"description_width": "8em"}}


class SliderFigure:
    """A picture with controls; show it by making it the last line of a cell.

    Parameters
    ----------
    draw : function (fig, **values) -> anything
        Draws into an empty ``Figure``; what it returns is ignored.
    caption : function (**values) -> str
        One or two sentences that say what the picture shows: read out by screen readers at each change.
    size : tuple of float
        Width and height of the picture in inches, keyword only.
    **controls : Slider, Choice or Scrub
        A tuple is short for ``Slider(*tuple)``, a list for ``Choice(list)``.

    Raises
    ------
    ValueError
        If a control's limits or a value given to :meth:`set` make no sense; the message names the control.
    TypeError
        If a control is none of these kinds.
    """

    def __init__(self, draw, caption, *, size=(6.4, 3.6), **controls):
        self._draw = checks.function("draw", draw, "lambda fig, t: ...")
        self._caption = checks.function("caption", caption, 'lambda t: f"..."')
        self.size = size
        self.specs = {name: _spec(name, control) for name, control in controls.items()}
        self.values = {name: spec.initial(name) for name, spec in self.specs.items()}
        self.first, self.first_caption = self.png(), self.caption()
        self.controls, self.image, self.text, self.widget = {}, None, None, None
        self._build()

    def png(self):
        """The picture for the present values, as PNG bytes."""
        with plt.rc_context():
            viz.style()
            figure, file = Figure(self.size, layout="constrained"), io.BytesIO()
            self._draw(figure, **self.values)
            figure.savefig(file, format="png", metadata={"Software": None})
        return file.getvalue()

    def caption(self):
        """The sentence for the present values."""
        return self._caption(**self.values)

    def set(self, **values):
        """Move controls, as a reader would; returns the figure's PNG bytes."""
        for name, value in values.items():
            checks.one_of("control", name, list(self.specs))
            values[name] = self.specs[name].check(name, value)
        if self.widget is None:
            self.values |= values
            return self.png()
        for name, value in values.items():
            self.controls[name].value = value
        return bytes(self.image.value)

    def _build(self):
        try:
            import ipywidgets as ipw
        except ImportError:
            return
        rows = []
        for name, spec in self.specs.items():
            self.controls[name], shown = spec.build(ipw, name, self.values[name])
            self.controls[name].observe(self._change, "value")
            rows.append(ipw.HBox(shown, layout={"flex_flow": "row wrap", "align_items": "center"}))
        self.image = ipw.Image(value=self.first, format="png", layout={"max_width": "100%", "align_self": "flex-start"})
        self.text = ipw.HTML(_spoken(self.first_caption))
        self.widget = ipw.VBox([*rows, self.image, self.text])

    def _change(self, _event):
        self.values = {name: control.value for name, control in self.controls.items()}
        self.image.value = self.png()
        self.text.value = _spoken(self.caption())

    def _repr_mimebundle_(self, include=None, exclude=None):
        data = {
            "text/plain": f"SliderFigure({', '.join(self.specs)})",
            "image/png": b64encode(self.first).decode(),
        }
        if self.widget is not None:
            data |= {k: v for k, v in self.widget._repr_mimebundle_().items() if k != "text/plain"}
        return data, {"image/png": {"alt": self.first_caption}}


def _spec(name, control):
    if isinstance(control, tuple):
        return Slider(*control)
    if isinstance(control, list):
        return Choice(tuple(control))
    if not isinstance(control, Slider | Choice):
        checks.fail(name, "be a Slider, a Choice, a Scrub, a tuple or a list", repr(control), TypeError)
    return control


def _spoken(sentence):
    return f'<p role="status" aria-live="polite" style="margin:0.3em 0">{html.escape(sentence)}</p>'
