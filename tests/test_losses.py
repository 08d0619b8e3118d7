"""L_simple and its relatives, by quadrature instead of training."""

import math

import pytest
import torch
from exact import DATA, F64, close, gauss_hermite, randn, times

from diffusion_edu.denoiser import Denoiser, EDMDenoiser
from diffusion_edu.losses import TARGETS, denoising_loss, edm_weight, loss_ratio, min_snr_weight, sigmoid_weight
from diffusion_edu.oracles import GaussianOracle
from diffusion_edu.process import VE, VPSDE, DiscreteVP, SubVPSDE
from diffusion_edu.samplers import noises
from diffusion_edu.schedules import linear_beta, zero_terminal_snr
from diffusion_edu.training import log_normal_times


class Line(torch.nn.Module):
    """eps-hat = slope x + offset, one line for all times."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.zeros((), dtype=F64))
        self.offset = torch.nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, x, clock):
        return self.slope * x + self.offset


def quadrature(n=6):
    """x0 of Gaussian data, noise and weights: expectations of squares are exact."""
    z, w = gauss_hermite(n)
    x0, eps = torch.cartesian_prod(DATA[0] + DATA[1] ** 0.5 * z, z).T
    return x0[:, None], eps[:, None], torch.cartesian_prod(w, w).prod(1)


def best_line(process, t):
    """Slope and offset of E[eps | x_t], and what they leave over: the variance of eps given x_t."""
    (m, s2), ab = DATA, process.alpha_bar[t].item()
    v = ab * s2 + 1 - ab
    slope = (1 - ab) ** 0.5 / v
    return slope, -slope * ab**0.5 * m, ab * s2 / v


def fit(model, t, steps=200):
    """Minimise the expected loss at one time; returns the loss left."""
    x0, eps, w = quadrature()
    t = torch.full((len(x0),), t)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=steps, tolerance_grad=1e-14, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = w @ denoising_loss(model, x0, t, eps)
        loss.backward()
        return loss

    optimizer.step(closure)
    return (w @ denoising_loss(model, x0, t, eps)).item()


@pytest.mark.equation("elbo.L_simple", "ddpm.train_alg1")
@pytest.mark.parametrize("t", [20, 300, 900])
def test_training_a_line_ends_at_the_mean_of_the_noise_given_x_t(t):
    process = DiscreteVP(linear_beta(1000))
    model = Denoiser(Line(), process)
    slope, offset, floor = best_line(process, t)
    left = fit(model, t)
    close(model.net.slope.item(), slope, 1e-6)
    close(model.net.offset.item(), offset, 1e-6)
    assert left == pytest.approx(floor, rel=1e-9)  # not 0: eps is not known from x_t alone


@pytest.mark.equation("elbo.L_simple")
def test_the_exact_model_leaves_the_conditional_variance():
    oracle = GaussianOracle(DiscreteVP(linear_beta(1000)), *DATA)
    x0, eps, w = quadrature()
    for t in (1, 100, 500, 1000):
        loss = w @ denoising_loss(oracle, x0, torch.full((len(x0),), t), eps)
        assert loss.item() == pytest.approx(best_line(oracle.process, t)[2], rel=1e-9)
    unit = GaussianOracle(oracle.process, 0.0, 1.0)
    x0 = (x0 - DATA[0]) / DATA[1] ** 0.5
    loss = w @ denoising_loss(unit, x0, torch.full((len(x0),), 100), eps)
    assert loss.item() == pytest.approx(oracle.process.alpha_bar[100].item(), rel=1e-12)  # E002-17: .897


@pytest.mark.equation("elbo.L_simple")
def test_the_loss_is_the_squared_error_at_the_noised_point():
    process = DiscreteVP(linear_beta(1000))
    model, x0, eps, t = GaussianOracle(process, *DATA), randn(5, 3, 2), randn(5, 3, 2, seed=1), times(1, 2, 300, 999, 9)
    ab = process.alpha_bar[t].reshape(5, 1, 1)
    x_t = ab.sqrt() * x0 + (1 - ab).sqrt() * eps
    close(denoising_loss(model, x0, t, eps), ((eps - model(x_t, t).eps) ** 2).mean((1, 2)), 1e-11)


@pytest.mark.equation("param.loss_ratio")
def test_targets_differ_by_weights_and_weights_multiply():
    process = DiscreteVP(linear_beta(1000))
    model, x0, eps, t = GaussianOracle(process, *DATA), randn(4, 2), randn(4, 2, seed=1), times(3, 50, 300, 800)
    loss = {target: denoising_loss(model, x0, t, eps, target) for target in ("eps", "x0", "v", "score")}
    snr = process.log_snr(t).exp()
    close(loss["eps"] / (snr * loss["x0"]), torch.ones(4), 1e-11)
    close(loss["v"] / ((1 + snr) * loss["x0"]), torch.ones(4), 1e-11)
    close(loss["score"] / (loss["eps"] / (1 - process.alpha_bar[t])), torch.ones(4), 1e-11)
    weighted = denoising_loss(model, x0, t, eps, weight=lambda process, t: process.log_snr(t).exp())
    close(weighted, snr * loss["eps"], 1e-13)


@pytest.mark.equation("param.loss_ratio")
@pytest.mark.parametrize(
    "process", [DiscreteVP(linear_beta(1000)), VPSDE(), SubVPSDE(), VE()], ids=lambda p: type(p).__name__
)
def test_the_loss_ratio_is_the_ratio_of_losses(process):
    t = times(1, 50, 300, 999) if process.discrete else process.T * torch.tensor([0.01, 0.1, 0.5, 0.99], dtype=F64)
    model, x0, eps = GaussianOracle(process, *DATA), randn(4, 2), randn(4, 2, seed=1)
    loss = {target: denoising_loss(model, x0, t, eps, target) for target in TARGETS}
    for target in TARGETS:
        close(loss[target] / (loss_ratio(process, t, target) * loss["x0"]), torch.ones(4), 1e-11)
    scale, std = process.marginal(t)
    close(loss_ratio(process, t, "eps").log(), 2 * (scale.log() - std.log()), 1e-12)
    close(loss_ratio(process, t, "v") / (1 + (scale / std) ** 2), torch.ones(4), 1e-14)
    close(loss_ratio(process, t, "score") * (std**2 / scale) ** 2, torch.ones(4), 1e-14)


@pytest.mark.parametrize("gamma", [5.0, 0.3])
def test_min_snr_weighs_the_error_of_x0_by_the_smaller_of_snr_and_gamma_whatever_the_target(gamma):
    process = DiscreteVP(linear_beta(1000))
    model, x0, eps, t = GaussianOracle(process, *DATA), randn(4, 2), randn(4, 2, seed=1), times(3, 150, 300, 800)
    cut = torch.tensor([min(a / (1 - a), gamma) for a in process.alpha_bar[t].tolist()], dtype=F64)
    assert (cut == gamma).any() and (cut < gamma).any()
    in_x0 = denoising_loss(model, x0, t, eps, "x0")
    for target in TARGETS:
        weighted = denoising_loss(model, x0, t, eps, target, weight=min_snr_weight(target, gamma))
        close(weighted / (cut * in_x0), torch.ones(4), 1e-11)
    plain = denoising_loss(model, x0, t, eps, weight=min_snr_weight(gamma=math.inf))
    close(plain, denoising_loss(model, x0, t, eps), 1e-13)  # L_simple


def test_without_signal_min_snr_has_its_limit_and_no_target_gets_nan():
    process = DiscreteVP(zero_terminal_snr(linear_beta(1000)))
    at = lambda target, t: min_snr_weight(target)(process, times(t)).item()
    assert [at(target, 1000) for target in TARGETS] == [1, 0, 0, 1]
    for target in ("eps", "score"):
        close(at(target, 999), at(target, 1000), 1e-4)  # what is left of the signal there


@pytest.mark.equation("ddpm.train_code")
def test_steps_draw_afresh_and_examples_do_not_see_each_other():
    process, generator, noise = DiscreteVP(linear_beta(1000)), torch.Generator().manual_seed(0), noises(0)
    x0 = randn(64, 2)
    draws = [(process.sample_t(64, generator), noise(x0)) for _ in range(2)]
    assert not torch.equal(draws[0][0], draws[1][0])  # E000-12: one key gave the same t and eps in every step
    assert (draws[0][1] - draws[1][1]).abs().min() > 0
    assert abs((draws[0][1] * draws[1][1]).mean()) < 4 / 128**0.5  # uncorrelated
    model = GaussianOracle(process, *DATA)
    whole = denoising_loss(model, x0, *draws[0])
    halves = [denoising_loss(model, x0[i : i + 32], draws[0][0][i : i + 32], draws[0][1][i : i + 32]) for i in (0, 32)]
    close(torch.cat(halves), whole, 1e-13)  # so the mean does not depend on the batch size: E000-14 sums


def test_conditions_reach_the_model_and_gradients_reach_the_network():
    model = Denoiser(Line(), VPSDE())
    t = torch.tensor([0.3, 0.6], dtype=F64)
    loss = denoising_loss(model, randn(2, 1), t, randn(2, 1, seed=1), target="v")
    loss.mean().backward()
    assert loss.shape == (2,) and model.net.slope.grad.abs() > 0
    with pytest.raises(TypeError, match="y"):
        denoising_loss(model, randn(2, 1), t, randn(2, 1), y=torch.tensor([1, 2]))  # Line takes no labels


class Silent(torch.nn.Module):
    """A network at its start: it predicts 0."""

    def forward(self, x, clock):
        return torch.zeros_like(x)


@pytest.mark.equation("edm.loss")
@pytest.mark.parametrize("sd", [0.5, 1.3])
@pytest.mark.parametrize(
    "process", [VE(), VPSDE(), SubVPSDE(), DiscreteVP(linear_beta(1000))], ids=lambda p: type(p).__name__
)
def test_edm_starts_with_the_loss_one_at_every_noise_level(process, sd):
    """For N(0, sigma_d^2) data; by quadrature, which is exact for squares."""
    z, w = gauss_hermite(4)
    x0, eps = (each[:, None] for each in torch.cartesian_prod(sd * z, z).T)
    w = torch.cartesian_prod(w, w).prod(1)
    model = EDMDenoiser(Silent(), process, sigma_data=sd)
    for share in (0.001, 0.01, 0.3, 1.0):
        t = times(max(1, round(share * process.T))) if process.discrete else torch.tensor(share * process.T, dtype=F64)
        loss = denoising_loss(model, x0, t.expand(16), eps, "x0", edm_weight(sd))
        close(loss @ w, 1.0, 1e-9)  # at the largest levels x0 is what is left of numbers of 80 or 1e4
        scale, std = (c.item() for c in process.marginal(t))
        sigma = std / scale
        close(edm_weight(sd)(process, t), (sigma**2 + sd**2) / (sigma * sd) ** 2, 1e-12)


@pytest.mark.equation("edm.loss")
def test_edm_draws_log_normal_noise_levels():
    sigma = log_normal_times()(VE(), 40_000, torch.Generator().manual_seed(0))  # on VE time is the level
    log_sigma = sigma.log()
    assert abs(log_sigma.mean() + 1.2) < 4 * 1.2 / 200 and abs(log_sigma.std() - 1.2) < 4 * 1.2 / 200 / 2**0.5


def weighted(process, t, weight, target):
    """A weighted loss of an imperfect model, the same whatever is compared if the weights belong together."""
    x0, eps = randn(4, 3), randn(4, 3, seed=1)
    model = GaussianOracle(process, 0.4, 0.9)
    return denoising_loss(model, x0, t.expand(4), eps, target, weight)


@pytest.mark.equation("sid2.sigmoid_weight")
@pytest.mark.parametrize("bias", [-2.0, 0.0, 3.0])
def test_the_sigmoid_weight_falls_in_the_log_snr_and_is_one_loss_in_all_forms(bias):
    process = VPSDE()
    t = torch.linspace(0.001, 1, 50, dtype=F64)
    log_snr, weight = process.log_snr(t), sigmoid_weight(bias)(process, t)
    close(weight, 1 / (1 + (log_snr - bias).exp()), 1e-12)
    assert (weight.diff() > 0).all() and (log_snr.diff() < 0).all()
    close(sigmoid_weight(bias, "x0")(process, t), log_snr.exp() * weight, 1e-12)
    for i in (0, 10, 49):
        losses = [weighted(process, t[i], sigmoid_weight(bias, target), target) for target in TARGETS]
        for loss in losses:
            close(loss, losses[0], 1e-9)


@pytest.mark.equation("sid2.sigmoid_weight")
def test_the_sigmoid_weight_is_a_mixture_of_bounds_on_blurred_data():
    """Data with noise down to log SNR u has the bound whose weight is 1 below u; u is logistic around the bias."""
    from scipy.stats import logistic

    process, t = VPSDE(), torch.linspace(0.01, 1, 9, dtype=F64)
    share = logistic.sf(process.log_snr(t).numpy(), loc=1.5)
    close(sigmoid_weight(1.5)(process, t), torch.from_numpy(share), 1e-12)


def test_without_signal_the_sigmoid_weight_has_its_limit():
    process = DiscreteVP(zero_terminal_snr(linear_beta(1000)))
    for target, limit in (("eps", 1.0), ("score", 1.0), ("v", 0.0), ("x0", 0.0)):
        close(sigmoid_weight(0.0, target)(process, times(1000)), limit, 1e-15)


@pytest.mark.parametrize(
    "wrong, kind", [(math.nan, ValueError), (0.0, ValueError), (-1.0, ValueError), ("1", TypeError)]
)
def test_weights_refuse_what_is_no_number(wrong, kind):
    with pytest.raises(kind, match="sigma_data must be"):
        edm_weight(wrong)
    if wrong not in (0.0, -1.0):
        with pytest.raises(kind, match="bias must be"):
            sigmoid_weight(wrong)
    with pytest.raises(ValueError, match="target must be one of"):
        sigmoid_weight(0.0, "noise")
