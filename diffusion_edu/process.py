r"""The forward process: how data turn into noise, and what is known about the way back.

Every process here is Gaussian and linear, so one pair of numbers per time says it all:

.. math:: q(x_t \mid x_0) = \mathcal N(\mathrm{scale}(t)\, x_0,\ \mathrm{std}(t)^2 I)

Time 0 is clean data and ``process.T`` is the last time, on every process.
"""

import abc
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from . import checks
from .schedules import check_beta


def expand(c, x):
    """Shape a per-example number (0-d or (B,)) to multiply ``x`` (B, *D), in x's dtype and on its device."""
    c = c.to(device=x.device, dtype=x.dtype)
    return c.reshape(-1, *[1] * (x.ndim - 1)) if c.ndim else c


# Spacings: functions (process, n) -> n + 1 decreasing times from T to 0.


def uniform(process, n):
    """Equal steps in t."""
    return process.T * torch.linspace(1, 0, n + 1, dtype=torch.float64)


def quadratic(process, n):
    """Equal steps in sqrt(t): short steps near the data."""
    return process.T * torch.linspace(1, 0, n + 1, dtype=torch.float64) ** 2


def uniform_log_snr(t_min):
    """Equal steps in log SNR from T down to ``t_min``, then one step to 0."""

    def spacing(process, n):
        ends = process.log_snr(torch.tensor([process.T, t_min], dtype=torch.float64).to(process.time_dtype))
        log_snr = torch.linspace(ends[0].item(), ends[1].item(), n, dtype=torch.float64)
        return torch.cat([process.time_of(log_snr), torch.zeros(1, dtype=torch.float64)])

    return spacing


class Process(nn.Module, abc.ABC):
    """A forward process q(x_t | x_0) = N(scale(t) x_0, std(t)^2 I).

    Attributes
    ----------
    T : float
        The last time.
    discrete : bool
        Whether times are the integers 0..T.
    """

    T: float
    discrete = False

    @abc.abstractmethod
    def marginal(self, t) -> tuple[Tensor, Tensor]:
        """(scale, std) of q(x_t | x_0), float64, each shaped like ``t``."""

    def levels(self, t):
        """`marginal`, as a model reads it: a table may be read at real times between its integers, too."""
        return self.marginal(t)

    @abc.abstractmethod
    def time_of(self, log_snr) -> Tensor:
        """The time at which the log SNR has this value: the inverse of `log_snr`."""

    @property
    def time_dtype(self):
        """int64 on tables, float64 otherwise."""
        return torch.int64 if self.discrete else torch.float64

    def log_snr(self, t):
        r"""Log signal-to-noise ratio, for data of unit variance; +inf at t = 0.

        .. math:: \lambda_t = \log\frac{\mathrm{scale}(t)^2}{\mathrm{std}(t)^2}
                  \ \Big(= \log\frac{\bar\alpha_t}{1 - \bar\alpha_t}\Big)

        Equations: fwd.snr
        """
        scale, std = self.marginal(t)
        return 2 * (scale.log() - std.log())

    def sample_t(self, n, generator=None):
        """n training times, shape (n,): uniform on (0, T]."""
        return self.T * (1 - torch.rand(n, generator=generator, dtype=torch.float64))

    def grid(self, n_steps, spacing=uniform):
        """n_steps + 1 decreasing times, the first T, the last 0.

        Parameters
        ----------
        n_steps : int
            At least 1; at most T on a table.
        spacing : function (process, n) -> Tensor, shape (n + 1,)
            `uniform`, `quadratic`, `uniform_log_snr(t_min)` or your own.

        Returns
        -------
        Tensor, shape (n_steps + 1,)
            int64 and free of repetitions on a table, else float64.
        """
        n = checks.integer("n_steps", n_steps, 1, self.T if self.discrete else None)
        times = checks.function("spacing", spacing, "uniform")(self, n)
        if self.discrete:
            times = _distinct_integers(times, self.T)
        return check_decreasing(times)

    def clock(self, t):
        """What the network sees of the time: 1000 t / T, shaped like ``t``."""
        return t * (1000 / self.T)

    def continuous(self):
        """This process in continuous time; an SDE is that already."""
        return self

    def prior(self, shape, noise):
        """x_T of the given shape (n, *D), drawn by ``noise`` from N(0, std(T)^2 I)."""
        _, std = self.marginal(torch.tensor(self.T, dtype=self.time_dtype))
        return std.item() * noise(torch.empty(shape))

    def check_times(self, t, name="t"):
        """Times of this process, in [0, T]."""
        return checks.times_in(name, t, 0, self.T, self.discrete)

    def _apply(self, fn, recurse=True):
        # Tables stay float64 under .to(dtype), .half() and .double(); only the device may change.
        for name, table in self._buffers.items():
            self._buffers[name] = table.to(fn(table).device)
        for child in self.children():
            child._apply(fn, recurse)
        return self


def _distinct_integers(times, T):
    """Round decreasing times to distinct integers that still run from T to 0."""
    k = torch.arange(len(times) - 1, -1, -1)
    rounded = (times + 0.5).floor().to(torch.int64)
    up = k + (rounded - k).flip(0).cummax(0).values.flip(0)  # strictly above the next one
    return torch.minimum(up, T - k.flip(0))


def check_decreasing(times):
    """Times that strictly decrease, at least two of them."""
    if times.ndim != 1 or len(times) < 2 or not (times.diff() < 0).all():
        checks.fail("times", "be 1-D, at least 2 entries, strictly decreasing", times.tolist()[:8])
    return times


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
        beta = check_beta(beta)
        self.T = len(beta) - 1
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
        """n training times, shape (n,): uniform on 1..T."""
        return torch.randint(1, self.T + 1, (n,), generator=generator)

    def continuous(self):
        """The table joined up as an SDE: alpha_bar is the same at every integer, and log-linear between."""
        return self.between


class SDE(Process):
    """A process in continuous time, dx = f(x, t) dt + g(t) dw."""

    @abc.abstractmethod
    def drift(self, x, t) -> Tensor:
        """f(x, t), shaped like ``x``."""

    @abc.abstractmethod
    def diffusion(self, t) -> Tensor:
        """g(t), shaped like ``t``."""


class _VP(SDE):
    """dx = -beta(t) x / 2 dt + sqrt(beta(t)) dw: all of it follows from beta(t) and its integral."""

    def marginal(self, t):
        integral = self.integral(self.check_times(t))
        return (-integral / 2).exp(), (-torch.expm1(-integral)).sqrt()

    def log_snr(self, t):
        return -torch.expm1(self.integral(t)).log()

    def time_of(self, log_snr):
        return self.time_of_integral(softplus(log_snr.double()) - log_snr.double())  # -log sigmoid

    def drift(self, x, t):
        return -expand(self.rate(t), x) / 2 * x

    def diffusion(self, t):
        return self.rate(t).sqrt()


class TableVP(_VP):
    """A `DiscreteVP` between its integers: beta(t) is constant on each interval (t - 1, t]."""

    def __init__(self, log_alpha_bar):
        super().__init__()
        self.T = len(log_alpha_bar) - 1
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
        return torch.where(t == k, self._integral[k], below + part)

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


class VESDE(SDE):
    r"""The variance-exploding SDE in geometric time, T = 1.

    .. math:: \sigma(t) = \sigma_{min}(\sigma_{max}/\sigma_{min})^t, \qquad
              x_t \mid x_0 \sim \mathcal N(x_0, [\sigma(t)^2 - \sigma(0)^2] I)

    Parameters
    ----------
    sigma_min, sigma_max : float
        0 < sigma_min < sigma_max.

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

    References
    ----------
    .. [1] Karras et al., 2022, arXiv:2206.00364, Table 1.
    """

    def __init__(self, T=80.0):
        super().__init__()
        self.T = checks.real("T", T, 0, open_low=True)

    def check_times(self, t, name="t"):
        """Noise levels, at least 0: churn may pass T for a moment."""
        return checks.times_in(name, t, 0, math.inf, False)

    def marginal(self, t):
        t = self.check_times(t).double()
        return torch.ones_like(t), t

    def time_of(self, log_snr):
        return (-log_snr.double() / 2).exp()

    def sample_t(self, n, generator=None):
        """n training levels, shape (n,): log-normal."""
        return (1.2 * torch.randn(n, generator=generator, dtype=torch.float64) - 1.2).exp()

    def clock(self, t):
        """What the network sees of the time: 250 log sigma (EDM's c_noise times 1000)."""
        return 250 * t.log()

    def drift(self, x, t):
        return torch.zeros_like(x)

    def diffusion(self, t):
        return (2 * t).sqrt()


def forward_step(process, x_s, t, eps):
    r"""One step of the noising chain, from s = t - 1 to t.

    .. math:: x_t = \sqrt{1 - \beta_t}\, x_{t-1} + \sqrt{\beta_t}\, \epsilon_t

    Parameters
    ----------
    process : DiscreteVP
    x_s, eps : Tensor, shape (B, *D)
        The data after t - 1 steps, and fresh standard normal noise.
    t : Tensor of int64, 0-d or shape (B,)
        1 <= t <= T.

    Returns
    -------
    Tensor, shape (B, *D)

    Equations: fwd.step, fwd.step_dist

    References
    ----------
    .. [1] Ho et al., 2020, arXiv:2006.11239, Eq. 2.
    """
    scale, std = jump(process, t, t - 1)
    checks.same_shape("eps", eps, "x_s", x_s)
    return expand(scale, x_s) * x_s + expand(std, x_s) * eps


def jump(process, t, s):
    r"""(scale, std) of q(x_t | x_s), for s < t.

    .. math:: q(x_t \mid x_s) = \mathcal N\Big(\tfrac{a_t}{a_s} x_s,\ b_t^2\big(1 - \tfrac{SNR_t}{SNR_s}\big) I\Big),
              \qquad a = \mathrm{scale},\ b = \mathrm{std}

    For DDPM's tables the variance is 1 - alpha_bar_t / alpha_bar_s.

    Parameters
    ----------
    t, s : Tensor, 0-d or shape (B,)
        Times, 0 <= s < t <= T.

    Returns
    -------
    scale, std : Tensor, shaped like ``t``, float64

    Raises
    ------
    ValueError
        If some s >= t (read on the CPU only).

    Equations: fwd.jump

    References
    ----------
    .. [1] Kingma et al., "Variational Diffusion Models", 2021, arXiv:2107.00630, appendix A.
    """
    if t.device.type == "cpu" and not bool((s < t).all()):
        checks.fail("s", "be smaller than t", f"s = {s.tolist()}, t = {t.tolist()}")
    (a_t, b_t), (a_s, _) = process.marginal(t), process.marginal(s)
    # expm1 of the log SNR difference: exact where 1 - alpha_bar_t / alpha_bar_s would cancel.
    return a_t / a_s, b_t * (-torch.expm1(process.log_snr(t) - process.log_snr(s))).sqrt()


def q_sample(process, x0, t, eps):
    r"""Noise clean data to time t in one go.

    .. math:: x_t = \mathrm{scale}(t)\, x_0 + \mathrm{std}(t)\, \epsilon
              \quad\big(= \sqrt{\bar\alpha_t}\, x_0 + \sqrt{1 - \bar\alpha_t}\, \epsilon\big)

    Parameters
    ----------
    process : Process
    x0, eps : Tensor, shape (B, *D)
        Clean data in data units (images in [-1, 1]) and standard normal noise of exactly that shape.
    t : Tensor, 0-d or shape (B,)
        Times in [0, T]; int64 on a table, float on an SDE. 0-d means the same time for all.

    Returns
    -------
    Tensor, shape (B, *D)

    Raises
    ------
    TypeError, ValueError
        If x0 or eps is not floating point, the shapes differ, or t is no time of this process.

    Equations: fwd.sample

    References
    ----------
    .. [1] Ho et al., 2020, arXiv:2006.11239, Eq. 4; lecture "Power of Diffusion Models".
    """
    checks.floating("x0", x0)
    checks.same_shape("eps", eps, "x0", x0)
    checks.batch_of_times("t", process.check_times(t), len(x0))
    scale, std = process.marginal(t)
    return expand(scale, x0) * x0 + expand(std, x0) * eps


def posterior(process, x0, x_t, t, s):
    r"""Mean and standard deviation of q(x_s | x_t, x_0), for s < t.

    .. math:: \mu = \frac{a_{t|s} b_s^2}{b_t^2}\, x_t + \frac{a_s b_{t|s}^2}{b_t^2}\, x_0, \qquad
              \sigma = \frac{b_{t|s} b_s}{b_t}

    with a = scale, b = std and (a_{t|s}, b_{t|s}) from `jump`. For s = t - 1 this is DDPM's mu-tilde and
    sqrt(beta-tilde); for larger gaps it is the strided version. At s = 0 it is (x_0, 0).

    Parameters
    ----------
    process : Process
    x0, x_t : Tensor, shape (B, *D)
        Clean data and its noised version, in data units.
    t, s : Tensor, 0-d or shape (B,)
        Times in the process's own unit, 0 <= s < t <= T.

    Returns
    -------
    mean : Tensor, shape (B, *D)
    sigma : Tensor
        Broadcasts against ``mean``; exactly 0 where s = 0.

    Raises
    ------
    ValueError
        If any s >= t.

    Equations: post.mean, post.var

    References
    ----------
    .. [1] Ho et al., 2020, arXiv:2006.11239, Eq. 6-7.
    """
    (a_s, b_s), (_, b_t) = process.marginal(s), process.marginal(t)
    a_ts, b_ts = jump(process, t, s)
    mean = expand(a_ts * (b_s / b_t) ** 2, x_t) * x_t + expand(a_s * (b_ts / b_t) ** 2, x_t) * x0
    return mean, expand(b_ts * b_s / b_t, x_t)


def terminal_kl(process, x0):
    r"""How far x_T is from pure noise: KL(q(x_T | x_0) || N(0, I)) in nats, shape (B,).

    .. math:: \tfrac12\big(\bar\alpha_T\|x_0\|^2 - d\,\bar\alpha_T - d\log(1 - \bar\alpha_T)\big)

    Parameters
    ----------
    process : Process
        A variance-preserving one.
    x0 : Tensor, shape (B, *D)

    Equations: fwd.prior_limit
    """
    scale, std = process.marginal(torch.tensor(process.T, dtype=process.time_dtype))
    squared = checks.floating("x0", x0).flatten(1) ** 2
    return ((scale**2 * squared + std**2 - 1) / 2 - std.log()).sum(1)
