"""``diffusion-edu demo``: from nothing to handwritten digits, in about a minute on two cores."""

import json
import time
from pathlib import Path

import torch

from . import checks
from .data import digits
from .denoiser import Denoiser
from .metrics import frechet_distance, nearest_distance
from .nets.classifier import Classifier
from .nets.unet import UNet
from .process import VPSDE
from .training import Recipe, averaged, fit, fit_classifier, log_normal_times
from .zoo import accuracy, draw

N_STEPS, PER_CLASS, W = 1200, 90, 1.25
RECIPE = {"batch_size": 64, "lr": 3e-3, "p_drop": 0.1, "target": "v", "sample_t": log_normal_times(-0.5, 1.2)}


def main(out, seed=0, n_steps=N_STEPS):
    """Train a class-conditional U-Net on the train half of the digits, sample it with guidance, judge the samples.

    Writes ``demo.png`` (samples, and their distance to the training images), ``demo.json`` (the figures) and
    ``demo.npz`` (``samples`` (900, 1, 8, 8) in [-1, 1] and ``labels``, 90 a class, drawn once, none left out).

    Parameters
    ----------
    out : path
        Folder, made if it is missing.
    seed : int
    n_steps : int
        Training steps.

    Returns
    -------
    dict
        What ``demo.json`` holds.
    """
    checks.integer("seed", seed, low=0)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    start, threads = time.perf_counter(), torch.get_num_threads()
    torch.set_num_threads(min(threads, 2))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            judge, model = train_judge(seed), train_model(seed, n_steps)
        labels = torch.arange(10 * PER_CLASS) % 10
        samples = draw(model, labels, w=W, seed=seed)
        report, distances = judge_samples(judge, samples, labels)
    finally:
        torch.set_num_threads(threads)
    report |= {"seed": seed, "steps": n_steps, "w": W, "seconds": round(time.perf_counter() - start, 1)}
    write(out, samples, labels, distances, report)
    tell(out, report)
    return report


def train_judge(seed):
    """A classifier trained on real digits only: the train half."""
    judge = Classifier()
    for _ in fit_classifier(judge, *digits("train"), Recipe(400, 64, seed=seed)):
        pass
    return judge.eval()


def train_model(seed, n_steps):
    """The averaged denoiser after ``n_steps`` steps, with a progress bar."""
    from tqdm.auto import tqdm

    x0, y = digits("train")
    model = Denoiser(UNet(1, n_classes=10), VPSDE(), predicts="v")
    ema = averaged(model, 0.99)
    bar = tqdm(
        fit(model, x0, Recipe(n_steps, seed=seed, **RECIPE), ema=ema, y=y),
        total=n_steps,
        desc="training",
        mininterval=0.5,
    )
    for step, loss in enumerate(bar):
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    return ema.module


@torch.no_grad()
def judge_samples(judge, samples, labels):
    """The report, and the distances to the nearest training image: of the samples, and of held-out digits."""
    (x_train, _), (x_test, y_test) = digits("train"), digits("test")
    features, real = judge.features(samples), judge.features(x_test)
    distances = {"samples": nearest_distance(samples, x_train), "held-out digits": nearest_distance(x_test, x_train)}
    median, median_real = (distance.median().item() for distance in distances.values())
    report = {
        "accuracy": accuracy(judge, samples, labels),
        "accuracy_real": accuracy(judge, x_test, y_test),
        "frechet": round(frechet_distance(features, real), 3),
        "frechet_floor": round(frechet_distance(judge.features(x_train), real), 3),
        "nearest": round(median, 3),
        "nearest_real": round(median_real, 3),
        "nearest_ratio": round(median / median_real, 3),
    }
    return report, distances


def write(out, samples, labels, distances, report):
    """demo.npz, demo.json and demo.png."""
    import numpy as np

    np.savez_compressed(out / "demo.npz", samples=samples.numpy(), labels=labels.numpy())
    (out / "demo.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    picture(samples, distances, report).savefig(out / "demo.png", dpi=120)


def picture(samples, distances, report):
    """Left: the first ten samples of each class. Right: how far samples and real digits are from the training set."""
    from matplotlib.figure import Figure

    from . import viz

    fig = Figure(figsize=(10.5, 4.8), layout="constrained")
    left, right = fig.subfigures(1, 2, width_ratios=(1, 1.1))
    in_rows = torch.arange(100) % 10 * 10 + torch.arange(100) // 10  # sample i has class i % 10: one row a class
    viz.images(samples[in_rows], ncol=10, title="Samples, one class a row", fig=left)
    ax = right.subplots()
    furthest = max(distance.max().item() for distance in distances.values())
    for name, distance in distances.items():
        color = viz.GUIDED if name == "samples" else viz.DATA
        ax.hist(distance.numpy(), bins=40, range=(0, furthest), density=True, alpha=0.5, color=color, label=name)
        ax.axvline(distance.median().item(), color=color, ls="--", lw=1.5)
    ax.set(xlabel="distance to the nearest training image", ylabel="density", title="New digits, not copies")
    ax.legend(title="dashed: medians")
    fig.suptitle(f"{100 * report['accuracy']:.1f} % of the samples are read as the digit that was asked for")
    return fig


def tell(out, report):
    """Print the report, and what to open next."""
    rows = (
        ("read as the digit asked for", "accuracy", "accuracy_real"),
        ("Fréchet distance to the test half", "frechet", "frechet_floor"),
        ("median distance to a training image", "nearest", "nearest_real"),
    )
    print(f"\n{'':36}{'samples':>9}{'real digits':>13}")
    for name, sampled, real in rows:
        print(f"{name:36}{report[sampled]:9.3f}{report[real]:13.3f}")
    print(f"\n{report['seconds']:.0f} s. Look at {out / 'demo.png'}; samples in demo.npz, figures in demo.json.")
    print("Next: jupyter lab notebooks/00_map_notation_gaussians.ipynb; notebook 06 builds this network.")
