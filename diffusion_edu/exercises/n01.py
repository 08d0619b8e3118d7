"""Exercises of notebook 01: VAE and the ELBO."""

import math

import torch

from . import Exercise


def _kl_full(mean, C, *, bug=None):
    """KL of N(mean, C C^T) to N(0, I); ``bug`` names one known mistake."""
    diagonal = C.diagonal(dim1=1, dim2=2)
    trace = {"diagonal": (diagonal**2).sum(1), "C": diagonal.sum(1)}.get(bug, (C**2).sum((1, 2)))
    log_det = {"once": 1, "C": 1, "sign": -2}.get(bug, 2) * diagonal.log().sum(1)
    size = 0 if bug == "no L" else mean.shape[1]
    return {"no half": 1.0}.get(bug, 0.5) * (trace + (mean**2).sum(1) - size - log_det)


def _reverse_kl(mean, C):
    inverse = torch.linalg.inv(C @ C.mT)
    trace, log_det = inverse.diagonal(dim1=1, dim2=2).sum(1), 2 * C.diagonal(dim1=1, dim2=2).log().sum(1)
    return 0.5 * (trace + torch.einsum("bi,bij,bj->b", mean, inverse, mean) - mean.shape[1] + log_det)


def _encodings():
    generator = torch.Generator().manual_seed(1)
    mean, C = torch.randn(4, 3, generator=generator), torch.randn(4, 3, 3, generator=generator)
    C = C.tril(-1) + torch.diag_embed(C.diagonal(dim1=1, dim2=2).abs() + 0.2)
    return mean.double(), C.double()


def _mc_variance(x, W, b, var, mean, sigma, K, *, linear=1.0, square=2.0, power=2):
    r = x - W * mean - b
    a, c = (r @ W) * sigma, (W @ W) * sigma**2 / 2  # log p(x | z) = const + (a eps - c eps^2) / var
    return (linear * a**2 + square * c**2) / var**power / K


def _setting(mean, sigma, K):
    x, W, b = torch.tensor([[1.9, 0.2, -0.5], [1.2, 0.5, 0.1], [0.3, -0.2, 0.0]], dtype=torch.float64)
    return x, W, b, 0.4, mean, sigma, K


def _variances(mean, sigma):
    return 4 * sigma**2, mean**4 / sigma**2 + 14 * mean**2 + 15 * sigma**2


def _latent_kl(lam, var, beta):
    return 0.5 * (lam / (beta * var)).log().clamp(min=0)


_LAM = torch.tensor([4.0, 2.0, 0.7, 0.3, 0.05], dtype=torch.float64)

EXERCISES = {
    "01.1": Exercise(
        _kl_full,
        inputs=(_encodings(),),
        mistakes={
            "the covariance is C C^T, so its determinant is the square of det C: the logarithm counts twice": (
                lambda mean, C: _kl_full(mean, C, bug="once")
            ),
            "the trace of C C^T is the sum of the squares of all entries of C, not of its diagonal only": (
                lambda mean, C: _kl_full(mean, C, bug="diagonal")
            ),
            "C is not the covariance: that is C C^T": lambda mean, C: _kl_full(mean, C, bug="C"),
            "one half is missing: both log-densities have it in front of their squares": (
                lambda mean, C: _kl_full(mean, C, bug="no half")
            ),
            "for q = N(0, I) it must be 0; yours is L / 2 there": lambda mean, C: _kl_full(mean, C, bug="no L"),
            "the sign of the log-determinant: a narrow q costs more, so it stands with a minus": (
                lambda mean, C: _kl_full(mean, C, bug="sign")
            ),
            "this is the divergence of the prior to q; the bound pays for q to the prior": _reverse_kl,
            "this is the sum over the batch; give one number for each example": lambda mean, C: _kl_full(mean, C).sum(),
            "this is the mean over the batch; give one number for each example": (
                lambda mean, C: _kl_full(mean, C).mean()
            ),
        },
    ),
    "01.2": Exercise(
        _mc_variance,
        inputs=(_setting(0.9, 0.3, 1), _setting(-0.4, 0.8, 4), _setting(1.1, 0.05, 16)),
        mistakes={
            "this is the variance of one draw; the mean of K has a K-th of it": lambda *s: _mc_variance(*s[:-1], 1),
            "divided by K twice: the variances of K draws add up to K, and that is divided by K^2": (
                lambda *s: _mc_variance(*s) / s[-1]
            ),
            "this is a standard deviation; the question asks for a variance": lambda *s: _mc_variance(*s) ** 0.5,
            "only the part linear in eps is counted; z enters squared, too": lambda *s: _mc_variance(*s, square=0.0),
            "only the part with eps^2 is counted; unless x is on the line there is a linear one, too": (
                lambda *s: _mc_variance(*s, linear=0.0)
            ),
            "the variance of eps^2 is E eps^4 - (E eps^2)^2 = 3 - 1, not 3": lambda *s: _mc_variance(*s, square=3.0),
            "the variance of eps^2 is 2, not 1: E eps^4 - (E eps^2)^2 = 3 - 1": lambda *s: _mc_variance(*s, square=1.0),
            "the square has a half in front, 1 / (2 s^2), and the half gets squared, too": (
                lambda *s: _mc_variance(*s, square=8.0)
            ),
            "a variance squares its factors: 1 / s^2 becomes 1 / s^4, and `var` is s^2": (
                lambda *s: _mc_variance(*s, power=1)
            ),
        },
        points=2,
    ),
    "01.3": Exercise(
        _variances,
        inputs=((1.5, 1.0), (0.3, 0.2), (-2.0, 3.0)),
        mistakes={
            "the order is pathwise, then score function": lambda m, s: _variances(m, s)[::-1],
            "this holds for sigma = 1; z = mean + sigma eps": lambda m, s: _variances(m, 1.0),
            "these are second moments; subtract the square of the mean, (2 mean)^2": (
                lambda m, s: tuple(v + 4 * m**2 for v in _variances(m, s))
            ),
            "these are standard deviations; the question asks for variances": (
                lambda m, s: tuple(v**0.5 for v in _variances(m, s))
            ),
            "the slope of log N(z; mean, sigma^2) in the mean is (z - mean) / sigma^2 = eps / sigma; yours is eps": (
                lambda m, s: (_variances(m, s)[0], s**2 * _variances(m, s)[1])
            ),
            "the slope of log N(z; mean, sigma^2) in the mean is (z - mean) / sigma^2; yours is z - mean": (
                lambda m, s: (_variances(m, s)[0], s**4 * _variances(m, s)[1])
            ),
            "the slope of z^2 is 2 z; the 2 is missing": lambda m, s: (s**2, _variances(m, s)[1]),
            "the covariance of eps and eps^3 is E eps^4 = 3, and it counts twice": (
                lambda m, s: (4 * s**2, m**4 / s**2 + 8 * m**2 + 15 * s**2)
            ),
            "this is the ratio; give both, pathwise first": lambda m, s: _variances(m, s)[1] / _variances(m, s)[0],
        },
        points=2,
    ),
    "01.4": Exercise(
        _latent_kl,
        inputs=((_LAM, 0.1, 1.0), (_LAM, 0.1, 6.0), (_LAM, 0.5, 0.5)),
        mistakes={
            "a KL is never negative: below its threshold a latent costs 0 (clamp)": (
                lambda lam, var, beta: 0.5 * (lam / (beta * var)).log()
            ),
            "beta is missing: a dear latent acts like a noisier decoder, with beta s^2 for s^2": (
                lambda lam, var, beta: _latent_kl(lam, var, 1.0)
            ),
            "the threshold is right; what a latent above it says depends on beta, too": (
                lambda lam, var, beta: _latent_kl(lam, var, 1.0) * (lam > beta * var)
            ),
            "one half is missing": lambda lam, var, beta: 2 * _latent_kl(lam, var, beta),
            "this is in bits; the question asks for nats": lambda lam, var, beta: (
                _latent_kl(lam, var, beta) / math.log(2)
            ),
            "lam is the variance of the data, noise included; |w|^2 is only lam - beta s^2": (
                lambda lam, var, beta: 0.5 * (1 + lam / (beta * var)).log()
            ),
            "inside the logarithm stands lam, not |w|^2: M = 1 + |w|^2 / (beta s^2) = lam / (beta s^2)": (
                lambda lam, var, beta: 0.5 * ((lam - beta * var) / (beta * var)).clamp(min=1).log()
            ),
            "var is a variance already: lam / var, not lam / var^2": (
                lambda lam, var, beta: _latent_kl(lam, var**2, beta)
            ),
            "this is the sum over the latents; give one number for each": (
                lambda lam, var, beta: _latent_kl(lam, var, beta).sum()
            ),
        },
    ),
}
