"""What every forward process is: a pair (scale, std) per time, and a clock."""

import abc

import torch
from torch import Tensor, nn

from .. import checks


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
    return _down_to(t_min, lambda log_snr: log_snr, lambda steps: steps)


def karras(t_min, rho=7.0):
    r"""EDM's noise levels from T down to ``t_min``, then one step to 0: equal steps in sigma^(1/rho), on any process.

    .. math:: \sigma_i = \Big(\sigma_T^{1/\rho} + \tfrac{i}{n - 1}
              (\sigma_{t_{min}}^{1/\rho} - \sigma_T^{1/\rho})\Big)^\rho, \qquad \sigma = \mathrm{std}/\mathrm{scale}

    rho = 1 steps equally in sigma itself; as rho grows, this becomes `uniform_log_snr`.

    Equations: edm.sigma_grid

    References
    ----------
    .. [1] Karras et al., 2022, arXiv:2206.00364, Eq. 5.
    """
    checks.real("rho", rho, 0, open_low=True)
    return _down_to(t_min, lambda log_snr: (-log_snr / (2 * rho)).exp(), lambda steps: -2 * rho * steps.log())


def _down_to(t_min, forth, back):
    """The spacing of equal steps in a function ``forth`` of the log SNR, whose inverse is ``back``."""

    def spacing(process, n):
        checks.real("t_min", t_min, 1 if process.discrete else 0, process.T, open_low=not process.discrete)
        if process.zero_terminal_snr:
            checks.fail("process", "have a finite log SNR at T for this spacing", "alpha_bar[T] = 0")
        ends = forth(process.log_snr(torch.tensor([process.T, t_min], dtype=torch.float64).to(process.time_dtype)))
        steps = torch.linspace(ends[0].item(), ends[1].item(), n, dtype=torch.float64)
        times = torch.cat([process.time_of(back(steps)), torch.zeros(1, dtype=torch.float64)])
        times[0] = process.T  # exactly, whatever the inverse rounded
        return times

    return spacing


class Process(nn.Module, abc.ABC):
    """A forward process q(x_t | x_0) = N(scale(t) x_0, std(t)^2 I).

    Attributes
    ----------
    T : float
        The last time.
    discrete : bool
        Whether times are the integers 0..T.
    zero_terminal_snr : bool
        Whether scale(T) is exactly 0, so that x_T says nothing of x_0 and eps is no use to predict there.
    """

    T: float
    discrete = False
    zero_terminal_snr = False

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
            `uniform`, `quadratic`, `uniform_log_snr(t_min)`, `karras(t_min)` or your own.

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
        checks.function("noise", noise, "noises(seed)")
        if not isinstance(shape, tuple | list | torch.Size):
            checks.fail("shape", "be a tuple (n, *D)", checks.shown(shape), TypeError)
        _, std = self.marginal(torch.tensor(self.T, dtype=self.time_dtype))
        return std.item() * noise(torch.empty([checks.integer("shape", n, 0) for n in shape]))

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
        checks.fail("times", "be 1-D, at least 2 entries, strictly decreasing", times.flatten()[:8].tolist())
    return times


def check_whole(process, times):
    """Decreasing times of a process that run from T to 0."""
    times = check_decreasing(process.check_times(times, "times"))
    if times[0] != process.T or times[-1] != 0:
        checks.fail("times", f"run from T = {process.T:g} to 0", f"{times[0].item():g} to {times[-1].item():g}")
    return times


class SDE(Process):
    r"""A process in continuous time.

    .. math:: dx = f(x, t)\,dt + g(t)\,dw

    Equations: sde.general

    References
    ----------
    .. [1] Song et al., 2021, arXiv:2011.13456, Eq. 5.
    """

    @abc.abstractmethod
    def drift(self, x, t) -> Tensor:
        """f(x, t), shaped like ``x``."""

    @abc.abstractmethod
    def diffusion(self, t) -> Tensor:
        """g(t), shaped like ``t``."""
