"""The VAE, its hierarchy, their bounds, and a diffusion model seen as one of them."""

from itertools import pairwise

import numpy as np
import torch
from torch import nn

from .. import checks
from ..bits import log_likelihood
from ..gaussian import normal_log_prob
from ..nets.autoencoder import GaussianMLP
from ..process import check_whole, expand, jump
from .estimators import kl_std_normal, reparameterize


class HVAE(nn.Module):
    r"""A Markov chain of latent variables over the data, z_T -> ... -> z_1 -> x, and the chain that encodes x.

    .. math:: p(x, z_{1:T}) = p(z_T)\, p_\theta(x \mid z_1) \prod_{t=2}^T p_\theta(z_{t-1} \mid z_t), \qquad
              q(z_{1:T} \mid x) = q_\phi(z_1 \mid x) \prod_{t=2}^T q_\phi(z_t \mid z_{t-1})

    with p(z_T) = N(0, I).

    Parameters
    ----------
    encoders : sequence of T functions (or networks) -> (mean, sigma)
        The first of x, then each of the latent below.
    decoders : sequence of T functions (or networks) -> (mean, sigma)
        The first of z_1 (it says x), then each of the latent above: ``decoders[t]`` says z_t given z_{t+1}.
    levels : int or None
        None: p(x | z_1) is a density. Otherwise x holds this many grey levels, and it is their probability.

    Equations: hvae.joint, hvae.posterior

    References
    ----------
    .. [1] Luo, "Understanding Diffusion Models: A Unified Perspective", 2022, arXiv:2208.11970, Eq. 23-28.
    """

    def __init__(self, encoders, decoders, levels=None):
        super().__init__()
        self.encoders, self.decoders = _parts("encoders", encoders), _parts("decoders", decoders)
        if len(encoders) != len(decoders):
            got = f"{len(encoders)} encoders, {len(decoders)} decoders"
            checks.fail("encoders, decoders", "be as many as each other", got)
        self.levels = None if levels is None else checks.integer("levels", levels, 2)

    def encode(self, x, noise):
        r"""Draw the latents of x, bottom up.

        Parameters
        ----------
        x : Tensor, shape (B, *D)
        noise : function x -> Tensor like x

        Returns
        -------
        zs : list of T Tensors
            z_1, ..., z_T.
        log_q : Tensor, shape (B,)
            log q(z_{1:T} | x).
        """
        zs, log_q = [], 0
        for encoder in self.encoders:
            mean, sigma = encoder(zs[-1] if zs else x)
            zs.append(reparameterize(mean, sigma, _eps(noise, mean)))
            log_q = log_q + normal_log_prob(zs[-1], mean, sigma**2)
        return zs, log_q

    def log_joint(self, x, zs):
        r"""log p(x, z_{1:T}), shape (B,): the latents under their decoders, and x under z_1.

        Equations: hvae.joint, vae.joint
        """
        if len(zs) != len(self.decoders):
            checks.fail("zs", f"be {len(self.decoders)} latents, z_1 first", len(zs))
        log_p = normal_log_prob(zs[-1], 0.0, 1.0) + log_likelihood(x, *self.decoders[0](zs[0]), self.levels)
        for decoder, (below, above) in zip(list(self.decoders)[1:], pairwise(zs), strict=True):
            mean, sigma = decoder(above)
            log_p = log_p + normal_log_prob(below, mean, sigma**2)
        return log_p

    def elbo(self, x, noise):
        r"""One draw of the bound as a log ratio: unbiased for the ELBO, however many latents there are.

        .. math:: \log p(x) \ge E_{q(z_{1:T} \mid x)}\Big[\log\frac{p(x, z_{1:T})}{q(z_{1:T} \mid x)}\Big]

        Parameters
        ----------
        x : Tensor, shape (B, *D)
        noise : function x -> Tensor like x

        Returns
        -------
        Tensor, shape (B,)

        Equations: hvae.elbo
        """
        zs, log_q = self.encode(x, noise)
        return self.log_joint(x, zs) - log_q

    @torch.no_grad()
    def draw(self, z, noise=None):
        r"""Samples of x from z_T (n, *L), top down; the last step is its mean. Without noise, every step is."""
        for decoder in list(self.decoders)[:0:-1]:
            mean, sigma = decoder(z)
            z = mean if noise is None else reparameterize(mean, sigma, _eps(noise, mean))
        return self.decoders[0](z)[0]


class VAE(HVAE):
    r"""An HVAE of one level: p(z) p(x | z), and an encoder q(z | x).

    Parameters
    ----------
    encoder, decoder : function (or network) -> (mean, sigma)
    levels : int or None
        As in `HVAE`.

    Equations: vae.joint, vae.encoder

    References
    ----------
    .. [1] Kingma and Welling, 2013, arXiv:1312.6114.
    """

    def __init__(self, encoder, decoder, levels=None):
        super().__init__([encoder], [decoder], levels)

    @property
    def encoder(self):
        """x -> (mean, sigma) of z."""
        return self.encoders[0]

    @property
    def decoder(self):
        """z -> (mean, sigma) of x."""
        return self.decoders[0]


def vae_elbo(vae, x, noise, n_draws=1, beta=1.0):
    r"""The evidence lower bound of a VAE: how well draws of z explain x, minus what they cost.

    .. math:: \mathrm{ELBO} = E_{q_\phi(z \mid x)}[\log p_\theta(x \mid z)]
              - \beta\, D_{KL}(q_\phi(z \mid x)\,\|\,p(z))

    The expectation is the mean over ``n_draws`` reparameterised draws, the divergence is exact.

    Parameters
    ----------
    vae : VAE
    x : Tensor, shape (B, *D)
    noise : function x -> Tensor like x
        For example ``noises(seed)``.
    n_draws : int
        K: the Monte Carlo variance falls as 1 / K.
    beta : float
        1 is the bound; larger values trade reconstruction for a posterior nearer to the prior.

    Returns
    -------
    Tensor, shape (B,)

    Equations: vae.elbo, vae.elbo_mc

    References
    ----------
    .. [1] Kingma and Welling, 2013, arXiv:1312.6114, Eq. 3 and 7; Higgins et al., "beta-VAE", 2017.
    """
    if not isinstance(vae, VAE):
        checks.fail("vae", "be a VAE (for several levels there is HVAE.elbo)", checks.shown(vae), TypeError)
    k = checks.integer("n_draws", n_draws, 1)
    mean, sigma = vae.encoder(x)
    z = torch.stack([reparameterize(mean, sigma, _eps(noise, mean)) for _ in range(k)])
    many = x.expand(k, *x.shape).flatten(0, 1)
    explained = log_likelihood(many, *vae.decoder(z.flatten(0, 1)), vae.levels).unflatten(0, (k, len(x))).mean(0)
    return explained - checks.real("beta", beta, 0) * kl_std_normal(mean, sigma)


def importance_bound(model, x, noise, n_draws):
    r"""A tighter lower bound on log p(x), from several draws of the latents.

    .. math:: \log p(x) \ge E\Big[\log\frac1K\sum_{k=1}^K \frac{p(x, z^{(k)})}{q(z^{(k)} \mid x)}\Big]
              \xrightarrow{K \to \infty} \log p(x)

    K = 1 is the ELBO.

    Parameters
    ----------
    model : HVAE
    x : Tensor, shape (B, *D)
    noise : function x -> Tensor like x
    n_draws : int
        K.

    Returns
    -------
    Tensor, shape (B,)

    References
    ----------
    .. [1] Burda et al., "Importance Weighted Autoencoders", 2016, arXiv:1509.00519, Eq. 8.
    """
    k = checks.integer("n_draws", n_draws, 1)
    checks.function("noise", noise, "noises(seed)")

    def noise_of_each(z):
        return torch.cat([noise(draw) for draw in z.chunk(k)])

    ratio = model.elbo(x.expand(k, *x.shape).flatten(0, 1), noise_of_each).unflatten(0, (k, len(x)))
    return ratio.logsumexp(0) - np.log(k)


def diffusion_as_hvae(step, model, times):
    r"""A diffusion model, seen as an HVAE: latents as large as the data, a fixed encoder, a prior that it reaches.

    .. math:: \dim z_t = \dim x, \qquad q(x_t \mid x_{t-1}) = \mathcal N(\sqrt{\alpha_t}\,x_{t-1}, (1 - \alpha_t) I),
              \qquad q(x_T \mid x_0) \to \mathcal N(0, I)

    Parameters
    ----------
    step : KernelStep
        Says mean and sigma of p(x_s | x_t).
    model : Model
    times : Tensor, shape (n + 1,)
        Decreasing, from T to 0.

    Returns
    -------
    HVAE
        With n levels.

    Equations: hvae.to_diffusion

    References
    ----------
    .. [1] Luo, 2022, arXiv:2208.11970, "Variational Diffusion Models".
    """
    if not hasattr(step, "kernel"):
        rule = "be a Gaussian step (KernelStep), such as make_ddpm_step(beta)"
        checks.fail("step", rule, checks.shown(step), TypeError)
    pairs = list(pairwise(check_whole(model.process, times)))[::-1]

    def encoder(t, s):
        scale, std = jump(model.process, t, s)
        return lambda x: (expand(scale, x) * x, expand(std, x).expand_as(x))

    def decoder(t, s):
        def kernel(x_t):
            mean, sigma = step.kernel(model, x_t, t, s)
            if sigma is None:
                checks.fail("step", "have a variance: without one the bound is infinite", "a deterministic step")
            return mean, sigma.expand_as(mean)

        return kernel

    hvae = HVAE([encoder(t, s) for t, s in pairs], [decoder(t, s) for t, s in pairs])
    hvae.model = model  # so that its parameters and its mode are the HVAE's
    return hvae


def _eps(noise, mean):
    """Fresh noise of exactly the shape of the mean."""
    return checks.same_shape("noise(x)", checks.function("noise", noise, "noises(seed)")(mean), "x", mean)


def _parts(name, functions):
    """A ModuleList, so that the parameters of networks are found; plain functions are wrapped."""
    if not isinstance(functions, list | tuple | nn.ModuleList):
        checks.fail(name, "be a list of networks or functions", checks.shown(functions), TypeError)
    if not len(functions):
        checks.fail(name, "have at least one entry", "none")
    for function in functions:
        if isinstance(checks.function(name, function, "GaussianMLP(2, 1)"), type):
            checks.fail(name, "be networks or functions", f"the class {function.__name__}", TypeError)
    return nn.ModuleList(f if isinstance(f, nn.Module) else _Function(f) for f in functions)


class _Function(nn.Module):
    """A plain function in a ModuleList."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def make_hvae(latents, shape=(1, 8, 8), width=128, depth=2, levels=None):
    r"""An untrained HVAE of MLPs for data of the given shape; a `VAE` where there is one latent.

    Parameters
    ----------
    latents : sequence of int
        Dimensions of z_1, ..., z_T.
    shape : sequence of int
        Of one example.
    width, depth : int
        Of each MLP.
    levels : int or None
        As in `HVAE`.
    """
    if not isinstance(latents, list | tuple) or not latents:
        checks.fail("latents", "be a list of dimensions, such as [16, 8]", latents)
    sizes = [shape, *latents]
    encoders = [GaussianMLP(a, b, width, depth) for a, b in pairwise(sizes)]
    decoders = [GaussianMLP(b, a, width, depth) for a, b in pairwise(sizes)]
    decoders[0] = GaussianMLP(latents[0], shape, width, depth, sigma="one", sigma_start=0.5)
    return VAE(encoders[0], decoders[0], levels) if len(latents) == 1 else HVAE(encoders, decoders, levels)
