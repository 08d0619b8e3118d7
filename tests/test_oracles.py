"""Sections 0 and 6: exact models of known data, and the exact reverse kernel."""

import math
from itertools import pairwise

import pytest
import torch
from affine import affine_law, last, sampler_law
from exact import (
    DATA,
    F64,
    ancestral_steps,
    close,
    log_normal,
    normal,
    propagate,
    randn,
    running_product,
    times,
)
from torch.distributions import MultivariateNormal

from diffusion_edu.gaussian import normal_log_prob
from diffusion_edu.guidance import classifier_free
from diffusion_edu.oracles import DatasetOracle, GaussianMixtureOracle, GaussianOracle
from diffusion_edu.process import VE, VESDE, VPSDE, DiscreteVP, SubVPSDE, jump, posterior, q_sample
from diffusion_edu.samplers import kernel_step, make_ddpm_step, sample
from diffusion_edu.schedules import linear_beta

MIXTURE = dict(means=[[-1.0, 0.3], [0.5, -0.4], [2.0, 1.0]], stds=[0.2, 0.5, 0.3], weights=[0.5, 0.2, 0.3])


def ddpm():
    return DiscreteVP(linear_beta(1000))


def every_process():
    return [ddpm(), VPSDE(), SubVPSDE(), VESDE(), VE()]


def some_times(process):
    return [times(v) if process.discrete else torch.tensor(v / 1000 * process.T, dtype=F64) for v in (5, 300, 1000)]


def score_by_autograd(oracle, x, t):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(oracle.log_prob(x, t).sum(), x)[0]


def one(value):
    return torch.tensor([[value]], dtype=F64)


# Section 0


@pytest.mark.equation("gt.gaussian", "param.tweedie")
@pytest.mark.parametrize("process", every_process(), ids=lambda p: type(p).__name__)
def test_gaussian_oracle_is_tweedies_formula(process):
    oracle, x = GaussianOracle(process, *DATA), randn(6, 3)
    for t in some_times(process):
        scale, std = process.marginal(t)
        pred, score = oracle(x, t), score_by_autograd(oracle, x, t)
        close(pred.score, score, 1e-12)
        close(pred.x0, (x + std**2 * score) / scale, 1e-12)
        close(pred.eps, -std * score, 1e-12)
        close(pred.scale * pred.x0 + pred.std * pred.eps, x, 1e-12)


@pytest.mark.equation("gt.gaussian")
def test_gaussian_oracle_is_the_integral_over_the_data():
    (m, s2), process, x = DATA, ddpm(), 0.9
    oracle, grid = GaussianOracle(process, m, s2), torch.arange(-4, 7, 0.002, dtype=F64)
    for t in (20, 300, 1000):
        scale, std = process.marginal(times(t))
        joint = normal(grid, m, s2) * normal(x, scale * grid, std**2) * 0.002
        mean = (joint * grid).sum() / joint.sum()
        pred = oracle(one(x), times(t))
        close(oracle.log_prob(one(x), times(t)), joint.sum().log()[None], 1e-11)
        close(pred.x0, mean[None, None], 1e-11)
        close(oracle.var_x0(times(t)), (joint * (grid - mean) ** 2).sum() / joint.sum(), 1e-11)
        close(pred.eps, ((x - scale * mean) / std)[None, None], 1e-11)
        law_mean, law_var = oracle.law(times(t))
        close(torch.stack([law_mean, law_var]), torch.stack([scale * m, scale**2 * s2 + std**2]), 1e-15)


def test_a_mean_and_variance_for_each_dimension():
    mean, var = torch.tensor([[0.5, -1.0]], dtype=F64), torch.tensor([[0.2, 2.0]], dtype=F64)
    oracle, x = GaussianOracle(ddpm(), mean, var), randn(4, 1, 2)
    pred = oracle(x, times(300))
    for d in range(2):
        alone = GaussianOracle(ddpm(), mean[0, d], var[0, d])(x[..., d], times(300))
        close(pred.x0[..., d], alone.x0, 1e-15)
    close(pred.score, score_by_autograd(oracle, x, times(300)), 1e-12)


@pytest.mark.equation("gt.gmm", "score.def")
@pytest.mark.parametrize("process", every_process(), ids=lambda p: type(p).__name__)
def test_mixture_score_is_autograd_of_its_log_density(process):
    oracle, x = GaussianMixtureOracle(process, **MIXTURE), randn(6, 2)
    for t in some_times(process):
        scale, std = process.marginal(t)
        pred, score = oracle(x, t), score_by_autograd(oracle, x, t)
        tol = 1e-12 * max(1, 1 / std.item())  # what autograd rounds, amplified by the narrow components
        close(pred.score, score, tol)
        close(pred.x0, (x + std**2 * score) / scale, 1e-12)  # conjugacy by component = Tweedie
        close(pred.scale * pred.x0 + pred.std * pred.eps, x, 1e-12)


@pytest.mark.equation("gt.gmm")
def test_mixture_log_density_and_class_posterior_are_the_printed_sums():
    oracle, x, t = GaussianMixtureOracle(ddpm(), **MIXTURE), randn(5, 2), times(300)
    scale, std = oracle.process.marginal(t)
    parts = []
    for mean, s, w in zip(*MIXTURE.values(), strict=True):
        cov = (scale**2 * s**2 + std**2) * torch.eye(2, dtype=F64)
        law = MultivariateNormal(scale * torch.tensor(mean, dtype=F64), cov)
        parts.append(w * law.log_prob(x).exp())
    parts = torch.stack(parts, 1)
    close(oracle.log_prob(x, t), parts.sum(1).log(), 1e-12)
    close(oracle.class_log_prob(x, t).exp(), parts / parts.sum(1, keepdim=True), 1e-13)


@pytest.mark.equation("gt.gmm")
def test_a_component_asked_for_is_a_gaussian_and_dropping_takes_the_wish_back():
    oracle, x, t = GaussianMixtureOracle(ddpm(), **MIXTURE), randn(3, 2), times(300)
    pred = oracle(x, t, y=torch.tensor([0, 1, 2]))
    for k in range(3):
        alone = GaussianOracle(ddpm(), torch.tensor(MIXTURE["means"][k]), MIXTURE["stds"][k] ** 2)(x[k : k + 1], t)
        close(pred.x0[k : k + 1], alone.x0, 1e-7)  # the means above are float32
    dropped = oracle(x, t, y=torch.tensor([0, 1, 2]), drop=torch.tensor([True, True, False]))
    close(dropped.x0[:2], oracle(x, t).x0[:2], 1e-15)
    close(dropped.x0[2], pred.x0[2], 0)


@pytest.mark.equation("cg.tempered", "cfg.tempered")
def test_the_gradient_of_the_tempered_density_is_the_guided_score():
    oracle, y = GaussianMixtureOracle(ddpm(), **MIXTURE), torch.tensor([0, 1, 2, 1, 0, 2])
    for t in (times(20), times(300), times(20, 300, 600, 800, 900, 1000)):
        for w in (0.0, 0.4, 1.0, 3.0):
            x = randn(6, 2).requires_grad_()
            slope = torch.autograd.grad(oracle.tempered_log_density(x, t, y, w).sum(), x)[0]
            guided = classifier_free(oracle, w, y=y)(x.detach(), t)
            close(slope, -guided.eps / guided.std, 1e-11)


@pytest.mark.equation("cfg.tempered")
def test_both_factorings_of_the_tempered_density_differ_by_a_constant():
    oracle, x, t = GaussianMixtureOracle(ddpm(), **MIXTURE), randn(50, 2), times(300)
    for k in range(3):
        y = torch.full((50,), k)
        posterior, log_weight = oracle.class_log_prob(x, t)[:, k], math.log(MIXTURE["weights"][k])
        scale, std = oracle.process.marginal(t)
        cov = (scale**2 * MIXTURE["stds"][k] ** 2 + std**2) * torch.eye(2, dtype=F64)
        given = MultivariateNormal(scale * torch.tensor(MIXTURE["means"][k], dtype=F64), cov).log_prob(x)
        for w in (1.0, 3.0):
            gap = oracle.tempered_log_density(x, t, y, w) - (given + (w - 1) * posterior)
            close(gap, torch.full((50,), log_weight, dtype=F64), 1e-12)
        close(oracle.tempered_log_density(x, t, y, 0.0), oracle.log_prob(x, t), 1e-13)


def test_mixture_samples_have_the_mixtures_moments():
    x, k = GaussianMixtureOracle(ddpm(), **MIXTURE).sample(40_000, torch.Generator().manual_seed(0))
    means, stds, w = (torch.tensor(MIXTURE[n], dtype=F64) for n in ("means", "stds", "weights"))
    share = torch.bincount(k, minlength=3) / 40_000
    assert ((share - w).abs() < 4 * (w * (1 - w)).sqrt() / 200).all()  # four standard errors
    for i in range(3):
        error = x[k == i].mean(0) - means[i]
        assert (error.abs() < 4 * stds[i] / (k == i).sum().sqrt()).all()
    assert GaussianMixtureOracle(ddpm(), **MIXTURE).sample(0)[0].shape == (0, 2)


def test_dataset_oracle_is_a_mixture_of_points():
    data = randn(5, 2)
    for process in (ddpm(), VE()):
        t = times(300) if process.discrete else torch.tensor(0.5, dtype=F64)
        x = q_sample(process, data, t, randn(5, 2, seed=1))
        points = GaussianMixtureOracle(process, data, torch.full((5,), 1e-9))
        exact = DatasetOracle(process, data)
        close(exact(x, t).x0, points(x, t).x0, 1e-10)
        images = DatasetOracle(process, data.reshape(5, 1, 2))
        close(images(x.reshape(5, 1, 2), t.expand(5)).eps.flatten(1), exact(x, t).eps, 1e-13)


@pytest.mark.equation("gt.affine_propagation")
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_impulses_and_recursion_give_the_same_law(variance):
    from diffusion_edu.samplers import beta, beta_tilde

    process = DiscreteVP(linear_beta(50, 1e-3, 0.3))
    step = make_ddpm_step({"beta": beta, "beta_tilde": beta_tilde}[variance])
    law = sampler_law(step, GaussianOracle(process, *DATA), process.grid(50))
    close(torch.tensor(law), torch.tensor(propagate(ancestral_steps(process.beta.tolist(), variance))), 1e-12)


@pytest.mark.equation("gt.affine_propagation", "rev.true_conditional", "ddpm.sample_alg2")
def test_the_exact_reverse_chain_returns_the_data_after_a_thousand_steps():
    oracle = GaussianOracle(ddpm(), *DATA)
    mean_T, var_T = oracle.law(times(1000))
    start = lambda noise, like: mean_T + var_T.sqrt() * noise(like)
    grid = oracle.process.grid(1000)
    mean, var = affine_law(lambda noise, like: last(sample(kernel_step, oracle, start(noise, like), grid, noise)))
    assert abs(mean - 1.3) < 1e-10 and abs(var - 0.25) < 1e-10
    mean, var = sampler_law(kernel_step, oracle, grid)  # from N(0, 1): alpha_bar_T = 4e-5 is missing
    assert abs(mean - 1.3) < 1e-4 and abs(var - 0.25) < 1e-4


@pytest.mark.equation("gt.affine_propagation")
def test_misprinted_coefficients_miss_the_data_by_far():
    beta = linear_beta(1000).tolist()
    ab = running_product(beta)
    right = list(ancestral_steps(beta, "beta_tilde"))
    assert abs(propagate(right)[1] - 0.25) < 0.01

    def with_mean(of_x, of_eps):
        return propagate((a, of_x(t), of_eps(t), s) for t, (a, _, _, s) in zip(range(1000, 0, -1), right, strict=True))

    _, var = with_mean(lambda t: ab[t] ** -0.5, lambda t: -beta[t] / (ab[t] * (1 - ab[t])) ** 0.5)  # E000-09
    assert not math.isfinite(var) or var > 1e100
    _, var = with_mean(lambda t: (1 - beta[t]) ** -0.5, lambda t: -((beta[t] / (1 - beta[t])) ** 0.5))  # E002-06
    assert var == pytest.approx(0.0305, rel=0.1)

    def x0_form(t):  # E001-08: 1 - alpha_bar_t printed for 1 - alpha_bar_{t-1} in the weight of x_t
        weight = beta[t] * ab[t - 1] ** 0.5 / (1 - ab[t])
        return (1 - beta[t]) ** 0.5 + weight / ab[t] ** 0.5, -weight * ((1 - ab[t]) / ab[t]) ** 0.5

    mean, var = with_mean(lambda t: x0_form(t)[0], lambda t: x0_form(t)[1])
    assert mean == pytest.approx(2.5e3, rel=0.1) and var == pytest.approx(1.6e6, rel=0.1)


# Section 6


@pytest.mark.equation("rev.kernel", "rev.true_conditional")
@pytest.mark.parametrize("process", every_process(), ids=lambda p: type(p).__name__)
def test_the_reverse_kernel_is_gaussian_regression(process):
    (m, s2), oracle = DATA, GaussianOracle(process, *DATA)
    low, t, _ = some_times(process)
    for s in (low, t * 0):
        (a_s, b_s), (a_t, b_t), (k, _) = process.marginal(s), process.marginal(t), jump(process, t, s)
        var_s, var_t = a_s**2 * s2 + b_s**2, a_t**2 * s2 + b_t**2
        slope = k * var_s / var_t  # Cov(x_s, x_t) = k Var x_s
        mean, sigma = oracle.reverse_kernel(one(0.9), t, s)
        close(mean, one((a_s * m + slope * (0.9 - a_t * m)).item()), 1e-12)
        close(sigma**2, (var_s - slope * k * var_s).expand_as(sigma), 1e-12)


@pytest.mark.equation("rev.true_conditional")
def test_the_reverse_variance_is_beta_tilde_for_a_point_and_beta_for_a_unit_bell():
    process = ddpm()
    t, x = torch.arange(2, 1001), randn(999, 1)
    mean, sigma = GaussianOracle(process, 0.0, 1.0).reverse_kernel(x, t, t - 1)
    close(sigma.flatten() ** 2 / process.beta[2:], torch.ones(999), 1e-10)
    close(mean, process.alpha[2:, None].sqrt() * x, 1e-12)
    _, sigma = GaussianOracle(process, 0.0, 1e-30).reverse_kernel(x, t, t - 1)
    close(sigma.flatten(), posterior(process, x, x, t, t - 1)[1].flatten(), 1e-13)


def affine_kernels(oracle):
    """x_{t-1} = gain x_t + shift + sigma z of the exact kernels, for t = 1..T."""
    for t in range(1, oracle.process.T + 1):
        shift, sigma = oracle.reverse_kernel(one(0.0), times(t), times(t - 1))
        unit, _ = oracle.reverse_kernel(one(1.0), times(t), times(t - 1))
        yield (unit - shift).item(), shift.item(), sigma.item()


@pytest.mark.equation("rev.joint")
def test_the_reverse_trajectory_is_one_big_gaussian():
    oracle = GaussianOracle(DiscreteVP(linear_beta(4, 0.5, 0.9)), *DATA)
    kernels = list(affine_kernels(oracle))
    mean, mix = torch.zeros(5, dtype=F64), torch.zeros(5, 5, dtype=F64)  # x_4, x_3, ..., x_0 = mean + mix z
    mix[0, 0] = 1
    for row, (gain, shift, sigma) in enumerate(reversed(kernels), start=1):
        mean[row] = gain * mean[row - 1] + shift
        mix[row] = gain * mix[row - 1]
        mix[row, row] = sigma
    path = mean + randn(6, 5) @ mix.T
    log_prob = normal_log_prob(path[:, :1], 0.0, 1.0)
    for row in range(1, 5):
        t = times(5 - row)
        kernel_mean, sigma = oracle.reverse_kernel(path[:, row - 1 : row], t, t - 1)
        log_prob = log_prob + normal_log_prob(path[:, row : row + 1], kernel_mean, sigma**2)
    close(log_prob, MultivariateNormal(mean, mix @ mix.T).log_prob(path), 1e-11)


@pytest.mark.equation("rev.marginal")
def test_the_likelihood_is_the_integral_of_the_joint():
    oracle = GaussianOracle(DiscreteVP(linear_beta(1, 0.6, 0.6)), 0.0, 1.0)
    x0, x1 = randn(5, 1), torch.arange(-10, 10, 0.01, dtype=F64)[:, None]
    mean, sigma = oracle.reverse_kernel(x1, times(1), times(0))
    integral = (normal(x0, mean.T, sigma.T**2) @ normal(x1, 0.0, 1.0)) * 0.01
    close(integral, normal(x0, 0.0, 1.0), 1e-12)
    joint = normal(x0, mean[:1], sigma[:1] ** 2) * normal(x1[0], 0.0, 1.0)  # E004-10: the joint is no likelihood
    assert (integral - joint).abs().max() > 0.1


def true_reverse_log_density(oracle, grid, x_t, t):
    """log q(x_s | x_t) on a grid of x_s, s = t - 1, by Bayes' rule for the data's own marginals."""
    scale, std = jump(oracle.process, times(t), times(t - 1))
    evidence = oracle.log_prob(one(x_t), times(t))
    return log_normal(x_t, scale * grid, std**2) + oracle.log_prob(grid[:, None], times(t - 1)) - evidence


@pytest.mark.equation("rev.intractable")
@pytest.mark.parametrize("t", [2, 6, 10])
def test_the_true_reverse_density_is_the_posterior_averaged_over_the_data(t):
    oracle = GaussianMixtureOracle(DiscreteVP(linear_beta(10, 0.1, 0.7)), [[-1.0], [0.5], [2.0]], [0.2, 0.3, 0.25])
    x_t, x_s = 0.4, torch.linspace(-3, 4, 41, dtype=F64)
    x0 = torch.arange(-4, 5, 0.01, dtype=F64)[:, None]
    scale, std = oracle.process.marginal(times(t))
    share = normal(x_t, scale * x0, std**2).flatten() * oracle.log_prob(x0, times(0)).exp()
    mean, sigma = posterior(oracle.process, x0, torch.full_like(x0, x_t), times(t), times(t - 1))
    averaged = normal(x_s[:, None], mean.T, sigma**2) @ (share / share.sum())
    close(true_reverse_log_density(oracle, x_s, x_t, t).exp(), averaged, 1e-10)


@pytest.mark.equation("rev.sigma_choices")
def test_the_two_fixed_variances_bracket_the_right_one():
    from diffusion_edu.samplers import beta, beta_tilde

    process = ddpm()
    beta_of_t = process.beta.tolist()
    for step, printed in ((make_ddpm_step(beta), 0.25085 - 1e-4), (make_ddpm_step(beta_tilde), 0.24613)):
        _, var = sampler_law(step, GaussianOracle(process, *DATA), process.grid(1000))
        assert var == pytest.approx(printed, abs=6e-6)  # five digits; 1e-4 is the noise that t = 1 does not get
    _, var = sampler_law(kernel_step, GaussianOracle(process, *DATA), process.grid(1000))
    assert var == pytest.approx(0.25, abs=6e-6)
    pred = GaussianOracle(process)(one(0.3), times(400))
    ab = running_product(beta_of_t)
    close(beta(pred, process, times(400), times(399)), beta_of_t[400], 1e-15)
    expected = beta_of_t[400] * (1 - ab[399]) / (1 - ab[400])
    close(beta_tilde(pred, process, times(400), times(399)), expected, 1e-15)


@pytest.mark.equation("rev.sigma_choices")
def test_beta_is_optimal_for_a_unit_bell_and_beta_tilde_for_a_point():
    from diffusion_edu.samplers import beta, beta_tilde

    process, grid = ddpm(), ddpm().grid(1000)
    _, var = sampler_law(make_ddpm_step(beta), GaussianOracle(process, 0.0, 1.0), grid[:-1])
    close(var, 1.0, 1e-12)
    point = GaussianOracle(process, 0.7, 1e-24)
    mean, var = sampler_law(make_ddpm_step(beta_tilde), point, grid[:-100])  # down to t = 100
    scale, std = process.marginal(times(100))
    assert abs(mean - 0.7 * scale.item()) < 1e-2 and var == pytest.approx(std.item() ** 2, rel=1e-4)


@pytest.mark.equation("rev.small_beta")
def test_the_reverse_kernel_becomes_gaussian_as_beta_shrinks():
    grid, divergences = torch.arange(-4, 5, 0.001, dtype=F64), []
    for beta in (0.5, 0.1, 0.02, 0.004):
        table = torch.tensor([0.0, 1e-9, beta], dtype=F64)  # x_1 is the data but for 1e-9
        oracle = GaussianMixtureOracle(DiscreteVP(table), [[-1.0], [0.5], [2.0]], [0.5, 0.4, 0.5], [0.4, 0.3, 0.3])
        log_p = true_reverse_log_density(oracle, grid, 0.0, 2)
        p = log_p.exp() * 0.001
        close(p.sum(), 1.0, 1e-10)
        mean = (p * grid).sum()
        divergences.append((p * (log_p - log_normal(grid, mean, (p * (grid - mean) ** 2).sum()))).sum().item())
    assert divergences[0] > 0.01
    ratios = [a / b for a, b in pairwise(divergences)]
    assert ratios[0] > 2 and ratios[1] > 10 and ratios[2] > 50, ratios  # ever faster: towards beta^3
