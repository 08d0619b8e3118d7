"""What a stored network is made from: a TOML file, read into one frozen dataclass that knows how to build it."""

import inspect
import tomllib
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch

from . import checks
from .denoiser import READINGS, Denoiser, NoisyClassifier
from .elbo import hybrid_loss
from .losses import classifier_loss, snr_plus_one_weight, truncated_snr_weight
from .nets.classifier import Classifier
from .nets.mlp import MLP
from .nets.unet import UNet
from .process import VE, VESDE, VPSDE, DiscreteVP, SubVPSDE
from .schedules import cosine_beta, linear_beta, quadratic_beta, sigmoid_beta
from .training import Recipe, dequantized, level_times, log_normal_times
from .vae import make_hvae

BETAS = {"linear": linear_beta, "cosine": cosine_beta, "quadratic": quadratic_beta, "sigmoid": sigmoid_beta}


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


NETS = {"UNet": UNet, "MLP": MLP, "Classifier": Classifier, "HVAE": make_hvae}
PROCESSES = {"VPSDE": VPSDE, "SubVPSDE": SubVPSDE, "VESDE": VESDE, "VE": VE, "DiscreteVP": table}
TIMES = {"log_normal_times": log_normal_times, "level_times": level_times}
AUGMENTS = {"dequantized": dequantized}
LOSSES = {"hybrid_loss": hybrid, "classifier_loss": lambda: classifier_loss}
WEIGHTS = {"truncated_snr_weight": truncated_snr_weight, "snr_plus_one_weight": snr_plus_one_weight}
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
        ``kind`` and arguments of a process, for DiscreteVP the name of its ``beta``; None for an HVAE or a classifier
        of clean images. With one, a Classifier is a `NoisyClassifier`.
    predicts : {"v", "eps", "x0", "score"}
    learned_variance : bool
        Whether the network says the variance, too.
    ema : float
        Decay of the weight average; 0 keeps the raw weights.
    distill : dict or None
        Of a student: ``teacher`` (a name of the zoo, whose weights it starts from), ``teacher_steps`` and ``steps``, a
        power of two less; the recipe is that of each round, its ``weight`` a name.
    """

    about: str
    net: dict
    recipe: dict
    process: dict | None = None
    predicts: str = "v"
    ema: float = 0.0
    learned_variance: bool = False
    distill: dict | None = None

    def __post_init__(self):
        checks.real("ema", self.ema, low=0, high=1)
        checks.one_of("predicts", self.predicts, tuple(READINGS))
        self.make_recipe()
        if self.distill is not None:
            call("distill", check_student, self.distill)
            if self.ema:
                checks.fail("ema", "be 0 for a student: it is not averaged", self.ema)

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
    return call("config", Config, table)
