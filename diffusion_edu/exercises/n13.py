"""Exercises of notebook 13: classifier guidance."""

import math

import torch

from . import Exercise


def _mean_shifts(alpha, alpha_bar, sigma2, w, g_x, g_mean):
    return w * (1 - alpha) / alpha**0.5 * g_x, w * sigma2 * g_mean


def _shifts(*, eps=lambda alpha, ab: (1 - alpha) / alpha**0.5, mean=lambda s2: s2, at=lambda g_x, g_mean: g_mean):
    """Both shifts with another factor for eps~, another factor for the mean, or its gradient elsewhere."""
    return lambda alpha, ab, s2, w, g_x, g_mean: (w * eps(alpha, ab) * g_x, w * mean(s2) * at(g_x, g_mean))


def _guided_ddim(x_t, eps, grad, ab_t, ab_s, w, *, factor=lambda ab_t, ab_s: (1 - ab_t) ** 0.5, old=""):
    """One guided step; the keywords change the factor of the gradient, or leave x0 or the direction unguided."""
    guided = eps - w * factor(ab_t, ab_s) * grad
    x0 = (x_t - (1 - ab_t) ** 0.5 * (eps if old == "x0" else guided)) / ab_t**0.5
    return ab_s**0.5 * x0 + (1 - ab_s) ** 0.5 * (eps if old == "direction" else guided)


def _step(**piece):
    return lambda *args: _guided_ddim(*args, **piece)


def _clean_mean(c, w, alpha_bar):
    """Mean of the samples of N(0, 1) pushed by the clean slope c at every time."""
    return -w * c * math.log(alpha_bar) / 2


def _tempered_variance(s2, p, w):
    return 1 / ((1 - w) / s2 + w / p)


def _w_to_ask_for(s2, p, w):
    return math.log(_tempered_variance(s2, p, w) / s2) / math.log(p / s2)


def _points(seed):
    """x_t, eps and grad."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(3, 3, 2, generator=generator, dtype=torch.float64))


EXERCISES = {
    "13.1": Exercise(
        _mean_shifts,
        inputs=((0.98, 0.4, 0.015, 3.0, 0.7, 0.5), (0.9, 0.05, 0.1, 1.0, -1.2, -0.8), (0.5, 0.5, 0.2, 2.0, 0.3, 0.4)),
        mistakes={
            "the root cancels: the network's eps is divided by it, and the guided part of eps~ carries it": (
                _shifts(eps=lambda alpha, ab: (1 - alpha) / (alpha * (1 - ab)) ** 0.5)
            ),
            "eps~ - eps is not the mean's shift yet: multiply by -beta / sqrt(alpha (1 - alpha_bar))": (
                _shifts(eps=lambda alpha, ab: -((1 - ab) ** 0.5))
            ),
            "this is the shift of x0-hat; the step's mean takes only a part of it": (
                _shifts(eps=lambda alpha, ab: (1 - ab) / ab**0.5)
            ),
            "DDPM's mean has 1 / sqrt(alpha) before the bracket": _shifts(eps=lambda alpha, ab: 1 - alpha),
            "1 / sqrt(alpha), not 1 / alpha": _shifts(eps=lambda alpha, ab: (1 - alpha) / alpha),
            "two minus signs: the noise is taken away from x_t, and the gradient from the noise": (
                _shifts(eps=lambda alpha, ab: -(1 - alpha) / alpha**0.5)
            ),
            "the shifted mean takes the gradient at the mean": _shifts(at=lambda g_x, g_mean: g_x),
            "the mean is shifted by the variance times the gradient, not by the standard deviation": (
                _shifts(mean=lambda s2: s2**0.5)
            ),
            "the other way round: eps~ first, then the shifted mean": lambda *case: _mean_shifts(*case)[::-1],
        },
        points=2,
    ),
    "13.2": Exercise(
        _guided_ddim,
        inputs=((*_points(0), 0.3, 0.6, 3.0), (*_points(1), 0.05, 0.2, 1.0), (*_points(2), 0.9, 1.0, 2.0)),
        mistakes={
            "the noise points away from the data, the gradient towards the class: eps minus w std grad": (
                _step(factor=lambda ab_t, ab_s: -((1 - ab_t) ** 0.5))
            ),
            "a gradient becomes a noise by the factor sqrt(1 - alpha_bar_t)": _step(factor=lambda ab_t, ab_s: 1.0),
            "sqrt(1 - alpha_bar_t), with its root": _step(factor=lambda ab_t, ab_s: 1 - ab_t),
            "the gradient was taken at t: its factor is that of t, not of s": (
                _step(factor=lambda ab_t, ab_s: (1 - ab_s) ** 0.5)
            ),
            "the guided eps belongs in the direction back to x_t, too, not only in x0-hat": _step(old="direction"),
            "the guided eps belongs in x0-hat, too, not only in the direction back to x_t": _step(old="x0"),
            "w = 1 is one full gradient here: w, not 1 + w": (
                lambda x, eps, grad, ab_t, ab_s, w: _guided_ddim(x, eps, grad, ab_t, ab_s, 1 + w)
            ),
            "this is the step without guidance": lambda *case: _guided_ddim(*case[:-1], 0.0),
        },
    ),
    "13.3": Exercise(
        _clean_mean,
        inputs=((1.0, 1.0, 4e-5), (0.5, 3.0, 0.01), (-2.0, 1.5, 0.3)),
        mistakes={
            "that is where the noise-aware classifier leads, whose slope c sqrt(alpha_bar) fades": (
                lambda c, w, a: w * c
            ),
            "that is the noise-aware classifier's mean, end included; the clean slope does not fade": (
                lambda c, w, a: w * c * (1 - a**0.5)
            ),
            "the ODE has half of g^2 before the score, and g^2 = beta": lambda c, w, a: -w * c * math.log(a),
            "alpha_bar, not its root: minus its logarithm is the integral of beta": (
                lambda c, w, a: -w * c * math.log(a) / 4
            ),
            "the sign: the walkers go down in time, and up the gradient": lambda c, w, a: w * c * math.log(a) / 2,
            "the push is the same at all times: integrate beta, not beta alpha_bar": (
                lambda c, w, a: w * c * (1 - a) / 2
            ),
            "the ODE's drift -beta x / 2 and the score of N(0, 1) cancel: x does not shrink on the way": (
                lambda c, w, a: w * c * (a**-0.5 - 1)
            ),
        },
    ),
    "13.4": Exercise(
        _w_to_ask_for,
        inputs=((1.0, 1 / 3, 4.0), (2.0, 0.5, 0.5), (0.25, 0.2, 8.0), (1.5, 0.3, 1.0)),
        mistakes={
            "this is the tempered variance; which w gives it?": _tempered_variance,
            "that is right for s2 = 1 only: divide both variances by s2": (
                lambda s2, p, w: math.log(_tempered_variance(s2, p, w)) / math.log(p)
            ),
            "the other way round: this is the tempered density's w that has the sampler's variance at w": (
                lambda s2, p, w: ((s2 / p) ** w - 1) / (s2 / p - 1)
            ),
            "the two variances agree at w = 0 and 1 only": lambda s2, p, w: w,
            "w counts from the unconditional model here: 1 is the posterior": (
                lambda s2, p, w: _w_to_ask_for(s2, p, w) - 1
            ),
            "upside down: log of the variance wanted, over log of the posterior's": (
                lambda s2, p, w: 1 / _w_to_ask_for(s2, p, w)
            ),
        },
    ),
}
