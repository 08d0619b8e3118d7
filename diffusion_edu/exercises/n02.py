"""Exercises of notebook 02: from HVAE to diffusion."""

import torch

from ..schedules import cosine_beta, linear_beta
from . import Exercise


def _denoising_term(alpha_bar, x0, x_t, t, mean, var, *, bug=None):
    """KL(q(x_{t-1} | x_t, x_0) || N(mean, var)) in nats, shape (B,); ``bug`` names one known mistake."""
    a, a_s = alpha_bar[t][:, None], alpha_bar[t - 1][:, None]
    alpha, var = a / a_s, var[:, None] ** (2 if bug == "squared" else 1)
    beta = 1 - alpha
    beta_tilde = (1 - a_s) / (1 - a) * beta
    from_x0 = a_s.sqrt() * (1.0 if bug == "beta lost" else beta) / (1 - a)
    from_x_t = alpha.sqrt() * (1 - (a if bug == "bar at t" else a_s)) / (1 - a)
    if bug == "swapped":
        from_x0, from_x_t = from_x_t, from_x0
    miss = (from_x_t * x_t + from_x0 * x0 - mean) ** 2
    ratio = (beta if bug == "beta" else beta_tilde) / var
    if bug == "turned round":
        return ((1 / ratio - 1 + ratio.log() + miss / beta_tilde) / 2).sum(1)
    shape = 0 * ratio if bug == "mean only" else ratio - 1 - ratio.log()
    if bug == "shape once":
        return (miss / var).sum(1) / 2 + shape[:, 0] / 2
    nats = (shape + miss / var) / (1 if bug == "no half" else 2)
    return nats.mean(1) if bug == "mean over D" else nats.sum(1)


def _with(bug):
    return lambda *args: _denoising_term(*args, bug=bug)


def _batch():
    generator = torch.Generator().manual_seed(2)
    x0, x_t, mean = torch.randn(3, 4, 2, generator=generator, dtype=torch.float64)
    alpha_bar = torch.cumprod(1 - linear_beta(100, 1e-3, 0.2), 0)
    var = torch.tensor([0.01, 0.05, 0.3, 0.2], dtype=torch.float64)
    return alpha_bar, x0, x_t, torch.tensor([2, 30, 70, 100]), mean, var


def _estimate(L_T, terms, T):
    return (L_T + T * terms).mean()


def _nats():
    generator = torch.Generator().manual_seed(3)
    return torch.rand(2, 6, generator=generator, dtype=torch.float64)


def _share(alpha_bar, a, b, *, first=1, shift=1, low=True):
    """Weight of the x_0 errors at times a..b over that of 2..T."""
    snr = alpha_bar / (1 - alpha_bar)  # infinite at 0
    return (snr[a - shift] - snr[b]) / (snr[first] - low * snr[-1])


def _share_of_eps(alpha_bar, a, b):
    snr = alpha_bar[1:] / (1 - alpha_bar[1:])
    w = torch.cat([snr.new_zeros(2), snr[:-1] / snr[1:] - 1])
    return w[a : b + 1].sum() / w.sum()


def _tables():
    short = torch.cat([torch.zeros(1, dtype=torch.float64), torch.linspace(0.02, 0.06, 12, dtype=torch.float64)])
    cases = ((linear_beta(1000), 2, 2), (linear_beta(1000), 11, 500), (cosine_beta(200), 3, 40), (short, 4, 12))
    return tuple((torch.cumprod(1 - beta, 0), a, b) for beta, a, b in cases)


def _total(alpha_bar):
    snr = alpha_bar[[1, -1]] / (1 - alpha_bar[[1, -1]])
    return (snr[0] - snr[1]) / 2


EXERCISES = {
    "02.1": Exercise(
        _denoising_term,
        inputs=(_batch(),),
        mistakes={
            "this is the mean over the D dimensions; nats of a whole example are a sum": _with("mean over D"),
            "turned round: q comes first, so the model's variance is in the denominators": _with("turned round"),
            "q(x_{t-1} | x_t, x_0) has the variance beta-tilde, not beta: x_0 narrows it down": _with("beta"),
            "beta_t is missing in front of x_0: the mean is an average, its weights shrink with beta (E000-06)": (
                _with("beta lost")
            ),
            "1 - alpha_bar of time t - 1 belongs in front of x_t (E001-08)": _with("bar at t"),
            "the two weights of the mean are swapped: for small beta nearly all of it comes from x_t": _with("swapped"),
            "var is a variance already; do not square it": _with("squared"),
            "this is the squared distance of the means alone; the two widths differ, too": _with("mean only"),
            "the widths are compared once; every one of the D dimensions has them": _with("shape once"),
            "twice the divergence: the factor 1/2 of a Gaussian's exponent is missing": _with("no half"),
        },
        points=2,
    ),
    "02.2": Exercise(
        1.0,
        mistakes={
            "this is the gap of the DDPM table in all; divide by its 999 steps and let beta go to 0": 983.7674905071024,
            "this is an average over steps of different size; what does one lose when beta goes to 0?": 983.8 / 999,
            "half of it: x_{t-1} and x_{t+1} are two steps apart, so their squared distance is 2 beta": 0.5,
            "one factor 1/2 too few: the divergence has (difference of the means)^2 / (2 beta)": 2.0,
            "the true term is 0 in the limit; how large is the printed divergence?": 0.0,
            "the printed form is below the bound; count the loss as positive": -1.0,
        },
        tol=1e-4,  # 983.8 / 999, typed with four digits, is a known mistake; 0.9995, measured at T = 10000, is wrong
    ),
    "02.3": Exercise(
        _estimate,
        inputs=((*_nats(), 1000), (*_nats(), 4)),
        mistakes={
            "factor T - 1 belongs to t from 2..T; here t = 1 is drawn, too, so each t has probability 1/T": (
                lambda L_T, terms, T: (L_T + (T - 1) * terms).mean()
            ),
            "a mean over t is 1/T of the sum over t: the factor T is missing (E001-10)": (
                lambda L_T, terms, T: (L_T + terms).mean()
            ),
            "L_T is paid once, not at every t: leave it outside the factor": (
                lambda L_T, terms, T: T * (L_T + terms).mean()
            ),
            "the sum over the batch counts every example; average the estimates": (
                lambda L_T, terms, T: (L_T + T * terms).sum()
            ),
            "L_T is part of the bound, too, even though no network can change it (E004-12)": (
                lambda L_T, terms, T: T * terms.mean()
            ),
            "the terms of a batch belong to random times, not to every t once: T times their mean, not their sum": (
                lambda L_T, terms, T: L_T.mean() + terms.sum()
            ),
            "one estimate for each example; the question asks for their mean": lambda L_T, terms, T: L_T + T * terms,
        },
    ),
    "02.4": Exercise(
        _share,
        inputs=_tables(),
        mistakes={
            "the weight of time t reaches from SNR(t - 1) to SNR(t), so that of a..b starts at SNR(a - 1)": (
                lambda alpha_bar, a, b: _share(alpha_bar, a, b, shift=0)
            ),
            "SNR(0) is infinite: t = 1 has no divergence, the total starts at SNR(1)": (
                lambda alpha_bar, a, b: _share(alpha_bar, a, b, first=0)
            ),
            "the total ends at SNR(T), which a short chain leaves above 0": (
                lambda alpha_bar, a, b: _share(alpha_bar, a, b, low=False)
            ),
            "these are the weights of the noise error; the question asks for those of x_0": _share_of_eps,
            "this is the weight itself, in nats per squared error; divide by that of all times": (
                lambda alpha_bar, a, b: _share(alpha_bar, a, b) * _total(alpha_bar)
            ),
            "this is twice the weight itself; divide by that of all times": (
                lambda alpha_bar, a, b: 2 * _share(alpha_bar, a, b) * _total(alpha_bar)
            ),
            "the weight of time b is in, too: it ends at SNR(b), not at SNR(b - 1)": (
                lambda alpha_bar, a, b: _share(alpha_bar, a, b - 1)
            ),
            "SNR falls as t grows: SNR(a - 1) is the larger one": lambda alpha_bar, a, b: -_share(alpha_bar, a, b),
            "this is in per cent; the question asks for a share between 0 and 1": (
                lambda alpha_bar, a, b: 100 * _share(alpha_bar, a, b)
            ),
        },
    ),
}
