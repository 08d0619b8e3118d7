"""Exact answers for the tests: plain formulas in Python numbers, independent of the package, and a few shorthands."""

import math

import numpy as np
import torch

F64 = torch.float64
DATA = (1.3, 0.25)  # mean and variance of the Gaussian data of most proofs


def randn(*shape, seed=0, dtype=F64):
    """Standard normal numbers that depend on the seed only."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(a, b, tol=1e-12):
    """Assert that a and b agree to ``tol``, relative to max(1, |b|)."""
    a, b = torch.as_tensor(a, dtype=F64), torch.as_tensor(b, dtype=F64)
    assert a.shape == b.shape, f"shapes differ: {tuple(a.shape)}, {tuple(b.shape)}"
    gap = ((a - b).abs() / b.abs().clamp(min=1)).max().item() if a.numel() else 0.0
    assert gap <= tol, f"differ by {gap:.3g}, more than {tol:g}"


def times(*values):
    """Times as a tensor: ``times(3)`` is 0-d."""
    return torch.tensor(values[0] if len(values) == 1 else values)


def log_normal(x, mean, var):
    """log N(x; mean, var) of numbers; anything broadcasts."""
    return -((x - mean) ** 2) / (2 * var) - torch.log(2 * math.pi * torch.as_tensor(var, dtype=F64)) / 2


def normal(x, mean, var):
    """The density N(x; mean, var) of numbers."""
    return torch.exp(log_normal(x, mean, var))


def gauss_hermite(n=40):
    """Nodes and weights with E f(z) = sum w f(z) for z ~ N(0, 1): exact for polynomials of degree 2n - 1."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(n)
    return torch.from_numpy(nodes), torch.from_numpy(weights) / math.sqrt(2 * math.pi)


def slope(steps, errors):
    """Least-squares order of convergence: minus the slope of log error over log steps."""
    return -np.polyfit(np.log(steps), np.log(errors), 1)[0]


# Samplers as recursions on a mean and a variance, under Gaussian data (gt.affine_propagation). A step is
# (alpha_bar at t, A, B, S): x' = A x + B eps*(x) + S z with the exact eps*.


def running_product(beta):
    """alpha_bar from beta[0..T], multiplied up in plain floats."""
    out = [1.0]
    for b in beta[1:]:
        out.append(out[-1] * (1 - b))
    return out


def ancestral_steps(beta, variance):
    """DDPM's algorithm 2 from t = T to 1; ``variance`` is "beta" or "beta_tilde"."""
    ab = running_product(beta)
    for t in range(len(beta) - 1, 0, -1):
        root = math.sqrt(1 - beta[t])
        var = beta[t] if variance == "beta" else beta[t] * (1 - ab[t - 1]) / (1 - ab[t])
        yield ab[t], 1 / root, -beta[t] / (root * math.sqrt(1 - ab[t])), math.sqrt(var) if t > 1 else 0.0


def ddim_steps(alpha_bar, visited, eta=0.0):
    """DDIM over decreasing times, with sigma = eta sqrt(beta-tilde) of the stride."""
    for t, s in zip(visited[:-1], visited[1:], strict=True):
        a_t, a_s = alpha_bar[t], alpha_bar[s]
        var = eta**2 * (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
        keep = math.sqrt(a_s / a_t)
        yield a_t, keep, math.sqrt(1 - a_s - var) - keep * math.sqrt(1 - a_t), math.sqrt(var)


def propagate(steps, data=DATA, start=(0.0, 1.0)):
    """Exact (mean, variance) after the steps, from N(start), for data N(data)."""
    (m, s2), (mean, var) = data, start
    for ab, a, b, sigma in steps:
        k = math.sqrt(1 - ab) / (ab * s2 + 1 - ab)
        gain = a + b * k
        mean, var = gain * mean - b * k * math.sqrt(ab) * m, gain * gain * var + sigma * sigma
    return mean, var
