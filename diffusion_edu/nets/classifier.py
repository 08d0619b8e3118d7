"""A small classifier of images: judge of conditional samples, source of features for metrics."""

import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from .layers import group_norm


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
    """

    def __init__(self, in_channels=1, size=8, n_classes=10, width=32, n_features=64):
        super().__init__()
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

    def features(self, x: Tensor) -> Tensor:
        """``x`` (B, C, H, W) in [-1, 1] -> (B, n_features)."""
        if x.shape[1:] != self.shape:
            checks.fail("x", f"have shape (B, {', '.join(map(str, self.shape))})", tuple(x.shape))
        return F.silu(self.body(x))

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (B, n_classes)."""
        return self.head(self.features(x))
