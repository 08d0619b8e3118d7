r"""Latent-variable models: the VAE, its hierarchy, and the evidence lower bound.

Every conditional is a Gaussian, given as a function ``x -> (mean, sigma)``: a network (`nets.autoencoder.GaussianMLP`),
a line of code, or one step of a diffusion chain (`diffusion_as_hvae`). Everything is in nats, shape (B,), and what is
called an ELBO here is a lower bound on log p(x).
"""

from .estimators import (
    expectation_normal,
    kl_std_normal,
    pathwise_gradient,
    reparameterize,
    score_function_gradient,
)
from .linear import LinearVAE, gaussian_kl
from .models import HVAE, VAE, diffusion_as_hvae, importance_bound, make_hvae, vae_elbo

__all__ = [
    "HVAE",
    "VAE",
    "LinearVAE",
    "diffusion_as_hvae",
    "expectation_normal",
    "gaussian_kl",
    "importance_bound",
    "kl_std_normal",
    "make_hvae",
    "pathwise_gradient",
    "reparameterize",
    "score_function_gradient",
    "vae_elbo",
]
