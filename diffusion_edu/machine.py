"""What a run asks of the machine: a device, a group of processes, a folder of its own, a way to stop."""

import contextlib
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist


def choose_device(wanted):
    """The device of a run, from "auto", "cpu" or "cuda"; of several processes, each takes its own accelerator.

    Times and tables are float64, which Apple's MPS has not: "auto" takes CUDA or the CPU.
    """
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
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank, world = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":  # one machine: its store outlives a restart, with the old addresses
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def locked(folder):
    """Only one run at a time in a folder, which is made if it is missing.

    A crash lets go of it: the lock is not the file, but the system's hold on it. Where there is no ``fcntl``, as on
    Windows, there is no lock.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with open(Path(folder) / ".lock", "a+") as file:
        with contextlib.suppress(ImportError):
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise RuntimeError(f"run directory {folder} is in use by process {file.read().strip()}") from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


@contextlib.contextmanager
def enough_memory(for_what):
    """Where the accelerator's memory runs out: ``for_what`` it was too little, and what to do."""
    try:
        yield
    except torch.OutOfMemoryError:
        remedies = "a smaller recipe.batch_size, a larger run.accumulate (equal numbers) or run.precision=bf16"
        raise MemoryError(f"out of memory for {for_what}; use {remedies}") from None


class Interrupt:
    """Remembers a SIGINT or SIGTERM, so that the step can be finished and stored; a second one ends at once.

    Launchers hand on to their processes what the terminal has sent to these already: what comes within ``same``
    seconds of the first signal is not a second one.
    """

    same = 2.0

    def __enter__(self):
        self.since, self.before = None, {}
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread: nothing to catch
                self.before[number] = signal.signal(number, self._ask)
        return self

    def _ask(self, number, frame):
        if self.since is None:
            self.since = time.monotonic()
        elif time.monotonic() - self.since > self.same:
            raise KeyboardInterrupt

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def agreed(self):
        """Whether any process was asked to stop."""
        if not dist.is_initialized():
            return self.since is not None
        flag = torch.tensor(float(self.since is not None))  # on the CPU, so that no accelerator waits
        dist.all_reduce(flag)
        return bool(flag > 0)
