"""Sections 8 and 12: the variational bound, its terms, its two forms and its weights, and learned variances.

Under Gaussian data every term is quadratic in the noise, so its mean (and its variance) is exact: no sampling where it
can be avoided.
"""

import inspect
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from exact import DATA, F64, close, gauss_hermite, log_normal, randn, running_product, slope, times
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

from diffusion_edu import schedules
from diffusion_edu.bits import discretized_log_prob, grey_levels
from diffusion_edu.denoiser import Denoiser
from diffusion_edu.elbo import (
    ImportanceTimes,
    bound_term,
    bound_terms,
    continuous_term,
    entropy_bound,
    hybrid_loss,
    log_ratio_bound,
    noising_path,
)
from diffusion_edu.gaussian import normal_entropy, normal_kl, normal_log_prob
from diffusion_edu.guidance import bind
from diffusion_edu.losses import TARGETS, denoising_loss, elbo_weight
from diffusion_edu.oracles import GaussianMixtureOracle, GaussianOracle
from diffusion_edu.process import (
    VE,
    VESDE,
    VPSDE,
    DiscreteVP,
    SubVPSDE,
    expand,
    jump,
    posterior,
    q_sample,
    quadratic,
    terminal_kl,
    uniform_log_snr,
)
from diffusion_edu.samplers import (
    KernelStep,
    beta,
    beta_tilde,
    ddim_step,
    kernel_step,
    learned,
    make_ddim_step,
    make_ddpm_step,
    noises,
)
from diffusion_edu.schedules import cosine_beta, linear_beta, zero_terminal_snr

pytestmark = pytest.mark.filterwarnings("ignore:alpha_bar")  # chains of ten steps keep some signal

SCHEDULES = {n: f for n, f in inspect.getmembers(schedules) if n.endswith("_beta") and n != "check_beta"}
HALF_LOG_TAU = math.log(2 * math.pi) / 2  # -log N(0; 0, 1)


def ddpm():
    """DDPM's table."""
    return DiscreteVP(linear_beta(1000))


def ten():
    """The ten steps that the errata's numbers belong to; with them x_0 = 1.7 of N(0, 1)."""
    return DiscreteVP(linear_beta(10, 0.05, 0.5))


X0 = torch.tensor([[1.7]], dtype=F64)
NLL = 1.7**2 / 2 + HALF_LOG_TAU  # 2.363938533


def minus_log_prob(x0):
    """-log N(x0; 0, I) in plain numbers, shape (B,)."""
    return -log_normal(x0, 0.0, 1.0).flatten(1).sum(1)


def mean_terms(step, model, x0, grid):
    """L_T and the exact mean of every later term over its noise, for each row of x0 (N, *D): shape (n + 1, N).

    All steps in one call. Three nodes do for squares; the dimensions may share them, as the terms are sums over them.
    """
    z, w = gauss_hermite(3)
    n, (N, *D), k = len(grid) - 1, x0.shape, len(z)
    rows = torch.cartesian_prod(torch.arange(n), torch.arange(N), torch.arange(k)).T
    eps = z[rows[2]].reshape(-1, *[1] * len(D)).expand(-1, *D)
    terms = bound_term(step, model, x0[rows[1]], grid[rows[0]], grid[rows[0] + 1], eps)
    return torch.cat([terminal_kl(model.process, x0)[None], terms.reshape(n, N, k) @ w])


def data_nodes(mean=0.0, var=1.0):
    """x0 (3, 1) and weights: means over Gaussian data of squares are exact."""
    z, w = gauss_hermite(3)
    return mean + var**0.5 * z[:, None], w


def path(process, x0, grid, z):
    """Trajectories with these noises z (rows, n): column k drives the k-th step up."""
    columns = iter(z.T)
    return noising_path(process, x0.expand(len(z), 1), grid, lambda x: next(columns)[:, None])


def quadratic_law(f, n):
    """Exact (mean, variance) of f(z), z ~ N(0, I_n), for a quadratic f of rows z (rows, n) -> (rows,)."""
    i, j = torch.combinations(torch.arange(n)).T
    e = torch.eye(n, dtype=F64)
    at_0, up, down, both = f(torch.cat([torch.zeros(1, n, dtype=F64), e, -e, e[i] + e[j]])).split([1, n, n, len(i)])
    gradient, curvature, mixed = (up - down) / 2, up + down - 2 * at_0, both - up[i] - up[j] + at_0
    mean = at_0.item() + curvature.sum().item() / 2
    return mean, ((gradient**2).sum() + (curvature**2).sum() / 2 + (mixed**2).sum()).item()


class WithFrac:
    """A model that names a variance, too."""

    def __init__(self, model, frac):
        self.model, self.process, self.frac = model, model.process, frac

    def __call__(self, x_t, t):
        return replace(self.model(x_t, t), frac=self.frac.expand_as(x_t))


# The sum of the terms


@pytest.mark.equation("elbo.total", "elbo.form2", "elbo.L_0")
@pytest.mark.parametrize("T", [10, 100, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_for_normal_data_the_terms_sum_to_the_negative_log_density_of_every_single_point(schedule, T):
    """Also on strides: backwards, the chain of N(0, I) data is p, whichever times it visits."""
    process = DiscreteVP(schedule(T))
    model, x0 = GaussianOracle(process), torch.tensor([[-2.5], [0.0], [0.4], [1.7]], dtype=F64)
    for grid in (process.grid(T), process.grid(7), process.grid(5, quadratic), process.grid(1)):
        terms = mean_terms(make_ddpm_step(beta), model, x0, grid)
        close(terms.sum(0), minus_log_prob(x0), 1e-10)
    close(terms[0], normal_kl(process.alpha_bar[T].sqrt() * x0, 1 - process.alpha_bar[T], 0.0, 1.0).sum(1), 1e-12)


@pytest.mark.equation("elbo.total")
@pytest.mark.parametrize(
    "process",
    [VPSDE(), ddpm().continuous(), DiscreteVP(zero_terminal_snr(linear_beta(100, 1e-3, 0.1)))],
    ids=["VPSDE", "table read in between", "zero terminal SNR"],
)
def test_it_holds_in_continuous_time_without_signal_at_the_end_and_in_three_dimensions(process):
    x0 = randn(5, 3)
    terms = mean_terms(make_ddpm_step(beta), GaussianOracle(process), x0, process.grid(13))
    close(terms.sum(0), minus_log_prob(x0), 1e-10)
    exact = mean_terms(kernel_step, GaussianOracle(process), x0, process.grid(13))
    close(exact, terms, 1e-10)  # beta is the exact reverse variance of such data


@pytest.mark.equation("elbo.L_0")
def test_the_last_term_is_a_density_with_its_constant():
    process, x0 = ten(), randn(4, 1)
    b = process.beta[1].item()
    miss = (x0[:, 0] - (1 - b) * x0[:, 0]) ** 2 + (1 - b) * b  # of sqrt(alpha_1) x_1
    exact = math.log(2 * math.pi * b) / 2 + miss / (2 * b)
    close(mean_terms(make_ddpm_step(beta), GaussianOracle(process), x0, process.grid(10))[-1], exact, 1e-12)
    assert (mean_terms(make_ddpm_step(), GaussianOracle(ddpm()), x0 * 0.1, ddpm().grid(1000))[-1] < 0).all()


@pytest.mark.equation("elbo.L_T")
def test_what_is_left_at_T_costs_a_fiftieth_of_a_thousandth_of_a_nat_and_asks_no_model():
    x0, w = data_nodes()
    process, asked = ddpm(), []

    class Model:
        def __init__(self):
            self.process = process

        def __call__(self, x_t, t):
            asked.append(t)

    first = next(bound_terms(make_ddpm_step(), Model(), x0, process.grid(1000), noises(0)))
    ab = running_product(process.beta.tolist())[-1]
    close((w @ first) / (-math.log1p(-ab) / 2), times(1.0), 1e-11)
    assert (w @ first).item() == pytest.approx(2.018e-5, rel=0.01) and not asked


@pytest.mark.equation("elbo.total", "elbo.form2")
def test_with_the_exact_reverse_the_mean_bound_is_the_entropy_of_the_data():
    process, (x0, w) = ddpm(), data_nodes(0.0, 0.25)
    terms = mean_terms(kernel_step, GaussianOracle(process, 0.0, 0.25), x0, process.grid(1000)) @ w
    v = process.alpha_bar[-1] * 0.25 + 1 - process.alpha_bar[-1]
    prior_gap = normal_kl(0.0, v, 0.0, 1.0)  # the prior is N(0, 1), not q(x_T): 4e-10 nats
    close(terms.sum(), normal_entropy(0.25) + prior_gap, 1e-11)
    assert terms.sum().item() == pytest.approx(0.725791, abs=5e-7)
    # E004-12: "the ELBO" without L_0 and L_T
    assert terms[-1].item() == pytest.approx(-3.19, abs=5e-3) and terms[1:-1].sum().item() == pytest.approx(3.91, 1e-3)


@pytest.mark.equation("elbo.total", "elbo.L_t")
def test_the_printed_range_of_the_index_misses_a_term_and_holds_an_infinite_one():
    process, model = ten(), GaussianOracle(ten())
    terms = mean_terms(make_ddpm_step(beta), model, X0, process.grid(10))[:, 0]
    close(terms.sum(), NLL, 1e-12)
    assert NLL - (terms.sum() - terms[1]).item() == pytest.approx(0.048, abs=5e-4)  # E000-03: t = 1..T-1 has no t = T
    mean, sigma = posterior(process, X0, X0, times(1), times(0))
    assert sigma == 0  # and at t = 1 the divergence is from a point: infinite
    assert normal_kl(mean, 1e-300, X0, process.beta[1]) > 300


# The gap


def reverse_law(step, model, grid):
    """Mean (n + 1,) and gains (n + 1, n + 1) on the noises of p(x_0, ..., x_T), x_0 first, for an affine model."""
    n = len(grid) - 1
    at = lambda x, t, s: [float(c) for c in step.kernel(model, torch.full((1, 1), x, dtype=F64), t, s)]
    means, gains = [0.0], [torch.eye(n + 1, dtype=F64)[0]]
    for k, (t, s) in enumerate(pairwise(grid)):
        (offset, sigma), (end, _) = at(0.0, t, s), at(1.0, t, s)
        means.append((end - offset) * means[-1] + offset)
        gains.append((end - offset) * gains[-1] + sigma * torch.eye(n + 1, dtype=F64)[k + 1])
    return torch.tensor(means[::-1], dtype=F64), torch.stack(gains[::-1])


def forward_law(process, x0, grid):
    """Mean and covariance of q(x_1, ..., x_T | x_0)."""
    ab = process.alpha_bar[grid[:-1].flip(0)]
    low, high = torch.minimum(ab[:, None], ab), torch.maximum(ab[:, None], ab)
    return ab.sqrt() * x0, (low / high).sqrt() * (1 - high)


RANDOM = randn(3, 11)


def any_kernel(x, gain, offset, log_sigma):
    """Mean and sigma of an affine step that knows nothing of the data."""
    return expand(gain, x) * x + expand(offset, x), expand(log_sigma.exp(), x)


AFFINE = {
    "other data, beta": (make_ddpm_step(beta), (0.4, 0.3)),
    "other data, beta-tilde": (make_ddpm_step(beta_tilde), (0.4, 0.3)),
    "exact reverse": (kernel_step, DATA),
    "any": (KernelStep(lambda model, x, t, s: any_kernel(x, *RANDOM[:, t])), (0.0, 1.0)),
}


@pytest.mark.equation("elbo.bound", "elbo.form2")
@pytest.mark.parametrize("n", [10, 4])
@pytest.mark.parametrize("name", AFFINE)
def test_the_bound_exceeds_the_negative_log_likelihood_by_the_divergence_of_the_trajectories(name, n):
    (step, data), process = AFFINE[name], ten()
    model, grid = GaussianOracle(process, *data), process.grid(n)
    mean, gains = reverse_law(step, model, grid)
    cov = gains @ gains.T
    for x0 in (-0.7, 1.1):
        total = mean_terms(step, model, torch.full((1, 1), x0, dtype=F64), grid).sum()
        nll = -log_normal(torch.tensor(x0, dtype=F64), mean[0], cov[0, 0])
        given = cov[1:, 0] / cov[0, 0]  # p(x_1..T | x_0)
        p = MultivariateNormal(mean[1:] + given * (x0 - mean[0]), cov[1:, 1:] - torch.outer(given, cov[0, 1:]))
        gap = kl_divergence(MultivariateNormal(*forward_law(process, x0, grid)), p)
        close((total - nll) / gap, times(1.0), 1e-11)  # the covariances' condition is 1e3
        assert gap > 0


# The first form: the log ratio on a trajectory


@pytest.mark.equation("elbo.form1", "elbo.variance")
def test_the_log_ratio_of_the_exact_reverse_is_the_log_density_on_every_trajectory():
    process, x0 = ten(), 1.7 * torch.ones(2000, 1, dtype=F64)
    grid = process.grid(10)
    bound = log_ratio_bound(kernel_step, GaussianOracle(process), noising_path(process, x0, grid, noises(0)), grid)
    close(bound, minus_log_prob(x0), 1e-13)  # E000-40: +2.3639, an upper bound on -log p; the ELBO is -2.3639
    assert bound.std() < 1e-14
    no_signal = DiscreteVP(zero_terminal_snr(linear_beta(20, 0.02, 0.5)))  # q(x_T) is the prior for any data
    grid, x0 = no_signal.grid(20), randn(500, 3)
    oracle = GaussianOracle(no_signal, *DATA)
    bound = log_ratio_bound(kernel_step, oracle, noising_path(no_signal, x0, grid, noises(1)), grid)
    close(bound, -normal_log_prob(x0, *DATA), 1e-12)
    grid = no_signal.grid(6)
    bound = log_ratio_bound(kernel_step, oracle, noising_path(no_signal, x0, grid, noises(1)), grid)
    close(bound, -normal_log_prob(x0, *DATA), 1e-12)


def printed_form(process, x0):
    """E001-04: the first form with a divergence KL(q(x_t | x_{t-1}) || p(x_t | x_{t+1})) inside, in its three parts.

    Means over q(x_{t-1}, x_{t+1} | x_0), for the exact reverse p of N(0, 1) data: -log p(x_0 | x_1), the divergence at
    T and the sum of those inside.
    """
    (z, w), T = gauss_hermite(3), process.T
    root = process.alpha.sqrt()
    x1 = q_sample(process, x0.expand(3, 1), times(1), z[:, None])
    first = w @ -normal_log_prob(x0.expand(3, 1), root[1] * x1, process.beta[1])
    before = q_sample(process, x0.expand(3, 1), times(T - 1), z[:, None])
    last = w @ normal_kl(root[T] * before, process.beta[T], 0.0, 1.0)[:, 0]
    t = torch.arange(1, T)[:, None, None]
    (a, b), (keep, spread) = process.marginal(t - 1), jump(process, t + 1, t - 1)
    below = a * x0 + b * z[:, None]  # x_{t-1}: nodes in the rows, those of x_{t+1} in the columns
    above = keep * below + spread * z
    inner = normal_kl(root[t] * below, process.beta[t], root[t + 1] * above, process.beta[t + 1])
    return first, last, torch.einsum("tij,i,j->", inner, w, w)


@pytest.mark.equation("elbo.form1")
@pytest.mark.parametrize("table, off", [(ten, 4.82), (ddpm, 983.8)], ids=["10 steps", "DDPM"])
def test_a_divergence_inside_the_first_form_is_off_by_a_nat_a_step(table, off):
    process = table()
    grid, (first, last, inner) = process.grid(process.T), printed_form(process, X0)
    gap = (first + last + inner).item() - NLL
    alpha, step = process.alpha, process.beta
    close(gap, (alpha[2:] * step[1:-1] / step[2:]).sum(), 1e-10)  # what x_t and x_{t+1} have in common, x_0 or not
    assert gap == pytest.approx(off, abs=0.05 if off > 100 else 5e-3)
    z = randn(3, process.T)
    right = log_ratio_bound(kernel_step, GaussianOracle(process), path(process, X0, grid, z), grid)
    close(right, minus_log_prob(X0.expand(3, 1)), 1e-10)
    if off < 100:
        assert first + last + inner == pytest.approx(7.184970, abs=5e-7)
        assert last == pytest.approx(0.3775, abs=5e-5)  # E001-03: over q(x_{T-1} | x_0)


@pytest.mark.equation("elbo.form1", "elbo.form2")
@pytest.mark.parametrize("n", [10, 4])
@pytest.mark.parametrize("name", AFFINE)
def test_both_forms_have_the_same_mean_for_any_affine_model(name, n):
    (step, data), process = AFFINE[name], ten()
    model, grid = GaussianOracle(process, *data), process.grid(n)
    for x0 in (X0, -X0 / 2):
        mean, _ = quadratic_law(lambda z: log_ratio_bound(step, model, path(process, x0, grid, z), grid), n)
        close(mean, mean_terms(step, model, x0, grid).sum(), 1e-11)


@pytest.mark.equation("elbo.variance")
def test_on_whole_trajectories_the_log_ratio_is_exact_and_at_one_random_t_the_divergence_is_calmer():
    process, model = ten(), GaussianOracle(ten())
    grid = process.grid(10)
    steps = list(pairwise(grid))

    def ratio(z, k):
        """T log q(x_t | x_s) / p(x_s | x_t) - log p(x_T), for one t."""
        x = path(process, X0, grid, z)
        (scale, std), (mean, sigma) = jump(process, *steps[k]), kernel_step.kernel(model, x[k], *steps[k])
        logs = normal_log_prob(x[k], scale * x[k + 1], std**2) - normal_log_prob(x[k + 1], mean, sigma**2)
        return 10 * logs - normal_log_prob(x[0], 0.0, 1.0)

    def divergence(z, k):
        """T L_{t-1} + L_T for the same t, at the same x_t."""
        x = path(process, X0, grid, z)
        scale, std = process.marginal(steps[k][0])
        term = bound_term(kernel_step, model, X0.expand(len(z), 1), *steps[k], (x[k] - scale * X0) / std)
        return 10 * term + terminal_kl(process, X0)

    def std_at_a_random_t(estimate):
        means, variances = np.array([quadratic_law(lambda z: estimate(z, k), 10) for k in range(10)]).T
        assert means.mean() == pytest.approx(NLL, abs=1e-11)  # both unbiased
        return (variances.mean() + means.var()) ** 0.5

    whole = lambda z: sum(divergence(z, k) for k in range(10)) / 10
    mean, variance = quadratic_law(whole, 10)
    assert mean == pytest.approx(NLL, abs=1e-11)
    assert variance**0.5 == pytest.approx(1.765, abs=1e-3)  # along one trajectory
    fresh = sum(quadratic_law(lambda z: divergence(z, k), 10)[1] for k in range(10)) / 100
    assert fresh**0.5 == pytest.approx(1.130, abs=1e-3)  # bound_terms: fresh noise for each term
    assert quadratic_law(lambda z: sum(ratio(z, k) for k in range(10)) / 10, 10)[1] < 1e-24  # E000-41: none
    assert std_at_a_random_t(ratio) == pytest.approx(6.539, abs=1e-3)
    assert std_at_a_random_t(divergence) == pytest.approx(4.039, abs=1e-3)
    estimate = torch.stack(list(bound_terms(kernel_step, model, X0.expand(20_000, 1), grid, noises(0)))).sum(0)
    assert abs(estimate.mean() - NLL) < 4 * fresh**0.5 / 20_000**0.5  # four standard errors
    assert estimate.std() == pytest.approx(fresh**0.5, rel=0.05)  # heavier tails than a bell: 4 errors are .04


# One term


@pytest.mark.equation("elbo.L_t")
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_a_term_is_its_closed_form_in_x0_for_gaussian_data(variance):
    process, x0 = ten(), torch.tensor([[-1.0], [0.3], [2.0]], dtype=F64)
    step = make_ddpm_step({"beta": beta, "beta_tilde": beta_tilde}[variance])
    terms = mean_terms(step, GaussianOracle(process, *DATA), x0, process.grid(10))
    (m, s2), b, ab = DATA, process.beta.tolist(), running_product(process.beta.tolist())
    for t in range(2, 11):
        v, tilde = ab[t] * s2 + 1 - ab[t], b[t] * (1 - ab[t - 1]) / (1 - ab[t])
        var = {"beta": b[t], "beta_tilde": tilde}[variance]
        gain = ab[t - 1] ** 0.5 * b[t] / (1 - ab[t])  # of x0 in mu-tilde
        slope_x, offset = gain * ab[t] ** 0.5 * s2 / v, gain * m * (1 - ab[t] * s2 / v)  # of E[x0 | x_t], by gain
        x0_, pull = x0[:, 0], x0[:, 0] * (gain - slope_x * ab[t] ** 0.5) - offset
        assert x0_.shape == pull.shape
        exact = (pull**2 + slope_x**2 * (1 - ab[t])) / (2 * var) + (tilde / var - 1 - math.log(tilde / var)) / 2
        close(terms[11 - t], exact, 1e-10)


def spaced_terms(variance, d=2):
    """Rows at all t >= 2 of DDPM's table: model, x0, t, eps, the terms, sigma^2 and beta-tilde of the step."""
    model, t = GaussianOracle(ddpm(), *DATA), torch.arange(2, 1001)
    x0, eps = randn(999, d), randn(999, d, seed=1)
    ab, b = model.process.alpha_bar, model.process.beta[t]
    tilde = b * (1 - ab[t - 1]) / (1 - ab[t])
    terms = bound_term(make_ddpm_step(variance), model, x0, t, t - 1, eps)
    return model, x0, t, eps, terms, (b if variance is beta else tilde), tilde


@pytest.mark.equation("elbo.mean_match")
@pytest.mark.parametrize("variance", [beta, beta_tilde])
def test_a_term_is_the_distance_of_the_means_and_a_constant(variance):
    model, x0, t, eps, terms, var, tilde = spaced_terms(variance)
    x_t = q_sample(model.process, x0, t, eps)
    mean_q, _ = posterior(model.process, x0, x_t, t, t - 1)
    mean, _ = make_ddpm_step(variance).kernel(model, x_t, t, t - 1)
    constant = (2 * tilde / var - 2 + 2 * (var / tilde).log()) / 2  # d = 2
    close(terms, ((mean_q - mean) ** 2).sum(1) / (2 * var) + constant, 1e-12)
    assert (constant[:-1] >= 0).all() and (constant.max() > 0.1) == (variance is beta)  # no t = 1: it would be infinite


@pytest.mark.equation("elbo.w_x0", "elbo.w_eps", "elbo.mean_match")
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["beta", "beta_tilde"])
def test_weighted_losses_of_every_target_are_the_term_without_its_constant(name, target):
    model, x0, t, eps, terms, var, tilde = spaced_terms({"beta": beta, "beta_tilde": beta_tilde}[name])
    weighted = 2 * denoising_loss(model, x0, t, eps, target, elbo_weight(target, name))
    constant = tilde / var - 1 - (tilde / var).log()
    close(weighted, terms - constant, 1e-11)


@pytest.mark.equation("elbo.w_x0", "elbo.w_eps", "elbo.snr_form")
@pytest.mark.parametrize("make", [linear_beta, cosine_beta])
def test_the_weight_of_x0_is_half_the_fall_of_the_snr_and_telescopes(make):
    process = DiscreteVP(make(1000))
    t, ab = torch.arange(2, 1001), torch.tensor(running_product(process.beta.tolist()), dtype=F64)
    snr = ab / (1 - ab)
    w_x0, w_eps = (elbo_weight(target)(process, t) for target in ("x0", "eps"))
    close(w_x0 / ((snr[1:-1] - snr[2:]) / 2), torch.ones(999), 1e-9)
    close(w_eps / (w_x0 / snr[2:]), torch.ones(999), 1e-9)
    close(w_x0.sum() / ((snr[1] - snr[-1]) / 2), times(1.0), 1e-9)
    assert elbo_weight("x0")(process, times(1)) == math.inf  # where the bound has L_0


@pytest.mark.equation("elbo.w_eps")
def test_the_weight_of_eps_has_alpha_and_not_alpha_bar():
    process, t = ddpm(), torch.arange(1, 1001)
    b, alpha, ab = process.beta[t], process.alpha[t], process.alpha_bar[t]
    close(elbo_weight("eps", "beta")(process, t) / (b / (2 * alpha * (1 - ab))), torch.ones(1000), 1e-11)
    tilde = (b * (1 - process.alpha_bar[t - 1]) / (1 - ab))[1:]
    exact = (b**2 / (2 * alpha * (1 - ab)))[1:] / tilde
    close(elbo_weight("eps", "beta_tilde")(process, t[1:]) / exact, torch.ones(999), 1e-11)
    off = alpha / ab  # E000-08
    assert off[499].item() == pytest.approx(12.6, abs=0.05) and off[999].item() == pytest.approx(24282, abs=1)


def test_rows_at_many_times_the_last_step_among_them_are_the_single_ones():
    process, levels = ten(), 17
    model = WithFrac(GaussianOracle(process, *DATA), torch.tensor(0.3, dtype=F64))
    x0, eps = grey_levels(17)[torch.arange(12) % 17].reshape(6, 2), randn(6, 2)
    t, s = times(10, 1, 7, 1, 2, 5), times(9, 0, 3, 0, 1, 0)
    for step in (make_ddpm_step(beta), make_ddpm_step(), make_ddpm_step(learned), make_ddim_step(1.0)):
        rows = slice(None) if step.draws_last is False else times(0, 2, 4)  # DDIM's last step is no Gaussian
        for n in (None, levels):
            together = bound_term(step, model, x0[rows], t[rows], s[rows], eps[rows], n)
            for k, i in enumerate(torch.arange(6)[rows].tolist()):
                one = bound_term(step, model, x0[i : i + 1], t[i], s[i], eps[i : i + 1], n)
                close(together[k : k + 1], one, 1e-13)
    x_1 = q_sample(process, x0[1:2], times(1), eps[1:2])
    mean, sigma = make_ddpm_step(beta).kernel(model, x_1, times(1), times(0))
    grey = bound_term(make_ddpm_step(beta), model, x0[1:2], times(1), times(0), eps[1:2], levels)
    close(grey, -discretized_log_prob(x0[1:2], mean, sigma, levels).sum(1), 1e-13)


@pytest.mark.equation("elbo.form2")
def test_the_generator_walks_the_times_with_fresh_noise_in_eval_mode():
    process, seen = ten(), []

    class Net(nn.Module):
        def forward(self, x, clock):
            seen.append((clock[0].item() / 100, self.training))
            return x

    model, x0, noise = Denoiser(Net(), process, "x0"), randn(4, 2), noises(3)
    terms = list(bound_terms(make_ddpm_step(), model.train(), x0, process.grid(5), noises(3)))
    assert seen == [(t, False) for t in (10, 8, 6, 4, 2)] and model.net.training and len(terms) == 6
    expected = [bound_term(make_ddpm_step(), model, x0, t, s, noise(x0)) for t, s in pairwise(process.grid(5))]
    close(torch.stack(terms), torch.stack([terminal_kl(process, x0), *expected]), 1e-14)


def test_conditions_reach_the_model_row_by_row():
    process, y, t = ten(), times(0, 1, 1, 0), times(4, 10, 2, 7)
    model = GaussianMixtureOracle(process, [[-1.0], [2.0]], [0.5, 0.3])
    parts = [GaussianOracle(process, -1.0, 0.25), GaussianOracle(process, 2.0, 0.09)]
    x0, eps, step = randn(4, 1), randn(4, 1, seed=1), make_ddpm_step()
    alone = [bound_term(step, parts[k], *(v[i : i + 1] for v in (x0, t, t - 1, eps))) for i, k in enumerate(y.tolist())]
    close(bound_term(step, model, x0, t, t - 1, eps, y=y), torch.cat(alone), 1e-12)
    close(bound_term(step, bind(model, y=y), x0, t, t - 1, eps), torch.cat(alone), 1e-12)
    log_snr = process.log_snr(t)
    alone = [continuous_term(parts[k], *(v[i : i + 1] for v in (x0, log_snr, eps))) for i, k in enumerate(y.tolist())]
    close(continuous_term(model, x0, log_snr, eps, y=y), torch.cat(alone), 1e-10)


def test_single_precision_keeps_six_digits_of_a_thousand_terms():
    model, t, levels = GaussianOracle(ddpm(), 0.1, 0.4), torch.arange(1, 1001), grey_levels(17)
    x0 = levels[torch.randint(17, (64,), generator=torch.Generator().manual_seed(0))].expand(1000, 64)
    for step in (make_ddpm_step(), make_ddpm_step(beta)):
        double, single = (
            bound_term(step, model, x0.to(dtype), t, t - 1, randn(1000, 64).to(dtype), levels=17).double().sum()
            for dtype in (F64, torch.float32)
        )
        assert abs(single / double - 1) < 2e-6  # 64 rounded squares a term


# Random times


@pytest.mark.equation("elbo.mc_t")
@pytest.mark.parametrize("first", [1, 2])
def test_a_random_time_times_their_number_is_unbiased_for_the_sum(first):
    process, n = ten(), 40_000
    model, step, x0 = GaussianOracle(process, *DATA), make_ddpm_step(beta), torch.full((n, 1), 0.8, dtype=F64)
    t = torch.randint(first, 11, (n,), generator=torch.Generator().manual_seed(0))
    terms = (11 - first) * bound_term(step, model, x0, t, t - 1, randn(n, 1))
    exact = mean_terms(step, model, x0[:1], process.grid(10))[1 : 12 - first].sum()  # t = 10..first
    error = terms.std() / n**0.5
    assert abs(terms.mean() - exact) < 5 * error  # five standard errors
    assert abs(terms.mean() / (11 - first) - exact) > 20 * error  # E001-10: without the factor T - 1


@pytest.mark.equation("elbo.mc_t")
def test_random_times_cover_the_first_and_the_last():
    n, generator = 20_000, torch.Generator().manual_seed(0)
    for t in (ten().sample_t(n, generator), ImportanceTimes(10).draw(n, generator)[0]):
        counts = torch.bincount(t, minlength=12)
        assert counts[0] == counts[11] == 0 and counts.sum() == n
        assert ((counts[1:11] - n / 10).abs() < 5 * (n * 0.1 * 0.9) ** 0.5).all()  # five standard errors


# Continuous time


def gaussian_integral(s2, low, high):
    """Half the integral of s2 e^l / (1 + s2 e^l) over the log SNR."""
    return (math.log1p(s2 * math.exp(high)) - math.log1p(s2 * math.exp(low))) / 2


@pytest.mark.equation("elbo.continuous")
@pytest.mark.parametrize(
    "process",
    [VPSDE(), SubVPSDE(), VESDE(), VE(), ddpm(), DiscreteVP(cosine_beta(50)), ddpm().continuous()],
    ids=["VPSDE", "SubVPSDE", "VESDE", "VE", "linear", "cosine", "joined"],
)
def test_the_continuous_bound_depends_on_the_ends_only_whatever_the_schedule(process):
    low, high = -5.0, 6.0
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(60))
    (x0, w), (z, v) = data_nodes(*DATA), gauss_hermite(3)
    i, j, k = torch.cartesian_prod(torch.arange(60), torch.arange(3), torch.arange(3)).T
    log_snr = low + (high - low) * (nodes[i] + 1) / 2
    x0, eps = x0[j].expand(-1, 2), z[k, None].expand(-1, 2)  # d = 2
    terms = continuous_term(GaussianOracle(process, *DATA), x0, log_snr, eps)
    total = (high - low) / 2 * (weights[i] * w[j] * v[k] * terms).sum()
    close(total, 2 * gaussian_integral(DATA[1], low, high), 1e-9)
    halved = continuous_term(GaussianOracle(process, *DATA), x0, log_snr, eps, weight=lambda lam: torch.sigmoid(-lam))
    close(halved, terms / (1 + log_snr.exp()), 1e-13)


@pytest.mark.equation("elbo.continuous")
@pytest.mark.parametrize("variance", [beta, beta_tilde])
def test_finer_chains_come_down_to_the_continuous_bound_like_one_over_n(variance):
    model, (x0, w) = GaussianOracle(VPSDE(), *DATA), data_nodes(*DATA)
    t_min = model.process.time_of(times(6.0)).item()
    exact, gaps = gaussian_integral(DATA[1], model.process.log_snr(times(1.0)).item(), 6.0), []
    counts = (50, 100, 200)
    for n in counts:
        terms = mean_terms(make_ddpm_step(variance), model, x0, model.process.grid(n + 1, uniform_log_snr(t_min))) @ w
        gaps.append((terms[1:-1].sum() - exact).item())  # without L_T and L_0
    assert all(gap > 0 for gap in gaps) and abs(slope(counts, gaps) - 1) < 0.1


def test_the_ends_of_the_log_snr_are_times_of_the_process():
    x0, eps = randn(3, 1), randn(3, 1, seed=1)
    for process in (VPSDE(), SubVPSDE(), VESDE(), VE(), ddpm(), DiscreteVP(zero_terminal_snr(linear_beta(1000)))):
        model, T = GaussianOracle(process), torch.tensor(process.T, dtype=process.time_dtype)
        end = continuous_term(model, x0, process.log_snr(T), eps)
        close(end, ((eps - model(q_sample(process, x0, T, eps), T).eps) ** 2).sum(1) / 2, 1e-9)


# The bound of 2015


@pytest.mark.equation("elbo.entropy_form")
def test_the_bound_of_2015_is_minus_the_entropy_when_the_reverse_is_the_forward_kernel():
    for process in (ten(), ddpm()):
        x0, w = data_nodes()
        terms = mean_terms(make_ddpm_step(beta), GaussianOracle(process), x0, process.grid(process.T)) @ w
        close(entropy_bound(terms[1:-1], process, 1), -(HALF_LOG_TAU + 0.5), 1e-12)
        close(entropy_bound(terms[1:-1], process, 1), -terms.sum(), 1e-12)
    process, model, d = ten(), GaussianOracle(ten(), 0.2, 0.7), 3  # another model of such data: still a bound
    by_row = mean_terms(make_ddpm_step(beta), model, data_nodes()[0].expand(3, d), process.grid(10))
    bound = entropy_bound(by_row[1:-1] @ w, process, d)
    last = GaussianOracle(process)  # its last step is the forward kernel
    ends = mean_terms(make_ddpm_step(beta), last, data_nodes()[0].expand(3, d), process.grid(10))[[0, -1]] @ w
    close(bound, -(by_row[1:-1] @ w).sum() - ends.sum(), 1e-12)
    assert bound < -d * (HALF_LOG_TAU + 0.5)


@pytest.mark.equation("elbo.reverse_entropy_bounds")
@pytest.mark.parametrize("s2", [1e-3, 0.25, 1.0])
def test_the_entropy_of_a_reverse_step_lies_between_those_of_the_two_variances(s2):
    process, t, x = ddpm(), torch.arange(2, 1001), torch.zeros(999, 1, dtype=F64)
    model = GaussianOracle(process, 0.0, s2)
    pred = model(x, t)
    low, high = beta_tilde(pred, process, t, t - 1), beta(pred, process, t, t - 1)
    true = model.reverse_kernel(x, t, t - 1)[1] ** 2
    step, before, now = (normal_entropy(v) for v in (process.beta[t], *(1 - process.alpha_bar[u] for u in (t - 1, t))))
    close(normal_entropy(low)[:, 0], step + before - now, 1e-10)  # H(X_t | X_{t-1}) + H(X_{t-1} | X_0) - H(X_t | X_0)
    close(normal_entropy(high)[:, 0], step, 1e-10)
    v = process.alpha_bar * s2 + 1 - process.alpha_bar  # of q(x_t)
    close(normal_entropy(true)[:, 0], step + normal_entropy(v[t - 1]) - normal_entropy(v[t]), 1e-10)  # Bayes
    assert (low <= true).all() and (true <= high * (1 + 1e-12)).all()
    wide = GaussianOracle(process, 0.0, 4.0).reverse_kernel(x, t, t - 1)[1] ** 2
    assert (wide > high).all()  # the upper bound asks for data of variance at most 1


# Learned variance


@pytest.mark.equation("lv.interp")
@pytest.mark.parametrize("table", [ddpm, lambda: DiscreteVP(cosine_beta(1000))], ids=["linear", "cosine"])
@pytest.mark.parametrize("s2", [0.01, 0.25, 0.99])
def test_the_best_variance_of_gaussian_data_lies_between_beta_tilde_and_beta_at_every_step(table, s2):
    process, t, x = table(), torch.arange(1, 1001), torch.zeros(1000, 1, dtype=F64)
    model = GaussianOracle(process, 0.0, s2)
    at = lambda v: learned(replace(model(x, t), frac=v), process, t, t - 1)
    low, high = at(torch.zeros_like(x)), at(torch.ones_like(x))
    ab, b = process.alpha_bar, process.beta
    tilde = b[t] * (1 - ab[t - 1]) / (1 - ab[t])
    tilde[0] = tilde[1]  # at t = 1 the variance of t = 2
    close((low[:, 0] / tilde).log(), torch.zeros(1000), 1e-10)
    close((high[:, 0] / b[1:]).log(), torch.zeros(1000), 1e-10)
    best = model.reverse_kernel(x, t, t - 1)[1] ** 2
    v = (best / low).log() / (high / low).log()
    close((at(v) / best).log(), torch.zeros(1000, 1), 1e-12)
    assert v.min().item() == pytest.approx(s2, rel=1e-4) and 0.98 < v.max() <= 1  # the data's variance, at t = T
    assert (v[1:].argmin() == 998).all()


@pytest.mark.equation("lv.interp", "lv.hybrid")
def test_the_bound_is_least_at_the_exact_reverse_variance():
    process, (x0, w) = ten(), data_nodes(*DATA)
    model = GaussianOracle(process, *DATA)
    for t, s in ((10, 9), (6, 5), (2, 1), (1, 0), (8, 4)):
        x, pair = torch.zeros(1, 1, dtype=F64), (times(t), times(s))
        low, high = (f(model(x, pair[0]), process, *pair).item() for f in (beta_tilde, beta))
        best = model.reverse_kernel(x, *pair)[1].item() ** 2
        frac = torch.tensor(math.log(best / low) / math.log(high / low), dtype=F64, requires_grad=True)
        z, v = gauss_hermite(3)
        i, j = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T
        terms = bound_term(make_ddpm_step(learned), WithFrac(model, frac), x0[i], *pair, z[j, None])
        (grad,) = torch.autograd.grad((w[i] * v[j] * terms).sum(), frac)
        close(grad, torch.zeros(()), 1e-12)


class TwoHeads(nn.Module):
    """eps-hat = slope x, and a variance's interpolation of its own."""

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.4, dtype=F64))
        self.level = nn.Parameter(torch.tensor(0.1, dtype=F64))
        self.calls = 0

    def forward(self, x, clock):
        self.calls += 1
        return torch.cat([self.slope * x, self.level.expand_as(x)], dim=1)


def digits_like(n, seed=0):
    """n pictures (1, 4, 4) of 17 grey levels."""
    return grey_levels(17)[torch.randint(17, (n, 1, 4, 4), generator=torch.Generator().manual_seed(seed))]


@pytest.mark.equation("lv.hybrid")
@pytest.mark.parametrize("levels", [None, 17])
@pytest.mark.parametrize(
    "table", [ten, ddpm, lambda: DiscreteVP(cosine_beta(1000))], ids=["10 steps", "linear", "cosine"]
)
def test_the_bound_in_the_hybrid_loss_does_not_touch_the_mean_and_moves_the_variance(table, levels):
    process, x0, eps = table(), digits_like(64), randn(64, 1, 4, 4)
    t = torch.cat([times(1, 2, process.T), process.sample_t(61, torch.Generator().manual_seed(1))])
    grads = {}
    for weight in (0.0, 1.0):
        model = Denoiser(TwoHeads(), process, learned_variance=True)
        hybrid_loss(model, x0, t, eps, weight, levels).mean().backward()
        grads[weight] = model.net.slope.grad, model.net.level.grad
    assert torch.equal(grads[0.0][0], grads[1.0][0]) and grads[1.0][0].isfinite() and grads[1.0][0] != 0
    assert grads[0.0][1] == 0 and grads[1.0][1].isfinite() and grads[1.0][1].abs() > 1e-3


@pytest.mark.equation("lv.hybrid", "elbo.mc_t")
@pytest.mark.parametrize("levels", [None, 17])
def test_the_hybrid_loss_is_the_simple_one_and_a_share_of_the_whole_bound_from_one_call(levels):
    process, x0, eps = ten(), digits_like(20), randn(20, 1, 4, 4)
    t = torch.arange(20) % 10 + 1
    model = Denoiser(TwoHeads(), process, learned_variance=True)
    loss = hybrid_loss(model, x0, t, eps, 0.01, levels)
    assert model.net.calls == 1 and loss.shape == (20,)
    terms = bound_term(make_ddpm_step(learned), model, x0, t, t - 1, eps, levels)
    close(loss, denoising_loss(model, x0, t, eps) + 0.01 * 10 * terms / 16, 1e-12)  # T L_{t-1}: their mean is the sum


@pytest.mark.equation("lv.importance")
def test_important_times_are_drawn_more_often_and_weigh_less_so_that_the_mean_stays():
    T, rates = 50, 1 / torch.arange(1, 51, dtype=F64) ** 2
    sampler, generator = ImportanceTimes(T, history=4), torch.Generator().manual_seed(0)
    assert (sampler.p == 1 / T).all() and (sampler.draw(5, generator)[1] == T).all()  # uniform until all are known
    noisy = rates * torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=F64)[:, None]
    for values in (99 * noisy[:1].expand(2, T), noisy):  # six of each: the last four count
        for row in values:
            sampler.update(torch.arange(1, T + 1), row)
    second_moment = rates * (torch.tensor([0.25, 1.0, 2.25, 4.0]).mean() ** 0.5).item()
    p = 0.999 * second_moment / second_moment.sum() + 0.001 / T
    close(sampler.p, p, 1e-14)
    t, weight = sampler.draw(20_000, generator)
    close(weight, 1 / p[t - 1], 1e-11)
    counts = torch.bincount(t - 1, minlength=T)
    assert ((counts - 20_000 * p).abs() < 5 * (20_000 * p).sqrt() + 1).all()  # five standard errors
    losses, weights = randn(T).exp(), torch.zeros(T, dtype=F64)
    weights[t - 1] = weight
    seen = weights > 0
    close((sampler.p * weights * losses)[seen].sum(), losses[seen].sum(), 1e-11)  # unbiased, whatever the losses
    assert seen[0] and seen.sum() > 20


@pytest.mark.equation("lv.importance")
def test_terms_that_do_not_vary_are_estimated_without_error():
    T, losses = 30, torch.linspace(0.1, 3, 30, dtype=F64) ** 2
    for uniform, spread in ((0.0, 1e-11), (0.01, 0.02)):
        sampler = ImportanceTimes(T, history=3, uniform=uniform)
        for _ in range(3):
            sampler.update(torch.arange(1, T + 1), losses)
        t, weight = sampler.draw(4000, torch.Generator().manual_seed(0))
        estimate = weight * losses[t - 1]
        assert (estimate / losses.sum() - 1).abs().median() < spread
        assert (uniform > 0) == ((estimate / losses.sum() - 1).abs().max() > 1e-3)
        assert len(t.unique()) > 20
    plain = T * losses[torch.randint(T, (4000,), generator=torch.Generator().manual_seed(0))]
    assert plain.std() > 0.5 * losses.sum()  # what uniform times would cost
    nothing = ImportanceTimes(3, history=1)
    nothing.update(times(1, 2, 3), torch.zeros(3))
    close(nothing.p, torch.full((3,), 1 / 3, dtype=F64), 1e-15)


# What is refused


def refusals():
    """(call, the start of its message)."""
    table, x0, eps = DiscreteVP(linear_beta(10, 0.1, 0.7)), randn(3, 2), randn(3, 2, seed=1)
    model, grid, t, s = GaussianOracle(table), table.grid(10), times(5), times(4)
    step, one = make_ddpm_step(), DiscreteVP(linear_beta(1, 0.9, 0.9))
    infinite = "step must have a variance above 0: without one the bound is infinite; got "
    frac = WithFrac(model, torch.tensor(0.5, dtype=F64))
    yield lambda: bound_term(ddim_step, model, x0, t, s, eps), infinite + "a deterministic step"
    yield lambda: bound_term(make_ddim_step(0.5), model, x0, times(1), times(0), eps), infinite + "sigma = 0 on the way"
    yield lambda: bound_term(step, GaussianOracle(one), x0, times(1), times(0), eps), infinite + "sigma = 0"
    yield lambda: bound_term(make_ddpm_step, model, x0, t, s, eps), "step must be a Gaussian step"
    yield lambda: bound_term(make_ddpm_step(learned), model, x0, t, s, eps), "model must predict a variance"
    yield lambda: bound_term(step, model, x0, t, t, eps), "s must be smaller than t"
    yield lambda: bound_term(step, model, x0, t, 4, eps), "s must be a torch.Tensor; got int"
    yield lambda: bound_term(step, model, x0, times(5, 5), times(4, 4), eps), "t must be 0-d or of shape"
    yield lambda: bound_term(step, model, x0, t, s, eps[:1]), "eps must have the shape of x0"
    yield lambda: bound_term(step, model, x0, times(1), times(0), eps, levels=17), "x must be one of 17 grey levels"
    yield lambda: list(bound_terms(step, model, x0, grid[1:], noises(0))), "times must run from T = 10 to 0; got 9 to 0"
    yield lambda: list(bound_terms(step, model, x0, grid[:-1], noises(0))), "times must run from T = 10 to 0"
    yield lambda: list(bound_terms(step, model, x0, grid, None)), "noise must be a function such as noises"
    ve = GaussianOracle(VE())
    yield lambda: list(bound_terms(step, ve, x0, ve.process.grid(3), noises(0))), "model.process must end in N"
    yield lambda: noising_path(table, x0, grid[:-1], noises(0)), "times must end in 0, where x0 lives; got 1"
    yield lambda: noising_path(table, x0, grid, lambda x: x[:1]), "noise.x. must have the shape of x"
    yield lambda: noising_path(table, x0.long(), grid, noises(0)), "x0 must be a floating-point tensor"
    yield lambda: log_ratio_bound(step, model, [x0], grid), "path must have an entry for each of the 11 times; got 1"
    yield lambda: continuous_term(model, x0, times(-9.0), eps), "log_snr must be one that TableVP passes through"
    yield lambda: continuous_term(model, x0, times(math.nan), eps), "log_snr must be one|t must be in"
    yield lambda: hybrid_loss(model, x0, times(1, 2, 3), eps), "model must predict a variance"
    yield lambda: hybrid_loss(frac, x0, times(1, 2, 0), eps), "t must be in .1, 10."
    yield lambda: hybrid_loss(frac, x0, times(1, 2, 3), eps, -1), "vlb_weight must be at least 0"
    yield lambda: hybrid_loss(GaussianOracle(VPSDE()), x0, times(0.5), eps), "process must be a table"
    yield lambda: ImportanceTimes(0), "T must be at least 1"
    yield lambda: ImportanceTimes(3, uniform=2), "uniform must be in"
    yield lambda: ImportanceTimes(3).update(times(4, 1), torch.ones(2)), "t must be in .1, 3."
    yield lambda: ImportanceTimes(3).update(times(3, 1), torch.ones(3)), "losses must have the shape of t"
    yield lambda: ImportanceTimes(3).update(times(3, 1), times(1.0, math.nan)), "losses must be finite"
    yield lambda: entropy_bound(torch.ones(8), table, 1), "kl_terms must have T - 1 = 9 rows; got 8"
    yield lambda: entropy_bound(torch.ones(8), VPSDE(), 1), "process must be a table"


@pytest.mark.parametrize("call, message", list(refusals()))
def test_wrong_inputs_get_a_plain_message(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
