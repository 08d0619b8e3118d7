"""The library diffusers, on a linear model: same tables, same x_T, same noises, same samples.

Its times are 0-based (its t is our t + 1), and its tables are float32: 1e-4 relative is what it can hold. Where it
does something else on purpose, the test says so.
"""

from itertools import pairwise

import pytest
import torch
from affine import last
from exact import F64, close, randn, times

from diffusion_edu.guidance import static_threshold
from diffusion_edu.oracles import GaussianOracle
from diffusion_edu.process import DiscreteVP, q_sample
from diffusion_edu.samplers import beta, beta_tilde, ddim_step, make_ddim_step, make_ddpm_step, sample
from diffusion_edu.schedules import linear_beta, quadratic_beta, respace

diffusers = pytest.importorskip("diffusers")

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
