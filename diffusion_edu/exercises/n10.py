"""Exercises of notebook 10: probability flow and likelihood."""

import math

import torch

from . import Exercise


def _flow_std(c, B):
    """Standard deviation at time 0 of dx = [f - c g^2 score] dt, from N(0, 1) data and a start in N(0, 1)."""
    return math.exp((0.5 - c) * B)


def _rate_std(beta_min, beta_max, *, root=lambda low, high: 2 * (high**1.5 - low**1.5) / (3 * (high - low))):
    """The same with g in place of g^2 under the half: exp of half the integral of beta - sqrt(beta)."""
    return math.exp((beta_min + beta_max) / 4 - root(beta_min, beta_max) / 2)


def _trace_variances(A, *, symmetric=lambda A: (A + A.T) / 2, factor=2):
    """Variances of v^T A v for random signs and for standard normal v."""
    S = symmetric(A)
    squares = S**2
    return factor * (squares.sum() - squares.diagonal().sum()), factor * squares.sum()


def _lost(m, var, alpha_bar, *, end=lambda m, var, a: (a * m**2, a * var + 1 - a)):
    """Mean nats that N(0, 1) loses against q_T, for data N(m, var): their divergence."""
    mean_square, v = end(m, var, alpha_bar)
    return (v + mean_square - 1 - math.log(v)) / 2


def _matrix(n, seed):
    return torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


EXERCISES = {
    "10.1": Exercise(
        _flow_std,
        inputs=((1.0, 10.05), (0.5, 10.05), (0.0, 3.0), (0.7, 2.0)),
        mistakes={
            "this is a variance; the question asks for a standard deviation": lambda c, B: _flow_std(c, B) ** 2,
            "this is the way up, from 0 to T; samples go down, so the exponent changes its sign": (
                lambda c, B: 1 / _flow_std(c, B)
            ),
            "the score of N(0, 1) is -x, so -c g^2 times the score is +c beta x: the two terms differ in sign": (
                lambda c, B: math.exp((0.5 + c) * B)
            ),
            "the drift is -beta x / 2, with its half: c = 1/2 must leave 1": lambda c, B: math.exp((1 - c) * B),
            "the variance stays 1 only for c = 1/2": lambda c, B: 1.0,
            "c = 1/2 must leave the bell as it is": lambda c, B: math.exp(-c * B),
        },
    ),
    "10.2": Exercise(
        _rate_std,
        inputs=((0.1, 20.0), (0.5, 4.0), (1.0, 1.5), (0.01, 0.2)),
        mistakes={
            "this is a variance; the question asks for a standard deviation": lambda *rate: _rate_std(*rate) ** 2,
            "upside down: samples go down from T to 0": lambda *rate: 1 / _rate_std(*rate),
            "under the half stands g = sqrt(beta), whose integral is that of a root; you took sqrt of the integral": (
                lambda low, high: _rate_std(low, high, root=lambda low, high: ((low + high) / 2) ** 0.5)
            ),
            "the integral of sqrt(beta) is not sqrt of the mean of beta_min and beta_max's roots: beta is linear in t, "
            "its root is not": (
                lambda low, high: _rate_std(low, high, root=lambda low, high: (low**0.5 + high**0.5) / 2)
            ),
            "the slope of beta(t) is beta_max - beta_min: divide the antiderivative by it": (
                lambda low, high: _rate_std(low, high, root=lambda low, high: 2 * (high**1.5 - low**1.5) / 3)
            ),
            "only the score's term is left: the drift -beta x / 2 acts, too": (
                lambda low, high: _rate_std(low, high) / math.exp((low + high) / 4)
            ),
            "that is with g^2, the right equation: then nothing changes": lambda low, high: 1.0,
        },
    ),
    "10.3": Exercise(
        _trace_variances,
        inputs=((_matrix(4, 0),), (_matrix(7, 1),), (torch.diag(_matrix(3, 2)[0]),)),
        mistakes={
            "A need not be symmetric, but v^T A v sees only its symmetric part (A + A^T) / 2": (
                lambda A: _trace_variances(A, symmetric=lambda A: A)
            ),
            "each pair i < j gives 2 S_ij v_i v_j, of variance 4 S_ij^2: the sum over all i != j has a factor 2": (
                lambda A: _trace_variances(A, factor=1)
            ),
            "the other way round: signs first, and they see no diagonal": lambda A: _trace_variances(A)[::-1],
            "v_i^2 is 1 for signs: the diagonal does not vary; for normal v it has variance 2": (
                lambda A: (_trace_variances(A)[1],) * 2
            ),
            "for normal v the diagonal varies, too: v_i^2 has variance 2": lambda A: (_trace_variances(A)[0],) * 2,
            "these are standard deviations": lambda A: tuple(v**0.5 for v in _trace_variances(A)),
            "v_i^2 of a normal v has variance 3 - 1 = 2, not 3": (
                lambda A: (_trace_variances(A)[0], _trace_variances(A)[1] + (A.diagonal() ** 2).sum())
            ),
            "(A + A^T) / 2, with its half: the diagonal must stay": (
                lambda A: _trace_variances(A, symmetric=lambda A: A + A.T)
            ),
        },
        points=2,
    ),
    "10.4": Exercise(
        _lost,
        inputs=((1.3, 0.25, 0.08), (0.0, 0.04, 0.5), (2.0, 1.0, 1e-3), (-0.5, 3.0, 0.3)),
        mistakes={
            "a log of a ratio has a sign: the loss is log q_T - log N(0, 1), whose mean is never negative": (
                lambda *case: -_lost(*case)
            ),
            "that is the divergence of q_T from N(0, 1) the other way round: x_T is drawn from q_T": (
                lambda m, var, a: ((1 + a * m**2) / (a * var + 1 - a) - 1 + math.log(a * var + 1 - a)) / 2
            ),
            "the mean shrinks by sqrt(alpha_bar), so its square by alpha_bar, once": (
                lambda *case: _lost(*case, end=lambda m, var, a: (a**2 * m**2, a * var + 1 - a))
            ),
            "x_T is noise plus what is left of the data: its variance is alpha_bar var + 1 - alpha_bar": (
                lambda *case: _lost(*case, end=lambda m, var, a: (a * m**2, 1 - a))
            ),
            "x_T is noise plus what is left of the data: the mean counts as well": (
                lambda *case: _lost(*case, end=lambda m, var, a: (0.0, a * var + 1 - a))
            ),
            "the mean of x_T is sqrt(alpha_bar) m: it has shrunk": (
                lambda *case: _lost(*case, end=lambda m, var, a: (m**2, a * var + 1 - a))
            ),
            "the factor 1/2 is missing": lambda *case: 2 * _lost(*case),
            "this is in bits; the question asks for nats": lambda *case: _lost(*case) / math.log(2),
        },
    ),
}
