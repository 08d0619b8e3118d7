"""Trained networks that the notebooks sample from, and how good they are: one config each, one command, one card.

A config is a TOML file: ``diffusion-edu train digits_unet -o data/zoo/digits_unet`` makes the network of
``configs/digits_unet.toml``. ``load`` finds it again and needs no config: the card holds it.
"""

import copy
import math
import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from . import checks, data
from .bits import bits_per_dim, dequantize
from .checkpoint import load_weights, read_card
from .config import Config, call
from .denoiser import Denoiser, EDMDenoiser, NoisyClassifier
from .elbo import bound_term
from .guidance import bind, classifier_free
from .likelihood import ode_log_prob, probes
from .metrics import frechet_distance
from .process import VE, VPSDE, q_sample, terminal_kl, uniform_log_snr
from .samplers import ddim_step, learned, make_ddpm_step, make_dpmpp_2m_step, make_langevin_step, noises, sample
from .schedules import geometric_sigmas
from .training import batch_loss, draw_batch
from .vae import HVAE


def load(name):
    """A trained network of the zoo, in eval mode: a `Denoiser` with its process, or a `Classifier`.

    Parameters
    ----------
    name : str
        A folder of ``zoo/`` in ``$DIFFUSION_EDU_DATA``, or, if there is none, in ``data/`` beside the package.

    Raises
    ------
    FileNotFoundError
        If there is no zoo.
    ValueError
        If the zoo has no such network, or its files are damaged.
    """
    return open_folder(folder_of(name))[0]


def open_folder(folder):
    """(model, config) of a folder that `train` made."""
    config = call("config", Config, read_card(folder)["config"])
    model = config.make_model()
    load_weights(folder, model)
    return model.eval(), config


def folder_of(name):
    """The folder of a stored network."""
    roots = [os.environ.get("DIFFUSION_EDU_DATA"), Path(__file__).parent.parent / "data"]
    zoo = next((Path(root) / "zoo" for root in roots if root and (Path(root) / "zoo").is_dir()), None)
    if zoo is None:
        raise FileNotFoundError("no zoo: set DIFFUSION_EDU_DATA to the folder that holds zoo/ (the repository's data/)")
    return zoo / checks.one_of("name", name, tuple(sorted(path.parent.name for path in zoo.glob("*/card.json"))))


def digit_grid(process, n_steps):
    """Times for digits: equal steps in log SNR from T down to std / scale = 0.02, then 0."""
    lowest = torch.tensor(-2 * math.log(0.02), dtype=torch.float64)
    return process.grid(n_steps, uniform_log_snr(process.time_of(lowest).item()))


def draw(model, y, w=1.0, n_steps=16, seed=0, shape=(1, 8, 8)):
    """Images of the given classes, by DPM-Solver++(2M) on `digit_grid`.

    Parameters
    ----------
    model : Model
        For images of ``shape``, class-conditional or not.
    y : Tensor, shape (B,), int64, or int
        The classes; or how many images, of a model without classes.
    w : float
        Guidance scale; 1 is none.
    n_steps, seed : int
    shape : (int, int, int)

    Returns
    -------
    Tensor, shape (B, *shape), in [-1, 1], on the CPU
    """
    times = digit_grid(copy.deepcopy(model.process).cpu(), n_steps)
    if isinstance(y, int):
        return _from_noise(make_dpmpp_2m_step(), model, times, (y, *shape), seed)
    device = next(model.parameters(), y).device
    return _from_noise(make_dpmpp_2m_step(), classifier_free(model, w, y=y.to(device)), times, (len(y), *shape), seed)


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
    return _from_noise(ddim_step, bind(model, y=y), times, (len(y), 1, 8, 8), seed)


def _from_noise(step, model, times, shape, seed):
    noise = noises(seed)
    device = next(model.parameters(), times).device
    x_T = model.process.prior(shape, noise).to(device)  # drawn on the CPU: the same picture on every device
    *_, x0 = sample(step, model, x_T, times.to(device), noise)
    return x0.clamp(-1, 1).cpu()


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
def evaluate(model, config=None, n=900):
    """The headline metrics that a card holds: of n unguided samples, or of a model of another kind on the test half.

    The Fréchet distance falls with the number of samples: compare at equal n only. For digits n is 900, because the
    train half, the floor, has 901.

    Parameters
    ----------
    model : nn.Module
    config : Config or None
        Says data and judge; None: digits, judged by ``digits_classifier``.
    n : int

    Returns
    -------
    dict
        ``accuracy`` : share of samples (or test images) that the classifier names as asked;
        ``confident`` : on `VE`, of 200 annealed samples, the share on which the classifier is 90 % sure of some class;
        ``frechet`` : Fréchet distance of the classifier's features, samples against as many test images, or all;
        ``floor`` : the same for training images in place of samples;
        ``bits_per_dim`` : bound on -log2 p of the test half per pixel, of 17 grey levels, for an HVAE (64 draws of
        each digit) and for a model with a learned variance (1,000 steps; see `bound_bits`); for an unconditional
        VP model -log2 p itself, of the first 100 test digits, dequantised (see `density_bits`);
        ``accuracy_0.5`` and others : of a noise-aware classifier, on test digits at std / scale = 0.5, ...;
        ``loss`` : where there is no judge, the training loss on n test images.
    """
    digits = config is None or config.data["kind"] == "digits"
    load_data = data.digits if config is None else config.load_data
    x_test, y_test = load_data("test")
    if isinstance(model, HVAE):
        nats = torch.stack([-model.elbo(x_test, noise) for noise in map(noises, range(64))])
        return {"bits_per_dim": round(bits_per_dim(nats.double().mean().item(), 64), 4)}
    if isinstance(model, NoisyClassifier):
        return {f"accuracy_{sigma:g}": _noisy_accuracy(model, x_test, y_test, sigma) for sigma in (0.1, 0.5, 1, 2)}
    if not isinstance(model, Denoiser | EDMDenoiser):
        return {"accuracy": accuracy(model, x_test, y_test)}
    if digits and _density(model):
        return {"bits_per_dim": round(density_bits(model, x_test[:100]).mean().item(), 4)}
    if digits and not _draws(model):
        return {"bits_per_dim": round(bound_bits(make_ddpm_step(learned), model, x_test).mean().item(), 4)}
    if digits and isinstance(model.process, VE) and isinstance(model, Denoiser):
        return walk_metrics(walk(model, 200), load("digits_classifier"))
    judge = "digits_classifier" if digits else config.judge
    if judge is None:
        return {"loss": _test_loss(model, config, x_test[:n], y_test)}
    return _sample_metrics(model, config, load(judge), load_data, n)


def _sample_metrics(model, config, classifier, load_data, n):
    """Metrics of n samples of an image model, beside the floor of its training images."""
    x_test, train_half = load_data("test")[0], load_data("train")[0]
    n_classes = 10 if config is None else config.net.get("n_classes")
    y = torch.arange(n) % n_classes if n_classes else None
    if config is not None and config.distill:
        x0 = student_draw(model, y, config.distill)
    else:
        n_steps = 12 if x_test.shape[-1] == 8 else 18
        x0 = draw(model, n if y is None else y, n_steps=n_steps, shape=x_test.shape[1:])
    classifier = classifier.to(x0.device)
    features = [torch.cat([classifier.features(part) for part in x.split(500)]) for x in (x0, x_test, train_half[:n])]
    return ({} if y is None else {"accuracy": accuracy(classifier, x0, y)}) | {
        "frechet": round(frechet_distance(features[0], features[1]), 3),
        "floor": round(frechet_distance(features[2], features[1]), 3),
    }


def _test_loss(model, config, x0, y):
    """Mean training loss of test images."""
    cond = {"y": y[: len(x0)]} if config.net.get("n_classes") else {}
    recipe, generator = config.make_recipe(), torch.Generator().manual_seed(0)
    batch = draw_batch(copy.deepcopy(model.process).cpu(), replace(recipe, p_drop=0.0), generator, x0, **cond)
    device, losses = next(model.parameters()).device, []
    for i in range(0, len(x0), 100):
        part = {name: value[i : i + 100].to(device) for name, value in batch.items()}
        losses.append(batch_loss(model, recipe, part))
    return round(torch.cat(losses).mean().item(), 4)


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
