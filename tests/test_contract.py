"""The contract of the core: fifteen programs, each at most 15 lines, each reading like the lecture.

They run on exact oracles, without training. If one of them needs a sixteenth line, the core is wrong, not the program.
"""

import ast
import inspect
from dataclasses import replace
from functools import partial

import torch
from affine import affine_law, last, sampler_law
from torch import nn

from diffusion_edu.denoiser import Denoiser
from diffusion_edu.guidance import (
    Wrapped,
    classifier,
    classifier_free,
    reschedule,
    static_threshold,
    trace,
)
from diffusion_edu.likelihood import ode_log_prob
from diffusion_edu.oracles import DatasetOracle, GaussianMixtureOracle, GaussianOracle
from diffusion_edu.process import VE, VESDE, VPSDE, DiscreteVP, q_sample, quadratic, uniform_log_snr
from diffusion_edu.samplers import (
    chain,
    churn,
    ddim_step,
    flow,
    guided_mean,
    heun_step,
    keep_known,
    kernel_step,
    learned,
    make_ddpm_step,
    make_dpmpp_2m_step,
    make_langevin_step,
    noises,
    noises_per_sample,
    reverse_diffusion_step,
    sample,
)
from diffusion_edu.schedules import geometric_sigmas, karras_sigmas, linear_beta, swiss_beta

TWO_MODES = dict(means=torch.tensor([[-1.0, 0.5], [1.0, -0.5]]), stds=torch.tensor([0.2, 0.3]))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_annealed_langevin_over_given_sigmas():
    oracle = GaussianOracle(VE(), mean=1.3, var=0.25)
    sigmas = geometric_sigmas(10, sigma_min=0.05, sigma_max=10.0)
    annealed = make_langevin_step(r=0.3, n_steps=100)
    mean, var = sampler_law(annealed, oracle, sigmas, start_std=10.0)
    assert abs(mean - 1.3) < 0.01 and abs(var - 0.25) < 0.03  # the step size leaves a little too much variance


def test_predictor_corrector_on_vesde():
    oracle = GaussianOracle(VESDE(sigma_max=10.0), mean=1.3, var=0.25)
    times = oracle.process.grid(500, spacing=uniform_log_snr(t_min=1e-3))
    predictor_corrector = chain(reverse_diffusion_step, make_langevin_step(r=0.01))
    mean, var = sampler_law(predictor_corrector, oracle, times, start_std=10.0)
    assert abs(mean - 1.3) < 0.02 and abs(var - 0.25) < 0.02


def test_dpmpp_2m_used_twice_and_after_an_early_break():
    oracle = GaussianMixtureOracle(VPSDE(), **TWO_MODES)
    step, x_T, times = make_dpmpp_2m_step(), randn(50, 2), oracle.process.grid(10)
    *_, first = sample(step, oracle, x_T, times)
    for i, _ in enumerate(sample(step, oracle, x_T, times)):
        if i == 4:
            break
    *_, again = sample(step, oracle, x_T, times)
    *_, euler = sample(ddim_step, oracle, x_T, times)
    assert torch.equal(first, again) and not torch.allclose(first, euler)


def test_learned_variance_through_guidance_and_threshold():
    oracle = GaussianMixtureOracle(DiscreteVP(linear_beta(1000)), **TWO_MODES)
    unsure = Wrapped(lambda m, x, t, **cond: replace(m(x, t, **cond), frac=0.25 + 0 * x), oracle)
    model = static_threshold(classifier_free(unsure, w=3, y=torch.tensor([0, 1, 1])))
    t, s = torch.tensor(400), torch.tensor(399)
    _, sigma = make_ddpm_step(learned).kernel(model, randn(3, 2), t, s)
    beta = oracle.process.beta[t]
    beta_tilde = beta * (1 - oracle.process.alpha_bar[s]) / (1 - oracle.process.alpha_bar[t])
    assert torch.allclose(sigma**2, (beta**0.25 * beta_tilde**0.75).expand(3, 2), rtol=1e-12)


class ConditionSpy(nn.Module):
    """Stands in for a text-conditional upsampler: answers 1 where the text counts, 0 where it is dropped."""

    def forward(self, x, clock, y, y_mask, x_low, t_low, drop):
        self.seen = dict(rows=len(x), y=y, y_mask=y_mask, x_low=x_low, t_low=t_low)
        return (~drop)[:, None].to(x) * torch.ones_like(x)


def test_one_batch_guidance_with_text_and_mask_and_with_x_low_and_t_low():
    net = ConditionSpy()
    model = Denoiser(net, VPSDE(), predicts="x0")
    text = dict(y=torch.tensor([[5, 6, 0], [7, 8, 9]]), y_mask=torch.tensor([[1, 1, 0], [1, 1, 1]]))
    low = dict(x_low=randn(2, 2), t_low=torch.tensor([0.1, 0.2]))
    guided = classifier_free(model, w=3, **text, **low)
    pred = guided(randn(2, 2), torch.tensor(0.5))
    assert net.seen["rows"] == 4 and torch.equal(net.seen["y"], torch.cat([text["y"]] * 2))
    assert torch.equal(net.seen["x_low"], torch.cat([low["x_low"]] * 2))
    assert torch.equal(net.seen["t_low"], torch.cat([low["t_low"]] * 2))
    assert torch.equal(pred.x0, torch.full((2, 2), 3.0, dtype=torch.float64))  # 0 + 3 (1 - 0)


class GaussianUpsampler:
    """Exact second stage for z ~ N(m, s^2), x | z ~ N(z, 0.3^2), given z noised to t_low."""

    def __init__(self, base):
        self.base = base

    def given(self, x_low, t_low):
        z = self.base(x_low, t_low)
        return GaussianOracle(self.base.process, z.x0, self.base.var_x0(t_low) + 0.3**2)


def test_two_stage_gaussian_cascade_truncated_and_not():
    base = GaussianOracle(DiscreteVP(linear_beta(200, 1e-4, 0.1)), mean=0.4, var=0.5)
    upsampler, times, t_low = GaussianUpsampler(base), base.process.grid(200), torch.tensor(50)

    def run(noise, like, truncated):
        if truncated:  # stop the first chain at t_low
            z = last(sample(kernel_step, base, noise(like), times[times >= t_low], noise))
        else:  # finish it, then noise its result again
            z = q_sample(base.process, last(sample(kernel_step, base, noise(like), times, noise)), t_low, noise(like))
        return last(sample(kernel_step, upsampler.given(z, t_low), noise(like), times, noise))

    for truncated in (True, False):
        mean, var = affine_law(partial(run, truncated=truncated))
        assert abs(mean - 0.4) < 1e-2 and abs(var - (0.5 + 0.3**2)) < 1e-2  # alpha_bar_T is not 0


def test_latent_diffusion_through_an_orthonormal_encoder():
    encoder = torch.linalg.qr(randn(2, 2)).Q
    pixels = GaussianMixtureOracle(VPSDE(), **TWO_MODES)
    latents = GaussianMixtureOracle(VPSDE(), TWO_MODES["means"].double() @ encoder, TWO_MODES["stds"])
    x_T, times = randn(50, 2), pixels.process.grid(50)
    *_, x0 = sample(heun_step, pixels, x_T, times)
    *_, z0 = sample(heun_step, latents, x_T @ encoder, times)
    assert torch.allclose(z0 @ encoder.T, x0, atol=1e-12)  # decode


def test_edm_with_churn():
    oracle = GaussianOracle(VE(), mean=1.3, var=0.25)
    sigmas = karras_sigmas(128)
    edm = churn(heun_step, gamma=min(40 / 128, 2**0.5 - 1), s_noise=1.0, sigma_min=0.05, sigma_max=50.0)
    mean, var = sampler_law(edm, oracle, sigmas, start_std=80.0)
    heun_mean, heun_var = sampler_law(heun_step, oracle, sigmas, start_std=80.0)
    assert abs(mean - 1.3) < 0.01 and abs(var - 0.25) < 0.01
    assert abs(var - heun_var) > 1e-6  # the churn did something


def test_classifier_guidance_on_eps_and_on_the_mean_under_no_grad_and_inference_mode():
    oracle = GaussianOracle(DiscreteVP(linear_beta(300, 1e-4, 0.06)), mean=0.4, var=0.25)
    log_prob = lambda x, t: 2.0 * oracle(x, t).x0[:, 0]  # p(y | x0) ~ exp(2 x0), seen at time t, up to a constant
    on_clean = lambda x, s: log_prob(x, s) if s > 0 else 2.0 * x[:, 0]
    times = oracle.process.grid(300)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            on_eps, eps_var = sampler_law(ddim_step, classifier(oracle, log_prob, w=3), times)
            on_mean, mean_var = sampler_law(guided_mean(kernel_step, on_clean, w=3), oracle, times)
        for mean, var in ((on_eps, eps_var), (on_mean, mean_var)):
            assert abs(mean - (0.4 + 3 * 2 * 0.25)) < 0.02 and abs(var - 0.25) < 0.01


def test_probability_flow_likelihood():
    oracle, x0 = GaussianOracle(VPSDE(), mean=0.4, var=0.25), torch.linspace(-1, 2, 7, dtype=torch.float64)[:, None]
    t_min, T = torch.tensor([1e-5, 1.0], dtype=torch.float64)
    found = ode_log_prob(oracle, x0, t_min.item(), end_log_prob=lambda x: oracle.log_prob(x, T))
    assert torch.allclose(found.log_prob, oracle.log_prob(x0, t_min), atol=1e-4)
    assert torch.allclose(flow(oracle, found.x_T, 1.0, t_min.item()), x0, atol=1e-4)  # and back


def test_train_on_a_table_and_sample_on_another_schedule():
    trained = GaussianMixtureOracle(DiscreteVP(linear_beta(1000)), **TWO_MODES)
    for process in (DiscreteVP(linear_beta(300, 1e-4, 0.06)), VPSDE(), VESDE(), VE()):
        model, exact = reschedule(trained, process), GaussianMixtureOracle(process, **TWO_MODES)
        x_T, times = process.prior((50, 2), lambda x: randn(*x.shape)), process.grid(40, quadratic)
        *_, mine = sample(heun_step, model, x_T, times)
        *_, x0 = sample(heun_step, exact, x_T, times)
        assert torch.allclose(mine, x0, atol=1e-6) and x0.std() > 0.5


def test_the_kernel_model_of_2015():
    oracle = GaussianOracle(DiscreteVP(swiss_beta(40)), mean=1.3, var=0.25)
    mean_T, var_T = oracle.law(torch.tensor(40))
    start = lambda noise, like: mean_T + var_T.sqrt() * noise(like)
    times = oracle.process.grid(40)
    mean, var = affine_law(lambda noise, like: last(sample(kernel_step, oracle, start(noise, like), times, noise)))
    assert abs(mean - 1.3) < 1e-10 and abs(var - 0.25) < 1e-10  # the exact reverse kernel undoes the chain exactly


def test_injected_impulse_and_per_sample_noise():
    oracle = GaussianOracle(DiscreteVP(linear_beta(50, 1e-3, 0.3)), mean=1.3, var=0.25)
    times, step, x_T = oracle.process.grid(50), make_ddpm_step(), randn(4, 1)
    recorded = [randn(4, 1, seed=k) for k in range(49)]  # T - 1 draws: none at the last step
    first, second = iter(recorded), iter(recorded)
    *_, a = sample(step, oracle, x_T, times, lambda x: next(first))
    *_, b = sample(step, oracle, x_T[2:], times, lambda x: next(second)[2:])
    assert torch.equal(a[2:], b)
    *_, whole = sample(step, oracle, x_T, times, noises_per_sample(0, range(4)))
    *_, alone = sample(step, oracle, x_T[2:3], times, noises_per_sample(0, [2]))
    assert torch.equal(whole[2:3], alone)
    assert sampler_law(step, oracle, times)[1] > 0.2  # by impulses


def test_inpainting_by_replacement_from_a_partly_noised_start():
    data = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0]]).double()
    oracle = DatasetOracle(DiscreteVP(linear_beta(1000)), data)
    x0, mask = torch.tensor([[-1.0, 0.0]]).double(), torch.tensor([[1.0, 0.0]])  # only the first number is known
    t_start, noise = torch.tensor(600), noises(0)
    x_t = q_sample(oracle.process, x0.expand(64, 2), t_start, noise(x0.expand(64, 2)))
    times = oracle.process.grid(1000)
    *_, filled = sample(keep_known(make_ddpm_step(), x0, mask), oracle, x_t, times[times <= t_start], noise)
    assert torch.allclose(filled, data[2].expand(64, 2), atol=1e-6)  # the only point that begins with -1


def test_progressive_x0_with_a_count_of_evaluations():
    oracle = GaussianMixtureOracle(DiscreteVP(linear_beta(1000)), **TWO_MODES)
    watched = trace(oracle)
    *_, x0 = sample(ddim_step, watched, randn(500, 2), oracle.process.grid(50))
    x0_hats = [pred.x0 for t, pred in watched.history]
    assert watched.n_evaluations == len(x0_hats) == 50
    assert x0_hats[0].abs().max() < 0.1  # at T nothing is known but the mean of the data, 0
    assert torch.equal(x0_hats[-1], x0) and x0.std() > 0.5


def test_every_program_has_at_most_fifteen_lines():
    body = ast.parse(inspect.getsource(inspect.getmodule(randn))).body
    lengths = {f.name: f.end_lineno - f.lineno for f in body if getattr(f, "name", "").startswith("test_")}
    assert len(lengths) == 16 and max(lengths.values()) <= 15, lengths
