"""What the command line does with networks: train one from its config, say what that would take, draw and measure."""

import math
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from . import checks, data, machine, runs
from .checkpoint import read_card, save_weights
from .config import read_config
from .denoiser import Denoiser, EDMDenoiser, NoisyClassifier
from .distill import fit_student
from .trainer import Trainer
from .training import averaged, batch_loss, draw_batch, fit, fit_classifier, fit_vae
from .vae import HVAE
from .zoo import digit_grid, draw, evaluate, load, open_folder


def train(source, out, changes=(), resume=False):
    """Train the network of a config and store it in the folder ``out``.

    A config with a table [run] makes a run that can be stopped, resumed and spread over processes (`runs.follow`);
    the others are trained in one go by `training.fit` and its like. Prints a progress bar; returns the card, whose
    metrics `evaluate` measured on the stored weights, or None in all processes but the first.

    Parameters
    ----------
    source : str or path
        Name of a shipped config, or a path to one.
    out : path
    changes : sequence of str
        ``key=value``, put in place of what the config says.
    resume : bool
        Go on with the run in ``out``.
    """
    config, out = read_config(source, changes), Path(out)
    if resume and not config.run:
        checks.fail("resume", "be used with a config that has a table [run]", str(source))
    if not resume and (out / "run").exists():
        raise FileExistsError(f"{out} holds a run: use --resume to go on with it, or another folder")
    device = machine.choose_device(config.make_run().device)  # what is missing is told before the training
    config.load_data("test")
    if config.judge:
        load(config.judge)
    out.mkdir(parents=True, exist_ok=True)
    with machine.processes(device):
        model, n_steps, seconds = (_long if config.run else _short)(config, out, resume)
    if int(os.environ.get("RANK", 0)):
        return None
    card = {
        "config": asdict(config),
        "seed": config.make_recipe().seed,
        "steps": n_steps,
        "hardware": _hardware(next(model.parameters()).device),
        "minutes": round(seconds / 60, 2),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    save_weights(out, model, card)  # before anything can go wrong in the measuring
    card = read_card(save_weights(out, model, card | {"metrics": evaluate(model.eval(), config)}))
    print(f"{out}: {card['metrics']}", file=sys.stderr)
    return card


def _hardware(device):
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _short(config, out, resume):
    """Train in one go; (model, number of steps, seconds)."""
    from tqdm.auto import tqdm

    model, start = config.make_model(), time.perf_counter()
    ema = averaged(model, config.ema) if config.ema else None
    n_steps, losses = _training(config, model, *config.load_data("train"), ema)
    for _ in tqdm(losses, total=n_steps, desc=out.name, unit="step"):
        pass
    return (ema.module if ema else model), n_steps, time.perf_counter() - start


def _long(config, out, resume):
    """Train as a run; (model, number of steps, seconds)."""
    x0, y = config.load_data("train")
    cond = {"y": y} if y is not None and config.net.get("n_classes") else {}
    recipe, model = config.make_recipe(), config.make_model()
    size, n_parameters = "x".join(map(str, x0.shape[1:])), sum(p.numel() for p in model.parameters())
    told = ("run", "about", "judge")  # how it is run, called and judged may change on the way
    said = {key: value for key, value in asdict(config).items() if key not in told}

    def on_samples(model, path):
        save_image(path, data.tile(draw(model.eval(), classes(config, 64), shape=x0.shape[1:]), 8))

    with machine.enough_memory(f"batches of {recipe.batch_size} images {size} and {n_parameters:,} parameters"):
        trainer = Trainer(model, recipe, config.make_run(), x0, cond, config.ema)
        torch.manual_seed(recipe.seed)  # for a network that draws, such as dropout; a checkpoint keeps the state
        seconds = runs.follow(trainer, out, said, on_samples, resume)
    return trainer.best, recipe.n_steps, seconds


def dry_run(source, changes=()):
    """What a training would take, in lines: parameters, operations of a step, memory."""
    from torch.utils.flop_counter import FlopCounterMode

    config = read_config(source, changes)
    recipe, model = config.make_recipe(), config.make_model()
    n_parameters = sum(p.numel() for p in model.parameters())
    lines = [f"parameters  {n_parameters:,}", f"steps       {recipe.n_steps:,} of {recipe.batch_size} images"]
    if not isinstance(model, Denoiser | EDMDenoiser):
        return lines
    x0 = torch.zeros(1, *config.shape())
    cond = {"y": torch.zeros(1, dtype=torch.int64)} if config.net.get("n_classes") else {}
    batch, kept = draw_batch(model.process, recipe, torch.Generator(), x0, **cond), {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with FlopCounterMode(display=False) as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        batch_loss(model, recipe, batch).sum()
    rows = recipe.batch_size // config.make_run().accumulate
    activations = rows * sum(size for place, size in kept.items() if place not in own)
    states = 4 * n_parameters * (4 + bool(config.ema))  # weights, gradients, two moments, average
    flop = forward.get_total_flops() / 1e9
    return [
        *lines,
        f"operations  {flop:.3f} GFLOP an image, forward; a step takes 3 x {recipe.batch_size} times that",
        f"memory      {states / 1e6:,.0f} MB of weights and optimiser, {activations / 1e6:,.0f} MB of activations",
    ]


def save_image(path, image):
    """Write an image (C, H, W) in [-1, 1] as a PNG file."""
    from matplotlib.image import imsave

    imsave(path, image.expand(3, -1, -1).permute(1, 2, 0).clamp(-1, 1).cpu().numpy() / 2 + 0.5)


def classes(config, n):
    """What `draw` is asked for: n labels, each class in turn, or the number n where there are no classes."""
    n_classes = config.net.get("n_classes")
    return torch.arange(n) % n_classes if n_classes else n


def _training(config, model, x0, y, ema):
    """(number of optimiser steps, generator of their losses) of a config's training."""
    recipe, cond = config.make_recipe(), {"y": y} if config.net.get("n_classes") else {}
    if config.distill:
        model.load_state_dict(load(config.distill["teacher"]).state_dict())
        times, steps = digit_grid(model.process, config.distill["teacher_steps"]), config.distill["steps"]
        rounds = round(math.log2(config.distill["teacher_steps"] / steps))
        return rounds * recipe.n_steps, fit_student(model, x0, recipe, times, steps, **cond)
    if isinstance(model, Denoiser):
        return recipe.n_steps, fit(model, x0, recipe, ema=ema, **cond)
    if isinstance(model, NoisyClassifier):
        return recipe.n_steps, fit(model, x0, recipe, ema=ema, y=y)
    if isinstance(model, HVAE):
        return recipe.n_steps, fit_vae(model, x0, recipe, ema=ema)
    return recipe.n_steps, fit_classifier(model, x0, y, recipe)


def sample(folder, out, n=64, w=1.0, n_steps=18, seed=0):
    """Draw n images, each class in turn, from what `train` wrote into ``folder``, as one PNG file."""
    model, config = open_folder(folder)
    if not isinstance(model, Denoiser | EDMDenoiser):
        checks.fail("folder", "hold a denoiser of images", type(model).__name__)
    if w != 1 and not config.net.get("n_classes"):
        checks.fail("w", "be 1 for a network without classes", w)
    checks.integer("n", n, 1), checks.integer("seed", seed, 0)
    images = draw(model, classes(config, n), w, n_steps, seed, config.shape())
    save_image(out, data.tile(images, max(1, round(n**0.5))))
