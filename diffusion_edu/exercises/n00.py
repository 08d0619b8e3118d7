"""Exercises of notebook 00: the Gaussian toolkit."""

import math

from . import Exercise


def _mixture_variance(w, m1, v1, m2, v2):
    return w * v1 + (1 - w) * v2 + w * (1 - w) * (m1 - m2) ** 2


def _four_names(alpha_bar):
    scale, std = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    return alpha_bar, scale, std / scale, math.log(alpha_bar / (1 - alpha_bar))


def _names_with(i, wrong):
    """The right four names, but for part ``i``."""

    def names(alpha_bar):
        parts = list(_four_names(alpha_bar))
        parts[i] = wrong(alpha_bar)
        return tuple(parts)

    return names


_MIXTURES = ((0.5, -2.0, 0.25, 2.0, 0.25), (0.3, -1.0, 0.5, 2.0, 2.0), (0.9, 0.0, 1.0, 0.5, 3.0))
_ALPHA_BARS = ((0.9,), (0.64,), (0.2,), (0.01,))

EXERCISES = {
    "00.1": Exercise(
        _mixture_variance,
        inputs=_MIXTURES,
        mistakes={
            "this is the variance of the weighted sum w X1 + (1 - w) X2 of variables. "
            "The question asks for a mixture: each draw comes from one of the two": (
                lambda w, m1, v1, m2, v2: w**2 * v1 + (1 - w) ** 2 * v2
            ),
            "this is the mean spread inside the bumps; the distance between the bumps is still missing": (
                lambda w, m1, v1, m2, v2: w * v1 + (1 - w) * v2
            ),
            "this is the spread between the bumps; the spread inside each is still missing": (
                lambda w, m1, v1, m2, v2: w * (1 - w) * (m1 - m2) ** 2
            ),
            "this is E[x^2]; subtract the square of the mean": (
                lambda w, m1, v1, m2, v2: w * (v1 + m1**2) + (1 - w) * (v2 + m2**2)
            ),
            "this is a standard deviation; the question asks for a variance": (
                lambda *args: math.sqrt(_mixture_variance(*args))
            ),
        },
    ),
    "00.2": Exercise(
        _four_names,
        inputs=_ALPHA_BARS,
        mistakes={
            "the DDIM paper's alpha is our alpha-bar itself: no square root in the first part": (
                _names_with(0, math.sqrt)
            ),
            "the second part is a factor of x0, so it is the square root of alpha-bar": (_names_with(1, lambda a: a)),
            "the third part is std alone. After division by scale the noise level is std / scale": (
                _names_with(2, lambda a: math.sqrt(1 - a))
            ),
            "the third part is a variance; sigma is its square root": _names_with(2, lambda a: (1 - a) / a),
            "the fourth part has its sign turned: more signal means a larger log SNR": (
                _names_with(3, lambda a: math.log((1 - a) / a))
            ),
            "the fourth part is half the log SNR (the letter of DPM-Solver): SNR is a ratio of variances": (
                _names_with(3, lambda a: 0.5 * math.log(a / (1 - a)))
            ),
            "the fourth part is the SNR; take its logarithm": _names_with(3, lambda a: a / (1 - a)),
        },
    ),
    "00.3": Exercise(
        lambda v_x, v_y: math.sqrt((v_x + v_y) / v_x),
        inputs=((1.0, 1.0), (0.5, 2.0), (4.0, 0.1)),
        mistakes={
            "variances add, not standard deviations": lambda v_x, v_y: 1 + math.sqrt(v_y / v_x),
            "the peak is 1 / sqrt(2 pi variance): a square root is missing": lambda v_x, v_y: (v_x + v_y) / v_x,
            "upside down: the printed sentence gives the sharper density, so the ratio is above 1": (
                lambda v_x, v_y: math.sqrt(v_x / (v_x + v_y))
            ),
        },
    ),
    "00.4": Exercise(
        lambda n, beta, v0: 1 + (v0 - 1) * (1 - beta) ** n,
        inputs=((1, 0.1, 4.0), (2, 0.1, 0.25), (50, 0.02, 9.0), (0, 0.3, 2.5)),
        mistakes={
            "a factor c on x is a factor c^2 on its variance: you used sqrt(1 - beta)": (
                lambda n, beta, v0: _repeat(n, v0, lambda v: math.sqrt(1 - beta) * v + beta)
            ),
            "this only adds noise; every step also shrinks x first": lambda n, beta, v0: v0 + n * beta,
            "this only shrinks; every step also adds noise of variance beta": (
                lambda n, beta, v0: v0 * (1 - beta) ** n
            ),
            "the noise has variance beta, not beta squared": (
                lambda n, beta, v0: _repeat(n, v0, lambda v: (1 - beta) * v + beta**2)
            ),
            "this is one step; repeat it n times": lambda n, beta, v0: (1 - beta) * v0 + beta,
        },
    ),
}


def _repeat(n, v, step):
    for _ in range(n):
        v = step(v)
    return v
