"""The exact law of any sampler that is affine in its noises, as every sampler is on a `GaussianOracle`."""

from itertools import count

import torch
from exact import F64, close

from diffusion_edu.samplers import sample


def affine_law(run):
    """Exact (mean, variance) of ``run(noise, like)``, by impulses: no Monte Carlo.

    ``run`` draws everything, x_T included, as ``noise(x)``, starting from the empty tensor ``like`` (rows, 1), and
    returns (rows, 1). Row k is run with its k-th noise 1 and all others 0, the last row with none: the differences
    are the gains.
    """
    calls = count()

    def silence(x):
        next(calls)
        return torch.zeros_like(x)

    run(silence, torch.zeros(1, 1, dtype=torch.float64))
    n_noises, calls = next(calls), count()

    def impulse(x):
        z = torch.zeros_like(x)
        z[next(calls)] = 1
        return z

    out = run(impulse, torch.zeros(n_noises + 1, 1, dtype=torch.float64)).squeeze(1)
    return out[-1].item(), ((out[:-1] - out[-1]) ** 2).sum().item()


def laws_agree(a, b, tol):
    """Assert that two (mean, variance) agree to ``tol``."""
    close(torch.tensor(a, dtype=F64), torch.tensor(b, dtype=F64), tol)


def last(iterator):
    """The last thing an iterator yields."""
    *_, x = iterator
    return x


def sampler_law(step, model, times, start_std=1.0):
    """Exact (mean, variance) of x at the last time, from x_T ~ N(0, start_std^2)."""
    return affine_law(lambda noise, like: last(sample(step, model, start_std * noise(like), times, noise)))
