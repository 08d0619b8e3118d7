"""Section 13, the second half: Langevin dynamics, its bias, its steps, and annealing."""

import math

import pytest
import torch
from affine import affine_law, last, sampler_law
from exact import DATA, F64, close, randn
from modes import MEANS, STD, WEIGHTS, FastThreeModes, modes

from diffusion_edu.oracles import GaussianOracle
from diffusion_edu.process import VE
from diffusion_edu.samplers import langevin, make_langevin_step, noises, sample
from diffusion_edu.schedules import geometric_sigmas

BELL = lambda x: -x  # the score of N(0, 1)


def silence(x):
    return torch.zeros_like(x)


@pytest.mark.equation("langevin.step")
@pytest.mark.parametrize("epsilon", [0.01, 0.3, 1.5])
def test_the_stationary_variance_of_a_bell_is_one_over_one_minus_half_a_step(epsilon):
    one, zero = torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64)
    gain = next(langevin(BELL, one, [epsilon], silence)).item()
    kick = next(langevin(BELL, zero, [epsilon], torch.ones_like)).item()
    close(gain, 1 - epsilon, 1e-15)
    close(kick**2 / (1 - gain**2), 1 / (1 - epsilon / 2), 1e-13)  # v = gain^2 v + kick^2
    n = math.ceil(-17 / math.log(gain**2))  # until the start is forgotten, to e^-17
    _, var = affine_law(lambda noise, like: last(langevin(BELL, noise(like), [epsilon] * n, noise)))
    close(var, 1 / (1 - epsilon / 2), 1e-6)
    if epsilon == 0.01:  # E004-02, sqrt(2) epsilon
        assert 2 * epsilon**2 / (1 - gain**2) == pytest.approx(0.01005, abs=1e-5) and round(var, 5) == 1.00503


@pytest.mark.equation("langevin.sgld")
def test_sgld_is_the_same_step_bit_for_bit():
    score = lambda x: -x + x.sin()
    for seed, delta in ((0, 0.02), (1, 0.37), (2, 1e-5)):
        x, z = randn(50, 2, seed=seed), randn(50, 2, seed=seed + 9)
        sgld = x + delta / 2 * score(x) + math.sqrt(delta) * z
        assert torch.equal(next(langevin(score, x, [delta / 2], lambda x: z)), sgld)


@pytest.mark.equation("langevin.convergence")
def test_steps_must_shrink_but_not_too_fast():
    start = torch.tensor([10.0], dtype=F64)  # of the mean, without noise
    stalled = last(langevin(BELL, start, (2.0 ** -(k + 1) for k in range(60)), silence)).item()
    assert stalled == pytest.approx(2.888, abs=5e-4)  # E004-04: 10 (1 - 1/2)(1 - 1/4)(1 - 1/8)...
    forgot = last(langevin(BELL, start, (0.5 / k for k in range(1, 20_001)), silence)).item()
    assert forgot == pytest.approx(0.040, abs=5e-4)
    exact = 10 * math.exp(math.lgamma(20_000.5) - math.lgamma(0.5) - math.lgamma(20_001))  # Wallis: 10 / sqrt(pi n)
    close(forgot, exact, 1e-9)


@pytest.mark.equation("langevin.convergence")
def test_a_fixed_step_has_a_bias_of_its_order_and_shrinking_ones_lose_it():
    def bias(steps):
        return affine_law(lambda noise, like: last(langevin(BELL, noise(like), steps, noise)))[1] - 1

    fixed = [bias([epsilon] * 400) for epsilon in (0.2, 0.1, 0.05)]
    assert fixed[0] / fixed[1] == pytest.approx(2, abs=0.15) and fixed[1] / fixed[2] == pytest.approx(2, abs=0.1)
    shrinking = [bias([2 / (k + 10) for k in range(n)]) for n in (400, 800)]
    assert shrinking[0] < 0.2 * fixed[2] and shrinking[0] / shrinking[1] == pytest.approx(2, abs=0.1)  # and on to 0


def test_langevin_yields_every_state_keeps_no_graph_and_leaves_its_start_alone():
    x = randn(4, 1, 3, 3, dtype=torch.float32).requires_grad_()
    before = x.detach().clone()
    path = list(langevin(BELL, x, [0.1] * 5, noises(0)))
    assert len(path) == 5 and path[-1].dtype == torch.float32 and not path[-1].requires_grad
    assert torch.equal(x, before) and torch.equal(path[-1], list(langevin(BELL, x, [0.1] * 5, noises(0)))[-1])
    walk = langevin(BELL, x, iter([0.1, 0.1]), noises(0))
    next(walk)
    assert torch.is_grad_enabled()


# Annealed


def annealed_by_hand(sigmas, epsilon, n_steps, start):
    """Song and Ermon's algorithm 1 on a mean and a variance, for data N(DATA)."""
    (m, v), (mean, var) = DATA, start
    for sigma in sigmas:
        alpha = epsilon * sigma**2 / sigmas[-1] ** 2
        pull = alpha / 2 / (v + sigma**2)
        for _ in range(n_steps):
            mean, var = mean - pull * (mean - m), (1 - pull) ** 2 * var + alpha
    return mean, var


@pytest.mark.equation("ncsn.annealed")
def test_annealed_langevin_is_the_exact_recursion_and_ends_at_the_last_level():
    oracle, sigmas = GaussianOracle(VE(), *DATA), geometric_sigmas(6, 0.1, 5.0)
    for epsilon, n_steps in ((1e-3, 20), (4e-3, 600)):
        step = make_langevin_step(epsilon / (2 * 0.1**2), n_steps)  # alpha_i = 2 r sigma_i^2
        law = sampler_law(step, oracle, sigmas, start_std=5.0)
        exact = annealed_by_hand(sigmas[:-1].tolist(), epsilon, n_steps, (0.0, 25.0))
        close(torch.tensor(law), torch.tensor(exact), 1e-10)
    close(torch.tensor(law), torch.tensor([1.3, 0.25 + 0.1**2]), 2e-3)  # s^2 + sigma_L^2, not s^2; epsilon / 4 of bias


def run(step, levels, n):
    """Annealed Langevin from the prior of the largest level: how far its weights and its widths are off."""
    noise = noises(0)
    process = VE(levels[0].item())
    x = last(sample(step, FastThreeModes(process), process.prior((n, 1), noise), levels, noise))
    weights, stds = modes(x)
    return (weights - torch.tensor(WEIGHTS)).abs().max().item(), (stds - 1).abs().max().item()


@pytest.mark.equation("ncsn.annealed")
def test_annealing_finds_the_weights_and_more_steps_a_level_come_closer():
    levels = geometric_sigmas(10, 0.05, 8.0)
    sizes = ((10, 20_000), (50, 60_000), (200, 20_000))
    off = [run(make_langevin_step(0.1, n_steps), levels, n) for n_steps, n in sizes]
    assert off[1][0] < 0.06 and off[1][1] < 0.15  # 500 evaluations
    assert off[0][0] > 2 * off[1][0] > 3 * off[2][0] and off[0][1] > 2 * off[1][1] > 2 * off[2][1], off


@pytest.mark.equation("ncsn.annealed", "langevin.step")
def test_without_annealing_a_walk_stays_in_the_mode_where_it_began():
    model, level = FastThreeModes(VE()), torch.tensor(0.05, dtype=F64)
    x = MEANS[2] + STD * randn(20_000, 1, dtype=torch.float32)
    x = last(langevin(lambda x: model(x, level).score, x, [0.005] * 500, noises(0)))
    assert ((x - MEANS[2]).abs() < 1.5).double().mean() > 0.95  # in a mode of weight .3
    assert abs(x.std() / STD - 1) < 0.05  # and of the right width there
