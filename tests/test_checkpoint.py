"""Stored weights: they come back to the bit, and nothing damaged or foreign gets in."""

import hashlib
import json

import pytest
import torch
from torch import nn

from diffusion_edu.checkpoint import load_weights, read_card, save_weights, write_atomically


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
