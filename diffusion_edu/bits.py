r"""Grey levels: the probability of one of n values, and likelihoods in bits per dimension.

Grey level k = 0..n - 1 stands at x = 2 k / (n - 1) - 1, in [-1, 1]; its bin has half-width 1 / (n - 1): 1/255 for
8-bit images, 1/16 for the 17 levels of the digits.
"""

import math

import numpy as np
import torch
from torch import Tensor

from . import checks
from .gaussian import normal_log_prob, sum_dims

LEGENDRE = np.polynomial.legendre.leggauss(6)


def discretized_log_prob(x, mean, sigma, levels=256):
    r"""Log-probability of each grey level under a Gaussian that is cut into bins.

    .. math:: p(x) = \int_{\delta_-(x)}^{\delta_+(x)} \mathcal N(u; \mu, \sigma^2)\,du, \qquad
              \delta_\pm(x) = x \pm \tfrac{1}{n - 1}, \quad \delta_+(1) = \infty, \quad \delta_-(-1) = -\infty

    The end bins are open, so the n probabilities sum to 1 for every mean and sigma. Value and slope are right to
    rounding however far or wide the Gaussian is, in float32, too.

    Parameters
    ----------
    x : Tensor, shape (B, *D)
        Grey levels, on the grid of ``levels`` values in [-1, 1].
    mean, sigma : Tensor or float
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
        If some x is not one of the levels, or some sigma is not positive and finite (read on the CPU only).

    Equations: elbo.L_0_discrete

    References
    ----------
    .. [1] Ho et al., 2020, arXiv:2006.11239, Eq. 13.
    """
    grey = check_levels(x, levels)
    checks.broadcasts("mean", mean, "x", x), checks.broadcasts("sigma", sigma, "x", x)
    d = (x - mean) / checks.positive("sigma", sigma)
    half, away = torch.ones_like(d) / (sigma * (levels - 1)), d.abs()
    first, last = grey == 0, grey == levels - 1
    # A bin of the right tail is read in the left one, from -away - half up to half - away: there the digits are.
    high = log_ndtr(torch.where(first, half + d, torch.where(last, half - d, half - away)))
    below = (log_ndtr(-half - away) - high).exp().clamp(max=0.5)  # Phi(low) / Phi(high): smaller in a wide bin
    wide = high + torch.log1p(-below * ~(first | last))
    # In a narrow bin that difference would cancel, but the density hardly changes: Gauss-Legendre nodes u in (-1, 1).
    narrow = (half < 0.5) & (half * away < 0.5) & ~(first | last)
    half, away = torch.where(narrow, half, 1.0), torch.where(narrow, away, 0.0)  # no overflow where it is not used
    u, weight = (torch.from_numpy(a).to(d) for a in LEGENDRE)
    v = half[..., None] * u
    density = ((-v * (away[..., None] + v / 2)).exp() * weight).sum(-1)
    return torch.where(narrow, (half * density).log() - (away**2 + math.log(2 * math.pi)) / 2, wide)


def log_ndtr(z):
    """log Phi(z). The derivative of `torch.special.log_ndtr` is wrong in the far left tail; this one's is not."""
    left = z.clamp(max=0)
    tail = torch.special.erfcx(left * -math.sqrt(0.5)).log() - left**2 / 2 - math.log(2)
    return torch.where(z < 0, tail, torch.log1p(-torch.special.erfc(z.clamp(min=0) * math.sqrt(0.5)) / 2))


def dequantize(x, levels, u):
    r"""Spread each grey level uniformly over its bin, so that the data have a density.

    .. math:: y = x + \frac{2u - 1}{n - 1}, \qquad u \sim U[0, 1)

    The mean of the log-density of y over u is at most the log-probability of x minus the log of the bin's width, by
    Jensen: a density model of y bounds a model of the levels.

    Parameters
    ----------
    x, u : Tensor, shape (B, *D)
        Grey levels, and uniform random numbers (not normal ones: values outside [0, 1] are refused on the CPU).
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
    checks.same_shape("u", u, "x", x)
    if u.device.type == "cpu" and u.numel() and not (0 <= u.min() and u.max() <= 1):
        checks.fail("u", "be uniform on [0, 1)", f"{u.min().item():g} to {u.max().item():g}")
    return x + (2 * u - 1) / (levels - 1)


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
    """The n grey levels in [-1, 1], shape (n,), float64."""
    return torch.linspace(-1, 1, checks.integer("levels", levels, 2), dtype=torch.float64)


def log_likelihood(x, mean, sigma, levels=None) -> Tensor:
    r"""log p(x) in nats, shape (B,): a Gaussian density (``levels=None``) or the probability of grey levels."""
    if levels is not None:
        return sum_dims(discretized_log_prob(x, mean, sigma, levels))
    return normal_log_prob(x, mean, sigma**2)
