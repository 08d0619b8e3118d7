"""Steps made of steps."""

import math

import torch

from .. import checks
from ..guidance import gradient
from ..process import expand, jump, q_sample
from .driver import KernelStep


def chain(first, *then):
    """``first`` goes from t to s; the others then work at s, as correctors, where s > 0.

    ``chain(euler_maruyama_step, make_langevin_step())`` is a predictor-corrector sampler.
    """

    def step(model, x_t, t, s, noise):
        x = first(model, x_t, t, s, noise)
        for corrector in then if s > 0 else ():
            x = corrector(model, x, s, s, noise)
        return x

    return step


def keep_known(step, x0, mask):
    """Inpainting by replacement: after every step, where ``mask`` is 1, x_s is the known x0 noised to time s.

    Parameters
    ----------
    step : Step
    x0, mask : Tensor, shape (B, *D)
        Known data, and True (or 1) where they are known, False (or 0) elsewhere; B may be 1, for all samples.

    Returns
    -------
    Step
    """
    checks.floating("x0", x0)
    if mask.ndim != x0.ndim:
        checks.fail("mask", f"have {x0.ndim} dimensions, like x0", tuple(mask.shape))
    if not ((mask == 0) | (mask == 1)).all():
        checks.fail("mask", "be True or False (1 or 0) everywhere", "other values")

    def kept(model, x_t, t, s, noise):
        x_s = step(model, x_t, t, s, noise)
        known = x0.to(x_s).expand_as(x_s)
        if s > 0:
            known = q_sample(model.process, known, s, noise(x_s))
        return torch.where(mask.to(x_s.device, torch.bool).expand_as(x_s), known, x_s)

    return kept


def guided_mean(step, log_prob, w):
    r"""Classifier guidance on the mean of a Gaussian step, with the gradient taken at that mean.

    .. math:: x_s \sim \mathcal N\big(\mu + w\,\sigma^2\,\nabla_x \log p_\phi(y \mid x)|_{x = \mu},\ \sigma^2\big)

    Where the last step draws nothing (as in DDPM and DDIM), its mean is the sample and is not moved.

    Parameters
    ----------
    step : KernelStep
        For example ``make_ddpm_step()``.
    log_prob : function (x (B, *D), s) -> Tensor, shape (B,)
        log p(y | x_s) of a noise-aware classifier; x_s lives at time s.
    w : float
        At least 0.

    Returns
    -------
    KernelStep

    Equations: cg.mean_shift

    References
    ----------
    .. [1] Dhariwal and Nichol, 2021, arXiv:2105.05233, algorithm 1.
    """
    w = checks.real("w", w, 0)
    if not isinstance(step, KernelStep):
        checks.fail("step", "be a Gaussian step (KernelStep), such as make_ddpm_step()", step, TypeError)
    checks.function("log_prob", log_prob, "noisy_classifier.log_prob(y)")

    def kernel(model, x_t, t, s):
        mean, sigma = step.kernel(model, x_t, t, s)
        if sigma is None and s > 0:
            checks.fail("step", "draw noise: its variance is what w scales", "a deterministic step")
        if sigma is None or (s == 0 and not (step.draws_last and (sigma > 0).any())):
            return mean, sigma
        return mean + w * sigma**2 * gradient(log_prob, mean, s), sigma

    return KernelStep(kernel, step.draws_last)


def churn(step, gamma, s_noise=1.0, sigma_min=0.0, sigma_max=math.inf):
    r"""EDM's churn: add a little fresh noise, moving up to a time t-hat, then step down from there.

    .. math:: \hat\sigma = \sigma(1 + \gamma), \qquad
              \hat x = x + \sqrt{\hat\sigma^2 - \sigma^2}\, S_{noise}\, z, \qquad \sigma = \mathrm{std}/\mathrm{scale}

    Parameters
    ----------
    step : Step
    gamma : float
        At least 0; EDM takes min(S_churn / N, sqrt(2) - 1) for N steps. With 0 nothing changes.
    s_noise : float
        Scale of the fresh noise.
    sigma_min, sigma_max : float
        Churn only where sigma lies between them; t-hat is at most T.

    Returns
    -------
    Step

    Raises
    ------
    TypeError
        When it meets a table: t-hat lies between its integers. Use ``reschedule(model, table.continuous())``.

    Equations: edm.churn

    References
    ----------
    .. [1] Karras et al., 2022, arXiv:2206.00364, algorithm 2.
    """
    gamma = checks.real("gamma", gamma, 0)
    s_noise = checks.real("s_noise", s_noise, 0)
    if not 0 <= sigma_min <= sigma_max:
        checks.fail("sigma_min, sigma_max", "be in order and at least 0", (sigma_min, sigma_max))

    def churned(model, x_t, t, s, noise):
        process = model.process
        if process.discrete:
            checks.fail("model.process", "be continuous for churn", type(process).__name__, TypeError)
        log_snr = process.log_snr(t)
        t_hat = process.time_of(log_snr - 2 * math.log1p(gamma)).clamp(max=process.T)
        if gamma > 0 and t_hat > t and sigma_min <= (-log_snr / 2).exp() <= sigma_max:
            scale, std = (expand(c, x_t) for c in jump(process, t_hat, t))
            z = checks.same_shape("noise(x)", noise(x_t), "x", x_t)
            x_t, t = scale * x_t + s_noise * std * z, t_hat
        return step(model, x_t, t, s, noise)

    return churned


def finite(step):
    """The step, raising FloatingPointError (with the time) as soon as a sample is NaN or infinite."""

    def checked(model, x_t, t, s, noise):
        x_s = step(model, x_t, t, s, noise)
        if not x_s.isfinite().all():
            raise FloatingPointError(f"x is not finite after the step from t = {t.item():g} to {s.item():g}")
        return x_s

    return checked
