r"""Data that needs no download: 2-D toys, 1,797 real 8x8 digits and patches of two photographs.

Points are float32 of shape (n, 2); images are float32 in [-1, 1] of shape (n, C, H, W). Every draw takes a
seed. Start with ``swiss_roll`` for the plane and ``digits`` for images.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from . import checks


def swiss_roll(n: int, seed: int) -> Tensor:
    r"""Points of the 2-D Swiss roll, the data of 2015.

    .. math:: x = \text{make\_swiss\_roll}(n)_{[:, (0, 2)]} / 10 = \tfrac{u}{10} (\cos u, \sin u), \qquad
              u \sim U[1.5 \pi, 4.5 \pi]

    The radius is a tenth of the angle, so it lies in [0.471, 1.414].

    Parameters
    ----------
    n : int
        Number of points, 0 or more.
    seed : int

    Returns
    -------
    Tensor, shape (n, 2), float32

    Equations: swiss.data

    References
    ----------
    .. [1] Sohl-Dickstein et al., "Deep Unsupervised Learning using Nonequilibrium Thermodynamics", 2015,
       arXiv:1503.03585, Fig. 1.
    """
    from sklearn.datasets import make_swiss_roll

    checks.integer("n", n, low=0)
    roll, _ = make_swiss_roll(max(n, 1), random_state=checks.integer("seed", seed, low=0))
    return torch.from_numpy(roll[:n, [0, 2]] / 10).float()


def moons(n: int, seed: int, noise: float = 0.08) -> Tensor:
    """Two interleaved half circles of radius 1, centred on the origin, blurred by ``noise``. Shape (n, 2)."""
    generator = _generator(seed)
    angle = math.pi * torch.rand(checks.integer("n", n, low=0), generator=generator)
    side = 2.0 * torch.randint(2, (n,), generator=generator) - 1
    arcs = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], dim=1)
    return side[:, None] * arcs + noise * torch.randn(n, 2, generator=generator)


def gaussian_grid(n: int, seed: int, side: int = 3, std: float = 0.08) -> Tensor:
    """A mixture of side^2 equal Gaussians with means on a square grid that spans [-1, 1]^2. Shape (n, 2).

    Its exact law is a Gaussian mixture, so ``GaussianMixtureOracle`` is the perfect model of it.
    """
    generator = _generator(seed)
    means = grid_means(side)
    component = torch.randint(len(means), (checks.integer("n", n, low=0),), generator=generator)
    return means[component] + std * torch.randn(n, 2, generator=generator)


def grid_means(side: int = 3) -> Tensor:
    """The means of ``gaussian_grid``, shape (side^2, 2)."""
    line = torch.linspace(-1, 1, checks.integer("side", side, low=2))
    return torch.cartesian_prod(line, line)


def checkerboard(n: int, seed: int) -> Tensor:
    """Uniform on the 8 dark squares of a 4x4 board that spans [-1, 1]^2. Shape (n, 2)."""
    generator = _generator(seed)
    column = torch.randint(4, (checks.integer("n", n, low=0),), generator=generator)
    row = 2 * torch.randint(2, (n,), generator=generator) + column % 2
    return (torch.stack([column, row], dim=1) + torch.rand(n, 2, generator=generator)) / 2 - 1


def digits(split: str = "all") -> tuple[Tensor, Tensor]:
    """Real handwritten digits, 8x8, with their labels.

    Parameters
    ----------
    split : {"train", "test", "all"}
        The halves are fixed and stratified: the images of each class go to train and test in turn.

    Returns
    -------
    x0 : Tensor, shape (N, 1, 8, 8), float32 in [-1, 1]
        17 grey levels; N is 1,797, or 901 and 896 for the halves.
    y : Tensor, shape (N,), int64
        0..9.
    """
    from sklearn.datasets import load_digits

    checks.one_of("split", split, ("train", "test", "all"))
    bunch = load_digits()
    x0 = torch.from_numpy(bunch.images).float()[:, None] / 8 - 1
    y = torch.from_numpy(bunch.target).long()
    if split == "all":
        return x0, y
    occurrence = one_hot(y).cumsum(0).gather(1, y[:, None])[:, 0]  # 1, 2, ... within each class
    half = occurrence % 2 == (1 if split == "train" else 0)
    return x0[half], y[half]


def photo_patches(n: int, size: int, seed: int) -> Tensor:
    """Random square patches of two photographs (a temple, a flower).

    Parameters
    ----------
    n : int
        Number of patches; about half from each photograph.
    size : int
        Side in pixels, 1 to 427.
    seed : int

    Returns
    -------
    Tensor, shape (n, 3, size, size), float32 in [-1, 1]
    """
    from sklearn.datasets import load_sample_images

    checks.integer("n", n, low=0)
    photos = torch.stack([torch.from_numpy(photo.copy()) for photo in load_sample_images().images])
    photos = photos.permute(0, 3, 1, 2)
    height, width = photos.shape[2:]
    checks.integer("size", size, low=1, high=height)
    generator = _generator(seed)
    which = torch.randint(len(photos), (n,), generator=generator)
    top = torch.randint(height - size + 1, (n,), generator=generator)
    left = torch.randint(width - size + 1, (n,), generator=generator)
    patches = photos.unfold(2, size, 1).unfold(3, size, 1)[which, :, top, left]
    return patches.float() / 127.5 - 1


def _generator(seed):
    return torch.Generator().manual_seed(checks.integer("seed", seed, low=0))
