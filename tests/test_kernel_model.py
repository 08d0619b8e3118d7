"""The model of 2015: precision-weighted posterior, per-step Gaussians, the bound in bits.

Float64 throughout; tolerances of 1e-12 leave room for a few roundings of numbers near 1.
"""

import math
from itertools import product

import numpy as np
import pytest
import torch
from affine import affine_law, last
from torch import nn

from diffusion_edu.data import swiss_roll
from diffusion_edu.kernel_model import (
    KernelModel,
    bits_over_gaussian,
    forward_process,
    kernel_bound,
    kernel_loss,
    posterior_precision,
)
from diffusion_edu.metrics import sliced_wasserstein
from diffusion_edu.nets.mlp import PerStepHeads
from diffusion_edu.oracles import GaussianOracle
from diffusion_edu.process import DiscreteVP, posterior, q_sample
from diffusion_edu.samplers import kernel_step, noises, sample
from diffusion_edu.schedules import swiss_beta
from diffusion_edu.training import Recipe, fit_heads

PROCESS = DiscreteVP(swiss_beta(40))
TIMES = torch.arange(1, 41)


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Constant(nn.Module):
    """Heads that say the same two numbers everywhere."""

    def __init__(self, first=0.0, second=0.0):
        super().__init__()
        self.first, self.second = first, nn.Parameter(torch.tensor(float(second), dtype=torch.float64))

    def forward(self, x, t=None):
        return torch.full_like(x, self.first), self.second.expand_as(x)


def heads(seed=0, width=16, **kwargs):
    torch.manual_seed(seed)
    return KernelModel(PerStepHeads(40, width).double(), PROCESS, **kwargs)


@pytest.mark.equation("post.precision")
def test_precision_weighted_posterior_is_mu_tilde_and_ends_in_the_data():
    x0, x_t = randn(40, 2), randn(40, 2, seed=1)
    mean, sigma = posterior_precision(PROCESS, x0, x_t, TIMES)
    mean_q, sigma_q = posterior(PROCESS, x0, x_t, TIMES, TIMES - 1)
    torch.testing.assert_close(mean, mean_q, rtol=0, atol=1e-12)
    torch.testing.assert_close(sigma, sigma_q, rtol=1e-12, atol=0)
    assert torch.equal(mean[0], x0[0]) and sigma[0] == 0  # not nan, and not nearly x0
    single, _ = posterior_precision(PROCESS, x0, x_t, torch.tensor(7))
    torch.testing.assert_close(single[6], mean[6], rtol=0, atol=0)


@pytest.mark.equation("post.precision")
def test_float32_data_get_float64_weights():
    x0, x_t = randn(40, 2), randn(40, 2, seed=1)
    exact = posterior_precision(PROCESS, x0, x_t, TIMES)[1]
    rounded = posterior_precision(PROCESS, x0.float(), x_t.float(), TIMES)[1]
    torch.testing.assert_close(rounded.double(), exact, rtol=2**-23, atol=0)  # one rounding to float32


@pytest.mark.equation("swiss.forward_process")
def test_forward_process_noises_and_says_the_way_back():
    x0, eps = randn(40, 2), randn(40, 2, seed=1)
    mean, sigma, x_t = forward_process(PROCESS, x0, TIMES, eps)
    assert torch.equal(x_t, q_sample(PROCESS, x0, TIMES, eps))
    mean_q, sigma_q = posterior(PROCESS, x0, x_t, TIMES, TIMES - 1)
    torch.testing.assert_close(mean, mean_q, rtol=0, atol=1e-12)
    torch.testing.assert_close(sigma, sigma_q, rtol=1e-12, atol=0)
    assert all(part.isfinite().all() for part in (mean, sigma, x_t))


def test_posterior_precision_refuses_bad_arguments():
    x = randn(3, 2)
    with pytest.raises(ValueError, match=r"t must be in \[1, 40\]"):
        posterior_precision(PROCESS, x, x, torch.tensor(0))
    with pytest.raises(ValueError, match="x_t must have the shape of x0"):
        posterior_precision(PROCESS, x, x[:2], torch.tensor(1))
    with pytest.raises(TypeError, match="t must be an integer tensor"):
        posterior_precision(PROCESS, x, x, torch.tensor(1.0))


@pytest.mark.equation("swiss.reverse")
def test_silent_heads_are_the_exact_answer_for_standard_normal_data():
    model, oracle, x = KernelModel(Constant(), PROCESS), GaussianOracle(PROCESS), randn(5, 2)
    for t in TIMES:
        mean, sigma = model.reverse_kernel(x, t, t - 1)
        mean_q, sigma_q = oracle.reverse_kernel(x, t, t - 1)
        torch.testing.assert_close(mean, mean_q, rtol=0, atol=1e-12)
        torch.testing.assert_close(sigma, sigma_q.expand_as(x), rtol=1e-12, atol=0)


@pytest.mark.equation("swiss.reverse")
def test_heads_say_mean_and_half_log_variance_but_not_at_the_last_step():
    x, t = randn(40, 2), TIMES
    alpha, beta = PROCESS.alpha[:, None], PROCESS.beta[:, None]
    for relative in (True, False):
        model = heads(relative=relative)
        first, second = model.net(x, t)
        mean, sigma = model.reverse_kernel(x, t, t - 1)
        if relative:
            first = alpha[1:].sqrt() * x + beta[1:].sqrt() * first
            second = second + beta[1:].log()
        torch.testing.assert_close(mean[1:], first[1:], rtol=0, atol=1e-12)
        torch.testing.assert_close(sigma[1:], (second[1:] / 2).exp(), rtol=1e-12, atol=0)
        torch.testing.assert_close(mean[0], alpha[1].sqrt() * x[0], rtol=0, atol=1e-15)
        torch.testing.assert_close(sigma[0], beta[1].sqrt().expand(2), rtol=1e-15, atol=0)


def test_a_stack_gives_every_head_its_own_points():
    model, x = heads(), randn(40, 6, 2)
    mean, sigma = model.reverse_kernel(x, TIMES, TIMES - 1)
    for t in TIMES:
        alone = model.reverse_kernel(x[t - 1], t, t - 1)
        torch.testing.assert_close((mean[t - 1], sigma[t - 1]), alone, rtol=0, atol=1e-12)


def test_reverse_kernel_refuses_other_steps():
    model, x = heads(), randn(3, 2)
    with pytest.raises(ValueError, match="s must be t - 1"):
        model.reverse_kernel(x, torch.tensor(5), torch.tensor(3))
    with pytest.raises(ValueError, match=r"t must be in \[1, 40\]"):
        model.reverse_kernel(x, torch.tensor(0), torch.tensor(-1))
    with pytest.raises(ValueError, match=r"t must be 1\.\.40"):
        model.reverse_kernel(randn(40, 3, 2), TIMES.flip(0), TIMES.flip(0) - 1)


@pytest.mark.equation("swiss.kl_loss")
def test_loss_is_the_divergence_to_the_posterior_and_the_likelihood_at_the_last_step():
    model, x0, eps = heads(), randn(40, 2), randn(40, 2, seed=1)
    mean_q, sigma_q, x_t = forward_process(PROCESS, x0, TIMES, eps)
    p = torch.distributions.Normal(*model.reverse_kernel(x_t, TIMES, TIMES - 1))
    q = torch.distributions.Normal(mean_q[1:], sigma_q[1:].expand(39, 2))
    p_rest = torch.distributions.Normal(p.loc[1:], p.scale[1:])
    loss = kernel_loss(model, x0, TIMES, eps)
    # rtol 1e-9: the distributions' own KL cancels where both variances nearly agree
    torch.testing.assert_close(loss[1:], torch.distributions.kl_divergence(q, p_rest).sum(1), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(loss[0], -p.log_prob(x0)[0].sum(), rtol=1e-12, atol=0)


def gauss_hermite(n=3):
    """x0 and eps (n^2, 1) with weights: exact expectations of quadratics of two standard normals."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    pairs = torch.tensor(list(product(nodes, nodes)))
    weight = torch.tensor([a * b for a, b in product(weights, weights)]) / (2 * math.pi)
    return pairs[:, :1], pairs[:, 1:], weight


@pytest.mark.equation("swiss.kl_loss")
def test_the_forward_kernel_minimises_the_expected_loss_for_standard_normal_data():
    x0, eps, weight = gauss_hermite()
    for t in (2, 20, 40):
        scale, var = PROCESS.alpha[t].sqrt(), PROCESS.beta[t]
        params = torch.stack([scale, var.log()]).requires_grad_()

        class Affine(KernelModel):
            def reverse_kernel(self, x_t, t, s, params=params):
                return params[0] * x_t, (params[1] / 2).exp().expand_as(x_t)

        loss = (weight * kernel_loss(Affine(None, PROCESS), x0, torch.tensor(t), eps)).sum()
        gradient = torch.autograd.grad(loss, params, create_graph=True)[0]
        curvature = torch.autograd.grad(gradient[1], params)[0][1]
        # 1e-8: at t = 2 the loss divides by a variance of 1e-5, so rounding is enlarged by 1e5
        assert gradient.abs().max() < 1e-8 and curvature > 0


@pytest.mark.equation("swiss.bound_bits")
def test_bits_are_zero_for_standard_normal_data_and_the_exact_model():
    x0, eps, weight = gauss_hermite()
    nats = (weight * kernel_bound(KernelModel(Constant(), PROCESS), x0, eps.expand(40, *eps.shape))).sum()
    assert abs(bits_over_gaussian(nats, 1)) < 1e-10  # forty terms, the first divided by beta_1 = 1e-5
    louder = (weight * kernel_bound(KernelModel(Constant(second=1.0), PROCESS), x0, eps.expand(40, *eps.shape))).sum()
    assert bits_over_gaussian(louder, 1) < -1  # a wrong variance costs


@pytest.mark.equation("swiss.bound_bits")
def test_the_bound_of_exact_kernels_is_entropy_and_mismatch_at_T():
    var, (x0, eps, weight) = 0.3, gauss_hermite()
    oracle = GaussianOracle(PROCESS, 0.0, var)
    nats = (weight * kernel_bound(oracle, var**0.5 * x0, eps.expand(40, *eps.shape))).sum()
    _, var_T = oracle.law(torch.tensor(40))
    mismatch = (var_T - 1 - var_T.log()) / 2
    exact = 0.5 * math.log(2 * math.pi * math.e * var) + mismatch
    torch.testing.assert_close(nats, exact, rtol=0, atol=1e-10)


@pytest.mark.equation("swiss.sample")
def test_sampling_with_exact_kernels_reproduces_the_data_law():
    oracle = GaussianOracle(PROCESS, mean=0.7, var=0.3)
    start_mean, start_var = oracle.law(torch.tensor(40))

    def run(noise, like):
        return last(sample(kernel_step, oracle, start_mean + start_var.sqrt() * noise(like), PROCESS.grid(40), noise))

    mean, var = affine_law(run)
    assert abs(mean - 0.7) < 1e-12 and abs(var - 0.3) < 1e-12


@pytest.mark.equation("swiss.train", "swiss.sample")
def test_training_beats_the_gaussian_model():
    x0 = swiss_roll(4000, seed=0)
    torch.manual_seed(0)
    model = KernelModel(PerStepHeads(40, 32), PROCESS)
    losses = list(fit_heads(model, x0, Recipe(200, 32, lr=1e-2)))
    assert len(losses) == 200 and sum(losses[-20:]) < sum(losses[:20])
    fresh, eps = swiss_roll(2000, seed=1), randn(40, 2000, 2, dtype=torch.float32)
    gaussian = GaussianOracle(PROCESS, x0.mean(0), x0.var(0))
    with torch.no_grad():
        assert kernel_bound(model, fresh, eps).mean() < kernel_bound(gaussian, fresh, eps).mean() - 0.1
    x_T = randn(2000, 2, seed=2, dtype=torch.float32)
    drawn, blob = (last(sample(kernel_step, m, x_T, PROCESS.grid(40), noises(3))) for m in (model, gaussian))
    assert sliced_wasserstein(drawn, fresh) < 0.8 * sliced_wasserstein(blob, fresh)


def test_training_repeats_and_stops_at_a_loss_that_is_not_finite():
    first, second = (list(fit_heads(heads(), randn(9, 2), Recipe(3, 4, seed=5))) for _ in range(2))
    assert first == second
    assert first != list(fit_heads(heads(), randn(9, 2), Recipe(3, 4, seed=6)))
    with pytest.raises(FloatingPointError, match="loss is nan at step 0"):
        list(fit_heads(KernelModel(Constant(), PROCESS), randn(9, 2) * math.nan, Recipe(1)))
    with pytest.raises(ValueError, match="x0 must hold at least one example"):
        list(fit_heads(heads(), randn(0, 2), Recipe(1)))


def test_the_first_loss_is_the_sum_over_the_heads():
    model, data = heads(), randn(9, 2)
    generator = torch.Generator().manual_seed(0)
    i = torch.randint(9, (40, 4), generator=generator)
    eps = torch.randn(40, 4, 2, generator=generator).double()
    by_hand = sum(kernel_loss(model, data[i[t - 1]], TIMES[t - 1], eps[t - 1]).mean() for t in range(2, 41))
    (loss,) = fit_heads(model, data, Recipe(1, 4))
    torch.testing.assert_close(loss, by_hand.item(), rtol=1e-12, atol=0)
