"""What every piece must do, found by name: ``*_beta``, subclasses of Process, ``*_step`` and ``make_*_step``.

A new schedule, process or sampler is tested here the moment it exists.
"""

import ast
import inspect
import weakref
from pathlib import Path

import pytest
import torch
from affine import sampler_law
from exact import F64, close, randn, times
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffusion_edu import process as processes
from diffusion_edu import samplers, schedules
from diffusion_edu.denoiser import Denoiser
from diffusion_edu.guidance import (
    bind,
    classifier,
    classifier_free,
    dynamic_threshold,
    reschedule,
    static_threshold,
    trace,
)
from diffusion_edu.losses import denoising_loss
from diffusion_edu.oracles import GaussianMixtureOracle, GaussianOracle
from diffusion_edu.process import (
    VPSDE,
    DiscreteVP,
    Process,
    forward_step,
    posterior,
    q_sample,
    terminal_kl,
    uniform_log_snr,
)
from diffusion_edu.samplers import noises, noises_per_sample, sample
from diffusion_edu.schedules import linear_beta

quick = settings(max_examples=30, deadline=None, derandomize=True, database=None)

SCHEDULES = {n: f for n, f in inspect.getmembers(schedules) if n.endswith("_beta") and n != "check_beta"}
STEPS = {n: getattr(samplers, n) for n in dir(samplers) if n.endswith("_step") and not n.startswith("make_")}
MAKERS = {n: getattr(samplers, n) for n in dir(samplers) if n.startswith("make_") and n.endswith("_step")}
CORRECTORS = {"make_langevin_step", "make_corrector_step"}  # leave x at its level: no step from t to s


def concrete(cls):
    """All classes below ``cls`` that can be built."""
    below = {c for sub in cls.__subclasses__() for c in {sub, *concrete(sub)}}
    return {c for c in below if not inspect.isabstract(c) and c.__module__.startswith(processes.__name__)}


def build(cls):
    """A process of this class with its default arguments, or of a short table."""
    table = DiscreteVP(linear_beta(20, 0.02, 0.6))
    if cls is DiscreteVP:
        return table
    return table.continuous() if cls is processes.TableVP else cls()


PROCESSES = sorted((c for c in concrete(Process) if not c.__name__.startswith("_")), key=lambda c: c.__name__)
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
every_process = pytest.mark.parametrize("cls", PROCESSES, ids=lambda c: c.__name__)
every_step = pytest.mark.parametrize("step", [*STEPS, *MAKERS])


def make(name):
    """A fresh step of this name."""
    return MAKERS[name]() if name in MAKERS else STEPS[name]


def gaussian(process=None, **kwargs):
    return GaussianOracle(process or DiscreteVP(linear_beta(20, 0.02, 0.6)), 0.4, 0.25, **kwargs)


def inner_times(process):
    return [torch.tensor(f * process.T, dtype=F64).to(process.time_dtype) for f in (0.1, 0.5, 0.95)]


def run(name, x, model=None, n=5, seed=0):
    model = gaussian() if model is None else model
    *_, x0 = sample(make(name), model, x, model.process.grid(n), noises(seed))
    return x0


def test_the_pieces_are_found():
    assert {"linear_beta", "cosine_beta", "quadratic_beta", "sigmoid_beta", "swiss_beta"} <= set(SCHEDULES)
    assert {"DiscreteVP", "VPSDE", "SubVPSDE", "VESDE", "VE", "TableVP"} <= {c.__name__ for c in PROCESSES}
    assert {"ddim_step", "heun_step", "euler_maruyama_step", "kernel_step"} <= set(STEPS)
    assert {"make_ddpm_step", "make_ddim_step", "make_dpmpp_2m_step", "make_langevin_step"} <= set(MAKERS)
    assert {"reverse_diffusion_step", "rk4_step"} <= set(STEPS) and set(MAKERS) >= CORRECTORS


# Schedules


@every_schedule
@pytest.mark.filterwarnings("ignore:alpha_bar")
def test_schedules_are_tables_of_t_plus_one_numbers(schedule):
    for T in (1, 2, 10, 1000):
        beta = schedule(T)
        assert beta.dtype == F64 and beta.shape == (T + 1,) and beta[0] == 0
        assert ((beta[1:] > 0) & (beta[1:] < 1)).all() and (beta.diff() >= -1e-15).all()
        process = DiscreteVP(beta)
        assert (process.alpha_bar.diff() < 0).all() and process.alpha_bar[0] == 1
    assert process.alpha_bar[-1] < 1e-2


@given(
    beta=st.lists(st.floats(1e-8, 0.999), min_size=1, max_size=30),
    x0=st.floats(-3, 3),
    pick=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
@quick
def test_any_table_obeys_the_tower(beta, x0, pick):
    process = DiscreteVP(torch.tensor([0.0, *beta], dtype=F64))
    t = 1 + round(pick[0] * (process.T - 1))
    s = round(pick[1] * (t - 1))
    one = lambda v: torch.full((1, 1), v, dtype=F64)
    of_x0, sigma = posterior(process, one(1.0), one(0.0), times(t), times(s))
    of_x_t, _ = posterior(process, one(0.0), one(1.0), times(t), times(s))
    (a_s, b_s), (a_t, b_t) = process.marginal(times(s)), process.marginal(times(t))
    close(of_x_t**2 * b_t**2 + sigma**2, one(b_s.item() ** 2), 1e-12)
    close((of_x0 + of_x_t * a_t) * x0, one(a_s.item() * x0), 1e-12)


@given(T=st.integers(1, 400), fraction=st.floats(0, 1))
@quick
def test_any_number_of_steps_gives_a_grid_without_repetitions(T, fraction):
    process = DiscreteVP(torch.cat([torch.zeros(1), torch.full((T,), 0.02)]).double())
    n = 1 + round(fraction * (T - 1))
    for spacing in (processes.uniform, processes.quadratic, uniform_log_snr(1)):
        grid = process.grid(n, spacing)
        assert grid.dtype == torch.int64 and len(grid) == n + 1
        assert grid[0] == T and grid[-1] == 0 and (grid.diff() < 0).all()


# Processes


@every_process
def test_processes_start_clean_and_lose_signal(cls):
    process = build(cls)
    t = process.grid(20).flip(0)
    scale, std = process.marginal(t)
    assert scale[0] == 1 and std[0] == 0 and scale.dtype == std.dtype == F64 and scale.shape == std.shape == t.shape
    log_snr = process.log_snr(t)
    assert log_snr[0] == torch.inf and (log_snr.diff() < 0).all() and (std[1:] > 0).all()
    alone = process.marginal(t[3])
    assert alone[0].shape == () and alone[0] == scale[3] and alone[1] == std[3]
    mean = process.marginal(t[:0])
    assert mean[0].shape == mean[1].shape == (0,)


@every_process
def test_time_of_is_the_inverse_of_log_snr(cls):
    process = build(cls)
    t = process.grid(20)[:-1]
    close(process.time_of(process.log_snr(t)), t.double(), 1e-9)
    log_snr = torch.linspace(*process.log_snr(torch.stack(inner_times(process)))[[2, 0]].tolist(), 9, dtype=F64)
    between = process.continuous()
    close(between.log_snr(between.time_of(log_snr)), log_snr, 1e-9)
    close(between.time_of(log_snr[0]), between.time_of(log_snr)[0], 0)


@every_process
@pytest.mark.parametrize("shape", [(4, 1), (4, 2), (4, 1, 8, 8), (0, 3)])
def test_processes_take_any_trailing_shape(cls, shape):
    process = build(cls)
    x0, eps = randn(*shape), randn(*shape, seed=1)
    t = process.sample_t(len(x0), torch.Generator().manual_seed(0)).clamp(max=process.T)
    x_t = q_sample(process, x0, t, eps)
    assert x_t.shape == shape and terminal_kl(process, x0).shape == shape[:1]
    mean, sigma = posterior(process, x0, x_t, t, t * 0)
    assert torch.equal(mean, x0) and (sigma == 0).all()
    for i in range(len(x0)):
        close(q_sample(process, x0[i : i + 1], t[i], eps[i : i + 1])[0], x_t[i], 0)


@every_process
def test_training_times_come_from_the_generator(cls):
    process = build(cls)
    draw = lambda seed: process.sample_t(500, torch.Generator().manual_seed(seed))
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))
    assert draw(0).shape == (500,) and draw(0).dtype == process.time_dtype and (draw(0) > 0).all()
    if cls is not processes.VE:  # whose training levels are log-normal
        assert draw(0).max() <= process.T


@every_process
def test_tables_survive_casts(cls):
    process = build(cls)
    before = [torch.stack(process.marginal(t)) for t in inner_times(process)]
    for cast in (process.half(), process.bfloat16(), process.float(), process.to(torch.float16)):
        assert all(
            torch.equal(torch.stack(cast.marginal(t)), b) for t, b in zip(inner_times(process), before, strict=True)
        )


# Models


class Net(nn.Module):
    """A small conditional net with dropout: eval mode matters."""

    def __init__(self, dtype=F64):
        super().__init__()
        self.layer, self.dropout = nn.Linear(2, 2, dtype=dtype), nn.Dropout(0.5)
        generator = torch.Generator().manual_seed(0)
        self.layer.weight.data = 0.3 * torch.randn(2, 2, generator=generator, dtype=dtype)
        self.layer.bias.data.fill_(0.1)

    def forward(self, x, clock, y=None, drop=None):
        shift = 0 if y is None else (0.1 * y.to(x) if drop is None else torch.where(drop, 0.0, 0.1 * y.to(x)))[:, None]
        return self.dropout(self.layer(x)) + shift + 1e-4 * clock[:, None].to(x)


Y = torch.tensor([0, 1, 1, 0])
MODELS = {
    "plain": lambda m: bind(m, y=Y),
    "classifier_free": lambda m: classifier_free(m, 2.0, y=Y),
    "classifier": lambda m: classifier(bind(m, y=Y), lambda x, t: -(x**2).sum(1), 2.0),
    "static": lambda m: static_threshold(bind(m, y=Y)),
    "dynamic": lambda m: dynamic_threshold(bind(m, y=Y)),
    "reschedule": lambda m: reschedule(bind(m, y=Y), VPSDE()),
    "trace": lambda m: trace(bind(m, y=Y)),
}
every_model = pytest.mark.parametrize("wrap", MODELS.values(), ids=MODELS)


def some_net(dtype=F64):
    return Denoiser(Net(dtype), DiscreteVP(linear_beta(20, 0.02, 0.6)), predicts="v")


@every_model
def test_models_keep_shape_and_dtype_and_leave_their_inputs_alone(wrap):
    for dtype in (torch.float32, F64):
        model, x = wrap(some_net(dtype).eval()), randn(4, 2, dtype=dtype)
        t = inner_times(model.process)[1]
        before = x.clone(), t.clone(), Y.clone()
        pred = model(x, t)
        assert pred.x0.shape == pred.eps.shape == (4, 2) and pred.x0.dtype == pred.eps.dtype == dtype
        assert all(torch.equal(a, b) for a, b in zip((x, t, Y), before, strict=True))
        close(pred.scale * pred.x0 + pred.std * pred.eps, x, 1e-5 if dtype == torch.float32 else 1e-12)
        each = model(x, t.expand(4))
        close(each.x0, pred.x0, 1e-6 if dtype == torch.float32 else 1e-13)


@every_model
def test_models_read_any_memory_layout(wrap):
    model, x = wrap(some_net().eval()), randn(2, 4)
    t = inner_times(model.process)[1]
    assert torch.equal(model(x.T, t).x0, model(x.T.contiguous(), t).x0)


@every_model
def test_a_sampled_model_is_in_eval_mode_and_gets_its_own_mode_back(wrap):
    core = some_net()
    core.net.layer.eval()  # a part that was in eval mode stays there
    model = wrap(core.train())
    core.net.layer.eval()
    modes = lambda: [m.training for m in model.modules()]
    before, x = modes(), randn(4, 2)
    path = []
    for x_s in sample(samplers.ddim_step, model, x, model.process.grid(4), noises(0)):
        assert modes() == before  # restored before each yield
        path.append(x_s)
    again = list(sample(samplers.ddim_step, model.eval(), x, model.process.grid(4), noises(0)))
    assert torch.equal(path[-1], again[-1]) and not path[-1].requires_grad  # no dropout was on
    model.train()

    def broken(model, x, t, s, noise):
        assert not any(m.training for m in model.modules())
        raise RuntimeError("in the middle")

    before = modes()
    with pytest.raises(RuntimeError, match="in the middle"):
        list(sample(broken, model, x, model.process.grid(4)))
    assert modes() == before
    walk = sample(samplers.ddim_step, model, x, model.process.grid(4))
    next(walk)
    walk.close()
    assert modes() == before


@pytest.mark.parametrize("wrap", [w for n, w in MODELS.items() if n != "dynamic"])
def test_models_take_an_empty_batch(wrap):
    model = wrap(some_net().eval()).model  # the conditions bound above have four rows
    assert model(randn(0, 2), inner_times(model.process)[1], y=Y[:0]).x0.shape == (0, 2)


def test_thresholds_take_an_empty_batch():
    for threshold in (static_threshold, dynamic_threshold):
        assert threshold(gaussian())(randn(0, 1, 8, 8), times(3)).x0.shape == (0, 1, 8, 8)


# Samplers


@every_step
@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 2), (4, 1, 8, 8), (0, 2), (0, 1, 8, 8)])
def test_steps_take_any_trailing_shape(step, shape):
    x = randn(*shape)
    x0 = run(step, x)
    assert x0.shape == shape and x0.isfinite().all() and x0.dtype == F64
    if len(x):
        assert (x0 - x).abs().max() > 0.01  # it went somewhere


@every_step
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_steps_keep_the_dtype(step, dtype):
    x = randn(4, 3, dtype=dtype)
    x0 = run(step, x)
    assert x0.dtype == dtype and x0.isfinite().all()
    if dtype == torch.float32 and step not in {"make_langevin_step"}:
        replayed = iter([randn(4, 3, seed=k, dtype=dtype) for k in range(1, 40)])
        exact = iter([randn(4, 3, seed=k, dtype=dtype).double() for k in range(1, 40)])
        *_, mine = sample(make(step), gaussian(), x, gaussian().process.grid(5), lambda x: next(replayed))
        *_, right = sample(make(step), gaussian(), x.double(), gaussian().process.grid(5), lambda x: next(exact))
        close(mine, right, 1e-5)  # float32, five steps


@every_step
def test_steps_read_any_memory_layout_and_leave_it_alone(step):
    wide = randn(8, 3, 2)
    for x in (wide[::2], wide[:4].transpose(1, 2), wide[:1].expand(4, 3, 2)):
        before = x.clone()
        assert torch.equal(run(step, x), run(step, x.contiguous()))
        assert torch.equal(x, before)
    grid = gaussian().process.grid(5)
    kept = grid.clone()
    list(sample(make(step), gaussian(), wide, grid, noises(0)))
    assert torch.equal(grid, kept)


@every_step
def test_samples_carry_no_graph_and_do_not_depend_on_the_grad_mode(step):
    x = randn(4, 2).requires_grad_()
    plain = run(step, x)
    assert not plain.requires_grad and x.grad is None and x.requires_grad
    for context in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with context():
            assert torch.equal(run(step, x), plain)
    walk = sample(make(step), gaussian(), x, gaussian().process.grid(2), noises(0))
    next(walk)
    assert torch.is_grad_enabled()  # sampling does not leak its own mode into the loop's body


@every_step
def test_steps_forget_one_run_before_the_next(step):
    one = make(step)
    model, grid = gaussian(VPSDE()), VPSDE().grid(6)
    go = lambda x, g: list(sample(one, model, x, g, noises(0)))[-1]
    first, x = go(randn(3, 2), grid), randn(3, 2)
    go(randn(5, 2, seed=1), grid)  # another run, another batch
    for i, _ in enumerate(sample(one, model, x, grid, noises(0))):  # a run cut short
        if i == 3:
            break
    assert torch.equal(go(x, grid), first)
    half = list(sample(one, model, x, grid[:4], noises(0)))[-1]  # its own output, handed in again
    fresh = list(sample(make(step), model, half.clone(), grid[3:], noises(1)))[-1]
    assert torch.equal(list(sample(one, model, half, grid[3:], noises(1)))[-1], fresh)


@pytest.mark.parametrize("step", sorted({*STEPS, *MAKERS} - {"make_corrector_step"}))  # its step is the batch's mean
def test_a_row_does_not_depend_on_the_batch_around_it(step):
    x, model = randn(4, 3), gaussian()
    go = lambda rows: list(
        sample(make(step), model, x[rows], model.process.grid(6), noises_per_sample(0, torch.arange(4)[rows]))
    )[-1]
    whole = go(slice(4))
    for rows in (slice(2, 3), slice(1, 4), [3, 0]):
        close(go(rows), whole[rows], 1e-13)


@every_step
def test_steps_are_repeatable_and_follow_their_start(step):
    x = randn(4, 2)
    assert torch.equal(run(step, x), run(step, x))
    assert not torch.equal(run(step, x), run(step, -x))


@pytest.mark.parametrize("step", sorted({*STEPS, *MAKERS} - CORRECTORS))
@every_process
def test_every_sampler_finds_the_gaussian_on_every_process(step, cls):
    table = DiscreteVP(linear_beta(400, 2e-4, 0.05))
    process = {DiscreteVP: table, processes.TableVP: table.continuous()}.get(cls) or cls()
    if cls is processes.VE:
        process = cls(T=10.0)
    grid = process.grid(400, uniform_log_snr(process.T * (1 / 400 if cls in (DiscreteVP, processes.TableVP) else 1e-3)))
    start = process.marginal(grid[0])[1].item()
    mean, var = sampler_law(make(step), GaussianOracle(process, 0.4, 0.25), grid, start)
    assert abs(mean - 0.4) < 0.02 and abs(var - 0.25) < 0.02  # 400 steps: first order leaves about 1 %


@every_step
def test_no_sample_outlives_the_next_two_steps(step):
    model, seen = gaussian(DiscreteVP(linear_beta(100, 1e-3, 0.2))), []
    for x in sample(make(step), model, randn(4, 2), model.process.grid(100), noises(0)):
        seen.append(weakref.ref(x))
        assert sum(r() is not None for r in seen) <= 2  # x, and what a step with memory keeps
    assert len(seen) == 100


# Losses


@pytest.mark.parametrize("shape", [(4, 1), (4, 2), (4, 1, 8, 8)])
def test_losses_are_one_number_per_example(shape):
    model, x0, eps = gaussian(), randn(*shape), randn(*shape, seed=1)
    t = torch.tensor([1, 5, 19, 20])
    kept = x0.clone(), eps.clone(), t.clone()
    loss = denoising_loss(model, x0, t, eps)
    assert loss.shape == (4,) and (loss > 0).all()
    assert all(torch.equal(a, b) for a, b in zip((x0, eps, t), kept, strict=True))
    for i in range(4):
        close(denoising_loss(model, x0[i : i + 1], t[i : i + 1], eps[i : i + 1])[0], loss[i], 1e-13)
    strided = torch.stack([x0, x0], dim=-1)[..., 0]
    assert not strided.is_contiguous() and torch.equal(denoising_loss(model, strided, t, eps), loss)
    exact = denoising_loss(model, x0.float(), t, eps.float())
    assert exact.dtype == torch.float32


@given(shape=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 100))
@quick
def test_single_steps_and_one_jump_have_the_same_law_for_any_shape(shape, seed):
    process = DiscreteVP(linear_beta(20, 0.02, 0.6))
    x0, zero = randn(*shape, seed=seed), torch.zeros(*shape, dtype=F64)
    x = x0
    for t in range(1, 8):
        x = forward_step(process, x, times(t), zero)
    close(x, q_sample(process, x0, times(7), zero), 1e-13)


def test_mixture_oracle_takes_any_number_of_points_and_layouts():
    oracle = GaussianMixtureOracle(VPSDE(), [[-1.0, 0.0], [1.0, 0.5]], [0.3, 0.2])
    t = torch.tensor(0.4, dtype=F64)
    assert oracle(randn(0, 2), t).x0.shape == (0, 2) and oracle.log_prob(randn(0, 2), t).shape == (0,)
    x = randn(2, 5)
    assert torch.equal(oracle(x.T, t).eps, oracle(x.T.contiguous(), t).eps)
    close(oracle(x.T, t.expand(5)).x0, oracle(x.T, t).x0, 1e-15)


def test_every_step_that_is_written_is_exported_and_so_tested():
    written = set()
    for path in Path(samplers.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            named = [*getattr(node, "targets", []), node]
            names = {getattr(n, "id", None) or getattr(n, "name", None) or "" for n in named}
            written |= {n for n in names if n.endswith("_step") and not n.startswith("_")}
    assert written and written <= set(samplers.__all__)
