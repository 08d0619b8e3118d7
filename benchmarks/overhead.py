"""What the package adds: to ``import torch``, and to the tensor operations of a DDIM step.

python benchmarks/overhead.py
"""

import statistics
import subprocess
import sys
import time

import torch

from diffusion_edu.denoiser import Denoiser
from diffusion_edu.process import VPSDE, DiscreteVP
from diffusion_edu.samplers import ddim_step, sample
from diffusion_edu.schedules import linear_beta


def run(statement):
    """A fresh interpreter that runs ``statement``."""
    subprocess.run([sys.executable, "-c", statement], check=True)


class Free(torch.nn.Module):
    """A network that costs nothing: it answers a stored tensor."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, clock):
        return self.answer


def bare_steps(x, eps, process, times):
    """DDIM written out with ready coefficients: no interface, no checks, only the update's tensor operations."""
    scales, stds = (c.to(x.dtype) for c in process.marginal(times))
    for i in range(len(times) - 1):
        x0 = (x - stds[i] * eps) / scales[i]
        x = scales[i + 1] * x0 + stds[i + 1] * eps
    return x


def interleaved(first, second, rounds=15):
    """Median seconds of two functions, timed in turns so that both meet the same machine."""
    runs = ([], [])
    for _ in range(rounds):
        for function, seconds in zip((first, second), runs, strict=True):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in runs]


def ddim(process, shape, n_steps=50):
    """Microseconds a step: (through the package, bare), with a network that costs nothing."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    eps = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    model, times = Denoiser(Free(eps), process), process.grid(n_steps)

    def package():
        *_, x0 = sample(ddim_step, model, x, times)
        return x0

    def bare():
        return bare_steps(x, eps, process, times)

    torch.testing.assert_close(package(), bare(), rtol=1e-3, atol=1e-3)
    return [1e6 * seconds / n_steps for seconds in interleaved(package, bare)]


def main():
    torch.set_num_threads(1)
    for name in ("diffusion_edu", "diffusion_edu.samplers, diffusion_edu.training"):
        alone, both = interleaved(lambda: run("import torch"), lambda name=name: run(f"import torch, {name}"), rounds=7)
        print(f"import torch {alone:.2f} s; import {name} after it adds {both - alone:.2f} s")
    for process in (DiscreteVP(linear_beta(1000)), VPSDE()):
        for shape in ((256, 3, 32, 32), (10_000, 2), (64, 1, 8, 8)):
            package, bare = ddim(process, shape)
            name = type(process).__name__
            print(f"DDIM step, {name} {shape}: {package:.0f} us, bare {bare:.0f} us, ratio {package / bare:.2f}")


if __name__ == "__main__":
    main()
