"""Stored weights: they come back to the bit, and nothing damaged or foreign gets in."""

import ast
import hashlib
import json
import math
import os
import pickle
import random
import shutil
from pathlib import Path

import children
import pytest
import torch
from children import forks
from torch import nn

import diffusion_edu
from diffusion_edu.checkpoint import Snapshots, load_weights, read_card, save_weights, write_atomically


def net(seed=0, width=4):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


@pytest.fixture
def folder(tmp_path):
    return save_weights(tmp_path / "a" / "model", net(), {"config": {"net": {"width": 4}, "seed": 0}, "steps": 10})


def test_weights_come_back_to_the_bit(folder):
    fresh = net(seed=1)
    card = load_weights(folder, fresh, config={"net": {"width": 4}, "seed": 0})
    for name, tensor in net().state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name
    assert card["steps"] == 10
    assert card["sha256"] == hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    assert sorted(path.name for path in folder.iterdir()) == ["card.json", "weights.safetensors"]


def test_saving_again_replaces_and_leaves_no_parts(folder):
    save_weights(folder, net(seed=2), {"steps": 11})
    fresh = net(seed=1)
    assert load_weights(folder, fresh)["steps"] == 11
    assert torch.equal(fresh[0].weight, net(seed=2)[0].weight)
    assert len(list(folder.iterdir())) == 2


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "not bytes")
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 0.99, None])
def test_truncation_is_refused(folder, share):
    path = folder / "weights.safetensors"
    blob = path.read_bytes()
    path.write_bytes(blob[: int(share * len(blob))] if share else blob[:-1])
    with pytest.raises(ValueError, match="truncated or corrupt") as error:
        load_weights(folder, net())
    assert "\n" not in str(error.value)


def test_every_single_flipped_bit_in_a_sample_is_refused(folder):
    path = folder / "weights.safetensors"
    blob = bytearray(path.read_bytes())
    for position in range(0, len(blob), 37):
        blob[position] ^= 1
        path.write_bytes(blob)
        with pytest.raises(ValueError, match="SHA-256"):
            load_weights(folder, net())
        blob[position] ^= 1


def test_empty_missing_and_foreign_files_say_so(folder):
    weights, card = folder / "weights.safetensors", folder / "card.json"
    good = weights.read_bytes()
    weights.write_bytes(b"")
    with pytest.raises(ValueError, match=r"weights.safetensors is empty \(0 bytes\)"):
        load_weights(folder, net())
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="weights.safetensors does not exist"):
        load_weights(folder, net())
    page = b"<!DOCTYPE html><html>not weights</html>"
    weights.write_bytes(page)
    card.write_text(json.dumps({"sha256": hashlib.sha256(page).hexdigest()}))
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_weights(folder, net())
    weights.write_bytes(good)
    for text, message in (("{", "not valid JSON"), ("[]", "has no sha256"), ('{"steps": 3}', "has no sha256")):
        card.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_weights(folder, net())
    card.unlink()
    with pytest.raises(FileNotFoundError, match="card.json does not exist"):
        load_weights(folder, net())


def test_another_configuration_is_told_by_its_keys(folder):
    with pytest.raises(ValueError, match="net.width: stored 4, asked 8; seed: stored 0, asked None"):
        load_weights(folder, net(), config={"net": {"width": 8}})


def test_other_tensors_are_told_by_name(folder):
    with pytest.raises(
        ValueError, match="of another shape: 0.weight, 0.bias, 1.weight, 1.bias, 1.running_mean and 2 more"
    ):
        load_weights(folder, net(width=5))
    with pytest.raises(ValueError, match="missing: 3.weight, 3.bias"):
        load_weights(folder, nn.Sequential(*net(), nn.Linear(2, 2)))
    before = net(seed=3)[:2]
    kept = before[0].weight.clone()
    with pytest.raises(ValueError, match="extra: 2.bias, 2.weight"):
        load_weights(folder, before)
    assert torch.equal(before[0].weight, kept)


def test_wrapper_prefixes_are_understood(tmp_path):
    wrapped = nn.Module()
    wrapped.module = net()
    fresh = net(seed=1)
    load_weights(save_weights(tmp_path / "m", wrapped, {}), fresh)
    assert torch.equal(fresh[0].weight, net()[0].weight)


def test_nan_weights_are_named_and_nan_cards_refused(tmp_path):
    broken = net()
    broken[2].bias.data[1] = float("nan")
    with pytest.raises(ValueError, match="holds NaN or Inf in '2.bias'"):
        load_weights(save_weights(tmp_path / "m", broken, {}), net())
    with pytest.raises(ValueError):
        save_weights(tmp_path / "n", net(), {"loss": float("nan")})
    assert not (tmp_path / "n" / "card.json").exists()


def test_the_card_is_readable_json(folder):
    assert read_card(folder) == json.loads((folder / "card.json").read_text())


def test_a_bad_card_leaves_the_stored_model_as_it_was(tmp_path):
    first, second = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    save_weights(tmp_path, first, {"config": {}})
    with pytest.raises(ValueError):
        save_weights(tmp_path, second, {"metrics": float("nan")})
    load_weights(tmp_path, second)
    assert torch.equal(first.weight, second.weight)


# Snapshots: the checkpoints of a run

RUN = {"recipe": {"lr": 0.1}, "ema": 0.5}


def files(seed):
    generator = torch.Generator().manual_seed(seed)
    model = {"a.weight": torch.randn(5, 3, generator=generator), "a.bias": torch.randn(5, generator=generator)}
    return {
        "model": model,
        "optimizer": {"a.weight/step": torch.tensor(3.0)},
        "random": {"torch": generator.get_state()},
    }


@pytest.fixture
def kept(tmp_path):
    """Two checkpoints, after 2 and 4 steps."""
    snapshots = Snapshots(tmp_path / "run", 2, RUN)
    for step in (2, 4):
        snapshots.save(step, files(step))
    return snapshots


def equal(a, b):
    return a.keys() == b.keys() and all(
        a[name].keys() == b[name].keys() and all(torch.equal(a[name][key], b[name][key]) for key in a[name])
        for name in a
    )


def test_a_state_comes_back_to_the_bit(kept):
    step, found, device = kept.newest()
    assert (step, device) == (4, "cpu") and equal(found, files(4))
    assert Snapshots(kept.folder / "none", 2, RUN).newest() is None
    assert not list(kept.folder.glob(".*"))  # nothing half written is left


def test_layout_and_empty_parts_are_no_matter(tmp_path):
    snapshots = Snapshots(tmp_path, 1, {})
    last = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    snapshots.save(0, {"model": {"w": last}, "optimizer": {}})
    assert equal(snapshots.newest()[1], {"model": {"w": last.contiguous()}, "optimizer": {}})


def test_every_flipped_bit_is_refused(kept):
    """300 bits drawn from all files, and the older checkpoint is named."""
    draw, paths = random.Random(0), sorted((kept.folder / "step_00000004").iterdir())
    assert len(paths) == 4
    for _ in range(300):
        path = draw.choice(paths)
        blob = bytearray(path.read_bytes())
        byte, bit = draw.randrange(len(blob)), 1 << draw.randrange(8)
        blob[byte] ^= bit
        path.write_bytes(blob)
        with pytest.raises(ValueError, match="truncated or corrupt.*go on from step_00000002, which is whole") as error:
            kept.newest()
        assert "\n" not in str(error.value) and path.name in str(error.value)
        blob[byte] ^= bit
        path.write_bytes(blob)
    assert kept.newest()[0] == 4


PARTS = ("model.safetensors", "optimizer.safetensors", "random.safetensors", "manifest.jsonl")


@pytest.mark.parametrize("part", PARTS)
def test_a_file_cut_off_anywhere_is_refused(kept, part):
    path = kept.folder / "step_00000004" / part
    blob = path.read_bytes()
    for length in [int(share * len(blob)) for share in (0.01, 0.1, 0.5, 0.9, 0.99)] + [len(blob) - 1, 0]:
        path.write_bytes(blob[:length])
        with pytest.raises(ValueError, match=r"truncated or corrupt|is empty \(0 bytes\)") as error:
            kept.newest()
        assert "step_00000002, which is whole" in str(error.value) and "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(ValueError, match=f"{part} does not exist; remove .*step_00000004 to go on from step_00000002"):
        kept.newest()
    assert (kept.folder / "step_00000002").exists()  # nothing is removed unasked


class Hostile:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("forged", [False, True])
def test_hostile_files_are_refused_and_run_nothing(kept, tmp_path, part, forged):
    """Also where the manifest is forged, so that the checksums are right."""
    (tmp_path / "torch").mkdir()
    torch.save({"model": Hostile(tmp_path / "run it")}, tmp_path / "torch" / "x.pt")
    page = b"<!DOCTYPE html><html>not weights</html>"
    for blob in (pickle.dumps(Hostile(tmp_path / "run it")), (tmp_path / "torch" / "x.pt").read_bytes(), page):
        folder = kept.folder / "step_00000004"
        (folder / part).write_bytes(blob)
        if forged and part != "manifest.jsonl":
            forge(folder, lambda said, blob=blob: said["sha256"].update({part: hashlib.sha256(blob).hexdigest()}))
        with pytest.raises(ValueError, match="truncated or corrupt|is not a safetensors file") as error:
            kept.newest()
        assert "\n" not in str(error.value) and "step_00000002, which is whole" in str(error.value)
    pickle.loads(pickle.dumps(Hostile(tmp_path / "it would have"))).close()
    assert (tmp_path / "it would have").exists() and not (tmp_path / "run it").exists()


def forge(folder, change):
    """Change a manifest and make its checksum right again."""
    path = folder / "manifest.jsonl"
    said = json.loads(path.read_bytes().splitlines()[0])
    change(said)
    text = json.dumps(said).encode()
    path.write_bytes(text + b"\n" + hashlib.sha256(text).hexdigest().encode() + b"\n")


def test_a_forged_manifest_reads_no_file_outside(kept, tmp_path):
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    for name in ("../../secret.safetensors", str(tmp_path / "secret.safetensors")):
        forge(kept.folder / "step_00000004", lambda said, name=name: said.update(sha256={name: "0"}))
        with pytest.raises(ValueError, match="names a file that is not in it: .*secret"):
            kept.newest()


def test_nan_in_a_state_is_named(kept):
    kept.save(6, files(6) | {"optimizer": {"a.weight/exp_avg": torch.tensor([1.0, math.nan])}})
    with pytest.raises(ValueError, match="holds NaN or Inf in 'a.weight/exp_avg'; remove .* from step_00000004"):
        kept.newest()


def test_another_format_and_another_run_are_told(kept):
    forge(kept.folder / "step_00000004", lambda said: said.update(format=2))
    with pytest.raises(ValueError, match="step_00000004 has format 2; this version reads 1; remove .* step_00000002"):
        kept.newest()
    other = Snapshots(kept.folder, 2, {"recipe": {"lr": 0.2, "n_steps": 5}, "ema": 0.5, "weight": None})
    forge(kept.folder / "step_00000004", lambda said: said.update(format=1))
    with pytest.raises(ValueError) as error:
        other.newest()
    assert str(error.value).endswith(
        "of another configuration: recipe.lr: stored 0.1, asked 0.2; recipe.n_steps: stored None, asked 5"
    )


def test_all_damaged_says_so_and_offers_nothing(kept):
    for folder in kept.steps():
        (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"step_00000004/model.safetensors is empty \(0 bytes\)$"):
        kept.newest()


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept_by_their_step(tmp_path, keep, monkeypatch):
    snapshots, gone = Snapshots(tmp_path, keep, {}), []
    (tmp_path / "step_00000002_mine").mkdir()  # a copy that the user made is not ours to remove
    rmtree = shutil.rmtree

    def watched(path, **options):
        if Path(path).exists():
            gone.append(Path(path).name)
            assert snapshots.newest()[0] == step  # the new one is whole before an old one goes
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    steps = (2, 10, 99_999_999, 100_000_000, 100_000_001)
    for step in steps:
        snapshots.save(step, files(0))
    assert [int(path.name[5:]) for path in snapshots.steps()] == list(steps[-keep:])
    assert len(gone) == len(steps) - keep and (tmp_path / "step_00000002_mine").exists()


def test_a_step_that_is_stored_is_not_stored_again(kept):
    before = (kept.folder / "step_00000004" / "manifest.jsonl").stat().st_mtime_ns
    assert kept.save(4, files(9)) == kept.folder / "step_00000004"
    assert (kept.folder / "step_00000004" / "manifest.jsonl").stat().st_mtime_ns == before


def test_what_a_killed_run_left_is_swept(kept):
    (kept.folder / ".step_00000006.123.tmp").mkdir()
    (kept.folder / ".step_00000006.123.tmp" / "model.safetensors").write_bytes(b"half")
    (kept.folder / ".log.jsonl.123.tmp").write_bytes(b"half")
    (kept.folder / "log.jsonl").write_bytes(b"whole")
    assert kept.newest()[0] == 4
    kept.sweep()
    assert sorted(path.name for path in kept.folder.iterdir()) == ["log.jsonl", "step_00000002", "step_00000004"]


def full_disk(snapshots, said):
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))  # the manifest and the moments fit, the weights do not
    try:
        snapshots.save(6, files(6))
    except OSError as error:
        os.write(said, str(error).encode())


@forks
def test_a_full_disk_is_told_and_leaves_the_old_checkpoints(kept):
    reader, writer = os.pipe()
    assert children.run(full_disk, kept, writer) == 0
    said = os.read(reader, 1000).decode()
    assert "no space left writing" in said and "step_00000006 (need 0.0 MB, free" in said and "are whole" in said
    assert sorted(path.name for path in kept.folder.iterdir()) == ["step_00000002", "step_00000004"]
    assert kept.newest()[0] == 4


def test_any_other_failure_leaves_nothing_half_written(kept, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        kept.save(6, files(6))
    monkeypatch.undo()
    assert sorted(path.name for path in kept.folder.iterdir()) == ["step_00000002", "step_00000004"]


def test_no_code_of_the_package_can_unpickle():
    """No import of pickle and its like, no torch.load, no allow_pickle: read from the syntax trees."""
    for path in Path(diffusion_edu.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {"pickle", "dill", "joblib", "cloudpickle", "shelve", "marshal"} & set(names), path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) not in (("torch", "load"), ("np", "load")), path
            assert not (isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "weights_only")), path
