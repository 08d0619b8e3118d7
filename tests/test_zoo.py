"""The stored networks do what their cards say, and a config says exactly what it may."""

import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import ones_like as ones
from torch import zeros_like as zeros

from diffusion_edu import commands, zoo
from diffusion_edu.bits import bits_per_dim
from diffusion_edu.config import Config, read_config
from diffusion_edu.denoiser import Denoiser, EDMDenoiser
from diffusion_edu.distill import fit_student
from diffusion_edu.elbo import bound_terms, hybrid_loss
from diffusion_edu.guidance import Wrapped, bind
from diffusion_edu.losses import snr_plus_one_weight
from diffusion_edu.metrics import frechet_distance
from diffusion_edu.nets.unet import UNet
from diffusion_edu.oracles import GaussianOracle
from diffusion_edu.process import VE, VPSDE, DiscreteVP
from diffusion_edu.samplers import beta, beta_tilde, ddim_step, learned, make_ddpm_step, noises, sample
from diffusion_edu.schedules import cosine_beta, linear_beta
from diffusion_edu.training import fit
from diffusion_edu.vae import HVAE, VAE

DATA = Path(__file__).parent.parent / "data"
NAMES = sorted(path.parent.name for path in (DATA / "zoo").glob("*/card.json"))
ABLATED = [name for name in NAMES if name.startswith(("digits_small", "digits_no_"))]

TINY = """
about = "tiny"
ema = 0.5
[net]
kind = "UNet"
width = 8
n_classes = 10
[process]
kind = "VPSDE"
[recipe]
n_steps = 2
batch_size = 4
p_drop = 0.1
sample_t = { kind = "log_normal_times", mean = -0.5 }
"""

VARIANCE = """
about = "learned variance on a table"
predicts = "eps"
learned_variance = true
[net]
kind = "UNet"
width = 8
out_channels = 2
[process]
kind = "DiscreteVP"
beta = "cosine"
T = 10
s = 0.01
[recipe]
n_steps = 2
batch_size = 4
loss = { kind = "hybrid_loss", vlb_weight = 0.01, levels = 17 }
"""

STEPS = {"teacher_steps": 64, "steps": 4}  # of digits_student

LATENT = """
about = "two latents"
[net]
kind = "HVAE"
latents = [3, 2]
width = 8
levels = 17
[recipe]
n_steps = 2
batch_size = 4
"""


STUDENT = """
about = "two-step student"
[net]
kind = "UNet"
width = 8
n_classes = 10
[process]
kind = "VPSDE"
[recipe]
n_steps = 3
batch_size = 4
weight = "snr_plus_one_weight"
[distill]
teacher = "tiny"
teacher_steps = 8
steps = 2
"""


@pytest.fixture(autouse=True)
def shipped_zoo(monkeypatch):
    """Not another zoo that is set; data sets may stay where they are."""
    if (Path(os.environ.get("DIFFUSION_EDU_DATA", "")) / "zoo").is_dir():
        monkeypatch.delenv("DIFFUSION_EDU_DATA", raising=False)


@pytest.mark.parametrize("name", NAMES)
def test_each_network_does_what_its_card_says(name):
    card = zoo.read_card(zoo.folder_of(name))
    model, config = zoo.open_folder(zoo.folder_of(name))
    try:
        metrics = zoo.evaluate(model, config)
    except FileNotFoundError as error:  # no data/ but the shipped one
        pytest.skip(str(error))
    assert metrics.keys() == card["metrics"].keys()
    # a CPU that rounds otherwise may flip a few of the 900 samples; a bound in float32 moves by less than its 4 digits
    for key, tol in (("accuracy", 0.006), ("confident", 0.015), ("bits_per_dim", 0.001)):  # 5 of 900, 3 of 200
        assert abs(metrics.get(key, 0) - card["metrics"].get(key, 0)) <= tol
    if "frechet" in metrics:
        assert metrics["frechet"] == pytest.approx(card["metrics"]["frechet"], rel=0.05)
    for key in ("config", "seed", "steps", "hardware", "minutes", "sha256"):
        assert key in card


def test_the_main_networks_are_good():
    unet = zoo.read_card(zoo.folder_of("digits_unet"))["metrics"]
    assert unet["accuracy"] >= 0.95 and unet["frechet"] < 2 * unet["floor"]
    assert zoo.read_card(zoo.folder_of("digits_classifier"))["metrics"]["accuracy"] >= 0.98
    ncsn = zoo.read_card(zoo.folder_of("digits_ncsn"))["metrics"]
    assert ncsn["confident"] >= 0.9 and ncsn["frechet"] < 1.5 * ncsn["floor"]


def test_ncsn_walks_down_the_levels_that_it_was_trained_on():
    seen, times = [], read_config("digits_ncsn").make_recipe().sample_t(VE(), 500, torch.Generator().manual_seed(0))
    bell = GaussianOracle(VE(), 0.0, 0.2)

    def told(x, t):
        seen.append(t)
        return bell(x, t)

    told.process = bell.process
    x0 = zoo.walk(told, 5, n_steps=2)
    assert x0.shape == (5, 1, 8, 8) and x0.abs().max() <= 1 and torch.equal(x0, zoo.walk(bell, 5, n_steps=2))
    assert torch.equal(torch.stack(seen[::2]), times.unique().flip(0)) and len(seen) == 24
    assert not torch.equal(x0, zoo.walk(bell, 5, n_steps=2, seed=1))


@pytest.mark.parametrize("n_steps", [1000, 50])
def test_the_learned_variance_saves_bits_over_both_fixed_ones(n_steps):
    model, x0, said = zoo.load("digits_variance"), zoo.data.digits("test")[0][:200], []

    def told(x_t, t):  # all three variances on the same answers of the network
        told.i += 1
        if told.i > len(said):
            said.append(model(x_t, t))
        return said[told.i - 1]

    told.process, bits = model.process, []
    for variance in (learned, beta, beta_tilde):
        told.i = 0
        bits.append(zoo.bound_bits(make_ddpm_step(variance), told, x0, n_steps, n_draws=4))
    for fixed in bits[1:]:
        saved = fixed - bits[0]
        assert saved.mean() > 0.05 and saved.mean() > 8 * saved.std() / 200**0.5


def test_a_thousand_learned_steps_need_fewer_bits_than_the_vae():
    chain, vae = (zoo.read_card(zoo.folder_of(f"digits_{n}"))["metrics"]["bits_per_dim"] for n in ("variance", "vae"))
    assert chain < 1.9 < vae < 2.1 < math.log2(17)


@pytest.mark.parametrize("name", NAMES)
def test_each_network_is_made_by_its_shipped_config(name):
    stored = zoo.read_card(zoo.folder_of(name))["config"]  # perhaps of a time when a config had fewer fields
    assert Config(**stored) == read_config(name)


def test_the_zoo_is_small_and_the_ablations_had_one_budget():
    sizes = [path.stat().st_size for path in (DATA / "zoo").glob("*/weights.safetensors")]
    assert max(sizes) < 8e6 and sum(sizes) < 60e6
    recipes = [read_config(name).recipe for name in ABLATED]
    assert len(recipes) >= 5 and all(recipe == recipes[0] for recipe in recipes)


def test_no_ema_is_the_same_run_without_the_average():
    small, raw = read_config("digits_small"), read_config("digits_no_ema")
    assert small.net == raw.net and (small.ema, raw.ema) == (0.99, 0.0)


def test_train_stores_what_load_finds(tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.toml").write_text(TINY)
    monkeypatch.setattr(commands, "evaluate", lambda model, config: {"frechet": 1.0})
    card = commands.train(tmp_path / "tiny.toml", tmp_path / "zoo" / "tiny")
    again = commands.train(tmp_path / "tiny.toml", tmp_path / "again")
    assert again["sha256"] == card["sha256"]
    assert "tiny" in capsys.readouterr().err
    monkeypatch.setenv("DIFFUSION_EDU_DATA", str(tmp_path))
    model = zoo.load("tiny")
    assert isinstance(model, Denoiser) and not model.training and card["metrics"] == {"frechet": 1.0}
    with pytest.raises(ValueError, match=r"name must be one of 'tiny'; got 'tin' \(did you mean 'tiny'\?\)"):
        zoo.load("tin")
    with pytest.raises(ValueError, match="name must be one of"):
        zoo.load("../zoo/tiny")
    monkeypatch.setenv("DIFFUSION_EDU_DATA", str(tmp_path / "nowhere"))
    assert zoo.folder_of("digits_unet") == DATA / "zoo" / "digits_unet"  # data sets there, but the shipped zoo
    monkeypatch.setattr(zoo, "__file__", str(tmp_path / "nowhere" / "diffusion_edu" / "zoo.py"))
    with pytest.raises(FileNotFoundError, match="set DIFFUSION_EDU_DATA to the folder that holds zoo/"):
        zoo.load("tiny")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("n_steps", "n_stepz", "key in recipe must be one of .*; got 'n_stepz' .did you mean 'n_steps'"),
        ("width", "widht", "did you mean 'width'"),
        ("ema", "emma", "did you mean 'ema'"),
        ("mean = -0.5", "meen = 1", "key in recipe.sample_t must be one of 'mean', 'std'"),
        ('kind = "UNet"', 'kind = "Unet"', "net.kind must be one of .*'HVAE'; got 'Unet' .did you mean 'UNet'"),
        ("[recipe]", "[recipes]", "config tiny.toml must have the key 'recipe'"),
        ("n_steps = 2", "n_steps = -2", "n_steps must be at least 0"),
        ("n_steps = 2", "n_steps = [", "is not valid TOML"),
        ("ema = 0.5", "ema = 1.5", "ema must be in"),
    ],
)
def test_config_mistakes_are_named(tmp_path, old, new, message):
    (tmp_path / "tiny.toml").write_text(TINY.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "tiny.toml").make_model()


@pytest.mark.parametrize(
    ("config", "old", "new", "message"),
    [
        (VARIANCE, "learned_variance", "learned_varience", "key in config must be .*did you mean 'learned_variance'"),
        (VARIANCE, '"cosine"', '"cosin"', "process.beta must be one of .*; got 'cosin' .did you mean 'cosine'"),
        (VARIANCE, 'beta = "cosine"', "", "process must have the key 'beta'; got only T, s"),
        (VARIANCE, "s = 0.01", "max_bta = 0.9", "key in process must be one of .*did you mean 'max_beta'"),
        (VARIANCE, "T = 10\n", "T = 0\n", "T must be at least 1|T must be in"),
        (
            VARIANCE,
            '"hybrid_loss"',
            '"hybrid"',
            "recipe.loss.kind must be one of .*; got 'hybrid' .did you mean 'hybrid_loss'",
        ),
        (VARIANCE, "vlb_weight", "vlb_wieght", "key in recipe.loss must be one of .*did you mean 'vlb_weight'"),
        (VARIANCE, '"eps"', '"epsilon"', "predicts must be one of .*; got 'epsilon'"),
        (LATENT, "latents", "latent", "key in net must be one of .*; got 'latent' .did you mean 'latents'"),
        (LATENT, "latents = [3, 2]", "", "net must have the key 'latents'"),
        (LATENT, "[3, 2]", "16", r"latents must be a list of dimensions, such as \[16, 8\]; got 16"),
        (LATENT, "[3, 2]", "[]", "latents must be a list of dimensions"),
        (LATENT, "[3, 2]", "[3, 0]", "out_shape must be at least 1; got 0"),
        (LATENT, "levels = 17", "levels = 1", "levels must be at least 2; got 1"),
    ],
)
def test_mistakes_in_tables_variances_and_latents_are_named(tmp_path, config, old, new, message):
    assert old in config
    (tmp_path / "tiny.toml").write_text(config.replace(old, new))
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "tiny.toml").make_model()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps = 2", "", "distill must have the key 'steps'"),
        ('teacher = "tiny"', "", "distill must have the key 'teacher'"),
        ("teacher_steps", "teacher_step", "key in distill must be one of .*did you mean 'teacher_steps'"),
        (
            "teacher_steps = 8",
            "teacher_steps = 12",
            "distill.teacher_steps must be 2 steps doubled a few times; got 12",
        ),
        ("teacher_steps = 8", "teacher_steps = 7", "distill.teacher_steps must be 2 steps doubled a few times; got 7"),
        ("teacher_steps = 8", "teacher_steps = 2", "distill.teacher_steps must be at least 4; got 2"),
        ("steps = 2", "steps = 0", "distill.steps must be at least 1; got 0"),
        (
            '"snr_plus_one_weight"',
            '"snr_plus_one"',
            "recipe.weight must be one of .*did you mean 'snr_plus_one_weight'",
        ),
        ("[net]", "ema = 0.9\n[net]", "ema must be 0 for a student: it is not averaged; got 0.9"),
    ],
)
def test_mistakes_in_a_students_config_are_named(tmp_path, old, new, message):
    assert STUDENT.count(old) >= 1
    (tmp_path / "student.toml").write_text(STUDENT.replace(old, new) if old != "steps = 2" else STUDENT[:-10] + new)
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path / "student.toml")


def test_a_student_starts_from_its_teacher_and_is_trained_round_by_round(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_EDU_DATA", str(tmp_path))
    said = {}
    monkeypatch.setattr(
        commands, "evaluate", lambda model, config: said.update(config.distill or {}) or {"frechet": 1.0}
    )
    (tmp_path / "tiny.toml").write_text(TINY)
    (tmp_path / "student.toml").write_text(STUDENT)
    commands.train(tmp_path / "tiny.toml", tmp_path / "zoo" / "tiny")
    card = commands.train(tmp_path / "student.toml", tmp_path / "zoo" / "student")
    assert card["steps"] == 2 * 3 and said == card["config"]["distill"]
    assert said == {"teacher": "tiny", "teacher_steps": 8, "steps": 2}

    teacher, student = zoo.load("tiny"), zoo.load("student")
    (x0, y), recipe = zoo.data.digits("train"), read_config(tmp_path / "student.toml").make_recipe()
    assert recipe.weight is snr_plus_one_weight and recipe.n_steps == 3
    list(fit_student(teacher, x0, recipe, zoo.digit_grid(VPSDE(), 8), 2, y=y))  # changes what was loaded, in place
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(zoo.load("tiny").parameters(), student.parameters(), strict=True))


def test_students_draw_on_every_kth_time_of_their_teachers_grid():
    oracle, asked = GaussianOracle(VPSDE(), 0.1, 0.2), []

    def told(model, x, t, y):
        asked.append((t, y))
        return model(x, t)

    y = torch.arange(5)
    x0 = zoo.student_draw(Wrapped(told, oracle), y, STEPS, seed=3)
    grid = zoo.digit_grid(oracle.process, 64)
    assert torch.equal(torch.stack([t for t, _ in asked]), grid[:-1:16]) and all(c is y for _, c in asked)
    x_T = oracle.process.prior((5, 1, 8, 8), noises(3))
    *_, by_hand = sample(ddim_step, oracle, x_T, grid[::16])
    assert torch.equal(x0, by_hand.clamp(-1, 1)) and x0.shape == (5, 1, 8, 8)
    assert not torch.equal(x0, zoo.student_draw(bind(oracle), y, STEPS, seed=4))


def test_the_grid_for_digits_ends_at_a_fiftieth_whatever_the_default_dtype():
    for process in (VPSDE(), VE(), DiscreteVP(linear_beta(1000))):
        grid = zoo.digit_grid(process, 12)
        assert len(grid) == 13 and grid[0] == process.T and grid[-1] == 0
        scale, std = process.marginal(grid[-2])
        assert (std / scale).item() == pytest.approx(0.02, rel=0.1 if process.discrete else 1e-9)  # whole times
        gaps = process.log_snr(grid[:-1]).diff()
        assert process.discrete or gaps.max() - gaps.min() < 1e-9
    plain = zoo.digit_grid(VPSDE(), 12)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(zoo.digit_grid(VPSDE(), 12), plain)
    finally:
        torch.set_default_dtype(torch.float32)


def features(judge, x0):
    with torch.no_grad():
        return judge.features(x0)


def test_ten_evaluations_of_the_second_order_solver_draw_digits_as_good_as_a_hundred():
    judge, model, y = zoo.load("digits_classifier"), zoo.load("digits_unet"), torch.arange(200) % 10
    real = features(judge, zoo.data.digits("test")[0])
    few, many = (frechet_distance(features(judge, zoo.draw(model, y, n_steps=n)), real) for n in (10, 100))
    x_T = model.process.prior((200, 1, 8, 8), noises(0))
    *_, ddim = sample(ddim_step, bind(model, y=y), x_T, zoo.digit_grid(model.process, 10))
    # Of 2,000 digits and three seeds: 3.30 and 3.31, DDIM 9.35. Fewer digits, larger distances, the same order.
    assert few <= 1.1 * many and frechet_distance(features(judge, ddim.clamp(-1, 1)), real) > 1.4 * many


def test_the_four_step_student_is_near_its_teacher_of_64_steps():
    judge, teacher, y = zoo.load("digits_classifier"), zoo.load("digits_unet"), torch.arange(200) % 10
    x_T, grid = teacher.process.prior((200, 1, 8, 8), noises(0)), zoo.digit_grid(teacher.process, 64)
    *_, whole = sample(ddim_step, bind(teacher, y=y), x_T, grid)
    *_, hasty = sample(ddim_step, bind(teacher, y=y), x_T, grid[::16])
    student = zoo.student_draw(zoo.load("digits_student"), y, STEPS, seed=0)
    real = features(judge, zoo.data.digits("test")[0])
    score = [frechet_distance(features(judge, x.clamp(-1, 1)), real) for x in (whole, hasty, student)]
    # Of 900 digits and three seeds: 4.61 and 4.17, ratios 1.10 to 1.11. Fewer digits, larger distances.
    assert score[2] < 1.15 * score[0] and score[1] > 2 * score[0]
    apart = [(x.clamp(-1, 1) - whole.clamp(-1, 1)).abs().mean() for x in (hasty, student)]
    assert apart[1] < apart[0] / 2  # and from the same noise it draws nearly the same digit


def test_a_table_and_a_loss_are_what_they_are_called(tmp_path):
    (tmp_path / "tiny.toml").write_text(VARIANCE)
    config = read_config(tmp_path / "tiny.toml")
    model, recipe = config.make_model(), config.make_recipe()
    assert torch.equal(model.process.beta, cosine_beta(10, s=0.01))
    assert model.learned_variance and model.predicts == "eps"
    assert recipe.loss.func is hybrid_loss and recipe.loss.keywords == {"vlb_weight": 0.01, "levels": 17}
    x0 = zoo.data.digits("train")[0]
    assert len(list(fit(model, x0, recipe))) == 2
    assert zoo.bound_bits(make_ddpm_step(learned), model, x0[:3], n_steps=4, n_draws=2).isfinite().all()


def test_latent_models_are_made_trained_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setattr(zoo, "noises", lambda seed: zeros if seed else ones)  # 64 draws, but two that differ
    for latents, kind in (("[3, 2]", HVAE), ("[4]", VAE)):
        (tmp_path / "tiny.toml").write_text(LATENT.replace("[3, 2]", latents))
        card = commands.train(tmp_path / "tiny.toml", tmp_path / "zoo" / "tiny")
        monkeypatch.setenv("DIFFUSION_EDU_DATA", str(tmp_path))
        model = zoo.load("tiny")
        assert type(model) is kind and not model.training and model.levels == 17
        x = zoo.data.digits("test")[0]
        with torch.no_grad():
            nats = (-model.elbo(x, ones) - 63 * model.elbo(x, zeros)).double().mean().item() / 64
        assert card["metrics"] == {"bits_per_dim": round(nats / 64 / math.log(2), 4)}


def test_the_bound_at_a_few_times_is_the_bound_of_all():
    process = DiscreteVP(linear_beta(10, 0.1, 0.7))
    model, step = GaussianOracle(process, -0.4, 0.3), make_ddpm_step(beta)
    x0 = zoo.data.digits("test")[0][:1].double().expand(2000, 1, 8, 8)
    few = zoo.bound_bits(step, model, x0, n_steps=10, n_draws=2)
    whole = bits_per_dim(sum(bound_terms(step, model, x0, process.grid(10), noises(1), levels=17)), 64)
    error = (few.var() + whole.var()).sqrt() / 2000**0.5
    assert (few.mean() - whole.mean()).abs() < 5 * error < 0.05
    one = zoo.bound_bits(step, model, x0[:3], n_steps=1)
    alone = bits_per_dim(sum(bound_terms(step, model, x0[:3], process.grid(1), noises(0), levels=17)), 64)
    torch.testing.assert_close(one, alone, rtol=1e-12, atol=0)


def test_unknown_configs_are_told_apart():
    with pytest.raises(ValueError, match="did you mean 'digits_unet'"):
        read_config("digits_unt")
    with pytest.raises(FileNotFoundError, match="config nowhere.toml does not exist"):
        read_config("nowhere.toml")


def test_draw_is_clipped_seeded_and_conditional():
    model = zoo.load("digits_unet")
    y = torch.arange(20) % 10
    x0 = zoo.draw(model, y, w=2.0, n_steps=8, seed=1)
    assert x0.shape == (20, 1, 8, 8) and x0.abs().max() <= 1
    assert torch.equal(x0, zoo.draw(model, y, w=2.0, n_steps=8, seed=1))
    assert zoo.accuracy(zoo.load("digits_classifier"), x0, y) >= 0.9


@pytest.mark.parametrize("process", [VPSDE(), VE(), DiscreteVP(cosine_beta(200))], ids=lambda p: type(p).__name__)
def test_images_of_any_shape_and_process_are_drawn(process):
    torch.manual_seed(0)
    model = Denoiser(UNet(3, width=8), process, "v")
    x0 = zoo.draw(model, 3, n_steps=5, shape=(3, 16, 16))
    assert x0.shape == (3, 3, 16, 16) and x0.isfinite().all() and x0.abs().max() <= 1
    assert torch.equal(x0, zoo.draw(model, 3, n_steps=5, shape=(3, 16, 16)))
    edm = EDMDenoiser(UNet(3, width=8), process)  # a silent network: the samples are those of a bell of std 0.5
    flat = zoo.draw(edm, 100, n_steps=18, shape=(3, 4, 4))
    assert abs(flat.std() - 0.5) < 0.03  # 4 standard errors of 4,800 numbers are 0.02; 5 % lie beyond 1 and are cut


def test_samples_are_measured_by_a_judge_with_classes_or_without(monkeypatch):
    class Judge(torch.nn.Module):
        """Looks at the mean of the image."""

        def features(self, x):
            return x.mean((2, 3)).repeat(1, 2)

        def forward(self, x):
            return torch.nn.functional.one_hot((x.mean((1, 2, 3)) > 0).long(), 2).float()

    monkeypatch.setattr(zoo, "load", lambda name: Judge())
    half = torch.linspace(-1, 1, 40)[:, None, None, None].expand(40, 1, 4, 4)
    monkeypatch.setattr(Config, "load_data", lambda self, split: (half, None))
    y_seen, config = [], read_config("fashion")

    def drawn(model, y, n_steps, shape):
        y_seen.append(y)
        assert shape == (1, 4, 4)
        n = y if isinstance(y, int) else len(y)
        return half[:n] if isinstance(y, int) else (2.0 * y - 1)[:, None, None, None].expand(n, 1, 4, 4)

    monkeypatch.setattr(zoo, "draw", drawn)
    for n_classes in (2, None):
        found = zoo.evaluate(
            Denoiser(UNet(width=8), VPSDE()), replace(config, net=config.net | {"n_classes": n_classes}), n=40
        )
        if n_classes:
            assert torch.equal(y_seen[-1], torch.arange(40) % 2) and found["accuracy"] == 1.0 and found["frechet"] > 0.1
        else:
            assert y_seen[-1] == 40 and "accuracy" not in found and found["frechet"] == pytest.approx(0, abs=1e-3)
        assert found["floor"] == pytest.approx(0, abs=1e-3)
