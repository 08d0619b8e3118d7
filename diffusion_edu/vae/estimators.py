"""One Gaussian q(z | x): draws, its cost, and means and gradients under it."""

import numpy as np
import torch

from .. import checks
from ..gaussian import normal_kl, sum_dims


def reparameterize(mean, sigma, eps):
    r"""Draw z from N(mean, sigma^2) as a function of mean and sigma, so that gradients reach them.

    .. math:: z = \mu + \sigma\,\epsilon, \qquad \epsilon \sim \mathcal N(0, I)

    Parameters
    ----------
    mean, sigma : Tensor or float
        Broadcast against ``eps``.
    eps : Tensor
        Standard normal noise.

    Returns
    -------
    Tensor, shaped like ``eps``

    Equations: vae.reparam, vae.lotus

    References
    ----------
    .. [1] Kingma and Welling, "Auto-Encoding Variational Bayes", 2013, arXiv:1312.6114, section 2.4.
    """
    checks.floating("eps", eps)
    return checks.broadcasts("mean", mean, "eps", eps) + checks.broadcasts("sigma", sigma, "eps", eps) * eps


def kl_std_normal(mean, sigma):
    r"""KL divergence from N(mean, diag sigma^2) to N(0, I), in nats.

    .. math:: D_{KL} = \tfrac12 \sum_j (\sigma_j^2 + \mu_j^2 - 1 - \log\sigma_j^2)

    Parameters
    ----------
    mean, sigma : Tensor, shape (B, *L) or (B,)
        As in `gaussian.normal_log_prob`, a 1-d tensor is a batch of B scalars.

    Returns
    -------
    Tensor, shape (B,)

    Equations: vae.kl_std_normal

    References
    ----------
    .. [1] Kingma and Welling, 2013, arXiv:1312.6114, appendix B.
    """
    checks.same_shape("sigma", sigma, "mean", checks.floating("mean", mean))
    return sum_dims(normal_kl(mean, checks.positive("sigma", sigma) ** 2, 0.0, 1.0))


def expectation_normal(g, mean, sigma, n=64):
    r"""E g(z) for z ~ N(mean, sigma^2), by Gauss-Hermite quadrature in eps.

    .. math:: E_{z \sim q}[g(z)] = E_{\epsilon \sim \mathcal N(0, 1)}[g(\mu + \sigma\epsilon)]
              \approx \sum_i w_i\, g(\mu + \sigma\epsilon_i)

    Exact for polynomials up to degree 2n - 1.

    Parameters
    ----------
    g : function Tensor -> Tensor, elementwise
    mean, sigma : Tensor of one shape, float64
    n : int
        Number of nodes, at most 200.

    Returns
    -------
    Tensor, shaped like ``mean``

    Equations: vae.lotus
    """
    checks.same_shape("sigma", sigma, "mean", checks.floating("mean", mean))
    rule = np.polynomial.hermite_e.hermegauss(checks.integer("n", n, 1, 200))
    nodes, weights = (torch.from_numpy(a).to(mean) for a in rule)
    values = g(reparameterize(mean[..., None], sigma[..., None], nodes.expand(*mean.shape, n)))
    return (values * weights).sum(-1) / weights.sum()


def pathwise_gradient(f, mean, sigma, eps):
    r"""Gradient of E f(z) with respect to (mean, sigma), one estimate for each draw, through z itself.

    .. math:: \nabla_\phi E[f(z)] = E\big[\nabla_z f(z)\, \nabla_\phi z(\epsilon; \phi)\big], \qquad
              z = \mu + \sigma\epsilon

    Parameters
    ----------
    f : function z (K, L) -> Tensor, shape (K,)
        Differentiable.
    mean, sigma : Tensor, shape (L,)
    eps : Tensor, shape (K, L)

    Returns
    -------
    for_mean, for_sigma : Tensor, shape (K, L)
        Average over K for the estimate; the spread over K is its variance.

    Equations: vae.reparam
    """
    z = reparameterize(mean.detach(), sigma.detach(), eps).requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(_values(f, z).sum(), z)
    return slope, slope * eps


def score_function_gradient(f, mean, sigma, eps):
    r"""Gradient of E f(z) with respect to (mean, sigma), one estimate for each draw, without differentiating f.

    .. math:: \nabla_\phi E_{q_\phi}[f(z)] = E_{q_\phi}\big[f(z)\, \nabla_\phi \log q_\phi(z)\big]

    Unbiased for any f, but of larger variance than `pathwise_gradient`. Parameters and returns as there.

    Equations: vae.grad_swap

    References
    ----------
    .. [1] Williams, "Simple statistical gradient-following algorithms", 1992, Machine Learning 8.
    """
    sigma = sigma.detach()
    value = _values(f, reparameterize(mean, sigma, eps)).detach()[:, None]
    return value * eps / sigma, value * (eps**2 - 1) / sigma


def _values(f, z):
    """f(z), one number for each draw."""
    value = checks.function("f", f, "lambda z: (z**2).sum(1)")(z)
    if value.shape != z.shape[:1]:
        checks.fail("f(z)", f"have shape {tuple(z.shape[:1])}, one number a draw: (z**2).sum(1)", tuple(value.shape))
    return value
