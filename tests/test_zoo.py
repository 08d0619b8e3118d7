"""The stored networks do what their cards say, and a config says exactly what it may."""

import json
from pathlib import Path

import pytest
import torch

from diffusion_edu import zoo
from diffusion_edu.denoiser import Denoiser

DATA = Path(__file__).parent.parent / "data"
NAMES = sorted(path.parent.name for path in (DATA / "zoo").glob("*/card.json"))
ABLATED = [name for name in NAMES if name not in ("digits_unet", "digits_classifier")]

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


@pytest.fixture(autouse=True)
def shipped_zoo(monkeypatch):
    monkeypatch.delenv("DIFFUSION_EDU_DATA", raising=False)


@pytest.mark.parametrize("name", NAMES)
def test_each_network_does_what_its_card_says(name):
    card = zoo.read_card(zoo.folder_of(name))
    metrics = zoo.evaluate(zoo.load(name))
    # a CPU that rounds otherwise may flip a few of the 900 samples
    assert abs(metrics["accuracy"] - card["metrics"]["accuracy"]) <= 0.006
    if "frechet" in metrics:
        assert metrics["frechet"] == pytest.approx(card["metrics"]["frechet"], rel=0.05)
    for key in ("config", "seed", "steps", "hardware", "minutes", "sha256"):
        assert key in card


def test_the_main_networks_are_good():
    unet = zoo.read_card(zoo.folder_of("digits_unet"))["metrics"]
    assert unet["accuracy"] >= 0.95 and unet["frechet"] < 2 * unet["floor"]
    assert zoo.read_card(zoo.folder_of("digits_classifier"))["metrics"]["accuracy"] >= 0.98


@pytest.mark.parametrize("name", NAMES)
def test_each_network_is_made_by_its_shipped_config(name):
    stored = zoo.read_card(zoo.folder_of(name))["config"]
    assert json.loads(json.dumps(zoo.asdict(zoo.read_config(name)))) == stored


def test_the_zoo_is_small_and_the_ablations_had_one_budget():
    sizes = [path.stat().st_size for path in (DATA / "zoo").glob("*/weights.safetensors")]
    assert max(sizes) < 8e6 and sum(sizes) < 60e6
    recipes = [zoo.read_config(name).recipe for name in ABLATED]
    assert len(recipes) >= 5 and all(recipe == recipes[0] for recipe in recipes)


def test_no_ema_is_the_same_run_without_the_average():
    small, raw = zoo.read_config("digits_small"), zoo.read_config("digits_no_ema")
    assert small.net == raw.net and (small.ema, raw.ema) == (0.99, 0.0)


def test_train_stores_what_load_finds(tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.toml").write_text(TINY)
    monkeypatch.setattr(zoo, "evaluate", lambda model, judge: {"frechet": 1.0})
    card = zoo.train(tmp_path / "tiny.toml", tmp_path / "zoo" / "tiny")
    again = zoo.train(tmp_path / "tiny.toml", tmp_path / "again")
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
    with pytest.raises(FileNotFoundError, match="set DIFFUSION_EDU_DATA to the folder that holds zoo/"):
        zoo.load("tiny")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("n_steps", "n_stepz", "key in recipe must be one of .*; got 'n_stepz' .did you mean 'n_steps'"),
        ("width", "widht", "did you mean 'width'"),
        ("ema", "emma", "did you mean 'ema'"),
        ("mean = -0.5", "meen = 1", "key in recipe.sample_t must be one of 'mean', 'std'"),
        ('kind = "UNet"', 'kind = "Unet"', "net.kind must be one of 'UNet', 'MLP', 'Classifier'; got 'Unet'"),
        ("[recipe]", "[recipes]", "config tiny.toml must have the key 'recipe'"),
        ("n_steps = 2", "n_steps = -2", "n_steps must be at least 0"),
        ("n_steps = 2", "n_steps = [", "is not valid TOML"),
        ("ema = 0.5", "ema = 1.5", "ema must be in"),
    ],
)
def test_config_mistakes_are_named(tmp_path, old, new, message):
    (tmp_path / "tiny.toml").write_text(TINY.replace(old, new))
    with pytest.raises(ValueError, match=message):
        zoo.read_config(tmp_path / "tiny.toml").make_model()


def test_unknown_configs_are_told_apart():
    with pytest.raises(ValueError, match="did you mean 'digits_unet'"):
        zoo.read_config("digits_unt")
    with pytest.raises(FileNotFoundError, match="config nowhere.toml does not exist"):
        zoo.read_config("nowhere.toml")


def test_draw_is_clipped_seeded_and_conditional():
    model = zoo.load("digits_unet")
    y = torch.arange(20) % 10
    x0 = zoo.draw(model, y, w=2.0, n_steps=8, seed=1)
    assert x0.shape == (20, 1, 8, 8) and x0.abs().max() <= 1
    assert torch.equal(x0, zoo.draw(model, y, w=2.0, n_steps=8, seed=1))
    assert zoo.accuracy(zoo.load("digits_classifier"), x0, y) >= 0.9
