"""A model in training, on one device or many: which examples each step sees, the step, and the state between steps.

The random numbers of a run are functions of (seed, step), never of what happened before: one that is killed and
resumed, or spread over several processes, draws what it would have drawn.
"""

import contextlib
import copy
import hashlib
import math
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from . import checks
from .checkpoint import check_names
from .machine import choose_device
from .training import averaged, batch_loss, check_data, draw_batch, first_bad, learning_rate

BLOCK = 8  # examples that share a generator: small enough to be split among processes, large enough to be fast


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
            rule = f"split into {parts} parts (processes x accumulate), as a multiple of {BLOCK * parts} does"
            checks.fail("recipe.batch_size", rule, recipe.batch_size)
        if recipe.batch_size > len(x0):
            checks.fail("recipe.batch_size", f"be at most {len(x0)}, the number of examples", recipe.batch_size)
        self.orders = {}

    def generator(self, *what):
        """The generator of this purpose, always the same."""
        digest = hashlib.sha256(repr((self.recipe.seed, *what)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def order(self, epoch):
        """The permutation of the examples in an epoch."""
        if epoch not in self.orders:
            self.orders = {e: order for e, order in self.orders.items() if e == epoch - 1}
            self.orders[epoch] = torch.randperm(len(self.x0), generator=self.generator("order", epoch))
        return self.orders[epoch]

    def examples(self, step):
        """Which examples the batch of a step holds, in order: shape (batch_size,)."""
        N, first, end = len(self.x0), step * self.recipe.batch_size, (step + 1) * self.recipe.batch_size
        epochs = range(first // N, (end - 1) // N + 1)
        return torch.cat([self.order(e)[max(first - e * N, 0) : end - e * N] for e in epochs])

    def part(self, step, k):
        """The k-th part of the batch of a step: a dict of tensors for `batch_loss`."""
        examples, blocks = self.examples(step), []
        for first in range(k * self.rows, (k + 1) * self.rows, self.block):
            i = examples[first : first + self.block]
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
        self.step, self.ahead, self.watched = 0, None, torch.zeros((), device=self.device)
        cuda = self.device.type == "cuda"
        self.pool = ThreadPoolExecutor(1, initializer=lambda: cuda and torch.cuda.set_device(self.device))
        torch.set_float32_matmul_precision("highest" if run.precision == "fp32" else "high")
        torch.backends.cudnn.allow_tf32 = run.precision != "fp32"
        if run.compile:
            self.model.net.compile()
        self.called = self.model
        if self.world > 1:
            self.called = DistributedDataParallel(self.model, device_ids=[self.device.index] if cuda else None)
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
        self.model.train()  # whoever drew samples has called eval()
        self.optimizer.zero_grad()
        total = 0.0
        for k, batch in enumerate(parts):
            together = self.world == 1 or k == len(parts) - 1  # processes share their gradients once a step
            with contextlib.nullcontext() if together else self.called.no_sync():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.precision == "bf16"):
                    loss = batch_loss(self.called, self.recipe, batch).mean() / len(parts)
                loss.backward()
            total = total + loss.detach()
        if self.world > 1:
            dist.all_reduce(total)
            total /= self.world
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.run.clip or math.inf)
        self.watched += total + norm
        self.optimizer.param_groups[0]["lr"] = self.recipe.lr * learning_rate(self.step, self.recipe)
        self.optimizer.step()
        if self.average:
            self.average.update_parameters(self.model)
        self.step += 1
        return total, norm

    def check(self):
        """Raise FloatingPointError if a loss or a gradient of any step so far was not finite."""
        if not math.isfinite(self.watched.item()):
            where = f"at step {self.step}, or since the last line of the log"
            raise FloatingPointError(f"the loss or its gradient is not finite {where}; {first_bad(self.model)}")

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
        check_names(f"of step {step}", files["model"], self.model.state_dict())
        parameters = dict(self.model.named_parameters())
        places, moments = {name: i for i, name in enumerate(parameters)}, {}
        for name, tensor in files["optimizer"].items():
            parameter, key = name.rsplit("/", 1)
            weight = parameters[parameter]
            like = weight if tensor.shape == weight.shape else tensor  # the fused kernel trusts in the weights' layout
            moments.setdefault(places[parameter], {})[key] = torch.empty_like(like).copy_(tensor)
        self.optimizer.load_state_dict({"state": moments, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.model.load_state_dict(files["model"])
        torch.set_rng_state(files["random"]["torch"])
        if self.average:
            self.average.module.load_state_dict(files["average"])
            self.average.n_averaged.copy_(files["random"]["n_averaged"])
        self.step = step
        if self.ahead:
            self.ahead.result()  # what it prepares is not wanted, but two at once would tread on each other
            self.ahead = None
