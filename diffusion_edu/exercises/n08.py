"""Exercises of notebook 08: score matching and Langevin."""

import math

import torch

from . import Exercise


def _bugged_variance(v, epsilon):
    """Stationary variance of x - epsilon x / v + sqrt(2) epsilon z."""
    return 2 * epsilon**2 / (1 - (1 - epsilon / v) ** 2)


def _ncsn_score(eps_net, x, sigma):
    alpha_bar = 1 / (1 + sigma**2)
    return -eps_net(math.sqrt(alpha_bar) * x, alpha_bar) / sigma


def _eps_net(x_t, alpha_bar):
    """The perfect DDPM network of N(0.3, 0.2)."""
    return (1 - alpha_bar) ** 0.5 * (x_t - 0.3 * alpha_bar**0.5) / (0.2 * alpha_bar + 1 - alpha_bar)


def _read_as(alpha_bar, scale, divide=lambda sigma, alpha_bar: sigma, sign=-1):
    """The score read with another alpha_bar(sigma), input factor(alpha_bar), divisor or sign."""

    def score(eps_net, x, sigma):
        a = alpha_bar(sigma)
        return sign * eps_net(scale(a) * x, a) / divide(sigma, a)

    return score


def _alpha_bar(sigma):
    return 1 / (1 + sigma**2)


def _from_ncsn(epsilon, sigma, sigma_last):
    r = epsilon / (2 * sigma_last**2)
    return r * sigma**2, r


def _level_variance(s2, sigma, r, *, v=lambda s2, sigma: s2 + sigma**2, bias=lambda e, v: 1 - e / (2 * v), largest=2):
    """Where the walk at one level settles, and the largest r; the keywords change one piece."""
    v = v(s2, sigma)
    return v / bias(r * sigma**2, v), largest * v / sigma**2


def _with(**piece):
    return lambda *args: _level_variance(*args, **piece)


EXERCISES = {
    "08.1": Exercise(
        _bugged_variance,
        inputs=((1.0, 0.01), (0.25, 0.1), (4.0, 0.5)),
        mistakes={
            "this is where the right step ends, the one with sqrt(2 epsilon)": (
                lambda v, epsilon: 2 * epsilon / (1 - (1 - epsilon / v) ** 2)
            ),
            "the score of N(0, v) is -x / v: the step multiplies x by 1 - epsilon / v": (
                lambda v, epsilon: 2 * epsilon**2 / (1 - (1 - epsilon) ** 2)
            ),
            "a variance is multiplied by the square of the factor": lambda v, epsilon: 2 * epsilon * v,
            "the variance of sqrt(2) epsilon z is 2 epsilon^2": (
                lambda v, epsilon: math.sqrt(2) * epsilon / (1 - (1 - epsilon / v) ** 2)
            ),
            "this is a standard deviation": lambda v, epsilon: math.sqrt(_bugged_variance(v, epsilon)),
            "this is the variance after one step from 0; the question asks where it ends": lambda v, e: 2 * e**2,
            "this is the limit of small steps; the exact value has 1 - (1 - epsilon / v)^2 below": lambda v, e: e * v,
        },
    ),
    "08.2": Exercise(
        _ncsn_score,
        inputs=tuple((_eps_net, torch.linspace(-2, 2, 5, dtype=torch.float64), sigma) for sigma in (0.1, 1.0, 5.0)),
        mistakes={
            "the sign: the noise points away from the data, the score back to them (E000-21)": (
                _read_as(_alpha_bar, math.sqrt, sign=1)
            ),
            "DDPM shrinks its data: the network must see sqrt(alpha_bar) x (E004-13)": (
                _read_as(_alpha_bar, lambda a: 1.0)
            ),
            "x is multiplied by sqrt(alpha_bar) on its way into the network, not divided": (
                _read_as(_alpha_bar, lambda a: a**-0.5)
            ),
            "the input is multiplied by sqrt(alpha_bar), the factor of the data, not by alpha_bar": (
                _read_as(_alpha_bar, lambda a: a)
            ),
            "this is the score of x_t, the shrunk point: divide by sigma, the noise in x": (
                _read_as(_alpha_bar, math.sqrt, lambda sigma, a: math.sqrt(1 - a))
            ),
            "one root or square is off: alpha_bar is where (1 - alpha_bar) / alpha_bar is sigma^2": (
                _read_as(lambda sigma: 1 / (1 + sigma), math.sqrt)
            ),
            "this is the noise with a minus; divide it by sigma": _read_as(_alpha_bar, math.sqrt, lambda sigma, a: 1.0),
            "this is divided by the variance of the noise; a score is the noise over its standard deviation": (
                _read_as(_alpha_bar, math.sqrt, lambda sigma, a: sigma**2)
            ),
        },
    ),
    "08.3": Exercise(
        _from_ncsn,
        inputs=((2e-5, 1.0, 0.01), (0.3, 0.5, 0.2), (0.002, 4.0, 0.1)),
        mistakes={
            "alpha_i is twice our step: it stands under the root alone, and halved before the score": (
                lambda e, s, last: (e * s**2 / last**2, e / last**2)
            ),
            "the step at level i is right; r, too, is half of theirs": (
                lambda e, s, last: (e * s**2 / (2 * last**2), e / last**2)
            ),
            "r is right; our step is half of alpha_i": lambda e, s, last: (e * s**2 / last**2, e / (2 * last**2)),
            "levels enter as variances: sigma_i^2 / sigma_L^2": (
                lambda e, s, last: (e * s / (2 * last), e / (2 * last))
            ),
            "r is the same at every level: our step over sigma_i^2": (
                lambda e, s, last: (e * s**2 / (2 * last**2), e * s**2 / (2 * last**2))
            ),
            "r multiplies sigma_i^2 in the package, so the step at the last level is r sigma_L^2": (
                lambda e, s, last: (e * s**2 / (2 * last**2), e / 2)
            ),
            "the wrong way round: doubled instead of halved": (
                lambda e, s, last: (2 * e * s**2 / last**2, 2 * e / last**2)
            ),
        },
    ),
    "08.4": Exercise(
        _level_variance,
        inputs=((0.25, 0.5, 0.2), (0.0, 2.0, 0.5), (1.5, 0.7, 1.5)),
        mistakes={
            "the walk is on the noised data: their variance is s^2 + sigma^2, and so is the score's": (
                _with(v=lambda s2, sigma: s2 or math.nan)
            ),
            "the data have a variance of their own: the score's is s^2 + sigma^2, not sigma^2": (
                _with(v=lambda s2, sigma: sigma**2)
            ),
            "this is the density's own variance; a fixed step adds to it": _with(bias=lambda e, v: 1.0),
            "one half is missing: solve v = (1 - e)^2 v + 2 e for N(0, 1) again": _with(bias=lambda e, v: 1 - e / v),
            "at this r the factor 1 - r sigma^2 / v is 0; it may go down to -1": _with(largest=1),
            "this is where the printed step would settle, with sqrt(2) epsilon (E004-02)": (
                lambda s2, sigma, r: (
                    (r * sigma**2 * _level_variance(s2, sigma, r)[0] / (s2 + sigma**2),)
                    + _level_variance(s2, sigma, r)[1:]
                )
            ),
            "the largest r is right; the first is a standard deviation": (
                lambda s2, sigma, r: (math.sqrt(_level_variance(s2, sigma, r)[0]), _level_variance(s2, sigma, r)[1])
            ),
            "the variance is right; the second is the largest step, not the largest r: divide it by sigma^2": (
                lambda s2, sigma, r: (_level_variance(s2, sigma, r)[0], 2 * (s2 + sigma**2))
            ),
        },
    ),
}
