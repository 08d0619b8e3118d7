"""Exercises of notebook 11: DDIM."""

import math

import torch

from ..schedules import cosine_beta, linear_beta
from . import Exercise


def _sigma_and_eta(a_t, a_s, *, step=lambda a_t, a_s: 1 - a_t / a_s, bound=lambda a_t, a_s: 1 - a_s):
    """sigma at eta = 1 on a stride, and the largest eta that the bound allows."""
    variance = (1 - a_s) / (1 - a_t) * step(a_t, a_s)
    return math.sqrt(variance), math.sqrt(bound(a_t, a_s) / variance)


def _single_step(a_t, a_s):
    """The same, with the variance of the stride taken for its standard deviation."""
    sigma, _ = _sigma_and_eta(a_t, a_s)
    return sigma**2, (1 - a_s) / sigma**2


def _printed_step(alpha_bar, t, s, x0, *, at=lambda t, s: t - 1, std=lambda a: (1 - a).sqrt()):
    """Mean and standard deviation of what the printed step returns, from x_t of q(x_t | x_0)."""
    a = alpha_bar[at(t, s)]
    return a.sqrt() * x0, std(a)


def _half_right(alpha_bar, t, s, x0):
    return alpha_bar[s].sqrt() * x0, (1 - alpha_bar[t - 1]).sqrt()


def _other_half_right(alpha_bar, t, s, x0):
    return alpha_bar[t - 1].sqrt() * x0, (1 - alpha_bar[s]).sqrt()


def _own_alpha(alpha_bar, t, s, x0):
    """1 / sqrt(alpha_t) forgotten: the first term is sqrt(alpha_bar_t) x_0."""
    return alpha_bar[t].sqrt() * x0, (1 - alpha_bar[t - 1]).sqrt()


def _memory(alpha_bar, taus, eta, *, first=1, power=2, root=0.5, ratio=None):
    """Correlation of the noises in x_T and in x_tau_1."""
    a = alpha_bar[taus[first:]]
    snr = a / (1 - a)
    left = snr[1:] / snr[:-1] if ratio is None else ratio(a)
    return (1 - eta**power * (1 - left)).prod() ** root


def _trip(
    alpha_bar, taus, var, *, first=1, power=2, angle=lambda a, var: torch.atan2((1 - a).sqrt(), (a * var).sqrt())
):
    """Factor of a walker's distance from the centre after the way up from tau_1 and back."""
    return angle(alpha_bar[taus[first:]], var).diff().cos().prod() ** power


_TABLE = torch.cumprod(1 - linear_beta(1000), 0)
_SHORT = torch.cumprod(1 - cosine_beta(100), 0)
_WALKS = (
    (_TABLE, torch.tensor([0, 100, 200, 500, 1000]), 0.5),
    (_TABLE, torch.tensor([0, 10, 400, 1000]), 0.8),
    (_SHORT, torch.tensor([0, 1, 40, 70, 99]), 0.3),
)

EXERCISES = {
    "11.1": Exercise(
        _sigma_and_eta,
        inputs=((0.078, 0.5), (0.3, 0.31), (0.01, 0.99), (0.6, 0.9)),
        mistakes={
            "the first is a variance; the question asks for sigma": (
                lambda a_t, a_s: (_sigma_and_eta(a_t, a_s)[0] ** 2, _sigma_and_eta(a_t, a_s)[1])
            ),
            "both are squared: sigma and eta are standard deviations, not variances": _single_step,
            "the stride's beta is 1 - a_t / a_s, for the step keeps the share a_t / a_s; not a_s - a_t": (
                lambda *case: _sigma_and_eta(*case, step=lambda a_t, a_s: a_s - a_t)
            ),
            "this is the root of beta, the noise of the stride forward; sigma also knows x_0": (
                lambda a_t, a_s: (math.sqrt(1 - a_t / a_s), math.sqrt((1 - a_s) / (1 - a_t / a_s)))
            ),
            "upside down: beta-tilde is never above beta, so the factor (1 - a_s) / (1 - a_t) is below 1": (
                lambda a_t, a_s: (
                    math.sqrt((1 - a_t) / (1 - a_s) * (1 - a_t / a_s)),
                    (1 - a_s) / math.sqrt((1 - a_t) * (1 - a_t / a_s)),
                )
            ),
            "the bound is on sigma^2 in x_s: 1 - a_s, the variance of x_s, not that of x_t": (
                lambda *case: _sigma_and_eta(*case, bound=lambda a_t, a_s: 1 - a_t)
            ),
            "eta may exceed 1: the bound is sigma <= sqrt(1 - a_s), and beta-tilde lies below it": (
                lambda *case: (_sigma_and_eta(*case)[0], 1.0)
            ),
            "the second is the largest sigma; divide it by sigma at eta = 1": (
                lambda a_t, a_s: (_sigma_and_eta(a_t, a_s)[0], math.sqrt(1 - a_s))
            ),
            "the second is the square of the largest eta (E000-16 again)": (
                lambda *case: (_sigma_and_eta(*case)[0], _sigma_and_eta(*case)[1] ** 2)
            ),
        },
    ),
    "11.2": Exercise(
        _printed_step,
        inputs=((_TABLE, 500, 400, 1.3), (_TABLE, 1000, 900, -0.5), (_SHORT, 30, 10, 2.0), (_SHORT, 2, 0, 0.7)),
        mistakes={
            "that is what the step should return; with 1/sqrt(alpha_t) and alpha-bar_{t-1} it never asks where s is": (
                lambda *case: _printed_step(*case, at=lambda t, s: s)
            ),
            "that is the law of x_t itself; one step is taken": lambda *case: _printed_step(*case, at=lambda t, s: t),
            "the second is a variance; the question asks for a standard deviation": (
                lambda *case: _printed_step(*case, std=lambda a: 1 - a)
            ),
            "1/sqrt(alpha_t) makes sqrt(alpha-bar_t) into sqrt(alpha-bar_{t-1}), whatever s: the mean stays there": (
                _half_right
            ),
            "under the root stands alpha-bar_{t-1}, whatever s": _other_half_right,
            "the first term is divided by sqrt(alpha_t): sqrt(alpha-bar_t / alpha_t) x_0": _own_alpha,
            "the network knows x_0, so eps-hat is the noise in x_t, a random number of variance 1": (
                lambda alpha_bar, t, s, x0: (alpha_bar[t - 1].sqrt() * x0, torch.zeros(()))
            ),
        },
    ),
    "11.3": Exercise(
        _memory,
        inputs=(*_WALKS, (_TABLE, torch.tensor([0, 300, 1000]), 1.0)),
        mistakes={
            "that is with sigma^2 = eta beta-tilde (E000-16): eta multiplies sigma, so eta^2 the variance": (
                lambda *case: _memory(*case, power=1)
            ),
            "this is rho^2 multiplied up: the correlation is its root": lambda *case: _memory(*case, root=1),
            "the last step, to tau_0 = 0, is one too many: x_0 holds no noise": lambda *case: _memory(*case, first=0),
            "each step forgets in proportion to 1 - SNR_t / SNR_s; yours takes alpha-bar_t / alpha-bar_s": (
                lambda *case: _memory(*case, ratio=lambda a: a[1:] / a[:-1])
            ),
            "that is right for eta = 1 only, where the product telescopes": (
                lambda alpha_bar, taus, eta: _memory(alpha_bar, taus, 1.0)
            ),
            "that is the limit of many steps; a few longer ones forget a little differently": (
                lambda alpha_bar, taus, eta: _memory(alpha_bar, taus, 1.0) ** (eta**2)
            ),
            "this is what is forgotten; the question asks for what is kept": lambda *case: 1 - _memory(*case),
        },
        points=2,
    ),
    "11.4": Exercise(
        _trip,
        inputs=_WALKS,
        mistakes={
            "one cosine a step is the way down; the way up loses another": lambda *case: _trip(*case, power=1),
            "up and down do not cancel: the network is asked at different ends": lambda *case: _trip(*case, power=0),
            "the walk turns at tau_1: the step to 0 is not in it": lambda *case: _trip(*case, first=0),
            "`var` is s^2, and the angle takes s: tan = sqrt(1 - alpha_bar) / (sqrt(alpha_bar) s)": (
                lambda *case: _trip(*case, angle=lambda a, var: torch.atan2((1 - a).sqrt(), a.sqrt() * var))
            ),
            "the angle knows the data: its cosine has sqrt(alpha_bar) s above, not sqrt(alpha_bar)": (
                lambda *case: _trip(*case, angle=lambda a, var: torch.atan2((1 - a).sqrt(), a.sqrt()))
            ),
            "the angle's tangent is sqrt(1 - alpha_bar) over sqrt(alpha_bar) s; yours lacks the roots": (
                lambda *case: _trip(*case, angle=lambda a, var: torch.atan2(1 - a, a * var))
            ),
            "the roots sqrt(v_s / v_t) cancel on the way back; only the cosines are left": (
                lambda alpha_bar, taus, var: (
                    _trip(alpha_bar, taus, var)
                    * ((alpha_bar * var + 1 - alpha_bar)[taus[1]] / (alpha_bar * var + 1 - alpha_bar)[taus[-1]]).sqrt()
                )
            ),
        },
        points=2,
    ),
}
