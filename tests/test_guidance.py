"""Sections 17, 18 and 20: guidance on a mixture whose classifier is known exactly, and thresholds."""

import math
import warnings

import numpy as np
import pytest
import torch
from affine import affine_law, last, laws_agree, sampler_law
from exact import F64, close, ddim_steps, gauss_hermite, log_normal, normal, propagate, randn, running_product, times
from torch import nn

from diffusion_edu.denoiser import Denoiser
from diffusion_edu.gaussian import guided_normal
from diffusion_edu.guidance import (
    Wrapped,
    bind,
    classifier,
    classifier_free,
    dynamic_threshold,
    gradient,
    interval,
    reschedule,
    static_threshold,
    trace,
    w_from_extra,
)
from diffusion_edu.nets.unet import UNet
from diffusion_edu.oracles import DatasetOracle, GaussianMixtureOracle, GaussianOracle
from diffusion_edu.prediction import Prediction
from diffusion_edu.process import VE, VESDE, VPSDE, DiscreteVP, SubVPSDE, expand, uniform_log_snr
from diffusion_edu.samplers import (
    KernelStep,
    ddim_step,
    flow,
    guided_mean,
    heun_step,
    kernel_step,
    make_adams_step,
    make_ddpm_step,
    make_dpmpp_2m_step,
    noises,
    sample,
)
from diffusion_edu.schedules import cosine_beta, linear_beta, zero_terminal_snr

Y = torch.tensor([0, 1, 2, 1])
SAMPLERS = {
    "ddim": lambda: ddim_step,
    "ddpm": make_ddpm_step,
    "2m": make_dpmpp_2m_step,
    "adams": make_adams_step,
    "heun": lambda: heun_step,
}


def ddpm():
    return DiscreteVP(linear_beta(1000))


def mixture(process=None):
    means = torch.tensor([[-1.0, 0.3], [0.5, -0.4], [2.0, 1.0]], dtype=F64)
    return GaussianMixtureOracle(process or ddpm(), means, [0.2, 0.5, 0.3], [0.5, 0.2, 0.3])


def wanted(oracle, y=Y):
    """log q_t(y | x_t), exactly."""
    return lambda x, t: oracle.class_log_prob(x, t).gather(1, y[:, None]).squeeze(1)


# Classifier guidance


@pytest.mark.equation("cg.joint_score", "cfg.from_bayes")
def test_adding_the_classifiers_gradient_gives_the_conditional_score():
    oracle, x = mixture(), randn(4, 2)
    for t in (20, 300, 900):
        free, given = oracle(x, times(t)), oracle(x, times(t), y=Y)
        slope = gradient(wanted(oracle), x, times(t))
        close(free.score + slope, given.score, 1e-11)
        close(-(given.eps - free.eps) / free.std, slope, 1e-11)


@pytest.mark.equation("cg.eps")
def test_guidance_shifts_the_clean_data_up_the_gradient():
    oracle, x = mixture(), randn(4, 2)
    for t in (20, 300, 900):
        plain, ab = oracle(x, times(t)), oracle.process.alpha_bar[t]
        slope = gradient(wanted(oracle), x, times(t))
        pred = classifier(oracle, wanted(oracle), 3.0)(x, times(t))
        close(pred.eps, plain.eps - 3 * (1 - ab).sqrt() * slope, 1e-13)
        close(pred.x0, plain.x0 + 3 * (1 - ab) / ab.sqrt() * slope, 1e-11)
        close(pred.scale * pred.x0 + pred.std * pred.eps, x, 1e-12)
    close(classifier(oracle, wanted(oracle), 1.0)(x, times(300)).eps, oracle(x, times(300), y=Y).eps, 1e-12)
    close(classifier(oracle, wanted(oracle), 0.0)(x, times(300)).eps, oracle(x, times(300)).eps, 1e-13)


@pytest.mark.equation("cg.mean_shift")
def test_the_guided_mean_is_exact_for_a_log_linear_classifier():
    slope, mu, var, w = 0.8, 0.3, 0.4, 2.5
    grid = torch.linspace(-8, 10, 4001, dtype=F64)
    tilted = normal(grid, mu, var) * (w * slope * grid).exp()
    tilted = tilted / (tilted.sum() * (grid[1] - grid[0]))
    bell = KernelStep(lambda model, x, t, s: (torch.full_like(x, mu), torch.full_like(x, var**0.5)))
    seen = []
    log_prob = lambda x, s: seen.append(s) or slope * x.sum(1)
    mean, sigma = guided_mean(bell, log_prob, w).kernel(None, torch.zeros(1, 1, dtype=F64), times(5), times(4))
    close(normal(grid, mean[0, 0], sigma[0, 0] ** 2), tilted, 1e-8)
    assert seen == [times(4)]  # x_s lives at s


def test_the_guided_mean_takes_the_gradient_at_the_mean_of_the_step():
    oracle, x, t, s = mixture(), randn(4, 2), times(400), times(399)
    mean, sigma = make_ddpm_step().kernel(oracle, x, t, s)
    shifted, same = guided_mean(make_ddpm_step(), wanted(oracle), 2.0).kernel(oracle, x, t, s)
    close(shifted, mean + 2 * sigma**2 * gradient(wanted(oracle), mean, s), 1e-14)
    close(same, sigma, 0)


def test_gradients_work_where_gradients_are_off():
    oracle = mixture()
    guided, step = classifier(oracle, wanted(oracle), 2.0), guided_mean(make_ddpm_step(), wanted(oracle), 2.0)
    expected = guided(randn(4, 2), times(300)).x0
    shifted, _ = step.kernel(oracle, randn(4, 2), times(300), times(299))
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            x, t, s = randn(4, 2), times(300), times(299)
            pred, (mean, _) = guided(x, t), step.kernel(oracle, x, t, s)
            assert torch.equal(pred.x0, expected) and torch.equal(mean, shifted)
            assert not (pred.x0.requires_grad or mean.requires_grad or x.requires_grad)


@pytest.mark.equation("cg.step004", "cfg.step004", "cfg.combine_w")
def test_guiding_a_conditional_model_by_lambda_is_scale_one_plus_lambda():
    oracle, x, t, s = mixture(), randn(4, 2), times(400), times(399)
    step = make_ddpm_step()
    for extra in (0.0, 0.7, 3.0):
        by_classifier = classifier(bind(oracle, y=Y), wanted(oracle), extra)
        by_difference = classifier_free(oracle, w_from_extra(extra), y=Y)
        mean, sigma = step.kernel(by_difference, x, t, s)
        close(step.kernel(by_classifier, x, t, s)[0], mean, 1e-12)
        # A_t x_t + B_t' [(1 + lambda) score(x | c) - lambda score(x)], from the tables
        alpha, beta = oracle.process.alpha[t], oracle.process.beta[t]
        score = (1 + extra) * oracle(x, t, y=Y).score - extra * oracle(x, t).score
        close(mean, x / alpha.sqrt() + beta / alpha.sqrt() * score, 1e-12)
        close(
            sigma**2, (beta * (1 - oracle.process.alpha_bar[s]) / (1 - oracle.process.alpha_bar[t])).expand(()), 1e-14
        )


@pytest.mark.equation("cg.step004")
def test_a_tempered_classifier_that_is_normalised_again_guides_elsewhere():
    """E004-16: p^lambda / Z leads as lambda says only if Z does not depend on x_t."""
    oracle, x, t = mixture(), randn(4, 2), times(300)
    plain = gradient(wanted(oracle), x, t)
    again = lambda x, t: (3.0 * oracle.class_log_prob(x, t)).log_softmax(1).gather(1, Y[:, None])[:, 0]
    close(gradient(lambda x, t: 3.0 * wanted(oracle)(x, t) - 7.0, x, t), 3 * plain, 1e-12)
    assert (gradient(again, x, t) - 3 * plain).norm(dim=1).max() > 0.5


# Where guided samplers end: exact laws


def log_linear(oracle, c):
    """log q_t(y | x_t) for log p(y | x_0) = c x_0 + const on Gaussian data, but for what does not depend on x_t."""
    return lambda x, t: c * oracle(x, t).x0.sum(1)


LINEAR = dict(m=0.4, s2=0.25, c=2.0, w=3.0, moved=0.4 + 3 * 2 * 0.25)


@pytest.mark.equation("cg.eps")
@pytest.mark.parametrize("process", [ddpm(), VPSDE(), SubVPSDE(), VE()], ids=lambda p: type(p).__name__)
def test_a_log_linear_classifier_moves_gaussian_data_by_w_c_s2_at_every_time(process):
    m, s2, c, w, moved = LINEAR.values()
    oracle, other, x = GaussianOracle(process, m, s2), GaussianOracle(process, moved, s2), randn(5, 1)
    guided = classifier(oracle, log_linear(oracle, c), w)
    for t in (0.01, 0.3, 1.0):
        t = times(round(1000 * t)) if process.discrete else torch.tensor(t * process.T, dtype=F64)
        close(guided(x, t).eps, other(x, t).eps, 1e-12)


@pytest.mark.equation("cg.eps")
def test_ddim_and_the_flow_end_in_the_moved_gaussian_but_for_what_the_start_does_not_know():
    m, s2, c, w, moved = LINEAR.values()
    oracle = GaussianOracle(ddpm(), m, s2)
    guided = classifier(oracle, log_linear(oracle, c), w)
    visited, alpha_bar = oracle.process.grid(50).tolist(), running_product(oracle.process.beta.tolist())
    law = propagate(ddim_steps(alpha_bar, visited), data=(moved, s2))
    laws_agree(sampler_law(ddim_step, guided, times(*visited)), law, 1e-10)
    # the flow keeps standard scores: x_0 = m' + s (x_T - a_T m') / sqrt(v_T), whose law from N(0, 1) is exact
    smooth, t_min = GaussianOracle(VPSDE(), m, s2), 1e-6
    guided = classifier(smooth, log_linear(smooth, c), w)
    zero, one = flow(guided, torch.tensor([[0.0], [1.0]], dtype=F64), 1.0, t_min).flatten().tolist()
    a_T = smooth.process.marginal(torch.tensor(1.0, dtype=F64))[0].item()
    spread = (s2 / (a_T**2 * s2 + 1 - a_T**2)) ** 0.5
    laws_agree((zero, one - zero), (moved * (1 - a_T * spread), spread), 2e-5)  # solver 1e-6, t_min: b^2 = 1e-7
    laws_agree((zero, (one - zero) ** 2), (moved, s2), 1.1 * a_T * spread * moved)  # the mismatch: below 0.007


@pytest.mark.equation("cg.mean_shift")
def test_the_guided_mean_walks_the_exact_chain_of_the_moved_gaussian():
    m, s2, c, w, moved = LINEAR.values()
    process = DiscreteVP(linear_beta(50, 1e-3, 0.3))
    oracle, other, x = GaussianOracle(process, m, s2), GaussianOracle(process, moved, s2), randn(5, 1)
    step = guided_mean(kernel_step, log_linear(oracle, c), w)
    for t in (1, 2, 20, 50):
        mean, sigma = step.kernel(oracle, x, times(t), times(t - 1))
        right, same = kernel_step.kernel(other, x, times(t), times(t - 1))
        close(mean, right, 1e-12), close(sigma, same, 1e-15)
    mean_T, var_T = other.law(times(50))
    run = lambda noise, like: last(sample(step, oracle, mean_T + var_T.sqrt() * noise(like), process.grid(50), noise))
    laws_agree(affine_law(run), (moved, s2), 1e-10)


def measured(oracle, y, r2):
    """log q_t(y | x_t) of y ~ N(x_0, r2), for data N(m, s^2)."""

    def log_prob(x, t):
        return log_normal(y, oracle(x, t).x0, r2 + oracle.var_x0(t)).sum(1)

    return log_prob


def guided_by_a_measurement(w, a, a_T, y=1.0, r2=1.0):
    """(mean, std) at the level a of the flow from N(0, 1) at a_T, for data N(0, 1): dx/da = w (y - a x) / D(a).

    D = r2 + 1 - a^2; so the deviation falls as D^(w/2), and the mean is D^(w/2) times an integral.
    """
    nodes, weights = np.polynomial.legendre.leggauss(80)
    u = torch.from_numpy(a_T + (a - a_T) * (nodes + 1) / 2)
    integral = (torch.from_numpy(weights) * (r2 + 1 - u**2) ** (-1 - w / 2)).sum().item() * (a - a_T) / 2
    spread = (r2 + 1 - a**2) ** (w / 2)
    return w * y * spread * integral, spread / (r2 + 1 - a_T**2) ** (w / 2)


@pytest.mark.equation("cg.tempered", "cg.gaussian_closed_form")
@pytest.mark.parametrize("w", [0.0, 1.0, 3.0])
def test_a_gaussian_likelihood_is_sampled_sharper_and_farther_than_the_tempered_density(w):
    oracle, t_min = GaussianOracle(VPSDE(), 0.0, 1.0), 1e-6
    guided = classifier(oracle, measured(oracle, 1.0, 1.0), w)
    zero, one = flow(guided, torch.tensor([[0.0], [1.0]], dtype=F64), 1.0, t_min).flatten().tolist()
    a, a_T = oracle.process.marginal(torch.tensor([t_min, 1.0], dtype=F64))[0].tolist()
    laws_agree((zero, one - zero), guided_by_a_measurement(w, a, a_T), 1e-5)  # the solver's tolerance is 1e-6
    mean, std = guided_by_a_measurement(w, 1.0, 0.0)
    close(std**2, (1 / 2) ** w)  # (r2 / (r2 + 1))^w
    target = tuple(v.item() for v in guided_normal(1.0, 1.0, w))
    if w == 3:  # sampled N(1, 1/8), aimed at N(3/4, 1/4)
        laws_agree((mean, std**2), (1.0, 0.125), 1e-12), laws_agree(target, (0.75, 0.25), 1e-15)
    else:  # the prior and the posterior are diffusions, and are reached
        laws_agree((mean, std**2), target, 1e-12)


@pytest.mark.equation("cg.tempered", "cfg.tempered")
def test_guided_ddim_on_two_classes_does_not_end_in_the_tempered_density():
    """E000-23: a thousand steps at w = 3 end with mean 1.801, std .489; q(x_0) q(y | x_0)^3 has 1.246 and .637."""
    oracle = GaussianMixtureOracle(ddpm(), [[-1.0], [1.0]], [0.6**0.5] * 2)
    grid = torch.linspace(-6, 8, 5001, dtype=F64)[:, None]
    upper = torch.ones(5001, dtype=torch.int64)
    p = oracle.tempered_log_density(grid, times(0), upper, 3.0).softmax(0)
    mean = (p * grid[:, 0]).sum()
    std = (p * (grid[:, 0] - mean) ** 2).sum().sqrt()
    assert abs(mean - 1.246) < 5e-4 and abs(std - 0.637) < 5e-4  # as printed
    nodes, weights = gauss_hermite(30)
    guided = classifier_free(oracle, 3.0, y=upper[:30])
    x0 = last(sample(ddim_step, guided, nodes[:, None], oracle.process.grid(1000)))[:, 0]
    mean = (weights * x0).sum()
    std = (weights * (x0 - mean) ** 2).sum().sqrt()
    assert abs(mean - 1.801) < 6e-4 and abs(std - 0.489) < 6e-4  # as printed: 1.8006 and .4888


# Classifier-free guidance


@pytest.mark.equation("cfg.combine_omega", "cfg.null")
def test_guidance_extrapolates_from_the_unconditional_model():
    oracle, x = mixture(), randn(4, 2)
    for t in (times(300), times(20, 300, 900, 1000)):
        free, given = oracle(x, t), oracle(x, t, y=Y)
        for w in (0.0, 0.4, 1.0, 3.0):
            pred = classifier_free(oracle, w, y=Y)(x, t)
            close(pred.eps, (1 - w) * free.eps + w * given.eps, 1e-12)
            close(pred.x0, (1 - w) * free.x0 + w * given.x0, 1e-9)
            close(pred.scale * pred.x0 + pred.std * pred.eps, x, 1e-11)
            assert pred.scale.shape == free.scale.shape


@pytest.mark.equation("cfg.combine_omega", "cg.eps")
def test_classifier_free_is_classifier_guidance_with_the_implicit_classifier():
    oracle, x = mixture(), randn(4, 2)
    for t in (20, 300, 900):
        for w in (0.5, 1.0, 3.0):
            free = classifier_free(oracle, w, y=Y)(x, times(t))
            close(free.eps, classifier(oracle, wanted(oracle), w)(x, times(t)).eps, 1e-11)


class Counting(nn.Module):
    """A conditional net that keeps count of the rows and of what was dropped."""

    def __init__(self):
        super().__init__()
        self.rows, self.dropped = [], []

    def forward(self, x, clock, y=None, drop=None):
        self.rows.append(len(x))
        self.dropped.append(drop)
        label = y.to(x)[:, None] + 1
        return 0.1 * x + (label if drop is None else torch.where(drop[:, None], 0.0, label))


@pytest.mark.equation("cfg.combine_omega")
def test_one_call_on_two_batches_or_on_one():
    model, x = Denoiser(Counting(), ddpm()), randn(4, 2)
    for w, rows in ((0.0, [4]), (1.0, [4]), (3.0, [8])):
        model.net.rows.clear()
        pred = classifier_free(model, w, y=Y)(x, times(300))
        assert model.net.rows == rows and pred.eps.shape == (4, 2)
        close(pred.eps, 0.1 * x + w * (Y[:, None] + 1), 1e-12)  # every channel is guided, row by row
    assert model.net.dropped[0].all() and model.net.dropped[1] is None
    assert model.net.dropped[2].tolist() == [False] * 4 + [True] * 4


@pytest.mark.equation("cfg.combine_w", "cfg.step004")
def test_the_two_conventions_differ_by_one():
    oracle, x = mixture(), randn(4, 2)
    for extra in (-1.0, -0.4, 0.0, 2.0):
        assert w_from_extra(extra) == 1 + extra
        for t in (times(20), times(900)):
            free, given = oracle(x, t).eps, oracle(x, t, y=Y).eps
            pred = classifier_free(oracle, w_from_extra(extra), y=Y)(x, t)
            close(pred.eps, (1 + extra) * given - extra * free, 1e-12)


@pytest.mark.equation("cfg.sample", "cfg.null")
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_calls_the_network_once_where_it_asks_once_and_scale_one_is_the_conditional_model(name):
    net, calls = Counting().double(), 19 if name == "heun" else 10
    model, x = Denoiser(net, ddpm(), predicts="x0"), randn(4, 2)
    ends = {}
    for w, rows in ((0.0, 4), (1.0, 4), (2.5, 8)):
        net.rows.clear()
        guided = classifier_free(model, w, y=Y)
        ends[w] = last(sample(SAMPLERS[name](), guided, x, model.process.grid(10), noises(0)))
        assert net.rows == [rows] * calls
    run = lambda m: last(sample(SAMPLERS[name](), m, x, model.process.grid(10), noises(0)))
    assert torch.equal(ends[1.0], run(bind(model, y=Y)))
    assert torch.equal(ends[0.0], run(bind(model, y=Y, drop=torch.ones(4, dtype=torch.bool))))


class Measured(nn.Module):
    """The exact model of x_0 ~ N(0, 1) given y ~ N(x_0, 1), or given nothing where y is dropped."""

    def __init__(self, process):
        super().__init__()
        self.process = process

    def forward(self, x_t, t, y, drop=None):
        drop = torch.zeros(len(x_t), dtype=torch.bool) if drop is None else drop
        mean, var = (torch.where(drop, free, given).to(x_t)[:, None] for free, given in ((0.0, y / 2), (1.0, 0.5)))
        a, b = (expand(c, x_t) for c in self.process.levels(t))
        return Prediction.from_eps(x_t, a, b, b * (x_t - a * mean) / (a**2 * var + b**2))


@pytest.mark.equation("cfg.sample", "cfg.from_bayes")
@pytest.mark.parametrize("w", [0.0, 0.6, 1.0, 3.0])
def test_guided_ddim_on_gaussian_data_is_an_affine_map(w):
    """And is guided by the likelihood of y, which classifier-free guidance never sees; conditions may be real."""
    model, (mean, var) = Measured(ddpm()), (0.0, 1.0)
    visited, alpha_bar = model.process.grid(40).tolist(), running_product(model.process.beta.tolist())
    for ab, a, b, _ in ddim_steps(alpha_bar, visited):
        given = 1 / (
            1 - ab / 2
        )  # eps*(x | y) = sqrt(1 - ab) (x - sqrt(ab) y / 2) / (1 - ab / 2), eps*(x) that of N(0, 1)
        k = math.sqrt(1 - ab) * (1 - w + w * given)
        mean, var = (a + b * k) * mean - b * math.sqrt(1 - ab) * w * given * math.sqrt(ab) / 2, (a + b * k) ** 2 * var

    def run(noise, like):
        guided = classifier_free(model, w, y=torch.ones(len(like), dtype=F64))
        return last(sample(ddim_step, guided, noise(like), times(*visited)))

    laws_agree(affine_law(run), (mean, var), 1e-10)
    oracle = GaussianOracle(model.process, 0.0, 1.0)
    guided = classifier(oracle, measured(oracle, 1.0, 1.0), w)
    laws_agree(sampler_law(ddim_step, guided, times(*visited)), (mean, var), 1e-10)


def test_guidance_leads_away_from_negative_conditions():
    oracle, x, other = mixture(), randn(4, 2), 2 - Y
    for t in (times(300), times(20, 300, 900, 1000)):
        toward, away = oracle(x, t, y=Y), oracle(x, t, y=other)
        for w in (0.0, 0.4, 1.0, 3.0):
            pred = classifier_free(oracle, w, negative={"y": other}, y=Y)(x, t)
            close(pred.score, away.score + w * (toward.score - away.score), 1e-10)
            close(pred.scale * pred.x0 + pred.std * pred.eps, x, 1e-11)
    close(classifier_free(oracle, 1.0, negative={"y": other}, y=Y)(x, t).x0, toward.x0, 0)


def test_negative_conditions_replace_only_their_own_and_cost_no_call():
    class Spy(Counting):
        def forward(self, x, clock, y, size, drop=None):
            self.conditions = (y, size)
            return super().forward(x, clock, y, drop)

    net, size = Spy(), torch.tensor([5, 6, 7, 8])
    guided = classifier_free(Denoiser(net, ddpm()), 2.0, negative={"y": 2 - Y}, y=Y, size=size)
    guided(randn(4, 2), times(300))
    assert net.rows == [8] and net.dropped == [None]
    assert torch.equal(net.conditions[0], torch.cat([Y, 2 - Y])) and torch.equal(net.conditions[1], size.repeat(2))
    guided(randn(4, 2), times(300), size=size + 1)  # a condition of the call goes to both halves, too
    assert torch.equal(net.conditions[1], (size + 1).repeat(2))


@pytest.mark.parametrize("space", [VPSDE(), ddpm(), VE()], ids=lambda p: type(p).__name__)
def test_an_interval_switches_between_its_levels_and_nowhere_else(space):
    oracle = mixture(space)
    inside, outside = trace(classifier_free(oracle, 3.0, y=Y)), trace(bind(oracle, y=Y))
    model = interval(inside, outside, 0.2, 5.0)
    grid = space.grid(40, uniform_log_snr(1 if space.discrete else 1e-3 * space.T))
    x = last(sample(ddim_step, model, randn(4, 2), grid))
    scale, std = space.marginal(grid[:-1])
    guided = (std / scale > 0.2) & (std / scale <= 5)
    assert 5 < guided.sum() < 35 and inside.n_evaluations == guided.sum() and outside.n_evaluations == (~guided).sum()
    assert [t for t, _ in inside.history] == list(grid[:-1][guided])
    by_hand = lambda m, *args: ddim_step(m.inside if 0.2 < _sigma(space, args[1]) <= 5 else m.outside, *args)
    both = Wrapped(None, oracle)
    both.inside, both.outside = inside, outside
    assert torch.equal(x, last(sample(by_hand, both, randn(4, 2), grid)))
    assert model.process is oracle.process


def _sigma(process, t):
    scale, std = process.marginal(t)
    return (std / scale).item()


def test_an_interval_has_its_upper_end_and_not_its_lower_and_takes_plain_functions():
    oracle = GaussianOracle(VE())

    def far(x, t):
        return oracle(x, t)

    far.process = oracle.process
    near, x = trace(oracle), randn(2, 2)
    model = interval(near, far, 1.0, 3.0)
    for t, count in ((1.0, 0), (1.5, 1), (3.0, 2), (3.5, 2)):
        model(x, torch.tensor(t, dtype=F64))
        assert near.n_evaluations == count
    interval(near, far, 0.0, math.inf)(x, torch.tensor(50.0, dtype=F64))
    assert near.n_evaluations == 3


def warned(model, x, *at, w=3.0, **conditions):
    """How often guidance warns on the way through these times."""
    guided = classifier_free(model, w, **(conditions or {"y": Y[: len(x)]}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for t in at:
            guided(x, t)
    assert all("without its condition: w has no effect" in str(c.message) for c in caught)
    return len(caught)


def test_a_network_that_ignores_its_condition_is_told_once():
    blind = Denoiser(lambda x, clock, **cond: 0.3 * x, ddpm())
    x = randn(4, 2)
    assert warned(blind, x, times(900), times(500)) == 1
    assert warned(blind, x, times(20), times(900), times(500)) == 1  # near the data equal answers say nothing yet
    assert warned(blind, x, times(20)) == 0 and warned(blind, x[:0], times(900), y=Y[:0]) == 0
    assert warned(blind, x, times(20, 20, 900, 20)) == 1
    assert [warned(blind, x, times(900), w=w) for w in (0.0, 1.0)] == [0, 0]  # one half only: nothing to compare
    fresh = Denoiser(UNet(width=8, n_classes=3), VPSDE(), predicts="v")  # its last layer is 0: true of it, too
    assert warned(fresh, torch.zeros(4, 1, 8, 8), torch.tensor(0.9)) == 1


@pytest.mark.parametrize(
    "process",
    [ddpm(), DiscreteVP(zero_terminal_snr(linear_beta(1000))), VPSDE(), VE()],
    ids=["ddpm", "no-signal", "vpsde", "ve"],
)
def test_a_model_that_looks_at_its_condition_is_not_warned_of(process):
    oracle, x = mixture(process), oracle_points(4)
    for dtype in (F64, torch.float32, torch.float16):
        for fraction in (1.0, 0.5, 0.01, 0.001):  # a run may begin anywhere, also where x_t shows its class
            t = times(round(1000 * fraction)) if process.discrete else torch.tensor(fraction * process.T, dtype=F64)
            scale, std = process.marginal(t)
            assert warned(oracle, (scale * x + std * randn(4, 2)).to(dtype), t) == 0
    if process.zero_terminal_snr:  # a probe at T is a probe
        blind = Denoiser(lambda x, clock, **cond: 0.3 * x, process, predicts="v")
        assert warned(blind, x, times(1000), times(999)) == 1


def oracle_points(n):
    return mixture().means[Y[:n]]


def test_swapping_rows_swaps_results():
    guided = lambda y: classifier_free(mixture(), 3.0, y=y)
    x, order = randn(4, 2), torch.tensor([2, 0, 3, 1])
    close(guided(Y[order])(x[order], times(300)).x0, guided(Y)(x, times(300)).x0[order], 1e-13)


def test_learned_variance_comes_from_the_conditional_half():
    label = lambda x, y, drop: y.to(x)[:, None].expand_as(x) - drop.to(x)[:, None]
    net = lambda x, clock, y, drop: torch.cat([x + label(x, y, drop), label(x, y, drop)], 1)
    model = Denoiser(net, ddpm(), learned_variance=True)
    guided, x = classifier_free(model, 3.0, y=Y), randn(4, 2)
    frac = ((Y[:, None] + 1) / 2).expand(4, 2)
    for wrapped in (guided, static_threshold(guided), dynamic_threshold(guided), classifier(guided, nowhere, 2.0)):
        close(wrapped(x, times(300)).frac, frac, 1e-15)  # thresholds and classifiers leave it alone


def nowhere(x, t):
    """A classifier that does not care."""
    return 0 * x.sum(1)


# Thresholds


@pytest.mark.equation("thresh.static", "param.eps_from_x0")
def test_static_threshold_clips_the_clean_data_and_recomputes_the_noise():
    oracle, x = mixture(), 2 * randn(50, 2)
    pred, clipped = oracle(x, times(300)), static_threshold(oracle)(x, times(300))
    close(clipped.x0, pred.x0.clamp(-1, 1), 0)
    close(clipped.scale * clipped.x0 + clipped.std * clipped.eps, x, 1e-14)
    inside = (pred.x0.abs() <= 1).all(1)
    assert 0 < inside.sum() < 50
    close(clipped.eps[inside], pred.eps[inside], 1e-13)
    twice = static_threshold(static_threshold(oracle))(x, times(300))
    assert torch.equal(twice.x0, clipped.x0)
    close(static_threshold(oracle, 1.5)(x, times(300)).x0, pred.x0.clamp(-1.5, 1.5), 0)


def says(x0):
    """A model that always says this x0."""
    return Denoiser(lambda x, clock: x0.expand_as(x), ddpm(), predicts="x0")


@pytest.mark.equation("thresh.dynamic")
def test_dynamic_threshold_rescales_each_sample_by_its_own_percentile():
    x0 = torch.cat([3 * randn(2, 1, 8, 8), randn(1, 1, 8, 8).clamp(-1, 1)])
    x = randn(3, 1, 8, 8, seed=1)
    for p in (0.9, 0.995, 1.0):
        pred = dynamic_threshold(says(x0), p)(x, times(300))
        for i in range(3):
            size = x0[i].abs().flatten().sort().values
            rank = p * 63
            low, high = size[math.floor(rank)], size[math.ceil(rank)]
            s = max(1.0, (low + (high - low) * (rank - math.floor(rank))).item())
            close(pred.x0[i], x0[i].clamp(-s, s) / s, 1e-13)
        assert pred.x0.abs().max() <= 1
        close(pred.x0[2], x0[2], 0)  # nothing to do: unchanged
        close(dynamic_threshold(says(pred.x0), p)(x, times(300)).x0, pred.x0, 0)
        close(pred.scale * pred.x0 + pred.std * pred.eps, x, 1e-13)
    close(pred.x0[0], x0[0] / x0[0].abs().max(), 1e-14)  # p = 1 divides by the maximum


@pytest.mark.equation("thresh.sampler")
def test_thresholds_leave_data_that_fit_alone_and_never_touch_x_t():
    data = torch.tensor([[0.6, -0.6], [-0.6, 0.6], [0.9, 0.9]], dtype=F64)
    oracle, x_T = DatasetOracle(ddpm(), data), randn(200, 2)
    plain = list(sample(ddim_step, oracle, x_T, oracle.process.grid(20)))
    for threshold in (static_threshold, dynamic_threshold):
        path = list(sample(ddim_step, threshold(oracle), x_T, oracle.process.grid(20)))
        for a, b in zip(path, plain, strict=True):
            close(a, b, 1e-11)
    assert plain[0].abs().max() > 2  # E000-33 would clip these


def printed(x):
    """What the lecture does to x_t itself: nothing to the first rows, clipping, a dynamic threshold to the last."""
    plain, clipped, rescaled = x.chunk(3)
    s = rescaled.abs().quantile(0.995).clamp(min=1)
    return torch.cat([plain, clipped.clamp(-1, 1), rescaled.clamp(-s, s) / s])


@pytest.mark.equation("thresh.sampler", "thresh.static", "thresh.dynamic")
def test_clipping_the_clean_data_keeps_the_spread_on_the_way_and_clipping_x_t_does_not():
    """E000-33: std of x_300 is .866 and stays so; with x_t clipped it is .536, or .398 by its dynamic version."""
    oracle, n = GaussianMixtureOracle(ddpm(), [[-0.6], [0.6]], [0.1, 0.1]), 1500
    step, down = make_ddpm_step(), torch.arange(1000, 299, -1)
    swiping = lambda *args: printed(step(*args))
    x = last(sample(swiping, static_threshold(oracle), randn(3 * n, 1), down, noises(1)))
    ab = oracle.process.alpha_bar[300]
    truth = (ab * (0.6**2 + 0.1**2) + 1 - ab).sqrt().item()
    assert abs(truth - 0.866) < 5e-4
    error = 4 / (2 * n) ** 0.5  # four relative standard errors of a bell's deviation; clipped ones have smaller ones
    for part, std in zip(x.chunk(3), (truth, 0.536, 0.398), strict=True):
        assert abs(part.std() / std - 1) < error
    assert abs(randn(40_000).abs().gt(1).double().mean() - 0.317) < 0.01  # of honest x_T, what [-1, 1] would cut


@pytest.mark.equation("thresh.sampler")
def test_a_small_mode_keeps_its_mass_where_x0_is_clipped_and_vanishes_where_x_t_is():
    oracle = GaussianMixtureOracle(ddpm(), [[-0.6], [0.6]], [0.1, 0.1], [0.1, 0.9])
    x_T = torch.special.ndtri((torch.arange(1000, dtype=F64) + 0.5) / 1000)[:, None]  # quantiles: a mass without chance
    clipped = lambda *args: ddim_step(*args).clamp(-1, 1)
    grid = oracle.process.grid(200)
    mass = [
        (last(sample(step, model, x_T, grid)) < 0).double().mean().item()
        for step, model in ((ddim_step, oracle), (ddim_step, static_threshold(oracle)), (clipped, oracle))
    ]
    assert mass[0] == mass[1] and abs(mass[0] - 0.1) < 0.01  # 200 steps and alpha_bar_T > 0 leave .105
    assert mass[2] < 0.01


@pytest.mark.equation("thresh.sampler")
@pytest.mark.parametrize("name", SAMPLERS)
def test_guided_samples_leave_the_range_and_thresholds_bring_them_back(name):
    oracle = GaussianMixtureOracle(VPSDE(), [[-0.6, -0.6], [0.6, 0.6]], [0.25, 0.25])
    x_T, y = randn(100, 2), torch.arange(100) % 2
    guided = classifier_free(oracle, 8.0, y=y)
    grid = oracle.process.grid(20, uniform_log_snr(1e-3))
    run = lambda model: last(sample(SAMPLERS[name](), model, x_T, grid, noises(0)))
    assert run(guided).abs().max() > 1.15
    for threshold in (static_threshold, dynamic_threshold, lambda m: dynamic_threshold(m, 0.5)):
        x0 = run(threshold(guided))
        assert x0.abs().max() <= 1 + 1e-12 and ((x0.sum(1) > 0) == (y == 1)).all()


@pytest.mark.equation("thresh.saturation")
def test_strong_guidance_leaves_the_range_of_the_data():
    means = torch.tensor([[-0.7], [0.7]], dtype=F64)
    oracle, x = GaussianMixtureOracle(ddpm(), means, [0.1, 0.1]), randn(100, 1)
    y = torch.ones(100, dtype=torch.int64)
    largest = [classifier_free(oracle, w, y=y)(x, times(700)).x0.abs().max().item() for w in (1.0, 2.0, 4.0, 8.0)]
    assert largest[0] < 1.2 and sorted(largest) == largest and largest[-1] > 4


# One network, another schedule; watching; binding


@pytest.mark.equation("sched.train_vs_sample")
@pytest.mark.parametrize(
    "process", [VPSDE(), SubVPSDE(), VESDE(), VE(), DiscreteVP(cosine_beta(400))], ids=lambda p: type(p).__name__
)
def test_a_model_answers_the_same_on_any_schedule(process):
    table, exact, x = mixture(VPSDE()), mixture(process), randn(4, 2)
    for fraction in (0.05, 0.3, 0.6):
        t = times(round(400 * fraction)) if process.discrete else torch.tensor(fraction * process.T, dtype=F64)
        scale, std = process.marginal(t)
        x_t = x * (scale**2 + std**2).sqrt()
        mine, right = reschedule(table, process)(x_t, t), exact(x_t, t)
        close(mine.x0, right.x0, 1e-9)
        close(mine.eps, right.eps, 1e-9)
        close(mine.scale, right.scale, 0)


@pytest.mark.equation("sched.train_vs_sample")
def test_two_grids_converge_to_one_sample():
    oracle, x_T, gaps = mixture(VPSDE()), randn(50, 2), []
    other = reschedule(oracle, DiscreteVP(cosine_beta(4000)))
    for n in (100, 200, 400):
        start = oracle.process.log_snr(torch.tensor(1.0, dtype=F64))  # the cosine's own T is noisier: start level
        t_start = other.process.time_of(start).round().long()
        grid = other.process.grid(n, uniform_log_snr(1))
        grid = torch.cat([t_start[None], grid[grid < t_start]])
        a = last(sample(ddim_step, oracle, x_T, oracle.process.grid(n, uniform_log_snr(1e-4))))
        b = last(sample(ddim_step, other, x_T, grid))
        gaps.append((a - b).abs().mean().item())
    assert gaps[2] < 0.05 and gaps[2] < 0.6 * gaps[1] < 0.36 * gaps[0]  # O(1 / N)


def test_trace_watches_without_changing():
    oracle, x = mixture(), randn(4, 2)
    watched = trace(oracle)
    assert torch.equal(watched(x, times(300), y=Y).x0, oracle(x, times(300), y=Y).x0)
    (t, pred), *rest = watched.history
    assert watched.n_evaluations == 1 and t == 300 and not rest and pred.x0.shape == (4, 2)


def test_bound_conditions_can_be_overridden():
    oracle, x = mixture(), randn(4, 2)
    bound = bind(oracle, y=Y)
    close(bound(x, times(300)).x0, oracle(x, times(300), y=Y).x0, 0)
    close(bound(x, times(300), y=2 - Y).x0, oracle(x, times(300), y=2 - Y).x0, 0)


def test_wrappers_pass_on_eval_to_and_parameters():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    model = Denoiser(net, ddpm())
    guided = classifier_free(trace(model), 2.0, y=Y)
    wrapped = static_threshold(dynamic_threshold(interval(guided, bind(model, y=Y), 0.2, 5.0)))
    assert list(wrapped.parameters()) == list(net.parameters())
    wrapped.eval()
    assert not net.training
    wrapped.double()
    assert net[0].weight.dtype == F64 and wrapped.process is model.process


def test_a_plain_function_with_a_process_is_a_model():
    oracle = GaussianOracle(ddpm(), 1.3, 0.25)

    def model(x_t, t, **cond):
        return oracle(x_t, t)

    model.process = oracle.process
    x_T, grid = randn(3, 2), oracle.process.grid(10)
    expected = last(sample(ddim_step, oracle, x_T, grid))
    close(last(sample(ddim_step, static_threshold(model, 100.0), x_T, grid)), expected, 1e-12)
    close(last(sample(ddim_step, model, x_T, grid)), expected, 0)


def test_levels_noisier_than_the_model_knows_are_read_at_its_end():
    table = DiscreteVP(cosine_beta(10, max_beta=1.0))
    for process in (VPSDE(), SubVPSDE(), VE()):
        trained = GaussianOracle(process, 0.4, 0.25)
        pred = reschedule(trained, table)(randn(3, 2), torch.tensor(10))
        at_end = trained(
            randn(3, 2) * process.marginal(torch.tensor(process.T).double())[1], torch.tensor(process.T).double()
        )
        assert torch.allclose(pred.x0, at_end.x0, atol=1e-12)
    with pytest.raises(ValueError, match="model.process must keep some signal at T"):
        classifier(GaussianOracle(table), lambda x, t: x.sum(1), 1.0)
