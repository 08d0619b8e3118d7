"""The probability flow on a line, exactly: it never lets two points change places, so every quantile goes to itself."""

import torch
from exact import F64

from diffusion_edu.oracles import GaussianMixtureOracle
from diffusion_edu.process import VPSDE

START = torch.linspace(-2, 2, 41, dtype=F64)[:, None]
MIXTURES = {  # means, stds, weights
    "three": ([-2.0, 0.5, 2.0], [0.3, 0.2, 0.4], [0.3, 0.5, 0.2]),
    "two": ([-1.0, 1.0], [0.25, 0.25], [0.4, 0.6]),
}


def on_a_line(name, process=None):
    """The exact model of one of the mixtures, by default on VPSDE(0.1, 20)."""
    means, stds, weights = MIXTURES[name]
    return GaussianMixtureOracle(process or VPSDE(), torch.tensor(means, dtype=F64)[:, None], stds, weights)


def share_below(oracle, x, t):
    """The distribution function of q_t at x."""
    a, b = oracle.process.marginal(torch.tensor(t, dtype=F64))
    spread = (a**2 * oracle.stds**2 + b**2).sqrt()
    return (oracle.log_weights.exp() * torch.special.ndtr((x - a * oracle.means.T) / spread)).sum(1, keepdim=True)


def carried(oracle, x, t, s):
    """Where the flow carries x from time t to time s: the same share of q_s lies below. By bisection."""
    share = share_below(oracle, x, t)
    low, high = torch.full_like(x, -20.0), torch.full_like(x, 20.0)
    for _ in range(60):  # 40 / 2^60: to the last digit
        middle = (low + high) / 2
        below = share_below(oracle, middle, s) < share
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low
