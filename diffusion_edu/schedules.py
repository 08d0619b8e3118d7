r"""Noise schedules: float64 tables of length T + 1 whose entry t is the lecture's symbol at t.

Entry 0 is clean data (beta[0] = 0), so nothing is ever shifted by one. Grids of noise levels for score models are
decreasing and end in 0.
"""

import math
import warnings

import torch

from . import checks

MAX_STEPS = 10_000_000  # a table of this length takes 80 MB; more is a slip of the finger


def linear_beta(T=1000, beta_start=1e-4, beta_end=0.02):
    r"""DDPM's schedule: beta rises linearly from ``beta_start`` at t = 1 to ``beta_end`` at t = T.

    .. math:: \beta_t = \beta_1 + \frac{t-1}{T-1}(\beta_T - \beta_1)

    Parameters
    ----------
    T : int
        Number of steps, at least 1.
    beta_start, beta_end : float
        Variances of the first and the last step, 0 < beta_start <= beta_end < 1.

    Returns
    -------
    Tensor, shape (T + 1,), float64
        ``beta[0] = 0``. Warns when the product of 1 - beta stays above 0.01: then x_T still shows the data.

    Raises
    ------
    TypeError, ValueError
        If T is not a positive integer or the betas do not lie in order in (0, 1).

    Equations: sched.linear

    References
    ----------
    .. [1] Ho et al., "Denoising Diffusion Probabilistic Models", 2020, arXiv:2006.11239, section 4.
    """
    return _table(_ramp(T, *_ends(beta_start, beta_end)))


def quadratic_beta(T=1000, beta_start=1e-4, beta_end=0.02):
    r"""Linear in sqrt(beta); latent diffusion calls it "scaled linear".

    .. math:: \beta_t = \big[\sqrt{\beta_1} + \tfrac{t-1}{T-1}(\sqrt{\beta_T} - \sqrt{\beta_1})\big]^2

    Parameters, returns and errors as in `linear_beta`.

    Equations: sched.quadratic
    """
    start, end = _ends(beta_start, beta_end)
    return _table(_ramp(T, math.sqrt(start), math.sqrt(end)) ** 2)


def sigmoid_beta(T=1000, beta_start=1e-4, beta_end=0.02, tau=6.0):
    r"""An S-shaped rise. ``beta_start`` and ``beta_end`` are its asymptotes; neither is reached.

    .. math:: \beta_t = \beta_1 + \frac{\beta_T - \beta_1}{1 + \exp\{\tau(1 - 2\frac{t-1}{T-1})\}}

    Parameters, returns and errors as in `linear_beta`; ``tau`` > 0 is the steepness.

    Equations: sched.sigmoid
    """
    start, end = _ends(beta_start, beta_end)
    tau = checks.real("tau", tau, 0, open_low=True)
    return _table(start + (end - start) * torch.sigmoid(_ramp(T, -tau, tau)))


def cosine_beta(T=1000, s=0.008, max_beta=0.999):
    r"""alpha_bar follows a squared cosine; the clip keeps the last steps finite.

    .. math:: \bar\alpha_t = \frac{f(t)}{f(0)}, \quad f(t) = \cos^2\Big(\frac{t/T + s}{1 + s}\,\frac\pi2\Big), \quad
              \beta_t = \min\Big(1 - \frac{\bar\alpha_t}{\bar\alpha_{t-1}}, \beta_{max}\Big)

    Parameters
    ----------
    T : int
        Number of steps, at least 1.
    s : float
        Offset that keeps beta from vanishing near t = 0.
    max_beta : float
        The clip, in (0, 1]. Only ``1`` lets alpha_bar reach 0 (zero terminal SNR).

    Returns
    -------
    Tensor, shape (T + 1,), float64

    Equations: sched.cosine

    References
    ----------
    .. [1] Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021, arXiv:2102.09672, Eq. 17.
    """
    T = checks.integer("T", T, 1, MAX_STEPS)
    s = checks.real("s", s, 0)
    t = torch.arange(T + 1, dtype=torch.float64)
    f = torch.cos((t / T + s) / (1 + s) * math.pi / 2) ** 2
    f[T] = 0.0  # cos(pi / 2), exactly
    return beta_from_alpha_bar(f / f[0], max_beta)


def swiss_beta(T=40):
    r"""The schedule of the lecture's 40-step Swiss-roll model (in the paper of 2015 the betas were learned).

    .. math:: \beta_t = \mathrm{sigmoid}\big(-18 + 28\tfrac{t-1}{T-1}\big)(0.3 - 10^{-5}) + 10^{-5}

    Returns
    -------
    Tensor, shape (T + 1,), float64

    Equations: sched.swiss

    References
    ----------
    .. [1] M. Vandegar, "Papers in 100 Lines of Code"; lecture "An introduction to diffusion models".
    """
    return _table(torch.sigmoid(_ramp(T, -18.0, 10.0)) * (0.3 - 1e-5) + 1e-5)


def beta_from_alpha_bar(alpha_bar, max_beta=0.999):
    r"""The betas of any decreasing alpha-bar table, clipped at ``max_beta``.

    .. math:: \beta_t = 1 - \bar\alpha_t / \bar\alpha_{t-1}

    Parameters
    ----------
    alpha_bar : Tensor, shape (T + 1,)
        Starts with alpha_bar[0] = 1 and decreases; only the last entry may be 0.
    max_beta : float
        In (0, 1].

    Returns
    -------
    Tensor, shape (T + 1,), float64

    Equations: sched.from_alpha_bar
    """
    max_beta = checks.real("max_beta", max_beta, 0, 1, open_low=True)
    alpha_bar = checks.floating("alpha_bar", alpha_bar).to(torch.float64)
    if alpha_bar.ndim != 1 or len(alpha_bar) < 2 or alpha_bar[0] != 1:
        checks.fail("alpha_bar", "be 1-D with alpha_bar[0] = 1 and at least 2 entries", tuple(alpha_bar.shape))
    if not (alpha_bar[1:] < alpha_bar[:-1]).all() or alpha_bar[-1] < 0:
        checks.fail("alpha_bar", "decrease strictly and stay in [0, 1]", alpha_bar)
    beta = (alpha_bar[:-1] - alpha_bar[1:]) / alpha_bar[:-1]
    return _table(beta.clamp(max=max_beta))


def beta_from_log_snr(log_snr):
    r"""The betas of a chain whose log signal-to-noise ratio is given: log SNR as the primitive.

    .. math:: \bar\alpha_t = \mathrm{sigmoid}(\lambda_t), \qquad \beta_t = 1 - \bar\alpha_t / \bar\alpha_{t-1}

    Parameters
    ----------
    log_snr : Tensor, shape (T,)
        lambda_1 > ... > lambda_T, at the times 1..T (at 0 it is infinite); only the last may be -inf.

    Returns
    -------
    Tensor, shape (T + 1,), float64

    Equations: sched.logsnr
    """
    log_snr = checks.floating("log_snr", log_snr).to(torch.float64)
    if log_snr.ndim != 1 or not len(log_snr):
        checks.fail("log_snr", "be 1-D with an entry for each t = 1..T", tuple(log_snr.shape))
    if not (log_snr[1:] < log_snr[:-1]).all() or not log_snr[:-1].isfinite().all() or not log_snr[-1] < math.inf:
        checks.fail("log_snr", "decrease strictly and be finite (the last may be -inf)", log_snr.tolist()[:8])
    log_alpha_bar = torch.cat([log_snr.new_zeros(1), torch.nn.functional.logsigmoid(log_snr)])
    return _table(-torch.expm1(log_alpha_bar.diff()))


def cosine_log_snr(t, low=-15.0, high=15.0):
    r"""The cosine schedule as a log SNR, cut to a finite range.

    .. math:: \lambda(t) = -2 \log\tan\frac{\pi t}{2} \iff \bar\alpha(t) = \cos^2\frac{\pi t}{2}

    and, cut to [low, high], :math:`\lambda(t) = -2\log\tan\big(t_0 + t\,(t_1 - t_0)\big)` with
    :math:`t_0 = \arctan e^{-high/2}`, :math:`t_1 = \arctan e^{-low/2}`.

    Parameters
    ----------
    t : Tensor
        In [0, 1].
    low, high : float
        lambda(1) and lambda(0), low < high; -inf and inf do not cut.

    Returns
    -------
    Tensor, shaped like ``t``, float64

    Equations: sched.logsnr

    References
    ----------
    .. [1] Hoogeboom et al., "simple diffusion", 2023, arXiv:2301.11093, section 3.1 (their -15 and 15 are the cut).
    """
    t = checks.times_in("t", t, 0, 1, discrete=False).to(torch.float64)
    if math.isnan(low) or math.isnan(high) or not low < high:
        checks.fail("low, high", "be in order, low < high", (low, high))
    start = math.atan(math.exp(-high / 2))
    end = math.pi / 2 if low == -math.inf else math.atan(math.exp(-low / 2))
    return -2 * torch.tan(start + t * (end - start)).log()


def shift_log_snr(log_snr, size, base=64):
    r"""A log SNR for images of ``size`` pixels a side that is, once they are averaged down to ``base``, the given one.

    .. math:: \lambda_{size}(t) = \lambda(t) + 2\log\frac{base}{size}

    The mean of r x r pixels keeps the picture and divides the variance of the noise by r^2: at the same log SNR a
    larger image hides less. With base = size nothing changes.

    Parameters
    ----------
    log_snr : Tensor
        lambda(t) of a schedule made for ``base``, such as `cosine_log_snr`.
    size, base : int
        Side in pixels.

    Returns
    -------
    Tensor, shaped like ``log_snr``

    Equations: sched.shift, simple_diffusion.shift

    References
    ----------
    .. [1] Hoogeboom et al., "simple diffusion", 2023, arXiv:2301.11093, section 3.1.
    """
    ratio = checks.integer("base", base, 1) / checks.integer("size", size, 1)
    return checks.floating("log_snr", log_snr) + 2 * math.log(ratio)


def interpolated_log_snr(t, log_snr, size, base_low=32, base_high=256):
    r"""Between two shifts: that of ``base_low`` at t = 1, in the noise, and that of ``base_high`` at t = 0.

    .. math:: \lambda(t) + 2 t \log\frac{base_{low}}{size} + 2 (1 - t) \log\frac{base_{high}}{size}

    Parameters
    ----------
    t : Tensor
        In [0, 1], shaped like ``log_snr``.
    log_snr : Tensor
    size, base_low, base_high : int

    Returns
    -------
    Tensor, shaped like ``t``

    Equations: sched.shift

    References
    ----------
    .. [1] Hoogeboom et al., 2023, arXiv:2301.11093, section 3.1.
    """
    t = checks.times_in("t", t, 0, 1, discrete=False)
    low, high = (shift_log_snr(torch.zeros_like(t), size, base) for base in (base_low, base_high))
    return checks.same_shape("log_snr", log_snr, "t", t) + t * low + (1 - t) * high


def zero_terminal_snr(beta):
    r"""The table shifted and scaled so that nothing of the data is left at T: alpha_bar[T] = 0, beta[T] = 1.

    .. math:: \sqrt{\bar\alpha_t} \leftarrow \sqrt{\bar\alpha_1}\,
              \frac{\sqrt{\bar\alpha_t} - \sqrt{\bar\alpha_T}}{\sqrt{\bar\alpha_1} - \sqrt{\bar\alpha_T}}

    There eps says nothing of x_0: predict x0 or v.

    Parameters
    ----------
    beta : Tensor, shape (T + 1,), T at least 2

    Returns
    -------
    Tensor, shape (T + 1,), float64

    References
    ----------
    .. [1] Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", 2023, arXiv:2305.08891,
       algorithm 1.
    """
    beta = check_beta(beta)
    if len(beta) < 3:
        checks.fail("beta", "have at least 2 steps", f"T = {len(beta) - 1}")
    root = (torch.log1p(-beta).cumsum(0) / 2).exp()[1:]
    root = root[0] * (root - root[-1]) / (root[0] - root[-1])
    return beta_from_alpha_bar(torch.cat([root.new_ones(1), root**2]), max_beta=1)


def respace(beta, times):
    r"""The table of a chain that visits only ``times``: alpha_bar at the kept steps does not change.

    .. math:: \beta_{\tau_i} = 1 - \bar\alpha_{\tau_i} / \bar\alpha_{\tau_{i-1}}, \qquad \tau_0 = 0

    Parameters
    ----------
    beta : Tensor, shape (T + 1,)
    times : Tensor of int64, shape (S,)
        Increasing times in 1..T.

    Returns
    -------
    Tensor, shape (S + 1,), float64

    Equations: sched.respace

    References
    ----------
    .. [1] Nichol and Dhariwal, 2021, arXiv:2102.09672, Eq. 19.
    """
    beta = check_beta(beta)
    checks.times_in("times", times, 1, len(beta) - 1, discrete=True)
    if times.ndim != 1 or not (times.diff() > 0).all():
        checks.fail("times", "be 1-D and strictly increasing", times.tolist())
    log_alpha_bar = torch.log1p(-beta).cumsum(0)
    kept = torch.cat([log_alpha_bar[:1], log_alpha_bar[times]])
    return _table(-torch.expm1(kept.diff()))


def karras_sigmas(n, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    r"""EDM's noise levels: sigma^(1/rho) falls linearly, then 0.

    .. math:: \sigma_i = \big(\sigma_{max}^{1/\rho}
              + \tfrac{i}{n-1}(\sigma_{min}^{1/\rho} - \sigma_{max}^{1/\rho})\big)^\rho

    Parameters
    ----------
    n : int
        Number of levels above 0; n = 1 gives (sigma_max, 0).
    sigma_min, sigma_max, rho : float
        0 < sigma_min < sigma_max, rho > 0.

    Returns
    -------
    Tensor, shape (n + 1,), float64

    Equations: edm.sigma_grid

    References
    ----------
    .. [1] Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022,
       arXiv:2206.00364, Eq. 5.
    """
    rho = checks.real("rho", rho, 0, open_low=True)
    low, high = _levels(sigma_min, sigma_max)
    return _end_in_zero(_ramp(n, high ** (1 / rho), low ** (1 / rho), "n") ** rho, high)


def geometric_sigmas(n, sigma_min=0.01, sigma_max=1.0):
    r"""NCSN's noise levels: neighbours have a constant ratio, then 0.

    .. math:: \sigma_1 > \dots > \sigma_n, \qquad \sigma_i / \sigma_{i+1} = \text{const}

    Parameters
    ----------
    n : int
        Number of levels above 0; n = 1 gives (sigma_max, 0).
    sigma_min, sigma_max : float
        0 < sigma_min < sigma_max.

    Returns
    -------
    Tensor, shape (n + 1,), float64

    Equations: sched.geometric_sigma

    References
    ----------
    .. [1] Song and Ermon, "Generative Modeling by Estimating Gradients of the Data Distribution", 2019,
       arXiv:1907.05600, section 4.3.
    """
    low, high = _levels(sigma_min, sigma_max)
    return _end_in_zero(_ramp(n, math.log(high), math.log(low), "n").exp(), high)


def check_beta(beta):
    """A beta table: (T + 1,) float64 with beta[0] = 0, the rest in (0, 1); beta[T] = 1 is allowed."""
    checks.floating("beta", beta)
    if beta.ndim != 1 or len(beta) < 2:
        checks.fail("beta", "be 1-D with T + 1 >= 2 entries", tuple(beta.shape))
    if beta[0] != 0:
        checks.fail("beta[0]", "be 0: entry 0 is clean data", beta[0].item())
    bad = ~((beta[1:] > 0) & (beta[1:] < 1))
    bad[-1] &= beta[-1] != 1
    if bad.any():
        t = int(bad.nonzero()[0]) + 1
        checks.fail("beta", "lie in (0, 1) at every t >= 1", f"beta[{t}] = {beta[t].item():g}")
    return beta.to(torch.float64)


def _ramp(n, start, end, name="T"):
    """n numbers from start to end (just ``start`` for n = 1)."""
    return torch.linspace(start, end, checks.integer(name, n, 1, MAX_STEPS), dtype=torch.float64)


def _ends(start, end):
    start, end = checks.real("beta_start", start), checks.real("beta_end", end)
    if not 0 < start <= end < 1:
        checks.fail("beta_start, beta_end", "lie in (0, 1), beta_start <= beta_end", (start, end))
    return start, end


def _levels(low, high):
    low = checks.real("sigma_min", low, 0, open_low=True)
    return low, checks.real("sigma_max", high, low, open_low=True)


def _end_in_zero(sigmas, sigma_max):
    sigmas[0] = sigma_max  # exactly, whatever the power or the logarithm rounded
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def _table(beta):
    """Put beta[0] = 0 in front; warn when the chain ends before the data are gone."""
    beta = check_beta(torch.cat([beta.new_zeros(1), beta]))
    alpha_bar_T = torch.log1p(-beta).sum().exp().item()
    if alpha_bar_T > 1e-2 and len(beta) > 2:
        warnings.warn(
            f"alpha_bar[T] = {alpha_bar_T:.2g}: x_T is not noise. Use more steps or a larger beta_end.",
            stacklevel=3,
        )
    return beta
