"""How close the Swiss roll comes to the floor: two recipes, timed and measured.

    python benchmarks/swiss_roll.py

The floor is what fresh data score against fresh data: sliced W2 (root, 200 directions, n = 10,000, mean of 8 pairs);
the models are compared with the first halves of the same pairs.
``ddpm`` is notebook 04: L_simple on a table, ancestral sampling, one thread. ``best`` is the package's best: velocity
target, log-normal noise levels, DPM-Solver++(2M) with 20 evaluations, two threads.
"""

import math
import time

import torch

from diffusion_edu.data import swiss_roll
from diffusion_edu.denoiser import Denoiser
from diffusion_edu.metrics import sliced_wasserstein
from diffusion_edu.nets.mlp import MLP
from diffusion_edu.process import VPSDE, DiscreteVP, uniform_log_snr
from diffusion_edu.samplers import beta, make_ddpm_step, make_dpmpp_2m_step, noises, sample
from diffusion_edu.schedules import cosine_beta
from diffusion_edu.training import Recipe, averaged, fit, log_normal_times

N, SETS = 10_000, 8


def ddpm():
    """(model, recipe, EMA decay, step, times, threads) of notebook 04."""
    process = DiscreteVP(cosine_beta(70))
    model = Denoiser(MLP(width=64, n_waves=4), process)
    return model, Recipe(3500, 512, lr=3e-3), 0.99, make_ddpm_step(beta), process.grid(70), 1


def best():
    """The same six of the package's best recipe: at most 5 s of training, 20 evaluations."""
    process = VPSDE()
    t_min = process.time_of(torch.tensor(-2 * math.log(0.01))).item()
    recipe = Recipe(2000, 512, lr=5e-3, target="v", sample_t=log_normal_times(-0.8, 1.3))
    times = process.grid(20, uniform_log_snr(t_min))
    return Denoiser(MLP(width=64), process, predicts="v"), recipe, 0.995, make_dpmpp_2m_step(), times, 2


def measure(setting, x0, fresh, floor):
    """Train and sample one setting; print seconds and ratio."""
    torch.manual_seed(0)
    model, recipe, decay, step, times, threads = setting()
    torch.set_num_threads(threads)
    ema = averaged(model, decay)
    start = time.perf_counter()
    for _ in fit(model, x0, recipe, ema=ema):
        pass
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    distances = []
    for i, real in enumerate(fresh):
        noise = noises(seed=100 + i)
        *_, x = sample(step, ema.module, model.process.prior((N, 2), noise), times, noise)
        distances.append(sliced_wasserstein(x, real))
    mean = sum(distances) / SETS
    print(
        f"{setting.__name__:5} {recipe.n_steps} steps in {seconds:.1f} s on {threads} threads; "
        f"{len(times) - 1} evaluations, {(time.perf_counter() - start) / SETS:.1f} s a set; "
        f"sliced W2 {mean:.4f} = {mean / floor:.2f} x the floor (sets: {min(distances):.4f} to {max(distances):.4f})"
    )


def main():
    fresh = [swiss_roll(N, seed=1000 + i) for i in range(SETS)]
    floor = sum(sliced_wasserstein(x, swiss_roll(N, seed=2000 + i)) for i, x in enumerate(fresh)) / SETS
    print(f"floor {floor:.4f}")
    x0 = swiss_roll(200_000, seed=0)
    for setting in (ddpm, best):
        measure(setting, x0, fresh, floor)


if __name__ == "__main__":
    main()
