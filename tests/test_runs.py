"""Runs: a batch is a function of the step, and a run that is killed, resumed or spread out ends where it would have."""

import json
import math
import os
import random
import signal
import time
from dataclasses import replace
from functools import partial

import children
import pytest
import torch
import torch.distributed as dist
from children import forks
from exact import randn
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import dropout

from diffusion_edu.checkpoint import Snapshots
from diffusion_edu.denoiser import Denoiser
from diffusion_edu.machine import Interrupt, choose_device, locked, processes
from diffusion_edu.nets.dit import DiT
from diffusion_edu.nets.mlp import MLP
from diffusion_edu.nets.unet import UNet
from diffusion_edu.process import VPSDE
from diffusion_edu.runs import Run, follow
from diffusion_edu.trainer import Batches, Trainer
from diffusion_edu.training import Recipe, batch_loss, draw_batch, learning_rate

CPU = Run(device="cpu")
X0, Y = randn(50, 2, dtype=torch.float32), torch.arange(50) % 3


@pytest.fixture(autouse=True)
def one_precision():
    """A trainer sets the precision of the whole process."""
    matmul, conv = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = conv


@pytest.fixture(autouse=True, scope="module")
def no_waiting_for_the_disk():
    """What a killed process has written stays written; only a power cut needs the flush."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


class Dropping(MLP):
    """A network that draws from the global generator at every step, so that its state matters."""

    def forward(self, x, clock, y=None, drop=None):
        return super().forward(dropout(x, 0.1, self.training), clock, y, drop)


def make_trainer(n_steps=24, run=CPU, ema=0.5, dtype=torch.float32, net=Dropping, **recipe):
    torch.manual_seed(0)
    model = Denoiser(net(width=8, depth=1, n_classes=3).to(dtype), VPSDE())
    return Trainer(model, Recipe(n_steps, 32, lr=0.01, p_drop=0.2, **recipe), run, X0.to(dtype), {"y": Y}, ema)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


# Batches


def spread(x0, generator):
    return x0 + torch.rand(x0.shape, generator=generator)


def batches(n=20, batch_size=8, parts=1, seed=0):
    recipe = Recipe(1, batch_size, p_drop=0.5, seed=seed, augment=spread)
    return Batches(VPSDE(), recipe, torch.arange(2.0 * n).reshape(n, 2), {"y": torch.arange(n)}, parts)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_batch_is_a_function_of_the_step_alone():
    once = batches()
    inorder = [once.part(step, 0) for step in range(12)]
    for step in (11, 0, 5, 4):  # backwards, forwards, across the ends of epochs
        assert same(once.part(step, 0), inorder[step]) and same(batches().part(step, 0), inorder[step])
    assert not same(inorder[0], inorder[5]) and not same(inorder[0], batches(seed=1).part(0, 0))
    numbers = torch.cat([torch.cat([b["eps"].flatten(), b["t"]]) for b in inorder])
    assert len(numbers.unique()) == len(numbers)  # nothing is drawn twice
    assert inorder[0].keys() == {"t", "eps", "y", "drop", "x0"}


@pytest.mark.parametrize("n, batch_size", [(20, 8), (21, 8), (16, 8), (9, 8), (8, 8), (30, 7)])
def test_every_epoch_sees_each_example_once(n, batch_size):
    feed = batches(n, batch_size)
    seen = torch.cat([feed.part(step, 0)["y"] for step in range(math.ceil(3 * n / batch_size))])
    orders = [seen[e * n : (e + 1) * n] for e in range(3)]
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(n))
    assert len({tuple(order.tolist()) for order in orders}) == 3
    batch = feed.part(1, 0)
    assert torch.equal((batch["x0"] // 2).long()[:, 0], batch["y"])  # a label stays with its example, spread by < 1


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_are_the_whole_batch(parts):
    whole, split = batches(100, 64), batches(100, 64, parts)
    for step in (0, 1, 3):
        rows = [split.part(step, k) for k in range(parts)]
        assert same(whole.part(step, 0), {name: torch.cat([row[name] for row in rows]) for name in rows[0]})


def test_draws_of_a_part_are_those_of_its_blocks():
    feed = batches(100, 32)
    i = feed.examples(2)[8:16]
    x0, y = feed.x0[i], {"y": feed.cond["y"][i]}
    alone = draw_batch(feed.process, feed.recipe, feed.generator("block", 2, 8), x0, **y)
    assert same(alone, {name: value[8:16] for name, value in feed.part(2, 0).items()})


@pytest.mark.parametrize(
    "n, batch_size, parts, message",
    [
        (0, 8, 1, "x0 must hold at least one example"),
        (7, 8, 1, "recipe.batch_size must be at most 7, the number of examples; got 8"),
        (100, 24, 2, "recipe.batch_size must split into 2 parts .* as a multiple of 16 does; got 24"),
        (100, 12, 2, "as a multiple of 16 does; got 12"),
        (100, 8, 3, "must split into 3 parts"),
        (100, 8, 16, "must split into 16 parts"),
    ],
)
def test_batches_that_cannot_be_are_refused(n, batch_size, parts, message):
    with pytest.raises(ValueError, match=message):
        batches(n, batch_size, parts)


# The step


def test_a_step_is_adam_on_the_mean_loss_of_the_batch():
    trainer, by_hand = (make_trainer(100, net=MLP) for _ in range(2))
    model, recipe = by_hand.model, by_hand.recipe
    optimizer = torch.optim.Adam(model.parameters())
    for step in range(5):
        loss, norm = trainer.advance()
        mean = batch_loss(model, recipe, by_hand.batches.part(step, 0)).mean()
        optimizer.zero_grad()
        mean.backward()
        optimizer.param_groups[0]["lr"] = 0.01 * learning_rate(step, recipe)
        optimizer.step()
        assert loss.item() == pytest.approx(mean.item(), rel=1e-6)
        assert norm.item() == pytest.approx(math.hypot(*(p.grad.norm() for p in model.parameters())), rel=1e-5)
        assert trainer.optimizer.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    torch.testing.assert_close(weights(trainer), weights(by_hand), rtol=0, atol=1e-6)  # float32, five steps
    assert trainer.step == 5 and trainer.model.training


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_gives_the_same_numbers(parts):
    run = replace(CPU, accumulate=parts)
    whole, split = (make_trainer(net=MLP, dtype=torch.float64, run=run) for run in (CPU, run))
    for _ in range(4):
        (a, b), (c, d) = whole.advance(), split.advance()
        torch.testing.assert_close(torch.stack([c, d]), torch.stack([a, b]), rtol=1e-12, atol=0)
    torch.testing.assert_close(weights(split), weights(whole), rtol=0, atol=1e-10)  # Adam divides by small gradients


def test_the_gradient_is_clipped_and_told_unclipped():
    free, clipped = make_trainer(net=MLP), make_trainer(net=MLP, run=replace(CPU, clip=0.01))
    norms = [trainer.advance()[1].item() for trainer in (free, clipped)]
    left = [math.hypot(*(p.grad.norm() for p in trainer.model.parameters())) for trainer in (free, clipped)]
    assert norms[0] == norms[1] == pytest.approx(left[0], rel=1e-5) and norms[0] > 0.1
    assert left[1] == pytest.approx(0.01, rel=1e-3)  # torch divides by the norm + 1e-6


def test_the_average_is_of_the_weights_and_is_the_best():
    trainer, kept = make_trainer(net=MLP, ema=0.5), []
    for _ in range(3):
        trainer.advance()
        kept.append(weights(trainer))
    found = torch.cat([p.flatten() for p in trainer.best.parameters()])
    torch.testing.assert_close(found, kept[0] / 4 + kept[1] / 4 + kept[2] / 2)
    raw = make_trainer(ema=0.0)
    assert raw.best is raw.model


def test_bf16_computes_in_bf16_and_keeps_float32_weights():
    plain, half = make_trainer(net=MLP), make_trainer(net=MLP, run=replace(CPU, precision="bf16"))
    losses = torch.tensor([[trainer.advance()[0] for _ in range(10)] for trainer in (plain, half)])
    assert (losses[0] != losses[1]).any()
    torch.testing.assert_close(losses[1], losses[0], rtol=0.05, atol=0)  # bfloat16 has 8 bits: 0.4 % each
    assert half.model.net.first.weight.dtype == torch.float32


def test_tf32_is_asked_for_where_it_is_wanted_only():
    for precision, matmul in (("tf32", "high"), ("bf16", "high"), ("fp32", "highest")):
        make_trainer(run=replace(CPU, precision=precision))
        assert torch.get_float32_matmul_precision() == matmul
        assert torch.backends.cudnn.allow_tf32 is (precision != "fp32")


def test_compile_is_of_the_network_in_place(monkeypatch):
    called = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: called.append(type(self)))
    assert list(make_trainer(run=replace(CPU, compile=True)).state()["model"]) == list(make_trainer().state()["model"])
    assert called == [Dropping]


def image_trainer(run, n_steps=6):
    torch.manual_seed(0)
    x0 = randn(8, 1, 8, 8, dtype=torch.float32).clamp(-1, 1)
    return Trainer(Denoiser(UNet(width=8), VPSDE()), Recipe(n_steps, 4), run, x0, {}, 0.5)


def test_channels_last_changes_the_layout_not_the_numbers_and_is_restored(tmp_path):
    last = replace(CPU, channels_last=True)
    plain, trainer, again = image_trainer(CPU), image_trainer(last), image_trainer(last)
    assert trainer.model.net.body.inside.shrink.weight.is_contiguous(memory_format=torch.channels_last)
    losses = [(plain.advance()[0].item(), trainer.advance()[0].item()) for _ in range(3)]
    for a, b in losses:
        assert b == pytest.approx(a, rel=1e-3)  # kernels of another layout sum in another order
    Snapshots(tmp_path, 1, {}).save(3, trainer.state())
    step, files, _ = Snapshots(tmp_path, 1, {}).newest()
    again.restore(step, files)
    for _ in range(2):
        assert again.advance()[0].item() == trainer.advance()[0].item()
    assert torch.equal(weights(again), weights(trainer))


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_stored(tmp_path):
    for poison in ("loss", "gradient"):
        trainer, advance = make_trainer(run=replace(CPU, save_every=2, log_every=100)), Trainer.advance

        def broken(poison=poison, trainer=trainer, advance=advance):
            loss, norm = advance(trainer)
            if trainer.step == 3:  # passed by the next step, whose loss may look well
                trainer.watched += math.nan if poison == "loss" else math.inf
            return loss, norm

        trainer.advance = broken
        with pytest.raises(FloatingPointError, match="not finite at step 4, or since"):
            follow(trainer, tmp_path / poison, {})
        assert [path.name for path in Snapshots(tmp_path / poison / "run", 2, {}).steps()] == ["step_00000002"]
    trainer = make_trainer()
    trainer.model.net.first.bias.data[1] = math.nan
    trainer.advance()
    with pytest.raises(FloatingPointError, match="at step 1.*; parameter net.condition.time.weight is not finite"):
        trainer.check()


# Stopped and resumed


def go(out, resume=False, told=None, seed=1, **options):
    """A run of 24 steps with a checkpoint every 4, in this process; ``told`` is called after each step."""
    trainer = make_trainer(run=replace(CPU, save_every=4, log_every=2, keep=1, **options))
    torch.manual_seed(seed)  # a resumed run must not depend on it
    if told:
        advance = trainer.advance
        trainer.advance = lambda: (advance(), told())[0]
    follow(trainer, out, {"lr": 0.01}, resume=resume)


def manifest(out, step=24):
    return (out / "run" / f"step_{step:08d}" / "manifest.jsonl").read_bytes()


def log(out):
    """The log without what the clock says."""
    lines = map(json.loads, (out / "run" / "log.jsonl").read_text().splitlines())
    return [{key: line[key] for key in ("step", "loss", "grad_norm", "lr")} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole")
    go(out)
    return out


def assert_ended_as(whole, out):
    """The same weights, average, moments and generator to the bit: each file's SHA-256 is in the manifest."""
    assert manifest(out) == manifest(whole)
    assert [line["step"] for line in log(out)] == list(range(2, 25, 2))
    assert log(out)[-1] == log(whole)[-1]
    assert sorted(path.name for path in (out / "run").iterdir()) == [".lock", "log.jsonl", "step_00000024"]


def test_a_checkpoint_holds_all_that_changes(whole):
    said = json.loads(manifest(whole).splitlines()[0])
    assert sorted(said["sha256"]) == [f"{name}.safetensors" for name in ("average", "model", "optimizer", "random")]
    assert said["step"] == 24 and said["run"] == {"lr": 0.01} and said["device"] == "cpu"
    _, files, _ = Snapshots(whole / "run", 1, {"lr": 0.01}).newest()
    names = [name for name, _ in make_trainer().model.named_parameters()]
    assert sorted(files["model"]) == sorted(files["average"]) == sorted(names)
    moments = ("exp_avg", "exp_avg_sq", "step")
    assert sorted(files["optimizer"]) == sorted(f"{name}/{key}" for name in names for key in moments)
    assert files["random"]["n_averaged"] == 24 and len(files["random"]["torch"]) == len(torch.get_rng_state())


@forks
def test_another_seed_of_the_global_generator_is_another_run(whole, tmp_path):
    go(tmp_path, seed=2)
    assert manifest(tmp_path) != manifest(whole)  # so its state is worth keeping


def stepping(out, pipe, **options):
    """A run that says each step into a pipe."""
    fresh = not Snapshots(out / "run", 1, {}).steps()
    go(out, resume=True, told=lambda: os.write(pipe, b"."), seed=1 if fresh else os.getpid(), **options)


@forks
def test_killed_at_ten_random_moments_it_ends_bit_identical(whole, tmp_path):
    moments, ends = random.Random(7), []
    for _ in range(10):
        reader, writer = os.pipe()
        pid = children.start(stepping, tmp_path, writer)
        os.close(writer)
        for _ in range(moments.randint(1, 7)):
            os.read(reader, 1)
        time.sleep(moments.random() * 0.01)  # a step and its checkpoint take some milliseconds
        os.kill(pid, signal.SIGKILL)
        ends.append(children.end(pid))
        os.close(reader)
        assert len(Snapshots(tmp_path / "run", 1, {}).steps()) <= 2
    assert ends.count(-signal.SIGKILL) >= 4, ends  # the last of the ten may come after its end
    assert children.run(partial(go, tmp_path, resume=True)) == 0
    assert_ended_as(whole, tmp_path)


def deadly(name, countdown):
    """Make a function of os kill the process as it is called for the n-th time."""
    original = getattr(os, name)

    def call(*args, **options):
        countdown[0] -= 1
        if not countdown[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **options)

    setattr(os, name, call)


def killed_at(n, out):
    countdown = [n]
    for name in ("fsync", "replace", "unlink", "rmdir"):
        deadly(name, countdown)
    go(out, told=lambda: None)


@forks
def test_killed_at_any_call_of_a_write_it_resumes_bit_identical(whole, tmp_path):
    """Every flush, move and removal of the log's start and the first two checkpoints, the second of which rotates."""
    for n in range(1, 30):
        out = tmp_path / str(n)
        assert children.run(killed_at, n, out) == -signal.SIGKILL
        folder = Snapshots(out / "run", 1, {"lr": 0.01})
        assert folder.newest() is not None or n <= 11, n  # 3 calls for the log, 8 for the first checkpoint
        if n % 3 == 0 or n > 24:
            assert children.run(partial(go, out, resume=True)) == 0
            assert_ended_as(whole, out)


def cut_short(out, limit):
    """A run that the system kills in the middle of a write of more than ``limit`` bytes."""
    import resource

    steps = []

    def told():
        steps.append(0)
        if len(steps) == 6:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    go(out, told=told)


@forks
@pytest.mark.parametrize("limit", [1000, 5000])
def test_killed_in_the_middle_of_a_file_it_resumes_bit_identical(whole, tmp_path, limit):
    assert children.run(cut_short, tmp_path, limit) == -signal.SIGXFSZ
    parts = [path for path in (tmp_path / "run").glob(".*.tmp/*") if path.stat().st_size == limit]
    assert len(parts) == 1  # half written, under another name
    assert children.run(partial(go, tmp_path, resume=True)) == 0
    assert_ended_as(whole, tmp_path)


def test_a_line_of_the_log_that_a_crash_cut_off_is_no_hindrance(whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, told=lambda: signal.raise_signal(signal.SIGINT))
    with open(tmp_path / "run" / "log.jsonl", "a") as file:
        file.write('{"step": 2, "loss": 0.9}\n{"step": 4, "lo')
    go(tmp_path, resume=True)
    assert_ended_as(whole, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_and_the_checkpoint(whole, tmp_path, number, capsys):
    steps = []

    def told():
        steps.append(len(steps) + 1)
        if steps[-1] == 7:
            signal.raise_signal(number), signal.raise_signal(number)  # a launcher passes on what came already

    with pytest.raises(KeyboardInterrupt, match=f"interrupted at step 7; go on with --resume -o {tmp_path}"):
        go(tmp_path, told=told)
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)
    assert [path.name for path in Snapshots(tmp_path / "run", 1, {}).steps()] == ["step_00000007"]
    go(tmp_path, resume=True, seed=5)
    assert "resumed after step 7\n" in capsys.readouterr().err
    assert_ended_as(whole, tmp_path)


def test_a_second_signal_ends_at_once(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(Interrupt, "same", -1.0)
    steps = []

    def told():
        steps.append(0)
        if len(steps) == 6:
            signal.raise_signal(signal.SIGTERM), signal.raise_signal(signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, told=told)
    assert [path.name for path in Snapshots(tmp_path / "run", 1, {}).steps()] == ["step_00000004"]  # no seventh
    go(tmp_path, resume=True)
    assert_ended_as(whole, tmp_path)


def test_interrupted_before_the_first_step_it_resumes(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="at step 0"):
        patch.setattr(Interrupt, "agreed", lambda self: True)
        go(tmp_path)
    go(tmp_path, resume=True)
    assert_ended_as(whole, tmp_path)


def test_a_finished_run_resumes_to_its_end(whole, tmp_path, capsys):
    go(tmp_path)
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    go(tmp_path, resume=True)
    assert "resumed after step 24" in capsys.readouterr().err
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before
    assert_ended_as(whole, tmp_path)


def test_the_log_adds_up_the_time_of_all_its_parts(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, told=lambda: (time.sleep(0.1), signal.raise_signal(signal.SIGINT)))
    (tmp_path / "run" / "log.jsonl").write_text('{"step": 1, "loss": 1, "grad_norm": 1, "lr": 1, "seconds": 1000}\n')
    go(tmp_path, resume=True)
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert 1000 < line["seconds"] < 1060
    assert line.keys() == {"step", "loss", "grad_norm", "lr", "images_per_second", "seconds"}


def test_a_run_of_another_device_resumes_with_a_note(tmp_path, capsys):
    trainer = make_trainer(8)
    trainer.advance()
    Snapshots(tmp_path / "run", 1, {}).save(1, trainer.state(), "cuda")
    follow(make_trainer(8), tmp_path, {}, resume=True)
    assert "resumed after step 1, on cpu what ran on cuda: from here it is equal but for" in capsys.readouterr().err


def test_samples_are_drawn_from_the_average_in_their_steps(tmp_path):
    drawn = []
    trainer = make_trainer(9, run=replace(CPU, sample_every=4))
    follow(trainer, tmp_path, {}, lambda model, path: drawn.append((model is trainer.best, path.name)))
    assert drawn == [(True, f"step_{step:08d}.png") for step in (4, 8, 9)]
    assert not Snapshots(tmp_path / "run", 1, {}).steps()  # save_every = 0: only an interrupt stores


# One run in a folder


def holding(out, pipe):
    with locked(out):
        os.write(pipe, b".")
        time.sleep(60)


@forks
def test_a_folder_in_use_is_refused_and_free_after_a_kill(tmp_path):
    reader, writer = os.pipe()
    pid = children.start(holding, tmp_path / "run", writer)
    os.read(reader, 1)
    with pytest.raises(RuntimeError, match=f"run is in use by process {pid}$"):
        go(tmp_path, resume=True)
    os.kill(pid, signal.SIGKILL)
    children.end(pid)
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").read_text() == f"{os.getpid()}\n"


# Several processes


def ranks(function, *args, within=60):
    """The exit codes of two processes that run a function together."""

    def together():
        with processes(choose_device("cpu")):
            return function(*args)

    return children.ranks(together, within=within)


class Transformer(nn.Module):
    """A `DiT` of points, each an image of two channels and four equal pixels."""

    def __init__(self, width, depth, n_classes):
        super().__init__()
        self.dit = DiT((2, 2, 2), 1, 2 * width, 2, 2, n_classes)

    def forward(self, x, clock, **cond):
        return self.dit(x[:, :, None, None].expand(-1, -1, 2, 2), clock, **cond).mean((2, 3))


def fifty(out, net, dtype, accumulate):
    trainer = make_trainer(50, net=net, dtype=dtype, run=replace(CPU, accumulate=accumulate, clip=1.0))
    losses = torch.stack([trainer.advance()[0] for _ in range(50)])
    if trainer.rank == 0:
        save_file({"losses": losses} | trainer.state()["model"], out)
    assert trainer.world == int(os.environ.get("WORLD_SIZE", 1))


@forks
@pytest.mark.parametrize(
    "net, dtype, accumulate, tol",
    [(MLP, torch.float32, 1, 1e-5), (Transformer, torch.float32, 2, 1e-5), (MLP, torch.float64, 2, 1e-12)],
)
def test_two_processes_follow_one(tmp_path, net, dtype, accumulate, tol):
    fifty(tmp_path / "one", net, dtype, 1)
    assert ranks(fifty, tmp_path / "two", net, dtype, accumulate) == [0, 0]
    one, two = (load_file(tmp_path / name) for name in ("one", "two"))
    for name in one:
        if not name.endswith("qkv.bias"):  # softmax is blind to the keys' bias: Adam makes steps of its rounding
            torch.testing.assert_close(two[name], one[name], rtol=0, atol=tol)


def meeting(late):
    if os.environ["RANK"] == "0":
        time.sleep(late)
    with processes(choose_device("cpu")):
        both = torch.ones(())
        dist.all_reduce(both)
        assert both == 2


@forks
def test_restarted_processes_find_one_another_in_the_old_store():
    """torchrun keeps its store: who comes early must not take the addresses of the dead."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": "1"}
    for restart, late in ((0, 0.0), (1, 0.5)):
        assert children.ranks(meeting, late, TORCHELASTIC_RESTART_COUNT=str(restart), **env) == [0, 0]


def raising(out):
    trainer = make_trainer()
    if trainer.rank == 1:
        trainer.advance = lambda: 1 / 0
    follow(trainer, out, {})


@forks
def test_an_error_in_one_process_ends_all(tmp_path):
    assert ranks(raising, tmp_path, within=30) == [1, 1]


def asked(out, resume):
    trainer = make_trainer(net=MLP, run=replace(CPU, save_every=4, log_every=2, keep=1))
    advance = trainer.advance

    def told():
        values = advance()
        if trainer.rank == 1 and trainer.step == 6 and not resume:
            signal.raise_signal(signal.SIGTERM)
        return values

    trainer.advance = told
    try:
        follow(trainer, out, {"lr": 0.01}, resume=resume)
    except KeyboardInterrupt as stop:
        assert "at step 6" in str(stop) and not resume
        return 130


@forks
def test_a_signal_to_one_process_stops_all_after_one_step(tmp_path_factory):
    tmp_path, alone = (tmp_path_factory.mktemp(name) for name in ("two", "one"))
    asked(alone, True)
    assert ranks(asked, tmp_path, False) == [130, 130]
    assert [path.name for path in Snapshots(tmp_path / "run", 1, {}).steps()] == ["step_00000006"]
    assert ranks(asked, tmp_path, True) == [0, 0]
    for two, one in zip(log(tmp_path), log(alone), strict=True):
        assert two["step"] == one["step"] and two["loss"] == pytest.approx(one["loss"], abs=1e-5)
