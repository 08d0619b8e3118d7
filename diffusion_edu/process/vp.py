"""Variance-preserving processes: DDPM's tables, the same joined up in continuous time, and the VP SDEs."""

import torch
from torch.nn.functional import logsigmoid

from .. import checks
from ..schedules import check_beta
from .base import SDE, Process, expand


class DiscreteVP(Process):
    r"""DDPM's chain x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) eps_t, as tables.

    .. math:: \alpha_t = 1 - \beta_t, \qquad \bar\alpha_t = \prod_{s=1}^t \alpha_s, \qquad \bar\alpha_0 = 1

    Parameters
    ----------
    beta : Tensor, shape (T + 1,)
        ``beta[0] = 0``, the rest in (0, 1); ``beta[T] = 1`` gives zero terminal SNR.

    Attributes
    ----------
    beta, alpha, alpha_bar : Tensor, shape (T + 1,), float64
        ``table[t]`` is the lecture's symbol at t. They stay float64 when the module is cast.

    Raises
    ------
    ValueError
        If a beta lies outside (0, 1) or beta[0] is not 0.

    Equations: fwd.alpha_bar

    References
    ----------
    .. [1] Ho et al., 2020, arXiv:2006.11239, section 2.
    """

    discrete = True

    def __init__(self, beta):
        super().__init__()
        beta = check_beta(beta).clone()
        self.T = len(beta) - 1
        self.zero_terminal_snr = bool(beta[-1] == 1)
        log_alpha_bar = torch.log1p(-beta).cumsum(0)  # log1p, expm1: no cancellation where beta is tiny
        self.register_buffer("beta", beta, persistent=False)
        self.register_buffer("alpha", 1 - beta, persistent=False)
        self.register_buffer("alpha_bar", log_alpha_bar.exp(), persistent=False)
        self.register_buffer("_scale", (log_alpha_bar / 2).exp(), persistent=False)
        self.register_buffer("_std", (-torch.expm1(log_alpha_bar)).sqrt(), persistent=False)
        self.between = TableVP(log_alpha_bar)

    def marginal(self, t):
        r"""(sqrt(alpha_bar[t]), sqrt(1 - alpha_bar[t])), shaped like the integer tensor ``t``.

        .. math:: q(x_t \mid x_0) = \mathcal N(\sqrt{\bar\alpha_t}\, x_0,\ (1 - \bar\alpha_t) I)

        Equations: fwd.marginal
        """
        self.check_times(t)
        return self._scale[t], self._std[t]

    def levels(self, t):
        """`marginal` at the integers; between them, the joined-up table's."""
        return self.between.marginal(t) if t.is_floating_point() else self.marginal(t)

    def time_of(self, log_snr):
        """The real time at which the joined-up table has this log SNR; exact at the integers."""
        return self.between.time_of(log_snr)

    def sample_t(self, n, generator=None):
        r"""n training times, shape (n,): uniform on 1..T.

        .. math:: \sum_{t=1}^T L_{t-1} = T\, E_{t \sim U\{1..T\}}[L_{t-1}]

        Equations: elbo.mc_t
        """
        return torch.randint(1, self.T + 1, (n,), generator=generator)

    def continuous(self):
        """The table joined up as an SDE: alpha_bar is the same at every integer, and log-linear between."""
        return self.between


class _VP(SDE):
    """dx = -beta(t) x / 2 dt + sqrt(beta(t)) dw: all of it follows from beta(t) and its integral."""

    def marginal(self, t):
        r"""(scale, std) of the transition kernel.

        .. math:: q(x_t \mid x_0) = \mathcal N(\sqrt{\bar\alpha(t)}\, x_0,\ (1 - \bar\alpha(t)) I), \qquad
                  \bar\alpha(t) = \exp\Big(-\int_0^t \beta(s)\,ds\Big)

        Equations: sde.vp_kernel

        References
        ----------
        .. [1] Song et al., 2021, arXiv:2011.13456, Eq. 29 and 33.
        """
        integral = self.integral(self.check_times(t))
        return (-integral / 2).exp(), (-torch.expm1(-integral)).sqrt()

    def log_snr(self, t):
        return -torch.expm1(self.integral(t)).log()

    def time_of(self, log_snr):
        return self.time_of_integral(-logsigmoid(log_snr.double()))

    def drift(self, x, t):
        return -expand(self.rate(t), x) / 2 * x

    def diffusion(self, t):
        return self.rate(t).sqrt()


class TableVP(_VP):
    r"""A `DiscreteVP` between its integers: beta(t) is constant on each interval (t - 1, t], so that alpha_bar fits.

    .. math:: \exp\Big(-\int_{t-1}^{t} \beta(s)\,ds\Big) = 1 - \beta_t

    Equations: sde.rescale
    """

    def __init__(self, log_alpha_bar):
        super().__init__()
        self.T = len(log_alpha_bar) - 1
        self.zero_terminal_snr = bool(log_alpha_bar[-1].isneginf())
        self.register_buffer("_integral", -log_alpha_bar, persistent=False)

    def _cell(self, t):
        """The interval (k - 1, k] that t lies in, 1 <= k <= T."""
        return t.ceil().long().clamp(1, self.T)

    def rate(self, t):
        k = self._cell(t)
        return self._integral[k] - self._integral[k - 1]

    def integral(self, t):
        k = self._cell(t)
        below = self._integral[k - 1]
        part = (t - (k - 1)) * (self._integral[k] - below)
        return torch.where(t == k, self._integral[k], torch.where(t == k - 1, below, below + part))

    def time_of_integral(self, integral):
        k = torch.searchsorted(self._integral, integral).clamp(1, self.T)
        below, above = self._integral[k - 1], self._integral[k]
        return torch.where(integral == above, k.double(), (k - 1) + (integral - below) / (above - below))


class VPSDE(_VP):
    r"""The variance-preserving SDE with linear beta(t), T = 1.

    .. math:: dx = -\tfrac12\beta(t)\,x\,dt + \sqrt{\beta(t)}\,dw, \qquad
              \bar\alpha(t) = \exp\Big(-\int_0^t \beta(s)\,ds\Big)

    Parameters
    ----------
    beta_min, beta_max : float
        beta(0) and beta(1), 0 < beta_min <= beta_max. DDPM's table with T = 1000 has the limit (0.1, 20).

    Equations: sde.vp, sde.limit

    References
    ----------
    .. [1] Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021,
       arXiv:2011.13456, Eq. 32-33.
    """

    T = 1.0

    def __init__(self, beta_min=0.1, beta_max=20.0):
        super().__init__()
        self.beta_min = checks.real("beta_min", beta_min, 0, open_low=True)
        self.beta_max = checks.real("beta_max", beta_max, self.beta_min)

    def rate(self, t):
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def integral(self, t):
        t = t.double()
        return self.beta_min * t + (self.beta_max - self.beta_min) * t**2 / 2

    def time_of_integral(self, integral):
        # The root of the quadratic, written so that nothing cancels for small integrals.
        slope = self.beta_max - self.beta_min
        return 2 * integral / (self.beta_min + (self.beta_min**2 + 2 * slope * integral).sqrt())


class SubVPSDE(VPSDE):
    r"""The sub-VP SDE: VPSDE's drift with less noise.

    .. math:: dx = -\tfrac12\beta(t)\,x\,dt + \sqrt{\beta(t)\big(1 - e^{-2\int_0^t\beta}\big)}\,dw, \qquad
              \mathrm{std}(t) = 1 - e^{-\int_0^t\beta}

    Equations: sde.subvp

    References
    ----------
    .. [1] Song et al., 2021, arXiv:2011.13456, Eq. 12.
    """

    def marginal(self, t):
        integral = self.integral(self.check_times(t))
        return (-integral / 2).exp(), -torch.expm1(-integral)

    def log_snr(self, t):
        integral = self.integral(t)
        return -integral - 2 * (-torch.expm1(-integral)).log()

    def time_of(self, log_snr):
        return self.time_of_integral(2 * torch.asinh((-log_snr.double() / 2).exp() / 2))

    def diffusion(self, t):
        return (self.rate(t) * -torch.expm1(-2 * self.integral(t))).sqrt()
