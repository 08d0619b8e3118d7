"""Training runs that survive real life: stopped and resumed at will, on one device or many.

A run is a folder. `trainer` takes the steps; here is what goes round them: checkpoints, log, samples, interrupts.

    diffusion-edu train fashion -o runs/fashion
    torchrun --nproc_per_node 8 --max-restarts 3 -m diffusion_edu.cli train cifar10_large -o runs/cifar10 --resume
"""

import contextlib
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from . import checks
from .checkpoint import Snapshots, write_atomically
from .machine import Interrupt, locked


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
            checks.integer(f"run.{name}", getattr(self, name), low, 10**9)
        checks.real("run.clip", self.clip, 0)


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

    Returns
    -------
    float
        Seconds that the run took, those before it was resumed included.

    Raises
    ------
    KeyboardInterrupt
        After a SIGINT or SIGTERM: the step is finished and stored.
    """
    run, n_steps, chief = trainer.run, trainer.recipe.n_steps, trainer.rank == 0
    folder = Path(out) / "run"
    snapshots = Snapshots(folder, run.keep, describe)

    def save():
        trainer.check()
        snapshots.save(trainer.step, trainer.state(), trainer.device.type)

    def due(every):
        return every and (trainer.step % every == 0 or trainer.step == n_steps)

    with locked(folder) if chief else contextlib.nullcontext(), Interrupt() as interrupt:
        if chief:
            snapshots.sweep()
        if resume:
            _resume(trainer, snapshots, chief)
        log = Log(folder / "log.jsonl", trainer, Path(out).name) if chief else None
        while trainer.step < n_steps and not interrupt.agreed():
            loss, norm = trainer.advance()
            if not chief:
                continue
            log.take(loss, norm, due(run.log_every))
            if due(run.save_every):
                save()
            if on_samples and due(run.sample_every):
                (folder / "samples").mkdir(exist_ok=True)
                on_samples(trainer.best, folder / "samples" / f"step_{trainer.step:08d}.png")
        seconds = log.close() if chief else math.nan
        if trainer.step < n_steps:
            if chief:
                save()
            raise KeyboardInterrupt(f"interrupted at step {trainer.step}; go on with --resume -o {out}")
    return seconds


def _resume(trainer, snapshots, chief):
    found, said = snapshots.newest(), "nothing to resume: starting"
    if found:
        step, files, device = found
        trainer.restore(step, files)
        said = f"resumed after step {step}"
        if device != trainer.device.type:
            said += f", on {trainer.device.type} what ran on {device}: from here it is equal but for rounding"
    if chief:
        print(said, file=sys.stderr)


class Log:
    """``log.jsonl`` and the progress bar: one line every few steps, with the mean loss since the line before."""

    def __init__(self, path, trainer, name):
        from tqdm.auto import tqdm

        self.path, self.trainer, self.losses = path, trainer, []
        lines = [line for line in map(_parsed, _lines(path)) if line and line["step"] <= trainer.step]
        write_atomically(path, b"".join(map(_dumped, lines)))  # what came after the checkpoint is run again
        self.since = time.perf_counter()
        self.start = self.since - (lines[-1]["seconds"] if lines else 0)
        self.bar = tqdm(total=trainer.recipe.n_steps, initial=trainer.step, desc=name, unit="step")

    def close(self):
        """End the bar; returns the seconds that the run has taken."""
        self.bar.close()
        return time.perf_counter() - self.start

    def take(self, loss, norm, due):
        """Note the loss of a step, and write a line if it is ``due``."""
        self.losses.append(loss)
        self.bar.update()
        if not due:
            return
        self.trainer.check()
        now, mean = time.perf_counter(), torch.stack(self.losses).mean().item()
        rate = len(self.losses) * self.trainer.recipe.batch_size / (now - self.since)
        line = {
            "step": self.trainer.step,
            "loss": mean,
            "grad_norm": norm.item(),
            "lr": self.trainer.optimizer.param_groups[0]["lr"],
            "images_per_second": round(rate, 1),
            "seconds": round(now - self.start, 1),
        }
        with open(self.path, "ab") as file:
            file.write(_dumped(line))
        self.losses, self.since = [], now
        self.bar.set_postfix_str(f"loss {mean:.4f}, {rate:,.0f} images/s")


def _lines(path):
    return path.read_bytes().splitlines() if path.exists() else []


def _dumped(line):
    return json.dumps(line).encode() + b"\n"


def _parsed(line):
    """A line of the log, or None for one that a crash has cut off."""
    try:
        return json.loads(line)
    except ValueError:
        return None
