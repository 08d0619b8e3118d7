"""Solvers of the probability-flow ODE. They need two evaluations, or a memory, to be of second order."""

import torch

from ..process import expand


def heun_step(model, x_t, t, s, noise=None):
    r"""EDM's second-order step: Euler to s, then the mean of the slopes at both ends.

    .. math:: \bar x = x / a, \quad \sigma = b / a: \qquad
              \bar x' = \bar x_t + (\sigma_s - \sigma_t)\,\hat\epsilon_t, \qquad
              \bar x_s = \bar x_t + (\sigma_s - \sigma_t)\,\tfrac12(\hat\epsilon_t + \hat\epsilon_s')

    Euler in these variables is DDIM. At s = 0 there is no slope, and Euler is used: N steps take 2N - 1 evaluations.
    So it is on the way down from pure noise, where a = 0 and sigma is infinite.

    Equations: edm.heun

    References
    ----------
    .. [1] Karras et al., 2022, arXiv:2206.00364, algorithm 1.
    """
    pred = model(x_t, t)
    a_s, b_s = (expand(c, x_t) for c in model.process.marginal(s))
    euler = a_s * pred.x0 + b_s * pred.eps
    if s == 0 or (model.process.zero_terminal_snr and t == model.process.T):
        return euler
    end = model(euler, s)
    step = b_s - a_s * pred.std / pred.scale  # a_s (sigma_s - sigma_t)
    return euler + step * (end.eps - pred.eps) / 2


class Dpmpp2M:
    r"""DPM-Solver++(2M): one evaluation a step, second order by remembering the one before.

    .. math:: x_s = \frac{b_s}{b_t} x_t - a_s (e^{-h} - 1) D, \qquad
              D = \hat x_0 + \tfrac{h}{2 h'}(\hat x_0 - \hat x_0'), \qquad h = \lambda_s - \lambda_t

    with lambda half the log SNR, and h', x0' of the step before. The memory is dropped when the step is handed a tensor
    that it did not return itself (a new run, a sampler that edits x), and not used at s = 0, where h is infinite.

    Equations: solver.dpmpp2m

    References
    ----------
    .. [1] Lu et al., "DPM-Solver++", 2022, arXiv:2211.01095, algorithm 2.
    """

    def __init__(self):
        self.returned = self.x0 = self.h = None

    def __call__(self, model, x_t, t, s, noise=None):
        pred = model(x_t, t)
        process = model.process
        a_s, b_s = process.marginal(s)
        h = (process.log_snr(s) - process.log_snr(t)) / 2
        direction = pred.x0
        if x_t is self.returned and s > 0:
            direction = direction + expand(h / (2 * self.h), x_t) * (pred.x0 - self.x0)
        ratio, gain = expand(b_s, x_t) / pred.std, expand(-a_s * torch.expm1(-h), x_t)
        x_s = ratio * x_t + gain * direction
        self.returned, self.x0, self.h = x_s, pred.x0, h
        return x_s


def make_dpmpp_2m_step():
    """A fresh DPM-Solver++(2M) step; see `Dpmpp2M`."""
    return Dpmpp2M()
