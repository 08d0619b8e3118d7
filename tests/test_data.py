"""Toys, digits and patches: their geometry, their splits, and that the seed decides everything."""

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
