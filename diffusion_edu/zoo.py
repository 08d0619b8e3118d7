"""Trained networks that the notebooks sample from: one config each, one command, one card.

A config is a TOML file: ``diffusion-edu train digits_unet -o data/zoo/digits_unet`` makes the network of
``configs/digits_unet.toml``. ``load`` finds it again and needs no config: the card holds it.
"""

import math
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from . import checks, data
from .bits import bits_per_dim, dequantize
from .checkpoint import load_weights, read_card, save_weights
from .config import Config, call, read_config
from .denoiser import Denoiser, NoisyClassifier
from .distill import fit_student
from .elbo import bound_term
from .guidance import bind, classifier_free
from .likelihood import ode_log_prob, probes
from .metrics import frechet_distance
from .process import VE, VPSDE, q_sample, terminal_kl, uniform_log_snr
from .samplers import ddim_step, learned, make_ddpm_step, make_dpmpp_2m_step, make_langevin_step, noises, sample
from .schedules import geometric_sigmas
from .training import averaged, fit, fit_classifier, fit_vae
from .vae import HVAE


def train(source, out):
    """Train the network of a config on the train half of the digits and store it in the folder ``out``.

    Prints a progress bar; returns the card, whose metrics `evaluate` measured on the stored weights.
    """
    from tqdm.auto import tqdm

    config = read_config(source)
    Path(out).mkdir(parents=True, exist_ok=True)  # a path that cannot be written is told before the training
    recipe, model = config.make_recipe(), config.make_model()
    x0, y = data.digits("train")
    ema = averaged(model, config.ema) if config.ema else None
    judge = load("digits_classifier") if _draws(model) else None  # a missing judge is told before the training
    n_steps, losses = _training(config, model, x0, y, ema)
    start = time.perf_counter()
    for _ in tqdm(losses, total=n_steps, desc=Path(out).name, unit="step"):
        pass
    minutes = (time.perf_counter() - start) / 60
    model = (ema.module if ema else model).eval()
    card = {
        "config": asdict(config),
        "seed": recipe.seed,
        "steps": n_steps,
        "hardware": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "minutes": round(minutes, 2),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "metrics": evaluate(model, judge, config.distill),
    }
    card = read_card(save_weights(out, model, card))
    print(f"{out}: {card['metrics']}", file=sys.stderr)
    return card


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


def load(name):
    """A trained network of the zoo, in eval mode: a `Denoiser` with its process, or a `Classifier`.

    Parameters
    ----------
    name : str
        A folder of ``zoo/`` in ``$DIFFUSION_EDU_DATA``, or else in ``data/`` beside the package.

    Raises
    ------
    FileNotFoundError
        If there is no zoo.
    ValueError
        If the zoo has no such network, or its files are damaged.
    """
    folder = folder_of(name)
    config = call("config", Config, read_card(folder)["config"])
    model = config.make_model()
    load_weights(folder, model)
    return model.eval()


def folder_of(name):
    """The folder of a stored network."""
    zoo = Path(os.environ.get("DIFFUSION_EDU_DATA") or Path(__file__).parent.parent / "data") / "zoo"
    if not zoo.is_dir():
        raise FileNotFoundError(
            f"no zoo at {zoo}: set DIFFUSION_EDU_DATA to the folder that holds zoo/ (data/ of the repository)"
        )
    return zoo / checks.one_of("name", name, tuple(sorted(path.parent.name for path in zoo.glob("*/card.json"))))


def digit_grid(process, n_steps):
    """Times for digits: equal steps in log SNR from T down to std / scale = 0.02, then 0."""
    lowest = torch.tensor(-2 * math.log(0.02), dtype=torch.float64)
    return process.grid(n_steps, uniform_log_snr(process.time_of(lowest).item()))


def draw(model, y, w=1.0, n_steps=16, seed=0):
    """Digits of the given classes, by DPM-Solver++(2M) on `digit_grid`.

    Parameters
    ----------
    model : Model
        Class-conditional, on a process in continuous time, for images (1, 8, 8).
    y : Tensor, shape (B,), int64
    w : float
        Guidance scale; 1 is none.
    n_steps, seed : int

    Returns
    -------
    Tensor, shape (B, 1, 8, 8), in [-1, 1]
    """
    times = digit_grid(model.process, n_steps)
    return _from_noise(make_dpmpp_2m_step(), classifier_free(model, w, y=y), times, len(y), seed)


def student_draw(model, y, distill, seed=0):
    """Digits of the given classes by a student, on its own grid, by DDIM.

    Parameters
    ----------
    model : Model
    y : Tensor, shape (B,), int64
    distill : dict
        ``teacher_steps`` and ``steps``, as on its card.
    seed : int

    Returns
    -------
    Tensor, shape (B, 1, 8, 8), in [-1, 1]
    """
    times = digit_grid(model.process, distill["teacher_steps"])[:: distill["teacher_steps"] // distill["steps"]]
    return _from_noise(ddim_step, bind(model, y=y), times, len(y), seed)


def _from_noise(step, model, times, n, seed):
    noise = noises(seed)
    *_, x0 = sample(step, model, model.process.prior((n, 1, 8, 8), noise), times, noise)
    return x0.clamp(-1, 1)


def walk(model, n, r=0.5, n_steps=10, seed=0):
    """Digits by annealed Langevin dynamics down the 12 levels that the network was trained on, from 8 to 0.05.

    Parameters
    ----------
    model : Model
        Unconditional, on `VE`, for images (1, 8, 8).
    n : int
    r : float
        Step size relative to the variance of the noise.
    n_steps, seed : int
        Updates at each level.

    Returns
    -------
    Tensor, shape (n, 1, 8, 8), in [-1, 1]
    """
    sigmas, noise = geometric_sigmas(12, 0.05, 8.0), noises(seed)
    x_T = sigmas[0].item() * noise(torch.empty(n, 1, 8, 8))
    *_, x0 = sample(make_langevin_step(r, n_steps), model, x_T, sigmas, noise)
    return x0.clamp(-1, 1)


@torch.no_grad()
def walk_metrics(x0, classifier):
    """Metrics of unconditional samples: how sure the judge is, and the Fréchet distance beside its floor at this n."""
    real, train_half = classifier.features(data.digits("test")[0]), classifier.features(data.digits("train")[0])
    return {
        "confident": round((classifier(x0).softmax(1).amax(1) > 0.9).double().mean().item(), 4),
        "frechet": round(frechet_distance(classifier.features(x0), real), 3),
        "floor": round(frechet_distance(train_half[: len(x0)], real), 3),
    }


@torch.no_grad()
def evaluate(model, classifier=None, distill=None):
    """The headline metrics that a card holds: of 900 unguided samples, or of a model of another kind on the test half.

    900, because the Fréchet distance falls with the number of samples and the train half, its floor, has 901.

    Returns
    -------
    dict
        ``accuracy`` : share of samples (or test digits) that the classifier names as asked;
        ``confident`` : on `VE`, of 200 annealed samples, the share on which the classifier is 90 % sure of some class;
        ``frechet`` : Fréchet distance of the classifier's features, samples against the test half;
        ``floor`` : the same for the train half against the test half;
        ``bits_per_dim`` : bound on -log2 p of the test half per pixel, of 17 grey levels, for an HVAE (64 draws of
        each digit) and for a model with a learned variance (1,000 steps; see `bound_bits`); for an unconditional
        VP model -log2 p itself, of the first 100 test digits, dequantised (see `density_bits`);
        ``accuracy_0.5`` and others : of a noise-aware classifier, on test digits at std / scale = 0.5, ...
    """
    x_test, y_test = data.digits("test")
    if isinstance(model, HVAE):
        nats = torch.stack([-model.elbo(x_test, noise) for noise in map(noises, range(64))])
        return {"bits_per_dim": round(bits_per_dim(nats.double().mean().item(), 64), 4)}
    if isinstance(model, NoisyClassifier):
        return {f"accuracy_{sigma:g}": _noisy_accuracy(model, x_test, y_test, sigma) for sigma in (0.1, 0.5, 1, 2)}
    if not isinstance(model, Denoiser):
        return {"accuracy": accuracy(model, x_test, y_test)}
    if _density(model):
        return {"bits_per_dim": round(density_bits(model, x_test[:100]).mean().item(), 4)}
    if not _draws(model):
        return {"bits_per_dim": round(bound_bits(make_ddpm_step(learned), model, x_test).mean().item(), 4)}
    classifier = classifier or load("digits_classifier")
    if isinstance(model.process, VE):
        return walk_metrics(walk(model, 200), classifier)
    y = torch.arange(900) % 10
    x0 = student_draw(model, y, distill) if distill else draw(model, y, n_steps=12)
    real, train_half = classifier.features(x_test), classifier.features(data.digits("train")[0])
    return {
        "accuracy": accuracy(classifier, x0, y),
        "frechet": round(frechet_distance(classifier.features(x0), real), 3),
        "floor": round(frechet_distance(train_half, real), 3),
    }


@torch.no_grad()
def bound_bits(step, model, x0, n_steps=1000, n_draws=16, seed=0):
    r"""Bits per dimension of the diffusion bound on digits of 17 grey levels, estimated at a few times for each digit.

    .. math:: L \approx L_T + L_0 + \frac1K\sum_{k=1}^K \frac{L_{t_k - 1}}{p_{t_k}}, \qquad
              p_t \propto \log\frac{\mathrm{std}(t)}{\mathrm{std}(s)}

    L_T is exact and L_0 is drawn for every digit. The times t_k are drawn with the shares p that the terms of Gaussian
    data of variance 1 would have, because the early steps cost most by far. Digit i's K draws stand at equal distances
    from an offset of its own, so that all the digits together see all the times.

    Parameters
    ----------
    step : KernelStep
    model : Model
        On a variance-preserving process.
    x0 : Tensor, shape (B, 1, 8, 8)
    n_steps : int
        Length n of the chain, ``process.grid(n_steps)``.
    n_draws : int
        K: calls of the network for each digit, beside the one for L_0.
    seed : int

    Returns
    -------
    Tensor, shape (B,), float64
        One estimate for each digit; its mean over the digits is the bound of the set.
    """
    process, noise = model.process, noises(seed)
    times = process.grid(n_steps)
    generator = torch.Generator().manual_seed(seed)
    offset = (torch.arange(len(x0)) + torch.rand(len(x0), generator=generator, dtype=torch.float64)) / len(x0)
    offset = offset[torch.randperm(len(x0), generator=generator)]
    nats = terminal_kl(process, x0).double()
    nats += bound_term(step, model, x0, times[-2], times[-1], noise(x0), levels=17)
    log_std = process.marginal(times[:-1])[1].log()
    share = (log_std[:-1] - log_std[1:]) / (log_std[0] - log_std[-1])  # of the steps above the last
    for k in range(n_draws if n_steps > 1 else 0):
        i = torch.searchsorted(share.cumsum(0), (k + offset) / n_draws).clamp(max=n_steps - 2)
        nats += bound_term(step, model, x0, times[i], times[i + 1], noise(x0), levels=17) / (n_draws * share[i])
    return bits_per_dim(nats, x0[0].numel())


@torch.no_grad()
def density_bits(model, x0, rtol=1e-3, seed=0):
    r"""Bits per dimension of digits of 17 grey levels under a density, by the probability-flow ODE.

    .. math:: -\frac{\log p(y)}{D \ln 2} + \log_2 8, \qquad y = x + \frac{2u - 1}{16}, \quad u \sim U[0, 1)

    Parameters
    ----------
    model : Model
        Of dequantised digits, in continuous time.
    x0 : Tensor, shape (B, 1, 8, 8)
    rtol : float
        Tolerance of the solver, relative and absolute.
    seed : int
        Of u, and of one probe of random signs for each digit.

    Returns
    -------
    Tensor, shape (B,), float64
    """
    generator = torch.Generator().manual_seed(seed)
    y = dequantize(x0, 17, torch.rand(x0.shape, generator=generator).to(x0))
    found = ode_log_prob(model, y, t_min=1e-4, v=probes(y, 1, generator), rtol=rtol, atol=rtol)
    return bits_per_dim(-found.log_prob.double(), x0[0].numel(), levels=17)


def _draws(model):
    """Whether a model is judged by its samples: a denoiser in continuous time, of a class or on `VE`."""
    return isinstance(model, Denoiser) and not model.process.discrete and not _density(model)


def _density(model):
    """Whether a model is judged by the density of the data: an unconditional denoiser on a VP SDE."""
    vp = isinstance(model, Denoiser) and isinstance(model.process, VPSDE)
    return vp and model.net.condition.n_classes is None


@torch.no_grad()
def accuracy(classifier: nn.Module, x, y):
    """Share of the images that the classifier names as labelled."""
    return round((classifier(x).argmax(1) == y).double().mean().item(), 4)


def _noisy_accuracy(classifier, x, y, sigma):
    """Accuracy on digits noised to std / scale = sigma."""
    process = classifier.process
    t = process.time_of(torch.tensor(-2 * math.log(sigma), dtype=torch.float64))
    return accuracy(lambda x: classifier(x, t), q_sample(process, x, t, noises(0)(x)), y)
