"""Metrics against closed forms: float64, no tolerance looser than rounding except where a draw is involved."""

import itertools
import math
import warnings

import pytest
import torch
from scipy import linalg, stats

from diffusion_edu import metrics


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def covariance(d, seed):
    a = normal(d, 2 * d, seed=seed)
    return a @ a.T / (2 * d)


@pytest.mark.equation("metric.sliced_w")
def test_on_the_line_wasserstein_is_the_mean_difference_of_sorted_values():
    x, y = normal(50), normal(50, seed=1) * 2 + 1
    by_hand = sum((a - b) ** 2 for a, b in zip(sorted(x.tolist()), sorted(y.tolist()), strict=True)) / 50
    assert metrics.wasserstein_1d(x, y).item() == pytest.approx(by_hand, rel=1e-13)
    assert metrics.sliced_wasserstein(x[:, None], y[:, None]) == pytest.approx(math.sqrt(by_hand), rel=1e-13)


@pytest.mark.parametrize("n, m", [(6, 4), (5, 7), (1, 9), (30, 10)])
def test_unequal_sizes_are_integrated_exactly(n, m):
    x, y = normal(n), normal(m, seed=1)
    repeated = metrics.wasserstein_1d(x.repeat_interleave(m), y.repeat_interleave(n))
    assert metrics.wasserstein_1d(x, y).item() == pytest.approx(repeated.item(), rel=1e-13)
    assert metrics.wasserstein_1d(x, y, p=1).item() == pytest.approx(
        stats.wasserstein_distance(x.numpy(), y.numpy()), rel=1e-12
    )


@pytest.mark.equation("metric.sliced_w")
def test_a_shift_by_v_is_v_over_root_d():
    x, v = normal(300, 4), torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
    assert metrics.sliced_wasserstein(x, x) == 0
    n = 4000
    squared = metrics.sliced_wasserstein(x, x + v, n_directions=n) ** 2
    exact = v.square().sum().item() / 4
    # (u.v)^2 / |v|^2 is Beta(1/2, 3/2): mean 1/4, variance 1/16
    assert abs(squared - exact) < 4 * v.square().sum().item() * 0.25 / math.sqrt(n)


def test_directions_come_from_the_generator():
    x, y = normal(40, 3), normal(40, 3, seed=1)
    draws = [torch.Generator().manual_seed(s) for s in (5, 5, 6)]
    a, b, c = (metrics.sliced_wasserstein(x, y, 20, g) for g in draws)
    assert a == b != c
    assert metrics.sliced_wasserstein(x, y) == metrics.sliced_wasserstein(x, y)


@pytest.mark.equation("metric.mmd_energy")
@pytest.mark.parametrize("distance", [metrics.energy_distance, metrics.mmd])
def test_zero_in_expectation_over_all_splits_of_one_pool(distance):
    """An unbiased statistic averages to exactly 0 over all ways to call half of one pool x and half y."""
    pool = normal(8, 2)
    splits = [list(c) for c in itertools.combinations(range(8), 4)]
    values = [distance(pool[s], pool[[i for i in range(8) if i not in s]]) for s in splits]
    assert sum(values) / len(values) == pytest.approx(0, abs=1e-14)
    assert max(values) > 0.05


@pytest.mark.equation("metric.mmd_energy")
@pytest.mark.parametrize("distance", [metrics.energy_distance, metrics.mmd])
def test_permutation_p_value(distance):
    x, y, gen = normal(60, 2), normal(60, 2, seed=1) + 0.8, torch.Generator().manual_seed(0)
    pool, observed = torch.cat([x, y]), distance(x, y)
    shuffled = [pool[torch.randperm(120, generator=gen)] for _ in range(99)]
    assert all(distance(z[:60], z[60:]) < observed for z in shuffled)  # p = 0.01


def test_energy_distance_is_twice_the_squared_gap_of_distribution_functions():
    x, y = normal(7).sort().values, normal(5, seed=1)
    knots = torch.cat([x, y]).sort().values
    gap = [(x <= k).double().mean() - (y <= k).double().mean() for k in knots[:-1]]
    integral = (torch.stack(gap).square() * knots.diff()).sum()
    within = [torch.cdist(z[:, None], z[:, None]).mean() / (n - 1) for z, n in ((x, 7), (y, 5))]
    # the integral is the biased statistic: its diagonal zeros count as pairs
    assert metrics.energy_distance(x[:, None], y[:, None]) == pytest.approx(
        (2 * integral - sum(within)).item(), rel=1e-12
    )


@pytest.mark.equation("metric.fid")
def test_frechet_distance_of_gaussians():
    mx, my, cx, cy = normal(5), normal(5, seed=1), covariance(5, 2), covariance(5, 3)
    distance = metrics.frechet_gaussian(mx, cx, my, cy)
    assert metrics.frechet_gaussian(mx, cx, mx, cx) == pytest.approx(0, abs=1e-13)
    assert metrics.frechet_gaussian(my, cy, mx, cx) == pytest.approx(distance, rel=1e-12)
    root = torch.from_numpy(linalg.sqrtm((cx @ cy).numpy()).real)
    product = (mx - my).square().sum() + (cx + cy - 2 * root).trace()
    assert distance == pytest.approx(product.item(), rel=1e-10)
    one = metrics.frechet_gaussian(*(torch.tensor(v).double() for v in ([1.0], [[4.0]], [3.0], [[0.25]])))
    assert one == pytest.approx((1 - 3) ** 2 + (2 - 0.5) ** 2, rel=1e-14)


@pytest.mark.equation("metric.fid")
def test_frechet_distance_is_the_cost_of_the_optimal_map():
    """x -> A x + b with symmetric positive A is optimal, so W2^2 = E|x - A x - b|^2 in closed form."""
    mean, cov, a, b = normal(4), covariance(4, 1), covariance(4, 2), normal(4, seed=3)
    moved = torch.eye(4, dtype=torch.float64) - a
    cost = (moved @ mean - b).square().sum() + (moved @ cov @ moved).trace()
    assert metrics.frechet_gaussian(mean, cov, a @ mean + b, a @ cov @ a) == pytest.approx(cost.item(), rel=1e-11)


@pytest.mark.equation("metric.fid")
def test_frechet_distance_of_features_uses_their_moments():
    x = normal(200, 3)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-13)
    assert metrics.frechet_distance(x, x + 2) == pytest.approx(12, rel=1e-12)
    scaled = metrics.frechet_distance(x, 3 * (x - x.mean(0)) + x.mean(0))
    assert scaled == pytest.approx(4 * torch.cov(x.T).trace().item(), rel=1e-12)
    images = normal(40, 1, 2, 3)
    assert metrics.frechet_distance(images, images + 1) == pytest.approx(6, rel=1e-12)


def test_frechet_distance_of_bad_features():
    x = normal(40, 3)
    with pytest.warns(UserWarning, match="features_y: 3 samples in 3 dimensions"):
        few = metrics.frechet_distance(x, x[:3])
    assert isinstance(few, float) and math.isfinite(few)
    same = torch.ones(40, 3, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metrics.frechet_distance(same, same) == 0
        assert metrics.frechet_distance(x, same) == pytest.approx(
            ((x.mean(0) - 1).square().sum() + torch.cov(x.T).trace()).item(), rel=1e-12
        )
    with pytest.raises(ValueError, match="features_x must be finite; got NaN"):
        metrics.frechet_distance(x.index_fill(0, torch.tensor([3]), torch.nan), x)
    with pytest.raises(ValueError, match=r"features_y must have rows of shape \(3,\)"):
        metrics.frechet_distance(x, x[:, :2])
    with pytest.raises(ValueError, match="cov_x must be finite"):
        metrics.frechet_gaussian(torch.zeros(1), torch.full((1, 1), torch.nan), torch.zeros(1), torch.ones(1, 1))


@pytest.mark.equation("metric.inception_score")
def test_inception_score_lies_between_one_and_the_number_of_classes():
    assert metrics.inception_score(torch.eye(10).repeat(3, 1)) == pytest.approx(10, rel=1e-12)
    assert metrics.inception_score(torch.full((7, 4), 0.25)) == pytest.approx(1, rel=1e-12)
    p = torch.softmax(normal(50, 4), 1)
    kl = (p * (p / p.mean(0)).log()).sum(1)
    assert metrics.inception_score(p) == pytest.approx(kl.mean().exp().item(), rel=1e-12)
    with pytest.raises(ValueError, match="probs must be"):
        metrics.inception_score(torch.ones(3, 4))


@pytest.mark.equation("metric.coverage")
def test_precision_and_recall_of_identical_and_disjoint_sets():
    x = normal(60, 2)
    assert metrics.precision_recall(x, x) == (1, 1)
    assert metrics.precision_recall(x, x + 100) == (0, 0)


@pytest.mark.equation("metric.coverage")
def test_one_mode_generator_has_recall_equal_to_the_weight_of_its_mode():
    left, right = normal(30, 2), normal(70, 2, seed=1) + 100
    assert metrics.precision_recall(torch.cat([left, right]), left) == (1, 0.3)
    means = torch.tensor([[0.0, 0.0], [100.0, 100.0], [50.0, 0.0]])
    covered, shares = metrics.mode_coverage(torch.cat([left, right]), means, radius=10)
    assert covered == pytest.approx(2 / 3) and shares.tolist() == [0.3, 0.7, 0]
    assert metrics.mode_coverage(left, means, radius=10)[0] == pytest.approx(1 / 3)


def test_precision_counts_the_kth_neighbour_ball():
    real = torch.tensor([[0.0], [1.0], [3.0]])
    fake = torch.tensor([[-1.0], [-2.0], [5.5], [10.0]])
    # radii of the real samples for k = 1: 1, 1, 2; fakes at -1 is inside, -2, 5.5 and 10 are not
    assert metrics.precision_recall(real, fake, k=1)[0] == 0.25
    # k = 2: radii 3, 2, 3; all but 10 are inside
    assert metrics.precision_recall(real, fake, k=2)[0] == 0.75
    with pytest.raises(ValueError, match="real must have shape .* N at least 4"):
        metrics.precision_recall(real, fake)


def test_nearest_distance_finds_copies_exactly():
    data = normal(50, 1, 8, 8).float()
    assert metrics.nearest_distance(data[[7, 3]], data).tolist() == [0, 0]
    moved = data[[7]].clone()
    moved[0, 0, 0, 0] += 0.5
    assert metrics.nearest_distance(moved, data).item() == pytest.approx(0.5, rel=1e-6)


def test_noise_floor_is_what_fresh_data_scores():
    floor = metrics.noise_floor(lambda i: normal(400, 2, seed=i))
    assert 0 < floor < metrics.sliced_wasserstein(normal(400, 2), normal(400, 2, seed=1) + 0.5) / 2
    pairs = []
    metrics.noise_floor(lambda i: i, lambda x, y: pairs.append((x, y)) or 0, n_pairs=2)
    assert pairs == [(0, 1), (2, 3)]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: metrics.sliced_wasserstein(x, x[:, :1]), "y must have rows of shape"),
        (lambda x: metrics.sliced_wasserstein(x, x, 0), "n_directions must be at least 1"),
        (lambda x: metrics.energy_distance(x[:1], x), "x must have shape .* N at least 2"),
        (lambda x: metrics.mmd(x, x, bandwidth=0), "bandwidth must be greater than 0"),
        (lambda x: metrics.mmd(x / 0, x), "x must be finite"),
        (lambda x: metrics.wasserstein_1d(x, x, p=0.5), "p must be at least 1"),
        (lambda x: metrics.mode_coverage(x, x, radius=-1), "radius must be greater than 0"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(normal(5, 2))
