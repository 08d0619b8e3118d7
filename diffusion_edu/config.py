"""What a stored network is made from: a TOML file, read into one frozen dataclass that knows how to build it."""

import inspect
import tomllib
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import torch

from . import checks
from .data import cifar10, digits, fashion_mnist, photo_patches
from .denoiser import READINGS, Denoiser, EDMDenoiser, NoisyClassifier
from .elbo import hybrid_loss
from .losses import classifier_loss, edm_weight, snr_plus_one_weight, truncated_snr_weight
from .nets.classifier import Classifier
from .nets.dit import DiT
from .nets.mlp import MLP
from .nets.unet import UNet
from .process import VE, VESDE, VPSDE, DiscreteVP, SubVPSDE
from .runs import Run
from .schedules import (
    beta_from_log_snr,
    cosine_beta,
    cosine_log_snr,
    linear_beta,
    quadratic_beta,
    shift_log_snr,
    sigmoid_beta,
)
from .training import Recipe, dequantized, flipped, level_times, log_normal_times
from .vae import make_hvae


def shifted_cosine(T=1000, size=64, base=32):
    """The cosine schedule of ``base`` pixels a side, shifted for ``size``."""
    t = torch.arange(1, T + 1, dtype=torch.float64) / T
    return beta_from_log_snr(shift_log_snr(cosine_log_snr(t), size, base))


BETAS = {
    "linear": linear_beta,
    "cosine": cosine_beta,
    "quadratic": quadratic_beta,
    "sigmoid": sigmoid_beta,
    "shifted_cosine": shifted_cosine,
}


def table(beta, **arguments):
    """`DiscreteVP` on the named schedule, such as ``beta = "cosine"``, with the schedule's arguments."""
    return DiscreteVP(call("process", BETAS[checks.one_of("process.beta", beta, tuple(BETAS))], arguments))


def hybrid(vlb_weight=1e-3, levels=None):
    """`elbo.hybrid_loss` with these arguments."""
    return partial(hybrid_loss, vlb_weight=vlb_weight, levels=levels)


def check_student(teacher, teacher_steps, steps):
    """The arguments of ``distill``: the steps are the teacher's, halved a few times."""
    checks.integer("distill.steps", steps, 1)
    n = checks.integer("distill.teacher_steps", teacher_steps, 2 * steps)
    if n % steps or (n // steps).bit_count() != 1:
        checks.fail("distill.teacher_steps", f"be {steps} steps doubled a few times", n)


NETS = {"UNet": UNet, "DiT": DiT, "MLP": MLP, "Classifier": Classifier, "HVAE": make_hvae}
PROCESSES = {"VPSDE": VPSDE, "SubVPSDE": SubVPSDE, "VESDE": VESDE, "VE": VE, "DiscreteVP": table}
TIMES = {"log_normal_times": log_normal_times, "level_times": level_times}
AUGMENTS = {"dequantized": dequantized, "flipped": flipped}
LOSSES = {"hybrid_loss": hybrid, "classifier_loss": lambda: classifier_loss}
WEIGHTS = {
    "truncated_snr_weight": truncated_snr_weight,
    "snr_plus_one_weight": snr_plus_one_weight,
    "edm_weight": edm_weight(),
}
CONFIGS = Path(__file__).parent / "configs"


def _patches(split, n=20000, size=32):
    """Patches of photographs, other ones for the test."""
    return photo_patches(n if split == "train" else n // 10, size, seed=0 if split == "train" else 1), None


DATA = {"digits": digits, "fashion_mnist": fashion_mnist, "cifar10": cifar10, "photo_patches": _patches}


KINDS = {str: "text", str | None: "text", bool: "true or false", dict: "a table", dict | None: "a table"}


@dataclass(frozen=True)
class Config:
    """What a stored network is made from; the tables keep the arguments of what they name by ``kind``.

    Attributes
    ----------
    about : str
        One sentence for the card.
    net : dict
        ``kind`` (UNet, DiT, MLP, Classifier or HVAE) and its arguments.
    recipe : dict
        Arguments of `Recipe`; ``sample_t`` may be a table with ``kind = "log_normal_times"``, ``loss`` one with
        ``kind = "hybrid_loss"``, ``augment`` one with ``kind = "dequantized"``; ``weight`` is a name.
    process : dict or None
        ``kind`` and arguments of a process, for DiscreteVP the name of its ``beta``; None for an HVAE or a classifier
        of clean images. With one, a Classifier is a `NoisyClassifier`.
    predicts : {"v", "eps", "x0", "score", "edm"}
        edm is `EDMDenoiser`'s preconditioning.
    learned_variance : bool
        Whether the network says the variance, too.
    ema : float
        Decay of the weight average; 0 keeps the raw weights.
    distill : dict or None
        Of a student: ``teacher`` (a name of the zoo, whose weights it starts from), ``teacher_steps`` and ``steps``, a
        power of two less; the recipe is that of each round.
    data : dict
        ``kind`` (digits, fashion_mnist, cifar10, photo_patches) and its arguments.
    run : dict
        Arguments of `Run`: how the machine is used, for denoisers. Empty for what `training.fit` does in one go.
    judge : str or None
        The classifier of the zoo whose features measure the samples.
    """

    about: str
    net: dict
    recipe: dict
    process: dict | None = None
    predicts: str = "v"
    ema: float = 0.0
    learned_variance: bool = False
    distill: dict | None = None
    data: dict = field(default_factory=lambda: {"kind": "digits"})
    run: dict = field(default_factory=dict)
    judge: str | None = None

    def __post_init__(self):
        for key in fields(self):
            if key.type in KINDS and not isinstance(getattr(self, key.name), key.type):
                checks.fail(key.name, f"be {KINDS[key.type]}", repr(getattr(self, key.name)), TypeError)
        checks.real("ema", self.ema, low=0, high=1)
        checks.one_of("predicts", self.predicts, (*READINGS, "edm"))
        self.make_recipe()
        self.make_run()
        checks.one_of("data.kind", self.data.get("kind"), tuple(DATA))
        if self.distill is not None:
            call("distill", check_student, self.distill)
            if self.ema:
                checks.fail("ema", "be 0 for a student: it is not averaged", self.ema)
        if self.run and (self.distill or self.process is None or self.net.get("kind") == "Classifier"):
            checks.fail("run", "be left out: only denoisers train as runs", f"net.kind = {self.net.get('kind')!r}")

    def make_run(self):
        """The `Run` of the table."""
        return call("run", Run, self.run)

    def load_data(self, split):
        """(x0, y) of the train or test half; y is None where there are no classes."""
        return _make("data", self.data, {kind: partial(load, split) for kind, load in DATA.items()})

    def shape(self):
        """(C, H, W) of the images."""
        size = self.data.get("size", 32)
        shapes = {"digits": (1, 8, 8), "fashion_mnist": (1, 32, 32), "cifar10": (3, 32, 32)}
        return shapes.get(self.data["kind"], (3, size, size))

    def make_recipe(self):
        """The `Recipe` of the table."""
        table = dict(self.recipe)
        if "sample_t" in table:
            table["sample_t"] = _make("recipe.sample_t", table["sample_t"], TIMES)
        if "loss" in table:
            table["loss"] = _make("recipe.loss", table["loss"], LOSSES)
        if "augment" in table:
            table["augment"] = _make("recipe.augment", table["augment"], AUGMENTS)
        if "weight" in table:
            table["weight"] = WEIGHTS[checks.one_of("recipe.weight", table["weight"], tuple(WEIGHTS))]
        return call("recipe", Recipe, table)

    def make_model(self):
        """The untrained `Denoiser`, classifier, `NoisyClassifier` or HVAE; its weights follow the recipe's seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.make_recipe().seed)
            net = _make("net", self.net, NETS)
        if self.process is None:
            return net
        process = _make("process", self.process, PROCESSES)
        if isinstance(net, Classifier):
            return NoisyClassifier(net, process)
        if self.predicts == "edm":
            return EDMDenoiser(net, process, learned_variance=self.learned_variance)
        return Denoiser(net, process, self.predicts, self.learned_variance)


def _make(where, table, kinds):
    """Call what the table's ``kind`` names with the rest of the table."""
    if not isinstance(table, dict):
        checks.fail(where, "be a table with the key 'kind'", repr(table), TypeError)
    table = dict(table)
    return call(where, kinds[checks.one_of(f"{where}.kind", table.pop("kind", None), tuple(kinds))], table)


def call(where, function, table):
    """``function(**table)``; an unknown key is refused with a suggestion."""
    named = {n: p for n, p in inspect.signature(function).parameters.items() if p.kind is not p.VAR_KEYWORD}
    for key in table if len(named) == len(inspect.signature(function).parameters) else ():
        checks.one_of(f"key in {where}", key, tuple(named))
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in table:
            checks.fail(where, f"have the key {name!r}", f"only {', '.join(table) or 'nothing'}")
    return function(**table)


def read_config(source, changes=()):
    """The `Config` of a shipped name (``digits_unet``) or of a path to a TOML file.

    ``changes`` are strings ``key=value``, such as ``recipe.n_steps=100`` or ``run.precision=bf16``.
    """
    path = Path(source)
    if path.suffix != ".toml":
        shipped = sorted(p.stem for p in CONFIGS.glob("*.toml"))
        path = CONFIGS / f"{checks.one_of('config', str(source), tuple(shipped))}.toml"
    elif not path.is_file():
        raise FileNotFoundError(f"config {path} does not exist")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"config {path} is not valid TOML: {error}") from None
    for i, change in enumerate(changes):
        _change(table, change, {earlier.partition("=")[0] for earlier in changes[:i]})
    for key in [key.name for key in fields(Config)[:3]]:
        if key not in table:
            checks.fail(f"config {path.name}", f"have the key {key!r}", f"only {', '.join(table) or 'nothing'}")
    return call("config", Config, table)


def _change(table, change, earlier):
    """Carry out one ``key=value``; the value is TOML, or else a plain word."""
    name, equals, value = change.partition("=")
    *tables, last = name.split(".")
    if not equals or not all((*tables, last)):
        checks.fail("change", "look like recipe.n_steps=100", change)
    if name in earlier:
        checks.fail("change", "name a key once", f"{name} again")
    for key in tables:
        table = table.setdefault(key, {})
        if not isinstance(table, dict):
            checks.fail("change", f"name a table before its last dot; {key} is none", change)
    try:
        table[last] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        table[last] = value
