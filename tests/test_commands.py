"""What the command line does with networks, from a config to its weights: tiny ones, in forked processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import children
import pytest
import torch
from children import forks

from diffusion_edu import checkpoint, cli, commands, data, zoo
from diffusion_edu.config import CONFIGS, NETS, read_config
from diffusion_edu.denoiser import Denoiser
from diffusion_edu.machine import choose_device
from diffusion_edu.trainer import Trainer
from diffusion_edu.training import batch_loss, draw_batch

TINY = """
about = "tiny"
ema = 0.9
[data]
kind = "photo_patches"
n = 64
size = 8
[net]
kind = "DiT"
shape = [3, 8, 8]
patch = 4
width = 16
depth = 1
heads = 2
[process]
kind = "VPSDE"
[recipe]
n_steps = 12
batch_size = 16
target = "v"
[run]
device = "cpu"
save_every = 4
log_every = 2
"""


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(TINY)
    return path


def train(*words):
    return cli.main(["train", *map(str, words)])


def sha(out):
    return json.loads((out / "card.json").read_text())["sha256"]


def test_a_run_ends_in_weights_and_a_card(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(tiny, "-o", out, "run.sample_every=8") == 0
    card = json.loads((out / "card.json").read_text())
    assert card["steps"] == 12 and card["config"]["run"]["save_every"] == 4
    assert card["metrics"].keys() == {"loss"} and "CPU" in card["hardware"] and card["minutes"] < 5
    model, config = zoo.open_folder(out)
    assert isinstance(model, Denoiser) and config.recipe["n_steps"] == 12
    assert sorted(path.name for path in (out / "run").glob("step*")) == ["step_00000008", "step_00000012"]
    stored = checkpoint.Snapshots(out / "run", 2, card_run(card)).newest()[1]["average"]
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())  # the average is kept
    assert cli.main(["evaluate", str(out), "-n", "6"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == card["metrics"]["loss"]
    assert cli.main(["sample", str(out), "-o", str(tmp_path / "a.png"), "-n", "5", "--steps", "3"]) == 0
    from matplotlib.image import imread

    grids = [path.name for path in sorted((out / "run" / "samples").iterdir())]
    assert grids == ["step_00000008.png", "step_00000012.png"]
    assert imread(out / "run" / "samples" / grids[0]).shape[:2] == (64, 64)  # 8 rows of 8 images
    assert imread(tmp_path / "a.png").shape[:2] == (8 * 3, 8 * 2)  # five in rows of two


def card_run(card):
    return {key: value for key, value in card["config"].items() if key not in ("run", "about", "judge")}


def test_a_folder_that_holds_a_run_is_refused_without_resume(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(tiny, "-o", out, "--resume") == 0  # nothing there: starts, and says so
    assert "nothing to resume: starting" in capsys.readouterr().err
    before = sha(out)
    assert train(tiny, "-o", out) == 1
    said = f"diffusion-edu: {out} holds a run: use --resume to go on with it, or another folder\n"
    assert capsys.readouterr().err == said
    assert train(tiny, "-o", out, "--resume", "recipe.lr=0.1", "recipe.schedule=constant") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "is of another configuration: recipe.lr: stored None, asked 0.1; recipe.schedule: stored None" in said
    assert train(tiny, "-o", out, "--resume", "run.log_every=5", "about=other") == 0  # these may change
    assert sha(out) == before


def test_resume_is_for_runs(tmp_path, capsys):
    assert train("digits_small", "-o", tmp_path / "x", "--resume") == 2
    assert "resume must be used with a config that has a table [run]; got digits_small" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def stopping(tiny, out, step, number):
    advance = Trainer.advance

    def told(self):
        values = advance(self)
        if self.step == step:
            os.kill(os.getpid(), number)
        return values

    Trainer.advance = told
    return train(tiny, "-o", out)


@forks
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_exits_130_and_the_run_resumes_to_the_same_weights(tiny, tmp_path, number):
    assert train(tiny, "-o", tmp_path / "whole") == 0
    said = tmp_path / "stderr"
    assert children.run(stopping, tiny, tmp_path / "out", 7, number, stderr=said) == 130
    assert said.read_text().splitlines()[-1] == (
        f"diffusion-edu: interrupted at step 7; go on with --resume -o {tmp_path / 'out'}"
    )
    assert not (tmp_path / "out" / "card.json").exists()
    assert train(tiny, "-o", tmp_path / "out", "--resume") == 0
    assert sha(tmp_path / "out") == sha(tmp_path / "whole")


@forks
def test_killed_it_resumes_to_the_same_weights(tiny, tmp_path):
    assert train(tiny, "-o", tmp_path / "whole") == 0
    assert children.run(stopping, tiny, tmp_path / "out", 9, signal.SIGKILL) == -signal.SIGKILL
    assert train(tiny, "-o", tmp_path / "out", "--resume") == 0
    assert sha(tmp_path / "out") == sha(tmp_path / "whole")


def test_cuda_without_cuda_is_told_before_the_data_are_loaded(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(data, "photo_patches", lambda *_, **__: pytest.fail("loaded"))
    assert train(tiny, "-o", tmp_path / "out", "run.device=cuda") == 1
    assert capsys.readouterr().err == "diffusion-edu: CUDA requested but not available; use run.device=cpu\n"
    assert not (tmp_path / "out").exists()


def test_auto_takes_cuda_or_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 3)
    assert choose_device("cpu") == torch.device("cpu")


def test_mps_is_refused(tiny, tmp_path, capsys):
    assert train(tiny, "-o", tmp_path / "out", "run.device=mps") == 2
    assert "run.device must be one of 'auto', 'cpu', 'cuda'; got 'mps'" in capsys.readouterr().err


def test_out_of_memory_says_what_was_too_much_and_what_helps(tiny, tmp_path, monkeypatch, capsys):
    def full(self):
        if self.step == 5:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nand more")
        return advance(self)

    advance = Trainer.advance
    monkeypatch.setattr(Trainer, "advance", full)
    assert train(tiny, "-o", tmp_path / "out") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    n = sum(p.numel() for p in read_config(tiny).make_model().parameters())
    assert said.startswith(f"diffusion-edu: out of memory for batches of 16 images 3x8x8 and {n:,} parameters; use")
    for remedy in ("a smaller recipe.batch_size", "a larger run.accumulate", "run.precision=bf16"):
        assert remedy in said
    monkeypatch.undo()
    assert train(tiny, "-o", tmp_path / "out", "--resume") == 0  # the last checkpoint is intact
    assert "resumed after step 4" in capsys.readouterr().err


torchrun = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="no torchrun with gloo"
)


@torchrun  # six interpreters that import torch: the one slow test of this file
def test_a_killed_process_restarts_under_torchrun_and_ends_where_it_would_have(tiny, tmp_path):
    """Against the same two processes without the kill, to the bit: gloo sums two numbers, in either order the same."""
    longer = ("recipe.n_steps=200", "run.save_every=20")
    assert children.ranks(train, tiny, "-o", tmp_path / "whole", *longer) == [0, 0]
    out, launch = tmp_path / "out", "-m torch.distributed.run --standalone --nproc_per_node=2 --max-restarts=1"
    words = ["-m", "diffusion_edu.cli", "train", str(tiny), "-o", str(out), *longer, "--resume"]
    with open(tmp_path / "said", "w") as said:
        job = subprocess.Popen([sys.executable, *launch.split(), *words], stdout=said, stderr=said)
    limit = time.monotonic() + 120
    while len(list((out / "run").glob("step_*"))) < 2 and time.monotonic() < limit and job.poll() is None:
        time.sleep(0.002)
    os.kill(int((out / "run" / ".lock").read_text()), signal.SIGKILL)
    code, text = job.wait(120), (tmp_path / "said").read_text()
    assert code == 0 and "resumed after step" in text and "nothing to resume" in text, text[-3000:]
    assert sha(out) == sha(tmp_path / "whole")


# Configs and their changes


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.toml")))
def test_every_shipped_config_builds_its_network_for_its_images(name):
    config = read_config(name)
    with torch.device("meta"):
        net = NETS[config.net["kind"]](**{key: value for key, value in config.net.items() if key != "kind"})
    config.make_run(), config.make_recipe()
    if config.net["kind"] not in ("UNet", "DiT"):
        return
    clock, classes = torch.zeros(2, device="meta"), config.net.get("n_classes")
    y = torch.zeros(2, dtype=torch.int64, device="meta") if classes else None
    x = torch.zeros(2, *config.shape(), device="meta")
    channels = (2 if config.learned_variance else 1) * x.shape[1]
    assert net(x, clock, y).shape == (2, channels, *x.shape[2:])


def test_the_large_configs_are_as_large_as_they_say():
    for name, low, high in (("fashion_large", 34e6, 37e6), ("cifar10_large", 34e6, 37e6), ("cifar10_dit", 32e6, 34e6)):
        config = read_config(name)
        with torch.device("meta"):
            net = NETS[config.net["kind"]](**{key: value for key, value in config.net.items() if key != "kind"})
        assert low < sum(p.numel() for p in net.parameters()) < high


def test_changes_take_the_place_of_what_the_config_says():
    changes = ["recipe.n_steps=7", "recipe.lr=1e-4", "run.precision=bf16", "run.compile=true", "net.without=['time']"]
    config = read_config("fashion", [*changes, "process.kind=VPSDE", "about=a plain sentence"])
    assert (config.recipe["n_steps"], config.recipe["lr"], config.recipe["batch_size"]) == (7, 1e-4, 64)
    assert config.make_run().precision == "bf16" and config.make_run().compile is True
    assert config.net["without"] == ["time"] and config.about == "a plain sentence"


@pytest.mark.parametrize(
    "change, message",
    [
        ("recipe.n_stps=7", "key in recipe must be one of .* .did you mean 'n_steps'"),
        ("recipee.n_steps=7", "key in config must be one of .* .did you mean 'recipe'"),
        ("run.compil=true", "did you mean 'compile'"),
        ("recipe.n_steps=true", "n_steps must be an integer; got True"),
        ("recipe.n_steps=1e30", "n_steps must be an integer; got 1e.30"),
        (f"recipe.n_steps={10**30}", "n_steps must be at most 1000000000; got 1000"),
        (f"recipe.batch_size={10**30}", "batch_size must be at most"),
        (f"recipe.seed={10**30}", "seed must be at most 9223372036854775807"),
        ("recipe.n_steps=-1", "n_steps must be at least 0; got -1"),
        ("recipe.n_steps=ten", "n_steps must be an integer; got 'ten'"),
        ("recipe.n_steps=", "n_steps must be an integer; got ''"),
        ("recipe.lr=nan", "lr must be finite; got nan"),
        ("recipe.lr=inf", "lr must be finite"),
        ("recipe.lr=0.1s", "lr must be a real number; got '0.1s'"),
        ("ema=nan", "ema must be finite"),
        ("run.clip=nan", "run.clip must be finite"),
        ("run.clip=-1", "run.clip must be at least 0"),
        ("run.accumulate=0", "run.accumulate must be in .1, 1000000000.; got 0"),
        (f"run.save_every={10**30}", "run.save_every must be in .0, 1000000000."),
        ("run.keep=0", "run.keep must be in .1"),
        ("run.compile=1", "run.compile must be true or false; got 1"),
        ("run.precision=fp16", "run.precision must be one of 'fp32', 'tf32', 'bf16'"),
        ("run=3", "run must be a table; got 3"),
        ("net=UNet", "net must be a table; got 'UNet'"),
        ("learned_variance=1", "learned_variance must be true or false; got 1"),
        ("data.kind=cifar", "data.kind must be one of .* .did you mean 'cifar10'"),
        ("recipe.weight=edm", "recipe.weight must be one of"),
        ("recipe.lr.max=3", "change must name a table before its last dot; lr is none; got recipe.lr.max=3"),
        ("recipe.n_steps", "change must look like recipe.n_steps=100; got recipe.n_steps"),
        (".n_steps=3", "change must look like"),
        ("recipe..lr=3", "change must look like"),
        ("=3", "change must look like"),
    ],
)
def test_changes_that_cannot_be_are_named(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        read_config("fashion", [change])


@pytest.mark.parametrize(
    "change, message",
    [
        (f"net.width={10**30}", "width must be at most 65536"),
        ("net.width=wide", "width must be an integer; got 'wide'"),
        ("net.widht=8", "key in net must be one of .* .did you mean 'width'"),
        ("net.kind=Unet", "net.kind must be one of .* .did you mean 'UNet'"),
    ],
)
def test_changes_of_a_network_that_cannot_be_are_named(change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        read_config("fashion", [change]).make_model()


def test_a_key_changed_twice_is_refused():
    with pytest.raises(ValueError, match="change must name a key once; got recipe.lr again"):
        read_config("fashion", ["recipe.lr=1", "recipe.n_steps=2", "recipe.lr=3"])


@pytest.mark.parametrize("name", ["digits_classifier", "digits_hvae", "digits_student", "digits_noisy_classifier"])
def test_only_denoisers_train_as_runs(name):
    with pytest.raises(ValueError, match="run must be left out: only denoisers train as runs; got net.kind"):
        read_config(name, ["run.device=cpu"])


def test_words_stand_on_both_sides_of_the_options(monkeypatch):
    calls = []
    monkeypatch.setattr(commands, "train", lambda *args: calls.append(args))
    assert train("fashion", "recipe.lr=1", "-o", "x", "run.keep=2", "--resume", "ema=0.5") == 0
    assert calls[0][2] == ["recipe.lr=1", "run.keep=2", "ema=0.5"] and calls[0][3] is True


@pytest.mark.parametrize(
    "words, said",
    [
        (["fashion"], "the following arguments are required: -o/--out"),
        (["fashion", "-o", "x", "--n_steps=1"], "unrecognized arguments: --n_steps=1"),
        (["fashion", "-o", "x", "lr"], "unrecognized arguments: lr"),
        (["fashon", "-o", "x"], "config must be one of .* .did you mean 'fashion'"),
    ],
)
def test_wrong_words_are_one_line_and_exit_2(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train(*words) == 2
    assert re.search(said, capsys.readouterr().err) and not (tmp_path / "x").exists()


# The dry run


def numbers(lines):
    return [float(n.replace(",", "")) for n in re.findall(r"[\d,]*\d(?:\.\d+)?", " ".join(lines))]


def test_the_dry_run_counts_what_a_transformer_takes(tiny, capsys):
    """One block of width D = 16 on N = 4 tokens of 48 numbers, by hand: a multiplication and an addition are 2."""
    assert train(tiny, "--dry-run", "recipe.n_steps=1000") == 0
    N, D, pixels = 4, 16, 48
    linear = 2 * (N * pixels * D + 256 * D + D * D)  # patches, clock
    linear += 2 * (D * 6 * D + N * (3 + 1 + 4 + 4) * D * D + D * 2 * D + N * D * pixels)
    flop = linear + 2 * 2 * N * N * D  # attention: scores and their use
    n = sum(p.numel() for p in read_config(tiny).make_model().parameters())
    by_hand = (pixels + 1) * D + (256 + 1) * D + (D + 1) * D + (D + 1) * 6 * D + (D + 1) * 4 * D
    by_hand += (D + 1) * 4 * D + (4 * D + 1) * D + (D + 1) * 2 * D + (D + 1) * pixels
    assert n == by_hand
    said = capsys.readouterr().out.splitlines()
    assert numbers(said[:2]) == [n, 1000, 16]
    assert numbers(said[2:3])[0] == pytest.approx(flop / 1e9, abs=5e-4) and numbers(said[2:3])[1:] == [3, 16]
    assert numbers(said[3:])[0] == round(5 * 4 * n / 1e6)  # weights, gradients, two moments, average


def test_the_dry_run_counts_the_operations_of_a_unet(monkeypatch):
    """One level of 64 channels on 32x32 pixels: convolutions of 9 or 1 taps, and the clock's linear maps."""
    net = {"kind": "UNet", "width": 64, "multipliers": [1], "attention": []}
    config = replace(read_config("fashion"), net=net, recipe={"n_steps": 1, "batch_size": 8})
    said = {}
    for ema in (0.9, 0.0):
        monkeypatch.setattr(commands, "read_config", lambda *_, ema=ema: replace(config, ema=ema))
        said[ema] = numbers(commands.dry_run("any"))
    conv = lambda a, b, taps=9: 2 * a * b * taps * 32 * 32
    block = lambda channels: conv(channels, 64) + conv(64, 64) + 2 * 256 * 2 * 64
    flop = conv(1, 64) + 2 * block(64) + block(128) + conv(128, 64, 1) + conv(64, 1) + 2 * 64 * 256
    assert said[0.9][3] == pytest.approx(flop / 1e9, abs=5e-4)
    n = sum(p.numel() for p in config.make_model().parameters())
    assert said[0.9][0] == n and (said[0.9][6], said[0.0][6]) == (round(20 * n / 1e6), round(16 * n / 1e6))


def test_the_memory_of_the_dry_run_is_what_the_allocator_gave():
    from torch.profiler import ProfilerActivity, profile

    config = read_config("fashion_dit")
    model, recipe, y = config.make_model(), config.make_recipe(), torch.zeros(2, dtype=torch.int64)
    batch = draw_batch(model.process, recipe, torch.Generator(), torch.zeros(2, 1, 32, 32), y=y)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loss = batch_loss(model, recipe, batch).sum()  # its graph holds on to what it needs
    held = sum(event.self_cpu_memory_usage for event in seen.key_averages())
    halved = numbers(commands.dry_run("fashion_dit", ["run.accumulate=2"]))[7]
    assert numbers(commands.dry_run("fashion_dit"))[7] == pytest.approx(held / 2 * 64 / 1e6, rel=0.02)
    assert halved == pytest.approx(held / 2 * 32 / 1e6, rel=0.02) and loss.requires_grad


# Drawing and measuring what is there


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network with classes, as `train` leaves it, without the training."""
    out = tmp_path_factory.mktemp("trained")
    model = read_config("digits_dit").make_model()
    card = {"config": asdict(read_config("digits_dit")), "metrics": {}}
    checkpoint.save_weights(out, model, card)
    return out


@pytest.mark.parametrize(
    "words, message",
    [
        (["-n", "0"], "n must be at least 1; got 0"),
        (["--steps", "0"], "n_steps must be"),
        (["-w", "nan"], "w must be"),
        (["--seed", "-1"], "seed must be"),
    ],
)
def test_samples_that_cannot_be_are_refused(trained, tmp_path, capsys, words, message):
    assert cli.main(["sample", str(trained), "-o", str(tmp_path / "a.png"), *words]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not (tmp_path / "a.png").exists()


def test_classes_are_drawn_in_turn_with_guidance(trained, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(commands, "draw", lambda *args: calls.append(args) or torch.zeros(12, 1, 8, 8))
    commands.sample(trained, tmp_path / "a.png", 12, 2.5, 7, 3)
    (_, y, *rest) = calls[0]
    assert torch.equal(y, torch.arange(12) % 10) and rest == [2.5, 7, 3, (1, 8, 8)]


def test_only_denoisers_are_drawn_from_and_only_classes_are_guided(tmp_path, capsys):
    target = str(tmp_path / "a.png")
    assert cli.main(["sample", str(zoo.folder_of("digits_classifier")), "-o", target]) == 2
    assert "folder must hold a denoiser of images; got Classifier" in capsys.readouterr().err
    assert cli.main(["sample", str(zoo.folder_of("digits_density")), "-o", target, "-w", "2"]) == 2
    assert "w must be 1 for a network without classes; got 2.0" in capsys.readouterr().err
    assert cli.main(["sample", str(tmp_path), "-o", target]) == 2
    assert "card.json does not exist" in capsys.readouterr().err


# Where a run may not be


def test_a_folder_under_a_file_is_told_before_the_training(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Trainer, "advance", lambda self: pytest.fail("trained"))
    assert train(tiny, "-o", tmp_path / "tiny.toml" / "out") == 2
    assert capsys.readouterr().err == f"diffusion-edu: {tmp_path / 'tiny.toml' / 'out'}: Not a directory\n"


def test_a_folder_that_vanishes_ends_the_run_with_its_name(tiny, tmp_path, capsys, monkeypatch):
    advance = Trainer.advance

    def gone(self):
        if self.step == 5:
            shutil.rmtree(tmp_path / "out")
        return advance(self)

    monkeypatch.setattr(Trainer, "advance", gone)
    assert train(tiny, "-o", tmp_path / "out") == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("out/run/log.jsonl: No such file or directory")


@pytest.mark.parametrize(
    "blob, message",
    [
        (b"\xef\xbb\xbfabout = 1", "is not valid TOML"),
        ("about = 'ä'".encode("latin-1"), "is not valid TOML"),
        (b"about = 'a'\nabout = 'b'", "is not valid TOML: Cannot overwrite a value"),
        (b"x = " + b"[" * 100_000, "is not valid TOML"),
        (b"", "config odd.toml must have the key 'about'; got only nothing"),
    ],
)
def test_odd_files_are_no_configs(tmp_path, capsys, blob, message):
    (tmp_path / "odd.toml").write_bytes(blob)
    assert train(tmp_path / "odd.toml", "-o", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_judge_or_data_that_are_missing_are_told_before_the_training(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("DIFFUSION_EDU_DATA", raising=False)
    assert train("fashion", "-o", tmp_path / "out", "run.device=cpu") == 2
    assert "set DIFFUSION_EDU_DATA to the folder that holds fashion-mnist/" in capsys.readouterr().err
    monkeypatch.setattr(data, "photo_patches", lambda *_, **__: torch.zeros(64, 3, 8, 8))
    (tmp_path / "tiny.toml").write_text(TINY)
    assert train(tmp_path / "tiny.toml", "-o", tmp_path / "out", "judge=nobody") == 2
    assert "name must be one of" in capsys.readouterr().err and not (tmp_path / "out").exists()
