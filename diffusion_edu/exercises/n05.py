"""Exercises of notebook 05: schedules and targets."""

import math
import warnings

import torch

from ..schedules import cosine_beta, linear_beta
from . import Exercise

M, S2 = 1.3, 0.25  # mean and variance of the Gaussian data


def _turn(x_t, v, a_t, b_t, a_s, b_s):
    return (a_s * a_t + b_s * b_t) * x_t + (b_s * a_t - a_s * b_t) * v


def _levels():
    """(x_t, v, a_t, b_t, a_s, b_s) at three pairs of times."""
    x_t, v = torch.randn(2, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    angles = torch.tensor([[0.3, 1.0, 1.5], [0.0, 0.8, 1.1]], dtype=torch.float64)
    (a_t, a_s), (b_t, b_s) = angles.cos(), angles.sin()
    return x_t, v, a_t, b_t, a_s, b_s


def _time_of(alpha_bar, level, *, log=torch.log):
    rise = -log(alpha_bar)
    k = torch.searchsorted(rise, -log(level)).clamp(1, len(rise) - 1)
    return k - 1 + (-log(level) - rise[k - 1]) / (rise[k] - rise[k - 1])


def _whole(shift):
    """The time at an entry of the table, without reading between them."""

    def time_of(alpha_bar, level):
        return torch.searchsorted(-alpha_bar, -level).double() - shift

    return time_of


def _alpha_bar_T(table):
    return math.exp(torch.log1p(-table).sum().item())


def _zoom(alpha_bar):
    return 0.01 * math.sqrt((1 - alpha_bar) / alpha_bar)


def _smallest_T(enough):
    """The first length of the linear table with DDPM's ends whose alpha_bar_T is ``enough``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return next(T for T in range(2, 2000) if enough(_alpha_bar_T(linear_beta(T))))


def _off(a, flow):
    slope = a * S2 / (a * S2 + 1 - a)  # of the square of how x_0 follows x_T
    return M * (math.sqrt(slope) if flow else slope)


_CLIPPED, _DDPM = _alpha_bar_T(cosine_beta(1000)), _alpha_bar_T(linear_beta(1000))
_TABLE = torch.cumprod(1 - cosine_beta(50), 0)

EXERCISES = {
    "05.1": Exercise(
        _turn,
        inputs=(_levels(),),
        mistakes={
            "the sense of rotation is wrong: from t back to s the angle shrinks, so the sine is negative": (
                lambda x, v, a_t, b_t, a_s, b_s: (a_s * a_t + b_s * b_t) * x - (b_s * a_t - a_s * b_t) * v
            ),
            "this turns by the sum of the angles; it is their difference": (
                lambda x, v, a_t, b_t, a_s, b_s: (a_s * a_t - b_s * b_t) * x + (b_s * a_t + a_s * b_t) * v
            ),
            "this is x0-hat; it still has to be taken to the noise level s": (
                lambda x, v, a_t, b_t, a_s, b_s: a_t * x - b_t * v
            ),
            "this is eps-hat; add what is left of the data at s": lambda x, v, a_t, b_t, a_s, b_s: b_t * x + a_t * v,
            "the sign in x0-hat: x_0 = a_t x_t - b_t v": (
                lambda x, v, a_t, b_t, a_s, b_s: a_s * (a_t * x + b_t * v) + b_s * (b_t * x + a_t * v)
            ),
            "v is not the noise: eps-hat = b_t x_t + a_t v": (
                lambda x, v, a_t, b_t, a_s, b_s: a_s * (a_t * x - b_t * v) + b_s * v
            ),
            "here v was read as the noise in both parts; it is a mixture of noise and data": (
                lambda x, v, a_t, b_t, a_s, b_s: a_s * (x - b_t * v) / a_t + b_s * v
            ),
            "this is the step of a straight line along v; the path is an arc": (
                lambda x, v, a_t, b_t, a_s, b_s: x + (torch.atan2(b_s, a_s) - torch.atan2(b_t, a_t)) * v
            ),
        },
    ),
    "05.2": Exercise(
        _time_of,
        inputs=(
            (_TABLE, torch.tensor([0.999, 0.7, 0.5, 0.01, 1e-4], dtype=torch.float64)),
            (torch.tensor([1.0, 0.8, 0.4, 0.1], dtype=torch.float64), torch.tensor([0.8, 0.5], dtype=torch.float64)),
        ),
        mistakes={
            "here alpha-bar itself is a straight line between the entries; its logarithm should be": (
                lambda alpha_bar, level: _time_of(alpha_bar, level, log=lambda x: x)
            ),
            "here the log SNR is a straight line between the entries (and infinite at 0); log alpha-bar should be": (
                lambda alpha_bar, level: _time_of(alpha_bar, level, log=torch.logit)
            ),
            "this is the first whole time at or below the level; read between the entries": _whole(0),
            "this is the last whole time above the level; read between the entries": _whole(1),
            "one too large: the interval that ends at entry k begins at k - 1": (
                lambda alpha_bar, level: _time_of(alpha_bar, level) + 1
            ),
            "one too small: entry 0 of the table is clean data, time 0": (
                lambda alpha_bar, level: _time_of(alpha_bar, level) - 1
            ),
            "this is t / T; the time of a table runs from 0 to T": (
                lambda alpha_bar, level: _time_of(alpha_bar, level) / (len(alpha_bar) - 1)
            ),
        },
        tol=1e-8,
        points=2,
    ),
    "05.3": Exercise(
        _zoom(_CLIPPED),
        mistakes={
            "without the 0.01: this is what an error of 1 becomes": 100 * _zoom(_CLIPPED),
            "this is sqrt(SNR) times the error, its inverse; x_0 = (x_t - b eps) / a": (1e-4 / _zoom(_CLIPPED)),
            "this divides by alpha-bar; x_0-hat divides by its root": 0.01 * (1 - _CLIPPED) / _CLIPPED,
            "this is 1 / sqrt(alpha_T), the last step alone; x_0-hat undoes all of them": 0.01 * math.sqrt(1000),
            "this is for DDPM's linear table; take the cosine": _zoom(_DDPM),
            "this is for c = 0.99": _zoom(_alpha_bar_T(cosine_beta(1000, max_beta=0.99))),
            "this is for c = 0.9999": _zoom(_alpha_bar_T(cosine_beta(1000, max_beta=0.9999))),
            "this is for c = 0.9": _zoom(_alpha_bar_T(cosine_beta(1000, max_beta=0.9))),
        },
        tol=1e-3,
    ),
    "05.4": Exercise(
        _smallest_T(lambda a: _off(a, flow=True) < 0.01),
        mistakes={
            "this is the largest T that still misses by more; take the next": (
                _smallest_T(lambda a: _off(a, flow=True) < 0.01) - 1
            ),
            "this is for exact reverse steps, which forget their start; the flow does not": (
                _smallest_T(lambda a: _off(a, flow=False) < 0.01)
            ),
            "this is where alpha-bar falls below 0.01, the package's line; the flow wants more": (
                _smallest_T(lambda a: a < 0.01)
            ),
            "this is where the signal left, sqrt(alpha-bar), falls below 0.01; the mean is off by less than that": (
                _smallest_T(lambda a: math.sqrt(a) < 0.01)
            ),
            "this is for 1 per cent of the mean; the question asks for 0.01": (
                _smallest_T(lambda a: _off(a, flow=True) < 0.01 * M)
            ),
        },
        tol=1e-9,
    ),
}
