"""Sections 17, 18 and 20: guidance on a mixture whose classifier is known exactly, and thresholds."""

import math

import pytest
import torch
from affine import last
from exact import F64, close, normal, randn, times
from torch import nn

from diffusion_edu.denoiser import Denoiser
from diffusion_edu.guidance import (
    bind,
    classifier,
    classifier_free,
    dynamic_threshold,
    gradient,
    reschedule,
    static_threshold,
    trace,
)
from diffusion_edu.oracles import DatasetOracle, GaussianMixtureOracle, GaussianOracle
from diffusion_edu.process import VE, VESDE, VPSDE, DiscreteVP, SubVPSDE, uniform_log_snr
from diffusion_edu.samplers import KernelStep, ddim_step, guided_mean, make_ddpm_step, sample
from diffusion_edu.schedules import cosine_beta, linear_beta

Y = torch.tensor([0, 1, 2, 1])


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
    guided = classifier(oracle, wanted(oracle), 2.0)
    expected = guided(randn(4, 2), times(300)).x0
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            x = randn(4, 2)
            pred = guided(x, times(300))
            assert torch.equal(pred.x0, expected) and not pred.x0.requires_grad and not x.requires_grad


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


def test_swapping_rows_swaps_results():
    guided = lambda y: classifier_free(mixture(), 3.0, y=y)
    x, order = randn(4, 2), torch.tensor([2, 0, 3, 1])
    close(guided(Y[order])(x[order], times(300)).x0, guided(Y)(x, times(300)).x0[order], 1e-13)


def test_learned_variance_comes_from_the_conditional_half():
    net = lambda x, clock, y, drop=None: torch.cat([x, y.to(x)[:, None].expand_as(x) - drop.to(x)[:, None]], 1)
    model = Denoiser(net, ddpm(), learned_variance=True)
    pred = classifier_free(model, 3.0, y=Y)(randn(4, 2), times(300))
    close(pred.frac, ((Y[:, None] + 1) / 2).expand(4, 2), 1e-15)


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
    wrapped = static_threshold(dynamic_threshold(bind(classifier_free(trace(model), 2.0, y=Y))))
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
