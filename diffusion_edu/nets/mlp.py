"""Networks for points in the plane: one shared MLP, and the separate heads of 2015."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from .layers import Conditioning, zero


class MLP(nn.Module):
    r"""Residual MLP for points: the network eps_theta(x, t) of the toy problems.

    .. math:: h = W_0\,\phi(x) + e(t, y), \qquad h \leftarrow h + \mathrm{SiLU}(W_i h)

    with phi(x) = [x, sin(k pi x / 2), cos(k pi x / 2)], k = 1..n_waves: the waves let a small network draw fine detail.
    The last layer starts at 0.

    Parameters
    ----------
    dim : int
        Dimension of a point.
    width, depth : int
        Hidden units, residual layers.
    n_waves : int
        Sinusoidal features of each coordinate; 0 for none.
    n_classes : int or None
        None: unconditional.
    out_dim : int or None
        Outputs; None means ``dim``.

    Equations: arch.mlp
    """

    def __init__(self, dim=2, width=128, depth=3, n_waves=8, n_classes=None, out_dim=None):
        super().__init__()
        self.dim = checks.integer("dim", dim, low=1)
        self.register_buffer("waves", math.pi / 2 * torch.arange(1, n_waves + 1), persistent=False)
        self.condition = Conditioning(width, n_classes)
        self.first = nn.Linear(dim * (1 + 2 * n_waves), width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = zero(nn.Linear(width, out_dim or dim))

    def forward(self, x: Tensor, clock: Tensor, y: Tensor | None = None, drop: Tensor | None = None):
        """``x`` (B, dim), ``clock`` (B,) -> (B, out_dim)."""
        if x.shape[1:] != (self.dim,):
            checks.fail("x", f"have shape (B, {self.dim})", tuple(x.shape))
        angle = (x[:, :, None] * self.waves).flatten(1)
        h = self.first(torch.cat([x, angle.sin(), angle.cos()], dim=1)) + self.condition(clock, y, drop)
        for layer in self.layers:
            h = h + F.silu(layer(h))
        return self.last(h)


class PerStepHeads(nn.Module):
    r"""The Swiss-roll network of 2015: a shared trunk and one head for each time step.

    .. math:: h = \mathrm{ReLU}(W_2\,\mathrm{ReLU}(W_1 x)), \qquad
              (\mu, \log\sigma^2) = \mathrm{head}_t(h) \in \mathbb R^{2 \cdot 2}

    The heads are stacked, so all steps are trained at once by one batched product.

    Parameters
    ----------
    n_steps : int
        Number of heads T; head t serves the step from t to t - 1, t = 1..T.
    width : int

    Equations: swiss.net

    References
    ----------
    .. [1] Sohl-Dickstein et al., 2015, arXiv:1503.03585, section 2.2 and appendix D.
    """

    def __init__(self, n_steps=40, width=128):
        super().__init__()
        self.n_steps = checks.integer("n_steps", n_steps, low=1)
        self.trunk = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        hidden = [nn.Linear(width, width) for _ in range(n_steps)]  # for their start values
        final = [nn.Linear(width, 4) for _ in range(n_steps)]
        self.weight1, self.bias1 = _stack(h.weight for h in hidden), _stack(h.bias for h in hidden)
        self.weight2, self.bias2 = _stack(h.weight for h in final), _stack(h.bias for h in final)

    def forward(self, x: Tensor, t: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log variance of p(x_{t-1} | x_t).

        Parameters
        ----------
        x : Tensor, shape (B, 2), or (T, B, 2) when ``t`` is None
        t : Tensor or None, int64, 0-d or shape (B,), in 1..T
            None: every head at once, head t on ``x[t - 1]``.

        Returns
        -------
        mean, log_var : Tensor, shaped like ``x``
        """
        if t is None:
            groups, head = x, slice(None)
        else:
            head = checks.batch_of_times("t", checks.times_in("t", t, 1, self.n_steps, discrete=True), len(x)) - 1
            groups, head = (x[:, None], head) if t.ndim else (x[None], head[None])
        h = self.trunk(groups)  # (groups, points, width): group g goes through head[g]
        h = F.relu(torch.einsum("gpi,goi->gpo", h, self.weight1[head]) + self.bias1[head][:, None])
        out = torch.einsum("gpi,goi->gpo", h, self.weight2[head]) + self.bias2[head][:, None]
        return out.reshape(*x.shape[:-1], 4).chunk(2, dim=-1)


def _stack(tensors):
    return nn.Parameter(torch.stack([tensor.detach() for tensor in tensors]))
