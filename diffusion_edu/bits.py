r"""Grey levels: the probability of one of n values, and likelihoods in bits per dimension.

Grey level k = 0..n - 1 stands at x = 2 k / (n - 1) - 1, in [-1, 1]; its bin has half-width 1 / (n - 1): 1/255 for
8-bit images, 1/16 for the 17 levels of the digits.
"""

import math

import torch
from torch import Tensor

from . import checks
from .gaussian import normal_log_prob


def discretized_log_prob(x, mean, sigma, levels=256):
    r"""Log-probability of each grey level under a Gaussian that is cut into bins.

    .. math:: p(x) = \int_{\delta_-(x)}^{\delta_+(x)} \mathcal N(u; \mu, \sigma^2)\,du, \qquad
              \delta_\pm(x) = x \pm \tfrac{1}{n - 1}, \quad \delta_+(1) = \infty, \quad \delta_-(-1) = -\infty

    The end bins are open, so the n probabilities sum to 1 for every mean and sigma.

    Parameters
    ----------
    x : Tensor, shape (B, *D)
        Grey levels, on the grid of ``levels`` values in [-1, 1].
    mean, sigma : Tensor
        Broadcast against ``x``; sigma > 0.
    levels : int
        n, at least 2.

    Returns
    -------
    Tensor, shape (B, *D)
        Nats, one for each dimension.

    Raises
    ------
    ValueError
        If some x is not one of the levels (read on the CPU only).

    Equations: elbo.L_0_discrete

    References
    ----------
    .. [1] Ho et al., 2020, arXiv:2006.11239, Eq. 13.
    """
    grey = check_levels(x, levels)
    half = 1 / (levels - 1)
    low, high = (x - half - mean) / sigma, (x + half - mean) / sigma
    far = 40.0  # standard deviations: nothing is left beyond
    low, high = (
        torch.where(grey == 0, high.detach().clamp(max=0) - far, low),
        torch.where(grey == levels - 1, low.detach().clamp(min=0) + far, high),
    )
    right = low + high > 0  # the tail in which the digits are
    low, high = torch.where(right, -high, low), torch.where(right, -low, high)
    below, above = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return above + (-torch.expm1(below - above)).log()


def dequantize(x, levels, u):
    r"""Spread each grey level uniformly over its bin, so that the data have a density.

    .. math:: y = x + \frac{2u - 1}{n - 1}, \qquad u \sim U[0, 1)

    The mean of the log-density of y over u is at most the log-probability of x minus the log of the bin's width, by
    Jensen: a density model of y bounds a model of the levels.

    Parameters
    ----------
    x, u : Tensor, shape (B, *D)
        Grey levels, and uniform random numbers.
    levels : int
        n, at least 2.

    Returns
    -------
    Tensor, shape (B, *D)
        In [-1 - 1/(n - 1), 1 + 1/(n - 1)].

    References
    ----------
    .. [1] Theis et al., "A note on the evaluation of generative models", 2016, arXiv:1511.01844, section 3.1.
    """
    check_levels(x, levels)
    return x + (2 * checks.same_shape("u", u, "x", x) - 1) / (levels - 1)


def bits_per_dim(nats, d, levels=None):
    r"""A negative log-likelihood of a whole example, in bits per dimension.

    .. math:: \mathrm{bpd} = \frac{L}{D \ln 2} \quad(+ \log_2\tfrac{n - 1}{2}\ \text{ if } L \text{ is of a density})

    The offset log2 127.5 (8-bit images) or log2 8 = 3 (17 levels) is the width of a bin: a density on [-1, 1] counts
    per unit of x, a probability per bin. For densities the data must have been dequantised uniformly (`dequantize`).

    Parameters
    ----------
    nats : Tensor or float
        L = -log p(x), or a bound on it, summed over the D dimensions.
    d : int
        D.
    levels : int or None
        None: L is of probabilities of grey levels. Otherwise L is of a density, and the data had n levels.

    Returns
    -------
    Tensor or float, like ``nats``

    Equations: elbo.nll_bpd, metric.bpd

    References
    ----------
    .. [1] Theis et al., 2016, arXiv:1511.01844.
    """
    bits = nats / (checks.integer("d", d, 1) * math.log(2))
    return bits if levels is None else bits + math.log2((checks.integer("levels", levels, 2) - 1) / 2)


def check_levels(x, levels):
    """The grey levels k of x, as floats that are whole numbers."""
    checks.integer("levels", levels, 2)
    grey = (checks.floating("x", x) + 1) * ((levels - 1) / 2)
    whole = grey.round()
    if x.device.type == "cpu" and x.numel():
        good = ((grey - whole).abs() < 1e-3) & (whole >= 0) & (whole < levels)
        if not good.all():
            checks.fail("x", f"be one of {levels} grey levels in [-1, 1]", f"{x[~good].flatten()[0].item():g}")
    return whole


def grey_levels(levels):
    """The n grey levels in [-1, 1], shape (levels,), float64."""
    return torch.linspace(-1, 1, checks.integer("levels", levels, 2), dtype=torch.float64)


def log_likelihood(x, mean, sigma, levels=None) -> Tensor:
    r"""log p(x) in nats, shape (B,): a Gaussian density (``levels=None``) or the probability of grey levels."""
    if levels is not None:
        return discretized_log_prob(x, mean, sigma, levels).flatten(1).sum(1)
    return normal_log_prob(x, mean, sigma**2)
