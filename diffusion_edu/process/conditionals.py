"""What is known about one time given another: the forward kernels and the posterior."""

import torch

from .. import checks
from .base import expand


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
    checks.same_shape("eps", eps, "x_s", checks.floating("x_s", x_s))
    checks.batch_of_times("t", checks.times_in("t", t, 1, process.T, discrete=True), len(x_s))
    scale, std = jump(process, t, t - 1)
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
    process.check_times(t), process.check_times(s, "s")
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

    Equations: fwd.sample, score.perturbed

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
    checks.same_shape("x0", x0, "x_t", checks.floating("x_t", x_t))
    a_ts, b_ts = jump(process, checks.batch_of_times("t", t, len(x_t)), checks.batch_of_times("s", s, len(x_t)))
    (a_s, b_s), (_, b_t) = process.marginal(s), process.marginal(t)
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

    Equations: fwd.prior_limit, elbo.L_T
    """
    scale, std = process.marginal(torch.tensor(process.T, dtype=process.time_dtype))
    squared = checks.floating("x0", x0).flatten(1) ** 2
    return ((scale**2 * squared + (std**2 - 1)) / 2 - std.log()).sum(1)  # brackets: 1 cancels in float64
