"""The U-Net: an image and a time in, an image of the same size out."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from .layers import Conditioning, ResBlock, SelfAttention2d, group_norm, zero

PARTS = ("skips", "time", "attention")


class UNet(nn.Module):
    r"""U-Net epsilon_theta for images, conditional on time and, if asked, on a class.

    .. math:: (B, C, H, W),\ t \mapsto (B, C', H, W)

    Each level runs residual blocks, hands its features to the rest of the U at half the size, and runs
    residual blocks again on what comes back, joined to what it had (the skips). The last convolution
    starts at 0: an untrained network predicts 0, and its noise loss starts at E|eps|^2 = 1 per dimension.

    Parameters
    ----------
    in_channels : int
    out_channels : int or None
        None means ``in_channels``; a learned variance needs twice that.
    width : int
        Channels of the first level, a multiple of 8.
    multipliers : sequence of int
        Channels of each level in units of ``width``; every level but the first halves the image.
    n_blocks : int
        Residual blocks of a level on the way down, and again on the way up.
    attention : sequence of int
        Levels (0 is full size) that have self-attention after each block.
    n_classes : int or None
        None: unconditional.
    without : sequence of {"skips", "time", "attention"}
        Parts to leave out, for ablations.

    Raises
    ------
    ValueError
        If the image does not fit: wrong channels, or a size that cannot be halved often enough.

    Equations: arch.unet

    References
    ----------
    .. [1] Ronneberger et al., "U-Net", 2015, arXiv:1505.04597.
    .. [2] Ho et al., 2020, arXiv:2006.11239, appendix B.
    """

    def __init__(
        self,
        in_channels=1,
        out_channels=None,
        width=32,
        multipliers=(1, 2),
        n_blocks=1,
        attention=(1,),
        n_classes=None,
        without=(),
    ):
        super().__init__()
        for part in without:
            checks.one_of("without", part, PARTS)
        self.in_channels = checks.integer("in_channels", in_channels, low=1)
        for level in attention:
            checks.integer("attention", level, 0, len(multipliers) - 1)
        checks.integer("width", width, high=2**16)
        self.factor = 2 ** (len(multipliers) - 1)
        channels = [width * multiplier for multiplier in multipliers]
        cond_dim = 4 * width
        self.condition = Conditioning(cond_dim, n_classes, time="time" not in without)
        self.first = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.body = _Block(channels[-1], channels[-1], cond_dim)  # the turning point of the U
        for level in reversed(range(len(channels))):
            attend = level in attention and "attention" not in without
            block = partial(_Block, cond_dim=cond_dim, attend=attend)
            above = channels[max(level - 1, 0)]
            self.body = _Level(above, channels[level], self.body, block, n_blocks, "skips" not in without)
            if level:
                self.body = _Half(above, channels[level], self.body)
        self.norm = group_norm(channels[0])
        self.last = zero(nn.Conv2d(channels[0], out_channels or in_channels, 3, padding=1))

    def forward(self, x: Tensor, clock: Tensor, y: Tensor | None = None, drop: Tensor | None = None):
        """``x`` (B, C, H, W), ``clock`` (B,), ``y`` (B,) int64, ``drop`` (B,) bool -> (B, C', H, W)."""
        self._check(x)
        h = self.body(self.first(x), self.condition(clock, y, drop))
        return self.last(F.silu(self.norm(h)))

    def _check(self, x):
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            checks.fail("x", f"have in_channels={self.in_channels}: (B, {self.in_channels}, H, W)", tuple(x.shape))
        for size in x.shape[2:]:
            if size == 0 or size % self.factor:
                below = size // self.factor * self.factor
                near = " or ".join(str(valid) for valid in (below, below + self.factor) if valid)
                checks.fail("image size", f"be divisible by {self.factor} (nearest: {near})", tuple(x.shape[2:]))


class _Level(nn.Module):
    """One resolution: blocks, then the rest of the U inside, then blocks on its result and the skips."""

    def __init__(self, channels_in, channels, inside, block, n_blocks, skips):
        super().__init__()
        self.skips = skips
        joined = 2 * channels if skips else channels
        self.down = nn.ModuleList(block(channels if i else channels_in, channels) for i in range(n_blocks))
        self.inside = inside
        self.up = nn.ModuleList(block(joined, channels) for _ in range(n_blocks))

    def forward(self, h, emb):
        kept = []
        for block in self.down:
            h = block(h, emb)
            kept.append(h)
        h = self.inside(h, emb)
        for block in self.up:
            skip = kept.pop()
            h = block(torch.cat([h, skip], dim=1) if self.skips else h, emb)
        return h


class _Half(nn.Module):
    """What is inside, at half the size: a strided convolution before, a doubling and a convolution after."""

    def __init__(self, channels, channels_inside, inside):
        super().__init__()
        self.shrink = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.inside = inside
        self.grow = nn.Conv2d(channels_inside, channels, 3, padding=1)

    def forward(self, h, emb):
        h = self.inside(self.shrink(h), emb)
        return self.grow(F.interpolate(h, scale_factor=2, mode="nearest"))


class _Block(nn.Module):
    """A residual block, with self-attention after it if ``attend``."""

    def __init__(self, channels_in, channels, cond_dim, attend=False):
        super().__init__()
        self.residual = ResBlock(channels_in, channels, cond_dim)
        self.attention = SelfAttention2d(channels) if attend else nn.Identity()

    def forward(self, h, emb):
        return self.attention(self.residual(h, emb))
