"""Exercises of notebook 06: a U-Net on digits, and the numbers that judge it."""

import numpy as np
import torch

from . import Exercise


def _field(layers, jump_before=True, growth=lambda kernel: kernel - 1, strides=True):
    """Receptive field of a stack of (kernel, stride): each layer adds kernel - 1 steps of the present jump."""
    field, jump = 1, 1
    for kernel, stride in layers:
        jump_after = jump * (stride if strides else 1)
        field += growth(kernel) * (jump if jump_before else jump_after)
        jump = jump_after
    return field


def _blind(x, stds, log_weight=lambda x, std: -len(x) * std.log() - (x**2).sum() / (2 * std**2)):
    """Best guess of the noise in x = std * eps when each std is equally likely and nobody says which it was."""
    stds = torch.as_tensor(stds, dtype=x.dtype)
    return (log_weight(x, stds).softmax(0) / stds).sum() * x


def _blind_std(x, stds):
    """The mistake of dividing by the mean std instead of averaging 1 / std."""
    stds = torch.as_tensor(stds, dtype=x.dtype)
    weight = (-len(x) * stds.log() - (x**2).sum() / (2 * stds**2)).softmax(0)
    return x / (weight * stds).sum()


def _line(sizes, values):
    """Slope and intercept of the least-squares line of ``values`` over ``sizes``."""
    return np.polyfit(np.asarray(sizes, dtype=float), np.asarray(values, dtype=float), 1)


def _points(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


_STACKS = (
    ([(3, 1)],),
    ([(3, 1), (3, 1), (3, 2), (3, 1)],),
    ([(3, 2), (3, 2), (3, 1)],),
    ([(5, 1), (1, 1), (3, 2), (4, 2), (3, 1)],),
)
_GUESSES = (
    (_points(1, seed=0), [0.3, 0.9]),
    (0.5 * _points(2, seed=1), [0.2, 0.5, 1.0]),
    (0.6 * _points(8, seed=2), [0.5, 0.7]),
)
_SIZES = (([100, 200, 400], [8.0, 5.0, 3.5]), ([50, 100, 200, 800], [3.1, 2.2, 1.4, 1.1]))

EXERCISES = {
    "06.1": Exercise(
        lambda trace, n, m: trace / n + trace / m,
        inputs=((1.0, 10, 10), (64.0, 300, 900), (2.5, 50, 1000)),
        mistakes={
            "both means wobble: add the variance of the second one, too": lambda trace, n, m: trace / n,
            "the two sets are pooled here, as if they were one. They have a mean each, and the variances add": (
                lambda trace, n, m: trace / (n + m)
            ),
            "the means are independent, so the variance of their difference is a sum, not a difference": (
                lambda trace, n, m: trace / n - trace / m
            ),
            "this is a root; the distance holds the squared length of the difference": (
                lambda trace, n, m: (trace / n + trace / m) ** 0.5
            ),
            "that is the wobble of one number, not of a mean: averaging n of them divides the variance by n": (
                lambda trace, n, m: 2 * trace
            ),
        },
    ),
    "06.2": Exercise(
        _field,
        inputs=_STACKS,
        mistakes={
            "strides are missing: after a stride of 2, one step on the small map is two pixels of the image": (
                lambda layers: _field(layers, strides=False)
            ),
            "a layer's own stride counts for the layers after it, not for itself": (
                lambda layers: _field(layers, jump_before=False)
            ),
            "a kernel of 3 reaches one pixel further on each side: it adds kernel - 1, not kernel": (
                lambda layers: _field(layers, growth=lambda kernel: kernel)
            ),
            "the field of no layer is the pixel itself: start at 1": lambda layers: _field(layers) - 1,
            "a kernel reaches out on both sides, so it adds kernel - 1, not half of that": (
                lambda layers: _field(layers, growth=lambda kernel: (kernel - 1) // 2)
            ),
        },
    ),
    "06.3": Exercise(
        _blind,
        inputs=_GUESSES,
        mistakes={
            "all levels have the same weight here, but x itself says which level is likely: a long x, a large std": (
                lambda x, stds: _blind(x, stds, lambda x, std: torch.zeros_like(std))
            ),
            "the Gaussian density has a factor std^-D in front, D = len(x); without it large levels always win": (
                lambda x, stds: _blind(x, stds, lambda x, std: -(x**2).sum() / (2 * std**2))
            ),
            "x has D = len(x) entries, each with its own factor 1/std: the density is a product over all of them": (
                lambda x, stds: _blind(x, stds, lambda x, std: -std.log() - (x**2).sum() / (2 * std**2))
            ),
            "the exponent is -|x|^2 / (2 std^2): a factor one half is missing": (
                lambda x, stds: _blind(x, stds, lambda x, std: -len(x) * std.log() - (x**2).sum() / std**2)
            ),
            "this divides by the mean std. Average the answers x / std, not the levels: 1/std is not linear": (
                _blind_std
            ),
        },
        tol=1e-6,
    ),
    "06.4": Exercise(
        lambda sizes, values: _line(1 / np.asarray(sizes, dtype=float), values)[1],
        inputs=_SIZES,
        mistakes={
            "this is the slope of the line, the strength of the bias. Infinitely many samples means 1/n = 0: "
            "the intercept": lambda sizes, values: _line(1 / np.asarray(sizes, dtype=float), values)[0],
            "the line runs over n here; the bias falls like 1/n, so fit over 1/n": (
                lambda sizes, values: _line(sizes, values)[1]
            ),
            "this is the value at the largest n: smaller bias, but not none": (lambda sizes, values: values[-1]),
            "this is the mean of the values; every one of them is biased upwards": (
                lambda sizes, values: sum(values) / len(values)
            ),
            "the bias falls like 1/n, not like 1/sqrt(n): it comes from variances": (
                lambda sizes, values: _line(np.asarray(sizes, dtype=float) ** -0.5, values)[1]
            ),
        },
        tol=1e-5,
    ),
}
