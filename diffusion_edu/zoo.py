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
from pathlib import Path

import torch
from torch import nn

from . import checks, data
from .checkpoint import load_weights, read_card, save_weights
from .denoiser import READINGS, Denoiser
from .guidance import classifier_free
from .metrics import frechet_distance
from .nets.classifier import Classifier
from .nets.mlp import MLP
from .nets.unet import UNet
from .process import VE, VESDE, VPSDE, SubVPSDE, uniform_log_snr
from .samplers import make_dpmpp_2m_step, noises, sample
from .training import Recipe, averaged, fit, fit_classifier, log_normal_times

NETS = {"UNet": UNet, "MLP": MLP, "Classifier": Classifier}
PROCESSES = {"VPSDE": VPSDE, "SubVPSDE": SubVPSDE, "VESDE": VESDE, "VE": VE}
TIMES = {"log_normal_times": log_normal_times}
CONFIGS = Path(__file__).parent / "configs"


@dataclass(frozen=True)
class Config:
    """What a stored network is made from; the tables keep the arguments of what they name by ``kind``.

    Attributes
    ----------
    about : str
        One sentence for the card.
    net : dict
        ``kind`` (UNet, MLP or Classifier) and its arguments.
    recipe : dict
        Arguments of `Recipe`; ``sample_t`` may be a table with ``kind = "log_normal_times"``.
    process : dict or None
        ``kind`` and arguments of a process in continuous time; None for a classifier.
    predicts : {"v", "eps", "x0", "score"}
    ema : float
        Decay of the weight average; 0 keeps the raw weights.
    """

    about: str
    net: dict
    recipe: dict
    process: dict | None = None
    predicts: str = "v"
    ema: float = 0.0

    def __post_init__(self):
        checks.real("ema", self.ema, low=0, high=1)
        checks.one_of("predicts", self.predicts, tuple(READINGS))
        self.make_recipe()

    def make_recipe(self):
        """The `Recipe` of the table."""
        table = dict(self.recipe)
        if "sample_t" in table:
            table["sample_t"] = _make("recipe.sample_t", table["sample_t"], TIMES)
        return _call("recipe", Recipe, table)

    def make_model(self):
        """The untrained model: a `Denoiser` on its process, or a classifier. Its weights follow the recipe's seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.make_recipe().seed)
            net = _make("net", self.net, NETS)
        return net if self.process is None else Denoiser(net, _make("process", self.process, PROCESSES), self.predicts)


def _make(where, table, kinds):
    """Call what the table's ``kind`` names with the rest of the table."""
    if not isinstance(table, dict):
        checks.fail(where, "be a table with the key 'kind'", repr(table), TypeError)
    table = dict(table)
    return _call(where, kinds[checks.one_of(f"{where}.kind", table.pop("kind", None), tuple(kinds))], table)


def _call(where, function, table):
    """``function(**table)``; an unknown key is refused with a suggestion."""
    for key in table:
        checks.one_of(f"key in {where}", key, tuple(inspect.signature(function).parameters))
    for name, parameter in inspect.signature(function).parameters.items():
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
    denoiser = config.process is not None
    judge = load("digits_classifier") if denoiser else None  # a missing judge is told before the training
    losses = fit(model, x0, recipe, ema=ema, y=y) if denoiser else fit_classifier(model, x0, y, recipe)
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


@torch.no_grad()
def evaluate(model, classifier=None):
    """The headline metrics that a card holds: of 900 unguided samples, or of a classifier on the test half.

    900, because the Fréchet distance falls with the number of samples and the train half, its floor, has 901.

    Returns
    -------
    dict
        ``accuracy`` : share of samples (or test digits) that the classifier names as asked;
        ``frechet`` : Fréchet distance of the classifier's features, samples against the test half;
        ``floor`` : the same for the train half against the test half.
    """
    x_test, y_test = data.digits("test")
    if not isinstance(model, Denoiser):
        return {"accuracy": accuracy(model, x_test, y_test)}
    classifier = classifier or load("digits_classifier")
    y = torch.arange(900) % 10
    x0 = draw(model, y, n_steps=12)
    real, train_half = classifier.features(x_test), classifier.features(data.digits("train")[0])
    return {
        "accuracy": accuracy(classifier, x0, y),
        "frechet": round(frechet_distance(classifier.features(x0), real), 3),
        "floor": round(frechet_distance(train_half, real), 3),
    }


@torch.no_grad()
def accuracy(classifier: nn.Module, x, y):
    """Share of the images that the classifier names as labelled."""
    return round((classifier(x).argmax(1) == y).double().mean().item(), 4)
