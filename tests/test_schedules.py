"""Section 5 and EDM's grid: each schedule against its formula, in plain numbers."""

import math
import warnings

import pytest
import torch
from affine import sampler_law
from exact import DATA, F64, close, randn, times

from diffusion_edu import schedules
from diffusion_edu.config import shifted_cosine
from diffusion_edu.oracles import GaussianOracle
from diffusion_edu.process import DiscreteVP, uniform_log_snr
from diffusion_edu.samplers import ddim_step, kernel_step, make_ddpm_step
from diffusion_edu.schedules import (
    beta_from_alpha_bar,
    beta_from_log_snr,
    cosine_beta,
    cosine_log_snr,
    geometric_sigmas,
    interpolated_log_snr,
    karras_sigmas,
    linear_beta,
    quadratic_beta,
    respace,
    shift_log_snr,
    sigmoid_beta,
    swiss_beta,
    zero_terminal_snr,
)


@pytest.mark.equation("sched.linear")
def test_linear_has_its_ends_and_constant_steps_and_destroys_the_data():
    beta = linear_beta(1000)
    assert beta[1] == 1e-4 and beta[1000] == 0.02 and beta[0] == 0
    close(beta[1:].diff(), torch.full((999,), 0.0199 / 999, dtype=F64), 1e-17)  # one rounding of 0.02
    assert math.prod((1 - beta).tolist()) == pytest.approx(4.0358e-5, rel=1e-5)  # five digits of the inventory
    with pytest.warns(UserWarning, match="x_T is not noise"):  # alpha_bar_T = 0.6: too few steps
        linear_beta(50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        beta = linear_beta(1000, beta_end=0.01)  # E002-02: 6.3e-3 is left, 8 % of the signal
    assert math.prod((1 - beta).tolist()) == pytest.approx(6.3e-3, rel=0.01)


@pytest.mark.equation("sched.linear")
@pytest.mark.parametrize("T, beta_end", [(1000, 0.01), (50, 0.02)], ids=["E002-02", "T=50"])
@pytest.mark.filterwarnings("ignore:alpha_bar")
def test_the_data_left_at_T_are_missing_from_the_mean_of_the_samples(T, beta_end):
    (m, s2), beta = DATA, linear_beta(T, beta_end=beta_end)
    ab = math.prod((1 - beta).tolist())
    v, oracle = ab * s2 + 1 - ab, GaussianOracle(DiscreteVP(beta), *DATA)
    mean, var = sampler_law(kernel_step, oracle, oracle.process.grid(50))  # exact reverse steps, from N(0, 1)
    close(mean, m - ab * s2 / v * m, 1e-12)
    close(var, s2 * (1 - ab) / v + (s2 / v) ** 2 * ab, 1e-12)
    joined, gaps = GaussianOracle(oracle.process.continuous(), *DATA), []
    for n in (200, 400):
        mean, _ = sampler_law(ddim_step, joined, joined.process.grid(n, uniform_log_snr(1e-3)))
        gaps.append(mean - (m - (ab * s2 / v) ** 0.5 * m))  # the probability flow forgets nothing of its start
    assert abs(gaps[1]) < 5e-3 and gaps[1] / gaps[0] == pytest.approx(0.5, abs=0.02)  # O(1 / n), to that limit


@pytest.mark.equation("sched.cosine")
def test_cosine_alpha_bar_is_a_squared_cosine_until_the_clip():
    beta = cosine_beta(1000)
    f = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(1001)]
    close((1 - beta).cumprod(0)[:1000], torch.tensor(f, dtype=F64)[:1000] / f[0], 1e-12)
    clipped = beta == 0.999
    assert clipped.sum() == 1 and clipped[1000]
    assert (1 / (1 - beta).sqrt()).isfinite().all()
    unclipped = cosine_beta(1000, max_beta=1.0)  # E002-05: without the clip 1 / sqrt(alpha_T) is infinite
    assert unclipped[1000] == 1 and torch.equal(unclipped[:1000], beta[:1000])


@pytest.mark.equation("sched.quadratic")
def test_quadratic_is_linear_in_the_square_root():
    beta = quadratic_beta(1000, 0.00085, 0.012)
    close(beta[1:].sqrt().diff(), torch.full((999,), (0.012**0.5 - 0.00085**0.5) / 999, dtype=F64), 1e-15)
    close(beta[[1, 1000]], torch.tensor([0.00085, 0.012], dtype=F64), 1e-16)
    assert abs(beta[500] - linear_beta(1000, 0.00085, 0.012)[500]) > 1e-4  # not the linear schedule


@pytest.mark.equation("sched.sigmoid")
def test_sigmoid_is_symmetric_and_does_not_reach_its_asymptotes():
    beta = sigmoid_beta(999)
    close(beta[1:] + beta[1:].flip(0), torch.full((999,), 1e-4 + 0.02, dtype=F64), 1e-15)
    close(beta[500], torch.tensor((1e-4 + 0.02) / 2, dtype=F64), 1e-15)
    beta = sigmoid_beta(1000, tau=3.0)  # E002-16
    assert beta[1] / 1e-4 == pytest.approx(10.4, abs=0.05)
    close(beta[300], 1e-4 + 0.0199 / (1 + math.exp(3 * (1 - 2 * 299 / 999))), 1e-15)


@pytest.mark.equation("sched.swiss")
def test_swiss_schedule_has_its_published_ends():
    beta = swiss_beta()
    assert len(beta) == 41
    assert beta[1] == pytest.approx(1.0005e-5, rel=1e-4) and beta[40] == pytest.approx(0.29999, abs=1e-5)
    for t in (2, 17, 39):
        close(beta[t], 1e-5 + (0.3 - 1e-5) / (1 + math.exp(18 - 28 * (t - 1) / 39)), 1e-15)
    close(DiscreteVP(beta).alpha_bar[40], math.prod((1 - beta).tolist()), 1e-15)


@pytest.mark.equation("sched.from_alpha_bar")
@pytest.mark.parametrize("schedule", [linear_beta, quadratic_beta, sigmoid_beta, cosine_beta, swiss_beta])
def test_betas_of_an_alpha_bar_table_are_the_betas_it_was_made_of(schedule):
    beta = schedule()
    close(beta_from_alpha_bar((1 - beta).cumprod(0)), beta, 1e-12)
    assert torch.equal(beta_from_alpha_bar(torch.tensor([1.0, 0.5, 0.0])), torch.tensor([0, 0.5, 0.999], dtype=F64))


@pytest.mark.equation("sched.logsnr")
def test_the_cosine_log_snr_is_cos_squared_and_its_cut_ends_at_both_limits():
    t = torch.linspace(0, 1, 1001, dtype=F64)
    whole = cosine_log_snr(t, -math.inf, math.inf)
    close(whole.sigmoid(), torch.cos(math.pi * t / 2) ** 2, 1e-13)
    assert whole[0] == math.inf
    low, high = -4.0, 15.0
    cut = cosine_log_snr(t, low, high)
    close(cut[[0, -1]], [high, low], 1e-13)
    start, end = (2 / math.pi * math.atan(math.exp(-x / 2)) for x in (high, low))
    for i in (1, 300, 700, 999):  # the same curve, run through from ``start`` to ``end``
        at = math.pi / 2 * (start + t[i].item() * (end - start))
        close(cut[i], -2 * math.log(math.tan(at)), 1e-13)
    close(cosine_log_snr(t[-1:]), [-15.0], 1e-11)  # next to the pole of tan its argument counts e^7.5 times


@pytest.mark.equation("sched.logsnr")
@pytest.mark.parametrize("schedule", [linear_beta, quadratic_beta, sigmoid_beta, cosine_beta, swiss_beta])
def test_a_table_is_known_by_its_log_snr(schedule):
    beta = schedule()
    log_alpha_bar = torch.log1p(-beta).cumsum(0)[1:]
    log_snr = log_alpha_bar - (-torch.expm1(log_alpha_bar)).log()
    close(beta_from_log_snr(log_snr), beta, 1e-13)
    close(DiscreteVP(beta_from_log_snr(log_snr)).log_snr(torch.arange(1, len(beta))), log_snr, 1e-11)


@pytest.mark.equation("sched.logsnr")
def test_the_last_log_snr_may_be_minus_infinity_and_the_cosine_table_is_the_cosine_log_snr():
    beta = beta_from_log_snr(torch.tensor([2.0, 0.0, -math.inf]))
    assert beta[3] == 1
    close(DiscreteVP(beta).alpha_bar, [1, 1 / (1 + math.exp(-2)), 0.5, 0], 1e-15)
    log_snr = cosine_log_snr(torch.arange(1, 401, dtype=F64) / 400, -math.inf, math.inf)
    close(beta_from_log_snr(log_snr), cosine_beta(400, s=0, max_beta=1), 1e-11)


@pytest.mark.parametrize("schedule", [linear_beta, quadratic_beta, cosine_beta])
def test_zero_terminal_snr_moves_the_signal_along_a_straight_line(schedule):
    beta = schedule(1000)
    process = DiscreteVP(zero_terminal_snr(beta))
    old = (1 - beta).cumprod(0).sqrt().tolist()
    for t in (1, 2, 500, 999):
        close(process.marginal(times(t))[0], old[1] * (old[t] - old[1000]) / (old[1] - old[1000]), 1e-13)
    assert process.alpha_bar[1000] == 0 and process.beta[1000] == 1 and process.zero_terminal_snr
    close(zero_terminal_snr(process.beta), process.beta, 1e-12)  # there is nothing left to take away
    oracle = GaussianOracle(process, *DATA)
    close(sampler_law(kernel_step, oracle, process.grid(50)), DATA, 1e-12)  # x_T is noise now: back to the data


@pytest.mark.equation("sched.respace")
def test_respacing_keeps_alpha_bar_at_the_kept_steps():
    beta = linear_beta(1000)
    kept = torch.tensor([1, 2, 17, 400, 999, 1000])
    alpha_bar, respaced = DiscreteVP(beta).alpha_bar, respace(beta, kept)
    close(DiscreteVP(respaced).alpha_bar[1:], alpha_bar[kept], 1e-14)
    beta_tilde = (1 - alpha_bar[17]) / (1 - alpha_bar[400]) * (1 - alpha_bar[400] / alpha_bar[17])
    mine = DiscreteVP(respaced)
    close(mine.beta[4] * (1 - mine.alpha_bar[3]) / (1 - mine.alpha_bar[4]), beta_tilde, 1e-14)
    close(respace(beta, torch.arange(1, 1001)), beta, 1e-15)


@pytest.mark.equation("sched.respace")
def test_a_strided_chain_keeps_the_mean_of_gaussian_data():
    oracle = GaussianOracle(DiscreteVP(respace(linear_beta(1000), torch.arange(10, 1001, 10))), 1.3, 0.25)
    mean, _ = sampler_law(make_ddpm_step(), oracle, oracle.process.grid(100))
    assert abs(mean - 1.3) < 1e-2


@pytest.mark.equation("sched.geometric_sigma")
def test_geometric_sigmas_have_a_constant_ratio_and_end_in_zero():
    sigmas = geometric_sigmas(10)
    assert sigmas[0] == 1.0 and sigmas[10] == 0 and len(sigmas) == 11
    close(sigmas[:10].log().diff(), torch.full((9,), math.log(0.01) / 9, dtype=F64), 1e-14)
    close(sigmas[9], 0.01, 1e-16)
    assert geometric_sigmas(1, 0.01, 50.0).tolist() == [50.0, 0.0]


@pytest.mark.equation("edm.sigma_grid")
def test_karras_sigmas_are_linear_in_the_seventh_root():
    sigmas = karras_sigmas(18)
    assert sigmas[0] == 80 and sigmas[18] == 0 and len(sigmas) == 19
    close(sigmas[17], 0.002, 1e-16)
    close((sigmas[:18] ** (1 / 7)).diff(), torch.full((17,), (0.002 ** (1 / 7) - 80 ** (1 / 7)) / 17, dtype=F64), 1e-13)
    assert karras_sigmas(1).tolist() == [80.0, 0.0]  # the official code gives nan here
    close(karras_sigmas(5, 0.1, 10.0, rho=1.0)[:5], torch.linspace(10, 0.1, 5, dtype=F64), 1e-14)


def test_one_step_schedules_work():
    for schedule in (linear_beta, quadratic_beta, sigmoid_beta, cosine_beta, swiss_beta):
        process = DiscreteVP(schedule(1))
        assert process.T == 1 and 0 < process.beta[1] < 1 and process.grid(1).tolist() == [1, 0]


def test_a_million_steps_take_tables_of_a_million_numbers():
    process = DiscreteVP(linear_beta(10**6))
    assert sum(b.numel() * b.element_size() for b in process.buffers()) <= 64e6  # bytes: O(T)
    assert process.marginal(times(10**6))[0] >= 0
    with pytest.raises(ValueError, match=rf"T must be in \[1, {schedules.MAX_STEPS}\]; got {10**12}"):
        linear_beta(10**12)


@pytest.mark.equation("edm.sigma_grid")
def test_the_grid_of_eighteen_levels_is_that_of_the_paper():
    levels = karras_sigmas(18)
    for i, level in ((0, 80.0), (1, 57.5860), (2, 40.7856), (17, 0.002), (18, 0.0)):
        assert round(levels[i].item(), 4) == level


# Shifts for large images


def pooling(side, r):
    """The matrices of averaging r x r pixels of an image of ``side`` r pixels a side, and of repeating them."""
    line = torch.eye(side, dtype=F64).repeat_interleave(r, 1) / r
    down = torch.kron(line, line)
    return down, r**2 * down.T


@pytest.mark.equation("sched.shift", "simple_diffusion.shift")
@pytest.mark.parametrize("r", [2, 3, 4])
def test_averaging_pixels_shifts_the_log_snr_by_two_log_r(r):
    side = 4
    down, up = pooling(side, r)
    close(down @ down.T, torch.eye(side**2, dtype=F64) / r**2, 1e-15)  # the noise: variance by r^2
    close(down @ up, torch.eye(side**2, dtype=F64), 1e-15)  # the picture: kept
    small = cosine_log_snr(torch.tensor([0.1, 0.5, 0.9]))
    close(shift_log_snr(small, r * side, side) + 2 * math.log(r), small, 1e-14)  # what pooling gives back
    assert torch.equal(shift_log_snr(small, side, side), small)


@pytest.mark.equation("sched.shift", "simple_diffusion.shift")
def test_a_large_image_on_the_shifted_schedule_hides_what_the_small_one_does():
    """Of Gaussian pictures, E[x_0 | x_t] and what stays unknown, exactly: at equal log SNR the large one is easier."""
    side, r = 3, 4
    _, up = pooling(side, r)
    root = randn(side**2, side**2)
    prior = torch.linalg.inv(root @ root.T + 0.1 * torch.eye(side**2, dtype=F64))
    left = lambda see, log_snr: torch.linalg.inv(prior + log_snr.exp() * see.T @ see)  # posterior covariance
    same = torch.eye(side**2, dtype=F64)
    for log_snr in cosine_log_snr(torch.tensor([0.1, 0.5, 0.9])):
        close(left(up, shift_log_snr(log_snr, r * side, side)), left(same, log_snr), 1e-9)
        assert torch.linalg.eigvalsh(left(same, log_snr) - left(up, log_snr)).min() > 0


@pytest.mark.equation("sched.shift")
def test_the_interpolated_schedule_goes_from_one_shift_to_the_other():
    t = torch.linspace(0, 1, 11, dtype=F64)
    log_snr = cosine_log_snr(t)
    mixed = interpolated_log_snr(t, log_snr, 128, 32, 256)
    low, high = shift_log_snr(log_snr, 128, 32), shift_log_snr(log_snr, 128, 256)
    close(mixed[[0, 10]], torch.stack([high[0], low[10]]), 1e-14)
    close(mixed, t * low + (1 - t) * high, 1e-14)
    close(high - low, torch.full((11,), 2 * math.log(256 / 32), dtype=F64), 1e-14)
    assert (mixed.diff() < 0).all()
    close(interpolated_log_snr(t, log_snr, 128, 32, 32), low, 1e-14)
    uncut = cosine_log_snr(t, -math.inf, math.inf)
    assert interpolated_log_snr(t, uncut, 128)[[0, 10]].tolist() == [math.inf, uncut[10].item() + 2 * math.log(1 / 4)]


def test_the_config_of_photographs_has_the_shifted_table():
    process, t = DiscreteVP(shifted_cosine(50, size=64, base=32)), torch.arange(1, 50)
    close(process.log_snr(t), cosine_log_snr(t.double() / 50) - 2 * math.log(2), 1e-9)


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (lambda x: shift_log_snr(x, 0), ValueError, "size must be at least 1; got 0"),
        (lambda x: shift_log_snr(x, 64.0), TypeError, "size must be an integer"),
        (lambda x: shift_log_snr(x, 64, -1), ValueError, "base must be at least 1"),
        (lambda x: shift_log_snr(3.0, 64), TypeError, "log_snr must be a torch.Tensor"),
        (lambda x: interpolated_log_snr(x + 2, x, 64), ValueError, r"t must be in \[0, 1\]"),
        (lambda x: interpolated_log_snr(x, x[:1], 64), ValueError, "log_snr must have the shape of t"),
    ],
)
def test_shifts_refuse_what_cannot_be(call, kind, message):
    with pytest.raises(kind, match=message):
        call(torch.tensor([0.2, 0.6]))
