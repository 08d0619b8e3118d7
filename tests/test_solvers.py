"""Section 16 and EDM: the fast solvers against their papers' listings, exact end points, and DDIM at equal cost."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from affine import affine_law, last, laws_agree
from exact import DATA, F64, close, randn, slope
from transport import MIXTURES, START, carried, on_a_line

from diffusion_edu.guidance import trace
from diffusion_edu.oracles import GaussianMixtureOracle, GaussianOracle
from diffusion_edu.prediction import Prediction
from diffusion_edu.process import VE, VESDE, VPSDE, DiscreteVP, SubVPSDE, karras, quadratic, uniform_log_snr
from diffusion_edu.samplers import (
    churn,
    ddim_step,
    dpm1_step,
    dpm2_step,
    dpmpp_2s_step,
    half_log_snr,
    heun_step,
    keep_known,
    make_adams_step,
    make_dpmpp_2m_step,
    sample,
)
from diffusion_edu.schedules import cosine_beta, karras_sigmas, linear_beta

SOLVERS = {  # name: (fresh step, evaluations of a step, order)
    "ddim": (lambda: ddim_step, 1, 1),
    "dpm1": (lambda: dpm1_step, 1, 1),
    "dpm2": (lambda: dpm2_step, 2, 2),
    "dpmpp_2s": (lambda: dpmpp_2s_step, 2, 2),
    "dpmpp_2m": (make_dpmpp_2m_step, 1, 2),
    "heun": (lambda: heun_step, 2, 2),
    **{f"adams_{k}": (partial(make_adams_step, k), 1, k) for k in (1, 2, 3, 4)},
}
RACERS = [name for name in SOLVERS if name not in ("dpm1", "adams_1")]  # which are DDIM, proved below
every_solver = pytest.mark.parametrize("name", SOLVERS)


def real(t):
    return torch.tensor(t, dtype=F64)


def ddpm():
    return DiscreteVP(linear_beta(1000))


def every_process():
    return ddpm(), ddpm().continuous(), VPSDE(), SubVPSDE(), VESDE(), VE()


def mixture(process):
    means = torch.tensor([[-1.0, 0.5], [1.0, -0.5]], dtype=F64)
    return GaussianMixtureOracle(process, means, [0.4, 0.3], [0.6, 0.4])


def log_snr_grid(process, n, t_min=1e-3):
    """n steps from T to t_min, without the one to 0."""
    return process.grid(n + 1, uniform_log_snr(t_min))[:-1]


# The variable and the exact solution


@pytest.mark.equation("solver.lambda")
def test_half_the_log_snr_has_the_inverse_time_of_and_is_the_log_of_signal_over_noise():
    for process in every_process():
        t = process.grid(50)[:-1]
        scale, std = process.marginal(t)
        lam = half_log_snr(process, t)
        close(lam, (scale / std).log(), 1e-12)
        close(process.time_of(2 * lam), t.double(), 1e-10)
        close(half_log_snr(process.continuous(), process.time_of(2 * lam)), lam, 1e-10)


@pytest.mark.equation("solver.exact")
def test_the_integral_over_lambda_of_the_exact_prediction_is_the_flows_closed_form():
    nodes, weights = (torch.from_numpy(c) for c in np.polynomial.legendre.leggauss(60))
    for process in (VPSDE(), SubVPSDE(), VE()):
        oracle, x = GaussianOracle(process, *DATA), process.marginal(real(0.9 * process.T))[1] * randn(5, 1)
        t, s = real(0.9 * process.T), real(0.02 * process.T)
        (mean_t, var_t), lam_t, lam_s = oracle.law(t), half_log_snr(process, t), half_log_snr(process, s)
        flow = lambda u: oracle.law(u)[0] + (oracle.law(u)[1] / var_t).sqrt() * (x - mean_t)
        (a_t, b_t), (a_s, b_s) = process.marginal(t), process.marginal(s)
        noise, clean = torch.zeros_like(x), torch.zeros_like(x)
        for node, weight in zip(nodes, weights, strict=True):
            lam = (lam_t + lam_s + (lam_s - lam_t) * node) / 2
            u = process.time_of(2 * lam)
            pred = oracle(flow(u), u)
            noise += weight * (lam_s - lam_t) / 2 * (-lam).exp() * pred.eps
            clean += weight * (lam_s - lam_t) / 2 * lam.exp() * pred.x0
        close(a_s / a_t * x - a_s * noise, flow(s), 1e-10)
        close(b_s / b_t * x + b_s * clean, flow(s), 1e-10)


class Told:
    """A model that answers with given functions of lambda, whatever x_t."""

    def __init__(self, process, x0, eps):
        self.process, self.x0, self.eps = process, x0, eps

    def __call__(self, x_t, t):
        scale, std = self.process.levels(t)
        lam = half_log_snr(self.process.continuous(), t.double())
        return Prediction(x_t, scale, std, self.x0(lam) + 0 * x_t, self.eps(lam) + 0 * x_t)


@pytest.mark.equation("solver.exact")
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_adams_of_order_k_is_exact_where_eps_is_a_polynomial_of_degree_below_k_in_lambda(order):
    coefficients = [0.7, -0.4, 0.3, 0.2][:order]
    eps = lambda lam: sum(c * (lam / 3) ** k for k, c in enumerate(coefficients))
    nodes, weights = np.polynomial.legendre.leggauss(40)
    for process in (VPSDE(), VE(), ddpm()):
        grid = process.grid(12, quadratic)  # steps of any length in lambda
        path = list(sample(make_adams_step(order), Told(process, torch.zeros_like, eps), randn(3, 1), grid))
        for i in range(order - 1, 10):  # once it remembers enough
            (t, s), x = grid[i : i + 2], path[i - 1] if i else randn(3, 1)
            (a_t, _), (a_s, _) = process.marginal(t), process.marginal(s)
            lam_t, lam_s = half_log_snr(process, t).item(), half_log_snr(process, s).item()
            integral = sum(
                w * (lam_s - lam_t) / 2 * math.exp(-lam) * eps(lam)
                for w, lam in zip(weights, (lam_t + lam_s + (lam_s - lam_t) * nodes) / 2, strict=True)
            )
            close(path[i], a_s / a_t * x - a_s * integral, 1e-11)


def test_the_plus_plus_solvers_read_the_clean_data_only_and_the_others_the_noise_only():
    missing = lambda lam: torch.full_like(lam, math.nan)
    flat = lambda lam: 0.1 * lam.sin()
    grid, x = log_snr_grid(VPSDE(), 6), randn(3, 2)  # not to 0, where all read both
    for name, of_x0 in (("dpmpp_2m", True), ("dpmpp_2s", True), ("dpm1", False), ("dpm2", False), ("adams_3", False)):
        for x0, eps, reads in ((flat, missing, of_x0), (missing, flat, not of_x0)):
            end = last(sample(SOLVERS[name][0](), Told(VPSDE(), x0, eps), x, grid))
            assert end.isfinite().all() == reads and end.isnan().all() != reads


# One step, and the papers' listings


@pytest.mark.equation("solver.dpm1")
def test_dpm_solver_1_is_ddim_by_another_route():
    for process in every_process():
        oracle, x = mixture(process), randn(5, 2)
        grid = process.grid(7)
        for t, s in pairwise(grid):
            close(dpm1_step(oracle, x, t, s), ddim_step(oracle, x, t, s, None), 1e-12)
            close(make_adams_step(1)(oracle, x, t, s), ddim_step(oracle, x, t, s, None), 1e-12)
            close(make_dpmpp_2m_step()(oracle, x, t, s), ddim_step(oracle, x, t, s, None), 1e-12)  # a first step


@pytest.mark.equation("solver.dpm2")
def test_dpm_solver_2_and_2s_are_the_papers_listings():
    for process in every_process():
        oracle, x, sde = mixture(process), randn(3, 2), process.continuous()
        for t, s in pairwise(process.grid(4)[:-1]):
            lam_t, lam_s = half_log_snr(process, t), half_log_snr(process, s)
            m = sde.time_of(lam_t + lam_s)  # 2 (lambda_t + h / 2)
            (a_t, b_t), (a_m, b_m), (a_s, b_s) = process.marginal(t), sde.marginal(m), process.marginal(s)
            h = lam_s - lam_t
            close(half_log_snr(sde, m) - lam_t, h / 2, 1e-9)
            u = a_m / a_t * x - b_m * ((h / 2).exp() - 1) * oracle(x, t).eps
            by_eps = a_s / a_t * x - b_s * (h.exp() - 1) * oracle(u, m).eps
            close(dpm2_step(oracle, x, t, s), by_eps, 1e-11)
            u = b_m / b_t * x - a_m * ((-h / 2).exp() - 1) * oracle(x, t).x0
            by_x0 = b_s / b_t * x - a_s * ((-h).exp() - 1) * oracle(u, m).x0
            close(dpmpp_2s_step(oracle, x, t, s), by_x0, 1e-11)


@pytest.mark.equation("edm.heun")
def test_heun_is_edms_listing_and_takes_two_evaluations_but_one_at_the_end():
    oracle, x = trace(mixture(VE())), 5 * randn(3, 2)
    sigmas = karras_sigmas(6, 0.05, 5.0)
    mine = last(sample(heun_step, oracle, x, sigmas))
    assert oracle.n_evaluations == 2 * 6 - 1
    for t, s in pairwise(sigmas):
        d = (x - oracle(x, t).x0) / t
        x_next = x + (s - t) * d
        if s > 0:
            d_next = (x_next - oracle(x_next, s).x0) / s
            x_next = x + (s - t) * (d + d_next) / 2
        x = x_next
    close(mine, x, 1e-12)


@pytest.mark.equation("solver.dpmpp2m")
def test_dpmpp_2m_is_the_papers_listing():
    oracle, x = mixture(VPSDE()), randn(3, 2)
    grid = oracle.process.grid(8, quadratic)  # steps of different lengths: r is not 1
    mine = list(sample(make_dpmpp_2m_step(), oracle, x, grid))
    history = None
    for i, (t, s) in enumerate(pairwise(grid)):
        (a_t, b_t), (a_s, b_s) = oracle.process.marginal(t), oracle.process.marginal(s)
        x0, h = oracle(x, t).x0, (a_s / b_s).log() - (a_t / b_t).log()
        if history is None or s == 0:
            d = x0
        else:
            before, h_before = history
            r = h_before / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * before
        x, history = b_s / b_t * x - a_s * torch.expm1(-h) * d, (x0, h)
        close(mine[i], x, 1e-12)
    assert torch.equal(mine[-1], oracle(mine[-2], grid[-2]).x0)


@pytest.mark.equation("edm.heun")
def test_heun_is_the_mean_of_two_slopes_in_scaled_variables_on_every_process():
    for process in every_process():
        oracle, x = mixture(process), randn(3, 2)
        for t, s in pairwise(process.grid(4)[:-1]):
            (a_t, b_t), (a_s, b_s) = process.marginal(t), process.marginal(s)
            step = b_s / a_s - b_t / a_t
            slope_t = oracle(x, t).eps
            slope_s = oracle(a_s * (x / a_t + step * slope_t), s).eps
            close(heun_step(oracle, x, t, s), a_s * (x / a_t + step * (slope_t + slope_s) / 2), 1e-11)


# Orders and costs


@pytest.mark.equation("edm.heun", "solver.dpm2", "solver.dpmpp2m", "solver.exact", "ddim.deterministic")
@pytest.mark.parametrize("name", RACERS)
def test_each_solver_has_its_order_against_the_exact_end_point(name):
    make, _, order = SOLVERS[name]
    counts, orders = (40, 80, 160, 320), []
    for data in MIXTURES:
        oracle = on_a_line(data)
        exact = carried(oracle, START, 1.0, 1e-3)
        ends = [last(sample(make(), oracle, START, log_snr_grid(oracle.process, n))) for n in counts]
        orders.append(slope(counts, [(end - exact).abs().mean() for end in ends]))
    # The orders above 2 are not asymptotic yet: the first steps, of lower order, still count.
    assert all(abs(found - order) < (0.15 if order < 4 else 0.35) for found in orders), orders


@pytest.mark.equation("speed.cost")
@every_solver
def test_evaluations_are_counted_and_the_last_step_takes_one(name):
    make, cost, _ = SOLVERS[name]
    for process in (VE(), ddpm()):
        for n in (1, 2, 18):
            watched = trace(mixture(process))
            list(sample(make(), watched, randn(2, 2), process.grid(n)))
            assert watched.n_evaluations == cost * n - (cost - 1)  # Heun, n = 18: 35
        list(sample(make(), watched, randn(2, 2), process.grid(18)[:-1]))
        assert watched.n_evaluations == cost * 18 - (cost - 1) + cost * 17


@every_solver
def test_the_last_step_ends_at_the_clean_data_of_the_last_answer(name):
    tables = ddpm(), DiscreteVP(cosine_beta(40, max_beta=1.0)), DiscreteVP(cosine_beta(1, max_beta=1.0))
    for process in (*tables, VPSDE(), SubVPSDE(), VESDE(), VE()):
        for n in (1, min(process.T, 6) if process.discrete else 6):
            watched = trace(mixture(process))
            end = last(sample(SOLVERS[name][0](), watched, randn(4, 2), process.grid(n)))
            close(end, watched.history[-1][1].x0, 1e-13)
            assert end.isfinite().all()


@every_solver
def test_a_table_and_the_same_table_joined_up_have_the_same_samples(name):
    table, x = ddpm(), randn(4, 2)
    grid = table.grid(9)
    for on_table, joined in zip(
        sample(SOLVERS[name][0](), mixture(table), x, grid),
        sample(SOLVERS[name][0](), mixture(table.continuous()), x, grid.double()),
        strict=True,
    ):
        close(on_table, joined, 1e-12)


@every_solver
def test_zero_terminal_snr_samples_the_data_from_pure_noise(name):
    oracle = mixture(DiscreteVP(cosine_beta(50, max_beta=1.0)))
    x0 = last(sample(SOLVERS[name][0](), oracle, randn(500, 2), oracle.process.grid(50)))
    data = oracle.sample(100_000, torch.Generator().manual_seed(1))[0]
    assert (x0.mean(0) - data.mean(0)).abs().max() < 4 * 1.1 / 500**0.5  # four standard errors
    assert (x0.var(0) / data.var(0) - 1).abs().max() < 4 * (2 / 500) ** 0.5  # bounded by a Gaussian's


# The race: equal evaluations, the exact end point as the truth


GRIDS = {  # n steps from 1 to 1e-3 on VPSDE
    "t": lambda n: torch.linspace(1, 1e-3, n + 1, dtype=F64),
    "sqrt(t)": lambda n: torch.linspace(1, 1e-3**0.5, n + 1, dtype=F64) ** 2,
    "log SNR": lambda n: log_snr_grid(VPSDE(), n),
    "Karras": lambda n: VPSDE().grid(n + 1, karras(1e-3))[:-1],
}


def race(data, n):
    """How many times closer than DDIM on the best of its three grids: {(solver, grid): times}, n evaluations each."""
    oracle = on_a_line(data)
    exact, errors = carried(oracle, START, 1.0, 1e-3), {}
    for name in RACERS:
        make, cost, _ = SOLVERS[name]
        for grid, points in GRIDS.items():
            end = last(sample(make(), oracle, START, points(n // cost)))
            errors[name, grid] = (end - exact).abs().mean().item()
    best = min(errors["ddim", grid] for grid in ("t", "sqrt(t)", "log SNR"))
    return {key: best / error for key, error in errors.items()}


@pytest.mark.equation("speed.cost", "solver.exact", "edm.heun")
def test_the_race_at_equal_evaluations():
    for data in MIXTURES:
        found = {n: race(data, n) for n in (10, 20, 40)}
        for n, asked, adams_3, adams_4 in ((10, 1.8, 6, 7.5), (20, 4, 12, 16), (40, 8, 28, 65)):
            assert max(found[n].values()) > asked
            assert found[n]["adams_3", "log SNR"] > adams_3 and found[n]["adams_4", "log SNR"] > adams_4
        assert found[20]["adams_4", "sqrt(t)"] > 26 and found[40]["adams_4", "sqrt(t)"] > 150
        heun = {n: max(found[n]["heun", grid] for grid in GRIDS) for n in found}
        assert heun[10] < 0.5 and heun[20] < 1.2 and 2 < heun[40] < 3  # two evaluations buy half the steps
        assert found[10]["adams_4", "t"] < 0.2  # a polynomial through large steps in lambda goes astray


# Grids


@pytest.mark.equation("edm.sigma_grid")
def test_karras_times_are_edms_levels_and_linear_in_the_power_on_every_process():
    for n, low, high, rho in ((18, 0.002, 80.0, 7.0), (5, 0.1, 10.0, 3.0), (1, 0.1, 10.0, 7.0)):
        close(VE(high).grid(n, karras(low, rho)) / high, karras_sigmas(n, low, high, rho) / high, 1e-14)
    for process in (VPSDE(), SubVPSDE(), VESDE()):
        for rho in (1.0, 7.0):
            t = process.grid(12, karras(1e-3, rho))
            sigma = (-half_log_snr(process, t[:-1])).exp()
            assert t[0] == process.T and t[-1] == 0 and len(t) == 13
            close(t[-2], 1e-3, 1e-12)
            root = sigma ** (1 / rho)
            close(root, torch.linspace(root[0].item(), root[-1].item(), 12, dtype=F64), 1e-9)
        limit = process.grid(12, uniform_log_snr(1e-3))
        gaps = [(process.grid(12, karras(1e-3, rho)) - limit).abs().max().item() for rho in (10.0, 100.0, 1000.0)]
        assert gaps[1] < 0.15 * gaps[0] and gaps[2] < 0.15 * gaps[1]  # as rho grows: uniform in log SNR, at 1 / rho
    table = ddpm()
    t = table.grid(10, karras(1.0))
    assert t.dtype == torch.int64 and t[0] == 1000 and t[-2:].tolist() == [1, 0] and (t.diff() < 0).all()
    exact = table.continuous().grid(10, karras(1.0))
    assert (t - exact).abs().max() <= 1


@pytest.mark.parametrize(
    ("spacing", "message"),
    [
        (lambda: karras(1e-3, 0.0), "rho must be greater than 0; got 0"),
        (lambda: karras(0.0), "t_min must be greater than 0; got 0"),
        (lambda: karras(2.0), "t_min must be in .0, 1.0.; got 2"),
        (lambda: karras(math.nan), "t_min must be finite; got nan"),
    ],
)
def test_karras_names_what_is_wrong(spacing, message):
    with pytest.raises(ValueError, match=message):
        VPSDE().grid(5, spacing())


# Memory


@pytest.mark.parametrize("name", ["dpmpp_2m", "adams_2", "adams_3", "adams_4"])
def test_what_is_remembered_is_used_only_where_the_step_goes_on_where_it_came_to(name):
    make, oracle, x = SOLVERS[name][0], mixture(VPSDE()), randn(3, 2)
    t, s, r, q = (real(v) for v in (0.9, 0.6, 0.4, 0.2))
    ddim = lambda x, t, s: ddim_step(oracle, x, t, s, None)
    step = make()
    x_s = step(oracle, x, t, s)
    x_r = step(oracle, x_s, s, r)
    assert (x_r - ddim(x_s, s, r)).abs().max() > 1e-3  # it remembered
    close(step(oracle, x_r.clone(), r, q), ddim(x_r, r, q), 1e-12)  # the same numbers, in another tensor
    step = make()
    x_s = step(oracle, x, t, s)
    close(step(oracle, x_s, t, s), ddim(x_s, t, s), 1e-12)  # the same step twice
    edited = lambda model, x, t, s, noise: inner(model, x, t, s, noise) + 0  # a sampler that edits x
    inner, grid = make(), VPSDE().grid(6)
    path, plain = (list(sample(f, oracle, x, grid)) for f in (edited, ddim_step))
    close(path[-1], plain[-1], 1e-12)
    known = keep_known(make(), x, torch.zeros(3, 2))
    close(last(sample(known, oracle, x, grid, torch.zeros_like)), plain[-1], 1e-12)


@pytest.mark.parametrize("order", [0, 5, -1])
def test_adams_has_orders_1_to_4(order):
    with pytest.raises(ValueError, match=f"order must be in .1, 4.; got {order}"):
        make_adams_step(order)
    with pytest.raises(TypeError, match="order must be an integer; got 2.0"):
        make_adams_step(2.0)


# Churn


@pytest.mark.equation("edm.churn")
def test_churn_moves_up_the_marginals_and_zero_churn_is_the_step():
    for process in (VE(), VPSDE()):
        oracle, t = GaussianOracle(process, *DATA), torch.tensor(0.5, dtype=F64)
        seen = []
        stay = lambda model, x, t_hat, s, noise: seen.append(t_hat) or x
        (m, v), (a, b) = oracle.law(t), process.marginal(t)
        start = lambda noise, like: m + v.sqrt() * noise(like)
        law = affine_law(lambda noise, like: churn(stay, 0.3)(oracle, start(noise, like), t, t * 0, noise))
        a_hat, b_hat = process.marginal(seen[-1])
        close(b_hat / a_hat, 1.3 * b / a, 1e-12)  # sigma-hat = 1.3 sigma
        laws_agree(law, oracle.law(seen[-1]), 1e-12)
        s, x = torch.tensor(0.4, dtype=F64), randn(3, 2)
        model, noise = mixture(process), lambda x: pytest.fail("no noise is needed")
        assert torch.equal(churn(heun_step, 0.0)(model, x, t, s, noise), heun_step(model, x, t, s))
        outside = churn(heun_step, 0.3, sigma_min=20.0, sigma_max=50.0)
        assert torch.equal(outside(model, x, t, s, noise), heun_step(model, x, t, s))


def test_churn_by_zero_changes_nothing_at_any_time():
    for process in (VPSDE(), VESDE(), VE()):
        model, times, x = mixture(process), process.grid(100), randn(3, 2)
        churned = last(sample(churn(heun_step, 0.0), model, x, times))  # and asks for no noise
        assert torch.equal(churned, last(sample(heun_step, model, x, times)))


@pytest.mark.equation("edm.churn")
def test_s_noise_scales_the_fresh_noise():
    oracle, t = mixture(VE()), torch.tensor(0.5, dtype=F64)
    stay = lambda model, x, t_hat, s, noise: x
    x, z = randn(3, 2), randn(3, 2, seed=1)
    moved = churn(stay, 0.3, s_noise=1.007)(oracle, x, t, t * 0, lambda x: z)
    close(moved, x + 1.007 * 0.5 * (1.3**2 - 1) ** 0.5 * z, 1e-13)


@pytest.mark.equation("edm.churn")
def test_without_churn_edms_sampler_is_heuns_and_with_it_every_level_keeps_its_law():
    process = VE()
    oracle, sigmas, x = mixture(process), karras_sigmas(18), 80 * randn(3, 2)
    plain = last(sample(heun_step, oracle, x, sigmas))
    assert torch.equal(last(sample(churn(heun_step, 0.0), oracle, x, sigmas)), plain)
    bell = GaussianOracle(process, *DATA)
    for t in sigmas[[0, 5, 17]]:  # at T itself there is no way up
        stay = lambda model, x, t_hat, s, noise: x * 1 if t_hat == t else (x - DATA[0]) / bell.law(t_hat)[1].sqrt()
        mean, var = bell.law(t)
        law = affine_law(lambda noise, like: churn(stay, 0.41)(bell, mean + var.sqrt() * noise(like), t, 0 * t, noise))
        laws_agree(law, (mean, var) if t == process.T else (0.0, 1.0), 1e-10)
