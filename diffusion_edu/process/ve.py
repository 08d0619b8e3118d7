"""Variance-exploding processes: the data stay where they are, the noise grows."""

import math

import torch

from .. import checks
from .base import SDE


class VESDE(SDE):
    r"""The variance-exploding SDE in geometric time, T = 1.

    .. math:: dx = \sqrt{d\,\sigma(t)^2 / dt}\,dw, \quad \sigma(t) = \sigma_{min}(\sigma_{max}/\sigma_{min})^t, \quad
              x_t \mid x_0 \sim \mathcal N(x_0, [\sigma(t)^2 - \sigma(0)^2] I)

    Parameters
    ----------
    sigma_min, sigma_max : float
        0 < sigma_min < sigma_max.

    Equations: sde.ve

    References
    ----------
    .. [1] Song et al., 2021, arXiv:2011.13456, Eq. 9 and 30.
    """

    T = 1.0

    def __init__(self, sigma_min=0.01, sigma_max=50.0):
        super().__init__()
        self.sigma_min = checks.real("sigma_min", sigma_min, 0, open_low=True)
        self.sigma_max = checks.real("sigma_max", sigma_max, self.sigma_min, open_low=True)
        self._log_ratio = math.log(self.sigma_max / self.sigma_min)

    def marginal(self, t):
        t = self.check_times(t).double()
        return torch.ones_like(t), self.sigma_min * torch.expm1(2 * self._log_ratio * t).sqrt()

    def time_of(self, log_snr):
        return torch.log1p((-log_snr.double()).exp() / self.sigma_min**2) / (2 * self._log_ratio)

    def clock(self, t):
        """250 log std(t), as on `VE`."""
        return 250 * self.marginal(t)[1].log()

    def drift(self, x, t):
        return torch.zeros_like(x)

    def diffusion(self, t):
        return self.sigma_min * (self._log_ratio * t).exp() * math.sqrt(2 * self._log_ratio)


class VE(SDE):
    r"""Time is the noise level: x_t = x_0 + t eps. The process of NCSN and EDM.

    .. math:: x_t \mid x_0 \sim \mathcal N(x_0, t^2 I), \qquad dx = \sqrt{2t}\,dw

    Training times are log-normal, as in EDM: log t ~ N(-1.2, 1.2^2).

    Parameters
    ----------
    T : float
        The largest noise level that sampling starts from.

    Equations: sde.ve, score.perturbed

    References
    ----------
    .. [1] Karras et al., 2022, arXiv:2206.00364, Table 1.
    """

    def __init__(self, T=80.0):
        super().__init__()
        self.T = checks.real("T", T, 0, open_low=True)

    def marginal(self, t):
        t = self.check_times(t).double()
        return torch.ones_like(t), t

    def time_of(self, log_snr):
        return (-log_snr.double() / 2).exp()

    def sample_t(self, n, generator=None):
        """n training levels, shape (n,): log-normal, at most T."""
        return (1.2 * torch.randn(n, generator=generator, dtype=torch.float64) - 1.2).exp().clamp(max=self.T)

    def clock(self, t):
        """What the network sees of the time: 250 log sigma (EDM's c_noise times 1000)."""
        return 250 * t.log()

    def drift(self, x, t):
        return torch.zeros_like(x)

    def diffusion(self, t):
        return (2 * t).sqrt()
