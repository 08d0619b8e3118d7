"""Exercises of notebook 09: the SDE view."""

import math

import torch

from ..process import VPSDE
from . import Exercise


def _alpha_bar(t, c):
    return (1 - t) ** c


def _subvp(x0, B, eps, std=lambda B: -torch.expm1(-B), factor=lambda B: torch.exp(-B / 2)):
    return factor(B)[:, None] * x0 + std(B)[:, None] * eps


def _with(**kw):
    return lambda x0, B, eps: _subvp(x0, B, eps, **kw)


def _batch():
    x0, eps = torch.randn(2, 6, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return x0, torch.tensor([0.01, 0.3, 0.7, 1.5, 4.0, 10.05], dtype=torch.float64), eps


def _spread(factor, noise):
    """Variance after steps x -> factor x + N(0, noise), the last without noise, from N(0, 1)."""
    V = 1.0
    for a, b in zip(factor.tolist(), [*noise.tolist()[:-1], 0.0], strict=True):
        V = a * a * V + b
    return V


def _levels(n, var):
    """beta, alpha_bar at the n times t > 0 of a uniform grid from 1 to 0, and the variance of x_t there."""
    vp, t = VPSDE(), torch.linspace(1, 0, n + 1, dtype=torch.float64)
    alpha_bar = torch.exp(-vp.integral(t))
    return vp.rate(t[:-1]), alpha_bar, (alpha_bar * var + 1 - alpha_bar)[:-1]


def _walk(f, s, n=20_000, var=0.04):
    """Final variance with the drift f (-beta x / 2) + s (-g^2 score): the right signs are 1 and 1."""
    rate, _, v = _levels(n, var)
    return _spread(1 + rate / n * (f / 2 - s / v), rate / n)


_RIGHT, _ODD = _walk(1, 1), _walk(-1, 1)


def _euler_maruyama(n, var=0.25):
    rate, _, v = _levels(n, var)
    return _spread(1 + rate / n * (1 / 2 - 1 / v), rate / n)


def _ancestral(n, var=0.25):
    _, alpha_bar, v = _levels(n, var)
    alpha = alpha_bar[:-1] / alpha_bar[1:]
    return _spread((1 - (1 - alpha) / v) / alpha.sqrt(), 1 - alpha)


_OFF = [[abs(rule(n) / 0.25 - 1) for n in range(1, 401)] for rule in (_euler_maruyama, _ancestral)]


def _steps(bound=0.01, first=False):
    """Numbers of steps from which on, up to 400, the final variance is within the bound; or where it first is."""
    good = [[off < bound for off in rule] for rule in _OFF]
    return tuple(1 + g.index(True) if first else len(g) + 1 - g[::-1].index(False) for g in good)


EXERCISES = {
    "09.1": Exercise(
        _alpha_bar,
        inputs=tuple((torch.linspace(0.05, 0.9, 6, dtype=torch.float64), c) for c in (0.5, 1.0, 3.0)),
        mistakes={
            "this is exp(+ integral), above 1: the signal would grow (E000-19)": lambda t, c: (1 - t) ** -c,
            "this is the factor of x(0), the square root of alpha-bar": lambda t, c: (1 - t) ** (c / 2),
            "this is the variance of the noise, 1 - alpha-bar": lambda t, c: 1 - (1 - t) ** c,
            "this is the integral of beta; alpha-bar is exp(- integral)": lambda t, c: -c * torch.log(1 - t),
            "beta is not constant: beta(t) t is not its integral": lambda t, c: torch.exp(-c * t / (1 - t)),
            "the share of the signal's variance is exp(- integral), not its square": lambda t, c: (1 - t) ** (2 * c),
            "this is one factor of the product, with dt = 1; alpha-bar multiplies many": lambda t, c: 1 - c / (1 - t),
        },
    ),
    "09.2": Exercise(
        lambda x0, B, eps: _subvp(x0, B, eps),
        inputs=(_batch(),),
        mistakes={
            "this is VP's noise: sub-VP's standard deviation is VP's *variance*, 1 - exp(-B)": (
                _with(std=lambda B: (1 - torch.exp(-B)).sqrt())
            ),
            "eps is multiplied by the variance (1 - exp(-B))^2; a factor of eps is a standard deviation": (
                _with(std=lambda B: (1 - torch.exp(-B)) ** 2)
            ),
            "sqrt(1 - exp(-2B)) belongs to the diffusion g at one time; the kernel adds up what came before": (
                _with(std=lambda B: (1 - torch.exp(-2 * B)).sqrt())
            ),
            "x0 is multiplied by alpha-bar = exp(-B); its factor is the root of that": (
                _with(factor=lambda B: torch.exp(-B))
            ),
            "the signs of the exponents are turned: x0 would grow (E000-19)": (
                _with(std=lambda B: 1 - torch.exp(B), factor=lambda B: torch.exp(B / 2))
            ),
            "this is VE: sub-VP shrinks x0, too": _with(factor=torch.ones_like),
            "without eps this is only the mean": _with(std=torch.zeros_like),
        },
        points=2,
    ),
    "09.3": Exercise(
        _ODD / _RIGHT,
        mistakes={
            "this is the right variance over that of (c); the question asks for the inverse": _RIGHT / _ODD,
            "this is the variance itself; divide it by the right one": _ODD,
            "this is a ratio of standard deviations; square it": math.sqrt(_ODD / _RIGHT),
            "this is (a), where the sign of the score is wrong": _walk(1, -1) / _RIGHT,
            "this is (b), where both signs are wrong": _walk(-1, -1) / _RIGHT,
            "this is for data of variance 0.25, as above; the question asks for 0.04": (
                _walk(-1, 1, var=0.25) / _walk(1, 1, var=0.25)
            ),
            "this is the right walk against itself: in (c), f stands with the other sign": 1.0,
        },
        tol=0.01,
    ),
    "09.4": Exercise(
        _steps(),
        mistakes={
            "the ancestral error passes through 0 near n = 11 and comes back: it must *stay* below": _steps(first=True),
            "these are for 2 per cent; the question asks for 1": _steps(0.02),
            "the pair is the other way round: Euler-Maruyama first": _steps()[::-1],
            "these are the last numbers of steps that fail; one more holds": tuple(n - 1 for n in _steps()),
            "one per cent of the variance is half a per cent of the standard deviation": _steps(0.0201),
        },
    ),
}
