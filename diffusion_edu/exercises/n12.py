"""Exercises of notebook 12: fast solvers and distillation."""

import math

import torch

from . import Exercise


def _marginal(lam):
    """(scale, std) on VP at half a log SNR."""
    return 1 / math.sqrt(1 + math.exp(-2 * lam)), 1 / math.sqrt(1 + math.exp(2 * lam))


def _clean(lam_t, lam_s, *, marginal=_marginal):
    """Factors of x_t and of x0 in DDIM's step."""
    (a_t, b_t), (a_s, b_s) = marginal(lam_t), marginal(lam_s)
    return b_s / b_t, a_s - a_t * b_s / b_t


def _noise(lam_t, lam_s):
    """Factors of x_t and of eps in DDIM's step."""
    (a_t, b_t), (a_s, b_s) = _marginal(lam_t), _marginal(lam_s)
    return a_s / a_t, b_s - b_t * a_s / a_t


def _mended(h):
    """Weights of eps at the start and at the end, for a line in lambda between them."""
    end = (math.expm1(h) - h) / h
    return math.expm1(h) - end, end


def _miss(x0, a_t, b_t, a_s, b_s):
    """DDIM with a clipped x0 and the old eps, minus DDIM with a clipped x0 and its own eps."""
    return b_s * a_t / b_t * (x0.clamp(-1, 1) - x0)


def _weights(snr, *, of_x0=lambda snr: max(snr, 1.0)):
    """The weight of the error of x0 as weights of the errors of eps and of v."""
    return of_x0(snr) / snr, of_x0(snr) / (1 + snr)


_GUESSES = torch.tensor([-3.0, -1.2, 0.4, 1.0, 2.5], dtype=torch.float64)

EXERCISES = {
    "12.1": Exercise(
        _clean,
        inputs=((-1.0, 0.5), (-4.0, -3.5), (0.3, 3.0), (2.0, 2.1)),
        mistakes={
            "these are the factors of x_t and eps-hat; the question asks for x0-hat": _noise,
            "lambda is half of the log SNR here: a^2 is the sigmoid of 2 lambda": (
                lambda *case: _clean(*case, marginal=lambda lam: _marginal(lam / 2))
            ),
            "a^2 and b^2 are the sigmoids of 2 lambda and of -2 lambda: take roots": (
                lambda *case: _clean(*case, marginal=lambda lam: tuple(c**2 for c in _marginal(lam)))
            ),
            "t and s have changed places: the step goes from t to s": lambda lam_t, lam_s: _clean(lam_s, lam_t),
            "A is right; B has the wrong sign: x0-hat pulls towards itself": (
                lambda *case: (_clean(*case)[0], -_clean(*case)[1])
            ),
            "A is right; in B, eps-hat contains x0-hat, too: eps = (x_t - a_t x0) / b_t": (
                lambda lam_t, lam_s: (_clean(lam_t, lam_s)[0], _marginal(lam_s)[0])
            ),
            "A is right; B has b_s e^h = a_s in front, not b_s: the integral is of e^lambda": (
                lambda lam_t, lam_s: (_clean(lam_t, lam_s)[0], -_marginal(lam_s)[1] * math.expm1(lam_t - lam_s))
            ),
        },
    ),
    "12.2": Exercise(
        _mended,
        inputs=((0.1,), (1.0,), (1.9,), (3.0,)),
        mistakes={
            "this is Heun: the mean of both, for a line in sigma": lambda h: (math.expm1(h) / 2,) * 2,
            "the two have changed places: e^(h - u) is largest at the start": lambda h: _mended(h)[::-1],
            "the rule of the trapezoid for a constant weight: e^(h - u) must stay under the integral": (
                lambda h: (h / 2, h / 2)
            ),
            "the trapezoid of e^(h - u) eps: integrate the exponential exactly, only eps is a line": (
                lambda h: (h / 2 * math.exp(h), h / 2)
            ),
            "these are the weights of e^(u - h), of the other direction: under the integral stands e^(h - u)": (
                lambda h: ((-math.expm1(-h) - h * math.exp(-h)) / h, (h + math.expm1(-h)) / h)
            ),
            "the sum is right only if both are: w_t is e^h - 1 - w_s": lambda h: (math.expm1(h), _mended(h)[1]),
            "b_s stands in front already, and with it e^h: these weights are e^-h too small": (
                lambda h: tuple(w * math.exp(-h) for w in _mended(h))
            ),
        },
        points=2,
    ),
    "12.3": Exercise(
        _miss,
        inputs=((_GUESSES, 0.3, 0.95, 0.5, 0.87), (_GUESSES, 0.8, 0.6, 0.96, 0.28), (_GUESSES, 0.1, 0.99, 1.0, 0.0)),
        mistakes={
            "hasty minus right, not right minus hasty": lambda *case: -_miss(*case),
            "the clipped x0 itself is in both steps; what differs is b_s times eps": (
                lambda x0, a_t, b_t, a_s, b_s: (a_s - b_s * a_t / b_t) * (x0.clamp(-1, 1) - x0)
            ),
            "that is what the clip changes in a_s x0; both steps have it": (
                lambda x0, a_t, b_t, a_s, b_s: a_s * (x0.clamp(-1, 1) - x0)
            ),
            "this is the change of eps-hat; the step multiplies it by b_s": (
                lambda x0, a_t, b_t, a_s, b_s: a_t / b_t * (x0.clamp(-1, 1) - x0)
            ),
            "eps = (x_t - a_t x0) / b_t: the clip acts on it by a_t, the scale at t, not a_s": (
                lambda x0, a_t, b_t, a_s, b_s: b_s * a_s / b_t * (x0.clamp(-1, 1) - x0)
            ),
            "eps = (x_t - a_t x0) / b_t: divide by b_t": (
                lambda x0, a_t, b_t, a_s, b_s: b_s * a_t * (x0.clamp(-1, 1) - x0)
            ),
            "they agree only where nothing is clipped": lambda x0, *levels: torch.zeros_like(x0),
        },
    ),
    "12.4": Exercise(
        _weights,
        inputs=((4e-5,), (0.25,), (1.0,), (30.0,)),
        mistakes={
            "v first; the question asks for eps, then v": lambda snr: _weights(snr)[::-1],
            "multiplied where one must divide: an error of eps is SNR times that of x0 already": (
                lambda snr: (max(snr, 1.0) * snr, max(snr, 1.0) * (1 + snr))
            ),
            "these are the weights of 1 + SNR; the question takes max(SNR, 1)": (
                lambda snr: _weights(snr, of_x0=lambda snr: 1 + snr)
            ),
            "truncated from below: the larger of SNR and 1, not the smaller": (
                lambda snr: _weights(snr, of_x0=lambda snr: min(snr, 1.0))
            ),
            "that is the weight of the error of x0 itself": lambda snr: (max(snr, 1.0),) * 2,
            "right for eps; the error of v is 1 + SNR times that of x0": lambda snr: (_weights(snr)[0],) * 2,
        },
    ),
}
