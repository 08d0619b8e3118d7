"""Sections 11 and 12: ancestral sampling and all steps that draw against exact laws; steps made of steps; noise."""

import math
from itertools import pairwise

import pytest
import torch
from affine import affine_law, last, laws_agree, sampler_law
from exact import DATA, F64, ancestral_steps, close, normal, propagate, randn, running_product, slope, times

from diffusion_edu.denoiser import Denoiser
from diffusion_edu.guidance import static_threshold, trace
from diffusion_edu.oracles import GaussianMixtureOracle, GaussianOracle
from diffusion_edu.prediction import Prediction
from diffusion_edu.process import VE, VESDE, VPSDE, DiscreteVP, SubVPSDE, jump, posterior, q_sample, uniform_log_snr
from diffusion_edu.samplers import (
    beta,
    beta_tilde,
    chain,
    ddim_step,
    euler_maruyama_step,
    finite,
    heun_step,
    keep_known,
    kernel_step,
    learned,
    make_ddim_step,
    make_ddpm_step,
    make_dpmpp_2m_step,
    make_langevin_step,
    noises,
    noises_per_sample,
    sample,
)
from diffusion_edu.schedules import cosine_beta, linear_beta, respace

CLOSE_BY = (0.4, 0.25)  # mean and variance of the acceptance tests


def ddpm():
    return DiscreteVP(linear_beta(1000))


def mixture(process):
    means = torch.tensor([[-1.0, 0.5], [1.0, -0.5]], dtype=F64)
    return GaussianMixtureOracle(process, means, [0.4, 0.3], [0.6, 0.4])


# Ancestral sampling


@pytest.mark.equation("ddpm.sample_alg2", "gt.affine_propagation")
@pytest.mark.parametrize("variance", [beta, beta_tilde])
def test_ancestral_sampling_is_the_exact_recursion(variance):
    process = ddpm()
    exact = propagate(ancestral_steps(process.beta.tolist(), variance.__name__), CLOSE_BY)
    law = sampler_law(make_ddpm_step(variance), GaussianOracle(process, *CLOSE_BY), process.grid(1000))
    laws_agree(law, exact, 1e-9)
    laws_agree(law, CLOSE_BY, 6e-3)  # the two variances miss the data's by a little, on either side


@pytest.mark.equation("ddpm.sample_alg2")
def test_standard_normal_data_stay_standard_normal_at_every_step():
    process = DiscreteVP(linear_beta(60, 1e-3, 0.25))
    oracle, grid = GaussianOracle(process, 0.0, 1.0), process.grid(60)
    for stop in (2, 20, 59):  # down to t = 1, where z is still drawn
        laws_agree(sampler_law(make_ddpm_step(beta), oracle, grid[: stop + 1]), (0.0, 1.0), 1e-12)
    _, var = sampler_law(make_ddpm_step(beta), oracle, grid)
    close(var, 1 - 1e-3, 1e-12)  # no z at t = 1: E000-10 would blur the data by sqrt(beta_1)


@pytest.mark.equation("ddpm.sample_alg2")
def test_the_last_step_draws_nothing_whatever_the_variance():
    process, x = ddpm(), randn(3, 2)
    oracle, calls = GaussianOracle(process, *DATA), []
    noise = lambda x: calls.append(1) or torch.ones_like(x)
    for variance in (beta, beta_tilde):
        step = make_ddpm_step(variance)
        assert torch.equal(step(oracle, x, times(1), times(0), noise), oracle(x, times(1)).x0)
    assert not calls
    drawn = step(oracle, x, times(2), times(1), noise) - step(oracle, x, times(2), times(1), torch.zeros_like)
    close(drawn, posterior(process, x, x, times(2), times(1))[1].expand(3, 2), 1e-14)


@pytest.mark.equation("ddpm.sample_code")
def test_the_listing_is_the_step():
    process, oracle = ddpm(), GaussianOracle(ddpm(), *DATA)
    x, z = randn(4, 2), randn(4, 2, seed=1)
    alphas, alpha_bars = process.alpha.tolist(), running_product(process.beta.tolist())
    for t in (1000, 500, 2):
        eps = oracle(x, times(t)).eps
        mu_t = (x - (1 - alphas[t]) / math.sqrt(1 - alpha_bars[t]) * eps) / math.sqrt(alphas[t])
        sigma_t = math.sqrt(1 - alphas[t])
        step = make_ddpm_step(beta)(oracle, x, times(t), times(t - 1), lambda x: z)
        close(step, mu_t + sigma_t * z, 1e-12)


@pytest.mark.equation("ddpm.x0_form_step")
def test_clipping_the_clean_data_changes_the_posterior_mean_only_where_it_clips():
    process, oracle, x = ddpm(), GaussianOracle(ddpm(), *DATA), 3 * randn(6, 2)
    step = make_ddpm_step()
    for t in (1, 2, 400, 1000):
        s, pred = times(t - 1), oracle(x, times(t))
        a, b, ab = process.alpha[t].item(), process.beta[t].item(), process.alpha_bar[t].item()
        plain, _ = step.kernel(oracle, x, times(t), s)
        close(plain, (x - b / math.sqrt(1 - ab) * pred.eps) / math.sqrt(a), 1e-12)
        clipped, _ = step.kernel(static_threshold(oracle), x, times(t), s)
        close(clipped, posterior(process, pred.x0.clamp(-1, 1), x, times(t), s)[0], 1e-13)
        assert (pred.x0.abs() > 1).any() and not torch.equal(plain, clipped)


@pytest.mark.equation("ddpm.progressive_x0")
def test_progressive_guesses_run_from_the_mean_of_the_data_to_the_sample():
    watched = trace(mixture(ddpm()))
    x0 = last(sample(make_ddpm_step(), watched, randn(200, 2), watched.process.grid(1000), noises(1)))
    guesses = [pred.x0 for _, pred in watched.history]
    data_mean = torch.tensor([-0.2, 0.1], dtype=F64)
    assert (guesses[0] - data_mean).abs().max() < 0.03  # scale(T) = 0.006 of a sample, 3 standard deviations
    assert torch.equal(guesses[-1], x0)
    distance = [(guess - x0).norm(dim=1).mean().item() for guess in guesses[::200]]
    assert all(a > b for a, b in pairwise(distance))


@pytest.mark.equation("ddpm.strided", "sched.respace")
def test_strided_sampling_is_sampling_on_the_respaced_table_and_converges():
    errors, counts = [], (50, 100, 200)
    for n in counts:
        oracle = GaussianOracle(ddpm(), *DATA)
        kept = oracle.process.grid(n)
        law = sampler_law(make_ddpm_step(), oracle, kept)
        short = GaussianOracle(DiscreteVP(respace(oracle.process.beta, kept[:-1].flip(0))), *DATA)
        laws_agree(law, sampler_law(make_ddpm_step(), short, short.process.grid(n)), 1e-12)
        laws_agree(law, propagate(ancestral_steps(short.process.beta.tolist(), "beta_tilde")), 1e-9)
        errors.append(abs(law[1] - 0.25))
    assert abs(slope(counts, errors) - 1) < 0.25  # error about 1 / S, not asymptotic yet


def test_all_variances_agree_on_a_continuous_process_too():
    oracle = GaussianOracle(VPSDE(), *CLOSE_BY)
    grid = oracle.process.grid(400, uniform_log_snr(1e-4))
    for variance in (beta, beta_tilde):
        laws_agree(sampler_law(make_ddpm_step(variance), oracle, grid), CLOSE_BY, 0.03)


# Learned variance


@pytest.mark.equation("lv.interp")
def test_learned_variance_runs_from_beta_tilde_to_beta_and_holds_the_best_one():
    process, x = ddpm(), randn(3, 1)
    oracle = GaussianOracle(process, *DATA)
    for t in (2, 30, 300, 1000):
        s, pred = times(t - 1), oracle(x, times(t))
        low, high = beta_tilde(pred, process, times(t), s), beta(pred, process, times(t), s)
        given = lambda frac: Prediction(x, pred.scale, pred.std, pred.x0, pred.eps, torch.full_like(x, frac))
        var = lambda frac: learned(given(frac), process, times(t), s)
        close(var(0.0), low.expand(3, 1), 1e-14)
        close(var(1.0), high.expand(3, 1), 1e-14)
        close(var(0.25), (low**0.75 * high**0.25).expand(3, 1), 1e-14)
        best = oracle.reverse_kernel(x, times(t), s)[1] ** 2
        frac = ((best / low).log() / (high / low).log())[0].item()
        assert 0 <= frac <= 1
        close(var(frac), best.expand(3, 1), 1e-13)


# Steps that draw


@pytest.mark.equation("sde.ancestral_vs_em")
def test_euler_maruyama_is_the_ancestral_step_to_second_order():
    x, gaps = randn(4, 2), []
    for b in (0.02, 0.01, 0.005):
        process = DiscreteVP(torch.tensor([0, 0.3, b], dtype=F64))
        oracle = mixture(process)
        ancestral, _ = make_ddpm_step().kernel(oracle, x, times(2), times(1))
        euler, _ = euler_maruyama_step.kernel(oracle, x, times(2), times(1))
        rate = -math.log1p(-b)  # the integral of beta(t) over the step
        close(euler, x + rate / 2 * x + rate * oracle(x, times(2)).score, 1e-13)
        gaps.append((ancestral - euler).abs().max().item())
    assert [round(math.log2(a / b)) for a, b in pairwise(gaps)] == [2, 2]


@pytest.mark.equation("sde.reverse")
def test_euler_maruyama_follows_the_reverse_sde_on_every_process():
    for process in (VPSDE(), SubVPSDE(), VESDE(sigma_max=10.0)):
        oracle, x, z = mixture(process), randn(3, 2), randn(3, 2, seed=1)
        t, s = torch.tensor(0.6, dtype=F64), torch.tensor(0.5, dtype=F64)
        f, g = process.drift(x, t), process.diffusion(t)
        by_hand = x - (f - g**2 * oracle(x, t).score) * 0.1 + g * 0.1**0.5 * z
        close(euler_maruyama_step(oracle, x, t, s, lambda x: z), by_hand, 1e-13)
    for process in (VPSDE(), SubVPSDE(), VESDE(sigma_max=10.0), ddpm()):
        oracle = GaussianOracle(process, *CLOSE_BY)
        grid = process.grid(1000, uniform_log_snr(1 if process.discrete else 1e-4))
        start = process.marginal(grid[0])[1].item()
        laws_agree(sampler_law(euler_maruyama_step, oracle, grid, start), CLOSE_BY, 0.03)


@pytest.mark.equation("langevin.step")
def test_langevin_keeps_a_unit_bell_up_to_its_step_size():
    oracle, t = GaussianOracle(ddpm(), 0.0, 1.0), times(500)
    r = 0.01 / oracle.process.marginal(t)[1].item() ** 2  # epsilon = 0.01
    move = make_langevin_step(r, n_steps=1)
    zero, unit = torch.zeros(1, 1, dtype=F64), torch.ones(1, 1, dtype=F64)
    gain = move(oracle, unit, t, t, torch.zeros_like).item()
    kick = move(oracle, zero, t, t, torch.ones_like).item()
    close(gain, 1 - 0.01, 1e-13)
    close(kick, 0.02**0.5, 1e-13)
    close(kick**2 / (1 - gain**2), 1 / (1 - 0.01 / 2), 1e-12)  # E004-02 prints sqrt(2) epsilon: .01005
    _, var = affine_law(lambda noise, like: make_langevin_step(r, 500)(oracle, noise(like), t, t, noise))
    close(var, 1 / (1 - 0.01 / 2), 1e-4)  # stationary after 500 steps, to 0.99^1000


def test_langevin_follows_the_score_of_its_level():
    oracle, x, z = mixture(VE()), randn(3, 2), randn(3, 2, seed=1)
    t, s = torch.tensor(0.8, dtype=F64), torch.tensor(0.5, dtype=F64)
    eps = 0.2 * 0.8**2
    moved = make_langevin_step(r=0.2)(oracle, x, t, s, lambda x: z)
    close(moved, x + eps * oracle(x, t).score + (2 * eps) ** 0.5 * z, 1e-13)
    assert make_langevin_step()(oracle, x, t * 0, t * 0, None) is x


def test_kernel_step_draws_what_the_model_says():
    oracle, x, z = GaussianOracle(ddpm(), *DATA), randn(3, 1), randn(3, 1, seed=1)
    mean, sigma = oracle.reverse_kernel(x, times(300), times(299))
    close(kernel_step(oracle, x, times(300), times(299), lambda x: z), mean + sigma * z, 0)


def test_the_many_times_of_a_batch_give_each_row_its_own_kernel():
    oracle, x, t = GaussianOracle(ddpm(), *DATA), randn(3, 2), torch.tensor([2, 300, 1000])
    mean, sigma = oracle.reverse_kernel(x, t, t - 1)
    for i in range(3):
        alone = oracle.reverse_kernel(x[i : i + 1], t[i], t[i] - 1)
        close(mean[i : i + 1], alone[0], 1e-15)
        close(sigma.expand(3, 2)[i : i + 1], alone[1].expand(1, 2), 1e-15)


# Steps made of steps


def test_chain_corrects_at_the_lower_time_but_not_at_zero():
    oracle, seen = mixture(ddpm()), []
    corrector = lambda model, x, t, s, noise: seen.append((t.item(), s.item())) or x + 1
    x = randn(2, 2)
    x_s = chain(ddim_step, corrector, corrector)(oracle, x, times(10), times(5), None)
    close(x_s, ddim_step(oracle, x, times(10), times(5), None) + 2, 1e-14)
    chain(ddim_step, corrector)(oracle, x, times(5), times(0), None)
    assert seen == [(5, 5), (5, 5)]


def test_known_pixels_follow_the_forward_process_and_end_exact():
    oracle, x, z = mixture(ddpm()), randn(3, 2), randn(3, 2, seed=1)
    known, mask = torch.tensor([0.7, math.nan], dtype=F64), torch.tensor([1, 0])  # nothing is known of the second
    kept = keep_known(ddim_step, known, mask)
    x_s = kept(oracle, x, times(500), times(400), lambda x: z)
    plain = ddim_step(oracle, x, times(500), times(400), None)
    close(x_s[:, 0], q_sample(oracle.process, torch.full((3, 2), 0.7, dtype=F64), times(400), z)[:, 0], 1e-15)
    assert torch.equal(x_s[:, 1], plain[:, 1])
    x_0 = kept(oracle, x, times(500), times(0), None)
    assert (x_0[:, 0] == 0.7).all()


def test_finite_reports_where_the_numbers_stop():
    model = Denoiser(lambda x, clock: x * (math.nan if clock[0] < 500 else 0.1), ddpm())
    with pytest.raises(FloatingPointError, match="after the step from t = 400 to 200"):
        list(sample(finite(ddim_step), model, randn(2, 2), torch.tensor([1000, 800, 600, 400, 200, 0])))


# Zero terminal signal, few steps


def test_zero_terminal_snr_samples_from_pure_noise():
    process = DiscreteVP(cosine_beta(50, max_beta=1.0))
    oracle = mixture(process)
    for step in (make_ddpm_step(beta), make_ddpm_step(), ddim_step, make_ddim_step(1), make_dpmpp_2m_step(), heun_step):
        path = list(sample(step, oracle, randn(500, 2), process.grid(50), noises(0)))
        assert all(x.isfinite().all() for x in path)
        x0, data = path[-1], oracle.sample(100_000, torch.Generator().manual_seed(1))[0]
        assert (x0.mean(0) - torch.tensor([-0.2, 0.1])).abs().max() < 4 * 1.1 / 500**0.5  # four standard errors
        assert (x0.var(0) / data.var(0) - 1).abs().max() < 4 * (2 / 500) ** 0.5  # bounded by a Gaussian's


def test_a_chain_of_one_step_and_a_long_cosine_stay_finite():
    for process in (DiscreteVP(linear_beta(1)), DiscreteVP(cosine_beta(1)), DiscreteVP(cosine_beta(4000))):
        oracle = mixture(process)
        for step in (make_ddpm_step(beta), ddim_step, make_dpmpp_2m_step(), heun_step, euler_maruyama_step):
            x = last(sample(step, oracle, randn(3, 2), process.grid(min(process.T, 20)), noises(0)))
            assert x.isfinite().all()


# Noise


def test_noise_is_standard_normal_fresh_and_repeatable():
    noise, again = noises(3), noises(3)
    x = torch.empty(20_000, 2, dtype=F64)
    first, second = noise(x), noise(x)
    assert torch.equal(first, again(x)) and torch.equal(second, again(x)) and first.dtype == F64
    assert (first - second).abs().min() > 0  # E000-12: the same key gives the same numbers
    for z in (first, second, (first + second) / 2**0.5):
        assert z.mean().abs() < 4 / 200 and (z.var() - 1).abs() < 4 * (2 / 40_000) ** 0.5
    assert not torch.equal(noises(4)(x), first)


def test_noise_per_sample_depends_on_seed_and_index_only():
    x = torch.empty(4, 3, 2)
    whole, part = noises_per_sample(0, [5, 6, 7, 8]), noises_per_sample(0, [7, 5])
    for _ in range(3):
        a, b = whole(x), part(x[:2])
        assert torch.equal(a[[2, 0]], b)
    assert not torch.equal(noises_per_sample(1, [5])(x[:1]), noises_per_sample(0, [5])(x[:1]))
    rows = noises_per_sample(0, range(2000))(torch.empty(2000, 10))
    assert rows.mean().abs() < 4 / 20_000**0.5 and (rows.var() - 1).abs() < 4 * (2 / 20_000) ** 0.5
    assert (rows[1:] * rows[:-1]).mean().abs() < 4 / 20_000**0.5
    assert noises_per_sample(0, [])(torch.empty(0, 3)).shape == (0, 3)


def test_the_same_noise_in_every_step_is_seen_in_the_variance():
    oracle = GaussianOracle(DiscreteVP(linear_beta(200, 1e-4, 0.1)), *DATA)
    grid = oracle.process.grid(200)
    one = torch.tensor([[1.0]], dtype=F64)
    run = lambda z: last(sample(make_ddpm_step(beta), oracle, z, grid, lambda x: z)).item()
    reused = (run(one) - run(0 * one)) ** 2  # every draw is x_T
    assert reused > 10 and abs(sampler_law(make_ddpm_step(beta), oracle, grid)[1] - 0.25) < 0.01


def test_the_density_of_samples_is_the_data():
    """One end-to-end draw: the histogram of ancestral samples against the mixture's density."""
    means = torch.tensor([[-1.0], [1.0]], dtype=F64)
    oracle = GaussianMixtureOracle(DiscreteVP(linear_beta(200, 1e-4, 0.1)), means, [0.3, 0.3], [0.3, 0.7])
    n = 20_000
    x = last(sample(make_ddpm_step(), oracle, randn(n, 1), oracle.process.grid(200), noises(1)))
    edges = torch.linspace(-2.5, 2.5, 11, dtype=F64)
    counts = torch.histogram(x.flatten(), edges).hist
    fine = torch.linspace(-2.5, 2.5, 5001, dtype=F64)
    density = 0.3 * normal(fine, -1.0, 0.09) + 0.7 * normal(fine, 1.0, 0.09)
    expected = n * torch.stack([density[i * 500 : (i + 1) * 500].sum() * 0.001 for i in range(10)])
    assert ((counts - expected).abs() < 5 * expected.sqrt() + 0.01 * n).all()  # 5 sigma, and 1 % for 200 steps


def test_jumping_and_stepping_have_the_same_law():
    oracle = GaussianOracle(ddpm(), *DATA)
    t, s = times(900), times(300)
    scale, std = jump(oracle.process, t, s)
    mean, var = oracle.law(s)
    laws_agree((scale * mean, scale**2 * var + std**2), oracle.law(t), 1e-13)
