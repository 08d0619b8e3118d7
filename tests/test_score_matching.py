"""Section 13, the first half: what a score is, four ways to fit one, and all noise levels at once. By quadrature."""

import math
from itertools import pairwise

import pytest
import torch
from exact import F64, close, gauss_hermite, normal, randn, times
from torch import nn

from diffusion_edu.denoiser import Denoiser
from diffusion_edu.guidance import reschedule
from diffusion_edu.losses import denoising_loss
from diffusion_edu.oracles import DatasetOracle, GaussianMixtureOracle, GaussianOracle
from diffusion_edu.prediction import Prediction
from diffusion_edu.process import VE, DiscreteVP, expand, q_sample
from diffusion_edu.schedules import geometric_sigmas, linear_beta
from diffusion_edu.score_matching import (
    denoising_score_matching,
    divergence,
    explicit_score_matching,
    hutchinson,
    implicit_score_matching,
    sliced_score_matching,
    value_and_divergence,
)
from diffusion_edu.training import Recipe, fit, level_times

SIGNS = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=F64)  # all probes of signs in 2-D


def line():
    """Two modes on a line."""
    return GaussianMixtureOracle(VE(), [[-1.5], [1.0]], [0.5, 0.4], [0.4, 0.6])


def plane():
    """Two modes in the plane."""
    return GaussianMixtureOracle(VE(), [[-1.0, 0.5], [0.8, -0.6]], [0.5, 0.6], [0.3, 0.7])


def score_at(oracle, sigma):
    return lambda x: oracle(x, torch.tensor(sigma, dtype=F64)).score


def grid(oracle, sigma, reach=7.0, step=0.1):
    """Points and weights of E_{p_sigma}: the trapezoid, exact to rounding for Gaussians wider than 0.4 of a step."""
    axis = torch.arange(-reach, reach, step, dtype=F64)
    x = torch.cartesian_prod(*[axis] * oracle.means.shape[1]).reshape(-1, oracle.means.shape[1])
    return x, oracle.log_prob(x, torch.tensor(sigma, dtype=F64)).exp() * step ** x.shape[1]


class Small(nn.Module):
    """A score with parameters that is no gradient and fits nothing: tanh(x W) V + b - k x."""

    def __init__(self, dim, seed):
        super().__init__()
        numbers = randn(2 * dim * 4 + dim + 1, seed=seed)
        shapes = ((dim, 4), (4, dim), (dim,), (1,))
        parts = numbers.split([math.prod(s) for s in shapes])
        self.w, self.v, self.b, self.k = (nn.Parameter(p.reshape(s)) for p, s in zip(parts, shapes, strict=True))

    def forward(self, x):
        return (x @ self.w).tanh() @ self.v + self.b - self.k * x


def expected(loss, weights, model):
    """The expectation by quadrature, and its gradient in the parameters as one vector."""
    value = weights @ loss
    grads = torch.autograd.grad(value, list(model.parameters()))
    return value.detach(), torch.cat([g.flatten() for g in grads])


# The score and the Fisher divergence


@pytest.mark.equation("score.def")
def test_a_score_is_the_gradient_of_the_log_density_and_its_mean_is_zero():
    for oracle in (line(), plane()):
        x, p = grid(oracle, 0.3)
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(oracle.log_prob(leaf, torch.tensor(0.3, dtype=F64)).sum(), leaf)
        s = score_at(oracle, 0.3)(x)
        close(s, gradient, 1e-12)
        close(p @ s, torch.zeros(x.shape[1]), 1e-12)  # the density is 0 at infinity
        close(p @ (s**2).sum(1), -(p @ divergence(score_at(oracle, 0.3), x)), 1e-11)  # Fisher's information, twice


@pytest.mark.equation("score.esm")
def test_the_fisher_divergence_is_zero_at_the_score_and_a_mean_over_the_data():
    oracle, model = line(), Small(1, seed=0)
    x, p = grid(oracle, 0.3)
    truth = score_at(oracle, 0.3)
    assert (explicit_score_matching(truth, x, truth) == 0).all()
    exact = p @ explicit_score_matching(model, x, truth)
    close(exact, p @ (truth(x) - model(x)).square().flatten(), 1e-13)
    drawn = oracle.sample(20_000, torch.Generator().manual_seed(0))[0] + 0.3 * randn(20_000, 1, seed=1)
    loss = explicit_score_matching(model, drawn, truth)
    assert exact > 1 and abs(loss.mean() - exact) < 4 * loss.std() / 20_000**0.5  # four standard errors
    # N(0, s^2) and a line -k x: (k - 1 / s^2)^2 s^2
    bell = lambda x: -x / 0.25
    z, w = gauss_hermite(4)
    close(w @ explicit_score_matching(lambda x: -3 * x, 0.5 * z[:, None], bell), 0.25, 1e-13)


# The divergence


@pytest.mark.equation("score.implicit")
def test_the_divergence_is_the_trace_of_the_jacobian_and_signs_average_to_it():
    model, x = Small(2, seed=0), randn(6, 2)
    trace = torch.stack([torch.autograd.functional.jacobian(model, row).trace() for row in x])
    close(divergence(model, x), trace, 1e-13)
    close(hutchinson(model, x, SIGNS[:, None].expand(4, 6, 2)).mean(0), trace, 1e-13)  # E[v v^T] = I, exactly
    assert hutchinson(model, x, SIGNS[:2, None].expand(2, 6, 2)).std(0).min() > 1e-3  # one probe is not enough
    each = hutchinson(model, x.repeat(20_000, 1), randn(1, 120_000, 2, seed=1)).reshape(-1, 6)  # normal probes
    assert ((each.mean(0) - trace).abs() < 4 * each.std(0) / 20_000**0.5).all()  # four standard errors
    images = randn(3, 1, 4, 4)
    close(divergence(lambda x: x**3, images), 3 * (images**2).flatten(1).sum(1), 1e-13)
    assert (divergence(lambda x: torch.ones_like(x), images) == 0).all()  # a field without a graph


def test_the_divergence_has_a_graph_only_where_gradients_are_on():
    model, x = Small(2, seed=0), randn(6, 2)
    value, change = value_and_divergence(model, x)
    assert value.requires_grad and change.requires_grad and torch.equal(value, model(x))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            off = value_and_divergence(model, x.clone(), SIGNS[:, None].expand(4, 6, 2).clone())
            assert not any(part.requires_grad for part in off) and not torch.is_grad_enabled()
            close(off[1].mean(0), change.detach(), 1e-13)
            close(implicit_score_matching(model, x.clone()), ((value**2).sum(1) + 2 * change).detach(), 1e-13)
    assert divergence(model, x[:0]).shape == (0,) and hutchinson(model, x[:0], SIGNS[:, None][:, :0]).shape == (4, 0)


# Three ways around the unknown score


@pytest.mark.equation("score.implicit")
@pytest.mark.parametrize("oracle", [line(), plane()], ids=["line", "plane"])
def test_implicit_matching_is_explicit_matching_but_for_one_constant(oracle):
    x, p = grid(oracle, 0.3)
    truth = score_at(oracle, 0.3)
    information = p @ (truth(x) ** 2).sum(1)
    for seed in range(4):
        model = Small(x.shape[1], seed)
        esm, esm_slope = expected(explicit_score_matching(model, x, truth), p, model)
        ism, ism_slope = expected(implicit_score_matching(model, x), p, model)
        close(ism - esm, -information, 1e-8)  # no theta in it
        close(ism_slope, esm_slope, 1e-8)
    close(p @ implicit_score_matching(truth, x), -information, 1e-8)  # its minimum


@pytest.mark.equation("score.implicit")
def test_slices_along_all_signs_are_implicit_matching():
    model, x = Small(2, seed=0), randn(6, 2)
    v = SIGNS[:, None].expand(4, 6, 2)
    close(sliced_score_matching(model, x, v), implicit_score_matching(model, x), 1e-12)
    close(implicit_score_matching(model, x, v), implicit_score_matching(model, x), 1e-12)
    one = sliced_score_matching(model, x, v[:1])  # along (1, 1): (v s)^2 + 2 v J v
    jacobian = torch.stack([torch.autograd.functional.jacobian(model, row) for row in x])
    close(one, model(x).sum(1) ** 2 + 2 * jacobian.sum((1, 2)), 1e-12)


def noised_grid(oracle, sigma):
    """Quadrature over x ~ p and eps: (x, eps, weights)."""
    x, p = grid(oracle, 0.0)
    eps = torch.arange(-8, 8, 0.2, dtype=F64)
    i, j = torch.cartesian_prod(torch.arange(len(x)), torch.arange(len(eps))).T
    return x[i], eps[j, None], p[i] * normal(eps, 0.0, 1.0)[j] * 0.2


@pytest.mark.equation("score.dsm")
def test_denoising_matching_is_explicit_matching_of_the_noised_density_but_for_one_constant():
    oracle, sigma = line(), 0.5
    x, eps, weight = noised_grid(oracle, sigma)
    noised, p = grid(oracle, sigma)
    truth = score_at(oracle, sigma)
    constant = 1 / sigma**2 - p @ (truth(noised) ** 2).flatten()  # E|score of the kernel|^2 - E|score|^2
    for seed in range(4):
        model = Small(1, seed)
        esm, esm_slope = expected(explicit_score_matching(model, noised, truth), p, model)
        dsm, dsm_slope = expected(denoising_score_matching(model, x, sigma, eps), weight, model)
        close(dsm - esm, constant, 1e-10)  # E004-07: equal only up to this
        close(dsm_slope, esm_slope, 1e-10)
    assert constant > 1
    close(weight @ denoising_score_matching(truth, x, sigma, eps), constant, 1e-10)  # the floor is not 0


@pytest.mark.equation("score.kernel")
def test_the_score_of_the_kernel_is_minus_the_noise_over_sigma():
    x0, eps = randn(4, 2), randn(4, 2, seed=1)
    for process, t in ((VE(), torch.tensor(0.7, dtype=F64)), (DiscreteVP(linear_beta(1000)), times(2, 60, 400, 1000))):
        x_t = q_sample(process, x0, t, eps).requires_grad_()
        a, b = (expand(c, x_t) for c in process.marginal(t))
        log_kernel = -((x_t - a * x0) ** 2) / (2 * b**2)
        (score,) = torch.autograd.grad(log_kernel.sum(), x_t)
        truth = Prediction(x_t.detach(), a, b, x0, eps)
        assert ((truth.score - score).abs() <= 1e-12 * (1 + 1 / b**2)).all()  # x_t - a x0 cancels, over b^2
        close(truth.score, -eps / b, 1e-13)  # E000-21 prints +
    # so the model that answers with it has nothing left to learn, and the printed sign has
    kernel = lambda noised: (x0 - noised) / 0.49
    close(denoising_score_matching(kernel, x0, 0.7, eps), torch.zeros(4), 1e-25)
    close(denoising_score_matching(lambda noised: -kernel(noised), x0, 0.7, eps), 4 * (eps**2).sum(1) / 0.49, 1e-12)


# Noise


@pytest.mark.equation("score.perturbed")
def test_noise_adds_its_variance_to_every_mode_and_is_a_convolution():
    oracle, sigma, x = line(), 0.6, randn(20, 1)
    density = oracle.log_prob(x, torch.tensor(sigma, dtype=F64)).exp()
    by_hand = 0.4 * normal(x, -1.5, 0.5**2 + sigma**2) + 0.6 * normal(x, 1.0, 0.4**2 + sigma**2)
    close(density, by_hand.flatten(), 1e-13)
    clean, p = grid(oracle, 0.0)
    close(density, normal(x, clean.T, sigma**2) @ p, 1e-10)
    x0, eps = randn(20, 1), randn(20, 1, seed=1)
    close(q_sample(oracle.process, x0, torch.tensor(sigma, dtype=F64), eps), x0 + sigma * eps, 1e-15)


@pytest.mark.equation("score.low_density")
def test_where_there_are_no_data_the_fit_is_arbitrary_and_noise_helps():
    oracle = GaussianMixtureOracle(VE(), [[-3.0], [3.0]], [0.3, 0.3], [0.4, 0.6])
    data = oracle.sample(500, torch.Generator().manual_seed(0))[0]
    fitted = DatasetOracle(VE(), data)  # the minimiser of denoising matching on these 500 points, over all functions
    x = torch.linspace(-5, 5, 201, dtype=F64)[:, None]
    means = []
    for sigma in (0.1, 0.2, 0.4, 0.8, 1.6):
        error = (score_at(fitted, sigma)(x) - score_at(oracle, sigma)(x)).abs().flatten()
        log_density = oracle.log_prob(x, torch.tensor(sigma, dtype=F64))
        seen, unseen = error[log_density > -3], error[log_density < -8]  # of 500 points, 25 and 0.2 a unit of x
        assert not len(unseen) or unseen.mean() > 4 * seen.mean()
        means.append(error.mean())
    assert all(a > 2 * b for a, b in pairwise(means)), means


# All levels at once


class Levels(nn.Module):
    """eps = slope_i x + offset_i at level i: the best that a line can do at each."""

    def __init__(self, sigmas):
        super().__init__()
        self.sigmas = sigmas
        self.slope, self.offset = (nn.Parameter(torch.zeros(len(sigmas))) for _ in range(2))

    def forward(self, x, clock):
        i = (clock[:, None] - 250 * self.sigmas.log()).abs().argmin(1)
        return self.slope[i, None] * x + self.offset[i, None]


def small_ve():
    """A network on VE that knows nothing, for identities that hold for all: eps = tanh."""
    net = Small(2, seed=3)
    return Denoiser(lambda x, clock: net(x) * (1 + clock[:, None] / 1000).tanh(), VE())


@pytest.mark.equation("ncsn.objective", "ncsn.eps_form")
def test_one_level_is_sigma_squared_times_denoising_matching_and_in_the_noise_it_is_plain():
    model, x0, eps = small_ve(), randn(5, 2), randn(5, 2, seed=1)
    sigmas = geometric_sigmas(5, 0.05, 8.0)[:-1]
    weight = lambda process, t: process.marginal(t)[1] ** 2
    whole = denoising_loss(model, x0, sigmas, eps, target="score", weight=weight)
    for i, sigma in enumerate(sigmas):
        one = denoising_score_matching(
            lambda x, s=sigma: model(x, s).score, x0[i : i + 1], sigma.item(), eps[i : i + 1]
        )
        close(whole[i : i + 1], sigma**2 * one / 2, 1e-12)  # a mean over the two dimensions
    close(denoising_loss(model, x0, sigmas, eps), whole, 1e-12)  # s' = -sigma s
    close(
        denoising_loss(model, x0, sigmas, eps), ((eps - model(x0 + sigmas[:, None] * eps, sigmas).eps) ** 2).mean(1), 0
    )


@pytest.mark.equation("ncsn.objective", "ncsn.eps_form")
def test_every_level_of_gaussian_data_has_its_floor():
    oracle, (z, w) = GaussianOracle(VE(), 1.3, 0.25), gauss_hermite(6)
    x0, eps = torch.cartesian_prod(1.3 + 0.5 * z, z).T
    for sigma in geometric_sigmas(5, 0.05, 8.0)[:-1]:
        loss = denoising_loss(oracle, x0[:, None], sigma, eps[:, None])
        close(torch.cartesian_prod(w, w).prod(1) @ loss, 0.25 / (0.25 + sigma**2), 1e-12)


@pytest.mark.equation("ncsn.train", "ncsn.objective")
def test_training_finds_the_slope_of_every_level():
    sigmas = geometric_sigmas(3, 0.2, 3.0)[:-1]
    x0 = 0.7 + 0.5 * randn(100_000, 1, dtype=torch.float32)
    model = Denoiser(Levels(sigmas), VE())
    list(fit(model, x0, Recipe(600, batch_size=1024, lr=0.05, sample_t=level_times(3, 0.2, 3.0))))
    slope = sigmas / (0.25 + sigmas**2)
    found = model.net.slope.detach().double() / (1 + sigmas**2).sqrt()  # the network sees x / sqrt(1 + sigma^2)
    torch.testing.assert_close(found, slope, rtol=0, atol=0.03)  # 2e5 draws a level, 1e3 a step: as in test_training
    torch.testing.assert_close(model.net.offset.detach().double(), -0.7 * slope, rtol=0, atol=0.03)


@pytest.mark.equation("ncsn.train")
def test_every_level_is_as_likely_as_the_others():
    t = level_times(12, 0.05, 8.0)(VE(), 24_000, torch.Generator().manual_seed(0))
    levels, counts = t.unique(return_counts=True)
    assert torch.equal(levels.flip(0), geometric_sigmas(12, 0.05, 8.0)[:-1]) and t.dtype == F64
    assert ((counts - 2000).abs() < 5 * 2000**0.5).all()  # five standard deviations
    again = level_times(12, 0.05, 8.0)(VE(), 24_000, torch.Generator().manual_seed(0))
    assert torch.equal(t, again)


# DDPM is NCSN


@pytest.mark.equation("score.ddpm_equiv")
def test_the_noise_in_ddpm_is_the_noise_in_ncsn_at_the_rescaled_point():
    process = DiscreteVP(linear_beta(1000))
    mixture = dict(means=[[-1.0, 0.5], [0.8, -0.6]], stds=[0.5, 0.6], weights=[0.3, 0.7])
    vp, ve, gaps = GaussianMixtureOracle(process, **mixture), GaussianMixtureOracle(VE(1e3), **mixture), []
    x0 = vp.sample(500, torch.Generator().manual_seed(0))[0]
    for t in (1, 100, 300, 600, 1000):
        ab, x = process.alpha_bar[t], q_sample(process, x0, times(t), randn(500, 2, seed=t))
        sigma = ((1 - ab) / ab).sqrt()
        close(vp(x, times(t)).eps, ve(x / ab.sqrt(), sigma).eps, 1e-12)
        close(reschedule(ve, process)(x, times(t)).eps, vp(x, times(t)).eps, 1e-10)
        gaps.append((vp(x, times(t)).eps - ve(x, sigma).eps).square().mean().sqrt().item())
    assert gaps[3] > 0.7 and gaps[4] > 0.9  # E004-13: the same input will not do, eps itself is about 1


@pytest.mark.equation("score.ddpm_equiv")
def test_l_simple_is_weighted_denoising_matching_of_the_rescaled_data():
    process, network = DiscreteVP(linear_beta(1000)), small_ve()
    x0, eps, t = randn(5, 2), randn(5, 2, seed=1), times(2, 50, 300, 700, 1000)
    sigma = ((1 - process.alpha_bar) / process.alpha_bar).sqrt()[t]
    network.process.T = 1e3
    simple = denoising_loss(reschedule(network, process), x0, t, eps)
    ncsn = denoising_loss(network, x0, sigma, eps, "score", lambda process, t: t**2)
    close(simple, ncsn, 1e-12)
