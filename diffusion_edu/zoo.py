"""Trained networks that the notebooks sample from: one config each, one command, one card.

A config is a TOML file: ``diffusion-edu train digits_unet -o data/zoo/digits_unet`` makes the network of
``configs/digits_unet.toml``. ``load`` finds it again and needs no config: the card holds it.
"""

import inspect
import math
import os
import platform
import sys
import time
import tomllib
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import nn

from . import checks, data
from .bits import bits_per_dim, dequantize
from .checkpoint import load_weights, read_card, save_weights
from .denoiser import READINGS, Denoiser
from .elbo import bound_term, hybrid_loss
from .guidance import classifier_free
from .likelihood import ode_log_prob, probes
from .metrics import frechet_distance
from .nets.classifier import Classifier
from .nets.mlp import MLP
from .nets.unet import UNet
from .process import VE, VESDE, VPSDE, DiscreteVP, SubVPSDE, terminal_kl, uniform_log_snr
from .samplers import learned, make_ddpm_step, make_dpmpp_2m_step, make_langevin_step, noises, sample
from .schedules import cosine_beta, geometric_sigmas, linear_beta, quadratic_beta, sigmoid_beta
from .training import Recipe, averaged, dequantized, fit, fit_classifier, fit_vae, level_times, log_normal_times
from .vae import HVAE, make_hvae

BETAS = {"linear": linear_beta, "cosine": cosine_beta, "quadratic": quadratic_beta, "sigmoid": sigmoid_beta}


def table(beta, **arguments):
    """`DiscreteVP` on the named schedule, such as ``beta = "cosine"``, with the schedule's arguments."""
    return DiscreteVP(_call("process", BETAS[checks.one_of("process.beta", beta, tuple(BETAS))], arguments))


def hybrid(vlb_weight=1e-3, levels=None):
    """`elbo.hybrid_loss` with these arguments."""
    return partial(hybrid_loss, vlb_weight=vlb_weight, levels=levels)


NETS = {"UNet": UNet, "MLP": MLP, "Classifier": Classifier, "HVAE": make_hvae}
PROCESSES = {"VPSDE": VPSDE, "SubVPSDE": SubVPSDE, "VESDE": VESDE, "VE": VE, "DiscreteVP": table}
TIMES = {"log_normal_times": log_normal_times, "level_times": level_times}
AUGMENTS = {"dequantized": dequantized}
LOSSES = {"hybrid_loss": hybrid}
CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Config:
    """What a stored network is made from; the tables keep the arguments of what they name by ``kind``.

    Attributes
    ----------
    about : str
        One sentence for the card.
    net : dict
        ``kind`` (UNet, MLP, Classifier or HVAE) and its arguments.
    recipe : dict
        Arguments of `Recipe`; ``sample_t`` may be a table with ``kind = "log_normal_times"``, ``loss`` one with
        ``kind = "hybrid_loss"``, ``augment`` one with ``kind = "dequantized"``.
    process : dict or None
        ``kind`` and arguments of a process, for DiscreteVP the name of its ``beta``; None for a classifier or an HVAE.
    predicts : {"v", "eps", "x0", "score"}
    learned_variance : bool
        Whether the network says the variance, too.
    ema : float
        Decay of the weight average; 0 keeps the raw weights.
    """

    about: str
    net: dict
    recipe: dict
    process: dict | None = None
    predicts: str = "v"
    ema: float = 0.0
    learned_variance: bool = False

    def __post_init__(self):
        checks.real("ema", self.ema, low=0, high=1)
        checks.one_of("predicts", self.predicts, tuple(READINGS))
        self.make_recipe()

    def make_recipe(self):
        """The `Recipe` of the table."""
        table = dict(self.recipe)
        if "sample_t" in table:
            table["sample_t"] = _make("recipe.sample_t", table["sample_t"], TIMES)
        if "loss" in table:
            table["loss"] = _make("recipe.loss", table["loss"], LOSSES)
        if "augment" in table:
            table["augment"] = _make("recipe.augment", table["augment"], AUGMENTS)
        return _call("recipe", Recipe, table)

    def make_model(self):
        """The untrained `Denoiser`, classifier or HVAE; its weights follow the recipe's seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.make_recipe().seed)
            net = _make("net", self.net, NETS)
        if self.process is None:
            return net
        return Denoiser(net, _make("process", self.process, PROCESSES), self.predicts, self.learned_variance)


def _make(where, table, kinds):
    """Call what the table's ``kind`` names with the rest of the table."""
    if not isinstance(table, dict):
        checks.fail(where, "be a table with the key 'kind'", repr(table), TypeError)
    table = dict(table)
    return _call(where, kinds[checks.one_of(f"{where}.kind", table.pop("kind", None), tuple(kinds))], table)


def _call(where, function, table):
    """``function(**table)``; an unknown key is refused with a suggestion."""
    named = {n: p for n, p in inspect.signature(function).parameters.items() if p.kind is not p.VAR_KEYWORD}
    for key in table if len(named) == len(inspect.signature(function).parameters) else ():
        checks.one_of(f"key in {where}", key, tuple(named))
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in table:
            checks.fail(where, f"have the key {name!r}", f"only {', '.join(table) or 'nothing'}")
    return function(**table)


def read_config(source):
    """The `Config` of a shipped name (``digits_unet``) or of a path to a TOML file."""
    path = Path(source)
    if path.suffix != ".toml":
        shipped = sorted(p.stem for p in CONFIGS.glob("*.toml"))
        path = CONFIGS / f"{checks.one_of('config', str(source), tuple(shipped))}.toml"
    elif not path.is_file():
        raise FileNotFoundError(f"config {path} does not exist")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path} is not valid TOML: {error}") from None
    for field in fields(Config)[:3]:
        if field.name not in table:
            checks.fail(f"config {path.name}", f"have the key {field.name!r}", f"only {', '.join(table) or 'nothing'}")
    return _call("config", Config, table)


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
    if isinstance(model, Denoiser):
        cond = {"y": y} if config.net.get("n_classes") else {}
        losses = fit(model, x0, recipe, ema=ema, **cond)
    elif isinstance(model, HVAE):
        losses = fit_vae(model, x0, recipe, ema=ema)
    else:
        losses = fit_classifier(model, x0, y, recipe)
    start = time.perf_counter()
    for _ in tqdm(losses, total=recipe.n_steps, desc=Path(out).name, unit="step"):
        pass
    minutes = (time.perf_counter() - start) / 60
    model = (ema.module if ema else model).eval()
    card = {
        "config": asdict(config),
        "seed": recipe.seed,
        "steps": recipe.n_steps,
        "hardware": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "minutes": round(minutes, 2),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "metrics": evaluate(model, judge),
    }
    card = read_card(save_weights(out, model, card))
    print(f"{out}: {card['metrics']}", file=sys.stderr)
    return card


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
    config = _call("config", Config, read_card(folder)["config"])
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


def draw(model, y, w=1.0, n_steps=16, seed=0):
    """Digits of the given classes: DPM-Solver++(2M) in uniform log SNR steps from T down to std / scale = 0.02.

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
    process, noise = model.process, noises(seed)
    t_min = process.time_of(torch.tensor(-2 * math.log(0.02), dtype=torch.float64)).item()
    times = process.grid(n_steps, uniform_log_snr(t_min))
    guided = classifier_free(model, w, y=y)
    *_, x0 = sample(make_dpmpp_2m_step(), guided, process.prior((len(y), 1, 8, 8), noise), times, noise)
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
def evaluate(model, classifier=None):
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
        VP model -log2 p itself, of the first 100 test digits, dequantised (see `density_bits`).
    """
    x_test, y_test = data.digits("test")
    if isinstance(model, HVAE):
        nats = torch.stack([-model.elbo(x_test, noise) for noise in map(noises, range(64))])
        return {"bits_per_dim": round(bits_per_dim(nats.double().mean().item(), 64), 4)}
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
    x0 = draw(model, y, n_steps=12)
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
