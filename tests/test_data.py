"""Toys, digits and patches: their geometry, their splits, and that the seed decides everything."""

import gzip
import hashlib
import math

import pytest
import torch

from diffusion_edu import data

TOYS = (data.swiss_roll, data.moons, data.gaussian_grid, data.checkerboard)


@pytest.mark.equation("swiss.data")
def test_swiss_roll_radius_is_a_tenth_of_the_angle():
    x = data.swiss_roll(2000, seed=0).double()
    radius = x.norm(dim=1)
    assert x.shape == (2000, 2)
    assert 0.15 * math.pi <= radius.min() and radius.max() <= 0.45 * math.pi
    on_roll = radius[:, None] * torch.stack([(10 * radius).cos(), (10 * radius).sin()], dim=1)
    torch.testing.assert_close(x, on_roll, rtol=0, atol=1e-5)  # float32 radius, times the angle up to 14
    assert radius.min() < 0.48 and radius.max() > 1.40
    assert data.swiss_roll(5, 0).dtype == torch.float32


@pytest.mark.parametrize("toy", TOYS, ids=lambda f: f.__name__)
def test_the_seed_decides_every_toy(toy):
    assert torch.equal(toy(100, seed=3), toy(100, seed=3))
    assert not torch.equal(toy(100, seed=3), toy(100, seed=4))
    assert toy(0, seed=0).shape == (0, 2)
    assert toy(7, seed=0).dtype == torch.float32
    assert toy(4000, seed=1).abs().max() < 2


@pytest.mark.parametrize("toy", TOYS, ids=lambda f: f.__name__)
def test_bad_arguments_are_named(toy):
    with pytest.raises(ValueError, match="n must be at least 0; got -1"):
        toy(-1, seed=0)
    with pytest.raises(TypeError, match="n must be an integer"):
        toy(2.5, seed=0)
    with pytest.raises(TypeError, match="seed must be an integer"):
        toy(3, seed=None)


def test_gaussian_grid_has_the_moments_of_its_mixture():
    x = data.gaussian_grid(40_000, seed=0, side=3, std=0.1).double()
    variance = data.grid_means(3).double().var(dim=0, correction=0) + 0.1**2
    stderr = (variance / len(x)).sqrt()
    assert (x.mean(0).abs() < 4 * stderr).all()
    torch.testing.assert_close(x.var(0), variance, rtol=0.03, atol=0)  # 4 standard errors: 4 sqrt(2 / n)


def test_checkerboard_fills_exactly_the_dark_squares():
    cell = ((data.checkerboard(8000, seed=0) + 1) * 2).floor().long()
    assert ((cell.sum(1) % 2) == 0).all()
    counts = torch.bincount(4 * cell[:, 0] + cell[:, 1], minlength=16)
    assert (counts > 0).sum() == 8
    assert counts.max() < 1000 + 4 * 30  # Binomial(8000, 1/8): standard deviation 29.6


def test_moons_are_centred_and_have_two_arcs():
    x = data.moons(4000, seed=0, noise=0.0)
    upper = (x - torch.tensor([-0.5, -0.25])).norm(dim=1)
    lower = (x - torch.tensor([0.5, 0.25])).norm(dim=1)
    assert (torch.minimum((upper - 1).abs(), (lower - 1).abs()) < 1e-6).all()


def test_digit_halves_are_disjoint_stratified_and_whole():
    (x, y), (a, ya), (b, yb) = data.digits("all"), data.digits("train"), data.digits("test")
    assert x.shape == (1797, 1, 8, 8) and x.dtype == torch.float32 and y.dtype == torch.int64
    assert x.min() == -1 and x.max() == 1 and len(x.unique()) == 17
    assert len(a) + len(b) == 1797 and (len(a), len(b)) == (901, 896)
    assert (torch.bincount(ya) - torch.bincount(yb)).abs().max() <= 1
    both = torch.cat([a, b]).flatten(1)
    assert torch.equal(both.sum(0), x.flatten(1).sum(0))  # sums of multiples of 1/8 are exact
    with pytest.raises(ValueError, match="did you mean 'train'"):
        data.digits("trian")


def test_photo_patches_are_crops_of_the_photographs():
    from sklearn.datasets import load_sample_images

    x = data.photo_patches(6, 5, seed=0)
    assert x.shape == (6, 3, 5, 5) and x.min() >= -1 and x.max() <= 1
    assert torch.equal(x, data.photo_patches(6, 5, seed=0))
    photos = torch.stack([torch.from_numpy(p.copy()) for p in load_sample_images().images]) / 127.5 - 1
    for patch in x.permute(0, 2, 3, 1):
        where = torch.ones(photos.shape[0], photos.shape[1] - 4, photos.shape[2] - 4, dtype=torch.bool)
        for i in range(5):
            for j in range(5):
                pixel = photos[:, i : photos.shape[1] - 4 + i, j : photos.shape[2] - 4 + j]
                where &= (pixel == patch[i, j]).all(dim=-1)
        assert where.any()
    with pytest.raises(ValueError, match="size must be in"):
        data.photo_patches(1, 428, seed=0)


# Two sets on the disk


def idx(values, shape):
    """A gzipped IDX file of bytes."""
    head = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    return gzip.compress(head + bytes(values), 1)


@pytest.fixture
def clothes(tmp_path, monkeypatch):
    """Four files like Fashion-MNIST's, with three images and two, made to pass for the published ones."""
    files = {}
    for prefix, n in (("train", 3), ("t10k", 2)):
        files[f"{prefix}-images-idx3-ubyte.gz"] = idx([i % 256 for i in range(n * 784)], (n, 28, 28))
        files[f"{prefix}-labels-idx1-ubyte.gz"] = idx(range(n), (n,))
    sums = {name: hashlib.sha256(gzip.decompress(blob)).hexdigest() for name, blob in files.items()}
    monkeypatch.setattr(data, "FASHION_SHA256", sums)
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    for name, blob in files.items():
        (folder / name).write_bytes(blob)
    return folder


def test_clothes_are_read_and_padded_with_black(clothes, monkeypatch):
    for split, n in (("train", 3), ("test", 2)):
        x0, y = data.fashion_mnist(split, clothes)
        assert x0.shape == (n, 1, 32, 32) and x0.dtype == torch.float32 and y.dtype == torch.int64
        assert torch.equal(y, torch.arange(n))
        inside = (torch.arange(n * 784) % 256).reshape(n, 1, 28, 28) / 127.5 - 1
        assert torch.equal(x0[:, :, 2:30, 2:30], inside) and inside.min() == -1 and inside.max() == 1
        frame = torch.ones(32, 32, dtype=torch.bool)
        frame[2:30, 2:30] = False
        assert (x0[:, :, frame] == -1).all()
    monkeypatch.setenv("DIFFUSION_EDU_DATA", str(clothes.parent))
    assert torch.equal(data.fashion_mnist("test")[0], x0)


def damaged(path, change):
    blob = path.read_bytes()
    path.write_bytes(change(blob))
    with pytest.raises(ValueError, match=f"{path.name} is damaged: ") as error:
        data.fashion_mnist("train", path.parent)
    assert "\n" not in str(error.value)
    path.write_bytes(blob)


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"])
def test_damaged_clothes_are_told_by_their_file(clothes, name, monkeypatch):
    path = clothes / name
    for share in (0.0, 0.1, 0.5, 0.99):
        damaged(path, lambda blob, share=share: blob[: int(share * len(blob))])
    damaged(path, lambda blob: blob[:-1])
    damaged(path, lambda blob: blob[:-8] + bytes(8))  # checksum and size at the end
    damaged(path, lambda blob: b"<html>not found</html>")
    damaged(path, lambda blob: gzip.decompress(blob))
    damaged(path, lambda blob: gzip.compress(b"\1" + gzip.decompress(blob)[1:]))  # the magic number
    damaged(path, lambda blob: gzip.compress(gzip.decompress(blob)[:-1]))
    damaged(path, lambda blob: (clothes / name.replace("train", "t10k")).read_bytes())
    if "images" in name:
        monkeypatch.setattr(data, "MOST_BYTES", 1000)
        damaged(path, lambda blob: blob)  # it unpacks to more than it may


def test_missing_clothes_are_told_with_where_to_get_them(clothes, monkeypatch, tmp_path):
    (clothes / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(
        FileNotFoundError, match="t10k-labels-idx1-ubyte.gz does not exist; its four files are at https:"
    ):
        data.fashion_mnist("test", clothes)
    assert len(data.fashion_mnist("train", clothes)[0]) == 3
    monkeypatch.delenv("DIFFUSION_EDU_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="set DIFFUSION_EDU_DATA to the folder that holds fashion-mnist/; its"):
        data.fashion_mnist()
    with pytest.raises(
        FileNotFoundError, match="set DIFFUSION_EDU_DATA to .* cifar-10-batches-bin/; the binary version"
    ):
        data.cifar10()
    for load in (data.fashion_mnist, data.cifar10):
        with pytest.raises(ValueError, match="split must be one of 'train', 'test'; got 'all'"):
            load("all", tmp_path)


def test_the_published_clothes_are_as_published():
    try:
        x0, y = data.fashion_mnist("train")
    except FileNotFoundError:
        pytest.skip("set DIFFUSION_EDU_DATA to a folder that holds fashion-mnist/")
    assert x0.shape == (60_000, 1, 32, 32) and torch.bincount(y).tolist() == [6000] * 10
    shown = (x0[:, :, 2:30, 2:30].double() + 1) / 2
    assert round(shown.mean().item(), 4) == 0.2860 and round(shown.std().item(), 4) == 0.3530


def test_small_colour_images_are_read_and_wrong_sizes_refused(tmp_path):
    path = tmp_path / "test_batch.bin"
    with open(path, "wb") as file:
        file.truncate(10_000 * 3073)  # zeros
        for i, label in ((0, 3), (9999, 9)):
            file.seek(i * 3073)
            file.write(bytes([label, 255, 51]))
        file.seek(9999 * 3073 + 1 + 1024 + 33)
        file.write(bytes([102]))  # green, second row, second column
    x0, y = data.cifar10("test", tmp_path)
    assert x0.shape == (10_000, 3, 32, 32) and x0.dtype == torch.float32 and y.dtype == torch.int64
    assert y[[0, 1, 9999]].tolist() == [3, 0, 9]
    assert x0[0, 0, 0, :3].tolist() == [1.0, pytest.approx(51 / 127.5 - 1), -1.0]
    assert x0[9999, 1, 1, 1].item() == pytest.approx(102 / 127.5 - 1) and (x0 > -1).sum() == 5
    with open(path, "r+b") as file:
        file.write(bytes([10]))
    with pytest.raises(ValueError, match="is damaged: a label is above 9"):
        data.cifar10("test", tmp_path)
    path.write_bytes(b"<html>")
    with pytest.raises(ValueError, match="test_batch.bin is damaged: 6 bytes in place of 30730000"):
        data.cifar10("test", tmp_path)
    with pytest.raises(FileNotFoundError, match="data_batch_1.bin does not exist; the binary version is at https"):
        data.cifar10("train", tmp_path)


def test_a_tile_holds_its_images_row_by_row_and_fills_up():
    images = torch.arange(5 * 2 * 3 * 4.0).reshape(5, 2, 3, 4)
    tiled = data.tile(images, 3)
    assert tiled.shape == (2, 6, 12)
    for i, image in enumerate(images):
        top, left = i // 3 * 3, i % 3 * 4
        assert torch.equal(tiled[:, top : top + 3, left : left + 4], image)
    assert (tiled[:, 3:, 8:] == -1).all()
    assert data.tile(images[:0], 3).shape == (2, 0, 12)
    with pytest.raises(ValueError, match="columns must be at least 1"):
        data.tile(images, 0)
