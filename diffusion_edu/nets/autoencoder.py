"""Networks that say a Gaussian: encoders and decoders of latent-variable models."""

import math

import torch
from torch import Tensor, nn

from .. import checks
from .layers import zero

SIGMAS = ("each", "one")
LIMIT = math.log(1e4)


class GaussianMLP(nn.Module):
    r"""An MLP that names a Gaussian: mean and standard deviation of its output given its input.

    .. math:: p(y \mid x) = \mathcal N\big(\mu_\theta(x),\ \mathrm{diag}\,\sigma_\theta(x)^2\big), \qquad
              \sigma = e^{\ell / 2}

    The last layer starts at 0: an untrained encoder says N(0, I), which is the prior. Sigma stays within 1e-4 and 1e4,
    so that one bad step of a training overflows nothing.

    Parameters
    ----------
    in_shape, out_shape : int or sequence of int
        Shapes of one example, such as ``(1, 8, 8)`` or ``2``.
    width, depth : int
        Hidden units, hidden layers.
    sigma : {"each", "one"}
        "each": the network says a standard deviation for every output and input; "one": a single learned number, which
        starts at ``sigma_start``.
    sigma_start : float
        In [1e-4, 1e4].

    Equations: vae.encoder
    """

    def __init__(self, in_shape, out_shape, width=128, depth=2, sigma="each", sigma_start=1.0):
        super().__init__()
        self.in_shape, self.out_shape = _shape("in_shape", in_shape), _shape("out_shape", out_shape)
        self.sigma = checks.one_of("sigma", sigma, SIGMAS)
        start = 2 * math.log(checks.real("sigma_start", sigma_start, 1e-4, 1e4))
        sizes = [math.prod(self.in_shape)] + [checks.integer("width", width, 1)] * checks.integer("depth", depth, 0)
        layers = [layer for a, b in zip(sizes[:-1], sizes[1:], strict=True) for layer in (nn.Linear(a, b), nn.SiLU())]
        n_out = math.prod(self.out_shape)
        self.body = nn.Sequential(nn.Flatten(), *layers)
        self.last = zero(nn.Linear(sizes[-1], 2 * n_out if sigma == "each" else n_out))
        self.log_var = nn.Parameter(torch.tensor(start)) if sigma == "one" else None
        if sigma == "each":
            nn.init.constant_(self.last.bias[n_out:], start)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``x`` (B, *in_shape) -> mean, sigma, both (B, *out_shape)."""
        if checks.floating("x", x).shape[1:] != self.in_shape:
            checks.fail("x", f"have shape (B, {', '.join(map(str, self.in_shape))})", tuple(x.shape))
        if x.dtype != self.last.weight.dtype and not torch.is_autocast_enabled(x.device.type):
            checks.fail("x", f"have the network's dtype {self.last.weight.dtype}", x.dtype, TypeError)
        h = self.last(self.body(x))
        mean, log_var = (h, self.log_var.expand_as(h)) if self.sigma == "one" else h.chunk(2, dim=1)
        sigma = (log_var / 2).clamp(-LIMIT, LIMIT).exp()
        return mean.unflatten(1, self.out_shape), sigma.unflatten(1, self.out_shape)


def _shape(name, shape):
    """A tuple of positive sizes."""
    sizes = tuple(shape) if isinstance(shape, list | tuple) else (shape,)
    return tuple(checks.integer(name, size, 1) for size in sizes or (0,))
