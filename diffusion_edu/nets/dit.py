"""The diffusion transformer: an image as a row of patches, told time and class in one of three ways."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from .layers import Conditioning, attention, time_embedding, zero


def patchify(x: Tensor, patch: int) -> Tensor:
    """Images (B, C, H, W) as tokens (B, H W / patch^2, C patch^2), row by row."""
    B, C, H, W = x.shape
    tokens = x.reshape(B, C, H // patch, patch, W // patch, patch)
    return tokens.permute(0, 2, 4, 1, 3, 5).reshape(B, -1, C * patch**2)


def unpatchify(tokens: Tensor, patch: int, size: tuple[int, int]) -> Tensor:
    """The inverse of `patchify`, for images of ``size`` = (H, W)."""
    B, _, n = tokens.shape
    H, W = size
    x = tokens.reshape(B, H // patch, W // patch, n // patch**2, patch, patch)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(B, -1, H, W)


def position_table(height: int, width: int, dim: int) -> Tensor:
    """Sinusoidal embeddings of the rows in one half of the features, of the columns in the other: (H W, dim)."""
    rows, columns = (time_embedding(torch.arange(n, dtype=torch.float64), dim // 2) for n in (height, width))
    return torch.cat([rows.repeat_interleave(width, 0), columns.repeat(height, 1)], 1).float()


class Attention(nn.Module):
    """Multi-head attention of tokens (B, N, width) on themselves, or on a ``context`` (B, M, width)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, context=None):
        if context is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            weight, bias = self.qkv.weight.split(x.shape[-1]), self.qkv.bias.split(x.shape[-1])
            q, k, v = (F.linear(z, w, b) for z, w, b in zip((x, context, context), weight, bias, strict=True))
        q, k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in (q, k, v))
        return self.out(attention(q, k, v).transpose(1, 2).flatten(2))


def feed_forward(width):
    """The transformer's two-layer network, four times as wide inside."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))


class AdaLNZeroBlock(nn.Module):
    r"""A transformer block whose norms are steered by time and class, and which starts as the identity.

    .. math:: x \leftarrow x + \alpha_1 \odot \mathrm{Attn}\big((1 + \gamma_1) \odot \mathrm{LN}(x) + \beta_1\big),
              \qquad x \leftarrow x + \alpha_2 \odot \mathrm{MLP}\big((1 + \gamma_2) \odot \mathrm{LN}(x) + \beta_2\big)

    The six vectors are one linear map of SiLU(c), which is 0 at the start: so alpha = 0, and the block does nothing.

    Equations: arch.adaln_zero

    References
    ----------
    .. [1] Peebles and Xie, "Scalable Diffusion Models with Transformers", 2022, arXiv:2212.09748, section 3.2.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.attention, self.mlp = Attention(width, heads), feed_forward(width)
        self.modulation = zero(nn.Linear(width, 6 * width))

    def forward(self, x, c):
        """``x`` (B, N, width), ``c`` (B, width) -> (B, N, width)."""
        beta1, gamma1, alpha1, beta2, gamma2, alpha2 = self.modulation(F.silu(c))[:, None].chunk(6, dim=-1)
        x = x + alpha1 * self.attention(modulate(x, gamma1, beta1))
        return x + alpha2 * self.mlp(modulate(x, gamma2, beta2))


def modulate(x, gamma, beta):
    """(1 + gamma) LN(x) + beta."""
    return (1 + gamma) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + beta


class InContextBlock(nn.Module):
    """A plain transformer block: time and class are more tokens, `DiT` appends them to the patches."""

    def __init__(self, width, heads):
        super().__init__()
        self.attention, self.mlp = Attention(width, heads), feed_forward(width)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)

    def forward(self, x, c):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CrossBlock(InContextBlock):
    """A transformer block that looks at time and class, two tokens, by attention of its own."""

    def __init__(self, width, heads):
        super().__init__(width, heads)
        self.cross, self.norm = Attention(width, heads), nn.LayerNorm(width, eps=1e-6)

    def forward(self, x, c):
        x = x + self.attention(self.norm1(x))
        x = x + self.cross(self.norm(x), c)
        return x + self.mlp(self.norm2(x))


BLOCKS = {"adaln_zero": AdaLNZeroBlock, "in_context": InContextBlock, "cross": CrossBlock}


class DiT(nn.Module):
    r"""Diffusion transformer, conditional on time and, if asked, on a class.

    .. math:: (B, C, H, W) \xrightarrow{\text{patchify, linear}} (B, N, D) \xrightarrow{\text{blocks}} (B, N, D)
              \xrightarrow{\text{linear, unpatchify}} (B, C', H, W), \qquad N = H W / p^2

    The last linear map starts at 0, so an untrained network predicts 0.

    Parameters
    ----------
    shape : (int, int, int)
        (C, H, W) of the images.
    patch : int
        p, which divides H and W: N, and the cost of attention N^2, grow as it falls.
    width, depth, heads : int
        D, a multiple of 4 and of ``heads``; number of blocks; heads of each attention.
    n_classes : int or None
        None: unconditional.
    out_channels : int or None
        None means C; a learned variance needs 2 C.
    conditioning : {"adaln_zero", "in_context", "cross"}
        How the blocks are told time and class.

    Equations: arch.dit, arch.adaln_zero

    References
    ----------
    .. [1] Peebles and Xie, 2022, arXiv:2212.09748.
    """

    def __init__(
        self,
        shape=(1, 8, 8),
        patch=2,
        width=128,
        depth=4,
        heads=4,
        n_classes=None,
        out_channels=None,
        conditioning="adaln_zero",
    ):
        super().__init__()
        channels, *size = (checks.integer("shape", n, 1) for n in shape)
        for side in size:
            if side % checks.integer("patch", patch, 1):
                checks.fail("patch", f"divide the image's size {tuple(size)}", patch)
        if checks.integer("width", width, 4, 2**16) % 4 or width % checks.integer("heads", heads, 1):
            checks.fail("width", f"be a multiple of 4 and of heads = {heads}", width)
        checks.integer("depth", depth, 1, 10**4)
        self.shape, self.patch = (channels, *size), patch
        self.conditioning = checks.one_of("conditioning", conditioning, tuple(BLOCKS))
        self.first = nn.Linear(channels * patch**2, width)
        self.register_buffer("positions", position_table(*(n // patch for n in size), width), persistent=False)
        self.condition = Conditioning(width, n_classes, deep=True)
        self.blocks = nn.ModuleList(BLOCKS[conditioning](width, heads) for _ in range(depth))
        self.modulation = zero(nn.Linear(width, 2 * width))
        self.last = zero(nn.Linear(width, (out_channels or channels) * patch**2))

    def forward(self, x: Tensor, clock: Tensor, y: Tensor | None = None, drop: Tensor | None = None):
        """``x`` (B, C, H, W), ``clock`` (B,), ``y`` (B,) int64, ``drop`` (B,) bool -> (B, C', H, W)."""
        if x.shape[1:] != self.shape:
            checks.fail("x", f"have shape (B, {', '.join(map(str, self.shape))})", tuple(x.shape))
        h = self.first(patchify(x, self.patch)) + self.positions
        told = torch.stack(self.condition.parts(clock, y, drop), dim=1)  # (B, 1 or 2, width)
        c = told.sum(1)
        if self.conditioning == "in_context":
            h = torch.cat([h, told], dim=1)
        for block in self.blocks:
            h = block(h, told if self.conditioning == "cross" else c)
        beta, gamma = self.modulation(F.silu(c))[:, None].chunk(2, dim=-1)
        h = modulate(h[:, : len(self.positions)], gamma, beta)
        return unpatchify(self.last(h), self.patch, self.shape[1:])
