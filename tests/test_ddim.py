"""Section 15: the DDIM family, from one noise level to the next, down to the data, up again, and between two noises."""

import math
from itertools import pairwise

import pytest
import torch
from affine import affine_law, last, laws_agree, sampler_law
from exact import DATA, F64, close, ddim_steps, log_normal, propagate, randn, running_product, slope, times
from transport import START, carried, on_a_line

from diffusion_edu import data, zoo
from diffusion_edu.guidance import bind, trace
from diffusion_edu.oracles import DatasetOracle, GaussianMixtureOracle, GaussianOracle
from diffusion_edu.process import VE, VESDE, VPSDE, DiscreteVP, SubVPSDE, jump, quadratic, uniform_log_snr
from diffusion_edu.samplers import (
    beta_tilde,
    ddim_mean,
    ddim_sigma,
    ddim_step,
    invert,
    make_ddim_step,
    make_ddpm_step,
    noises,
    sample,
    slerp,
)
from diffusion_edu.schedules import cosine_beta, linear_beta

CLOSE_BY = (0.4, 0.25)  # mean and variance of the acceptance tests


def ddpm():
    return DiscreteVP(linear_beta(1000))


def every_process():
    return ddpm(), VPSDE(), SubVPSDE(), VESDE(), VE()


def between(process, share):
    """The time that lies at this share of T."""
    return torch.tensor(share * process.T, dtype=F64).to(process.time_dtype)


def mixture(process):
    means = torch.tensor([[-1.0, 0.5], [1.0, -0.5]], dtype=F64)
    return GaussianMixtureOracle(process, means, [0.4, 0.3], [0.6, 0.4])


def exact_flow(oracle, x, t, s):
    """Where the flow of Gaussian data carries x: the same number of standard deviations from the mean."""
    (mean_t, var_t), (mean_s, var_s) = oracle.law(t), oracle.law(s)
    return mean_s + (var_s / var_t).sqrt() * (x - mean_t)


# The family: one joint law for every sigma, one marginal for all


@pytest.mark.equation("ddim.conditional", "ddim.marginals")
def test_every_admissible_sigma_keeps_the_marginals():
    x0 = torch.full((1, 1), 0.8, dtype=F64)
    for process in every_process():
        for t, s in ((0.9, 0.8), (0.6, 0.1), (0.3, 0.01)):
            t, s = between(process, t), between(process, s)
            (a_t, b_t), (a_s, b_s) = process.marginal(t), process.marginal(s)
            for share in (0.0, 0.3, 0.8, 1.0):
                sigma = share * b_s
                at = lambda x_t: ddim_mean(process, x0, (x_t - a_t * x0) / b_t, s, sigma)
                gain = at(torch.ones(1, 1, dtype=F64)) - at(torch.zeros(1, 1, dtype=F64))  # of x_t in the mean
                close(at(a_t * x0), a_s * x0, 1e-14)  # E[x_s | x_0]
                close(gain**2 * b_t**2 + sigma**2, (b_s**2).reshape(1, 1), 1e-14)  # Var[x_s | x_0]


@pytest.mark.equation("ddim.joint")
def test_a_chain_down_from_q_x_T_with_any_sigmas_has_every_marginal():
    process, shares = DiscreteVP(linear_beta(7, 0.2, 0.8)), (0.2, 0.9, 0.0, 1.0, 0.5, 0.7)
    for stop in range(6, 0, -1):

        def walk(noise, like, stop=stop):
            x0 = torch.full_like(like, 0.8)
            x = process.marginal(times(7))[0] * x0 + process.marginal(times(7))[1] * noise(like)
            for t in range(7, stop, -1):
                (a_t, b_t), sigma = process.marginal(times(t)), shares[7 - t] * process.marginal(times(t - 1))[1]
                x = ddim_mean(process, x0, (x - a_t * x0) / b_t, times(t - 1), sigma) + sigma * noise(x)
            return x

        scale, std = process.marginal(times(stop))
        laws_agree(affine_law(walk), (0.8 * scale, std**2), 1e-14)


@pytest.mark.equation("ddim.joint")
def test_the_forward_kernel_by_bayes_forgets_x_0_only_for_the_posteriors_sigma():
    x0 = torch.linspace(-2, 2, 9, dtype=F64)[:, None]
    x_t, x_s = torch.full_like(x0, 0.3), torch.full_like(x0, -0.5)
    for process in every_process():
        t, s = between(process, 0.3), between(process, 0.2)
        (a_t, b_t), (a_s, b_s) = process.marginal(t), process.marginal(s)
        scale, std = jump(process, t, s)
        for eta in (0.3, 0.9, 1.0):
            sigma = ddim_sigma(process, t, s, eta)
            mean = ddim_mean(process, x0, (x_t - a_t * x0) / b_t, s, sigma)
            forward = log_normal(x_s, mean, sigma**2) + log_normal(x_t, a_t * x0, b_t**2)
            forward = forward - log_normal(x_s, a_s * x0, b_s**2)  # log q(x_t | x_s, x_0)
            if eta == 1:
                close(forward, log_normal(x_t, scale * x_s, std**2), 1e-12)
            else:
                assert forward.max() - forward.min() > 1e-5  # less where the noise drowns x_0


# One step


@pytest.mark.equation("ddim.update", "ddim.strided", "gt.affine_propagation")
@pytest.mark.parametrize("n", [1, 10, 37, 1000])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_on_strides_is_the_exact_recursion(n, eta):
    process = ddpm()
    grid = process.grid(n)
    exact = propagate(ddim_steps(running_product(process.beta.tolist()), grid.tolist(), eta), CLOSE_BY)
    laws_agree(sampler_law(make_ddim_step(eta), GaussianOracle(process, *CLOSE_BY), grid), exact, 1e-9)


@pytest.mark.equation("ddim.update", "ddim.sigma_eta")
def test_ddim_with_eta_one_is_the_ancestral_step():
    process, x, z = ddpm(), randn(5, 2), randn(5, 2, seed=1)
    for t, s in ((1000, 999), (500, 499), (2, 1), (1, 0), (1000, 500), (37, 20)):
        args = (mixture(process), x, times(t), times(s), lambda x: z)
        close(make_ddim_step(1.0)(*args), make_ddpm_step(beta_tilde)(*args), 1e-10)
    for process in (VPSDE(), SubVPSDE(), VESDE(), VE()):
        t, s = (torch.tensor(v * process.T, dtype=F64) for v in (0.6, 0.4))
        args = (mixture(process), x, t, s, lambda x: z)
        close(make_ddim_step(1.0)(*args), make_ddpm_step(beta_tilde)(*args), 1e-10)


@pytest.mark.equation("ddim.sigma_eta", "ddim.conditional", "ddim.marginals")
def test_the_ddim_noise_is_eta_times_the_posteriors_and_keeps_the_marginals():
    process, x0 = ddpm(), torch.full((1, 1), 0.8, dtype=F64)
    ab = process.alpha_bar
    for t, s in ((500, 499), (500, 100), (2, 1)):
        for eta in (0.0, 0.5, 1.0):
            knows = DatasetOracle(process, x0)  # x0-hat = x0, eps-hat = the noise that was added
            kernel = make_ddim_step(eta).kernel
            (at_0, sigma), (at_1, _) = (
                kernel(knows, torch.full((1, 1), v, dtype=F64), times(t), times(s)) for v in (0.0, 1.0)
            )
            sigma = torch.zeros(()) if sigma is None else sigma
            gain = at_1 - at_0
            close(gain**2 * (1 - ab[t]) + sigma**2, (1 - ab[s]).reshape(1, 1), 1e-13)
            close(at_0 + gain * ab[t].sqrt() * x0, ab[s].sqrt() * x0, 1e-13)
            printed = eta * ((1 - ab[s]) / (1 - ab[t]) * (1 - ab[t] / ab[s])).sqrt()  # E000-16: not sqrt(eta)
            close(sigma, printed, 1e-12)
            assert sigma**2 <= 1 - ab[s]


@pytest.mark.equation("ddim.deterministic", "ddim.ode")
def test_a_ddim_step_is_an_euler_step_in_sigma():
    for process in (ddpm(), VPSDE(), VE()):
        oracle, x = mixture(process), randn(4, 2)
        t, s = (times(v) if process.discrete else torch.tensor(v / 1000 * process.T, dtype=F64) for v in (700, 400))
        (a_t, b_t), (a_s, b_s) = process.marginal(t), process.marginal(s)
        euler = x / a_t + (b_s / a_s - b_t / a_t) * oracle(x, t).eps
        close(ddim_step(oracle, x, t, s, None) / a_s, euler, 1e-12)


@pytest.mark.equation("ddim.constant_x0")
def test_one_ddim_step_is_exact_where_the_guess_is_constant():
    oracle = DatasetOracle(ddpm(), torch.full((1, 2), 0.3, dtype=F64))
    x_T = randn(4, 2)
    for n in (1, 7, 1000):
        close(last(sample(ddim_step, oracle, x_T, oracle.process.grid(n))), torch.full((4, 2), 0.3, dtype=F64), 1e-12)


@pytest.mark.equation("ddim.strided")
def test_eleven_ddim_steps_have_the_inventorys_law():
    mean, var = sampler_law(ddim_step, GaussianOracle(ddpm(), *DATA), ddpm().grid(11))
    assert mean == pytest.approx(1.297, abs=0.01) and var**0.5 == pytest.approx(0.374, abs=0.02)
    mean, var = sampler_law(ddim_step, GaussianOracle(ddpm(), *DATA), ddpm().grid(1000))
    assert mean == pytest.approx(1.296, abs=0.002) and var**0.5 == pytest.approx(0.4985, abs=0.0005)


@pytest.mark.equation("ddim.strided")
def test_the_lectures_step_is_right_for_neighbours_only():
    """1 / sqrt(alpha_t) and alpha_bar_{t-1} in a stride: eleven steps stay at the prior."""
    process, oracle = ddpm(), GaussianOracle(ddpm(), *DATA)

    def printed(model, x, t, s, noise):
        eps, (_, b_t), before = model(x, t).eps, process.marginal(t), process.marginal(t - 1)[1]
        return (x - b_t * eps) / process.alpha[t].sqrt() + before * eps

    neighbours = process.grid(1000)
    laws_agree(sampler_law(printed, oracle, neighbours), sampler_law(ddim_step, oracle, neighbours), 1e-12)
    mean, var = sampler_law(printed, oracle, process.grid(11))
    assert abs(mean) < 0.03 and var**0.5 == pytest.approx(0.993, abs=1e-3)


@pytest.mark.equation("ddim.code")
def test_the_listing_as_printed_puts_every_sample_at_4_8_and_mended_it_is_the_step():
    process, oracle = ddpm(), GaussianOracle(ddpm(), *DATA)
    alphas, alpha_bars = process.alpha[1:], process.alpha_bar[1:]  # the listing's tables start at its t = 0

    def listing(noise, like, mended):
        x_t = noise(like)
        for t in reversed(range(1000)):
            eps = oracle(x_t, times(t + 1)).eps
            x_0_scaled = (x_t - eps * (1 - alpha_bars[t]).sqrt()) / alphas[t].sqrt()
            previous = torch.tensor(1.0) if mended and t == 0 else alpha_bars[t - 1]  # t = 0 wraps around to the end
            x_t = x_0_scaled + (1 - previous).sqrt() * (eps if mended else 1)
        return x_t

    laws_agree(affine_law(lambda noise, like: listing(noise, like, False)), (4.776, 0.0), 1e-3)
    mean, var = affine_law(lambda noise, like: listing(noise, like, True))
    laws_agree((mean, var), sampler_law(ddim_step, oracle, process.grid(1000)), 1e-12)
    laws_agree((mean, var**0.5), (1.296, 0.4985), 1e-3)


# Without noise: Euler's rule for an ODE


@pytest.mark.equation("ddim.deterministic")
def test_ddim_converges_to_the_flow_at_first_order_so_the_same_noise_ends_at_the_same_data():
    counts = (25, 50, 100, 200)
    for process in every_process():
        oracle, zero = GaussianOracle(process, *DATA), between(process, 0)
        x_T = process.prior((20, 1), noises(0)).double()
        exact = exact_flow(oracle, x_T, between(process, 1), zero)
        ends = [last(sample(ddim_step, oracle, x_T, process.grid(n, quadratic))) for n in counts]
        assert abs(slope(counts, [(end - exact).abs().mean() for end in ends]) - 1) < 0.15
        apart = [(a - b).abs().mean() for a, b in pairwise(ends)]
        assert abs(slope(counts[1:], apart) - 1) < 0.15  # n and 2 n steps differ by O(1 / n)
    oracle = on_a_line("three")
    exact = carried(oracle, START, 1.0, 1e-3)
    grids = [oracle.process.grid(n + 1, uniform_log_snr(1e-3))[:-1] for n in counts]
    errors = [(last(sample(ddim_step, oracle, START, grid)) - exact).abs().mean() for grid in grids]
    assert abs(slope(counts, errors) - 1) < 0.15


# Upward: from data to noise


@pytest.mark.equation("ddim.inversion")
def test_inversion_walks_ddim_upward_and_asks_at_the_level_where_it_stands():
    for process in every_process():
        watched, x = trace(mixture(process)), randn(3, 2)
        grid = process.grid(5)
        path = list(invert(watched, x, grid))
        assert len(path) == watched.n_evaluations == 5
        asked = torch.stack([t for t, _ in watched.history])
        assert torch.equal(asked, grid.flip(0)[[1, 1, 2, 3, 4]])  # never at time 0
        for (s, t), x_t in zip(pairwise(grid.flip(0)), path, strict=True):
            (a_t, b_t), pred = process.marginal(t), watched.model(x, s if s > 0 else t)
            close(x_t, a_t * (x if s == 0 else pred.x0) + b_t * pred.eps, 1e-12)
            x = x_t


@pytest.mark.equation("ddim.inversion")
def test_encoding_converges_to_the_flow_upward_and_coming_back_to_the_data_at_first_order():
    counts = (50, 100, 200, 400)
    oracle, x0 = GaussianOracle(VPSDE(), *DATA), DATA[0] + randn(20, 1) / 2
    exact = exact_flow(oracle, x0, torch.tensor(0.0), torch.tensor(1.0))
    errors = [(last(invert(oracle, x0, VPSDE().grid(n, quadratic))) - exact).abs().mean() for n in counts]
    assert abs(slope(counts, errors) - 1) < 0.1
    oracle = on_a_line("three")
    x0, errors = oracle.sample(50, torch.Generator().manual_seed(0))[0], []
    for n in counts:
        grid = oracle.process.grid(n, quadratic)
        errors.append((last(sample(ddim_step, oracle, last(invert(oracle, x0, grid)), grid)) - x0).abs().mean())
    assert abs(slope(counts, errors) - 1) < 0.25 and errors[-1] < 0.01  # the data lie on both sides of two ridges


@pytest.mark.equation("ddim.inversion")
def test_refined_to_the_fixed_point_inversion_is_the_exact_inverse_of_sampling():
    for process in (VPSDE(), ddpm()):
        oracle = mixture(process)
        x0, grid = oracle.sample(20, torch.Generator().manual_seed(0))[0], process.grid(50)
        errors = []
        for n_refine in (0, 1, 2, 25):
            watched = trace(oracle)
            x_T = last(invert(watched, x0, grid, n_refine))
            assert watched.n_evaluations == 50 * (1 + n_refine)
            errors.append((last(sample(ddim_step, oracle, x_T, grid)) - x0).abs().max().item())
        assert all(b < a / 4 for a, b in pairwise(errors)) and errors[-1] < 1e-12
    with_nothing_left = mixture(DiscreteVP(cosine_beta(50, max_beta=1.0)))
    grid = with_nothing_left.process.grid(50)
    x_T = last(invert(with_nothing_left, x0, grid, 5))
    close(x_T, last(invert(with_nothing_left, x0, grid[1:], 5)), 0.05)  # the step to T keeps what it finds


@pytest.mark.equation("ddim.inversion")
def test_held_out_digits_come_back_from_their_noise():
    model = zoo.load("digits_unet")
    x0, y = (part[:10] for part in data.digits("test"))
    model, errors = bind(model, y=y), []
    for n in (50, 100, 200):
        grid = model.process.grid(n)
        errors.append((last(sample(ddim_step, model, last(invert(model, x0, grid)), grid)) - x0).abs().mean().item())
    assert errors[0] > errors[1] > errors[2] and errors[1] < 0.035 and errors[2] < 0.02


# Between two noises


@pytest.mark.equation("edit.slerp")
def test_slerp_goes_round_the_circle_at_equal_speed_from_one_end_to_the_other():
    x, y = randn(5, 2, 3), randn(5, 2, 3, seed=1)
    shares = torch.linspace(0, 1, 11, dtype=F64)
    close(slerp(x, y, 0.0), x, 1e-15)
    close(slerp(x, y, 1.0), y, 1e-14)
    unit = lambda z: z / z.flatten(1).norm(dim=1)[:, None, None]
    path = torch.stack([slerp(unit(x), unit(y), share) for share in shares]).flatten(2)
    close(path.norm(dim=2), torch.ones(11, 5), 1e-14)
    turned = (path[1:] * path[:-1]).sum(2).arccos()
    close(turned, ((unit(x) * unit(y)).flatten(1).sum(1).arccos() / 10).expand(10, 5), 1e-8)  # arccos near 1
    each = slerp(x, y, shares[:5])
    for i in range(5):
        close(each[i : i + 1], slerp(x[i : i + 1], y[i : i + 1], shares[i]), 1e-15)
    close(slerp(x, 3 * x, 0.25), 1.5 * x, 1e-12)  # parallel: the straight line
    close(slerp(x, -x, 0.5), 0 * x, 1e-12)
    close(slerp(0 * x, 0 * x, 0.5), 0 * x, 0)
    assert slerp(x.float(), y.float(), 0.3).dtype == torch.float32


@pytest.mark.equation("edit.slerp")
def test_between_two_noises_of_gaussian_data_lies_the_slerp_of_the_data_about_their_mean():
    x, y = randn(6, 3), randn(6, 3, seed=1)
    table = DiscreteVP(cosine_beta(50, max_beta=1.0))  # without signal at T, the noises stand around 0
    oracle = GaussianOracle(table, *DATA)
    decode = lambda x_T: last(sample(ddim_step, oracle, x_T, table.grid(20))) - DATA[0]
    for share in (0.2, 0.5, 0.9):
        close(decode(slerp(x, y, share)), slerp(decode(x), decode(y), share), 1e-12)
    oracle, T, t_min = GaussianOracle(VPSDE(), *DATA), torch.tensor(1.0), torch.tensor(1e-5)
    (mean_T, _), (mean, _) = oracle.law(T), oracle.law(t_min)
    decode = lambda about: exact_flow(oracle, mean_T + about, T, t_min) - mean  # elsewhere around a_T m
    for share in (0.2, 0.5, 0.9):
        close(decode(slerp(x, y, share)), slerp(decode(x), decode(y), share), 1e-12)


# What is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda o, x: invert(o, x, torch.tensor([1.0, 0.5])), "times must end in 0, where x0 lies; got 0.5"),
        (lambda o, x: invert(o, x, torch.tensor([0.0, 0.5])), "times must be 1-D, .* strictly decreasing; got"),
        (lambda o, x: invert(o, x, torch.tensor([2.0, 0.0])), "times must be in .0, 1.; got 2"),
        (lambda o, x: invert(o, x, o.process.grid(2), -1), "n_refine must be at least 0; got -1"),
        (lambda o, x: invert(o, x.long(), o.process.grid(2)), "x0 must be a floating-point tensor"),
        (lambda o, x: invert(abs, x, VPSDE().grid(2)), "model must have a process"),
    ],
)
def test_inversion_names_what_is_wrong_before_it_asks_the_model(call, message):
    oracle = trace(GaussianOracle(VPSDE(), *DATA))
    with pytest.raises((TypeError, ValueError), match=message):
        next(call(oracle, randn(2, 2)))
    assert oracle.n_evaluations == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, std: ddim_mean(VPSDE(), randn(2, 1), randn(2, 1), s, 1.001 * std), "sigma must be between 0 and st"),
        (lambda s, std: ddim_mean(VPSDE(), randn(2, 1), randn(2, 1), s, -std), "sigma must be between 0 and std"),
        (lambda s, std: ddim_mean(VPSDE(), randn(2, 1), randn(2, 1), s, std / 0 - std / 0), "sigma must be between 0"),
        (lambda s, std: ddim_mean(VPSDE(), randn(2, 1), randn(1, 1), s, std), "eps must have the shape of x0"),
        (lambda s, std: ddim_mean(VPSDE(), randn(2, 1), randn(2, 1), s.expand(3), std), "s must be 0-d or of shape"),
        (lambda s, std: ddim_sigma(VPSDE(), s, s), "s must be smaller than t"),
        (lambda s, std: ddim_sigma(VPSDE(), s, s / 2, 1.1), "eta must be in .0.*1.; got 1.1"),
        (lambda s, std: slerp(randn(2, 3), randn(1, 3), 0.5), "y must have the shape of x"),
        (lambda s, std: slerp(randn(2, 3), randn(2, 3), 1.5), "share must be in .0, 1.; got .1.5"),
        (lambda s, std: slerp(randn(2, 3), randn(2, 3), math.nan), "share must be in .0, 1.; got .nan"),
        (lambda s, std: slerp(randn(2, 3), randn(2, 3), torch.ones(2, 1)), "share must be 0-d or of shape"),
    ],
)
def test_the_parts_name_what_is_wrong(call, message):
    s = torch.tensor(0.4, dtype=F64)
    with pytest.raises(ValueError, match=message):
        call(s, VPSDE().marginal(s)[1])
