"""Sections 4 and 7, and the processes of section 14: how data turn into noise, and the posterior of one step back."""

import math
from fractions import Fraction

import pytest
import torch
from exact import F64, close, gauss_hermite, log_normal, normal, randn, running_product, times
from torch.distributions import MultivariateNormal

from diffusion_edu.gaussian import normal_kl, normal_log_prob
from diffusion_edu.oracles import GaussianMixtureOracle, GaussianOracle
from diffusion_edu.process import (
    VE,
    VESDE,
    VPSDE,
    DiscreteVP,
    SubVPSDE,
    expand,
    forward_step,
    jump,
    posterior,
    q_sample,
    quadratic,
    terminal_kl,
    uniform_log_snr,
)
from diffusion_edu.schedules import cosine_beta, linear_beta, swiss_beta


def ddpm():
    """The table of most tests: DDPM's, built when it is needed."""
    return DiscreteVP(linear_beta(1000))


def short():
    """Ten steps, beta from 0.1 to 0.7."""
    return DiscreteVP(linear_beta(10, 0.1, 0.7))


def sdes():
    """One process of each continuous kind."""
    return [VPSDE(), SubVPSDE(), VESDE(), VE(), ddpm().continuous()]


def noised_chain(process, n, x0=1.0):
    """x after n forward steps: its mean for this x0, and its variance, by unit impulses."""
    x = torch.full((n + 1, 1), x0, dtype=F64)
    for t in range(1, n + 1):
        x = forward_step(process, x, times(t), torch.eye(n + 1, n, dtype=F64)[:, t - 1 : t])
    return x[-1].item(), ((x[:-1] - x[-1]) ** 2).sum().item()


# Section 4


@pytest.mark.equation("fwd.step", "fwd.marginal")
def test_sixty_single_steps_are_the_closed_form():
    process = ddpm()
    mean, var = noised_chain(process, 60)
    scale, std = process.marginal(times(60))
    close(mean, scale, 1e-14)
    close(var, std**2, 1e-14)


@pytest.mark.equation("fwd.step")
def test_sixty_single_steps_of_real_noise_have_the_closed_forms_moments():
    process, n = ddpm(), 20_000
    x = torch.full((n, 1), 1.5, dtype=F64)
    for t in range(1, 61):
        x = forward_step(process, x, times(t), randn(n, 1, seed=t))
    scale, std = (c.item() for c in process.marginal(times(60)))
    assert abs(x.mean().item() - 1.5 * scale) < 5 * std / n**0.5  # five standard errors
    assert abs(x.var().item() - std**2) < 5 * std**2 * (2 / n) ** 0.5


@pytest.mark.equation("fwd.step_dist")
def test_the_one_step_kernel_is_a_density_and_keeps_standard_normal_data():
    process, grid = ddpm(), torch.arange(-8, 8, 0.01, dtype=F64)
    t, x_s = times(1000), torch.tensor([[0.7]], dtype=F64)
    mean = forward_step(process, x_s, t, torch.zeros_like(x_s))
    std = forward_step(process, torch.zeros_like(x_s), t, torch.ones_like(x_s))
    close((normal(grid, mean, std**2).sum() * 0.01).item(), 1.0, 1e-12)  # the trapezoid is exact for a bell
    close(mean**2 / 0.7**2 + std**2, torch.ones(1, 1), 1e-15)  # Var x_t = 1 if Var x_s = 1
    close(mean, 0.98**0.5 * x_s, 1e-15)
    grid = torch.arange(-200, 200, 0.01, dtype=F64)  # E000-01: a mean that follows x_t makes no density
    printed = (normal(grid, 0.98**0.5 * grid, 0.02).sum() * 0.01).item()
    close(printed, 1 / (1 - 0.98**0.5), 1e-9)


@pytest.mark.equation("fwd.joint")
def test_the_trajectory_is_one_big_gaussian():
    process, x0 = DiscreteVP(linear_beta(4, 0.5, 0.9)), 0.8
    path = randn(3, 4)
    before = torch.cat([torch.full((3, 1), x0, dtype=F64), path], dim=1)
    log_prob = 0.0
    for t in range(1, 5):
        scale, std = jump(process, times(t), times(t - 1))
        log_prob = log_prob + normal_log_prob(before[:, t], scale * before[:, t - 1], std**2)
    ab = process.alpha_bar[1:]
    low = torch.minimum(ab[:, None], ab[None, :]), torch.maximum(ab[:, None], ab[None, :])
    covariance = (low[0] / low[1]).sqrt() * (1 - low[1])  # sqrt(ab_t / ab_s) (1 - ab_s), s <= t
    close(log_prob, MultivariateNormal(ab.sqrt() * x0, covariance).log_prob(path), 1e-12)


@pytest.mark.equation("fwd.markov_x0")
def test_knowing_the_data_adds_nothing_to_the_state_before():
    process, var_x0, t = short(), 0.25, 6
    gain = torch.eye(t + 1, t + 1, dtype=F64)  # rows: impulses of x0 and of each step's noise
    x = gain[:, :1] * var_x0**0.5
    x0, path = x, []
    for k in range(1, t + 1):
        x = forward_step(process, x, times(k), gain[:, k : k + 1])
        path.append(x)
    known = torch.cat([path[-2], x0], dim=1)
    weights = torch.linalg.solve(known.T @ known, known.T @ path[-1])  # regression of x_t on (x_{t-1}, x_0)
    close(weights.flatten(), torch.tensor([(1 - process.beta[t]).sqrt(), 0.0]), 1e-13)


@pytest.mark.equation("fwd.two_step")
def test_two_steps_merge_into_one():
    process = short()
    b1, b2 = process.beta[1].item(), process.beta[2].item()
    close((1 - b2) * b1 + b2, 1 - (1 - b1) * (1 - b2), 1e-16)
    mean, var = noised_chain(process, 2)
    close(mean, math.sqrt((1 - b1) * (1 - b2)), 1e-15)
    close(var, 1 - (1 - b1) * (1 - b2), 1e-15)
    x0, e1, e2 = randn(5, 2), randn(5, 2, seed=1), randn(5, 2, seed=2)
    x2 = forward_step(process, forward_step(process, x0, times(1), e1), times(2), e2)
    merged = (math.sqrt((1 - b2) * b1) * e1 + math.sqrt(b2) * e2) / math.sqrt(1 - (1 - b1) * (1 - b2))
    close(q_sample(process, x0, times(2), merged), x2, 1e-14)


@pytest.mark.equation("fwd.alpha_bar")
@pytest.mark.parametrize("beta", [linear_beta(1000), cosine_beta(1000), swiss_beta(40)])
def test_alpha_bar_is_the_exact_product_from_one_to_t(beta):
    process, product = DiscreteVP(beta), Fraction(1)
    assert process.alpha_bar[0] == 1 and process.beta[0] == 0 and process.alpha[0] == 1
    for t in range(1, 41):  # in fractions: no rounding at all
        product *= 1 - Fraction(beta[t].item())
        assert process.alpha_bar[t].item() == pytest.approx(float(product), rel=1e-14)
        exact = float(1 - product) ** 0.5  # not 1 - float(product): that cancels
        assert process.marginal(times(t))[1].item() == pytest.approx(exact, rel=1e-14)
    assert process.alpha_bar[-1].item() == pytest.approx(running_product(beta.tolist())[-1], rel=1e-12)
    assert (process.alpha_bar.diff() < 0).all()
    close(process.alpha_bar, torch.log1p(-beta).cumsum(0).exp(), 1e-14)


@pytest.mark.equation("fwd.alpha_bar")
def test_ten_factors_are_ten_and_not_eleven():
    ab = ddpm().alpha_bar
    assert ab[10].item() == pytest.approx(0.99811, abs=1e-5) and ab[1000].item() == pytest.approx(4.0e-5, rel=0.02)


@pytest.mark.equation("fwd.marginal")
def test_the_variance_recursion_gives_the_marginal_and_unit_variance_stays():
    process, v, total = ddpm(), 0.0, 1.0
    for t in range(1, 1001):
        beta = process.beta[t].item()
        v, total = (1 - beta) * v + beta, (1 - beta) * total + beta
        scale, std = (c.item() for c in process.marginal(times(t)))
        close(std**2, v, 1e-14)
        close(scale**2 + std**2, total, 1e-14)
    assert process.marginal(times(1))[1].item() == pytest.approx(0.01, rel=1e-12)  # E000-02: not sqrt(0.01)


@pytest.mark.equation("fwd.sample")
def test_noising_can_be_undone_when_the_noise_is_known():
    process, x0, eps = ddpm(), randn(4, 3, 2), randn(4, 3, 2, seed=1)
    t = times(1, 10, 500, 1000)
    x_t = q_sample(process, x0, t, eps)
    ab = process.alpha_bar[t].reshape(4, 1, 1)
    close((x_t - (1 - ab).sqrt() * eps) / ab.sqrt(), x0, 1e-12)  # 1e-16 / scale(T) = 2e-14
    for i in range(4):  # each row at its own time
        close(x_t[i : i + 1], q_sample(process, x0[i : i + 1], t[i], eps[i : i + 1]), 0)
    assert torch.equal(q_sample(process, x0, times(0), eps), x0)


@pytest.mark.equation("fwd.jump")
@pytest.mark.parametrize("process", [ddpm(), *sdes()], ids=lambda p: type(p).__name__)
def test_jumps_compose(process):
    n = [0, 3, 400, 1000]
    t0, s, t, u = (times(v) if process.discrete else process.T * times(v / 1000).double() for v in n)
    for a, b, c in ((t0, s, t), (s, t, u), (t0, t, u)):
        (k_ab, v_ab), (k_bc, v_bc), (k_ac, v_ac) = jump(process, b, a), jump(process, c, b), jump(process, c, a)
        close(k_ab * k_bc, k_ac, 1e-14)
        relative = (k_bc**2 * v_ab**2 + v_bc**2) / v_ac**2
        close(relative, torch.ones((), dtype=F64), 1e-12)  # log SNR to 1e-15, times its slope
    scale, std = process.marginal(u)
    close(torch.stack(jump(process, u, t0)), torch.stack([scale, std]), 1e-14)


@pytest.mark.equation("fwd.jump")
def test_a_jump_of_one_step_is_the_step():
    process = ddpm()
    t = torch.arange(1, 1001)
    scale, std = jump(process, t, t - 1)
    close(scale, process.alpha[1:].sqrt(), 1e-14)
    close(std**2 / process.beta[1:], torch.ones(1000), 1e-11)  # 1e-16 / beta_1 = 1e-12


@pytest.mark.equation("fwd.aggregate")
def test_the_noised_mixture_is_the_integral_over_the_data():
    oracle = GaussianMixtureOracle(short(), [[-1.0], [0.5], [2.0]], [0.2, 0.3, 0.25], [0.5, 0.2, 0.3])
    grid = torch.arange(-4, 5, 0.01, dtype=F64)[:, None]
    x, clean = randn(20, 1), oracle.log_prob(grid, times(0)).exp()
    for t in (1, 4, 10):
        scale, std = oracle.process.marginal(times(t))
        kernel = normal(x, scale * grid.T, std**2)
        close(oracle.log_prob(x, times(t)), (kernel @ clean * 0.01).log(), 1e-10)


@pytest.mark.equation("fwd.aggregate")
def test_drawing_data_and_then_noise_draws_from_the_noised_mixture():
    oracle = GaussianMixtureOracle(short(), [[-1.0], [2.0]], [0.2, 0.3], [0.6, 0.4])
    x0, component = oracle.sample(40_000, torch.Generator().manual_seed(0))
    x_t = q_sample(oracle.process, x0, times(3), randn(40_000, 1, seed=1))
    grid = torch.arange(-6, 8, 0.01, dtype=F64)[:, None]
    density = oracle.log_prob(grid, times(3)).exp() * 0.01
    mean = (density @ grid).item()
    second = (density @ grid**2).item()
    assert abs(x_t.mean().item() - mean) < 4 * (x_t.std().item() / 200)  # four standard errors
    assert abs((x_t**2).mean().item() - second) < 4 * ((x_t**2).std().item() / 200)
    assert abs(component.double().mean().item() - 0.4) < 4 * (0.24**0.5 / 200)


@pytest.mark.equation("fwd.prior_limit")
def test_terminal_divergence_is_the_gaussian_formula_and_small_for_ddpm():
    for process, tol in ((ddpm(), 1e-14), (short(), 1e-14), (VPSDE(), 1e-14)):
        x0 = randn(5, 3, 2)
        scale, std = process.marginal(torch.tensor(process.T, dtype=process.time_dtype))
        ab = scale.item() ** 2
        close(terminal_kl(process, x0), normal_kl(scale * x0, std**2, 0 * x0, 1.0).flatten(1).sum(1), tol)
        printed = (ab * (x0**2).flatten(1).sum(1) - 6 * ab - 6 * math.log1p(-ab)) / 2
        close(terminal_kl(process, x0), printed, 1e-14)
    assert terminal_kl(ddpm(), torch.ones(1, 1, dtype=F64)).item() == pytest.approx(2.0e-5, rel=0.02)


@pytest.mark.equation("fwd.snr")
def test_log_snr_falls_and_its_sigmoid_is_alpha_bar():
    for process in (ddpm(), DiscreteVP(cosine_beta(1000)), DiscreteVP(swiss_beta())):
        t = torch.arange(process.T + 1)
        log_snr = process.log_snr(t)
        close(log_snr.sigmoid(), process.alpha_bar, 1e-14)
        assert log_snr[0] == math.inf and (log_snr.diff() < 0).all()
        close(log_snr[1:].exp() / (process.alpha_bar / (1 - process.alpha_bar))[1:], torch.ones(process.T), 1e-10)


# Processes in continuous time


@pytest.mark.equation("sde.vp_kernel")
def test_vpsde_has_ddpms_integral_and_is_the_limit_of_its_table():
    process, t = VPSDE(), torch.linspace(0.001, 1, 1000, dtype=F64)
    scale, std = process.marginal(t)
    close(scale**2, (-(0.1 * t + 9.95 * t**2)).exp(), 1e-15)
    close(std**2, 1 - (-(0.1 * t + 9.95 * t**2)).exp(), 1e-14)
    assert process.marginal(times(0.5).double())[0].item() ** 2 == pytest.approx(0.0791, abs=1e-4)  # E000-19: not 12.65
    assert (ddpm().alpha_bar[1:] - scale**2).abs().max() < 1e-3  # O(1 / T)


@pytest.mark.equation("sde.vp", "sde.ve", "sde.subvp", "sde.vp_kernel")
@pytest.mark.parametrize("process", sdes(), ids=lambda p: type(p).__name__)
def test_drift_and_diffusion_generate_the_marginal(process):
    for fraction in (0.0103, 0.5004, 0.9997):
        t = torch.tensor(process.T * fraction, dtype=F64, requires_grad=True)
        scale, std = process.marginal(t)
        d_scale = torch.autograd.grad(scale, t, allow_unused=True)[0] if scale.requires_grad else None
        (d_var,) = torch.autograd.grad(process.marginal(t)[1] ** 2, t)
        f = process.drift(torch.ones(1, dtype=F64), t.detach())[0]  # f(x, t) = f x
        close(0.0 if d_scale is None else d_scale / scale, f, 1e-10)
        close(d_var, 2 * f * std.detach() ** 2 + process.diffusion(t.detach()) ** 2, 1e-10)


@pytest.mark.equation("sde.subvp")
def test_sub_vp_has_less_noise_than_vp():
    t = torch.linspace(0.01, 1, 100, dtype=F64)
    (scale, std), (same, more) = SubVPSDE().marginal(t), VPSDE().marginal(t)
    close(std, more**2, 1e-14)
    assert torch.equal(scale, same) and (std < more).all()


@pytest.mark.equation("sde.ve")
def test_ve_noise_is_geometric_and_its_variances_add():
    process, t = VESDE(0.01, 50.0), torch.linspace(0, 1, 11, dtype=F64)
    close(process.marginal(t)[1] ** 2, (0.01 * 5000**t) ** 2 - 0.01**2, 1e-13)
    assert (process.marginal(t)[0] == 1).all()
    assert torch.equal(VE().marginal(t)[1], t)


def test_the_joined_up_table_is_the_table_at_the_integers():
    process = DiscreteVP(swiss_beta())
    joined, t = process.continuous(), torch.arange(41)
    close(joined.marginal(t.double())[0], process.marginal(t)[0], 0)
    close(joined.marginal(t.double())[1], process.marginal(t)[1], 0)
    assert torch.equal(process.time_of(process.log_snr(t[1:])).round(), t[1:].double())
    half = joined.marginal(torch.tensor(7.5, dtype=F64))[0].log()
    close(half, (process.marginal(times(7))[0].log() + process.marginal(times(8))[0].log()) / 2, 1e-14)
    close(torch.stack(process.levels(torch.tensor(7.5, dtype=F64)))[0].log(), half, 1e-14)


def test_a_table_keeps_its_own_copy_in_float64():
    beta = linear_beta(1000)
    process = DiscreteVP(beta)
    beta[3] = 0.5
    assert process.beta[3] < 0.001
    before = process.marginal(times(500))
    for cast in (process.half(), process.to(torch.bfloat16), process.float()):
        assert all(b.dtype == F64 for b in cast.buffers())
        assert torch.equal(torch.stack(cast.marginal(times(500))), torch.stack(before))


def test_grids_hold_the_steps_asked_for():
    process = ddpm()
    for n in (1, 2, 3, 7, 9, 27, 37, 600, 999, 1000):
        for spacing in ((), (quadratic,), (uniform_log_snr(1),)):
            grid = process.grid(n, *spacing)
            assert grid.dtype == torch.int64 and len(grid) == n + 1 and grid[0] == 1000 and grid[-1] == 0
            assert (grid.diff() < 0).all()
    assert process.grid(10).tolist() == list(range(1000, -1, -100))
    assert process.grid(10, quadratic).tolist() == [1000, 810, 640, 490, 360, 250, 160, 90, 40, 10, 0]
    for beta_max in torch.linspace(5, 30, 26).tolist():  # the inverse rounds; the grid must not start beyond T
        sde = VPSDE(0.1, beta_max)
        grid = sde.grid(5, uniform_log_snr(1e-3))
        assert grid[0] == 1 and grid[-1] == 0 and abs(grid[-2] - 1e-3) < 1e-12
        close(sde.log_snr(grid[:-1]).diff().diff(), torch.zeros(3), 1e-9)


def test_training_times_cover_their_range_evenly():
    generator = torch.Generator().manual_seed(0)
    t = DiscreteVP(swiss_beta()).sample_t(40_000, generator)
    counts = torch.bincount(t, minlength=41)
    assert counts[0] == 0 and len(counts) == 41
    assert ((counts[1:] - 1000).abs() < 5 * 1000**0.5).all()  # five standard deviations of a count
    t = VPSDE().sample_t(40_000, generator)
    assert 0 < t.min() and t.max() <= 1 and abs(t.mean().item() - 0.5) < 4 * 12**-0.5 / 200
    log_t = VE().sample_t(40_000, generator).log()
    assert abs(log_t.mean().item() + 1.2) < 4 * 1.2 / 200 and abs(log_t.std().item() - 1.2) < 4 * 1.2 / 283


def test_prior_has_the_last_marginals_noise():
    ones = torch.ones_like
    close(VE(T=80.0).prior((2, 3), ones), torch.full((2, 3), 80.0), 0)
    close(ddpm().prior((2, 1, 8, 8), ones), torch.ones(2, 1, 8, 8), 3e-5)  # sqrt(1 - alpha_bar_T), in float32
    assert ddpm().prior((0, 2), ones).shape == (0, 2)


def test_the_network_sees_a_clock_from_0_to_1000():
    assert DiscreteVP(swiss_beta()).clock(times(40)).item() == 1000 and VPSDE().clock(times(0.25)).item() == 250
    assert ddpm().clock(torch.arange(1, 1001)).tolist() == list(range(1, 1001))
    t = torch.tensor([0.5, 3.0], dtype=F64)
    close(VE().clock(t), 250 * t.log(), 0)
    close(VESDE().clock(t / 4), 250 * VESDE().marginal(t / 4)[1].log(), 0)


def test_expand_shapes_one_number_per_example():
    x = randn(4, 3, 2, 2, dtype=torch.float32)
    assert expand(randn(4), x).shape == (4, 1, 1, 1) and expand(randn(4), x).dtype == torch.float32
    assert expand(torch.tensor(2.0), x).shape == () and expand(randn(4), x[:, 0, 0, 0]).shape == (4,)


# Section 7: the posterior q(x_{t-1} | x_t, x_0)


def on_a_grid(process, x0, x_t, t, points=4001, width=10.0):
    """Bayes' rule as it stands: likelihood times prior of x_{t-1} on a grid; returns (grid, log product)."""
    ab, beta = running_product(process.beta.tolist()), process.beta[t].item()
    prior_std = math.sqrt(1 - ab[t - 1])
    center = math.sqrt(ab[t - 1]) * x0
    x = torch.linspace(center - width * prior_std, center + width * prior_std, points, dtype=F64)
    return x, log_normal(x_t, math.sqrt(1 - beta) * x, beta) + log_normal(x, center, 1 - ab[t - 1])


def one(value):
    return torch.tensor([[value]], dtype=F64)


@pytest.mark.equation("post.bayes", "post.mean", "post.var")
@pytest.mark.parametrize("t", [2, 5, 10])
def test_the_posterior_is_bayes_rule_on_a_grid(t):
    process, x0, x_t = short(), 0.6, -0.3
    x, log_product = on_a_grid(process, x0, x_t, t)
    density = log_product.exp() / (log_product.exp().sum() * (x[1] - x[0]))
    mean, sigma = posterior(process, one(x0), one(x_t), times(t), times(t - 1))
    close(density, normal(x, mean[0, 0], sigma**2), 1e-9)
    evidence = log_product.exp().sum() * (x[1] - x[0])  # the denominator: N(x_t; sqrt(ab_t) x0, 1 - ab_t)
    scale, std = process.marginal(times(t))
    close(evidence, normal(one(x_t)[0, 0], scale * x0, std**2), 1e-12)


@pytest.mark.equation("post.bayes", "post.mean", "post.var")
def test_the_posterior_of_ddpms_table_is_bayes_rule_at_the_middle():
    process, x0, x_t = ddpm(), 0.6, -0.4
    x, log_product = on_a_grid(process, x0, x_t, 500, points=40001, width=6.0)
    weight = log_product.softmax(0)
    mean, sigma = posterior(process, one(x0), one(x_t), times(500), times(499))
    close((weight * x).sum(), mean[0, 0], 1e-9)
    close((weight * (x - mean[0, 0]) ** 2).sum(), sigma**2, 1e-9)


@pytest.mark.equation("post.exponent")
def test_completing_the_square():
    process, t, x0, x_t = short(), 6, 0.6, -0.3
    ab, alpha, beta = running_product(process.beta.tolist()), process.alpha[t].item(), process.beta[t].item()
    x = randn(9).requires_grad_()
    prior = log_normal(x, math.sqrt(ab[t - 1]) * x0, 1 - ab[t - 1])
    log_product = log_normal(x_t, math.sqrt(alpha) * x, beta) + prior
    (slope,) = torch.autograd.grad(log_product.sum(), x, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    mean, sigma = posterior(process, one(x0), one(x_t), times(t), times(t - 1))
    close(curvature, (-1 / sigma**2).expand(9), 1e-11)
    precision = alpha / beta + 1 / (1 - ab[t - 1])
    linear = math.sqrt(alpha) / beta * x_t + math.sqrt(ab[t - 1]) / (1 - ab[t - 1]) * x0
    square = -(precision * x**2 - 2 * linear * x) / 2
    rest = (log_product - square).detach()
    close(rest, rest[0].expand(9), 1e-12)  # the difference does not depend on x_{t-1}
    close(linear / precision, mean[0, 0], 1e-13)


@pytest.mark.equation("post.var")
def test_posterior_variance_is_below_beta_and_vanishes_at_the_last_step():
    process = ddpm()
    t, x = torch.arange(1, 1001), randn(1000, 1)
    _, sigma = posterior(process, x, x, t, t - 1)
    ab, beta, alpha = process.alpha_bar, process.beta[1:], process.alpha[1:]
    var = sigma.flatten() ** 2
    assert var[0] == 0 and (var < beta).all()
    close(var[1:] / (beta * (1 - ab[:-1]) / (1 - ab[1:]))[1:], torch.ones(999), 1e-11)
    close(var[1:] * (alpha / beta + 1 / (1 - ab[:-1]))[1:], torch.ones(999), 1e-11)


@pytest.mark.equation("post.mean")
def test_the_posterior_mean_of_noise_free_data_is_noise_free():
    process = ddpm()
    t, x0 = torch.arange(1, 1001), randn(1000, 2)
    mean, _ = posterior(process, x0, process.alpha_bar[t].sqrt()[:, None] * x0, t, t - 1)
    close(mean, process.alpha_bar[t - 1].sqrt()[:, None] * x0, 1e-13)
    ab, beta = process.alpha_bar, process.beta
    x_t = randn(1000, 2, seed=1)
    of_x_t = process.alpha[t].sqrt() * (1 - ab[t - 1]) / (1 - ab[t])
    of_x0 = ab[t - 1].sqrt() * beta[t] / (1 - ab[t])
    mean, _ = posterior(process, x0, x_t, t, t - 1)
    close(mean, of_x_t[:, None] * x_t + of_x0[:, None] * x0, 1e-11)  # the printed weights cancel at small t


@pytest.mark.equation("post.mean_eps")
def test_the_posterior_mean_in_the_noise():
    process = ddpm()
    t, x0, eps = torch.arange(1, 1001), randn(1000, 2), randn(1000, 2, seed=1)
    x_t = q_sample(process, x0, t, eps)
    mean, _ = posterior(process, x0, x_t, t, t - 1)
    alpha, beta, ab = (c[t][:, None] for c in (process.alpha, process.beta, process.alpha_bar))
    close((x_t - beta / (1 - ab).sqrt() * eps) / alpha.sqrt(), mean, 1e-12)


@pytest.mark.equation("post.precision")
def test_precision_form_agrees_from_the_second_step_on():
    process = ddpm()
    t, x0, x_t = torch.arange(2, 1001), randn(999, 2), randn(999, 2, seed=1)
    ab, alpha, beta = process.alpha_bar, process.alpha[t], process.beta[t]
    precision = 1 / (1 - ab[t - 1]) + alpha / beta
    weighted = (ab[t - 1].sqrt() / (1 - ab[t - 1]))[:, None] * x0 + (alpha.sqrt() / beta)[:, None] * x_t
    mean, sigma = posterior(process, x0, x_t, t, t - 1)
    close(weighted / precision[:, None], mean, 1e-12)
    close(sigma.flatten() * precision.sqrt(), torch.ones(999), 1e-11)  # 1 - ab cancels at t = 2: 1e-16 / 1e-4
    mean, sigma = posterior(process, x0, x_t, times(1), times(0))  # E001-13: 1 / 0 there
    assert torch.equal(mean, x0) and sigma == 0


@pytest.mark.equation("post.chain_rule")
@pytest.mark.parametrize("process", [ddpm(), *sdes()], ids=lambda p: type(p).__name__)
def test_averaging_the_posterior_over_x_t_gives_the_marginal_of_x_s(process):
    for n_s, n_t in ((1, 2), (499, 500), (10, 500), (0, 1), (900, 1000)):
        s, t = (times(v) if process.discrete else process.T * times(v / 1000).double() for v in (n_s, n_t))
        of_x0, sigma = posterior(process, one(1.0), one(0.0), t, s)
        of_x_t, _ = posterior(process, one(0.0), one(1.0), t, s)
        (a_s, b_s), (a_t, b_t) = process.marginal(s), process.marginal(t)
        close(of_x_t**2 * b_t**2 + sigma**2, one(b_s.item() ** 2), 1e-13)
        close(of_x0 + of_x_t * a_t, one(a_s.item()), 1e-13)


@pytest.mark.equation("post.chain_rule")
def test_the_tower_holds_under_quadrature_too():
    process, x0, (z, w) = short(), 0.6, gauss_hermite(20)
    x_t = q_sample(process, torch.full((20, 1), x0, dtype=F64), times(7), z[:, None])
    mean, sigma = posterior(process, torch.full((20, 1), x0, dtype=F64), x_t, times(7), times(6))
    scale, std = process.marginal(times(6))
    close((w @ mean).item(), scale * x0, 1e-14)
    close((w @ (mean**2 + sigma**2)).item(), scale**2 * x0**2 + std**2, 1e-13)


def test_posterior_of_gaussian_data_by_regression():
    """mean and variance of x_s given (x_t, x_0), from the covariance of the three, for a long stride."""
    process, data = ddpm(), GaussianOracle(ddpm(), 0.0, 0.25)
    s, t = times(250), times(900)
    (a_s, b_s), (a_t, b_t), (k, _) = process.marginal(s), process.marginal(t), jump(process, t, s)
    var = data.var
    c_ss, c_tt, c_st = a_s**2 * var + b_s**2, a_t**2 * var + b_t**2, k * (a_s**2 * var + b_s**2)
    given = torch.tensor([[c_tt, a_t * var], [a_t * var, var]])
    weights = torch.linalg.solve(given, torch.stack([c_st, a_s * var]))
    of_x0, sigma = posterior(process, one(1.0), one(0.0), t, s)
    of_x_t, _ = posterior(process, one(0.0), one(1.0), t, s)
    close(torch.stack([of_x_t[0, 0], of_x0[0, 0]]), weights, 1e-12)
    close(sigma**2, c_ss - weights @ torch.stack([c_st, a_s * var]), 1e-12)


# Ends of the range


def test_times_and_log_snr_invert_each_other_down_to_the_smallest_times():
    t = torch.logspace(-12, 0, 40, dtype=torch.float64)
    for process in (VPSDE(), SubVPSDE(), VESDE(), VE()):
        assert ((process.time_of(process.log_snr(t)) - t) / t).abs().max() < 1e-9  # of the logarithm: 1e-15 * 60
    assert VPSDE().grid(5, uniform_log_snr(1e-10))[-2] == pytest.approx(1e-10, rel=1e-9)


def test_a_table_without_signal_at_T_stays_one_when_it_is_joined_up():
    joined = DiscreteVP(cosine_beta(10, max_beta=1.0)).continuous()
    assert joined.zero_terminal_snr and not ddpm().continuous().zero_terminal_snr
    scale, std = DiscreteVP(torch.tensor([0.0, 1.0])).continuous().marginal(torch.tensor([0.0, 1.0]).double())
    assert scale.tolist() == [1, 0] and std.tolist() == [0, 1]


def test_terminal_kl_does_not_cancel_in_float32():
    process, x0 = DiscreteVP(cosine_beta(1000)), randn(4, 2)
    assert torch.allclose(terminal_kl(process, x0.float()).double(), terminal_kl(process, x0), rtol=1e-5, atol=0)
