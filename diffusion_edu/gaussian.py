r"""Gaussian toolkit: the identities that every derivation of the course leans on.

A Gaussian is passed as ``(mean, var)``: tensors that broadcast, or plain numbers (taken as float64). ``var``
is a variance, never a standard deviation. Logarithms are natural: information is in nats. Values are checked
on the CPU only, so that an accelerator never waits for a check.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusion_edu import checks


def normal_log_prob(x, mean, var):
    r"""Log-density of N(mean, var I), summed over the dimensions of each example.

    .. math:: \log\mathcal N(x; \mu, \sigma^2 I) = -\tfrac d2\log 2\pi\sigma^2 - \frac{\|x-\mu\|^2}{2\sigma^2}

    Parameters
    ----------
    x : Tensor, shape (B, *D) or (B,)
        A 1-d ``x`` is a batch of B scalars (d = 1).
    mean, var : Tensor or float
        Broadcast against ``x``; one variance a coordinate gives the diagonal Gaussian.

    Returns
    -------
    Tensor, shape (B,)
        Nats, summed (not averaged) over d.

    Raises
    ------
    TypeError
        If ``x`` is not a floating-point tensor.
    ValueError
        If a variance is not positive and finite, or an argument does not broadcast against ``x``.

    Equations: gauss.logpdf
    """
    mean, var = _like(x, mean, var)
    return sum_dims(-0.5 * (torch.log(2 * math.pi * var) + (x - mean) ** 2 / var).expand_as(x))


def normal_score(x, mean, var):
    r"""Gradient of the log-density of N(mean, var I) with respect to x.

    .. math:: \nabla_x \log\mathcal N(x; \mu, \sigma^2 I) = -\frac{x-\mu}{\sigma^2} = -\frac\epsilon\sigma

    where :math:`x = \mu + \sigma\epsilon`: the score points back, against the noise.

    Parameters
    ----------
    x : Tensor, shape (B, *D)
    mean, var : Tensor or float
        Broadcast against ``x``.

    Returns
    -------
    Tensor, shape (B, *D)

    Raises
    ------
    ValueError
        If a variance is not positive and finite, or an argument does not broadcast against ``x``.

    Equations: gauss.logpdf
    """
    mean, var = _like(x, mean, var)
    return (mean - x) / var


def add_gaussians(mean1, var1, mean2, var2):
    r"""Mean and variance of X + Y for independent X ~ N(mean1, var1) and Y ~ N(mean2, var2).

    .. math:: X + Y \sim \mathcal N(\mu_X + \mu_Y, \; \sigma_X^2 + \sigma_Y^2)

    Variances add; standard deviations do not. A variance of 0 (a constant) is allowed.

    Parameters
    ----------
    mean1, var1, mean2, var2 : Tensor or float
        Broadcast together.

    Returns
    -------
    mean, var : Tensor

    Raises
    ------
    ValueError
        If a variance is negative or not finite.

    Equations: gauss.sum
    """
    mean1, mean2 = _tensor("mean1", mean1), _tensor("mean2", mean2)
    return mean1 + mean2, _variance("var1", var1, zero=True) + _variance("var2", var2, zero=True)


def convolve_density(p, q, dx):
    r"""Density of X + Y on a grid, from the densities of independent X and Y.

    .. math:: p_{X+Y}(z) = \int p_X(x)\, p_Y(z - x)\, dx

    If ``p`` starts at a and ``q`` at b, entry i of the result belongs to z = a + b + i dx. Exact
    to rounding for Gaussians whose tails fit the grid: the trapezoid rule converges geometrically there.

    Parameters
    ----------
    p : Tensor, shape (n,)
    q : Tensor, shape (m,)
        Densities at points ``dx`` apart, negligible at both ends.
    dx : float

    Returns
    -------
    Tensor, shape (n + m - 1,)

    Raises
    ------
    ValueError
        If ``p`` or ``q`` is not 1-d and non-empty, or ``dx`` is not positive.

    Equations: gauss.convolution_vs_mixture
    """
    dx = checks.real("dx", dx, low=0, open_low=True)
    for name, density in (("p", p), ("q", q)):
        if checks.floating(name, density).ndim != 1 or not density.numel():
            checks.fail(name, "be 1-d and not empty", f"shape {tuple(density.shape)}")
    kernel = q.flip(0)[None, None]  # conv1d correlates: the flip makes it a convolution
    return F.conv1d(p[None, None], kernel, padding=len(q) - 1)[0, 0] * dx


def mixture_moments(weights, means, variances):
    r"""Mean and variance of a mixture of K distributions (law of total variance).

    .. math:: \mu = \sum_k w_k \mu_k, \qquad
              \mathrm{Var} = \underbrace{\sum_k w_k \sigma_k^2}_{\text{within}}
              + \underbrace{\sum_k w_k (\mu_k - \mu)^2}_{\text{between}}

    A weighted sum of *densities*. The weighted sum of independent *variables* has the same mean, but variance
    :math:`\sum_k w_k^2\sigma_k^2` and one bump.

    Parameters
    ----------
    weights, means, variances : Tensor, shape (K,)
        Weights are non-negative and sum to 1.

    Returns
    -------
    mean, var : Tensor, shape ()

    Raises
    ------
    ValueError
        If the weights are not a probability vector, the shapes differ, or a variance is negative.

    Equations: gauss.convolution_vs_mixture
    """
    checks.floating("weights", weights)
    checks.same_shape("means", means, "weights", weights)
    checks.same_shape("variances", variances, "weights", weights)
    if weights.device.type == "cpu" and not (weights.min() >= 0 and abs(weights.sum() - 1) < 1e-6):
        checks.fail("weights", "be non-negative and sum to 1", weights.tolist())
    mean = (weights * means).sum()
    return mean, (weights * (_variance("variances", variances, zero=True) + (means - mean) ** 2)).sum()


def gaussian_product(mean1, var1, mean2, var2):
    r"""Product of two Gaussian densities in x: a Gaussian in x times a constant.

    .. math:: \mathcal N(x; m_1, v_1)\,\mathcal N(x; m_2, v_2) = Z\,\mathcal N(x; m, v), \qquad
              v^{-1} = v_1^{-1} + v_2^{-1}, \quad m = v\,(m_1/v_1 + m_2/v_2), \quad
              Z = \mathcal N(m_1; m_2, v_1 + v_2)

    Precisions add and the mean is weighted by precision: this is Bayes' rule for Gaussians, and it gives the
    posterior of a diffusion step. Elementwise: each coordinate is a one-dimensional product.

    Parameters
    ----------
    mean1, var1, mean2, var2 : Tensor or float
        Broadcast together.

    Returns
    -------
    mean, var, log_z : Tensor
        ``log_z`` is the logarithm of Z, one value a coordinate.

    Raises
    ------
    ValueError
        If a variance is not positive and finite.

    Equations: gauss.product
    """
    mean1, mean2 = _tensor("mean1", mean1), _tensor("mean2", mean2)
    var1, var2 = _variance("var1", var1), _variance("var2", var2)
    total = var1 + var2
    log_z = -0.5 * (torch.log(2 * math.pi * total) + (mean1 - mean2) ** 2 / total)
    return (mean1 * var2 + mean2 * var1) / total, var1 * var2 / total, log_z


def normal_kl(mean1, var1, mean2, var2):
    r"""KL divergence between Gaussians, coordinate by coordinate, in nats.

    .. math:: D_{KL}\big(\mathcal N(\mu_1, \sigma_1^2)\,\|\,\mathcal N(\mu_2, \sigma_2^2)\big)
              = \log\frac{\sigma_2}{\sigma_1} + \frac{\sigma_1^2 + (\mu_1 - \mu_2)^2}{2\sigma_2^2} - \frac12

    Sum the result over the data dimensions for the divergence of a diagonal Gaussian.

    Parameters
    ----------
    mean1, var1, mean2, var2 : Tensor or float
        Broadcast together. Variances, not log-variances.

    Returns
    -------
    Tensor
        Broadcast shape, never negative.

    Raises
    ------
    ValueError
        If a variance is not positive and finite.

    Equations: gauss.kl
    """
    mean1, mean2 = _tensor("mean1", mean1), _tensor("mean2", mean2)
    var1, var2 = _variance("var1", var1), _variance("var2", var2)
    excess = (var1 - var2) / var2
    # log1p keeps the digits of nearly equal variances; far below 1 it would round to log 0
    near = torch.log1p(excess.clamp(min=-0.5))
    log_ratio = torch.where(excess > -0.5, near, var1.log() - var2.log())
    return 0.5 * (excess - log_ratio + (mean1 - mean2) ** 2 / var2)


def guided_normal(y, r2, w, mean=0.0, var=1.0):
    r"""Mean and variance of a Gaussian prior times a Gaussian likelihood to the power w.

    .. math:: \mathcal N(x; m, s^2)\, \mathcal N(y; x, r^2)^w \propto
              \mathcal N\Big(x;\ \frac{m / s^2 + w y / r^2}{1 / s^2 + w / r^2},\ \frac{1}{1 / s^2 + w / r^2}\Big)

    Parameters
    ----------
    y : Tensor or float
        What was measured.
    r2 : Tensor or float
        Variance of the measurement.
    w : float
        Guidance scale: 0 leaves the prior, 1 is the posterior, above 1 is sharper. At least 0.
    mean, var : Tensor or float
        m and s^2 of the prior.

    Returns
    -------
    mean, var : Tensor

    Equations: cg.gaussian_closed_form, cg.tradeoff
    """
    precision = 1 / _variance("var", var) + checks.real("w", w, 0) / _variance("r2", r2)
    pull = _tensor("mean", mean) / _variance("var", var) + w * _tensor("y", y) / _variance("r2", r2)
    return pull / precision, 1 / precision


def kl_equal_var(mean1, mean2, var):
    r"""KL divergence between two Gaussians of the same variance: a scaled squared distance, in nats.

    .. math:: D_{KL} = \frac{1}{2\sigma^2}\|\mu_1 - \mu_2\|^2

    Why a diffusion loss is a mean squared error ([1]_, Eq. 8).

    Parameters
    ----------
    mean1, mean2 : Tensor, shape (B, *D)
    var : Tensor or float
        Broadcasts against the means.

    Returns
    -------
    Tensor, shape (B,)
        Summed over the dimensions of each example.

    Raises
    ------
    ValueError
        If the shapes of the means differ, or the variance is not positive and finite.

    Equations: gauss.kl_same_var

    References
    ----------
    .. [1] Ho et al., "Denoising Diffusion Probabilistic Models", 2020, arXiv:2006.11239.
    """
    checks.same_shape("mean2", mean2, "mean1", checks.floating("mean1", mean1))
    _, var = _like(mean1, 0.0, var, name="mean1")
    return sum_dims((mean1 - mean2) ** 2 / (2 * var))


def normal_entropy(var, d=1):
    r"""Differential entropy of N(mean, var I) in d dimensions, in nats.

    .. math:: H = \tfrac d2 \log(2\pi e\,\sigma^2)

    It does not depend on the mean, and is negative for :math:`\sigma^2 < 1/(2\pi e)`.

    Parameters
    ----------
    var : Tensor or float
        The result has its shape.
    d : int
        Number of dimensions that share ``var``.

    Raises
    ------
    ValueError
        If ``var`` is not positive and finite, or ``d`` is below 1.

    Equations: gauss.entropy
    """
    return 0.5 * checks.integer("d", d, low=1) * (torch.log(2 * math.pi * _variance("var", var)) + 1)


def _tensor(name, value):
    """A floating-point tensor; a plain number becomes a 0-d float64 one, which promotes no float32 tensor."""
    if isinstance(value, Tensor):
        return checks.floating(name, value)
    return torch.tensor(checks.real(name, value), dtype=torch.float64)


def _variance(name, value, zero=False):
    """A finite tensor greater than 0, or from 0 on with ``zero``."""
    value = _tensor(name, value)
    if value.device.type == "cpu":
        good = ((value >= 0) if zero else (value > 0)) & value.isfinite()
        if not good.all():
            rule = "be a variance: finite and " + ("not negative" if zero else "greater than 0")
            checks.fail(name, rule, f"{value[~good].flatten()[0].item():g}")
    return value


def _like(x, mean, var, name="x"):
    """The checked mean and variance, which must broadcast to the shape of x."""
    checks.floating(name, x)
    mean, var = _tensor("mean", mean), _variance("var", var)
    return checks.broadcasts("mean", mean, name, x), checks.broadcasts("var", var, name, x)


def sum_dims(values):
    """Sum over everything but the batch axis; a 1-d tensor holds B scalars already."""
    return values.flatten(1).sum(1) if values.ndim > 1 else values
