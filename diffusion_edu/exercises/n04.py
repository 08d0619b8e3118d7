"""Exercises of notebook 04: DDPM."""

import math

import torch

from ..schedules import cosine_beta, linear_beta
from . import Exercise


def _posterior_var(a_t, a_s):
    return (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)


def _noise_and_step(alpha_bar, x0, t, eps, eps_hat, z, *, bug=None):
    """x_t and x_{t-1}; ``bug`` names one known mistake."""
    a, a_s = alpha_bar[t][:, None], alpha_bar[t - 1][:, None]
    alpha, std = a / a_s, (1 - a).sqrt()
    beta = 1 - alpha
    noise_std = {"std for variance": std.sqrt(), "variance for std": 1 - a}.get(bug, std)
    x_t = a.sqrt() * x0 + noise_std * eps
    if bug == "shifted":
        x_t = a_s.sqrt() * x0 + (1 - a_s).sqrt() * eps
    below = beta.sqrt() if bug == "no bar below" else std
    shrink = a.sqrt() if bug == "bar in front" else alpha.sqrt()
    variance = beta if bug == "beta" else (1 - a_s) / (1 - a) * beta
    if bug == "eps twice":
        eps_hat = eps
    sigma = variance if bug == "no root" else variance.sqrt()
    if bug == "no noise":
        sigma = 0 * sigma
    return x_t, (x_t - beta / below * eps_hat) / shrink + sigma * z


def _with(bug):
    return lambda *args: _noise_and_step(*args, bug=bug)


def _batch():
    generator = torch.Generator().manual_seed(4)
    x0, eps, eps_hat, z = torch.randn(4, 5, 2, generator=generator, dtype=torch.float64)
    return torch.cumprod(1 - linear_beta(100, 1e-3, 0.2), 0), x0, torch.tensor([1, 2, 40, 90, 100]), eps, eps_hat, z


def _early_share(beta, *, weight=lambda beta, alpha, alpha_bar: beta / (alpha * (1 - alpha_bar)), total=None):
    alpha = 1 - beta
    w = weight(beta[1:], alpha[1:], torch.cumprod(alpha, 0)[1:])
    early = w[: len(w) // 10].sum()
    return early / (w.sum() if total is None else total)


def _share_of(weight):
    return lambda beta: _early_share(beta, weight=weight)


def _bug_b(var):
    """Final variance of N(0, var) data with sqrt(1 - alpha_t) under the noise, in units of var."""
    beta, v = linear_beta(1000), 1.0
    alpha_bar = torch.cumprod(1 - beta, 0)
    for t in range(1000, 0, -1):
        slope = (1 - alpha_bar[t]).sqrt() / (alpha_bar[t] * var + 1 - alpha_bar[t])  # of the perfect noise prediction
        v = (1 - beta[t].sqrt() * slope) ** 2 / (1 - beta[t]) * v + beta[t] * (t > 1)
    return v / var


EXERCISES = {
    "04.1": Exercise(
        _posterior_var,
        inputs=((0.5, 0.6), (0.01, 0.9), (0.3, 0.99)),
        mistakes={
            "this is beta, the variance of the step forward; the question asks for beta-tilde, which also knows x_0": (
                lambda a_t, a_s: 1 - a_t / a_s
            ),
            "this is the variance of q(x_s | x_0); x_t narrows it down further": lambda a_t, a_s: 1 - a_s,
            "the step from s to t keeps the share a_t / a_s, so its variance is 1 - a_t / a_s, not a_s - a_t": (
                lambda a_t, a_s: (1 - a_s) / (1 - a_t) * (a_s - a_t)
            ),
            "this is a standard deviation; the question asks for a variance": (
                lambda a_t, a_s: math.sqrt(_posterior_var(a_t, a_s))
            ),
            "this is the precision A; the variance is 1 / A": lambda a_t, a_s: 1 / _posterior_var(a_t, a_s),
            "upside down: beta-tilde is never above beta, so the factor (1 - a_s) / (1 - a_t) is below 1": (
                lambda a_t, a_s: (1 - a_t) / (1 - a_s) * (1 - a_t / a_s)
            ),
            "variances do not add here: two facts about x_s are multiplied, so their precisions add": (
                lambda a_t, a_s: (1 - a_s) + (1 - a_t / a_s) * a_s / a_t
            ),
            "the likelihood's width as seen from x_s is (1 - a_t / a_s) / (a_t / a_s): its mean is scaled, too": (
                lambda a_t, a_s: 1 / (1 / (1 - a_s) + 1 / (1 - a_t / a_s))
            ),
        },
    ),
    "04.2": Exercise(
        _noise_and_step,
        inputs=(_batch(),),
        mistakes={
            "x_t has its noise times (1 - alpha-bar)^(1/4): 1 - alpha-bar is the variance, take one root": (
                _with("std for variance")
            ),
            "the noise of x_t is multiplied by its variance 1 - alpha-bar; a factor of eps is a standard deviation": (
                _with("variance for std")
            ),
            "x_t stands at time t - 1: entry t of the table is the symbol at t, nothing is shifted": _with("shifted"),
            "the step divides by sqrt(alpha-bar_t); it undoes one step only, so by sqrt(alpha_t) (E000-07)": (
                _with("bar in front")
            ),
            "under the noise stands sqrt(1 - alpha-bar_t), all of the noise, not sqrt(1 - alpha_t) (E002-06)": (
                _with("no bar below")
            ),
            "sigma^2 is beta here; the question asks for beta-tilde": _with("beta"),
            "z is multiplied by the variance beta-tilde; take its root": _with("no root"),
            "the mean is right; the fresh noise sigma z is still missing": _with("no noise"),
            "eps is drawn, eps_hat is the network's guess: a sampler knows only eps_hat": _with("eps twice"),
        },
        tol=1e-8,
        points=2,
    ),
    "04.3": Exercise(
        _bug_b(0.04),
        mistakes={
            "this is the right variance over that of (b); the question asks for the inverse": 1 / _bug_b(0.04),
            "this is the variance itself; divide it by the right one, 0.04": 0.04 * _bug_b(0.04),
            "this is for data of variance 0.25, as above; the question asks for 0.04": _bug_b(0.25),
            "this is a standard deviation's factor; square it": _bug_b(0.04) ** 0.5,
            "this is the right chain: at (b) sqrt(1 - alpha_t) stands where sqrt(1 - alpha_bar_t) belongs": 1.0,
        },
        tol=0.01,
    ),
    "04.4": Exercise(
        _early_share,
        inputs=((linear_beta(1000),), (linear_beta(100, 1e-3, 0.2),), (cosine_beta(70),)),
        mistakes={
            "alpha_t, not alpha-bar_t, stands beside beta_t: this is misprint E000-08": (
                _share_of(lambda beta, alpha, alpha_bar: beta / (alpha_bar * (1 - alpha_bar)))
            ),
            "beta_t^2 over sigma_t^2 = beta_t leaves one beta_t in the numerator; yours has none": (
                _share_of(lambda beta, alpha, alpha_bar: 1 / (alpha * (1 - alpha_bar)))
            ),
            "sigma_t^2 = beta_t cancels one of the two beta_t; yours still has both": (
                _share_of(lambda beta, alpha, alpha_bar: beta**2 / (alpha * (1 - alpha_bar)))
            ),
            "this is the share in L_simple, where all times count alike; weight them first": (
                _share_of(lambda beta, alpha, alpha_bar: torch.ones_like(beta))
            ),
            "this is the sum of the early weights; divide by the sum of all": (
                lambda beta: _early_share(beta, total=2.0)
            ),
            "entry 0 is clean data, and its weight 0 / 0: start at entry 1": lambda beta: math.nan * beta[0],
            "this is early over late; the share is early over all": (
                lambda beta: _early_share(beta) / (1 - _early_share(beta))
            ),
            "this is in per cent; the question asks for a share between 0 and 1": lambda beta: 100 * _early_share(beta),
        },
    ),
}
