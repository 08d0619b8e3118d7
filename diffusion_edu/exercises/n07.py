"""Exercises of notebook 07: learned variance and bits per dim."""

import math

import torch

from . import Exercise


def _bits(nats, d, levels, width=lambda levels: 2 / (levels - 1)):
    """Bits per dimension of a density's mean log-likelihood: minus its log2, counted per bin."""
    return -nats / (d * math.log(2)) - math.log2(width(levels))


def _prior_nats(beta_start, beta_end, T, *, steps=None, kl=lambda a: -torch.log1p(-a) / 2):
    """L_T per dimension for data of variance 1, on a linear table."""
    alpha = 1 - torch.linspace(beta_start, beta_end, T, dtype=torch.float64)
    return kl(alpha[:steps].prod())


def _lost(mean, sigma, levels, *, reach=lambda levels: 1 + 1 / (levels - 1), sides=(1, 1), width=None):
    """Mass of a Gaussian outside [-reach, reach]."""
    sigma = sigma if width is None else width(sigma)
    below, above = ((s * mean - reach(levels)) / (sigma * math.sqrt(2)) for s in (-1, 1))
    return sum(side * math.erfc(-z) / 2 for side, z in zip(sides, (below, above), strict=True))


def _best_frac(beta, beta_tilde, miss, *, variance=lambda beta_tilde, miss: beta_tilde + miss):
    """Where the best variance of a step lies between beta-tilde (0) and beta (1), on a log scale."""
    return math.log(variance(beta_tilde, miss) / beta_tilde) / math.log(beta / beta_tilde)


EXERCISES = {
    "07.1": Exercise(
        _bits,
        inputs=((-6144.0, 3072, 256), (20.0, 64, 17), (-1.5, 1, 2)),
        mistakes={
            "this counts per unit of x: add the log2 of the number of bins in one unit, (n - 1) / 2": (
                lambda nats, d, levels: _bits(nats, d, levels, lambda levels: 1)
            ),
            "the offset has the wrong sign: into a narrower bin falls less, and that costs more bits": (
                lambda nats, d, levels: _bits(nats, d, levels, lambda levels: (levels - 1) / 2)
            ),
            "this is for levels in [0, 1]; in [-1, 1] neighbours are 2 / (n - 1) apart": (
                lambda nats, d, levels: _bits(nats, d, levels, lambda levels: 1 / (levels - 1))
            ),
            "n levels have n - 1 gaps: neighbours are 2 / (n - 1) apart, not 2 / n": (
                lambda nats, d, levels: _bits(nats, d, levels, lambda levels: 2 / levels)
            ),
            "the offset is for one dimension, and the nats are for d: divide before you add": (
                lambda nats, d, levels: _bits(nats, d, levels) - math.log2((levels - 1) / 2) * (1 - 1 / d)
            ),
            "a log-likelihood counts up, bits count down: the sign of the first term": (
                lambda nats, d, levels: _bits(-nats, d, levels)
            ),
            "this is in nats: divide by ln 2": (lambda nats, d, levels: -nats / d + math.log((levels - 1) / 2)),
        },
    ),
    "07.2": Exercise(
        _prior_nats,
        inputs=((1e-4, 0.02, 1000), (1e-4, 0.01, 1000), (1e-4, 0.02, 50), (0.01, 0.01, 3)),
        mistakes={
            "the factor 1/2 of the Gaussian's divergence is missing": (
                lambda *table: _prior_nats(*table, kl=lambda a: -torch.log1p(-a))
            ),
            "this is alpha-bar_T itself; the divergence is half of -log(1 - alpha-bar_T)": (
                lambda *table: _prior_nats(*table, kl=lambda a: a)
            ),
            "this is -log(alpha_bar_T) / 2; the variance of x_T given x_0 is 1 - alpha_bar_T": (
                lambda *table: _prior_nats(*table, kl=lambda a: -a.log() / 2)
            ),
            "that is for a pixel at 0: a pixel of variance 1 adds alpha-bar_T / 2 by its mean": (
                lambda *table: _prior_nats(*table, kl=lambda a: (-a - torch.log1p(-a)) / 2)
            ),
            "that is the divergence the other way round, of the prior from q": (
                lambda *table: _prior_nats(*table, kl=lambda a: (2 * a / (1 - a) + torch.log1p(-a)) / 2)
            ),
            "the product has T factors; one is missing": lambda *table: _prior_nats(*table, steps=-1),
        },
        tol=1e-10,
    ),
    "07.3": Exercise(
        _lost,
        inputs=((0.9, 0.2, 17), (0.0, 0.5, 17), (-1.0, 0.1, 256), (0.3, 1.0, 2)),
        mistakes={
            "the end bins reach half a bin beyond the end levels: to 1 + 1 / (n - 1)": (
                lambda *case: _lost(*case, reach=lambda levels: 1)
            ),
            "half a bin is 1 / (n - 1), a whole one 2 / (n - 1)": (
                lambda *case: _lost(*case, reach=lambda levels: 1 + 2 / (levels - 1))
            ),
            "this is what is kept; the question asks for what is lost": lambda *case: 1 - _lost(*case),
            "this is lost on the right; something is lost on the left, too": lambda *case: _lost(*case, sides=(0, 1)),
            "this is lost on the left; something is lost on the right, too": lambda *case: _lost(*case, sides=(1, 0)),
            "sigma is a standard deviation here: no root of it": lambda *case: _lost(*case, width=math.sqrt),
        },
        points=2,
    ),
    "07.4": Exercise(
        _best_frac,
        inputs=((0.02, 0.01, 0.004), (0.02, 0.01, 0.0), (0.02, 0.01, 0.01), (0.3, 0.05, 0.1)),
        mistakes={
            "the variance is right, but the scale is linear; the network interpolates between logarithms": (
                lambda beta, beta_tilde, miss: miss / (beta - beta_tilde)
            ),
            "this is the best variance, beta-tilde + miss; where does it lie between the two logarithms?": (
                lambda beta, beta_tilde, miss: beta_tilde + miss
            ),
            "frac is 0 at beta-tilde and 1 at beta; yours runs the other way": (
                lambda beta, beta_tilde, miss: 1 - _best_frac(beta, beta_tilde, miss)
            ),
            "a variance of miss would forget that the truth itself has the width beta-tilde": (
                lambda beta, beta_tilde, miss: (
                    -math.inf if not miss else math.log(miss / beta_tilde) / math.log(beta / beta_tilde)
                )
            ),
            "miss is a mean square already: do not square it": (
                lambda *step: _best_frac(*step, variance=lambda beta_tilde, miss: beta_tilde + miss**2)
            ),
        },
    ),
}
