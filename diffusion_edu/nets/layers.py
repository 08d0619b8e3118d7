"""Parts that the networks share: embeddings of time and label, attention, normalisation, residual blocks.

A network is called as ``net(x_in, clock, y=None, drop=None)``: ``clock`` (B,) is the time as the process
shows it (1000 t / T), ``y`` (B,) int64 are labels, and ``drop`` (B,) bool marks the rows without a label.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks


def zero(module):
    """Set all parameters of ``module`` to 0, so that the block it ends starts as the identity; returns it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def time_embedding(t: Tensor, dim: int, max_period: float = 1e4) -> Tensor:
    r"""Sinusoidal embedding of a time.

    .. math:: e_{2k}(t) = \sin(t\,\omega_k), \quad e_{2k+1}(t) = \cos(t\,\omega_k), \qquad
              \omega_k = \texttt{max\_period}^{-k / (d/2)}, \quad k = 0..d/2 - 1

    Its squared norm is d/2, and the inner product of e(t) and e(s) depends on t - s only.

    Parameters
    ----------
    t : Tensor, shape (B,)
        Clock values, about 0..1000; pass float64 to keep all digits.
    dim : int
        d, even.
    max_period : float
        Sets the slowest frequency.

    Returns
    -------
    Tensor, shape (B, dim), dtype of ``t``

    Equations: arch.time_embed

    References
    ----------
    .. [1] Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, section 3.5.
    """
    checks.floating("t", t)
    if checks.integer("dim", dim, low=2) % 2:
        checks.fail("dim", "be even", dim)
    omega = max_period ** -(torch.arange(dim // 2, device=t.device, dtype=t.dtype) / (dim // 2))
    angle = t[:, None] * omega
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)


class GaussianFourier(nn.Module):
    r"""Random Fourier features of a time or a noise level.

    .. math:: e(t) = [\sin(2\pi t W), \cos(2\pi t W)], \qquad W \sim \mathcal N(0, s^2)

    The mean of the inner product of e(t) and e(s') over W is d/2 times a Gaussian kernel of t - s'.

    Parameters
    ----------
    dim : int
        Number of features d, even.
    scale : float
        s: the larger, the finer the differences of t that the features resolve.
    seed : int
        Draws W, which is fixed after that.

    Equations: arch.fourier

    References
    ----------
    .. [1] Tancik et al., "Fourier Features Let Networks Learn High Frequency Functions in Low Dimensional
       Domains", 2020, arXiv:2006.10739, Eq. 5.
    """

    def __init__(self, dim, scale=1.0, seed=0):
        super().__init__()
        if checks.integer("dim", dim, low=2) % 2:
            checks.fail("dim", "be even", dim)
        generator = torch.Generator().manual_seed(checks.integer("seed", seed, low=0))
        self.register_buffer("frequency", scale * torch.randn(dim // 2, generator=generator))

    def forward(self, t):
        angle = 2 * math.pi * t[:, None] * self.frequency
        return torch.cat([angle.sin(), angle.cos()], dim=1)


TIME_FEATURES = 64


class Conditioning(nn.Module):
    """One vector for what the network is told: a linear map of the embedded clock, plus the embedded label.

    Parameters
    ----------
    dim : int
        Length of the vector.
    n_classes : int or None
        None: no labels. Otherwise labels are 0..n_classes - 1, and one more row is learned: the null label.
    time : bool
        False leaves the clock out, for ablations.
    deep : bool
        Two layers and 256 features for the clock, as in DiT, in place of one and 64.

    Raises
    ------
    ValueError
        If ``y`` is missing from a conditional network or given to an unconditional one.
    """

    def __init__(self, dim, n_classes=None, time=True, deep=False):
        super().__init__()
        self.dim, self.n_classes = dim, n_classes
        self.features = 256 if deep else TIME_FEATURES
        self.time = nn.Linear(self.features, dim) if time else None
        if deep:
            self.time = nn.Sequential(self.time, nn.SiLU(), nn.Linear(dim, dim))
        self.label = nn.Embedding(n_classes + 1, dim) if n_classes else None

    def forward(self, clock, y=None, drop=None):
        parts = self.parts(clock, y, drop)
        return sum(parts) if parts else clock.new_zeros(len(clock), self.dim, dtype=torch.get_default_dtype())

    def parts(self, clock, y=None, drop=None):
        """The embedded clock and the embedded label, each (B, dim), as far as the network is told of them."""
        parts = []
        if self.time is not None:
            dtype = next(self.time.parameters()).dtype
            parts.append(self.time(time_embedding(clock, self.features).to(dtype)))
        if self.label is not None:
            parts.append(self.label(self._rows(clock, y, drop)))
        elif y is not None or drop is not None:
            checks.fail("y", "be left out: the network is unconditional (n_classes=None)", "labels")
        return parts

    def _rows(self, clock, y, drop):
        if y is None:
            checks.fail("y", f"be given: the network has {self.n_classes} classes", "None")
        checks.labels("y", y, len(clock), self.n_classes)
        return y if drop is None else torch.where(drop, self.n_classes, y)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    r"""Scaled dot-product attention: each query takes a weighted mean of the values.

    .. math:: \mathrm{Attention}(Q, K, V) = \mathrm{softmax}\Big(\frac{Q K^\top}{\sqrt d}\Big) V

    Parameters
    ----------
    q : Tensor, shape (B, heads, N, d)
    k, v : Tensor, shape (B, heads, M, d) and (B, heads, M, d_v)
    mask : Tensor or None, shape broadcastable to (B, heads, N, M)
        Boolean; False hides a key from a query.

    Returns
    -------
    Tensor, shape (B, heads, N, d_v)

    Equations: attn.core

    References
    ----------
    .. [1] Vaswani et al., 2017, arXiv:1706.03762, Eq. 1.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class SelfAttention2d(nn.Module):
    """Self-attention in which the N = H W pixels of a feature map are the tokens.

    Without position embedding it commutes with every permutation of the pixels. The output projection starts
    at 0, so the block starts as the identity.

    Parameters
    ----------
    channels : int
        A multiple of 8 (the groups of the normalisation) and of ``heads``.
    heads : int

    Equations: attn.self

    References
    ----------
    .. [1] Ho et al., 2020, arXiv:2006.11239, appendix B.
    """

    def __init__(self, channels, heads=2):
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(1, (3, self.heads, -1)).flatten(4).transpose(3, 4).unbind(1)
        return x + self.out(attention(q, k, v).transpose(2, 3).reshape(x.shape))


def group_norm(channels, affine=True):
    """Group normalisation with 8 groups."""
    if checks.integer("channels", channels, low=8) % 8:
        checks.fail("channels", "be a multiple of 8, the groups of the normalisation", channels)
    return nn.GroupNorm(8, channels, affine=affine)


class AdaGroupNorm(nn.Module):
    r"""Adaptive group normalisation: the condition sets scale and shift.

    .. math:: \mathrm{AdaGN}(h, y) = y_s\,\mathrm{GroupNorm}(h) + y_b

    The linear map that makes (y_s, y_b) from the condition starts at y_s = 1, y_b = 0.

    Parameters
    ----------
    channels : int
        A multiple of 8.
    cond_dim : int
        Length of the conditioning vector.

    Equations: arch.adagn

    References
    ----------
    .. [1] Dhariwal & Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021, arXiv:2105.05233,
       section 3.
    """

    def __init__(self, channels, cond_dim):
        super().__init__()
        self.norm = group_norm(channels, affine=False)
        self.scale_shift = zero(nn.Linear(cond_dim, 2 * channels))

    def forward(self, h, emb):
        """``h`` (B, C, H, W), ``emb`` (B, cond_dim) -> (B, C, H, W)."""
        scale, shift = self.scale_shift(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        return self.norm(h) * (1 + scale) + shift


class ResBlock(nn.Module):
    r"""Residual block that the time and the label steer through `AdaGroupNorm`.

    .. math:: x + \mathrm{conv}_0\big(\mathrm{SiLU}(\mathrm{AdaGN}(
              \mathrm{conv}(\mathrm{SiLU}(\mathrm{GN}(x))), e))\big)

    conv_0 starts at 0, so the block starts as the identity (as a 1x1 convolution where the width changes).

    Parameters
    ----------
    channels_in, channels_out : int
        Multiples of 8.
    cond_dim : int
        Length of the conditioning vector e.

    Equations: arch.resblock

    References
    ----------
    .. [1] Dhariwal & Nichol, 2021, arXiv:2105.05233, appendix A.
    """

    def __init__(self, channels_in, channels_out, cond_dim):
        super().__init__()
        self.norm_in = group_norm(channels_in)
        self.conv_in = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm_out = AdaGroupNorm(channels_out, cond_dim)
        self.conv_out = zero(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        same = channels_in == channels_out
        self.skip = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x, emb):
        """``x`` (B, C_in, H, W), ``emb`` (B, cond_dim) -> (B, C_out, H, W)."""
        h = self.conv_in(F.silu(self.norm_in(x)))
        return self.skip(x) + self.conv_out(F.silu(self.norm_out(h, emb)))


def mp_sum(a: Tensor, b: Tensor, t: float = 0.3) -> Tensor:
    r"""A sum of two branches that keeps their magnitude: unit variance in, unit variance out.

    .. math:: \text{mp-sum}(a, b, t) = \frac{(1 - t)\,a + t\,b}{\sqrt{(1 - t)^2 + t^2}}

    A plain residual sum of two independent branches doubles the variance, block after block.

    Parameters
    ----------
    a, b : Tensor, of one shape
    t : float
        Share of ``b``, in [0, 1].

    Equations: edm2.ema_and_mp

    References
    ----------
    .. [1] Karras et al., "Analyzing and Improving the Training Dynamics of Diffusion Models", 2024, arXiv:2312.02696,
       Eq. 88.
    """
    checks.same_shape("b", b, "a", checks.floating("a", a))
    t = checks.real("t", t, 0, 1)
    return ((1 - t) * a + t * b) / math.hypot(1 - t, t)
