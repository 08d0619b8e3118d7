"""Sections 1 and 2: latent variables, the evidence lower bound, and the chain of them that is a diffusion model."""

import math

import pytest
import torch
from exact import F64, close, gauss_hermite, log_normal, normal, randn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from diffusion_edu.bits import grey_levels, log_likelihood
from diffusion_edu.denoiser import Denoiser
from diffusion_edu.elbo import bound_terms, log_ratio_bound, noising_path
from diffusion_edu.gaussian import normal_log_prob
from diffusion_edu.nets.autoencoder import GaussianMLP
from diffusion_edu.nets.mlp import MLP
from diffusion_edu.oracles import GaussianOracle
from diffusion_edu.process import DiscreteVP, terminal_kl
from diffusion_edu.samplers import beta, beta_tilde, kernel_step, make_ddpm_step, noises, noises_per_sample
from diffusion_edu.schedules import linear_beta
from diffusion_edu.training import Recipe, fit_vae
from diffusion_edu.vae import (
    HVAE,
    VAE,
    LinearVAE,
    diffusion_as_hvae,
    expectation_normal,
    gaussian_kl,
    importance_bound,
    kl_std_normal,
    make_hvae,
    pathwise_gradient,
    reparameterize,
    score_function_gradient,
    vae_elbo,
)

X = 1.5 * randn(4, 3, seed=2)


def linear(n_latents=2):
    """A linear VAE on three numbers whose latents explain each other away: its posterior has a full covariance."""
    W = torch.tensor([[1.0, 0.9], [0.5, 0.4], [-0.6, 0.8]], dtype=F64)
    return LinearVAE(W[:, :n_latents], randn(3, seed=1), 0.3)


def diagonal():
    """A linear VAE with a diagonal posterior, as an encoder's q is."""
    return LinearVAE(torch.tensor([[2.0, 0.0], [0.0, -0.7], [0.0, 0.0]], dtype=F64), randn(3, seed=1), 0.3)


def exact_encoder(model):
    """The true posterior as an encoder: the diagonal of its covariance is all of it for `diagonal`."""

    def encoder(x):
        mean, cov = model.posterior(x)
        return mean, cov.diagonal().sqrt().expand_as(mean)

    return encoder


def wrong_encoder(x):
    """A q that is no posterior."""
    mean = torch.stack([0.3 * x[:, 0] + 0.1, x[:, 1] - x[:, 2]], dim=1)
    return mean, torch.tensor([0.4, 1.3], dtype=F64).expand_as(mean)


def design(n, *sizes):
    """A noise whose 2n rows, +-sqrt(n) times unit vectors, have mean 0 and covariance I: exact for every quadratic.

    Its calls return the slices of these sizes, one after the other.
    """
    rows = math.sqrt(n) * torch.cat([torch.eye(n, dtype=F64), -torch.eye(n, dtype=F64)])
    slices = iter(rows.split(sizes, dim=1))
    return lambda z: next(slices)


def one_at_a_time(n):
    """The rows of `design`, one in each call."""
    rows = iter(design(n, n)(None))
    return lambda z: next(rows).expand_as(z)


# Section 1


@pytest.mark.equation("vae.joint")
def test_the_joint_summed_over_z_is_the_density_of_the_data():
    model = linear(1)
    z = torch.arange(-12, 12, 0.01, dtype=F64)[:, None]  # the trapezoid is exact for a bell
    log_px = MultivariateNormal(model.b, model.W @ model.W.T + 0.3 * torch.eye(3, dtype=F64)).log_prob(X)
    close(model.log_prob(X), log_px, 1e-12)
    vae = VAE(exact_encoder(model), model.decoder)
    for x, exact in zip(X, log_px, strict=True):
        x = x.expand(len(z), 3)
        for log_joint in (model.log_joint(x, z), vae.log_joint(x, [z])):
            close(log_joint.logsumexp(0) + math.log(0.01), exact, 1e-12)


@pytest.mark.equation("vae.joint")
def test_with_grey_levels_the_joint_is_a_probability_of_images():
    grey = grey_levels(3)
    images = torch.cartesian_prod(grey, grey)  # all nine of two pixels
    z = torch.arange(-9, 9, 0.05, dtype=F64)[:, None]
    decoder = GaussianMLP(1, 2, width=8, depth=1, sigma="one", sigma_start=0.4).double()
    torch.nn.init.normal_(decoder.last.weight, generator=torch.Generator().manual_seed(0))
    vae = VAE(GaussianMLP(2, 1).double(), decoder, levels=3)
    log_px = torch.stack([vae.log_joint(x.expand(len(z), 2), [z]).logsumexp(0) for x in images]) + math.log(0.05)
    close(log_px.exp().sum(), 1.0, 1e-12)
    bound = vae_elbo(vae, images.repeat(2000, 1), noises(0)).unflatten(0, (2000, 9))
    assert (bound.mean(0) + 5 * bound.std(0) / 2000**0.5 < log_px).all()  # q is the prior: the gap is wide


@pytest.mark.equation("vae.true_posterior")
def test_the_true_posterior_is_bayes_rule():
    model = linear(1)
    z = torch.arange(-12, 12, 0.01, dtype=F64)[:, None]
    joint = model.log_joint(X[:1].expand(len(z), 3), z)
    mean, cov = model.posterior(X[:1])
    close((joint - joint.logsumexp(0)).exp() / 0.01, normal(z[:, 0], mean[0, 0], cov[0, 0]), 1e-12)
    model = linear(2)  # and the conditional of the joint Gaussian of (z, x), from its blocks
    gain = model.W.T @ torch.linalg.inv(model.W @ model.W.T + 0.3 * torch.eye(3, dtype=F64))
    mean, cov = model.posterior(X)
    close(mean, (X - model.b) @ gain.T, 1e-12)
    close(cov, torch.eye(2, dtype=F64) - gain @ model.W, 1e-12)


@pytest.mark.equation("vae.elbo", "vae.true_posterior")
def test_with_the_exact_posterior_the_bound_is_the_log_likelihood_at_every_z():
    model = linear(2)
    mean, cov = model.posterior(X)
    q = MultivariateNormal(mean, cov)
    assert cov[0, 1].abs() > 0.05
    for seed in range(3):
        z = mean + randn(4, 2, seed=seed) @ torch.linalg.cholesky(cov).T
        close(model.log_joint(X, z) - q.log_prob(z), model.log_prob(X), 1e-12)
    close(model.elbo(X, mean, cov), model.log_prob(X), 1e-12)


@pytest.mark.equation("vae.elbo", "vae.elbo_mc")
def test_the_package_s_bound_is_tight_too_where_the_posterior_is_diagonal():
    model = diagonal()
    vae = VAE(exact_encoder(model), model.decoder)
    close(vae_elbo(vae, X, one_at_a_time(2), n_draws=4), model.log_prob(X), 1e-12)
    close(vae.elbo(X, noises(0)), model.log_prob(X), 1e-12)  # the log ratio is so at every draw
    wrong = VAE(wrong_encoder, model.decoder)
    mean, sigma = wrong_encoder(X)
    exact = model.elbo(X, mean, torch.diag_embed(sigma**2))
    close(vae_elbo(wrong, X, one_at_a_time(2), n_draws=4), exact, 1e-12)
    close(
        wrong.elbo(X.repeat_interleave(4, 0), lambda z: design(2, 2)(z).repeat(4, 1)).unflatten(0, (4, 4)).mean(1),
        exact,
    )
    kl = kl_std_normal(mean, sigma)
    close(vae_elbo(wrong, X, one_at_a_time(2), n_draws=4, beta=3.0), exact - 2 * kl, 1e-12)
    close(vae_elbo(wrong, X, one_at_a_time(2), n_draws=4, beta=0), exact + kl, 1e-12)


@pytest.mark.equation("vae.elbo")
def test_the_closed_form_is_the_integral_of_the_log_ratio():
    model = linear(1)
    z = torch.arange(-12, 12, 0.01, dtype=F64)[:, None]
    log_q = log_normal(z[:, 0], 0.4, 0.7)
    integral = (log_q.exp() * (model.log_joint(X[:1].expand(len(z), 3), z) - log_q)).sum() * 0.01
    mean, cov = torch.full((1, 1), 0.4, dtype=F64), torch.full((1, 1), 0.7, dtype=F64)
    close(model.elbo(X[:1], mean, cov)[0], integral, 1e-12)


@pytest.mark.equation("vae.gap")
def test_the_gap_is_the_divergence_from_the_true_posterior():
    model = linear(2)
    root = randn(4, 2, 2, seed=5)
    mean, cov = randn(4, 2, seed=4), root @ root.mT + 0.1 * torch.eye(2, dtype=F64)
    posterior, precision = model.posterior(X)[0], torch.linalg.inv(model.posterior(X)[1])
    off = posterior - mean
    by_hand = 0.5 * (
        torch.einsum("ij,bji->b", precision, cov)
        + torch.einsum("bi,ij,bj->b", off, precision, off)
        - 2
        - torch.linalg.slogdet(precision @ cov)[1]
    )
    close(model.log_prob(X) - model.elbo(X, mean, cov), by_hand, 1e-12)
    close(model.gap(X, mean, cov), by_hand, 1e-12)
    assert (by_hand > 0.1).all()
    close(model.gap(X, *model.posterior(X)), torch.zeros(4), 1e-14)


@pytest.mark.equation("vae.encoder")
def test_an_encoder_starts_as_the_prior_and_the_bound_teaches_it_the_posterior():
    model = diagonal()
    encoder = GaussianMLP(3, 2, depth=0).double()
    mean, sigma = encoder(X)
    assert torch.equal(mean, torch.zeros(4, 2, dtype=F64)) and torch.equal(sigma, torch.ones(4, 2, dtype=F64))
    x = model.decoder(randn(2000, 2))[0] + math.sqrt(0.3) * randn(2000, 3, seed=1)
    losses = list(fit_vae(VAE(encoder, model.decoder), x, Recipe(500, batch_size=1024, lr=0.1)))
    exact = -model.log_prob(x).mean().item() / 3
    assert losses[0] > exact + 0.5 and abs(sum(losses[-50:]) / 50 - exact) < 0.05
    (mean, sigma), (exact_mean, cov) = encoder(x), model.posterior(x)
    assert ((mean - exact_mean) ** 2).mean(0).sqrt().max() < 1e-2  # over the data; 5e-3 is usual
    assert ((sigma**2 - cov.diagonal()) ** 2).mean(0).sqrt().max() < 1e-2


@pytest.mark.equation("vae.kl_std_normal")
def test_the_divergence_to_the_prior_has_a_closed_form():
    mean, sigma = randn(5, 2, 3), randn(5, 2, 3, seed=1).exp()
    exact = kl_divergence(Normal(mean, sigma), Normal(torch.zeros_like(mean), 1.0)).sum((1, 2))
    close(kl_std_normal(mean, sigma), exact, 1e-13)
    close(kl_std_normal(mean[:, 0, 0], sigma[:, 0, 0]), kl_std_normal(mean[:, :1, :1], sigma[:, :1, :1]), 0)
    full = gaussian_kl(mean.flatten(1), torch.diag_embed(sigma.flatten(1) ** 2))
    close(full, exact, 1e-12)


@pytest.mark.equation("vae.kl_std_normal")
def test_the_divergence_vanishes_at_the_prior_only_and_is_flat_there():
    mean, sigma = torch.zeros(1, 3, dtype=F64, requires_grad=True), torch.ones(1, 3, dtype=F64, requires_grad=True)
    kl = kl_std_normal(mean, sigma)
    assert kl.item() == 0
    for gradient in torch.autograd.grad(kl.sum(), (mean, sigma)):
        assert torch.equal(gradient, torch.zeros_like(gradient))
    for h in (1e-6, -1e-6, 0.5, -0.5):  # second order: h^2 / 2 in a mean, h^2 in a sigma
        bump = torch.tensor([[h, 0, 0]], dtype=F64)
        assert kl_std_normal(bump, torch.ones_like(bump)).item() == pytest.approx(h * h / 2, rel=1e-12)
        assert 0.5 * h * h < kl_std_normal(torch.zeros_like(bump), 1 + bump).item() < 2 * h * h


@pytest.mark.equation("vae.elbo_mc")
def test_the_monte_carlo_term_is_unbiased_and_its_variance_falls_as_one_over_k():
    model, n = diagonal(), 100_000
    vae, x = VAE(wrong_encoder, model.decoder), X[:1].expand(n, 3)
    mean, sigma = wrong_encoder(X[:1])
    exact = (model.elbo(X[:1], mean, torch.diag_embed(sigma**2)) + kl_std_normal(mean, sigma)).item()
    one, eight = (vae_elbo(vae, x[: n // k], noises(k), n_draws=k, beta=0) for k in (1, 8))
    for draws in (one, eight):
        assert abs(draws.mean().item() - exact) < 5 * draws.std().item() / len(draws) ** 0.5
    fourth = (((one - one.mean()) / one.std()) ** 4).mean().item()  # of a squared bell: the error of a variance
    ratio, error = (one.var() / eight.var()).item(), ((fourth - 1) * (1 + 8) / n) ** 0.5
    assert abs(ratio / 8 - 1) < 5 * error < 0.3
    many = vae_elbo(vae, X, noises(0), n_draws=3)
    noise = noises(0)
    close(many, torch.stack([vae_elbo(vae, X, noise) for _ in range(3)]).mean(0), 1e-14)


@pytest.mark.equation("vae.grad_swap")
def test_a_naive_swap_says_zero_and_the_score_function_says_two_phi():
    phi, one, eps = torch.tensor([0.8], dtype=F64, requires_grad=True), torch.ones(1, dtype=F64), randn(100_000, 1)

    def square(z):
        return (z**2).sum(1)

    z = reparameterize(phi, one, eps).detach()  # a sample: it no longer knows phi
    (swapped,) = torch.autograd.grad(square(z).mean() + 0 * phi.sum(), phi)
    assert swapped.item() == 0
    estimate = score_function_gradient(square, phi, one, eps)[0]
    assert not estimate.requires_grad
    assert abs(estimate.mean().item() - 1.6) < 5 * estimate.std().item() / 100_000**0.5
    nodes, weights = gauss_hermite(10)
    for sigma in (1.0, 0.6):  # E z^2 = phi^2 + sigma^2
        sigma = torch.tensor([sigma], dtype=F64)
        for gradient in (score_function_gradient, pathwise_gradient):
            for_phi, for_sigma = gradient(square, phi, sigma, nodes[:, None])
            close(weights @ for_phi, 2 * phi, 1e-12)
            close(weights @ for_sigma, 2 * sigma, 1e-12)
        score, path = (g(square, phi, sigma, nodes[:, None])[0] for g in (score_function_gradient, pathwise_gradient))
        assert weights @ score**2 > 3 * weights @ path**2  # the price of not knowing the slope


@pytest.mark.equation("vae.grad_swap")
def test_the_score_function_needs_no_slope():
    mean, sigma, n = torch.tensor([0.3, -0.5], dtype=F64), torch.tensor([0.7, 1.2], dtype=F64), 100_000

    def step(z):
        return (z[:, 0] > 0).double() + 0 * z.sum(1)

    score = score_function_gradient(step, mean, sigma, randn(n, 2))
    density = normal(torch.tensor(0.0), 0.3, 0.49)  # d/d mean of P(z > 0), d/d sigma is -mean / sigma of it
    for estimate, exact in zip(score, (density, -0.3 / 0.7 * density), strict=True):
        assert estimate.shape == (n, 2)
        error = estimate.std(0) / n**0.5
        assert (estimate.mean(0) - torch.stack([exact, torch.zeros(())])).abs().le(5 * error).all()
    assert pathwise_gradient(step, mean, sigma, randn(n, 2))[0].abs().max() == 0


@pytest.mark.equation("vae.reparam")
def test_reparameterised_noise_has_the_mean_and_the_covariance():
    mean, sigma = torch.tensor([0.5, -1.0, 2.0], dtype=F64), torch.tensor([0.3, 1.0, 2.5], dtype=F64)
    z = reparameterize(mean, sigma, design(3, 3)(None))
    close(z.mean(0), mean, 1e-14)
    close((z - mean).T @ (z - mean) / 6, torch.diag(sigma**2), 1e-14)  # a diagonal Sigma, no sum over its entries
    z = reparameterize(mean, sigma, randn(100_000, 3))
    assert ((z.mean(0) - mean).abs() < 5 * sigma / 100_000**0.5).all()
    assert ((z.var(0) / sigma**2 - 1).abs() < 5 * (2 / 100_000) ** 0.5).all()
    leaves = [v.clone().requires_grad_() for v in (mean, sigma, randn(4, 3))]
    assert torch.autograd.gradcheck(reparameterize, leaves)


@pytest.mark.equation("vae.reparam")
def test_the_pathwise_gradient_is_that_of_autograd_and_of_the_exact_expectation():
    mean, sigma = (v.requires_grad_() for v in (randn(2), randn(2, seed=1).exp()))
    eps, f = randn(7, 2, seed=2), lambda z: (z**2).sum(1) + z[:, 0] * z[:, 1]
    for_mean, for_sigma = pathwise_gradient(f, mean, sigma, eps)
    exact = torch.autograd.grad(f(mean + sigma * eps).mean(), (mean, sigma))
    close(for_mean.mean(0), exact[0], 1e-14)
    close(for_sigma.mean(0), exact[1], 1e-14)
    for_mean, _ = pathwise_gradient(lambda z: (z**2).sum(1), mean, sigma, design(2, 2)(None))
    close(for_mean.mean(0), 2 * mean, 1e-14)


@pytest.mark.equation("vae.lotus")
def test_an_expectation_over_z_is_one_over_eps():
    mean, sigma = torch.tensor([[0.5], [-1.2]], dtype=F64), torch.tensor([[0.8], [0.3]], dtype=F64)
    z = torch.arange(-12, 12, 0.005, dtype=F64)
    for g, exact in (
        (torch.cos, torch.cos(mean) * torch.exp(-(sigma**2) / 2)),
        (lambda z: z**4, mean**4 + 6 * mean**2 * sigma**2 + 3 * sigma**4),
    ):
        over_z = (g(z) * normal(z, mean, sigma**2)).sum(-1, keepdim=True) * 0.005
        close(over_z, exact, 1e-10)
        for n in (32, 64, 200):
            close(expectation_normal(g, mean, sigma, n), over_z, 1e-10)
    close(
        expectation_normal(lambda z: z**5 + z**4, mean, sigma, 3),
        mean**5 + 10 * mean**3 * sigma**2 + 15 * mean * sigma**4 + exact,
        1e-12,
    )


def test_the_importance_bound_rises_with_k_to_the_log_likelihood():
    model = linear(1)
    vae = VAE(lambda x: (0.3 * x[:, :1], torch.full_like(x[:, :1], 0.9)), model.decoder)
    x, log_px = X[:1], model.log_prob(X[:1]).item()
    elbo = model.elbo(x, 0.3 * x[:, :1], torch.full((1, 1), 0.81, dtype=F64)).item()
    nodes, weights = gauss_hermite(60)
    pairs = iter(torch.cartesian_prod(nodes, nodes).T)  # every pair of two draws, and its weight
    two = importance_bound(vae, x.expand(3600, 3), lambda z: next(pairs)[:, None], 2)
    two = (torch.outer(weights, weights).flatten() * two).sum().item()
    draws = {k: importance_bound(vae, x.expand(1000, 3), noises(k), k) for k in (1, 2, 30, 1000)}
    error = {k: 5 * d.std().item() / 1000**0.5 for k, d in draws.items()}
    mean = {k: d.mean().item() for k, d in draws.items()}
    assert abs(mean[1] - elbo) < error[1] and abs(mean[2] - two) < error[2]
    assert elbo + 0.1 < two < mean[30] - error[30] < mean[1000] - error[1000] and abs(mean[1000] - log_px) < 0.02
    close(importance_bound(vae, X, noises(0), 1), vae.elbo(X, noises(0)), 0)
    exact = VAE(exact_encoder(model), model.decoder)
    close(importance_bound(exact, X, noises(0), 7), model.log_prob(X), 1e-12)


def test_each_rows_noise_may_be_its_own():
    vae = VAE(wrong_encoder, diagonal().decoder)
    for bound in (lambda x, noise: vae_elbo(vae, x, noise, 3), lambda x, noise: importance_bound(vae, x, noise, 3)):
        together = bound(X, noises_per_sample(0, range(4)))
        alone = bound(X[2:3], noises_per_sample(0, [2]))
        close(alone, together[2:3], 1e-14)
        assert bound(X[:0], noises(0)).shape == (0,)


# Section 2

# A chain from 1 or 2 top latents down to the data; each map is (A, b, sigma): the next is N(A v + b, diag sigma^2).


def affine(n_out, n_in, seed):
    """A random map."""
    return randn(n_out, n_in, seed=seed), randn(n_out, seed=seed + 50), 0.4 + randn(n_out, seed=seed + 90).abs()


def function(a, b, sigma):
    """A map as an encoder or decoder."""
    return lambda v: (v @ a.T + b, sigma.expand(len(v), -1))


def law(first, maps):
    """Mean and covariance of (v_0, v_1, ...) stacked: from v = L v + c + S eps follows v = (I - L)^-1 (c + S eps)."""
    blocks = [first, *maps]
    sizes = [len(b) for _, b, _ in blocks]
    links = torch.zeros(sum(sizes), sum(sizes), dtype=F64)
    for i in range(1, len(blocks)):
        row, column = sum(sizes[:i]), sum(sizes[: i - 1])
        links[row : row + sizes[i], column : column + sizes[i - 1]] = blocks[i][0]
    solve = torch.linalg.inv(torch.eye(len(links), dtype=F64) - links)
    mean, sigma = (torch.cat([block[k] for block in blocks]) for k in (1, 2))
    return solve @ mean, solve @ torch.diag(sigma**2) @ solve.T


def prior(n):
    """N(0, I) as the first block of `law`."""
    return None, torch.zeros(n, dtype=F64), torch.ones(n, dtype=F64)


def given(mean, cov, known, wanted):
    """Some coordinates of a Gaussian given others: (A, b, covariance), N(A known + b, covariance)."""
    gain = cov[wanted][:, known] @ torch.linalg.inv(cov[known][:, known])
    left = cov[wanted][:, wanted] - gain @ cov[known][:, wanted]
    return gain, mean[wanted] - gain @ mean[known], left


@pytest.mark.equation("hvae.joint")
def test_a_linear_chain_is_one_big_gaussian():
    down = [affine(2, 2, 1), affine(3, 2, 2), affine(2, 3, 3)]  # z_3 -> z_2 -> z_1 -> x
    hvae = HVAE([function(*affine(3, 2, 4))] * 3, [function(*m) for m in reversed(down)])
    z3, z2, z1, x = randn(5, 2), randn(5, 2, seed=1), randn(5, 3, seed=2), randn(5, 2, seed=3)
    joint = MultivariateNormal(*law(prior(2), down))
    close(hvae.log_joint(x, [z1, z2, z3]), joint.log_prob(torch.cat([z3, z2, z1, x], dim=1)), 1e-12)


@pytest.mark.equation("hvae.posterior")
def test_the_encoder_chain_draws_what_it_says():
    up, x = [affine(3, 2, 4), affine(2, 3, 5), affine(1, 2, 6)], randn(1, 2)  # x -> z_1 -> z_2 -> z_3
    hvae = HVAE([function(*m) for m in up], [function(*affine(2, 3, 1))] * 3)
    first = (None, (x @ up[0][0].T + up[0][1])[0], up[0][2])
    mean, cov = law(first, up[1:])
    eps = iter(torch.cat([torch.eye(6, dtype=F64), torch.zeros(1, 6, dtype=F64)]).split([3, 2, 1], dim=1))
    zs, log_q = hvae.encode(x.expand(7, 2), lambda z: next(eps))  # one unit impulse in each row, none in the last
    z = torch.cat(zs, dim=1)
    close(z[-1], mean, 1e-13)
    close((z[:-1] - z[-1]).T @ (z[:-1] - z[-1]), cov, 1e-12)
    close(log_q, MultivariateNormal(mean, cov).log_prob(z), 1e-12)


def chain():
    """(decoder maps, law of (z_2, z_1, x)): one-dimensional latents, so that exact posteriors are diagonal."""
    down = [affine(1, 1, 1), affine(2, 1, 2)]
    return down, law(prior(1), down)


@pytest.mark.equation("hvae.elbo", "hvae.joint")
def test_the_bound_is_tight_for_the_linear_chain_with_exact_posteriors():
    down, (mean, cov) = chain()
    encoders = []
    for known, wanted in (([2, 3], [1]), ([1], [0])):  # z_1 given x, z_2 given z_1: x has nothing to add
        gain, offset, left = given(mean, cov, known, wanted)
        encoders.append(function(gain, offset, left.diagonal().sqrt()))
    hvae = HVAE(encoders, [function(*m) for m in reversed(down)])
    x = randn(4, 2)
    log_px = MultivariateNormal(mean[2:], cov[2:, 2:]).log_prob(x)
    for seed in range(3):
        close(hvae.elbo(x, noises(seed)), log_px, 1e-12)
    close(importance_bound(hvae, x, noises(0), 5), log_px, 1e-12)


@pytest.mark.equation("hvae.elbo")
def test_for_any_other_encoder_the_gap_is_a_divergence_of_chains():
    down, (mean, cov) = chain()
    up, x = [affine(1, 2, 5), affine(1, 1, 6)], randn(1, 2)
    hvae = HVAE([function(*m) for m in up], [function(*m) for m in reversed(down)])
    elbo = hvae.elbo(x.expand(4, 2), design(2, 1, 1)).mean()
    q = law((None, (x @ up[0][0].T + up[0][1])[0], up[0][2]), up[1:])  # of (z_1, z_2)
    gain, offset, left = given(mean, cov, [2, 3], [1, 0])
    posterior = MultivariateNormal((x @ gain.T + offset)[0], left)
    log_px = MultivariateNormal(mean[2:], cov[2:, 2:]).log_prob(x)[0]
    close(log_px - elbo, kl_divergence(MultivariateNormal(*q), posterior), 1e-11)


@pytest.mark.equation("hvae.elbo")
def test_one_level_is_the_vae_bit_for_bit():
    encoder, decoder = (GaussianMLP(a, b, 16, 1).double() for a, b in ((3, 2), (2, 3)))
    for net in (encoder, decoder):
        torch.nn.init.normal_(net.last.weight, generator=torch.Generator().manual_seed(0))
    (mean, sigma), noise = encoder(X), noises(0)
    z = mean + sigma * noise(mean)
    mean_x, sigma_x = decoder(z)
    by_hand = normal_log_prob(z, 0.0, 1.0) + normal_log_prob(X, mean_x, sigma_x**2) - normal_log_prob(z, mean, sigma**2)
    for model in (VAE(encoder, decoder), HVAE([encoder], [decoder])):
        assert torch.equal(model.elbo(X, noises(0)), by_hand)
    kl = normal_log_prob(z, mean, sigma**2) - normal_log_prob(z, 0.0, 1.0)
    close(vae_elbo(VAE(encoder, decoder), X, noises(0), beta=0), by_hand + kl, 1e-13)


def test_an_hvae_takes_networks_and_functions_and_finds_the_parameters():
    torch.manual_seed(0)
    model = HVAE(
        [GaussianMLP((1, 4, 4), 3, 8), lambda z: (z[:, :2] / 2, 0.5 + 0 * z[:, :2])],
        [GaussianMLP(3, (1, 4, 4), 8), GaussianMLP(2, 3, 8)],
        17,
    )
    nets = (model.encoders[0], *model.decoders)
    assert len(list(model.parameters())) == sum(len(list(net.parameters())) for net in nets)
    x = grey_levels(17)[torch.randint(0, 17, (5, 1, 4, 4))].float()
    bound = model.elbo(x, noises(0))
    assert bound.shape == (5,) and bound.dtype == torch.float32
    assert torch.equal(model.eval().elbo(x, noises(0)), bound) and not nets[0].training  # no mode of its own
    bound.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    zs, _ = model.encode(x, noises(0))
    assert [z.shape for z in zs] == [(5, 3), (5, 2)]
    twin = HVAE(
        [GaussianMLP((1, 4, 4), 3, 8), model.encoders[1]], [GaussianMLP(3, (1, 4, 4), 8), GaussianMLP(2, 3, 8)], 17
    )
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.elbo(x, noises(0)), bound)


def test_drawing_goes_down_the_chain_and_ends_in_a_mean():
    down = [affine(2, 2, 1), affine(3, 2, 2), affine(2, 3, 3)]
    hvae = HVAE([function(*affine(3, 2, 4))] * 3, [function(*m) for m in reversed(down)])
    z = randn(3, 2)
    mean = z
    for a, b, _ in down:
        mean = mean @ a.T + b
    close(hvae.draw(z), mean, 1e-14)
    eps = iter(torch.cat([torch.eye(5, dtype=F64), torch.zeros(1, 5, dtype=F64)]).split([2, 3], dim=1))
    x = hvae.draw(z[:1].expand(6, 2), lambda v: next(eps))
    cov = law((None, z[0] @ down[0][0].T + down[0][1], down[0][2]), down[1:])[1][-2:, -2:]
    close((x[:-1] - x[-1]).T @ (x[:-1] - x[-1]), cov - torch.diag(down[-1][2] ** 2), 1e-12)
    vae = VAE(wrong_encoder, diagonal().decoder)
    close(vae.draw(z), vae.decoder(z)[0], 0)


def test_made_models_fit_the_data_they_are_made_for_and_training_raises_the_bound():
    x = grey_levels(17)[torch.randint(0, 17, (64, 1), generator=torch.Generator().manual_seed(0))].float()
    x = x.expand(64, 16).reshape(64, 1, 4, 4)  # sixteen pixels of one grey: much to gain from a latent
    for latents, kind in (([2], VAE), ([3, 2], HVAE)):
        torch.manual_seed(0)
        model = make_hvae(latents, (1, 4, 4), width=32, depth=1, levels=17)
        assert type(model) is kind and [n.out_shape[0] for n in model.encoders] == latents
        losses = list(fit_vae(model, x, Recipe(200, batch_size=64, lr=2e-2)))
        assert losses[0] > 2.8 and sum(losses[-20:]) / 20 < 1.7  # nats a pixel; log 17 = 2.83 is a uniform guess
        assert model.draw(torch.zeros(2, latents[-1])).shape == (2, 1, 4, 4)


# From the hierarchy to diffusion


def table():
    """Ten steps, beta from 0.1 to 0.7."""
    return DiscreteVP(linear_beta(10, 0.1, 0.7))


@pytest.mark.equation("hvae.to_diffusion")
def test_three_restrictions_make_an_hvae_a_diffusion_model():
    process, x0 = table(), randn(5, 2, 3)
    hvae = diffusion_as_hvae(make_ddpm_step(beta), GaussianOracle(process, 0.4, 0.25), process.grid(10))
    zs, _ = hvae.encode(x0, noises(0))
    assert len(zs) == 10 and all(z.shape == x0.shape for z in zs)
    assert not list(hvae.parameters())  # the encoder is fixed, and this model, too
    for t in range(1, 11):
        mean, sigma = hvae.encoders[t - 1](x0)
        close(mean, process.alpha[t].sqrt() * x0, 1e-15)
        close(sigma, process.beta[t].sqrt().expand_as(x0), 1e-15)
    zeros, _ = hvae.encode(x0, torch.zeros_like)
    close(zeros[-1], process.alpha_bar[10].sqrt() * x0, 1e-14)
    assert terminal_kl(process, x0).max() < 0.2  # z_T is near the prior


@pytest.mark.equation("hvae.to_diffusion")
@pytest.mark.parametrize(("n_steps", "variance"), [(10, beta), (3, beta), (1, beta), (10, beta_tilde), (3, beta_tilde)])
def test_the_hvae_bound_is_the_diffusion_bound_on_the_same_trajectory(n_steps, variance):
    process, x0 = table(), randn(5, 2, 3)
    model, times, step = GaussianOracle(process, 0.4, 0.25), process.grid(n_steps), make_ddpm_step(variance)
    hvae = diffusion_as_hvae(step, model, times)
    zs, _ = hvae.encode(x0, noises(0))
    path = noising_path(process, x0, times, noises(0))
    for a, b in zip([*reversed(zs), x0], path, strict=True):
        close(a, b, 0)
    close(hvae.elbo(x0, noises(0)), -log_ratio_bound(step, model, path, times), 1e-10)


@pytest.mark.equation("hvae.to_diffusion")
@pytest.mark.parametrize("n_steps", [10, 3])
def test_its_mean_is_the_sum_of_the_terms(n_steps):
    process, x0 = table(), torch.tensor([[0.9]], dtype=F64)
    model, times, step = GaussianOracle(process, 0.4, 0.25), process.grid(n_steps), make_ddpm_step(beta)
    elbo = diffusion_as_hvae(step, model, times).elbo(x0.expand(2 * n_steps, 1), design(n_steps, *[1] * n_steps)).mean()
    plus_minus = torch.tensor([[1.0], [-1.0]], dtype=F64)  # each term is quadratic in its own noise
    terms = bound_terms(step, model, x0.expand(2, 1), times, lambda x: plus_minus)
    close(elbo, -sum(term.mean() for term in terms), 1e-10)


@pytest.mark.equation("hvae.to_diffusion", "hvae.elbo")
def test_with_the_exact_reverse_of_standard_normal_data_the_bound_is_tight():
    process, x0 = table(), randn(5, 3)
    model, exact = GaussianOracle(process, 0.0, 1.0), log_normal(x0, 0.0, 1.0).sum(1)
    for step in (kernel_step, make_ddpm_step(beta)):
        close(diffusion_as_hvae(step, model, process.grid(4)).elbo(x0, noises(0)), exact, 1e-12)


def test_the_parameters_of_a_network_in_the_chain_are_the_chains():
    process = table()
    denoiser = Denoiser(MLP(width=8, depth=1), process)
    hvae = diffusion_as_hvae(make_ddpm_step(beta), denoiser, process.grid(3))
    assert set(hvae.parameters()) == set(denoiser.parameters())
    (-hvae.elbo(torch.zeros(4, 2), noises(0)).mean()).backward()
    assert denoiser.net.last.weight.grad.abs().max() > 0
    hvae.eval()
    assert not denoiser.net.training


def test_likelihoods_of_single_numbers_are_batches_of_scalars():
    x = grey_levels(5)
    for levels in (None, 5):
        flat = log_likelihood(x, 0.1, 0.7, levels)
        close(flat, log_likelihood(x[:, None], torch.tensor(0.1, dtype=F64), torch.tensor(0.7, dtype=F64), levels), 0)
