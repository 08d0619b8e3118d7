"""Training runs that survive real life: the loss of `training.fit`, on one device or many, stopped and resumed at will.

A run is a folder. Its random numbers are functions of (seed, step), never of what happened before, so a run that is
killed and resumed, or spread over several processes, draws what it would have drawn.

    diffusion-edu train fashion -o runs/fashion
    torchrun --nproc_per_node 8 -m diffusion_edu.cli train cifar10_large -o runs/cifar10 --resume
"""

import contextlib
import copy
import fcntl
import hashlib
import json
import math
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from . import checks
from .checkpoint import Snapshots
from .training import averaged, batch_loss, check_data, draw_batch, first_bad, learning_rate

BLOCK = 8  # examples that share a generator: small enough to be split among processes, large enough to be fast


@dataclass(frozen=True)
class Run:
    """How a run uses the machine: the table [run] of a config. It may differ when the run is resumed.

    Attributes
    ----------
    device : {"auto", "cpu", "cuda"}
    precision : {"fp32", "tf32", "bf16"}
        bf16 computes the network in bfloat16, with weights and optimiser in float32.
    compile, channels_last : bool
        Faster kernels: ``torch.compile``, and the memory layout that convolutions like.
    accumulate : int
        Backward passes a step; each sees ``batch_size / accumulate`` examples.
    clip : float
        Largest norm of the gradient; 0 for none.
    save_every, keep : int
        Steps between two checkpoints (0: none but the weights in the end), and how many are kept.
    sample_every : int
        Steps between two grids of samples; 0 for none.
    log_every : int
        Steps between two lines of ``log.jsonl``.
    """

    device: str = "auto"
    precision: str = "fp32"
    compile: bool = False
    channels_last: bool = False
    accumulate: int = 1
    clip: float = 0.0
    save_every: int = 0
    keep: int = 2
    sample_every: int = 0
    log_every: int = 50

    def __post_init__(self):
        checks.one_of("run.device", self.device, ("auto", "cpu", "cuda"))
        checks.one_of("run.precision", self.precision, ("fp32", "tf32", "bf16"))
        for name in ("compile", "channels_last"):
            if not isinstance(getattr(self, name), bool):
                checks.fail(f"run.{name}", "be true or false", repr(getattr(self, name)), TypeError)
        for name, low in (("accumulate", 1), ("save_every", 0), ("keep", 1), ("sample_every", 0), ("log_every", 1)):
            checks.integer(f"run.{name}", getattr(self, name), low)
        checks.real("run.clip", self.clip, 0)


class Batches:
    """The batches of a run, each a function of the step alone.

    Every epoch sees every example once, in an order of its own; a batch may begin in one epoch and end in the next. The
    random numbers of an example come from the generator of its block of 8, so that they do not depend on how the batch
    is split.

    Parameters
    ----------
    process : Process
        On the CPU.
    recipe : Recipe
        ``batch_size`` is that of a whole step, over all processes.
    x0 : Tensor, shape (N, *D)
    cond : dict of Tensor, with leading N
    parts : int
        Into how many equal parts each batch is split.
    """

    def __init__(self, process, recipe, x0, cond, parts=1):
        check_data(x0, cond)
        self.process, self.recipe, self.x0, self.cond = process, recipe, x0, cond
        self.block, self.rows = math.gcd(BLOCK, recipe.batch_size), recipe.batch_size // parts
        if recipe.batch_size % (parts * self.block):
            rule = f"be a multiple of {parts * self.block}: processes x accumulate = {parts}, in blocks of {self.block}"
            checks.fail("recipe.batch_size", rule, recipe.batch_size)
        if recipe.batch_size > len(x0):
            checks.fail("recipe.batch_size", f"be at most {len(x0)}, the number of examples", recipe.batch_size)
        self.orders = {}

    def order(self, epoch):
        """The permutation of the examples in an epoch."""
        if epoch not in self.orders:
            self.orders = {e: order for e, order in self.orders.items() if e == epoch - 1}
            self.orders[epoch] = torch.randperm(len(self.x0), generator=self.generator("order", epoch))
        return self.orders[epoch]

    def generator(self, *what):
        """The generator of this purpose, always the same."""
        digest = hashlib.sha256(repr((self.recipe.seed, *what)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def part(self, step, k):
        """The k-th part of the batch of a step: a dict of tensors for `batch_loss`."""
        blocks = []
        for first in range(k * self.rows, (k + 1) * self.rows, self.block):
            number = step * self.recipe.batch_size + torch.arange(first, first + self.block)
            epochs, places = number // len(self.x0), number % len(self.x0)
            i = torch.stack([self.order(int(e))[p] for e, p in zip(epochs, places, strict=True)])
            cond = {name: value[i] for name, value in self.cond.items()}
            generator = self.generator("block", step, first)
            blocks.append(draw_batch(self.process, self.recipe, generator, self.x0[i], **cond))
        return {name: torch.cat([block[name] for block in blocks]) for name in blocks[0]}


class Trainer:
    """A model in training, step by step, with all that must be stored to go on later.

    Parameters
    ----------
    model : Model
        On the CPU; it is moved to the run's device.
    recipe : Recipe
    run : Run
    x0, cond : Tensor (N, *D) and dict of Tensor
        The data, on the CPU.
    ema : float
        Decay of the weight average, 0 for none.
    """

    def __init__(self, model, recipe, run, x0, cond, ema=0.0):
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.recipe, self.run, self.device = recipe, run, choose_device(run.device)
        self.batches = Batches(copy.deepcopy(model.process), recipe, x0, cond, self.world * run.accumulate)
        layout = torch.channels_last if run.channels_last and x0.ndim == 4 else torch.preserve_format
        self.model = model.to(self.device).to(memory_format=layout)
        self.average = averaged(self.model, ema) if ema else None
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=recipe.lr, fused=True)
        self.step, self.pool = 0, ThreadPoolExecutor(1)
        self.ahead = None
        torch.set_float32_matmul_precision("highest" if run.precision == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = run.precision != "fp32"
        self.called = self.model
        if run.compile:
            self.model.net.compile()
        if self.world > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.called = DistributedDataParallel(self.model, device_ids=ids)
            self.called.process = self.model.process

    @property
    def best(self):
        """The model to sample from: the average, if there is one."""
        return self.average.module if self.average else self.model

    def parts(self, step):
        """This process's parts of the batch of a step, on the device."""
        first = self.rank * self.run.accumulate
        parts = [self.batches.part(step, first + k) for k in range(self.run.accumulate)]
        if self.device.type == "cuda":
            parts = [{n: v.pin_memory().to(self.device, non_blocking=True) for n, v in p.items()} for p in parts]
        return parts

    def advance(self):
        """One optimiser step; returns (loss, norm of the gradient), 0-d tensors on the device."""
        parts = self.ahead.result() if self.ahead else self.parts(self.step)
        self.ahead = self.pool.submit(self.parts, self.step + 1)
        self.model.train()
        self.optimizer.zero_grad()
        total = 0.0
        for k, batch in enumerate(parts):
            last = k == len(parts) - 1
            with contextlib.nullcontext() if last or self.world == 1 else self.called.no_sync():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.precision == "bf16"):
                    loss = batch_loss(self.called, self.recipe, batch).mean() / len(parts)
                loss.backward()
            total = total + loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.run.clip or math.inf)
        self.optimizer.param_groups[0]["lr"] = self.recipe.lr * learning_rate(self.step, self.recipe)
        self.optimizer.step()
        if self.average:
            self.average.update_parameters(self.model)
        self.step += 1
        return total, norm

    def state(self):
        """All that the next step depends on, as tensors by file and name."""
        names = [name for name, _ in self.model.named_parameters()]
        moments = self.optimizer.state_dict()["state"]
        files = {
            "model": self.model.state_dict(),
            "optimizer": {f"{names[i]}/{key}": v for i, s in moments.items() for key, v in s.items()},
            "random": {"torch": torch.get_rng_state()},
        }
        if self.average:
            files["average"] = self.average.module.state_dict()
            files["random"]["n_averaged"] = self.average.n_averaged
        return files

    def restore(self, step, files):
        """Go on after ``step`` steps, from what `state` gave."""
        places = {name: i for i, (name, _) in enumerate(self.model.named_parameters())}
        self.model.load_state_dict(files["model"])
        moments = {i: {} for i in places.values()} if files["optimizer"] else {}
        for name, tensor in files["optimizer"].items():
            parameter, key = name.rsplit("/", 1)
            moments[places[parameter]][key] = tensor
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        torch.set_rng_state(files["random"]["torch"])
        if self.average:
            self.average.module.load_state_dict(files["average"])
            self.average.n_averaged.copy_(files["random"]["n_averaged"])
        self.step, self.ahead = step, None

    def check(self, loss):
        """A loss that is not finite ends the run, and names where."""
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"loss is {value} at step {self.step}; {first_bad(self.model)}")
        return value


def choose_device(wanted):
    """The device of a run; of several processes, each takes its own accelerator."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise RuntimeError("CUDA requested but not available; use run.device=cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


@contextlib.contextmanager
def processes(device):
    """The group of processes that ``torchrun`` started, if it did."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def locked(folder):
    """Only one run at a time in a folder; a crash lets go of it."""
    path = Path(folder) / ".lock"
    with open(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RuntimeError(f"run directory {folder} is in use by process {file.read().strip()}") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
    path.unlink(missing_ok=True)


class Interrupt:
    """Remembers a SIGINT or SIGTERM, so that the step is finished and stored; a second one ends at once."""

    def __enter__(self):
        self.asked, self.before = False, {}
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread: nothing to catch
                self.before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self, trainer):
        """Whether any process was asked to stop."""
        if trainer.world == 1:
            return self.asked
        flag = torch.tensor(float(self.asked), device=trainer.device)
        dist.all_reduce(flag)
        return bool(flag > 0)


def follow(trainer, out, describe, on_samples=None, resume=False):
    """Run a trainer to its last step, in a folder: checkpoints, log, samples, progress bar.

    Parameters
    ----------
    trainer : Trainer
    out : path
        The run's folder; ``run/`` in it holds the log, the checkpoints and the samples.
    describe : dict
        What the run is, stored with each checkpoint and compared at a resume: its config without [run].
    on_samples : function (model, path), or None
        Draws samples into a PNG file.
    resume : bool
        Go on from the newest checkpoint; if there is none, start, and say so.

    Raises
    ------
    SystemExit
        130 after a SIGINT or SIGTERM: the step is finished and stored.
    """
    from tqdm.auto import tqdm

    run, recipe, chief = trainer.run, trainer.recipe, trainer.rank == 0
    folder = Path(out) / "run"
    snapshots = Snapshots(folder, run.keep, describe)
    if chief:
        folder.mkdir(parents=True, exist_ok=True)
    with locked(out) if chief else contextlib.nullcontext(), Interrupt() as interrupt:
        if resume:
            _resume(trainer, snapshots, chief)
        log = Log(folder / "log.jsonl", trainer) if chief else None
        bar = tqdm(total=recipe.n_steps, initial=trainer.step, desc=Path(out).name, unit="step", disable=not chief)
        while trainer.step < recipe.n_steps and not interrupt.agreed(trainer):
            loss, norm = trainer.advance()
            bar.update()
            last = trainer.step == recipe.n_steps
            if log and log.due(loss, last):
                bar.set_postfix_str(log.write(norm))
            if chief and on_samples and run.sample_every and (trainer.step % run.sample_every == 0 or last):
                (folder / "samples").mkdir(exist_ok=True)
                on_samples(trainer.best, folder / "samples" / f"step_{trainer.step:08d}.png")
            if chief and run.save_every and (trainer.step % run.save_every == 0 or last):
                trainer.check(loss)
                snapshots.save(trainer.step, trainer.state())
        bar.close()
        if trainer.step < recipe.n_steps:
            if chief:
                snapshots.save(trainer.step, trainer.state())
                print(f"interrupted at step {trainer.step}, resume with --resume -o {out}", file=sys.stderr)
            raise SystemExit(130)


def _resume(trainer, snapshots, chief):
    found = snapshots.newest()
    if found:
        trainer.restore(*found)
    if chief:
        print(f"resumed after step {trainer.step}" if found else "nothing to resume: starting", file=sys.stderr)


class Log:
    """``log.jsonl``: one line every few steps, with the mean loss since the line before."""

    def __init__(self, path, trainer):
        self.path, self.trainer, self.losses = path, trainer, []
        self.since = self.start = time.perf_counter()
        if path.exists():  # what came after the checkpoint that the run goes on from is run again
            lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= trainer.step]
            path.write_text("".join(f"{line}\n" for line in lines))

    def due(self, loss, last):
        """Take a loss; whether a line is to be written now."""
        self.losses.append(loss)
        return last or self.trainer.step % self.trainer.run.log_every == 0

    def write(self, norm):
        """Write a line; returns the words for the progress bar."""
        loss = self.trainer.check(torch.stack(self.losses).mean())
        now = time.perf_counter()
        rate = len(self.losses) * self.trainer.recipe.batch_size / (now - self.since)
        line = {
            "step": self.trainer.step,
            "loss": loss,
            "grad_norm": norm.item(),
            "lr": self.trainer.optimizer.param_groups[0]["lr"],
            "images_per_second": round(rate, 1),
            "seconds": round(now - self.start, 1),
        }
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")
        self.losses, self.since = [], now
        return f"loss {loss:.4f}, {rate:,.0f} images/s"
