r"""Fast solvers of the probability-flow ODE: two evaluations a step, or a memory, make them of higher order.

All of them integrate the linear part of the ODE exactly and approximate the network only, as a function of
lambda = log(scale / std), half the log SNR (Heun's step: of sigma = std / scale):

.. math:: x_s = \frac{a_s}{a_t} x_t - a_s \int_{\lambda_t}^{\lambda_s} e^{-\lambda}\,\hat\epsilon\, d\lambda
          = \frac{b_s}{b_t} x_t + b_s \int_{\lambda_t}^{\lambda_s} e^{\lambda}\,\hat x_0\, d\lambda

with a = scale and b = std. At s = 0, where lambda is infinite, and on the way down from pure noise, where a = 0, each
of them takes DDIM's step: x_s = a_s x0 + b_s eps.

Equations: solver.exact, solver.lambda

References
----------
.. [1] Lu et al., "DPM-Solver", 2022, arXiv:2206.00927, proposition 3.1.
"""

import numpy as np
import torch

from .. import checks
from ..process import expand
from .ddim import at_an_end, ddim_step


def half_log_snr(process, t):
    r"""lambda, the time of the fast solvers.

    .. math:: \lambda_t = \log\frac{a_t}{b_t} = \tfrac12\log\mathrm{SNR}(t)

    Its inverse is ``process.time_of(2 * lam)``.

    Parameters
    ----------
    process : Process
    t : Tensor, any shape

    Returns
    -------
    Tensor, shaped like ``t``, float64

    Equations: solver.lambda
    """
    return process.log_snr(t) / 2


def _eps_form(process, x_t, t, s, eps):
    """x_s for an eps that does not change from t to s."""
    (a_t, _), (a_s, b_s) = process.marginal(t), process.marginal(s)
    h = half_log_snr(process, s) - half_log_snr(process, t)
    return expand(a_s / a_t, x_t) * x_t - expand(b_s * torch.expm1(h), x_t) * eps


def _x0_form(process, x_t, t, s, x0):
    """x_s for an x0 that does not change from t to s."""
    (_, b_t), (a_s, b_s) = process.marginal(t), process.marginal(s)
    h = half_log_snr(process, s) - half_log_snr(process, t)
    return expand(b_s / b_t, x_t) * x_t - expand(a_s * torch.expm1(-h), x_t) * x0


def _midpoint(sde, t, s):
    """The time halfway from t to s in lambda."""
    return sde.time_of(sde.log_snr(t) / 2 + sde.log_snr(s) / 2)


def _by_the_middle(form, view, model, x_t, t, s):
    """A step with what the model says, ``pred.view``, halfway in lambda, where the step of first order reaches."""
    if at_an_end(model.process, t, s):
        return ddim_step(model, x_t, t, s, None)
    sde, t, s = model.process.continuous(), t.double(), s.double()  # the midpoint is no integer
    m = _midpoint(sde, t, s)
    u = form(sde, x_t, t, m, getattr(model(x_t, t), view))
    return form(sde, x_t, t, s, getattr(model(u, m), view))


def dpm1_step(model, x_t, t, s, noise=None):
    r"""DPM-Solver-1: eps frozen at t. It is DDIM, reached from the other side.

    .. math:: x_s = \frac{a_s}{a_t} x_t - b_s (e^h - 1)\,\hat\epsilon(x_t, t), \qquad h = \lambda_s - \lambda_t

    Equations: solver.dpm1

    References
    ----------
    .. [1] Lu et al., 2022, arXiv:2206.00927, Eq. 3.7.
    """
    if at_an_end(model.process, t, s):
        return ddim_step(model, x_t, t, s, noise)
    return _eps_form(model.process, x_t, t, s, model(x_t, t).eps)


def dpm2_step(model, x_t, t, s, noise=None):
    r"""DPM-Solver-2: eps of the midpoint in lambda, which DPM-Solver-1 reaches. Two evaluations, second order.

    .. math:: u = \frac{a_m}{a_t} x_t - b_m (e^{h/2} - 1)\,\hat\epsilon(x_t, t), \qquad
              x_s = \frac{a_s}{a_t} x_t - b_s (e^h - 1)\,\hat\epsilon(u, m), \qquad \lambda_m = \lambda_t + h/2

    Equations: solver.dpm2

    References
    ----------
    .. [1] Lu et al., 2022, arXiv:2206.00927, algorithm 1.
    """
    return _by_the_middle(_eps_form, "eps", model, x_t, t, s)


def dpmpp_2s_step(model, x_t, t, s, noise=None):
    r"""DPM-Solver++(2S): the same with x0 in place of eps, which guidance and thresholding may change at will.

    .. math:: u = \frac{b_m}{b_t} x_t - a_m (e^{-h/2} - 1)\,\hat x_0(x_t, t), \qquad
              x_s = \frac{b_s}{b_t} x_t - a_s (e^{-h} - 1)\,\hat x_0(u, m), \qquad \lambda_m = \lambda_t + h/2

    Equations: solver.exact

    References
    ----------
    .. [1] Lu et al., "DPM-Solver++", 2022, arXiv:2211.01095, algorithm 1 with r = 1/2.
    """
    return _by_the_middle(_x0_form, "x0", model, x_t, t, s)


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
    if at_an_end(model.process, t, s):
        return ddim_step(model, x_t, t, s, noise)
    pred = model(x_t, t)
    a_s, b_s = (expand(c, x_t) for c in model.process.marginal(s))
    euler = a_s * pred.x0 + b_s * pred.eps
    step = b_s - a_s * pred.std / pred.scale  # a_s (sigma_s - sigma_t)
    return euler + step * (model(euler, s).eps - pred.eps) / 2


class _Multistep:
    """A step that remembers (lambda, pred.view) of the last steps, newest first.

    The memory is dropped unless the step goes on where it came to: from the very tensor it returned, at that time.
    """

    def __init__(self, view, length):
        self.view, self.length, self.returned, self.time, self.memory = view, length, None, None, []

    def __call__(self, model, x_t, t, s, noise=None):
        pred = model(x_t, t)
        if x_t is not self.returned or t != self.time:
            self.memory = []
        now = (half_log_snr(model.process, t), getattr(pred, self.view))
        self.memory, self.time = [now, *self.memory][: self.length], s
        if at_an_end(model.process, t, s):
            a_s, b_s = (expand(c, x_t) for c in model.process.marginal(s))
            self.memory, self.returned = [], a_s * pred.x0 + b_s * pred.eps
        else:
            self.returned = self.advance(model.process, x_t, t, s)
        return self.returned


class Dpmpp2M(_Multistep):
    r"""DPM-Solver++(2M): one evaluation a step, second order by remembering the one before.

    .. math:: x_s = \frac{b_s}{b_t} x_t - a_s (e^{-h} - 1) D, \qquad
              D = \hat x_0 + \tfrac{h}{2 h'}(\hat x_0 - \hat x_0'), \qquad h = \lambda_s - \lambda_t

    with h', x0' of the step before. What it remembers is dropped when it is handed a tensor that it did not return
    itself (a new run, a sampler that edits x), and the next step is DDIM's.

    Equations: solver.dpmpp2m

    References
    ----------
    .. [1] Lu et al., "DPM-Solver++", 2022, arXiv:2211.01095, algorithm 2.
    """

    def __init__(self):
        super().__init__("x0", 2)

    def advance(self, process, x_t, t, s):
        (lam, x0), *before = self.memory
        if before:
            ((lam_before, x0_before),) = before
            h, h_before = half_log_snr(process, s) - lam, lam - lam_before
            x0 = x0 + expand(h / (2 * h_before), x_t) * (x0 - x0_before)
        return _x0_form(process, x_t, t, s, x0)


def make_dpmpp_2m_step():
    """A fresh DPM-Solver++(2M) step; see `Dpmpp2M`."""
    return Dpmpp2M()


class Adams(_Multistep):
    r"""Exponential Adams-Bashforth: eps by the polynomial through its last values, and the integral of that exactly.

    .. math:: x_s = \frac{a_s}{a_t} x_t - b_s \int_0^h e^{h - u}\, P(u)\, du, \qquad
              P(\lambda_{t_j} - \lambda_t) = \hat\epsilon(x_{t_j}, t_j), \quad j = 0..k-1

    One evaluation a step and order k; the first steps, with less to remember, are of lower order, and the first of
    all is DDIM's, as is one from a tensor that it did not return itself.

    Equations: solver.exact

    References
    ----------
    .. [1] Zhang and Chen, "Fast Sampling of Diffusion Models with Exponential Integrator" (DEIS), 2023,
       arXiv:2204.13902, section 3; the polynomials here are in lambda, theirs in t.
    """

    def __init__(self, order=3):
        super().__init__("eps", checks.integer("order", order, 1, 4))

    def advance(self, process, x_t, t, s):
        lam = torch.stack([lam for lam, _ in self.memory])
        h = half_log_snr(process, s) - lam[0]
        weights = _adams_weights((lam - lam[0]) / h, h)
        a_t, (a_s, b_s) = process.marginal(t)[0], process.marginal(s)
        x_s = expand(a_s / a_t, x_t) * x_t
        for weight, (_, eps) in zip(weights, self.memory, strict=True):
            x_s = x_s - expand(b_s * weight, x_t) * eps
        return x_s


def _adams_weights(nodes, h):
    r"""Integrals over u in [0, h] of e^(h - u) times the Lagrange polynomials of the nodes, which are in units of h."""
    k = torch.arange(len(nodes), device=nodes.device)[:, None]
    u, quadrature = (torch.as_tensor(c, dtype=nodes.dtype, device=nodes.device) for c in _GAUSS)
    moments = (h * torch.exp(h * (1 - u)) * quadrature * u**k).sum(1)
    return torch.linalg.solve(nodes**k, moments)


_GAUSS = (lambda u, w: ((u + 1) / 2, w / 2))(*np.polynomial.legendre.leggauss(24))


def make_adams_step(order=3):
    """A fresh exponential Adams-Bashforth step of order 1 to 4; see `Adams`."""
    return Adams(order)
