"""The demo's files, from a run of a few steps; what a whole run must reach is checked where time allows a minute."""

import json

import numpy as np
import pytest
import torch

from diffusion_edu import demo
from diffusion_edu.nets.classifier import Classifier


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    torch.manual_seed(5)
    before = torch.get_rng_state(), torch.get_num_threads()
    out = tmp_path_factory.mktemp("demo") / "deep" / "er"
    report = demo.main(out, seed=1, n_steps=3)
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.get_num_threads() == before[1]
    return out, report


def test_npz_holds_ninety_a_class_in_range(result):
    stored = np.load(result[0] / "demo.npz", allow_pickle=False)
    samples, labels = stored["samples"], stored["labels"]
    assert samples.shape == (900, 1, 8, 8) and samples.dtype == np.float32
    assert samples.min() >= -1 and samples.max() <= 1
    assert (np.bincount(labels) == 90).all()


def test_json_holds_the_figures(result):
    out, report = result
    assert json.loads((out / "demo.json").read_text()) == report
    assert report["accuracy_real"] > 0.95 and report["seed"] == 1 and report["steps"] == 3
    assert report["frechet"] > report["frechet_floor"] > 0
    assert report["nearest_ratio"] == pytest.approx(report["nearest"] / report["nearest_real"], abs=2e-3)


def test_picture_is_a_png(result):
    blob = (result[0] / "demo.png").read_bytes()
    assert blob[:8] == b"\x89PNG\r\n\x1a\n" and len(blob) > 20_000


def test_copies_of_the_training_set_would_show():
    x, y = demo.digits("train")
    report, distances = demo.judge_samples(Classifier().eval(), x[:100], y[:100])
    assert report["nearest_ratio"] == 0 and distances["samples"].max() == 0


def test_bad_seed_stops_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="seed must be at least 0; got -1"):
        demo.main(tmp_path / "out", seed=-1)
    assert not (tmp_path / "out").exists()
