"""Exercises of notebook 10: probability flow and likelihood."""

import math

import torch

from . import Exercise


def _flow_std(c, var, T, *, start=lambda var, T: var + T**2):
    """Standard deviation at time 0 of dx = -c g^2 score dt on VE, g^2 = 2 t, from N(0, var + T^2)."""
    return math.sqrt(start(var, T)) * (var / (var + T**2)) ** c


def _rate_std(beta, var, *, half=0.5, start=lambda beta, var: 1 + (var - 1) * math.exp(-beta), root=math.sqrt):
    """The same on VP with a constant rate, with g in place of g^2 under the half, from q_1."""
    inverse = math.log((math.exp(beta) + var - 1) / var) / beta  # the integral of 1 / v
    return math.sqrt(start(beta, var)) * math.exp(half * (beta - root(beta) * inverse))


def _trace_variances(A, *, symmetric=lambda A: (A + A.T) / 2, factor=2):
    """Variances of z^T A z for random signs and for standard normal z."""
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
        inputs=((1.0, 1.0, 10.0), (0.5, 0.25, 3.0), (0.0, 0.3, 2.0), (0.7, 2.0, 1.5)),
        mistakes={
            "this is a variance; the question asks for a standard deviation": lambda *case: _flow_std(*case) ** 2,
            "the walkers start in N(0, s^2 + T^2), not in N(0, T^2)": (
                lambda *case: _flow_std(*case, start=lambda var, T: T**2)
            ),
            "this is the factor of one walker; the walkers start with standard deviation sqrt(s^2 + T^2)": (
                lambda *case: _flow_std(*case, start=lambda var, T: 1.0)
            ),
            "g^2 = 2 t and the score has no 2: 2 t / (s^2 + t^2) integrates to the whole logarithm": (
                lambda c, var, T: _flow_std(c / 2, var, T)
            ),
            "c stands where the half stood: c = 1/2 must give back s": lambda c, var, T: _flow_std(2 * c, var, T),
            "upside down: the walkers go down from T to 0, and the flow draws them together": (
                lambda c, var, T: _flow_std(-c, var, T)
            ),
            "that is right for c = 1/2 only": lambda c, var, T: math.sqrt(var),
        },
    ),
    "10.2": Exercise(
        _rate_std,
        inputs=((10.0, 0.25), (0.5, 0.25), (1.0, 2.0), (4.0, 1.0)),
        mistakes={
            "this is a variance; the question asks for a standard deviation": lambda *case: _rate_std(*case) ** 2,
            "the walkers start in q_1, whose variance is not yet 1": (
                lambda *case: _rate_std(*case, start=lambda beta, var: 1.0)
            ),
            "upside down: the walkers go down from 1 to 0": lambda *case: _rate_std(*case, half=-0.5),
            "both terms of the velocity carry a half": lambda *case: _rate_std(*case, half=1.0),
            "that is with g^2, the right equation": lambda beta, var: math.sqrt(var),
            "under the half stands g, and g = sqrt(beta)": (
                lambda *case: _rate_std(*case, root=lambda beta: math.sqrt(math.sqrt(beta)))
            ),
            "the drift -beta x / 2 acts, too": lambda beta, var: _rate_std(beta, var) * math.exp(-beta / 2),
            "only the drift is left: the score acts, too": lambda *case: _rate_std(*case, root=lambda beta: 0.0),
        },
    ),
    "10.3": Exercise(
        _trace_variances,
        inputs=((_matrix(4, 0),), (_matrix(7, 1),), (torch.diag(_matrix(3, 2)[0]),)),
        mistakes={
            "A need not be symmetric, but z^T A z sees only its symmetric part (A + A^T) / 2": (
                lambda A: _trace_variances(A, symmetric=lambda A: A)
            ),
            "each pair i < j gives 2 S_ij z_i z_j, of variance 4 S_ij^2: the sum over all i != j has a factor 2": (
                lambda A: _trace_variances(A, factor=1)
            ),
            "the other way round: signs first, and they see no diagonal": lambda A: _trace_variances(A)[::-1],
            "z_i^2 is 1 for signs: the diagonal does not vary; for normal z it has variance 2": (
                lambda A: (_trace_variances(A)[1],) * 2
            ),
            "for normal z the diagonal varies, too: z_i^2 has variance 2": lambda A: (_trace_variances(A)[0],) * 2,
            "these are standard deviations": lambda A: tuple(v**0.5 for v in _trace_variances(A)),
            "z_i^2 of a normal z has variance 3 - 1 = 2, not 3": (
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
