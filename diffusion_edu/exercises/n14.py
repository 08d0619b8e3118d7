"""Exercises of notebook 14: classifier-free guidance and thresholding."""

import math

import torch

from . import Exercise


def _tempered(m_c, v_c, m_u, v_u, extra, *, plus=1.0):
    """Mean and variance of N(m_c, v_c)^(1 + w) N(m_u, v_u)^(-w)."""
    precision = (plus + extra) / v_c - (plus + extra - 1) / v_u
    return ((plus + extra) * m_c / v_c - (plus + extra - 1) * m_u / v_u) / precision, 1 / precision


def _in_between(
    free, given, log_snr, w, sigma_min, sigma_max, *, level=lambda snr: (-snr / 2).exp(), outside=1.0, shift=0.0
):
    """Guided noise where sigma_min < sigma <= sigma_max, conditional elsewhere."""
    sigma = level(log_snr)
    scale = torch.where((sigma > sigma_min) & (sigma <= sigma_max), w + shift, outside)
    return free + scale[:, None] * (given - free)


def _swapped_interval(free, given, log_snr, w, sigma_min, sigma_max):
    sigma = (-log_snr / 2).exp()
    scale = torch.where((sigma > sigma_min) & (sigma <= sigma_max), 1.0, w)
    return free + scale[:, None] * (given - free)


def _burning(m, share, x_t, alpha_bar, *, root=math.sqrt, odds=lambda q: math.log(q / (1 - q)), factor=1.0, half=2.0):
    """The scale from which on two spikes' guided x0 is above 1."""
    log_odds = factor * 2 * root(alpha_bar) * m * x_t / (1 - alpha_bar) + odds(share)
    free = m * math.tanh(log_odds / half)
    return (1 - free) / (m - free)


def _dynamic(f, high, low, p, *, floor=1.0):
    """The dynamic threshold's s, and what the low pixels have after it."""
    s = max(floor, low if p <= 1 - f else high)
    return s, low / s


def _case(seed, sigmas):
    g = torch.Generator().manual_seed(seed)
    free, given = torch.randn(2, len(sigmas), 3, generator=g, dtype=torch.float64)
    return free, given, -2 * torch.tensor(sigmas, dtype=torch.float64).log()


EXERCISES = {
    "14.1": Exercise(
        _tempered,
        inputs=(
            (1.0, 0.5, 0.0, 1.0, 2.0),
            (-0.4, 0.3, 0.7, 2.0, 0.5),
            (2.0, 1.2, -1.0, 1.5, 3.0),
            (0.3, 0.2, 0.1, 0.9, 0.0),
        ),
        mistakes={
            "that is for our omega; Ho and Salimans' w counts what is added to the conditional model: omega = 1 + w": (
                lambda *case: _tempered(*case, plus=0.0)
            ),
            "one too many: 1 + w of the conditional, w of the unconditional": lambda *case: _tempered(*case, plus=2.0),
            "the second is a standard deviation; the question asks for a variance": (
                lambda *case: (_tempered(*case)[0], math.sqrt(_tempered(*case)[1]))
            ),
            "the second is a precision; the question asks for a variance": (
                lambda *case: (_tempered(*case)[0], 1 / _tempered(*case)[1])
            ),
            "means are weighted by precisions: (1 + w) m_c - w m_u holds for equal variances only": (
                lambda m_c, v_c, m_u, v_u, w: ((1 + w) * m_c - w * m_u, _tempered(m_c, v_c, m_u, v_u, w)[1])
            ),
            "variances do not add here: the logarithms of densities do, and they hold 1 / v": (
                lambda m_c, v_c, m_u, v_u, w: (_tempered(m_c, v_c, m_u, v_u, w)[0], (1 + w) * v_c - w * v_u)
            ),
            "the unconditional density is divided out, so its terms carry a minus": (
                lambda m_c, v_c, m_u, v_u, w: (
                    ((1 + w) * m_c / v_c + w * m_u / v_u) / ((1 + w) / v_c + w / v_u),
                    1 / ((1 + w) / v_c + w / v_u),
                )
            ),
            "that is where the flow ends (E000-23); the question asks for the density that it aims at": (
                lambda m_c, v_c, m_u, v_u, w: (_tempered(m_c, v_c, m_u, v_u, w)[0], v_c ** (1 + w) * v_u**-w)
            ),
        },
    ),
    "14.2": Exercise(
        _in_between,
        inputs=(
            (*_case(0, [0.05, 0.3, 1.0, 3.0, 20.0]), 3.0, 0.2, 5.0),
            (*_case(1, [0.5, 1.0, 2.0, 4.0]), 7.5, 0.75, 2.5),
            (*_case(2, [0.9, 1.1]), 2.0, 0.0, 1.0),
        ),
        mistakes={
            "outside the interval the model stays conditional (scale 1), not unconditional (scale 0)": (
                lambda *case: _in_between(*case, outside=0.0)
            ),
            "w is ours: 1 is conditional already; do not add 1": lambda *case: _in_between(*case, shift=1.0),
            "sigma is std / scale, so sigma^2 = exp(-log_snr): take its root": (
                lambda *case: _in_between(*case, level=lambda snr: (-snr).exp())
            ),
            "upside down: sigma falls as the SNR rises": (
                lambda *case: _in_between(*case, level=lambda snr: (snr / 2).exp())
            ),
            "this is std, at most 1; the interval is in sigma = std / scale": (
                lambda *case: _in_between(*case, level=lambda snr: torch.sigmoid(-snr).sqrt())
            ),
            "inside and outside are swapped": _swapped_interval,
            "the halves are swapped: guidance leads from free to given": (
                lambda free, given, *rest: _in_between(given, free, *rest)
            ),
            "that guides everywhere: ask for sigma": (lambda free, given, log_snr, w, *_: free + w * (given - free)),
        },
    ),
    "14.3": Exercise(
        _burning,
        inputs=((0.6, 0.5, 0.0, 0.2), (0.6, 0.5, -1.0, 0.2), (0.8, 0.9, 0.3, 0.1), (0.5, 0.2, 0.4, 0.5)),
        mistakes={
            "the prior counts: log(share / (1 - share)) belongs to the log-odds": (
                lambda *case: _burning(*case, odds=lambda q: 0.0)
            ),
            "the log-odds of the spikes are 2 sqrt(alpha_bar) m x_t / (1 - alpha_bar): the 2 is missing": (
                lambda *case: _burning(*case, factor=0.5)
            ),
            "x_t is centred at sqrt(alpha_bar) m: the root is missing": lambda *case: _burning(*case, root=lambda a: a),
            "2 p - 1 is tanh of *half* the log-odds": lambda *case: _burning(*case, half=1.0),
            "share lies at +m, the spike that we ask for": (lambda m, share, *rest: _burning(m, 1 - share, *rest)),
            "that counts what is added to the conditional answer; the question asks for our scale, 1 more": (
                lambda *case: _burning(*case) - 1
            ),
            "guidance starts from the unconditional answer, not from 0": lambda m, *rest: 1 / m,
        },
        points=2,
    ),
    "14.4": Exercise(
        _dynamic,
        inputs=((0.58, 1.5, 0.6, 0.4), (0.58, 1.5, 0.6, 0.7), (0.01, 3.0, 0.9, 0.995), (0.003, 3.0, 0.9, 0.995)),
        mistakes={
            "s is never below 1: pictures that fit are left alone": lambda *case: _dynamic(*case, floor=0.0),
            "that is the static threshold, s = 1 always": lambda f, high, low, p: (1.0, low),
            "a share p lies *below* the percentile: it is high as soon as p > 1 - f": (
                lambda f, high, low, p: _dynamic(f, high, low, 1 - p)
            ),
            "the low ones are divided by s, too": lambda f, high, low, p: (_dynamic(f, high, low, p)[0], low),
            "they are divided, not multiplied, by s": (
                lambda f, high, low, p: (_dynamic(f, high, low, p)[0], low * _dynamic(f, high, low, p)[0])
            ),
            "that is p = 1, the largest pixel": lambda f, high, low, p: _dynamic(f, high, low, 1.0),
            "compare p with 1 - f: f is the share of the *high* pixels": (
                lambda f, high, low, p: _dynamic(1 - f, high, low, p)
            ),
        },
    ),
}
