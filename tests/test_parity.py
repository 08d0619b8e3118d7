"""The library diffusers, on a linear model: same tables, same x_T, same noises, same samples.

Its times are 0-based (its t is our t + 1), and its tables are float32: 1e-4 relative is what it can hold. Where it
does something else on purpose, the test says so.
"""

from itertools import pairwise

import pytest
import torch
from affine import last
from exact import F64, close, randn, times

from diffusion_edu.guidance import Wrapped, static_threshold
from diffusion_edu.oracles import GaussianOracle
from diffusion_edu.prediction import Prediction
from diffusion_edu.process import DiscreteVP, expand, karras, q_sample
from diffusion_edu.samplers import (
    beta,
    beta_tilde,
    ddim_step,
    heun_step,
    invert,
    make_ddim_step,
    make_ddpm_step,
    make_dpmpp_2m_step,
    sample,
)
from diffusion_edu.schedules import linear_beta, quadratic_beta, respace

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy, of their code

# Equal strides that start at T: ours is their "trailing" spacing, apart from the shift by one.
COMMON = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, clip_sample=False, timestep_spacing="trailing")


def oracle():
    """The exact model of Gaussian data: linear in x_t."""
    return GaussianOracle(DiscreteVP(linear_beta(1000)), 1.3, 0.25)


def ours(step, n, x_T, zs):
    zs = iter(zs)
    model = oracle()
    return last(sample(step, model, x_T, model.process.grid(n), lambda x: next(zs)))


def theirs(scheduler, n, x_T, zs, **kwargs):
    """Their loop, with our model and our noises put in."""
    scheduler.set_timesteps(n)
    x, zs, model = x_T, iter(zs), oracle()
    for t in scheduler.timesteps:
        out = model(x, t.long() + 1).eps
        if "eta" in kwargs:
            kwargs["variance_noise"] = next(zs) if kwargs["eta"] else None
        x = scheduler.step(out, t, x, **kwargs).prev_sample
    return x


def relative(a, b, tol=1e-4):
    close(a / b.abs().max(), b / b.abs().max(), tol)


def draws(n):
    return [randn(5, 2, seed=k) for k in range(1, n + 1)]


@pytest.mark.parametrize("ours_table, name", [(linear_beta, "linear"), (quadratic_beta, "scaled_linear")])
def test_tables_and_noising(ours_table, name):
    process = DiscreteVP(ours_table(1000))
    scheduler = diffusers.DDPMScheduler(**COMMON, beta_schedule=name)
    relative(process.alpha_bar[1:], scheduler.alphas_cumprod.double())
    x0, eps = randn(5, 2), randn(5, 2, seed=1)
    t = times(0, 10, 500, 998, 999)
    close(q_sample(process, x0, t + 1, eps), scheduler.add_noise(x0, eps, t), 1e-5)  # their 1 - alpha_bar cancels


@pytest.mark.parametrize("kind, variance", [("fixed_large", beta), ("fixed_small", beta_tilde)])
@pytest.mark.parametrize("n", [1000, 50, 10])
def test_ancestral_sampling(kind, variance, n, monkeypatch):
    """On strides their last step draws noise too (they ask t > 0, not s > 0): it gets zeros here."""
    zs, x_T = draws(n), randn(5, 2)
    scheduler = diffusers.DDPMScheduler(**COMMON, variance_type=kind)
    queue = iter([*zs[:-1], torch.zeros(5, 2, dtype=F64)])
    module = diffusers.schedulers.scheduling_ddpm
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(queue))
    relative(ours(make_ddpm_step(variance), n, x_T, zs), theirs(scheduler, n, x_T, zs))
    assert len(list(queue)) == (1 if n == 1000 else 0)


def test_their_smallest_variance_is_clipped_where_ours_is_zero(monkeypatch):
    """fixed_small keeps beta-tilde above 1e-20; its last step draws nothing either, so nothing differs."""
    scheduler = diffusers.DDPMScheduler(**COMMON, variance_type="fixed_small")
    scheduler.set_timesteps(1000)
    assert scheduler._get_variance(0).item() == pytest.approx(1e-20)
    fail = lambda *args, **kwargs: pytest.fail("noise at the last step")
    monkeypatch.setattr(diffusers.schedulers.scheduling_ddpm, "randn_tensor", fail)
    x, model = randn(5, 2), oracle()
    last_step = scheduler.step(model(x, times(1)).eps, torch.tensor(0), x).prev_sample
    relative(make_ddpm_step()(model, x, times(1), times(0), None), last_step)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("n", [1000, 50, 10])
def test_ddim(eta, n):
    zs, x_T = draws(n), randn(5, 2)
    scheduler = diffusers.DDIMScheduler(**COMMON, set_alpha_to_one=True)
    # In float32, at its last step, 1 - alpha_bar_prev - sigma^2 is 0 up to rounding: no square root of a negative.
    relative(ours(make_ddim_step(eta), n, x_T, zs), theirs(scheduler, n, x_T, zs, eta=eta))


def test_without_set_alpha_to_one_their_ddim_stops_a_step_early():
    """set_alpha_to_one=False ends at their alphas_cumprod[0], our alpha_bar[1]: some noise is left."""
    x_T = randn(5, 2)
    scheduler = diffusers.DDIMScheduler(**COMMON, set_alpha_to_one=False)
    stopped = theirs(scheduler, 50, x_T, [], eta=0.0)
    model = oracle()
    grid = model.process.grid(50)
    grid[-1] = 1
    relative(last(sample(ddim_step, model, x_T, grid)), stopped)
    assert (stopped - ours(ddim_step, 50, x_T, [])).abs().max() > 1e-3


def test_their_default_spacing_does_not_start_at_T():
    """ "leading", their default, starts at 981 (our count) for 50 steps: the first 19 levels are never visited."""
    scheduler = diffusers.DDIMScheduler(**COMMON | dict(timestep_spacing="leading"), set_alpha_to_one=True)
    scheduler.set_timesteps(50)
    assert (scheduler.timesteps + 1).tolist() == list(range(981, 0, -20))
    assert oracle().process.grid(50).tolist() == [*range(1000, 0, -20), 0]
    x_T = randn(5, 2)
    grid = torch.cat([scheduler.timesteps.long() + 1, torch.tensor([0])])
    relative(last(sample(ddim_step, oracle(), x_T, grid)), theirs(scheduler, 50, x_T, [], eta=0.0))


@pytest.mark.parametrize("recompute", [True, False])
def test_clipping(recompute):
    """They keep the old noise after clipping x0, unless use_clipped_model_output: then they recompute it, as we do."""
    scheduler = diffusers.DDIMScheduler(**COMMON | dict(clip_sample=True), set_alpha_to_one=True)
    x_T = 2 * randn(5, 2)
    stopped = theirs(scheduler, 10, x_T, [], eta=0.0, use_clipped_model_output=recompute)
    mine = last(sample(ddim_step, static_threshold(oracle()), x_T, oracle().process.grid(10)))
    if recompute:
        relative(mine, stopped)
    else:
        model, x = oracle(), x_T
        for t, s in pairwise(model.process.grid(10)):
            scale, std = model.process.marginal(s)
            pred = model(x, t)
            x = scale * pred.x0.clamp(-1, 1) + std * pred.eps
        relative(x, stopped)


def test_their_strided_variance_is_the_respaced_one():
    scheduler = diffusers.DDPMScheduler(**COMMON, variance_type="fixed_small")
    scheduler.set_timesteps(50)
    kept = oracle().process.grid(50)[:-1].flip(0)
    table = DiscreteVP(respace(linear_beta(1000), kept))
    tilde = table.beta[1:] * (1 - table.alpha_bar[:-1]) / (1 - table.alpha_bar[1:])
    variance = torch.stack([scheduler._get_variance(int(t) - 1) for t in kept]).double()
    close(variance[1:] / tilde[1:], torch.ones(49, dtype=F64), 1e-3)  # float32 differences of alpha_bar


# Fast solvers. Their tables hold sigma = std / scale, and their x is ours but for Heun's, which is x / scale.

FAST = {key: value for key, value in COMMON.items() if key != "clip_sample"}


@pytest.mark.equation("solver.dpmpp2m")
@pytest.mark.parametrize("n", [5, 10, 14, 15, 50, 1000])  # from 15 on, lower_order_final changes nothing
def test_dpmpp_2m(n):
    x_T = randn(5, 2)
    scheduler = diffusers.DPMSolverMultistepScheduler(**FAST)
    relative(ours(make_dpmpp_2m_step(), n, x_T, []), theirs(scheduler, n, x_T, []))
    assert scheduler.sigmas[-1] == 0  # their last step is of first order, to the clean data, as ours


@pytest.mark.parametrize("n", [50, 1000])
def test_with_sigma_min_their_dpmpp_2m_keeps_noise_and_pays_for_a_dead_step(n):
    """final_sigmas_type="sigma_min" ends at our t = 1; 1,000 steps are there after 999, and the last stands still."""
    scheduler, x_T = diffusers.DPMSolverMultistepScheduler(**FAST, final_sigmas_type="sigma_min"), randn(5, 2)
    stopped, model = theirs(scheduler, n, x_T, []), oracle()
    grid = model.process.grid(n)
    grid = torch.cat([grid[grid > 1], times(1)[None]])
    relative(last(sample(make_dpmpp_2m_step(), model, x_T, grid)), stopped)
    assert len(grid) - 1 == min(n, 999) and (stopped - ours(make_dpmpp_2m_step(), n, x_T, [])).abs().max() > 3e-4
    assert (scheduler.sigmas[-1] == scheduler.sigmas[-2]) == (n == 1000)


@pytest.mark.parametrize("n", [10, 20])
def test_with_karras_sigmas_their_dpmpp_2m_asks_at_rounded_times(n):
    """The levels are exact, but the model is told their times rounded to integers: its noise is another level's."""
    scheduler, x_T = diffusers.DPMSolverMultistepScheduler(**FAST, use_karras_sigmas=True), randn(5, 2)
    found = theirs(scheduler, n, x_T, [])
    model = GaussianOracle(oracle().process.continuous(), 1.3, 0.25)
    grid = model.process.grid(n, karras(1.0))

    def rounding(m, x, t):
        scale, std = (expand(c, x) for c in m.process.levels(t))
        return Prediction.from_eps(x, scale, std, m(x, t.round()).eps)

    asked = scheduler.timesteps + 1
    assert torch.equal(asked, grid[:-1].round().long())
    relative(last(sample(make_dpmpp_2m_step(), Wrapped(rounding, model), x_T, grid)), found)
    gap = (last(sample(make_dpmpp_2m_step(), model, x_T, grid)) - found).abs().max() / found.abs().max()
    assert gap > 2e-4  # twice what parity asks for


def their_heun(scheduler, n, x_T, model):
    """Their loop in x / scale, from the x that is x_T at the first level; the times of the calls."""
    scheduler.set_timesteps(n)
    x = x_T * (scheduler.sigmas[0].double() ** 2 + 1).sqrt()
    for t in scheduler.timesteps:
        out = model(scheduler.scale_model_input(x, t), t.double() + 1).eps
        x = scheduler.step(out, t, x).prev_sample
    return x


@pytest.mark.equation("edm.heun", "speed.cost")
@pytest.mark.parametrize("n", [5, 18, 50])
def test_heun(n):
    """They start at sigma_T z, which should be x_T / scale(T) = sqrt(sigma_T^2 + 1) z: 2e-5 apart, and mended here."""
    x_T = randn(5, 2)
    scheduler = diffusers.HeunDiscreteScheduler(beta_schedule="linear", **FAST)
    relative(ours(heun_step, n, x_T, []), their_heun(scheduler, n, x_T, oracle()))
    assert len(scheduler.timesteps) == 2 * n - 1
    assert 1e-5 < 1 - scheduler.init_noise_sigma * oracle().process.marginal(times(1000))[0] < 1e-4


@pytest.mark.equation("edm.sigma_grid", "edm.heun")
def test_heun_on_karras_levels():
    """Theirs end at the last of the strided times, here 100 (sigma = .34), not at the table's smallest level."""
    x_T, model = randn(5, 2), GaussianOracle(oracle().process.continuous(), 1.3, 0.25)
    scheduler = diffusers.HeunDiscreteScheduler(**FAST, use_karras_sigmas=True)
    found = their_heun(scheduler, 10, x_T, model)
    grid = model.process.grid(10, karras(100.0))
    sigma = (-model.process.log_snr(grid[:-1]) / 2).exp()
    relative(sigma, scheduler.sigmas[[0, *range(1, 19, 2)]].double(), 1e-5)
    relative(last(sample(heun_step, model, x_T, grid)), found)


@pytest.mark.equation("ddim.inversion")
@pytest.mark.parametrize("n", [10, 50])
def test_their_inversion_asks_at_the_level_it_goes_to(n):
    """Ours asks at (x_s, s), where x_s lies; theirs at (x_s, t), so x_s looks less noisy than the model is told."""
    scheduler, model = diffusers.DDIMInverseScheduler(**COMMON, set_alpha_to_one=True), oracle()
    scheduler.set_timesteps(n)
    x0, grid = 1.3 + randn(5, 2) / 2, model.process.grid(n)
    x = by_hand = x0
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t + 1).eps, int(t), x).prev_sample
    for s, t in pairwise(grid.flip(0)):
        (a_s, b_s), (a_t, b_t) = model.process.marginal(s), model.process.marginal(t)
        eps = model(by_hand, t).eps
        by_hand = a_t * (by_hand - b_s * eps) / a_s + b_t * eps
    relative(by_hand, x)
    lost = lambda x_T: (last(sample(ddim_step, model, x_T, grid)) - x0).abs().mean()
    assert lost(x) > 1.5 * lost(last(invert(model, x0, grid)))  # both fall as 1 / n
