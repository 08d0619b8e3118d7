"""Section 5 and EDM's grid: each schedule against its formula, in plain numbers."""

import math
import warnings

import pytest
import torch
from affine import sampler_law
from exact import F64, close, times

from diffusion_edu import schedules
from diffusion_edu.oracles import GaussianOracle
from diffusion_edu.process import DiscreteVP
from diffusion_edu.samplers import make_ddpm_step
from diffusion_edu.schedules import (
    beta_from_alpha_bar,
    cosine_beta,
    geometric_sigmas,
    karras_sigmas,
    linear_beta,
    quadratic_beta,
    respace,
    sigmoid_beta,
    swiss_beta,
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
