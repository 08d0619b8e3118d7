"""A small classifier of images: judge of conditional samples, source of features for metrics."""

import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from .layers import Conditioning, group_norm


class Classifier(nn.Module):
    """Two convolutions, the second at half size, and a hidden layer whose activations are the features.

    Parameters
    ----------
    in_channels, size : int
        Channels and side of the images; the side is even.
    n_classes : int
    width : int
        Channels of the first convolution, a multiple of 8.
    n_features : int
    time : bool
        Whether the network is told the time, as `denoiser.NoisyClassifier` does.
    """

    def __init__(self, in_channels=1, size=8, n_classes=10, width=32, n_features=64, time=False):
        super().__init__()
        if checks.integer("size", size, 2) % 2:
            checks.fail("size", "be even", size)
        self.shape = (in_channels, size, size)
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1),
            group_norm(width),
            nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            group_norm(2 * width),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(2 * width * (size // 2) ** 2, n_features),
        )
        self.head = nn.Linear(n_features, n_classes)
        self.condition = Conditioning(n_features) if time else None

    def features(self, x: Tensor, clock: Tensor | None = None) -> Tensor:
        """``x`` (B, C, H, W) in [-1, 1], ``clock`` (B,) if the network is told the time -> (B, n_features)."""
        if x.shape[1:] != self.shape:
            checks.fail("x", f"have shape (B, {', '.join(map(str, self.shape))})", tuple(x.shape))
        if (clock is None) != (self.condition is None):
            rule = "be left out" if self.condition is None else "be given"
            checks.fail("clock", f"{rule}: time={self.condition is not None}", "None" if clock is None else "a tensor")
        h = self.body(x)
        return F.silu(h if clock is None else h + self.condition(clock))

    def forward(self, x: Tensor, clock: Tensor | None = None) -> Tensor:
        """Logits, shape (B, n_classes)."""
        return self.head(self.features(x, clock))
