"""Section 14: from the chain to the SDE, its kernels, the way back, the probability flow, predictor and corrector."""

import math
from decimal import Decimal, getcontext
from itertools import pairwise

import numpy as np
import pytest
import torch
from affine import affine_law, last
from exact import DATA, F64, close, randn, running_product, slope, times
from modes import MEANS, STD, WEIGHTS, FastThreeModes, modes, three_modes
from scipy.integrate import solve_ivp
from torch import nn

from diffusion_edu.denoiser import READINGS, Denoiser
from diffusion_edu.guidance import trace
from diffusion_edu.losses import denoising_loss
from diffusion_edu.oracles import GaussianMixtureOracle, GaussianOracle
from diffusion_edu.process import VE, VESDE, VPSDE, DiscreteVP, SubVPSDE, uniform_log_snr
from diffusion_edu.samplers import (
    brownian_path,
    chain,
    euler_maruyama_path,
    euler_maruyama_step,
    flow,
    make_corrector_step,
    make_ddpm_step,
    noises,
    probability_flow,
    reverse_diffusion_step,
    reverse_sde,
    rk4_step,
    sample,
)
from diffusion_edu.samplers.sde import rk4
from diffusion_edu.schedules import cosine_beta, linear_beta, swiss_beta


def real(t):
    return torch.tensor(t, dtype=F64)


def plane(process):
    return GaussianMixtureOracle(process, [[-1.0, 0.5], [0.8, -0.6]], [0.5, 0.6], [0.3, 0.7])


# The Wiener process and the chain


@pytest.mark.equation("sde.wiener")
def test_brownian_increments_are_independent_with_variance_dt():
    t = real([0.0, 0.1, 0.5, 0.6, 2.0])
    impulses = iter(torch.eye(4, dtype=F64))
    gains = brownian_path(t, torch.zeros(4, dtype=F64), lambda x: next(impulses))  # of each increment's own noise
    close(gains @ gains.T, torch.minimum(t[:, None], t), 1e-15)  # Cov(w_s, w_t) = min(s, t)
    paths = brownian_path(t, torch.zeros(20_000, 1, dtype=F64), noises(0))
    z = paths.diff(dim=0) / t.diff().sqrt()[:, None, None]
    assert (paths[0] == 0).all() and (z.mean(1).abs() < 4 / 20_000**0.5).all()  # four standard errors
    close(z[..., 0] @ z[..., 0].T / 20_000, torch.eye(4), 4 * (2 / 20_000) ** 0.5)


@pytest.mark.equation("sde.rescale")
def test_a_table_joined_up_keeps_its_alpha_bar_and_beta_belongs_to_the_step_that_ends_there():
    table = DiscreteVP(linear_beta(1000))
    sde, t = table.continuous(), torch.arange(1, 1001)
    for inside in (t.double(), t.double() - 0.999):  # one rate for the whole step (t - 1, t]
        close(sde.diffusion(inside) ** 2, -torch.log1p(-table.beta[1:]), 1e-14)
    close((-(sde.diffusion(t.double()) ** 2).cumsum(0)).exp(), table.alpha_bar[1:], 1e-13)
    close(1000 * table.beta[1:], VPSDE().rate(t / 1000), 0.02)  # beta(t / T) = T beta_t, up to 1 / T of its 19.9
    late = running_product([0.0, *table.beta[:-1].tolist()])[-1]  # E000-22: every beta one step late
    assert late == pytest.approx(4.118e-5, rel=1e-3) and table.alpha_bar[-1].item() == pytest.approx(4.036e-5, rel=1e-3)


@pytest.mark.equation("sde.limit")
def test_the_product_tends_to_the_exponential_of_the_integral_at_first_order():
    sde, errors = VPSDE(), []
    for n in (100, 200, 400):
        t = torch.arange(n, dtype=F64) / n
        product = torch.log1p(-sde.rate(t[: n // 2]) / n).sum().exp()  # of 1 - beta(t) dt, to t = 1/2
        errors.append((product - sde.marginal(real(0.5))[0] ** 2).item())
    assert errors[0] / errors[1] == pytest.approx(2.03, abs=0.01) and abs(errors[1] / errors[2] - 2) < 0.02
    b = 0.01 * torch.logspace(0, -2, 3, dtype=F64)  # and sqrt(1 - b) = 1 - b / 2 - b^2 / 8 - ...
    close(((1 - b).sqrt() - (1 - b / 2)) / (-(b**2) / 8), torch.ones(3), 0.01)


@pytest.mark.equation("sde.general")
@pytest.mark.parametrize("sde", [VPSDE(), SubVPSDE(), VESDE(sigma_max=2.0)], ids=lambda p: type(p).__name__)
def test_euler_maruyama_forward_has_first_order_moments(sde):
    def law(n):
        start = lambda noise, like: DATA[0] + DATA[1] ** 0.5 * noise(like)
        grid = torch.linspace(0, 0.8, n + 1, dtype=F64)
        return affine_law(lambda noise, like: euler_maruyama_path(sde, start(noise, like), grid, noise)[-1])

    (a, b), counts = sde.marginal(real(0.8)), (100, 200, 400)
    exact = (a * DATA[0], a**2 * DATA[1] + b**2)
    errors = [[abs(found - truth) for found, truth in zip(law(n), exact, strict=True)] for n in counts]
    for of_n in zip(*errors, strict=True):
        assert max(of_n) < 1e-14 or abs(slope(counts, of_n) - 1) < 0.1  # VE's mean is exact


# Kernels


def every_sde():
    return [VPSDE(), SubVPSDE(), VESDE(), VE()]


@pytest.mark.equation("sde.vp", "sde.ve", "sde.subvp", "sde.vp_kernel")
@pytest.mark.parametrize("sde", every_sde(), ids=lambda p: type(p).__name__)
def test_the_moment_equations_integrate_to_the_kernel(sde):
    """dm/dt = f m and dv/dt = 2 f v + g^2, from (1, 0), by scipy: another integrator, another path."""

    def moments(t, y):
        f, g = sde.drift(torch.ones(1, dtype=F64), real(t)).item(), sde.diffusion(real(t)).item()
        return [f * y[0], 2 * f * y[1] + g**2]

    y = np.array([1.0, 0.0])
    for t, s in pairwise([0.0, 1e-3, 0.037, 0.31, 0.8, 1.0]):
        y = solve_ivp(moments, (sde.T * t, sde.T * s), y, "DOP853", rtol=1e-11, atol=1e-13).y[:, -1]
        scale, std = sde.marginal(real(sde.T * s))
        close(torch.tensor(y), torch.stack([scale, std**2]), 1e-8)
    if isinstance(sde, VPSDE) and not isinstance(sde, SubVPSDE):
        close(scale**2 + std**2, real(1.0), 1e-15)  # unit variance stays


@pytest.mark.equation("sde.vp_kernel", "sde.ve", "sde.subvp")
def test_the_smallest_noise_keeps_its_digits():
    getcontext().prec = 40
    t = Decimal(1e-6)
    integral = Decimal(0.1) * t + (Decimal(20) - Decimal(0.1)) * t * t / 2
    gone = 1 - (-integral).exp()
    beta = Decimal(linear_beta(1000)[1].item())
    exact = {
        VPSDE(): gone.sqrt(),
        SubVPSDE(): gone,
        VESDE(0.01, 50.0): Decimal(0.01) * ((2 * t * (Decimal(50) / Decimal(0.01)).ln()).exp() - 1).sqrt(),
        VE(): t,
        DiscreteVP(linear_beta(1000)).continuous(): (1 - (t * (1 - beta).ln()).exp()).sqrt(),
    }
    for sde, std in exact.items():
        for dtype in (torch.float32, F64):
            found = sde.marginal(torch.tensor(1e-6, dtype=dtype))[1]
            assert abs(found.float().item() / float(std) - 1) < 1e-6  # sqrt(1 - exp(-1e-7)) in float32: 8 % off, or 0
    assert abs(found.item() / float(std) - 1) < 1e-13


# The way back


def moments_back(drift, diffusion, law, grid):
    """Exact (mean, variance) of x_s = x_t - drift dt + diffusion sqrt(dt) z along a grid, for an affine drift."""
    t, dt = grid[:-1], -grid.diff()
    offset = drift(torch.zeros(len(t), 1, dtype=F64), t).flatten()
    gain = drift(torch.ones(len(t), 1, dtype=F64), t).flatten() - offset
    mean, var = law
    for a, b, v in zip(
        (1 - gain * dt).tolist(), (offset * dt).tolist(), (diffusion(t) ** 2 * dt).tolist(), strict=True
    ):
        mean, var = a * mean - b, a**2 * var + v
    return mean, var


@pytest.mark.equation("sde.reverse", "sde.reverse_vp")
@pytest.mark.parametrize("eta", [1.0, 0.0, 0.5, 2.0])
def test_with_the_exact_score_the_way_back_ends_at_the_data_whatever_the_noise(eta):
    oracle = GaussianOracle(VPSDE(), *DATA)
    law = [c.item() for c in oracle.law(real(1.0))]
    gaps = []
    for n in (5_000, 10_000, 20_000):
        found = moments_back(*reverse_sde(oracle.process, oracle, eta), law, torch.linspace(1, 0, n + 1, dtype=F64))
        gaps.append(max(abs(f - d) for f, d in zip(found, DATA, strict=True)))
    assert gaps[-1] < 1e-4
    assert abs(slope((5_000, 10_000, 20_000), gaps) - 1) < 0.1  # and on to 0


@pytest.mark.equation("sde.reverse_vp")
def test_the_reverse_vp_sde_is_written_with_beta_alone():
    oracle, x, t = plane(VPSDE()), randn(5, 2), real([0.01, 0.2, 0.5, 0.7, 1.0])
    drift, diffusion = reverse_sde(oracle.process, oracle)
    beta = (0.1 + 19.9 * t)[:, None]
    close(drift(x, t), -beta / 2 * x - beta * oracle(x, t).score, 1e-12)
    close(diffusion(t), beta.flatten().sqrt(), 1e-15)
    close(probability_flow(oracle)(x, t), -beta / 2 * x - beta / 2 * oracle(x, t).score, 1e-12)


@pytest.mark.equation("score.pc", "sde.reverse")
def test_reverse_diffusion_is_the_papers_two_predictors():
    x, z = randn(3, 2), randn(3, 2, seed=1)
    table, ve = plane(DiscreteVP(linear_beta(1000))), plane(VE())
    for t in (2, 500, 1000):
        b, s = table.process.beta[t], table(x, times(t)).score
        by_hand = (2 - (1 - b).sqrt()) * x + b * s + b.sqrt() * z
        close(reverse_diffusion_step(table, x, times(t), times(t - 1), lambda x: z), by_hand, 1e-12)
    t, s = real(0.8), real(0.5)
    by_hand = x + (0.8**2 - 0.5**2) * ve(x, t).score + (0.8**2 - 0.5**2) ** 0.5 * z
    close(reverse_diffusion_step(ve, x, t, s, lambda x: z), by_hand, 1e-13)
    assert reverse_diffusion_step(ve, x, t, t * 0, None).isfinite().all()  # the last step draws nothing


# Score models


@pytest.mark.equation("sde.score_model", "score.def")
@pytest.mark.parametrize("process", [VPSDE(), VE(), DiscreteVP(linear_beta(1000))], ids=lambda p: type(p).__name__)
def test_whatever_a_network_predicts_it_is_a_score_model(process):
    oracle, x = plane(process), randn(3, 2).requires_grad_()
    t = (torch.tensor([0.1, 0.5, 0.9]) * process.T).to(process.time_dtype)  # a time for each row
    (exact,) = torch.autograd.grad(oracle.log_prob(x, t).sum(), x)
    x = x.detach()
    for predicts in READINGS:
        model = Denoiser(lambda x_in, clock, p=predicts: getattr(oracle(x, t), p), process, predicts)
        close(model(x, t).score, exact, 1e-11)


def silent(process):
    """A model that says eps = 0 everywhere: its loss is the energy of the target."""
    return Denoiser(lambda x, clock: 0 * x, process)


@pytest.mark.equation("sde.dsm_loss")
def test_weighted_by_one_minus_alpha_bar_the_target_has_energy_one_and_is_the_noise():
    model, x0, eps, t = silent(VPSDE()), randn(6, 3), randn(6, 3, seed=1), torch.logspace(-6, 0, 6, dtype=F64)
    weight = lambda process, t: process.marginal(t)[1] ** 2  # 1 - alpha_bar
    close(denoising_loss(model, x0, t, eps, "score", weight), (eps**2).mean(1), 1e-12)
    close(denoising_loss(model, x0, t, eps), (eps**2).mean(1), 1e-12)  # d, over d
    network = nn.Linear(3, 3, dtype=F64)
    model = Denoiser(lambda x, clock: network(x).tanh(), VPSDE())
    close(denoising_loss(model, x0, t, eps), denoising_loss(model, x0, t, eps, "score", weight), 1e-12)


@pytest.mark.equation("sde.dsm_loss")
def test_without_the_weight_the_energy_of_the_target_has_no_limit():
    nodes, w = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(60))
    one, energies = torch.ones(60, 1, dtype=F64), []
    for t_min in (1e-2, 1e-4, 1e-6):
        t = (
            math.log(t_min) * (1 - nodes) / 2
        ).exp()  # the integral over [t_min, 1], in log t; eps = 1 has mean square 1
        loss = denoising_loss(silent(VPSDE()), 0 * one, t, one, "score")
        energies.append((w * t * loss).sum().item() * -math.log(t_min) / 2)
    assert energies == pytest.approx([7.5, 46.8, 92.75], abs=0.05)  # E000-20
    assert energies[2] - energies[1] == pytest.approx(10 * math.log(100), abs=0.1)  # 1 / (beta(0) t): logarithmic


# The probability-flow ODE


def closed_form(oracle, x, t, s):
    """Where the flow takes x: with one Gaussian, every quantile stays what it is."""
    (m, v), (m_s, v_s) = oracle.law(real(t)), oracle.law(real(s))
    return m_s + (v_s / v).sqrt() * (x - m)


@pytest.mark.equation("sde.pf_ode")
@pytest.mark.parametrize("process", [*every_sde(), DiscreteVP(swiss_beta())], ids=lambda p: type(p).__name__)
def test_the_flow_of_a_gaussian_is_its_closed_form_both_ways(process):
    oracle, low, high = trace(GaussianOracle(process, *DATA)), 1e-3 * process.T, float(process.T)
    data, code = randn(6, 2), process.marginal(torch.tensor(process.T))[1] * randn(6, 2, seed=1)
    for t, s, start in ((low, high, data), (high, low, code)):
        exact = closed_form(oracle.model, start, t, s)
        close(flow(oracle, start, t, s, rtol=1e-8, atol=1e-8), exact, 1e-6)
    assert oracle.n_evaluations < 800  # two hundred each way, also where beta jumps at every integer
    assert torch.equal(flow(oracle, data, low, low), data)


@pytest.mark.equation("sde.pf_ode")
def test_runge_kutta_has_order_four_and_reaches_rounding():
    oracle, x = GaussianOracle(VPSDE(), *DATA), randn(6, 1)
    exact, counts = closed_form(oracle, x, 1.0, 1e-2), (20, 40, 80)

    def path(n):
        return list(sample(rk4_step, oracle, x, oracle.process.grid(n + 1, uniform_log_snr(1e-2))))

    error = lambda n: (path(n)[-2] - exact).abs().max().item()
    assert abs(slope(counts, [error(n) for n in counts]) - 4) < 0.3
    assert error(640) < 2e-11
    assert torch.equal(path(20)[-1], oracle(path(20)[-2], real(1e-2)).x0)  # the last step, to 0, is DDIM's
    y = x  # the lecture's own variable, upwards
    for t, s in pairwise(torch.linspace(1e-2, 1, 161, dtype=F64)):
        y = rk4(probability_flow(oracle), y, t, s)
    close(y, closed_form(oracle, x, 1e-2, 1.0), 1e-7)
    table = GaussianOracle(DiscreteVP(linear_beta(1000)), *DATA)  # beta jumps at every integer, the log SNR does not
    end = last(sample(rk4_step, table, x, table.process.grid(41, uniform_log_snr(1))[:-1]))
    close(end, closed_form(table, x, 1000, 1), 2e-5)


@pytest.mark.equation("sde.pf_ode")
def test_the_flow_of_a_mixture_carries_every_quantile_to_itself():
    process, t_min = VPSDE(), 1e-3
    oracle = GaussianMixtureOracle(process, torch.tensor(MEANS)[:, None], [STD] * 3, WEIGHTS)

    def cdf(x, t):
        a, b = process.marginal(real(t))
        spread = ((a * STD) ** 2 + b**2).sqrt()
        return sum(w * torch.special.ndtr((x - a * m) / spread) for w, m in zip(WEIGHTS, MEANS, strict=True))

    def quantile(u, t):
        low, high = torch.full_like(u, -20.0), torch.full_like(u, 20.0)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = torch.where(cdf(middle, t) < u, middle, low), torch.where(cdf(middle, t) < u, high, middle)
        return low

    x_T = torch.linspace(-2, 2, 21, dtype=F64)[:, None]
    exact = quantile(cdf(x_T, 1.0), t_min)
    assert (exact.diff(dim=0) > 1.5).sum() == 2  # two gaps are jumped: the hard part
    close(flow(oracle, x_T, 1.0, t_min, rtol=1e-8, atol=1e-8), exact, 1e-5)
    close(flow(oracle, exact, t_min, 1.0, rtol=1e-8, atol=1e-8), x_T, 1e-5)
    rk4_end = last(sample(rk4_step, oracle, x_T, process.grid(200, uniform_log_snr(t_min))[:-1]))
    close(rk4_end, exact, 1e-4)


def test_the_flow_evaluates_in_eval_mode_keeps_dtype_and_no_graph_and_knows_when_it_failed():
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    network[0].weight.data = 0.3 * torch.eye(2)
    model = Denoiser(lambda x, clock: network(x), VPSDE())
    model.network = network  # a part of the model, so that its mode is the model's
    x = randn(4, 2, dtype=torch.float32).requires_grad_()
    first = flow(model.train(), x, 1.0, 0.5)
    assert torch.equal(first, flow(model, x, 1.0, 0.5)) and network.training  # no dropout was on
    assert first.dtype == torch.float32 and not first.requires_grad and first.shape == (4, 2)
    with torch.inference_mode():
        assert torch.equal(flow(model, x.clone(), 1.0, 0.5), first)
    assert flow(model, x[:0], 1.0, 0.5).shape == (0, 2)
    with pytest.raises(FloatingPointError, match="the velocity is not finite at t = 1"):
        flow(Denoiser(lambda x, clock: x * math.nan, VPSDE()), x, 1.0, 0.5)


def test_without_signal_at_T_the_flow_starts_with_ddim_or_is_refused():
    oracle = plane(DiscreteVP(cosine_beta(50, max_beta=1.0)))
    for step in (rk4_step, reverse_diffusion_step):
        x0 = last(sample(step, oracle, randn(2000, 2), oracle.process.grid(50), noises(0)))
        data = oracle.sample(100_000, torch.Generator().manual_seed(1))[0]
        assert (x0.mean(0) - data.mean(0)).abs().max() < 4 * 1.0 / 2000**0.5  # four standard errors, std below 1
        assert (x0.var(0) / data.var(0) - 1).abs().max() < 0.15  # and 50 steps' own bias
    for t in (50.0, 49.5):
        with pytest.raises(ValueError, match="model.process must keep some signal at T"):
            flow(oracle, randn(3, 2), t, 1.0)


# Samples: exact score in, exact law out


def laws(step, process, n=60_000, spacing=()):
    noise = noises(0)
    x = process.prior((n, 1), noise)  # float32
    return modes(last(sample(step, FastThreeModes(process), x, process.grid(500, *spacing), noise)))


def test_the_fast_model_is_the_oracle():
    x = torch.linspace(-6, 6, 301, dtype=F64)[:, None]
    for process in (VPSDE(), VESDE(sigma_max=40.0)):
        for t in (1e-3, 0.1, 0.5, 1.0):
            close(FastThreeModes(process)(x, real(t)).score, three_modes(process)(x, real(t)).score, 1e-12)


@pytest.mark.equation("sde.reverse", "sde.reverse_vp", "score.pc")
@pytest.mark.parametrize(
    "name, step, process",
    [
        ("Euler-Maruyama, VP", euler_maruyama_step, VPSDE()),
        ("Euler-Maruyama, VE", euler_maruyama_step, VESDE(sigma_max=40.0)),
        ("predictor-corrector, VE", chain(reverse_diffusion_step, make_corrector_step(0.16)), VESDE(sigma_max=40.0)),
    ],
)
def test_500_steps_find_every_mode_with_its_weight_and_width(name, step, process):
    weights, stds = laws(step, process)
    assert (weights - torch.tensor(WEIGHTS)).abs().max() < 0.01, weights  # standard error .002
    assert (stds - 1).abs().max() < 0.03, stds  # standard error .006


@pytest.mark.equation("score.pc")
def test_the_corrector_is_its_formula_and_leaves_the_law_alone_up_to_its_step():
    oracle, x, z, t = plane(VE()), randn(5, 2), randn(5, 2, seed=1), real(0.7)
    score = oracle(x, t).score
    epsilon = 2 * (0.16 * z.norm(dim=1).mean() / score.norm(dim=1).mean()) ** 2
    moved = make_corrector_step(0.16)(oracle, x, t, t, lambda x: z)
    close(moved, x + epsilon * score + (2 * epsilon).sqrt() * z, 1e-13)
    assert make_corrector_step()(oracle, x, t * 0, t * 0, None) is x
    oracle = GaussianOracle(VE(), *DATA)
    mean, v = (c.item() for c in oracle.law(t))
    x = mean + v**0.5 * randn(20_000, 4)
    x = make_corrector_step(0.3, n_steps=30)(oracle, x, t, t, noises(0))
    epsilon = 2 * 0.3**2 * v  # |z| / |s| = sqrt(v) in the mean over 20,000
    assert abs(x.var() / v * (1 - epsilon / (2 * v)) - 1) < 4 * (2 / 80_000) ** 0.5  # and 1 / (1 - ...) is 1.10
    assert abs(x.mean() - mean) < 4 * x.std() / 80_000**0.5


@pytest.mark.equation("sde.ancestral_vs_em")
def test_the_three_first_order_steps_agree_at_first_order():
    x, gaps = randn(4, 2), []
    for b in (0.02, 0.01, 0.005):
        oracle = plane(DiscreteVP(torch.tensor([0, 0.3, b], dtype=F64)))
        kernels = [step.kernel(oracle, x, times(2), times(1)) for step in (make_ddpm_step(), reverse_diffusion_step)]
        gaps.append((kernels[0][0] - kernels[1][0]).abs().max().item())
        s = oracle(x, times(2)).score
        close(kernels[0][0], (x + b * s) / (1 - b) ** 0.5, 1e-12)
        close(kernels[1][0], (2 - (1 - b) ** 0.5) * x + b * s, 1e-12)
    assert [round(a / b, 1) for a, b in pairwise(gaps)] == pytest.approx([4, 4], abs=0.2)
