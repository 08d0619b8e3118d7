"""Exercises of notebook 03: the Swiss roll of 2015."""

import math

import torch

from . import Exercise


def _weights(alpha, alpha_bar_prev):
    total = 1 - alpha * alpha_bar_prev
    of_x_t = math.sqrt(alpha) * (1 - alpha_bar_prev) / total
    of_x0 = math.sqrt(alpha_bar_prev) * (1 - alpha) / total
    return of_x_t, of_x0, (1 - alpha) * (1 - alpha_bar_prev) / total


def _weights_with(change):
    """The right three numbers, with some of them changed: ``change(parts, alpha, alpha_bar_prev)``."""
    return lambda alpha, alpha_bar_prev: tuple(change(_weights(alpha, alpha_bar_prev), alpha, alpha_bar_prev))


def _decoder(x0, x1, beta_1):
    return _normal_nll(x0, math.sqrt(1 - beta_1) * x1, beta_1)


def _normal_nll(x, mean, var):
    return ((x - mean) ** 2 / (2 * var) + math.log(2 * math.pi * var) / 2).sum(1)


def _chain(beta, var_of, order=reversed):
    v = 1.0
    for b in order(list(beta)):
        v = (1 - b) * v + var_of(b)
    return v


_x0 = torch.tensor([[0.5, -1.0], [1.0, 0.2], [-0.3, 0.8]], dtype=torch.float64)
_x1 = torch.tensor([[0.4, -1.1], [1.5, 0.1], [-0.2, 0.3]], dtype=torch.float64)

EXERCISES = {
    "03.1": Exercise(
        _weights,
        inputs=((0.9, 0.5), (0.7, 0.99), (0.999, 0.8), (0.99, 1.0)),
        mistakes={
            "the weight of x_t carries the variance of the data's witness, 1 - alpha-bar at t - 1. You used t, as one "
            "lecture prints it, and everything cancels to sqrt(alpha)": _weights_with(
                lambda w, alpha, _: (math.sqrt(alpha), *w[1:])
            ),
            "the two weights are swapped: near t = 1 nearly all the weight is on x_0": _weights_with(
                lambda w, *_: (w[1], w[0], w[2])
            ),
            "the third number is a standard deviation; the question asks for the variance": _weights_with(
                lambda w, *_: (*w[:2], math.sqrt(w[2]))
            ),
            "the third number is beta, the variance of a forward step. Knowing x_0 makes the way back less "
            "uncertain": _weights_with(lambda w, alpha, _: (*w[:2], 1 - alpha)),
            "x_t is sqrt(alpha) times x_{t-1} plus noise: seen from x_t, x_{t-1} is near x_t / sqrt(alpha). You left "
            "that factor out": _weights_with(lambda w, alpha, _: (w[0] / math.sqrt(alpha), *w[1:])),
            "the data's witness says sqrt(alpha-bar) x_0: a square root is missing": _weights_with(
                lambda w, _, alpha_bar_prev: (w[0], w[1] * math.sqrt(alpha_bar_prev), w[2])
            ),
        },
        tol=1e-12,
    ),
    "03.2": Exercise(
        _decoder,
        inputs=((_x0, _x1, 0.3), (_x0, _x1, 0.05)),
        mistakes={
            "the sign: a likely point has a small negative log-likelihood": lambda *a: -_decoder(*a),
            "one number an example: sum over its two coordinates, do not average": lambda *a: _decoder(*a) / 2,
            "the mean is sqrt(1 - beta_1) x_1: the forward kernel shrinks": (
                lambda x0, x1, beta_1: _normal_nll(x0, x1, beta_1)
            ),
            "the variance is beta_1; you squared it, as if beta_1 were a standard deviation": (
                lambda x0, x1, beta_1: _normal_nll(x0, math.sqrt(1 - beta_1) * x1, beta_1**2)
            ),
            "the normalising constant log(2 pi beta_1) is missing: without it bits mean nothing": (
                lambda x0, x1, beta_1: ((x0 - math.sqrt(1 - beta_1) * x1) ** 2 / (2 * beta_1)).sum(1)
            ),
            "the roles are swapped: this is q(x_1 | x_0), the decoder is a density of x_0": (
                lambda x0, x1, beta_1: _decoder(x1, x0, beta_1)
            ),
        },
    ),
    "03.3": Exercise(
        lambda beta: _chain(beta, lambda b: b**2),
        inputs=(([0.3],), ([0.1, 0.4],), ([0.001, 0.02, 0.3],)),
        mistakes={
            "this is the right sampler, with variance beta. The slip draws with standard deviation exp(log beta)": (
                lambda beta: _chain(beta, lambda b: b)
            ),
            "each step also shrinks: a factor c on x is a factor c^2 on its variance": (
                lambda beta: 1 + sum(b**2 for b in beta)
            ),
            "the steps run backwards, from T down to 1: the last beta comes first": (
                lambda beta: _chain(beta, lambda b: b**2, order=list)
            ),
            "variances add, not standard deviations: square the slip's beta": (lambda beta: _std_chain(beta) ** 2),
            "this is a standard deviation; the question asks for the variance": (
                lambda beta: math.sqrt(_chain(beta, lambda b: b**2))
            ),
            "the mean is multiplied by sqrt(1 - beta), so the variance by 1 - beta: you squared once too often": (
                lambda beta: _twice_squared(beta)
            ),
        },
    ),
    "03.4": Exercise(
        "c",
        mistakes={
            "the two nets are the same, but not their starts: one of them must first learn forty near-identities": "a",
            "the other way round: look at what a blur of 0.01 does to a picture, and what it does to a KL divided by "
            "a variance of 0.00001": "b",
            "both losses fall, steadily. Print them": "d",
        },
    ),
}


def _std_chain(beta):
    s = 1.0
    for b in reversed(list(beta)):
        s = math.sqrt(1 - b) * s + b
    return s


def _twice_squared(beta):
    v = 1.0
    for b in reversed(list(beta)):
        v = (1 - b) ** 2 * v + b**2
    return v
