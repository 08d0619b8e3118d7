"""Grey levels: probabilities of bins for every mean and sigma, dequantisation, and bits per dimension."""

import math

import numpy as np
import pytest
import torch
from exact import F64, close, log_normal, normal, randn

from diffusion_edu.bits import bits_per_dim, dequantize, discretized_log_prob, grey_levels, log_likelihood
from diffusion_edu.gaussian import normal_log_prob

LEVELS = (2, 17, 256)
MEANS = (-1e6, -30.0, -1.2, -1.0, -0.31, 0.0, 0.004, 0.5, 1.0, 3.0, 1e6)
SIGMAS = (1e-6, 1e-4, 1e-3, 0.01, 0.05, 0.3, 1.0, 10.0, 1e3, 1e6)


def bins(levels):
    """(x, low, high): every grey level and the ends of its bin, as the equation has them."""
    x = grey_levels(levels)
    low, high = x - 1 / (levels - 1), x + 1 / (levels - 1)
    low[0], high[-1] = -math.inf, math.inf
    return x, low, high


def everything(levels, means=MEANS, dtype=F64):
    """(x, mean, sigma): every level under every mean and sigma."""
    axes = grey_levels(levels), torch.tensor(means, dtype=F64), torch.tensor(SIGMAS, dtype=F64)
    return [v.to(dtype) for v in torch.meshgrid(*axes, indexing="ij")]


def tail_log_mass(low, high):
    """log of the mass of N(0, 1) between two numbers on one side of 0, by erfc: it keeps its digits in the tail."""
    if low < 0:
        low, high = -high, -low
    return math.log((math.erfc(low / math.sqrt(2)) - math.erfc(high / math.sqrt(2))) / 2)


# Probabilities of grey levels


@pytest.mark.equation("elbo.L_0_discrete")
@pytest.mark.parametrize("levels", LEVELS)
def test_the_probabilities_of_all_levels_sum_to_one_whatever_mean_and_sigma(levels):
    total = discretized_log_prob(*everything(levels), levels).exp().sum(0)
    close(total[:, 2:], torch.ones(len(MEANS), len(SIGMAS) - 2), 1e-12)
    for sigma, row in zip(SIGMAS, total.T, strict=True):  # an end of a bin is rounded to 1e-16, so much of a bell
        close(row, torch.ones(len(MEANS)), 1e-12 + 1e-16 / sigma)


@pytest.mark.equation("elbo.L_0_discrete")
@pytest.mark.parametrize("levels", [3, 17, 256])
def test_a_level_has_the_mass_of_the_gaussian_on_its_bin(levels):
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(40))
    x, low, high = bins(levels)
    half = 1 / (levels - 1)
    for mean, sigma in ((0.1, 0.05), (-0.7, 0.3), (0.02, 1.0), (4.0, 2.0), (0.4, 200.0)):
        log_p = discretized_log_prob(x, torch.tensor(mean, dtype=F64), torch.tensor(sigma, dtype=F64), levels)
        ndtr = torch.special.ndtr((high - mean) / sigma) - torch.special.ndtr((low - mean) / sigma)
        close(log_p.exp(), ndtr, 1e-14)
        inner = (
            normal(x[1:-1, None] + half * nodes, mean, sigma**2) @ weights
        ) * half  # 40 nodes: a bin is <= 20 sigma
        seen = inner > 1e-200
        close(log_p[1:-1][seen] - inner[seen].log(), torch.zeros(int(seen.sum())), 1e-11)
    assert log_p[1].item() == pytest.approx(math.log(2 * half) + log_normal(x[1], 0.4, 4e4).item(), abs=1e-4)


@pytest.mark.equation("elbo.L_0_discrete")
@pytest.mark.parametrize("levels", LEVELS)
def test_the_far_tails_keep_their_digits(levels):
    x, low, high = bins(levels)
    for mean in (-2.5, 2.5, 11.0):
        for sigma in (0.1, 0.5, 2.0):
            all_log_p = discretized_log_prob(x, mean, sigma, levels)
            ends = [((a - mean) / sigma, (b - mean) / sigma) for a, b in zip(low.tolist(), high.tolist(), strict=True)]
            for k, (a, b) in enumerate(ends):
                if a * b > 0 and min(abs(a), abs(b)) < 36:  # erfc is a normal number up to 37
                    exact = tail_log_mass(a, b)
                    log_p = all_log_p[k].item()
                    cancelled = 1e-15 / -math.expm1(-abs(b - a) * max(min(abs(a), abs(b)), 0.1))  # in the reference
                    assert log_p == pytest.approx(exact, rel=1e-13, abs=1e-13 + 10 * cancelled)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_value_and_slope_are_finite_for_the_wildest_mean_and_sigma(levels, dtype):
    x, mean, sigma = everything(levels, dtype=dtype)
    log_p = discretized_log_prob(x, mean.requires_grad_(), sigma.requires_grad_(), levels)
    assert log_p.dtype == dtype and log_p.isfinite().all() and log_p.max() <= 0
    for slope in torch.autograd.grad(log_p.sum(), (mean, sigma)):
        assert slope.isfinite().all()


@pytest.mark.parametrize("levels", LEVELS)
def test_single_precision_loses_no_more_than_its_rounding(levels):
    coarse = everything(levels, MEANS[1:-1], torch.float32)
    fine = [v.double() for v in coarse]
    log_p, slope = [], []
    for x, mean, sigma in (coarse, fine):
        log_p.append(discretized_log_prob(x, mean.requires_grad_(), sigma, levels))
        slope.append(torch.autograd.grad(log_p[-1].sum(), mean)[0].double())
    (_, mean, sigma), rounding = (v.detach() for v in fine), 6e-8
    moved = 4 * rounding * (1 + mean.abs())  # of x - mean
    error, slope_error = (log_p[0] - log_p[1]).abs(), (slope[0] - slope[1]).abs()
    assert (error <= 30 * rounding * (1 + log_p[1].abs()) + moved * slope[1].abs()).all()
    assert (
        slope_error <= 200 * rounding * (slope[1].abs() + 1 / sigma) + moved / sigma**2
    ).all()  # curvature: 1/sigma^2


def test_far_from_the_mean_the_slope_is_the_distance_over_the_variance():
    for levels, x, edge in ((17, 0.0, 1 / 16), (256, -1.0, -1 + 1 / 255), (2, -1.0, 0.0)):
        for sigma in (1e-2, 1e-3, 1e-4):  # up to 10^4 standard deviations
            mean = torch.tensor([0.9], requires_grad=True)
            log_p = discretized_log_prob(torch.tensor([x]), mean, sigma, levels)
            (slope,) = torch.autograd.grad(log_p.sum(), mean)
            assert slope.item() == pytest.approx((edge - mean.item()) / sigma**2, rel=1e-3)


def test_the_slopes_are_right_in_every_branch():
    x = grey_levels(17)[[0, 1, 8, 8, 9, 15, 16, 3, 8]]
    mean = torch.tensor([-0.9, -0.5, 0.01, 0.3, 0.1, 0.2, 1.4, -0.6, 0.03], dtype=F64, requires_grad=True)
    sigma = torch.tensor([0.1, 0.3, 0.02, 0.05, 2.0, 0.04, 0.2, 0.12, 0.5], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m, s: discretized_log_prob(x, m, s, 17), (mean, sigma))
    a, b = ((x + sign / 16 - mean) / sigma for sign in (-1, 1))
    a, b = torch.where(x == -1, -math.inf, a), torch.where(x == 1, math.inf, b)
    low, high = torch.where(a > 0, -b, a), torch.where(a > 0, -a, b)  # mirrored to the left tail, for the digits
    p = (torch.erfc(-high / 2**0.5) - torch.erfc(-low / 2**0.5)) / 2
    exact = (normal(a, 0.0, 1.0) - normal(b, 0.0, 1.0)) / (sigma * p)
    log_p = discretized_log_prob(x, mean, sigma, 17)
    close(torch.autograd.grad(log_p.sum(), mean)[0], exact.detach(), 1e-10)


def test_an_example_s_likelihood_sums_over_its_dimensions():
    x = grey_levels(17)[torch.randint(0, 17, (3, 1, 4, 4), generator=torch.Generator().manual_seed(0))]
    mean, sigma = randn(3, 1, 4, 4), randn(3, 1, 4, 4, seed=1).exp()
    by_hand = discretized_log_prob(x, mean, sigma, 17).sum((1, 2, 3))
    close(log_likelihood(x, mean, sigma, 17), by_hand, 1e-13)
    close(log_likelihood(x, mean, sigma), normal_log_prob(x, mean, sigma**2), 0)
    close(log_likelihood(x[:, 0, 0, 0], 0.1, 0.7, 17), log_likelihood(x[:, 0, 0, :1], 0.1, 0.7, 17), 0)
    assert log_likelihood(x[:0], mean[:0], sigma[:0], 17).shape == (0,)


# Dequantisation and bits


def test_dequantisation_fills_the_bins_without_gap_or_overlap():
    for levels in LEVELS:
        x = grey_levels(levels)
        low, middle, high = (dequantize(x, levels, torch.full_like(x, u)) for u in (0.0, 0.5, 1.0))
        close(middle, x, 0)
        close(low[1:], high[:-1], 1e-15)
        close(high - low, torch.full((levels,), 2 / (levels - 1), dtype=F64), 1e-15)
        u = torch.rand(levels, dtype=F64, generator=torch.Generator().manual_seed(0))
        close((dequantize(x, levels, u) - low) * (levels - 1) / 2, u, 1e-12)


@pytest.mark.equation("elbo.nll_bpd", "metric.bpd")
def test_a_uniform_guess_of_256_values_costs_eight_bits():
    for d in (1, 64, 3 * 32 * 32):
        assert bits_per_dim(d * math.log(256), d) == 8.0
        assert bits_per_dim(torch.full((2,), d * math.log(256), dtype=F64), d).tolist() == [8.0, 8.0]
    density = -math.log(255 / 512)  # of a uniform density over all 256 bins
    assert bits_per_dim(density, 1, 256) == pytest.approx(8.0, abs=1e-14)
    assert bits_per_dim(5 * -math.log(8 / 17), 5, 17) == pytest.approx(math.log2(17), abs=1e-14)


@pytest.mark.equation("elbo.nll_bpd")
def test_a_density_is_a_bins_width_away_from_a_probability():
    assert bits_per_dim(0.0, 3, 256) == math.log2(127.5) and bits_per_dim(0.0, 3, 17) == 3.0
    sigma = 50.0  # so wide a bell is flat on a bin: the density is the probability over the width
    for levels in (17, 256):
        x = grey_levels(levels)[1:-1, None]
        probability, density = (-log_likelihood(x, 0.2, sigma, n) for n in (levels, None))
        close(bits_per_dim(density, 1, levels), bits_per_dim(probability, 1), 1e-4)


@pytest.mark.equation("elbo.nll_bpd")
def test_a_density_of_dequantised_data_bounds_the_model_of_the_levels():
    n = 4000
    u = (torch.arange(n, dtype=F64) + 0.5) / n  # the midpoint rule: 1e-7 for a bell that is a bin wide
    slack = []
    for sigma in (0.03, 0.1, 0.4):
        for x in grey_levels(17).tolist():
            y = dequantize(torch.full((n,), x, dtype=F64), 17, u)
            bound = bits_per_dim(-log_normal(y, 0.15, sigma**2).mean(), 1, 17)
            ends = torch.tensor([x - 1 / 16, x + 1 / 16], dtype=F64)
            below, above = torch.special.ndtr((ends - 0.15) / sigma)  # the bins of the density end, at the ends, too
            if above - below > 1e-9:
                slack.append((bound + (above - below).log2()).item())
                mass = normal(y, 0.15, sigma**2).mean() / 8  # E exp: the mass itself
                close(mass.log2(), (above - below).log2(), 1e-5)
    assert min(slack) > 0 and min(slack) < 1e-2 and max(slack) > 1  # Jensen: tight where the density is flat
