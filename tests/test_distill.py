"""Distillation: what a student is asked for, against maps that are known exactly; and both losses where they are 0."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from affine import affine_law, last, laws_agree
from exact import DATA, F64, close, randn, slope, times
from torch import nn

from diffusion_edu.denoiser import Denoiser, EDMDenoiser
from diffusion_edu.distill import (
    consistency_loss,
    consistency_step,
    fit_student,
    grid_times,
    progressive_loss,
    two_step_target,
)
from diffusion_edu.guidance import Wrapped, bind
from diffusion_edu.losses import denoising_loss, loss_ratio, snr_plus_one_weight, truncated_snr_weight
from diffusion_edu.oracles import GaussianMixtureOracle, GaussianOracle
from diffusion_edu.prediction import Prediction
from diffusion_edu.process import (
    VE,
    VESDE,
    VPSDE,
    DiscreteVP,
    SubVPSDE,
    expand,
    q_sample,
    quadratic,
    uniform,
    uniform_log_snr,
)
from diffusion_edu.samplers import ddim_mean, ddim_step, noises, sample
from diffusion_edu.schedules import cosine_beta, linear_beta
from diffusion_edu.training import Recipe


def real(t):
    return torch.tensor(t, dtype=F64)


def ddpm():
    return DiscreteVP(linear_beta(1000))


def every_process():
    return ddpm(), DiscreteVP(cosine_beta(60, max_beta=1.0)), VPSDE(), SubVPSDE(), VESDE(), VE()


def mixture(process):
    means = torch.tensor([[-1.0, 0.5], [1.0, -0.5]], dtype=F64)
    return GaussianMixtureOracle(process, means, [0.4, 0.3], [0.6, 0.4])


def one(weight):
    """The weight 1, in the losses' form."""
    return lambda process, t: torch.full_like(t, weight, dtype=F64)


class Moved:
    """A model that one DDIM step carries from t, of a grid, exactly to ``to(x_t, t, s)`` at the next time s."""

    def __init__(self, process, grid, to):
        self.process, self.grid, self.to = process, grid, to

    def __call__(self, x_t, t, **cond):
        i = (self.grid == t.expand(len(x_t))[:, None]).int().argmax(1)
        t, s = self.grid[i], self.grid[i + 1]
        (a_t, b_t), (a_s, b_s) = ([expand(c, x_t) for c in self.process.marginal(u)] for u in (t, s))
        ratio = b_s / b_t
        return Prediction.from_x0(x_t, a_t, b_t, (self.to(x_t, t, s) - ratio * x_t) / (a_s - ratio * a_t))


def halved(teacher, grid):
    """The perfect student of a teacher that walks this grid."""
    middle = dict(zip(grid[:-1:2].tolist(), grid[1::2], strict=True))

    def two_steps(x_t, t, s):
        m = torch.stack([middle[u] for u in t.tolist()])
        return ddim_step(teacher, ddim_step(teacher, x_t, t, m, None), m, s, None)

    return Moved(teacher.process, grid[::2], two_steps)


class Consistent:
    """The consistency function of Gaussian data: where the exact flow ends, from any point of a path."""

    def __init__(self, process, slope=0.0):
        self.process, self.bell, self.slope = process, GaussianOracle(process, *DATA), slope

    def __call__(self, x_t, t, **cond):
        a, b = (expand(c, x_t) for c in self.process.marginal(t))
        ends = DATA[0] + (DATA[1] / (a**2 * DATA[1] + b**2)).sqrt() * (x_t - a * DATA[0])
        return Prediction.from_x0(x_t, a, b, ends + self.slope * expand(t / self.process.T, x_t))

    def flow(self, x_t, t, s):
        """The exact flow from t to s."""
        a, b = (expand(c, x_t) for c in self.process.marginal(s))
        return a * DATA[0] + ((a**2 * DATA[1] + b**2) / DATA[1]).sqrt() * (self(x_t, t).x0 - DATA[0])


# Progressive


@pytest.mark.equation("distill.progressive")
def test_one_step_on_the_target_lands_where_the_teachers_two_steps_do():
    for process in every_process():
        teacher, x = mixture(process), randn(4, 2)
        for t, m, s in process.grid(8).unfold(0, 3, 1):
            (a_t, b_t), (_, b_s) = process.marginal(t), process.marginal(s)
            target = two_step_target(teacher, x, t, m, s)
            landed = ddim_mean(process, target, (x - a_t * target) / b_t, s, 0 * b_s)
            close(landed, ddim_step(teacher, ddim_step(teacher, x, t, m, None), m, s, None), 1e-12)
        stops = process.grid(4)
        t, m, s = stops[[0, 1, 2, 1]], stops[[1, 2, 3, 2]], stops[[2, 3, 4, 3]]  # each row at its own times
        together = two_step_target(teacher, x, t, m, s)
        for i in range(4):
            close(together[i : i + 1], two_step_target(teacher, x[i : i + 1], t[i], m[i], s[i]), 1e-12)


@pytest.mark.equation("distill.progressive")
def test_the_perfect_student_walks_its_teachers_path_in_half_the_steps_again_and_again():
    for process in every_process():
        grid, x_T = process.grid(16), process.prior((5, 2), noises(0)).double()
        model = mixture(process)
        whole = [x_T, *sample(ddim_step, model, x_T, grid)]
        for k in (2, 4, 8, 16):
            model, grid = halved(model, grid), grid[::2]
            path = [x_T, *sample(ddim_step, model, x_T, grid)]
            close(torch.stack(path), torch.stack(whole[::k]), 1e-11)


@pytest.mark.equation("distill.progressive")
def test_the_progressive_loss_is_the_weighted_error_of_x0_and_0_for_the_perfect_student_only():
    for process in every_process():
        teacher, grid, x0, eps = mixture(process), process.grid(8), randn(6, 2), randn(6, 2, seed=1)
        t = grid_times(grid[::2])(process, 6, torch.Generator().manual_seed(0))
        perfect = halved(teacher, grid)
        # rounding errors of the target, squared, times an SNR of up to 1e7
        close(progressive_loss(teacher, grid)(perfect, x0, t, eps), torch.zeros(6), 1e-15)
        off = lambda x_t, t: replace(perfect(x_t, t), x0=perfect(x_t, t).x0 + torch.tensor([0.3, 0.1]))
        off.process = process
        for weight in (truncated_snr_weight, snr_plus_one_weight, one(2.0)):
            loss = progressive_loss(teacher, grid, weight)(off, x0, t, eps)
            assert loss.shape == (6,)
            close(loss / weight(process, t), torch.full((6,), (0.3**2 + 0.1**2) / 2), 1e-8)
        assert (progressive_loss(teacher, grid)(teacher, x0, t, eps) > 1e-8).any()  # two steps are not one


@pytest.mark.equation("distill.progressive")
def test_the_student_learns_and_the_teacher_does_not_and_is_in_eval_mode():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.dropout = nn.Linear(2, 2, dtype=F64), nn.Dropout(0.5)

        def forward(self, x, clock):
            return self.dropout(self.layer(x))

    teacher, student = (Denoiser(Net(), VPSDE(), predicts="v").train() for _ in range(2))
    student.net.dropout.p = 0.0
    grid, x0, eps = VPSDE().grid(4), randn(5, 2), randn(5, 2, seed=1)
    for make, starts in ((progressive_loss, grid[::2]), (consistency_loss, grid)):
        t = starts[:-1].repeat(3)[:5]
        loss = make(teacher, grid)(student, x0, t, eps)
        assert torch.equal(loss, make(teacher, grid)(student, x0, t, eps))  # no dropout was on
        assert teacher.training and teacher.net.dropout.training
        student.zero_grad()
        loss.sum().backward()
        assert all(p.grad is None for p in teacher.parameters()) and student.net.layer.weight.grad.norm() > 0


def test_conditions_reach_teacher_and_student():
    process = VPSDE()
    grid, y, drop = process.grid(4), torch.tensor([0, 1, 1]), torch.tensor([False, True, False])

    def spy(seen):
        def call(m, x_t, t, **cond):
            seen.append(cond)
            return m(x_t, t, **cond)

        return Wrapped(call, mixture(process))

    for make, starts, n_teacher in ((progressive_loss, grid[::2], 2), (consistency_loss, grid, 1)):
        taught, learned = [], []
        t = starts[[0, 1, 0]]
        loss = make(spy(taught), grid)(spy(learned), randn(3, 2), t, randn(3, 2, seed=1), y=y, drop=drop)
        assert len(taught) == n_teacher and len(learned) >= 1
        assert all(cond["y"] is y and cond["drop"] is drop for cond in taught + learned)
        bound = make(bind(mixture(process), y=y, drop=drop), grid)
        close(loss, bound(bind(mixture(process), y=y, drop=drop), randn(3, 2), t, randn(3, 2, seed=1)), 1e-13)


class Lines(nn.Module):
    """x0 = slope x_t + shift, with a line of its own for every time of a grid: it holds every perfect student."""

    def __init__(self, process, grid):
        super().__init__()
        self.process, self.grid, oracle = process, grid, GaussianOracle(process, *DATA)
        at = lambda x: torch.stack([oracle(torch.full((1,), x, dtype=F64), t).x0[0] for t in grid[:-1]])
        self.shift = nn.Parameter(at(0.0))
        self.slope = nn.Parameter(at(1.0) - at(0.0))
        self.asked = set()

    def forward(self, x_t, t):
        self.asked |= set(t.reshape(-1).tolist())
        i = (self.grid == t.reshape(-1, 1)).int().argmax(1)
        scale, std = (expand(c, x_t) for c in self.process.levels(t))
        x0 = expand(self.slope[i], x_t) * x_t + expand(self.shift[i], x_t)
        return Prediction.from_x0(x_t, scale, std, x0)


@pytest.mark.equation("distill.progressive")
def test_two_rounds_of_distillation_turn_eight_steps_into_two_that_end_at_the_same_data():
    process = VPSDE()
    grid, x_T = process.grid(8, quadratic), randn(6, 1)
    model = Lines(process, grid)
    teacher = last(sample(ddim_step, model, x_T, grid))
    two_before = last(sample(ddim_step, model, x_T, grid[::4]))
    model.asked.clear()
    recipe = Recipe(250, batch_size=64, lr=0.05, weight=one(1.0))
    losses = list(fit_student(model, DATA[0] + randn(500, 1) / 2, recipe, grid, 2))
    assert len(losses) == 2 * 250 and losses[249] < 1e-3 * losses[0] and losses[499] < 1e-3 * losses[250]
    assert model.asked == set(grid[:-1:2].tolist())  # the second round's times are among the first's
    student = last(sample(ddim_step, model, x_T, grid[::4]))
    apart = (two_before - teacher).abs().mean()
    assert (student - teacher).abs().mean() < 0.01 * apart and apart > 0.05  # what the losses left


# Weights


@pytest.mark.equation("distill.weight")
def test_the_two_weights_are_the_larger_of_two_losses_and_the_loss_of_v():
    for process in every_process():
        model = mixture(process)
        t, x0, eps = process.grid(6)[1:-1], randn(5, 2), randn(5, 2, seed=1)  # below T, where eps may say nothing
        loss = lambda target, weight=None: denoising_loss(model, x0, t, eps, target, weight)
        of_x0, of_eps = loss("x0"), loss("eps")
        close(loss("x0", truncated_snr_weight) / of_x0.maximum(of_eps), torch.ones(5), 1e-6)  # x0, eps: rounded apart
        close(loss("x0", snr_plus_one_weight) / loss("v"), torch.ones(5), 1e-6)
        snr = process.log_snr(t).exp()
        close(truncated_snr_weight(process, t) / snr.clamp(min=1), torch.ones(5), 1e-12)
        close(snr_plus_one_weight(process, t) / (1 + snr), torch.ones(5), 1e-12)
        assert torch.equal(snr_plus_one_weight(process, t), loss_ratio(process, t, "v"))
    table = DiscreteVP(cosine_beta(60, max_beta=1.0))
    assert truncated_snr_weight(table, times(60)) == snr_plus_one_weight(table, times(60)) == 1  # no signal: x0 counts


# Consistency


@pytest.mark.equation("distill.consistency")
def test_the_consistency_function_of_gaussian_data_is_constant_along_the_flow_and_the_identity_at_0():
    for process in every_process():
        exact, x = Consistent(process), randn(5, 1)
        grid = process.grid(6)
        for t, s in pairwise(grid[1:-1]):
            close(exact(exact.flow(x, t, s), s).x0, exact(x, t).x0, 1e-12)
        close(exact(x, grid[-1]).x0, x, 1e-14)


@pytest.mark.equation("distill.consistency")
def test_networks_of_v_and_of_edm_are_the_identity_at_time_0():
    net, x = nn.Linear(2, 2, dtype=F64), randn(4, 2)
    call = lambda x, clock: net(x)
    for process in (VPSDE(), ddpm()):
        close(Denoiser(call, process, predicts="v")(x, process.grid(1)[-1]).x0, x, 1e-15)
    for t in (1e-3, 1e-6):
        for process in (VE(), VPSDE()):
            std = process.marginal(real(t))[1]
            assert (EDMDenoiser(call, process)(x, real(t)).x0 - x).abs().max() < 5 * std  # c_out = std, c_skip = 1
    assert (Denoiser(call, VPSDE(), predicts="x0")(x, real(0.0)).x0 - x).abs().max() > 0.1  # not every network is


@pytest.mark.equation("distill.consistency")
def test_the_consistency_loss_is_0_for_the_exact_function_where_the_teacher_steps_exactly():
    for process in (ddpm(), VPSDE(), VE()):
        exact, grid = Consistent(process), process.grid(8)
        teacher = Moved(process, grid, exact.flow)
        x0, eps = DATA[0] + randn(8, 1) / 2, randn(8, 1, seed=1)
        close(consistency_loss(teacher, grid)(exact, x0, grid[:-1], eps), torch.zeros(8), 1e-15)
    errors, counts = [], (40, 80, 160)
    for n in counts:  # DDIM's step is wrong by O(1 / n^2)
        grid = VPSDE().grid(n, uniform_log_snr(1e-2))
        t = grid[[n // 4, n // 2, n // 4 * 3]]
        x0, eps = DATA[0] + randn(3, 1) / 2, randn(3, 1, seed=1)
        loss = consistency_loss(GaussianOracle(VPSDE(), *DATA), grid, one(1.0))(Consistent(VPSDE()), x0, t, eps)
        errors.append(loss.mean().item())
    assert abs(slope(counts, errors) - 4) < 0.3


@pytest.mark.equation("distill.consistency")
def test_no_gradient_flows_through_the_later_answer_and_time_0_is_the_data():
    process, weight = VPSDE(), 1.7
    grid = process.grid(6)
    theta = torch.tensor(0.3, dtype=F64, requires_grad=True)
    student = Consistent(process, theta)  # f* + theta t: off by theta (s - t) from one time to the next
    teacher = Moved(process, grid, Consistent(process).flow)
    t, s = grid[:-1], grid[1:]
    loss = consistency_loss(teacher, grid, one(weight))(student, DATA[0] + randn(6, 1) / 2, t, randn(6, 1, seed=1))
    close(loss, weight * 0.3**2 * (t - s) ** 2, 1e-12)  # at s = 0 the target is x_0: f has no theta there
    for i in range(6):
        (slope_of_loss,) = torch.autograd.grad(loss[i], theta, retain_graph=True)
        close(slope_of_loss, weight * 2 * 0.3 * t[i] * (t[i] - s[i]), 1e-12)  # with the later one: (t - s)^2


@pytest.mark.equation("distill.consistency")
def test_the_last_target_is_the_teachers_clean_data_and_no_model_is_asked_about_time_0():
    for process in (ddpm(), VPSDE()):
        asked = []

        def student(x_t, t, **cond):
            asked.append(t)
            return mixture(process)(0.5 * x_t, t)

        student.process, teacher, grid = process, mixture(process), process.grid(5)
        x0, eps, t = randn(4, 2), randn(4, 2, seed=1), grid[-2].expand(4)
        loss = consistency_loss(teacher, grid, one(1.0))(student, x0, t, eps)
        x_t = q_sample(process, x0, t, eps)
        close(loss, ((teacher(x_t, t).x0 - student(x_t, t).x0) ** 2).mean(1), 1e-13)
        assert torch.stack(asked).min() > 0


@pytest.mark.equation("distill.consistency")
def test_sampling_with_the_exact_consistency_function_has_the_law_of_the_data_in_any_number_of_steps():
    for process in (ddpm(), VPSDE(), VE()):
        model = Consistent(process)
        mean, var = model.bell.law(process.grid(1)[0])
        for n in (1, 2, 5):
            start = lambda noise, like: mean + var.sqrt() * noise(like)
            run = lambda noise, like: last(sample(consistency_step, model, start(noise, like), process.grid(n), noise))
            laws_agree(affine_law(run), DATA, 1e-12)
        x_T = process.prior((3, 1), noises(0)).double()
        x0 = last(sample(consistency_step, model, x_T, process.grid(1)))  # one step needs no noise
        assert torch.equal(x0, model(x_T, process.grid(1)[0]).x0)


@pytest.mark.equation("distill.consistency")
def test_a_consistency_step_is_the_noisy_end_of_ddims_family():
    model, x, z = Consistent(VPSDE()), randn(4, 1), randn(4, 1, seed=1)
    t, s = real(0.7), real(0.3)
    std, pred = VPSDE().marginal(s)[1], model(x, t)
    close(consistency_step(model, x, t, s, lambda x: z), ddim_mean(VPSDE(), pred.x0, pred.eps, s, std) + std * z, 1e-15)


# Times, and what is refused


def test_training_times_are_those_of_the_grid_but_its_last_each_as_likely():
    for process in (ddpm(), VPSDE()):
        grid = process.grid(5, uniform)
        drawn = grid_times(grid)(process, 10_000, torch.Generator().manual_seed(0))
        values, counts = drawn.unique(return_counts=True)
        assert drawn.dtype == process.time_dtype and torch.equal(values, grid[:-1].flip(0))
        assert (counts - 2000).abs().max() < 4 * (10_000 * 0.2 * 0.8) ** 0.5  # four standard errors
        draw = lambda seed: grid_times(grid)(process, 50, torch.Generator().manual_seed(seed))
        assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


BELL = GaussianOracle(VPSDE(), *DATA)
X, EPS = randn(3, 1), randn(3, 1, seed=1)
FOUR = VPSDE().grid(4)


def loss_at(make, *t):
    return lambda: make(BELL, FOUR)(BELL, X, real(t), EPS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: progressive_loss(BELL, FOUR[:-1]), "times must end in 0; got 0.25"),
        (lambda: progressive_loss(BELL, VPSDE().grid(3)), r"times must hold an even number of steps.*; got 4 times"),
        (lambda: progressive_loss(BELL, FOUR.flip(0)), "times must be 1-D, .* strictly decreasing; got"),
        (lambda: progressive_loss(BELL, 2 * FOUR), "times must be in .0, 1.; got 2"),
        (lambda: consistency_loss(BELL, FOUR[:-1]), "times must end in 0; got 0.25"),
        (lambda: grid_times(FOUR.flip(0)), "times must be 1-D, .* strictly decreasing; got"),
        (lambda: grid_times(2 * FOUR)(VPSDE(), 3), "times must be in .0, 1.; got 2"),
        (loss_at(progressive_loss, 1.0, 0.75, 0.5), r"t must be times of the student's grid, .*; got .0.75."),
        (loss_at(progressive_loss, 1.0, 0.0, 0.5), r"t must be times of the student's grid, not its last.*; got .0.0."),
        (loss_at(consistency_loss, 1.0, 0.3, 0.5), r"t must be times of the student's grid, .*; got .0.3"),
        (loss_at(consistency_loss, 1.0, 0.0, 0.5), r"t must be times of the student's grid, not its last.*; got .0.0."),
        (loss_at(progressive_loss, 1.0, 0.5), r"t must be 0-d or of shape .3,."),
        (lambda: progressive_loss(BELL, FOUR)(BELL, X, FOUR[[0, 2, 0]], EPS[:1]), "eps must have the shape of x0"),
        (lambda: next(fit_student(BELL, X, Recipe(1), FOUR, 3)), "n_steps must be 4 steps halved a few times; got 3"),
        (lambda: next(fit_student(BELL, X, Recipe(1), FOUR, 4)), "n_steps must be 4 steps halved a few times; got 4"),
        (lambda: next(fit_student(BELL, X, Recipe(1), FOUR, 8)), "n_steps must be 4 steps halved a few times; got 8"),
        (lambda: next(fit_student(BELL, X, Recipe(1), FOUR, 0)), "n_steps must be at least 1; got 0"),
        (lambda: next(fit_student(BELL, X, Recipe(1), FOUR[:-1], 1)), "times must end in 0; got 0.25"),
        (lambda: two_step_target(BELL, X, *FOUR[[1, 0, 2]]), "s must be smaller than t"),
    ],
)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_times_of_the_wrong_kind_are_refused():
    with pytest.raises(TypeError, match="times must be a torch.Tensor; got list"):
        progressive_loss(BELL, [1.0, 0.5, 0.0])
    with pytest.raises(TypeError, match="times must be an integer tensor on a discrete schedule"):
        consistency_loss(mixture(ddpm()), FOUR)
    with pytest.raises(TypeError, match="n_steps must be an integer; got 2.0"):
        next(fit_student(BELL, X, Recipe(1), FOUR, 2.0))
    assert math.isfinite(progressive_loss(BELL, FOUR)(BELL, X, FOUR[[0, 2, 0]], EPS).sum())
