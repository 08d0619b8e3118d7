r"""Data that needs no download: 2-D toys, 1,797 real 8x8 digits, patches of two photographs; and two sets on your disk.

Points are float32 of shape (n, 2); images are float32 in [-1, 1] of shape (n, C, H, W). Every draw takes a
seed. Start with ``swiss_roll`` for the plane and ``digits`` for images.
"""

import gzip
import hashlib
import math
import os
import zlib
from pathlib import Path

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


def fashion_mnist(split: str = "train", folder=None) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST, 28x28 and black all round to 32x32, from the four gzipped IDX files on your disk.

    Parameters
    ----------
    split : {"train", "test"}
        60,000 and 10,000 images.
    folder : path or None
        None: ``fashion-mnist/`` in ``$DIFFUSION_EDU_DATA``.

    Returns
    -------
    x0 : Tensor, shape (N, 1, 32, 32), float32 in [-1, 1]
    y : Tensor, shape (N,), int64
        T-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, boot.

    Raises
    ------
    FileNotFoundError
        If a file is missing: says where the files are to be had.
    ValueError
        If a file is damaged: names it.
    """
    prefix = {"train": "train", "test": "t10k"}[checks.one_of("split", split, ("train", "test"))]
    names = (f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz")
    images, labels = (_idx(_disk("fashion-mnist", folder, name, FASHION), FASHION_SHA256[name]) for name in names)
    x0 = torch.nn.functional.pad(images.reshape(-1, 1, 28, 28).float() / 127.5 - 1, (2, 2, 2, 2), value=-1.0)
    return x0, labels.long()


FASHION = "its four files are at https://github.com/zalandoresearch/fashion-mnist"
FASHION_SHA256 = {  # of the uncompressed files
    "train-images-idx3-ubyte.gz": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte.gz": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte.gz": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte.gz": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
MOST_BYTES = 50_000_000  # the largest of them has 47,040,016: a file that unpacks to more is none of them


def cifar10(split: str = "train", folder=None) -> tuple[Tensor, Tensor]:
    """CIFAR-10, 32x32 in colour, from the files of its binary version on your disk (no pickle).

    Parameters
    ----------
    split : {"train", "test"}
        50,000 and 10,000 images.
    folder : path or None
        None: ``cifar-10-batches-bin/`` in ``$DIFFUSION_EDU_DATA``.

    Returns
    -------
    x0 : Tensor, shape (N, 3, 32, 32), float32 in [-1, 1]
    y : Tensor, shape (N,), int64
    """
    names = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
    where = "the binary version is at https://www.cs.toronto.edu/~kriz/cifar.html"
    rows = []
    for name in names[checks.one_of("split", split, ("train", "test"))]:
        path = _disk("cifar-10-batches-bin", folder, name, where)
        blob = path.read_bytes()
        if len(blob) != 10_000 * 3073:
            raise ValueError(f"{path} is damaged: {len(blob)} bytes in place of {10_000 * 3073}")
        rows.append(torch.frombuffer(bytearray(blob), dtype=torch.uint8).reshape(10_000, 3073))
    rows = torch.cat(rows)
    if rows[:, 0].max() > 9:
        raise ValueError(f"{path.parent} is damaged: a label is above 9")
    return rows[:, 1:].reshape(-1, 3, 32, 32).float() / 127.5 - 1, rows[:, 0].long()


def _disk(default, folder, name, where):
    """The path of a file of a data set, or an error that says where to get it."""
    root = os.environ.get("DIFFUSION_EDU_DATA")
    if folder is None and not root:
        raise FileNotFoundError(f"set DIFFUSION_EDU_DATA to the folder that holds {default}/; {where}")
    path = Path(folder or Path(root) / default) / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; {where}")
    return path


def _idx(path, sha256):
    """The array of bytes in a gzipped IDX file, which is the published one."""
    try:
        with gzip.open(path) as file:
            blob = file.read(MOST_BYTES + 1)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if hashlib.sha256(blob).hexdigest() != sha256:
        raise ValueError(f"{path} is damaged: its SHA-256 is not that of the published file")
    head = 4 + 4 * blob[3]  # 0, 0, 8 for bytes, the number of dimensions, then their sizes
    shape = [int.from_bytes(blob[i : i + 4], "big") for i in range(4, head, 4)]
    return torch.frombuffer(bytearray(blob), dtype=torch.uint8, offset=head).reshape(shape)


def tile(images: Tensor, columns: int) -> Tensor:
    """Images (B, C, H, W) in [-1, 1] as one, (C, rows H, columns W), filled up with -1."""
    empty = -len(images) % checks.integer("columns", columns, 1)
    images = torch.cat([images, images.new_full((empty, *images.shape[1:]), -1.0)])
    rows = images.reshape(len(images) // columns, columns, *images.shape[1:])
    return rows.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)


def _generator(seed):
    return torch.Generator().manual_seed(checks.integer("seed", seed, low=0))
