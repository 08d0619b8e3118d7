"""Figures: one function, one clear picture, one palette.

Every function draws one figure and returns it; the notebook cell then ends in ``plt.show()``. Pass ``fig=``
(a ``Figure``, a part of :func:`side_by_side`, the ``fig`` of a widget's ``draw``) to draw there instead of
opening a new one. Points, images and curves may be tensors or arrays. A name means one colour everywhere:
``data``, ``noise``, ``model``, ``guided``, ``exact`` (safe for colour-blind readers, after Okabe and Ito).

Keywords that a function does not list go to ``Axes.set``: ``title``, ``xlabel``, ``ylabel``, ``ylim``,
``xscale="log"``, ... Axes labels that cannot be guessed are required.
"""

import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap

from diffusion_edu import checks

DATA, NOISE, MODEL, GUIDED, EXACT = "#0072B2", "#A8A8A8", "#D55E00", "#009E73", "#222222"
COLORS = {"data": DATA, "noise": NOISE, "model": MODEL, "guided": GUIDED, "exact": EXACT, "floor": EXACT}
CYCLE = (DATA, MODEL, GUIDED, "#CC79A7", "#E69F00", "#56B4E9", NOISE, EXACT)
DASHES = ("-", "--", "-.", ":")
DENSITY = LinearSegmentedColormap.from_list("density", ["#FFFFFF", "#CFE3F1", "#7FB8DC", DATA, "#00314D"])
DIVERGING = LinearSegmentedColormap.from_list("diverging", [DATA, "#F7F7F7", MODEL])


def style(draft=False):
    """Set the course's figure style in matplotlib (``teach.setup`` calls it); a draft is small and quickly drawn."""
    dpi = 40 if draft else 100
    plt.rc("figure", dpi=dpi, facecolor="white")
    plt.rc("figure.constrained_layout", use=not draft)
    plt.rc("savefig", dpi=dpi, facecolor="white")
    plt.rc("font", family="DejaVu Sans", size=10.5)
    plt.rc("axes", titlesize=11.5, titlepad=7, labelsize=10.5, labelcolor="#333333", edgecolor="#9A9A9A")
    plt.rc("axes", grid=True, axisbelow=True, prop_cycle=plt.cycler(color=CYCLE))
    plt.rc("axes.spines", top=False, right=False)
    plt.rc("grid", color="#E6E6E6", linewidth=0.7)
    plt.rc("xtick", color="#555555", labelsize=9)
    plt.rc("ytick", color="#555555", labelsize=9)
    plt.rc("lines", linewidth=1.8)
    plt.rc("legend", fontsize=9.5, frameon=False)
    plt.rc("image", interpolation="nearest")


def color(name, i=0):
    """Colour of a curve or cloud: by the first word of its name if the palette has it, else number ``i``."""
    return COLORS.get(str(name).lower().partition(" ")[0], CYCLE[i % len(CYCLE)])


def side_by_side(n, size=(3.6, 3.2)):
    """A row of ``n`` sub-figures to pass as ``fig=``; ``size`` is one panel's width and height in inches."""
    checks.integer("n", n, 1)
    return list(np.atleast_1d(_figure(None, n * size[0], size[1]).subfigures(1, n)))


def clouds(panels, *, limit=None, size=4, ncol=None, fig=None):
    """2-D point clouds in a row, on equal axes that all panels share.

    Parameters
    ----------
    panels : list of (title, points)
        ``points`` is (N, 2), or a dict name -> (N, 2) that overlays several clouds with a legend.
        One cloud takes the colour of its panel's title.
    limit : float, optional
        Half-width of the square that is shown; default: what holds all points.
    size : float
        Area of a point's marker.
    ncol : int, optional
        Panels per row; default all in one.
    """
    panels = [(title, p if isinstance(p, dict) else {title: p}) for title, p in panels]
    parts = [_points(title, c) for title, p in panels for c in p.values()]
    limit = limit or 1.06 * max(float(np.abs(p).max()) for p in parts)
    axes, fig = _grid(len(panels), ncol, (2.7, 2.9), fig)
    for ax, (title, named) in zip(axes, panels, strict=True):
        for i, (name, cloud) in enumerate(named.items()):
            x, y = _points(title, cloud).T
            ax.scatter(x, y, s=size, color=color(name, i), alpha=0.55, linewidths=0, label=name)
        ax.set(title=title, xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
        if len(named) > 1:
            ax.legend(markerscale=2.5, loc="upper right", handletextpad=0.1, borderpad=0.1)
    return fig


def trajectories(paths, times=None, *, fig=None, **axes):
    """Paths of samples: over time for 1-D samples, in the plane for 2-D ones (grey start, orange end).

    Parameters
    ----------
    paths : Tensor, shape (S, B), (S, B, 1) or (S, B, 2)
        S states of B samples, in the order in which they were made.
    times : Tensor, shape (S,), optional
        Abscissae of 1-D samples, default 0..S-1; the axis runs as the sampler does.
    """
    paths = _array(paths)
    if paths.shape[2:] == (2,):
        x, size = paths, (4.4, 4.2)
        axes = {"aspect": "equal", "xlabel": "$x_1$", "ylabel": "$x_2$"} | axes
    else:
        times = np.arange(len(paths)) if times is None else _array(times)
        x, size = np.stack(np.broadcast_arrays(times[:, None], paths.reshape(len(paths), -1)), -1), (6.4, 3.6)
        axes = {"xlabel": "time $t$", "ylabel": "$x_t$", "xlim": (times[0], times[-1])} | axes
    ax = (fig := _figure(fig, *size)).subplots()
    ax.plot(x[..., 0], x[..., 1], color="#C9C9C9", lw=0.7)
    for ends, name, c in ((x[0], "start", NOISE), (x[-1], "end", MODEL)):
        ax.scatter(*ends.T, s=16, color=c, label=name, zorder=3, clip_on=False)
    ax.set(**axes)
    ax.legend(loc="best")
    return fig


def densities(x, curves, *, samples=None, fig=None, **axes):
    """1-D densities as filled curves (name -> values at ``x``) and samples (name -> values) as histograms."""
    x, ax = _array(x), (fig := _figure(fig, 6.4, 3.4)).subplots()
    span = (x.min(), x.max())
    for i, (name, drawn) in enumerate((samples or {}).items()):
        style = {"color": color(name, i + 1), "alpha": 0.3, "label": f"{name} samples"}
        ax.hist(_array(drawn).ravel(), 60, range=span, density=True, **style)
    for i, (name, y) in enumerate(curves.items()):
        ax.plot(x, _array(y), color=color(name, i), ls=DASHES[i % 4], label=name)
        ax.fill_between(x, _array(y), color=color(name, i), alpha=0.12, lw=0)
    ax.set(**{"xlabel": "$x$", "ylabel": "density", "xlim": span} | axes)
    ax.set_ylim(bottom=0)
    ax.legend()
    return fig


def field(density=None, score=None, *, samples=None, limit=3.0, fig=None, **axes):
    """A 2-D density as shades and a score (or any vector field) as arrows, with samples on top.

    Parameters
    ----------
    density : function (N, 2) -> (N,), optional
    score : function (N, 2) -> (N, 2), optional
        Arrow lengths show the square root of the norm, so that small ones stay visible.
    samples : Tensor, shape (M, 2), optional
    limit : float
        Half-width of the square.
    """
    ax = (fig := _figure(fig, 4.4, 4.2)).subplots()
    if density is not None:
        xy, (u, v) = _square(limit, 121)
        p = _array(density(xy)).reshape(u.shape)
        ax.contourf(u, v, p, levels=p.max() * np.linspace(0.02, 1, 13), cmap=DENSITY)
    if score is not None:
        xy, _ = _square(limit * 0.94, 17)
        arrows = _array(score(xy))
        length = np.linalg.norm(arrows, axis=1, keepdims=True)
        arrows = arrows / np.sqrt(np.maximum(length, 1e-12)) / math.sqrt(length.max() or 1.0)
        ax.quiver(*xy.T, *arrows.T, color=EXACT, alpha=0.75, scale=15, width=0.005, pivot="mid")
    if samples is not None:
        ax.scatter(*_points("samples", samples).T, s=7, color=MODEL, alpha=0.8, linewidths=0)
    ax.grid(False)
    square = (-limit, limit)
    ax.set(**{"aspect": "equal", "xlabel": "$x_1$", "ylabel": "$x_2$", "xlim": square, "ylim": square} | axes)
    return fig


def images(x, labels=None, *, ncol=None, title="", scale=0.8, fig=None):
    """A grid of images (B, 1 or 3, H, W) in [-1, 1]; values outside are clipped for display.

    ``labels`` are written above the images, first come first served; ``scale`` is an image's side in inches.
    """
    x = _array(x)
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        checks.fail("x", "be images of shape (B, 1, H, W) or (B, 3, H, W)", f"shape {x.shape}")
    axes, fig = _grid(len(x), ncol or min(len(x), 10), (scale, scale + 0.22 * (labels is not None)), fig)
    for ax, image in zip(axes, np.clip((x.transpose(0, 2, 3, 1) + 1) / 2, 0, 1), strict=True):
        ax.imshow(image, cmap="gray", vmin=0, vmax=1)
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        ax.spines[:].set_visible(False)
    for ax, label in zip(axes, () if labels is None else labels, strict=False):
        ax.set_title(_text(label), fontsize=9, pad=3)
    if title:
        fig.suptitle(title)
    return fig


def filmstrip(frames, labels=None, *, rows=None, title="", scale=0.8, fig=None):
    """Images over time: one column a frame, one row a sample.

    Parameters
    ----------
    frames : sequence of Tensor, shape (B, C, H, W)
        States in the order in which they were made, values in [-1, 1].
    labels, rows : sequence, optional
        One a frame (times, step numbers), above its column; one a sample, at the left of its row.
    """
    x = np.stack([_array(f) for f in frames], axis=1)
    batch, n = x.shape[:2]
    fig = _figure(fig, n * scale, batch * scale + 0.25 * (labels is not None) + 0.3 * bool(title))
    images(x.reshape(-1, *x.shape[2:]), labels, ncol=n, title=title, fig=fig)
    for ax, name in zip(fig.axes[::n], () if rows is None else rows, strict=False):
        ax.set_ylabel(_text(name), rotation=0, ha="right", va="center")
    return fig


def curves(x, ys, *, bands=None, floor=None, markers=False, fig=None, **axes):
    """Curves (name -> values at ``x``), with ``markers`` or without; ``xlabel`` and ``ylabel`` are required.

    Parameters
    ----------
    x : Tensor, shape (N,), or dict name -> Tensor when the curves have different abscissae
    ys : dict name -> Tensor, shape (N,)
    bands : dict name -> Tensor, shape (N,), optional
        Half-widths drawn as a shade around that curve (standard errors).
    floor : float, optional
        A dashed line at the value that nothing can beat.
    """
    ax = (fig := _figure(fig, 6.4, 3.6)).subplots()
    for i, (name, y) in enumerate(ys.items()):
        at, y, c = _array(x[name] if isinstance(x, dict) else x), _array(y), color(name, i)
        ax.plot(at, y, color=c, ls=DASHES[i % 4], marker="osD^v"[i % 5] * markers, ms=4.5, label=name)
        if bands and name in bands:
            half = _array(bands[name])
            ax.fill_between(at, y - half, y + half, color=c, alpha=0.18, lw=0)
    return _finish(fig, ax, axes, floor)


def loss_curve(losses, *, floor=None, smooth=50, fig=None, **axes):
    """Loss over training steps: every value pale, a running mean on top, the exact floor dashed."""
    losses = _array(losses)
    ax = (fig := _figure(fig, 6.4, 3.2)).subplots()
    ax.plot(losses, color=MODEL, lw=0.6, alpha=0.3)
    width = max(1, min(smooth, len(losses) // 4))
    mean = np.convolve(losses, np.full(width, 1 / width), "valid")
    ax.plot(np.arange(width - 1, len(losses)), mean, color=MODEL, label=f"mean of {width} steps")
    return _finish(fig, ax, {"xlabel": "training step", "ylabel": "loss"} | axes, floor)


def loss_by_t(t, loss, floor=None, *, fig=None, **axes):
    """Mean loss at each time, over the exact floor (the target's variance given x_t) where it is known."""
    named = {"model": loss} | ({} if floor is None else {"exact floor": floor})
    return curves(t, named, fig=fig, **{"xlabel": "time $t$", "ylabel": "mean loss"} | axes)


def bars(names, series, *, stacked=False, fig=None, **axes):
    """Bars: one group for each of ``names``, one bar in it for each entry of ``series`` (name -> values).

    ``ylabel`` is required; ``stacked`` piles the bars of a group up (terms of a sum).
    """
    ax = (fig := _figure(fig, 6.4, 3.4)).subplots()
    at, width, base = np.arange(len(names)), 0.8 if stacked else 0.8 / len(series), np.zeros(len(names))
    for i, (name, values) in enumerate(series.items()):
        x = at if stacked else at + (i - (len(series) - 1) / 2) * width
        ax.bar(x, _array(values), width * 0.94, base if stacked else 0, color=color(name, i), label=name)
        base = base + _array(values)
    ax.set_xticks(at, [_text(n) for n in names])
    ax.grid(False, axis="x")
    _finish(fig, ax, {"xlabel": ""} | axes)
    if len(series) > 1:  # bars fill their axes: the legend stands beside them
        ax.get_legend().remove()
        fig.legend(loc="outside right upper")
    return fig


def heatmap(matrix, rows=None, cols=None, *, annotate=False, diverging=False, fig=None, **axes):
    """A matrix as shades with a colour bar; ``xlabel`` (columns) and ``ylabel`` (rows) are required.

    ``annotate`` writes the values; ``diverging`` centres the colours at 0.
    """
    matrix = _array(matrix)
    top = float(np.abs(matrix).max()) if diverging else None
    ax = (fig := _figure(fig, 4.8, 4.0)).subplots()
    shown = ax.imshow(matrix, DIVERGING if diverging else DENSITY, vmin=top and -top, vmax=top, aspect="auto")
    fig.colorbar(shown, ax=ax, shrink=0.85).outline.set_visible(False)
    for setter, names in ((ax.set_yticks, rows), (ax.set_xticks, cols)):
        if names is not None:
            setter(range(len(names)), [_text(n) for n in names])
    for (i, j), value in np.ndenumerate(matrix) if annotate else ():
        dark = sum(shown.cmap(shown.norm(value))[:3]) < 1.5
        ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8.5, color="w" if dark else EXACT)
    ax.grid(False)
    return _finish(fig, ax, axes)


def _array(x):
    """A NumPy array of ``x``, wherever it lives and whatever graph it hangs on."""
    return x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def _points(name, x):
    x = _array(x)
    if x.ndim != 2 or x.shape[1] != 2:
        checks.fail(name, "be points of shape (N, 2)", f"shape {x.shape}")
    return x


def _text(value):
    """A label as text; 0-d tensors and floats become short numbers."""
    value = value.item() if isinstance(value, torch.Tensor | np.generic) else value
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _figure(fig, width, height):
    return plt.figure(figsize=(width, height)) if fig is None else fig


def _grid(n, ncol, panel, fig):
    """``n`` axes in rows of ``ncol`` (all in one by default); the unused ones are removed."""
    ncol = min(n, ncol or n)
    nrow = math.ceil(n / ncol)
    fig = _figure(fig, ncol * panel[0], nrow * panel[1])
    axes = fig.subplots(nrow, ncol, squeeze=False).ravel()
    for ax in axes[n:]:
        ax.remove()
    return axes[:n], fig


def _square(limit, n):
    """(n * n, 2) float64 grid points of a square, and the two (n, n) coordinates."""
    line = torch.linspace(-limit, limit, n, dtype=torch.float64)
    u, v = torch.meshgrid(line, line, indexing="xy")
    return torch.stack([u.flatten(), v.flatten()], 1), (u.numpy(), v.numpy())


def _finish(fig, ax, axes, floor=None):
    """Floor, labels and legend (where there is more than one thing to name); missing labels are refused."""
    for name in ("xlabel", "ylabel"):
        if name not in axes:
            checks.fail(name, "be given (a figure needs axis labels)", "nothing", TypeError)
    if floor is not None:
        ax.axhline(float(floor), color=EXACT, ls="--", lw=1.3, label="exact floor")
    ax.set(**axes)
    if len(ax.get_legend_handles_labels()[0]) > 1:
        ax.legend()
    return fig
