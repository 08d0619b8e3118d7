"""Section 3: Gaussian identities. Float64 throughout; each test names what it is compared with."""

import math
from itertools import pairwise

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from diffusion_edu.gaussian import (
    add_gaussians,
    convolve_density,
    gaussian_product,
    guided_normal,
    kl_equal_var,
    mixture_moments,
    normal_entropy,
    normal_kl,
    normal_log_prob,
    normal_score,
)

F64 = torch.float64


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def close(a, b, tol=1e-12):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


@pytest.mark.equation("gauss.logpdf")
def test_log_density_equals_torch_distributions_and_its_gradient_is_the_score():
    x, mean = randn(5, 3, 2).requires_grad_(), randn(5, 3, 2, seed=1)
    for var in (0.37, torch.tensor(2.5, dtype=F64), randn(5, 1, 1, seed=2).exp(), randn(3, 2, seed=3).exp()):
        log_prob = normal_log_prob(x, mean, var)
        std = torch.as_tensor(var, dtype=F64).sqrt()
        close(log_prob, Normal(mean, std).log_prob(x).sum((1, 2)))
        close(normal_score(x, mean, var), torch.autograd.grad(log_prob.sum(), x)[0])


@pytest.mark.equation("gauss.logpdf")
def test_score_is_minus_the_noise_over_sigma():
    mean, eps, sigma = randn(7, 4), randn(7, 4, seed=1), 0.3
    close(normal_score(mean + sigma * eps, mean, sigma**2), -eps / sigma)


def test_a_one_dimensional_x_is_a_batch_of_scalars():
    x = randn(6)
    close(normal_log_prob(x, 0.0, 1.0), Normal(torch.zeros_like(x), 1.0).log_prob(x))
    close(normal_log_prob(x[:, None], 0.0, 1.0), normal_log_prob(x, 0.0, 1.0))


@pytest.mark.equation("gauss.sum", "gauss.convolution_vs_mixture")
def test_the_density_of_a_sum_is_the_convolution():
    dx = 0.02
    x, y = torch.arange(-10, 8, dx, dtype=F64), torch.arange(-7, 9, dx, dtype=F64)
    (m1, v1), (m2, v2) = (-1.0, 0.5), (1.5, 0.3)
    p, q = normal_log_prob(x, m1, v1).exp(), normal_log_prob(y, m2, v2).exp()
    density = convolve_density(p, q, dx)
    z = x[0] + y[0] + dx * torch.arange(len(density), dtype=F64)
    mean, var = add_gaussians(m1, v1, m2, v2)
    close(density, normal_log_prob(z, mean, var).exp(), 1e-10)  # trapezoid rule: geometric in dx; tails < 1e-20
    close(convolve_density(q, p, dx), density)  # commutes
    close(density.sum() * dx, torch.ones((), dtype=F64))


@pytest.mark.equation("gauss.sum")
def test_sampled_sums_have_the_added_moments():
    n, (m1, v1), (m2, v2) = 100_000, (-1.0, 0.5), (1.5, 2.0)
    total = m1 + v1**0.5 * randn(n) + m2 + v2**0.5 * randn(n, seed=1)
    mean, var = add_gaussians(m1, v1, m2, v2)
    assert abs(total.mean() - mean) < 4 * math.sqrt(var / n)
    assert abs(total.var() - var) < 4 * var * math.sqrt(2 / n)


def test_adding_noise_twice_is_adding_it_once_and_a_constant_has_variance_zero():
    a, b, c = (randn(4, seed=i) for i in range(3))
    va, vb, vc = a.exp(), b.exp(), c.exp()
    left = add_gaussians(*add_gaussians(a, va, b, vb), c, vc)
    right = add_gaussians(a, va, *add_gaussians(b, vb, c, vc))
    for one, other in zip(left, right, strict=True):
        close(one, other)
    mean, var = add_gaussians(a, va, 3.0, 0.0)
    close(mean, a + 3)
    close(var, va)


@pytest.mark.equation("gauss.convolution_vs_mixture")
def test_a_mixture_has_another_variance_than_the_weighted_sum():
    w, m, v = (torch.tensor(a, dtype=F64) for a in ([0.3, 0.7], [-2.0, 1.0], [0.5, 0.25]))
    mean, var = mixture_moments(w, m, v)
    x = torch.arange(-12, 12, 0.01, dtype=F64)
    density = sum(wk * normal_log_prob(x, mk, vk).exp() for wk, mk, vk in zip(w, m, v, strict=True))
    close(mean, (density * x).sum() * 0.01)
    close(var, (density * (x - mean) ** 2).sum() * 0.01)  # integral of the weighted sum of densities
    sum_mean, sum_var = add_gaussians(w[0] * m[0], w[0] ** 2 * v[0], w[1] * m[1], w[1] ** 2 * v[1])
    close(sum_mean, mean)  # the means agree, and that is why the two are confused
    assert var > 10 * sum_var  # 2.215 against 0.1675


@pytest.mark.equation("gauss.product")
def test_the_product_is_a_scaled_gaussian_at_every_point():
    m1, m2, v1, v2 = randn(6), randn(6, seed=1), randn(6, seed=2).exp(), randn(6, seed=3).exp()
    mean, var, log_z = gaussian_product(m1, v1, m2, v2)
    for x in (randn(6, seed=s) * 4 for s in range(4, 9)):
        left = normal_log_prob(x, m1, v1) + normal_log_prob(x, m2, v2)
        close(left, log_z + normal_log_prob(x, mean, var))
    close(1 / var, 1 / v1 + 1 / v2)
    close(log_z, normal_log_prob(m1, m2, v1 + v2))
    assert bool((var < torch.minimum(v1, v2)).all())


@pytest.mark.equation("gauss.kl")
def test_kl_equals_torch_and_a_monte_carlo_mean_of_the_log_ratio():
    m1, m2, v1, v2 = randn(50), randn(50, seed=1), randn(50, seed=2).exp(), randn(50, seed=3).exp()
    kl = normal_kl(m1, v1, m2, v2)
    close(kl, kl_divergence(Normal(m1, v1.sqrt()), Normal(m2, v2.sqrt())), 1e-13)
    n = 40_000
    x = m1[0] + v1[0].sqrt() * randn(n, seed=4)
    log_ratio = normal_log_prob(x, m1[0], v1[0]) - normal_log_prob(x, m2[0], v2[0])
    assert abs(log_ratio.mean() - kl[0]) < 4 * log_ratio.std() / math.sqrt(n)


@pytest.mark.equation("gauss.kl")
def test_kl_is_zero_only_at_equality_and_never_negative():
    v = torch.logspace(-12, 12, 25, dtype=F64)
    assert bool((normal_kl(0.3, v, 0.3, v) == 0).all())
    small = torch.logspace(-14, -1, 40, dtype=F64)
    for v1 in (1 + small, 1 - small):
        kl = normal_kl(0.0, v1, 0.0, 1.0)
        assert bool((kl > 0).all())  # log(v1) alone would round to zero or below
    d = torch.tensor([1e-6], dtype=F64)
    close(normal_kl(0.0, 1 + d, 0.0, 1.0) / (d**2 / 4), torch.ones_like(d), 1e-5)  # next term is -2 d / 3


def test_kl_of_a_vanishing_variance_stays_finite_with_its_gradient():
    logvar = torch.tensor([-50.0, -20.0, 0.0, 3.0], requires_grad=True)
    kl = normal_kl(torch.zeros(4), logvar.exp(), 0.0, 1.0)
    kl.sum().backward()
    close(kl.detach(), 0.5 * (logvar.detach().exp() - 1 - logvar.detach()), 1e-6)  # float32
    close(logvar.grad, 0.5 * (logvar.detach().exp() - 1), 1e-6)
    assert kl.dtype == torch.float32


@pytest.mark.equation("gauss.kl_same_var")
def test_equal_variances_leave_a_scaled_squared_distance():
    mean1, mean2 = randn(5, 3, 2), randn(5, 3, 2, seed=1)
    for var in (0.04, randn(5, 1, 1, seed=2).exp()):
        close(kl_equal_var(mean1, mean2, var), normal_kl(mean1, var, mean2, var).sum((1, 2)), 1e-14)


@pytest.mark.equation("cg.gaussian_closed_form")
@pytest.mark.parametrize("m, s2, y, r2", [(0.0, 1.0, 1.5, 0.4), (-0.7, 0.3, 0.9, 2.0)])
def test_a_prior_times_a_likelihood_to_the_power_w_is_a_gaussian(m, s2, y, r2):
    x = torch.linspace(-8, 8, 4001, dtype=F64)
    for w in (0.0, 0.5, 1.0, 4.0):
        mean, var = guided_normal(y, r2, w, m, s2)
        p = normal_log_prob(x, m, s2).exp() * normal_log_prob(x, y, r2).exp() ** w  # N(y; x, r2) is N(x; y, r2)
        close(p / (p.sum() * 0.004), normal_log_prob(x, mean, var).exp(), 1e-8)
    mean, var = guided_normal(y, r2, 3.0)  # N(0, 1) data: the printed form
    close(mean, torch.tensor(3 * y / (r2 + 3), dtype=F64)), close(var, torch.tensor(1 / (1 + 3 / r2), dtype=F64))


@pytest.mark.equation("cg.tradeoff")
def test_a_larger_scale_trades_entropy_for_likelihood():
    y, r2, scales = 1.5, 0.4, (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 100.0)
    laws = [guided_normal(y, r2, w) for w in scales]
    entropies = [normal_entropy(var).item() for _, var in laws]
    fit = [-((y - mean) ** 2 + var).item() / (2 * r2) for mean, var in laws]  # E log p(y | x), but for a constant
    assert all(a > b for a, b in pairwise(entropies)) and all(a < b for a, b in pairwise(fit))
    close(torch.stack([var for _, var in laws]), 1 / (1 + torch.tensor(scales, dtype=F64) / r2), 1e-15)
    assert abs(laws[-1][0] - y) < 0.01 and laws[-1][1] < 0.005  # in the end the mode of the likelihood is all


@pytest.mark.equation("gauss.entropy")
def test_entropy_equals_torch_and_minus_the_mean_log_density():
    var = randn(9).exp()
    close(normal_entropy(var), Normal(0.0, var.sqrt()).entropy(), 1e-13)
    close(normal_entropy(0.7, d=12), 12 * normal_entropy(0.7), 1e-13)
    x = torch.arange(-12, 12, 0.01, dtype=F64)
    log_p = normal_log_prob(x, 0.0, 0.7)
    close(normal_entropy(0.7), -(log_p.exp() * log_p).sum() * 0.01)
    assert normal_entropy(1 / (2 * math.pi * math.e)).abs() < 1e-15  # the sign changes here


X = torch.zeros(4, 2, dtype=F64)
BAD = [
    (lambda: normal_log_prob(X, 0.0, -1.0), "var must be a variance: finite and greater than 0; got -1"),
    (lambda: normal_log_prob(X, 0.0, 0.0), "var must be a variance"),
    (lambda: normal_score(X, 0.0, torch.tensor([1.0, float("nan")])), "var must be a variance.*got nan"),
    (lambda: normal_log_prob(X, 0.0, torch.ones(4)), r"var must broadcast to the shape of x, \(4, 2\)"),
    (lambda: normal_log_prob(X, torch.ones(1, 4, 2), 1.0), "mean must broadcast"),
    (lambda: normal_log_prob(X, 0.0, float("inf")), "var must be finite"),
    (lambda: add_gaussians(0.0, 1.0, 0.0, -1e-9), "var2 must be a variance: finite and not negative"),
    (lambda: gaussian_product(0.0, 0.0, 0.0, 1.0), "var1 must be a variance"),
    (lambda: gaussian_product(float("nan"), 1.0, 0.0, 1.0), "mean1 must be finite"),
    (lambda: normal_kl(0.0, 1.0, 0.0, 0.0), "var2 must be a variance"),
    (lambda: kl_equal_var(X, X[:2], 1.0), r"mean2 must have the shape of mean1, \(4, 2\)"),
    (lambda: normal_entropy(1.0, d=0), "d must be at least 1"),
    (lambda: guided_normal(0.0, 0.0, 1.0), "r2 must be a variance: finite and greater than 0; got 0"),
    (lambda: guided_normal(0.0, 1.0, -1.0), "w must be at least 0; got -1"),
    (lambda: guided_normal(float("nan"), 1.0, 1.0), "y must be finite"),
    (lambda: guided_normal(0.0, 1.0, 1.0, var=-1.0), "var must be a variance"),
    (lambda: normal_entropy(-1.0), "var must be a variance"),
    (lambda: convolve_density(X, X[0], 0.1), "p must be 1-d and not empty"),
    (lambda: convolve_density(X[0], X[0], 0.0), "dx must be greater than 0"),
    (
        lambda: mixture_moments(torch.tensor([0.5, 0.6]), torch.zeros(2), torch.ones(2)),
        "weights must be non-neg",
    ),
    (
        lambda: mixture_moments(torch.tensor([0.5, 0.5]), torch.zeros(3), torch.ones(2)),
        "means must have the shape",
    ),
]


@pytest.mark.parametrize("call, message", BAD)
def test_bad_values_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("x", [torch.zeros(3, dtype=torch.int64), [0.0, 1.0], torch.zeros(2, dtype=torch.bool)])
def test_x_must_be_a_floating_tensor(x):
    with pytest.raises(TypeError, match="x must be a"):
        normal_log_prob(x, 0.0, 1.0)


def test_numbers_never_promote_a_float32_tensor():
    x = torch.zeros(3, 2)
    assert normal_log_prob(x, 0.0, 2.0).dtype == torch.float32
    assert normal_kl(x, 1.0, 0.0, 2.0).dtype == torch.float32
    assert add_gaussians(0.0, 1.0, 0.0, 1.0)[1].dtype == torch.float64
