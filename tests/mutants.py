"""The lectures' harmful misprints, patched into the package one at a time.

Each mutant says what is wrong, which tests must notice (one of them at least), and which notebook, in one of its
check cells. ``python tests/mutants.py`` tries them all and prints one JSON object; ``test_mutants.py`` reads it.
Ids are those of the inventory's errata; "table-..." are mistakes known from other code.
"""

import contextlib
import importlib
import io
import json
import math
import os
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType

TESTS = Path(__file__).parent
NOTEBOOKS = TESTS.parent / "notebooks"
Mutant = namedtuple("Mutant", "name says target replace tests notebook stops")
MUTANTS = {}


def mutant(name, target, tests, notebook, stops="check"):
    """Register ``replace(original) -> replacement`` for ``target``, "module.name" or "module.Class.name".

    ``stops`` is "check" where a check cell of the notebook must fail, "refusal" where the package already refuses to
    go on (ValueError).
    """

    def register(replace):
        tests_ = tests.split()
        assert name not in MUTANTS, name
        MUTANTS[name] = Mutant(name, replace.__doc__, target, replace, tests_, notebook, stops)
        return replace

    return register


@contextlib.contextmanager
def applied(m):
    """The package with this misprint in it, in every module that has imported the piece."""
    module, *classes, name = m.target.split(".")
    owner = importlib.import_module(f"diffusion_edu.{module}")
    for cls in classes:
        owner = getattr(owner, cls)
    original = vars(owner)[name]
    changed = m.replace(original)
    places = _bindings(original) if isinstance(owner, ModuleType) else [(owner, name)]
    for place, name in places:
        setattr(place, name, changed)
    try:
        yield
    finally:
        for place, name in places:
            setattr(place, name, original)


def _bindings(thing):
    """(module, name) of every place in the package and the tests that holds this very object."""
    modules = [m for n, m in list(sys.modules.items()) if n.startswith(("diffusion_edu", "test_", "affine", "exact"))]
    return [(m, name) for m in modules for name, value in list(vars(m).items()) if value is thing]


# Sections 1, 2 and grey levels


@mutant(
    "E001-01", "vae.reparameterize", "test_vae.py::test_reparameterised_noise_has_the_mean_and_the_covariance", "01"
)
def _(original):
    """The capital Sigma is read as a sum: every latent gets the standard deviations of all, added."""
    return lambda mean, sigma, eps: mean + sigma.sum(-1, keepdim=True) * eps


@mutant(
    "table-variance-for-sigma",
    "vae.reparameterize",
    "test_vae.py::test_reparameterised_noise_has_the_mean_and_the_covariance",
    "01",
)
def _(original):
    """Sigma, not its root, multiplies the noise."""
    return lambda mean, sigma, eps: original(mean, sigma**2, eps)


KL = "test_vae.py::test_the_divergence_to_the_prior_has_a_closed_form"


@mutant("table-kl-half", "vae.kl_std_normal", KL, "01")
def _(original):
    """The factor 1/2 is lost."""
    return lambda mean, sigma: 2 * original(mean, sigma)


@mutant("table-kl-sign", "vae.kl_std_normal", KL, "01")
def _(original):
    """+ log sigma^2."""
    return lambda mean, sigma: original(mean, sigma) + 2 * sigma.log().flatten(1).sum(1)


@mutant(
    "table-naive-swap",
    "vae.score_function_gradient",
    "test_vae.py::test_a_naive_swap_says_zero_and_the_score_function_says_two_phi",
    "01",
)
def _(original):
    """The gradient is put inside the expectation and nothing else is done: the samples do not know phi."""
    return lambda f, mean, sigma, eps: tuple(0 * g for g in original(f, mean, sigma, eps))


@mutant("E001-02", "vae.HVAE.log_joint", "test_vae.py::test_a_linear_chain_is_one_big_gaussian", "02")
def _(original):
    """The product has no range: from t = 1 on it counts p(x | z_1) a second time."""
    from diffusion_edu.bits import log_likelihood

    return lambda self, x, zs: original(self, x, zs) + log_likelihood(x, *self.decoders[0](zs[0]), self.levels)


GREY = (
    "test_bits.py::test_the_probabilities_of_all_levels_sum_to_one_whatever_mean_and_sigma "
    "test_bits.py::test_a_level_has_the_mass_of_the_gaussian_on_its_bin"
)


def _log_bins(half, open_ends):
    """discretized_log_prob with bins of another half-width, open or closed at the ends."""
    import torch

    def discretized_log_prob(x, mean, sigma, levels=256):
        low, high = (torch.special.ndtr((x + sign * half(levels) - mean) / sigma) for sign in (-1, 1))
        if open_ends:
            low, high = low.where(x > -1, 0.0), high.where(x < 1, 1.0)
        return (high - low).clamp_min(1e-300 if x.dtype == torch.float64 else 1e-37).log()

    return discretized_log_prob


@mutant("table-closed-bins", "bits.discretized_log_prob", GREY, "07")
def _(original):
    """The bins of the first and the last level end: what is beyond belongs to no level."""
    return _log_bins(lambda levels: 1 / (levels - 1), open_ends=False)


@mutant("table-bin-width", "bits.discretized_log_prob", GREY, "07")
def _(original):
    """A bin of half-width 1 / n."""
    return _log_bins(lambda levels: 1 / levels, open_ends=True)


BITS = (
    "test_bits.py::test_a_uniform_guess_of_256_values_costs_eight_bits "
    "test_bits.py::test_a_density_is_a_bins_width_away_from_a_probability"
)


@mutant("table-bpd-offset", "bits.bits_per_dim", BITS, "07")
def _(original):
    """A density is counted as if it were a probability: the bin's width is left out."""
    return lambda nats, d, levels=None: original(nats, d)


@mutant("table-bpd-nats", "bits.bits_per_dim", BITS, "07")
def _(original):
    """Nats are called bits: no division by ln 2."""
    return lambda nats, d, levels=None: original(nats * math.log(2), d, levels)


# Section 3


@mutant(
    "E000-05",
    "gaussian.normal_log_prob",
    "test_gaussian.py::test_log_density_equals_torch_distributions_and_its_gradient_is_the_score",
    "00",
)
def _(original):
    """The factor 1/2 of the exponent is lost."""
    return lambda x, mean, var: 2 * original(x, mean, var)


@mutant("E000-21", "gaussian.normal_score", "test_gaussian.py::test_score_is_minus_the_noise_over_sigma", "00")
def _(original):
    """The score has the wrong sign."""
    return lambda x, mean, var: -original(x, mean, var)


@mutant("E002-01", "gaussian.convolve_density", "test_gaussian.py::test_the_density_of_a_sum_is_the_convolution", "00")
def _(original):
    """ "The density of X is the convolution": p comes back where p * q is asked for."""
    from torch.nn.functional import pad

    return lambda p, q, dx: pad(p, (0, len(q) - 1))


# Section 4


@mutant(
    "E000-01",
    "process.forward_step",
    "test_process.py::test_the_one_step_kernel_is_a_density_and_keeps_standard_normal_data",
    "04",
)
def _(original):
    """The mean of one step follows x_t itself: x_t = sqrt(1 - beta) x_t + sqrt(beta) eps, solved for x_t."""
    from diffusion_edu.process import expand, jump

    def forward_step(process, x_s, t, eps):
        scale, std = jump(process, t, t - 1)
        return expand(std / (1 - scale), x_s) * eps

    return forward_step


@mutant(
    "E000-02",
    "process.DiscreteVP.marginal",
    "test_process.py::test_the_variance_recursion_gives_the_marginal_and_unit_variance_stays",
    "04",
)
def _(original):
    """The covariance sqrt(1 - alpha_bar) I."""

    def marginal(self, t):
        scale, std = original(self, t)
        return scale, std.sqrt()

    return marginal


@mutant("E004-08", "process.DiscreteVP.__init__", "test_process.py::test_ten_factors_are_ten_and_not_eleven", "04")
def _(original):
    """The product of 1 - beta_t, the last factor every time, from i = 0."""
    import torch

    from diffusion_edu.process import TableVP

    def init(self, beta):
        original(self, beta)
        log_alpha_bar = torch.log1p(-self.beta) * (torch.arange(len(beta)) + 1)
        self.alpha_bar, self._scale = log_alpha_bar.exp(), (log_alpha_bar / 2).exp()
        self._std, self.between = (-torch.expm1(log_alpha_bar)).sqrt(), TableVP(log_alpha_bar)

    return init


@mutant("E001-11", "process.q_sample", "test_process.py::test_noising_can_be_undone_when_the_noise_is_known", "03")
def _(original):
    """The line is cut off: the noise is not multiplied by sqrt(1 - alpha_bar)."""
    from diffusion_edu.process import expand

    def q_sample(process, x0, t, eps):
        return expand(process.marginal(t)[0], x0) * x0 + eps

    return q_sample


@mutant(
    "E002-02",
    "schedules.linear_beta",
    "test_schedules.py::test_linear_has_its_ends_and_constant_steps_and_destroys_the_data",
    "05",
)
def _(original):
    """beta_T = 10^-2."""
    return lambda T=1000, beta_start=1e-4, beta_end=0.01: original(T, beta_start, beta_end)


@mutant("E004-19", "process.Process.log_snr", "test_process.py::test_log_snr_falls_and_its_sigmoid_is_alpha_bar", "04")
def _(original):
    """The log signal-to-noise ratio is called the ratio: its logarithm is not taken."""
    return lambda self, t: original(self, t).exp()


@mutant(
    "table-float32",
    "process.DiscreteVP.__init__",
    "test_process.py::test_alpha_bar_is_the_exact_product_from_one_to_t",
    "04",
)
def _(original):
    """Tables in single precision."""

    def init(self, beta):
        original(self, beta.float())
        for table in ("alpha_bar", "_scale", "_std"):
            setattr(self, table, getattr(self, table).float().double())

    return init


@mutant(
    "E000-18-wrap",
    "process.DiscreteVP.marginal",
    "test_process.py::test_posterior_variance_is_below_beta_and_vanishes_at_the_last_step",
    "04",
)
def _(original):
    """alpha_bars[-1]: at t = 0 the table wraps round to its last entry."""
    return lambda self, t: original(self, t + self.T * (t == 0))


# Section 5


@mutant(
    "E002-05",
    "schedules.cosine_beta",
    "test_schedules.py::test_cosine_alpha_bar_is_a_squared_cosine_until_the_clip",
    "05",
)
def _(original):
    """The cosine schedule without its clip: beta_T = 1."""
    return lambda T=1000, s=0.008, max_beta=1.0: original(T, s, 1.0)


@mutant(
    "table-scaled-linear",
    "schedules.linear_beta",
    "test_schedules.py::test_linear_has_its_ends_and_constant_steps_and_destroys_the_data",
    "05",
)
def _(original):
    """ "Linear" taken as linear in the square root."""
    from diffusion_edu.schedules import quadratic_beta

    return quadratic_beta


@mutant(
    "E002-16",
    "schedules.sigmoid_beta",
    "test_schedules.py::test_sigmoid_is_symmetric_and_does_not_reach_its_asymptotes",
    "05",
)
def _(original):
    """beta_1 and beta_T are taken for the first and the last beta."""

    def sigmoid_beta(T=1000, beta_start=1e-4, beta_end=0.02, tau=6.0):
        beta = original(T, beta_start, beta_end, tau)
        rise = (beta[1:] - beta[1]) / (beta[T] - beta[1])
        beta[1:] = beta_start + rise * (beta_end - beta_start)
        return beta

    return sigmoid_beta


LOG_SNR = "test_schedules.py::test_the_cosine_log_snr_is_cos_squared_and_its_cut_ends_at_both_limits"


@mutant("E004-19-cosine", "schedules.cosine_log_snr", LOG_SNR, "05")
def _(original):
    """logSNR(t), "which is the signal-to-noise ratio"."""
    return lambda *args: original(*args).exp()


@mutant(
    "table-zero-snr",
    "schedules.zero_terminal_snr",
    "test_schedules.py::test_zero_terminal_snr_moves_the_signal_along_a_straight_line",
    "05",
)
def _(original):
    """Zero terminal SNR by shifting and scaling alpha_bar, not its root."""
    from diffusion_edu.schedules import beta_from_alpha_bar

    def zero_terminal_snr(beta):
        alpha_bar = (1 - beta).cumprod(0)
        first, last = alpha_bar[1].item(), alpha_bar[-1].item()
        alpha_bar[1:] = first * (alpha_bar[1:] - last) / (first - last)
        return beta_from_alpha_bar(alpha_bar, max_beta=1)

    return zero_terminal_snr


@mutant(
    "E000-17b-respace",
    "schedules.respace",
    "test_schedules.py::test_respacing_keeps_alpha_bar_at_the_kept_steps",
    "05",
)
def _(original):
    """The kept steps keep their own beta_t."""
    return lambda beta, times: beta[[0, *times.tolist()]]


GEOMETRIC = "test_schedules.py::test_geometric_sigmas_have_a_constant_ratio_and_end_in_zero"


@mutant("E004-05", "schedules.geometric_sigmas", GEOMETRIC, "05")
def _(original):
    """ "N distributions", sigma_0 to sigma_N: one level too many."""
    return lambda n, *args, **kwargs: original(n + 1, *args, **kwargs)


@mutant("E004-06", "schedules.geometric_sigmas", GEOMETRIC, "05")
def _(original):
    """Noise levels in increasing order."""
    return lambda *args, **kwargs: original(*args, **kwargs).flip(0)


# Section 9: parameterisations


@mutant("table-v-sign", "prediction.Prediction.v", "test_prediction.py::test_velocity_is_a_rotation", "05")
def _(original):
    """The velocity points from the noise to the data."""
    return property(lambda self: -original.fget(self))


@mutant(
    "table-v-as-eps",
    "prediction.Prediction.from_v",
    "test_prediction.py::test_every_view_gives_every_other",
    "05",
)
def _(original):
    """A network's v is read as the noise."""
    from diffusion_edu.prediction import Prediction

    return classmethod(lambda cls, *args: Prediction.from_eps(*args))


@mutant("table-v-loss", "losses.loss_ratio", "test_losses.py::test_the_loss_ratio_is_the_ratio_of_losses", "05")
def _(original):
    """The weight of v is that of eps, SNR without the 1."""
    return lambda process, t, target: original(process, t, "eps" if target == "v" else target)


@mutant(
    "table-min-snr",
    "losses.min_snr_weight",
    "test_losses.py::test_min_snr_weighs_the_error_of_x0_by_the_smaller_of_snr_and_gamma_whatever_the_target",
    "05",
)
def _(original):
    """Min-SNR with the larger of SNR and gamma."""
    from diffusion_edu.losses import loss_ratio

    def min_snr_weight(target="eps", gamma=5.0):
        return lambda process, t: loss_ratio(process, t, "eps").clamp(min=gamma) / loss_ratio(process, t, target)

    return min_snr_weight


# Sections 6, 7 and 9: the reverse step


def _posterior(mean):
    """q(x_s | x_t, x_0) with another mean, from (x0, x_t) and the numbers a_t, b_t, a_s, b_s, a_ts, b_ts."""
    from diffusion_edu.process import expand, jump

    def posterior(process, x0, x_t, t, s):
        levels = *process.marginal(t), *process.marginal(s), *jump(process, t, s)
        sigma = levels[5] * levels[3] / levels[1]
        return mean(x0, x_t, *(expand(c, x_t) for c in levels)), expand(sigma, x_t)

    return posterior


BAYES = "test_process.py::test_the_posterior_is_bayes_rule_on_a_grid"


@mutant("E000-06", "process.posterior", BAYES, "04")
def _(original):
    """beta_t is missing in the weight of x_0."""
    return _posterior(lambda x0, x_t, a_t, b_t, a_s, b_s, a_ts, b_ts: a_ts * (b_s / b_t) ** 2 * x_t + a_s / b_t**2 * x0)


@mutant("E000-07", "process.posterior", BAYES, "04")
def _(original):
    """1 / sqrt(alpha_bar_t) in front of the mean, where 1 / sqrt(alpha_t) belongs."""

    def mean(x0, x_t, a_t, b_t, a_s, b_s, a_ts, b_ts):
        return (x_t - b_ts**2 / b_t * (x_t - a_t * x0) / b_t) / a_t

    return _posterior(mean)


@mutant("E001-07", "process.posterior", BAYES, "04")
def _(original):
    """The second factor of Bayes' rule is N(x_t; ...): only the likelihood is left."""
    return _posterior(lambda x0, x_t, a_t, b_t, a_s, b_s, a_ts, b_ts: x_t / a_ts)


@mutant("E001-08", "process.posterior", BAYES, "04")
def _(original):
    """1 - alpha_bar_t for 1 - alpha_bar_{t-1} in the weight of x_t."""
    return _posterior(lambda x0, x_t, a_t, b_t, a_s, b_s, a_ts, b_ts: a_ts * x_t + a_s * (b_ts / b_t) ** 2 * x0)


@mutant(
    "E000-21-prediction",
    "prediction.Prediction.score",
    "test_prediction.py::test_the_score_is_minus_the_noise_over_its_standard_deviation",
    "04",
)
def _(original):
    """The score read off a noise prediction has the wrong sign."""
    return property(lambda self: self.eps / self.std)


@mutant(
    "E000-17b",
    "process.jump",
    "test_samplers.py::test_strided_sampling_is_sampling_on_the_respaced_table_and_converges",
    "04",
)
def _(original):
    """A stride keeps the single step's alpha_t."""
    return lambda process, t, s: original(process, t, t - 1)


# Section 8 and 12: the bound and learned variances


TERMS = "test_elbo.py::test_the_generator_walks_the_times_with_fresh_noise_in_eval_mode"


def _some_terms(keep):
    """bound_terms that yields what ``keep`` makes of the list of its terms, L_T first and L_0 last."""
    return lambda original: lambda *args, **kwargs: iter(keep(list(original(*args, **kwargs))))


@mutant("E000-03", "elbo.bound_terms", TERMS, "02")
def _(original):
    """t = 1..T-1: the term of t = T is missing (the infinite one of t = 1 is left out here)."""
    return _some_terms(lambda terms: terms[:1] + terms[2:])(original)


@mutant("E000-40", "elbo.bound_terms", TERMS, "02")
def _(original):
    """ "L_ELBO" with the sign of the ELBO: a lower bound on log p in the place of an upper bound on -log p."""
    return _some_terms(lambda terms: [-term for term in terms])(original)


@mutant("E004-12", "elbo.bound_terms", TERMS, "02")
def _(original):
    """Only the sum over t > 1: L_T and L_0 are dropped."""
    return _some_terms(lambda terms: terms[1:-1])(original)


@mutant(
    "table-L_0-constant", "elbo.bound_term", "test_elbo.py::test_the_last_term_is_a_density_with_its_constant", "02"
)
def _(original):
    """L_0 as a squared error, without log sqrt(2 pi sigma^2)."""
    from diffusion_edu.process import q_sample

    def bound_term(step, model, x0, t, s, eps, levels=None, **cond):
        term = original(step, model, x0, t, s, eps, levels, **cond)
        if levels is not None or cond:
            return term
        mean, sigma = step.kernel(model, q_sample(model.process, x0, t, eps), t, s)
        constant = (2 * math.pi * sigma**2).log().expand_as(mean).flatten(1).sum(1) / 2
        return term - constant * (s == 0)

    return bound_term


FORM_1 = (
    "test_elbo.py::test_the_log_ratio_of_the_exact_reverse_is_the_log_density_on_every_trajectory"
    " test_elbo.py::test_both_forms_have_the_same_mean_for_any_affine_model"
)


@mutant("E001-03", "elbo.log_ratio_bound", FORM_1, "02")
def _(original):
    """KL(q(x_T | x_{T-1}) || p(x_T)) over q(x_{T-1} | x_T), that of N(0, I) data, in the place of q(x_{T-1} | x_0)."""
    from diffusion_edu.gaussian import normal_log_prob
    from diffusion_edu.process import jump

    def log_ratio_bound(step, model, path, times):
        scale, var = (c ** (k + 1) for k, c in enumerate(jump(model.process, times[0], times[1])))
        right = normal_log_prob(path[0], scale * path[1], var) - normal_log_prob(path[0], 0.0, 1.0)
        squares = scale**2 * ((scale * path[0]) ** 2 + var)  # of the mean of x_T given that x_{T-1}
        kl = ((var + squares - 1 - var.log()) / 2).flatten(1).sum(1)
        return original(step, model, path, times) - right + kl

    return log_ratio_bound


@mutant("E001-04", "elbo.log_ratio_bound", FORM_1, "02")
def _(original):
    """KL(q(x_t | x_{t-1}) || p(x_t | x_{t+1})) inside the first form."""
    from diffusion_edu.gaussian import normal_kl, normal_log_prob
    from diffusion_edu.process import jump

    def log_ratio_bound(step, model, path, times):
        mean, sigma = step.kernel(model, path[-2], times[-2], times[-1])
        nats, above = -normal_log_prob(path[-1], mean, sigma**2), (0 * path[0], 0 * path[0] + 1)  # p(x_T)
        for i in range(len(times) - 1):
            scale, std = jump(model.process, times[i], times[i + 1])
            nats = nats + normal_kl(scale * path[i + 1], std**2, above[0], above[1] ** 2).flatten(1).sum(1)
            above = step.kernel(model, path[i], times[i], times[i + 1])
        return nats

    return log_ratio_bound


@mutant("E000-08", "losses.elbo_weight", "test_elbo.py::test_the_weight_of_eps_has_alpha_and_not_alpha_bar", "02")
def _(original):
    """alpha_bar_t for alpha_t in the weight of eps."""

    def elbo_weight(target="eps", variance="beta_tilde"):
        weight = original(target, variance)
        if target != "eps":
            return weight
        return lambda process, t: weight(process, t) * process.alpha[t] / process.alpha_bar[t]

    return elbo_weight


HYBRID = "test_elbo.py::test_the_hybrid_loss_is_the_simple_one_and_a_share_of_the_whole_bound_from_one_call"


@mutant("E001-10-factor", "elbo.hybrid_loss", HYBRID, "07")
def _(original):
    """The mean over random t in the place of the sum: the factor T is dropped."""

    def hybrid_loss(model, x0, t, eps, vlb_weight=1e-3, levels=None, **cond):
        return original(model, x0, t, eps, vlb_weight / model.process.T, levels, **cond)

    return hybrid_loss


@mutant(
    "table-hybrid-gradient",
    "elbo.hybrid_loss",
    "test_elbo.py::test_the_bound_in_the_hybrid_loss_does_not_touch_the_mean_and_moves_the_variance",
    "07",
)
def _(original):
    """The bound trains the mean, too: no stop-gradient."""
    from diffusion_edu.elbo import bound_term
    from diffusion_edu.losses import denoising_loss
    from diffusion_edu.samplers import learned, make_ddpm_step

    def hybrid_loss(model, x0, t, eps, vlb_weight=1e-3, levels=None, **cond):
        vlb = bound_term(make_ddpm_step(learned), model, x0, t, t - 1, eps, levels, **cond)
        return denoising_loss(model, x0, t, eps, **cond) + vlb_weight * model.process.T * vlb / x0[0].numel()

    return hybrid_loss


@mutant(
    "table-importance-weight",
    "elbo.ImportanceTimes.draw",
    "test_elbo.py::test_important_times_are_drawn_more_often_and_weigh_less_so_that_the_mean_stays",
    "07",
)
def _(original):
    """Times drawn by importance, weighted as if they were uniform."""

    def draw(self, n, generator=None):
        t, weight = original(self, n, generator)
        return t, 0 * weight + self.T

    return draw


INTERP = "test_elbo.py::test_the_best_variance_of_gaussian_data_lies_between_beta_tilde_and_beta_at_every_step"


@mutant("table-beta-tilde-clip", "samplers.beta_tilde", INTERP, "07")
def _(original):
    """beta-tilde is 0 at the last step: there the density of x_0 is infinite, or its bound."""
    from diffusion_edu.process import posterior

    return lambda pred, process, t, s: posterior(process, pred.x0, pred.x_t, t, s)[1] ** 2


@mutant("table-learned-linear", "samplers.learned", INTERP, "07")
def _(original):
    """The variance lies between beta-tilde and beta on a linear scale."""
    from diffusion_edu.samplers import beta, beta_tilde

    def learned(pred, process, t, s):
        low, high = beta_tilde(pred, process, t, s), beta(pred, process, t, s)
        return pred.frac * high + (1 - pred.frac) * low

    return learned


# Section 10: the model of 2015


@mutant("E001-12", "kernel_model.KernelModel.reverse_kernel", "test_kernel_model.py", "03")
def _(original):
    """At t = 1 the listing returns x_1 as x_0, and no law."""

    def reverse_kernel(self, x_t, t, s):
        mean, sigma = original(self, x_t, t, s)
        first = (t == 1).reshape(-1, *[1] * (x_t.ndim - 1)) if t.ndim else t == 1
        return mean.where(~first, x_t), sigma * ~first

    return reverse_kernel


def _as_listed(dtype):
    """The precision form as the listing has it: 1 / cov1 + 1 / cov2, in this precision."""
    from diffusion_edu.process import expand

    def posterior_precision(process, x0, x_t, t):
        alpha_bar, alpha, beta = (table[t].to(dtype) for table in (process.alpha_bar, process.alpha, process.beta))
        mu1, cov1, mu2, cov2 = (alpha_bar / alpha).sqrt(), 1 - alpha_bar / alpha, 1 / alpha.sqrt(), beta / alpha
        lam = 1 / cov1 + 1 / cov2
        mean = expand(mu1 / cov1 / lam, x0) * x0 + expand(mu2 / cov2 / lam, x0) * x_t
        return mean, expand((1 / lam).sqrt(), x0)

    return posterior_precision


@mutant("E001-13", "kernel_model.posterior_precision", "test_kernel_model.py", "03")
def _(original):
    """1 / 0 at t = 1."""
    import torch

    return _as_listed(torch.float64)


@mutant("E001-14", "kernel_model.posterior_precision", "test_kernel_model.py", "03")
def _(original):
    """1 - alpha_bar / alpha cancels in single precision (the right answer is put in at t = 1)."""
    import torch

    listed = _as_listed(torch.float32)
    return lambda process, x0, x_t, t: (listed if (t > 1).all() else original)(process, x0, x_t, t)


# Section 11: training and sampling


@mutant(
    "E000-12-training",
    "process.DiscreteVP.sample_t",
    "test_losses.py::test_steps_draw_afresh_and_examples_do_not_see_each_other",
    "04",
)
def _(original):
    """One key for every random call: each training step sees the same times."""
    import torch

    return lambda self, n, generator=None: original(self, n, torch.Generator().manual_seed(0))


@mutant("E001-10", "process.DiscreteVP.sample_t", "test_process.py::test_training_times_cover_their_range_evenly", "04")
def _(original):
    """t is drawn from 2..T: the last step is never trained."""
    return lambda self, n, generator=None: original(self, n, generator).clamp(min=2)


@mutant(
    "E000-12-sampling", "samplers.noises", "test_samplers.py::test_noise_is_standard_normal_fresh_and_repeatable", "03"
)
def _(original):
    """One key for every random call: each sampling step adds the same noise."""
    return lambda seed: lambda x: original(seed)(x)


@mutant(
    "E000-14", "losses.denoising_loss", "test_losses.py::test_the_loss_is_the_squared_error_at_the_noised_point", "04"
)
def _(original):
    """The loss is a sum over all numbers, so the step size grows with the data."""
    return lambda model, x0, *args, **kwargs: original(model, x0, *args, **kwargs) * x0.numel()


def _ddpm_step(mean):
    """make_ddpm_step with another mean, from x_t, eps and the numbers a_t, b_t, a_ts, b_ts."""
    from diffusion_edu.process import expand, jump
    from diffusion_edu.samplers import KernelStep, beta_tilde

    def make_ddpm_step(variance=beta_tilde):
        def kernel(model, x_t, t, s):
            pred = model(x_t, t)
            levels = (expand(c, x_t) for c in (*model.process.marginal(t), *jump(model.process, t, s)))
            sigma = None if s == 0 else variance(pred, model.process, t, s).sqrt()
            return mean(x_t, pred.eps, *levels), sigma

        return KernelStep(kernel)

    return make_ddpm_step


ANCESTRAL = (
    "test_samplers.py::test_the_listing_is_the_step test_samplers.py::test_ancestral_sampling_is_the_exact_recursion"
)


@mutant("E000-09", "samplers.make_ddpm_step", ANCESTRAL, "04")
def _(original):
    """mu_t /= sqrt(alpha_bars[t])."""
    return _ddpm_step(lambda x, eps, a_t, b_t, a_ts, b_ts: (x - b_ts**2 / b_t * eps) / a_t)


@mutant("E002-06", "samplers.make_ddpm_step", ANCESTRAL, "04")
def _(original):
    """(1 - alpha_t) / sqrt(1 - alpha_t) in front of the noise."""
    return _ddpm_step(lambda x, eps, a_t, b_t, a_ts, b_ts: (x - b_ts * eps) / a_ts)


@mutant(
    "E000-10",
    "samplers.make_ddpm_step",
    "test_samplers.py::test_the_last_step_draws_nothing_whatever_the_variance",
    "04",
)
def _(original):
    """z is drawn at t = 1, too (also E002-07)."""
    from diffusion_edu.process import posterior
    from diffusion_edu.samplers import KernelStep, beta_tilde

    def make_ddpm_step(variance=beta_tilde):
        def kernel(model, x_t, t, s):
            pred = model(x_t, t)
            mean, _ = posterior(model.process, pred.x0, x_t, t, s)
            return mean, variance(pred, model.process, t, s).sqrt()

        return KernelStep(kernel)

    return make_ddpm_step


@mutant("E004-09", "samplers.make_ddpm_step", ANCESTRAL, "04")
def _(original):
    """mu_theta(x_t, t) for p(x_t | x_{t+1}): the network is asked at the time it steps to."""
    from diffusion_edu.process import posterior
    from diffusion_edu.samplers import KernelStep, beta_tilde

    def make_ddpm_step(variance=beta_tilde):
        def kernel(model, x_t, t, s):
            pred = model(x_t, s.clamp(min=1))
            mean, _ = posterior(model.process, pred.x0, x_t, t, s)
            return mean, None if s == 0 else variance(pred, model.process, t, s).sqrt()

        return KernelStep(kernel)

    return make_ddpm_step


# What later notebooks show: DDIM, SDEs, Langevin, thresholds


def _ddim_step(x_s):
    """make_ddim_step with another update, from pred, sigma of eta = 1, eta and a_s, b_s; returns mean and sigma."""
    from diffusion_edu.process import expand, posterior
    from diffusion_edu.samplers import KernelStep

    def make_ddim_step(eta=0.0):
        def kernel(model, x_t, t, s):
            pred = model(x_t, t)
            a_s, b_s = (expand(c, x_t) for c in model.process.marginal(s))
            return x_s(pred, posterior(model.process, pred.x0, x_t, t, s)[1], eta, a_s, b_s)

        return KernelStep(kernel)

    return make_ddim_step


DDIM = "test_ddim.py::test_the_ddim_noise_is_eta_times_the_posteriors_and_keeps_the_marginals"


@mutant("E000-16", "samplers.make_ddim_step", DDIM, "11")
def _(original):
    """sigma^2 = eta beta-tilde."""

    def x_s(pred, sigma, eta, a_s, b_s):
        sigma = math.sqrt(eta) * sigma
        return a_s * pred.x0 + (b_s**2 - sigma**2).clamp_min(0).sqrt() * pred.eps, sigma

    return _ddim_step(x_s)


@mutant("E000-18", "samplers.make_ddim_step", DDIM, "11")
def _(original):
    """ "* eps" is missing in the direction to x_t."""

    def x_s(pred, sigma, eta, a_s, b_s):
        return a_s * pred.x0 + (b_s**2 - eta**2 * sigma**2).clamp_min(0).sqrt(), eta * sigma

    return _ddim_step(x_s)


@mutant(
    "E000-19",
    "process.VPSDE.integral",
    "test_process.py::test_vpsde_has_ddpms_integral_and_is_the_limit_of_its_table",
    "09",
)
def _(original):
    """alpha_bar(t) = exp(+ integral of beta)."""
    return lambda self, t: -original(self, t)


@mutant(
    "E004-02",
    "samplers.make_langevin_step",
    "test_samplers.py::test_langevin_keeps_a_unit_bell_up_to_its_step_size",
    "08",
)
def _(original):
    """sqrt(2) epsilon z for sqrt(2 epsilon) z."""

    def make_langevin_step(r=0.1, n_steps=1):
        def step(model, x, t, s, noise):
            for _ in range(n_steps if t > 0 else 0):
                pred = model(x, t)
                epsilon = r * pred.std**2
                x = x + epsilon * pred.score + math.sqrt(2) * epsilon * noise(x)
            return x

        return step

    return make_langevin_step


@mutant(
    "E000-33",
    "guidance.static_threshold",
    "test_guidance.py::test_static_threshold_clips_the_clean_data_and_recomputes_the_noise",
    "14",
)
def _(original):
    """x_t is clipped to [-1, 1], not the prediction of x_0."""
    from diffusion_edu.guidance import Wrapped

    return lambda model, limit=1.0: Wrapped(lambda m, x, t, **cond: m(x.clamp(-limit, limit), t, **cond), model)


@mutant(
    "E000-34",
    "guidance.dynamic_threshold",
    "test_guidance.py::test_dynamic_threshold_rescales_each_sample_by_its_own_percentile",
    "14",
)
def _(original):
    """One percentile for all the samples of a batch."""
    from diffusion_edu.guidance import _change_x0

    def change(x0, p):
        s = x0.abs().flatten().quantile(p).clamp(min=1)
        return x0.clamp(-s, s) / s

    return lambda model, percentile=0.995: _change_x0(model, lambda x0: change(x0, percentile))


# Sections 17, 18 and 20: guidance and thresholds


def _classifier(eps):
    """classifier with another eps, from the prediction, w and the classifier's gradient."""
    from diffusion_edu.guidance import Wrapped, gradient
    from diffusion_edu.prediction import Prediction

    def classifier(model, log_prob, w):
        def call(m, x_t, t, **cond):
            pred = m(x_t, t, **cond)
            guided = eps(pred, w, gradient(log_prob, x_t, t))
            return Prediction.from_eps(x_t, pred.scale, pred.std, guided, pred.frac)

        return Wrapped(call, model)

    return classifier


UPHILL = "test_guidance.py::test_guidance_shifts_the_clean_data_up_the_gradient"


@mutant("E000-24", "guidance.classifier", UPHILL, "13")
def _(original):
    """The classifier joins the loss and not the sampler: the model's answers stay as they are."""
    return lambda model, log_prob, w: model


@mutant("table-guidance-sign", "guidance.classifier", UPHILL, "13")
def _(original):
    """The gradient has the wrong sign: guidance leads away from y."""
    return _classifier(lambda pred, w, slope: pred.eps + w * pred.std * slope)


@mutant("table-guidance-std", "guidance.classifier", UPHILL, "13")
def _(original):
    """sqrt(1 - alpha_bar) in front of the gradient is forgotten."""
    return _classifier(lambda pred, w, slope: pred.eps - w * slope)


@mutant("table-guidance-root", "guidance.classifier", UPHILL, "13")
def _(original):
    """1 - alpha_bar for its root."""
    return _classifier(lambda pred, w, slope: pred.eps - w * pred.std**2 * slope)


@mutant(
    "table-guidance-log",
    "guidance.gradient",
    "test_guidance.py::test_adding_the_classifiers_gradient_gives_the_conditional_score",
    "13",
)
def _(original):
    """The gradient of the probability: its logarithm is forgotten."""
    return lambda log_prob, x, t: original(lambda x, t: log_prob(x, t).exp(), x, t)


def _guided_mean(shift):
    """guided_mean with another shift, from w, sigma, the gradient as a function of x and time, x_t, t, mean and s."""
    from diffusion_edu.guidance import gradient
    from diffusion_edu.samplers import KernelStep

    def guided_mean(step, log_prob, w):
        def kernel(model, x_t, t, s):
            mean, sigma = step.kernel(model, x_t, t, s)
            if s == 0 and not step.draws_last:
                return mean, sigma
            return mean + shift(w, sigma, lambda x, t: gradient(log_prob, x, t), x_t, t, mean, s), sigma

        return KernelStep(kernel, step.draws_last)

    return guided_mean


MEAN = (
    "test_guidance.py::test_the_guided_mean_is_exact_for_a_log_linear_classifier "
    "test_guidance.py::test_the_guided_mean_takes_the_gradient_at_the_mean_of_the_step"
)


@mutant("table-mean-place", "samplers.guided_mean", MEAN, "13")
def _(original):
    """The gradient is taken at x_t and t, not at the mean of the step and s."""
    return _guided_mean(lambda w, sigma, slope, x_t, t, mean, s: w * sigma**2 * slope(x_t, t))


@mutant("table-mean-sigma", "samplers.guided_mean", MEAN, "13")
def _(original):
    """The standard deviation of the step, not its variance, multiplies the gradient."""
    return _guided_mean(lambda w, sigma, slope, x_t, t, mean, s: w * sigma * slope(mean, s))


TEMPERED = "test_oracles.py::test_the_gradient_of_the_tempered_density_is_the_guided_score"


@mutant("E004-16", "oracles.GaussianMixtureOracle.tempered_log_density", TEMPERED, "13")
def _(original):
    """p^w is normalised over the classes again, by a Z that depends on x_t."""

    def tempered_log_density(self, x, t, y, w):
        power = (w * self.class_log_prob(x, t)).log_softmax(1)
        return self.log_prob(x, t) + power.gather(1, y[:, None])[:, 0]

    return tempered_log_density


@mutant("table-tempered-given", "oracles.GaussianMixtureOracle.tempered_log_density", TEMPERED, "13")
def _(original):
    """q(x_t | y) q(y | x_t)^w for q(x_t) q(y | x_t)^w: the power is one too high."""
    return lambda self, x, t, y, w: original(self, x, t, y, w + 1)


@mutant(
    "table-tempered-bell",
    "gaussian.guided_normal",
    "test_gaussian.py::test_a_prior_times_a_likelihood_to_the_power_w_is_a_gaussian",
    "13",
)
def _(original):
    """The power w multiplies the variance of the likelihood, where it divides it."""
    return lambda y, r2, w, mean=0.0, var=1.0: original(y, r2 * max(w, 1e-9), 1.0, mean, var)


@mutant(
    "table-clean-classifier",
    "losses.classifier_loss",
    "test_classifier.py::test_the_loss_is_the_cross_entropy_of_noised_data",
    "13",
)
def _(original):
    """The classifier is trained on clean data, whatever the time it is told."""

    def classifier_loss(model, x0, t, eps, y):
        return -model(x0, t).gather(1, y[:, None])[:, 0]

    return classifier_loss


def _classifier_free(both):
    """classifier_free with other arithmetic, from the conditional and the unconditional prediction and w."""
    from diffusion_edu.guidance import Wrapped

    def classifier_free(model, w, negative=None, **bound):
        def call(m, x_t, t, **cond):
            import torch

            drop = torch.ones(len(x_t), dtype=torch.bool)
            other = m(x_t, t, **bound | negative) if negative else m(x_t, t, **bound, drop=drop)
            return both(m(x_t, t, **bound), other, w)

        return Wrapped(call, model)

    return classifier_free


FREE = "test_guidance.py::test_guidance_extrapolates_from_the_unconditional_model"


@mutant("E000-25", "guidance.classifier_free", FREE, "14")
def _(original):
    """A linear interpolation: the scale stops at 1."""
    return _classifier_free(lambda given, free, w: free.toward(given, min(w, 1)))


@mutant("table-free-halves", "guidance.classifier_free", FREE, "14")
def _(original):
    """The halves are swapped: guidance leads from the conditional model to the unconditional one."""
    return _classifier_free(lambda given, free, w: given.toward(free, w))


@mutant("table-free-extra", "guidance.classifier_free", FREE, "14")
def _(original):
    """(1 + w) eps(x | y) - w eps(x) with the w that is 1 for the conditional model: one too much."""
    return _classifier_free(lambda given, free, w: free.toward(given, w + 1))


@mutant("table-free-null", "guidance.classifier_free", FREE, "14")
def _(original):
    """The condition is not dropped: both halves carry it."""
    return _classifier_free(lambda given, free, w: given.toward(given, w))


@mutant(
    "table-free-convention", "guidance.w_from_extra", "test_guidance.py::test_the_two_conventions_differ_by_one", "14"
)
def _(original):
    """Ho and Salimans' w is taken for ours."""
    return lambda extra: max(float(extra), 0.0)


@mutant(
    "table-interval-ends",
    "guidance.interval",
    "test_guidance.py::test_an_interval_has_its_upper_end_and_not_its_lower_and_takes_plain_functions",
    "14",
)
def _(original):
    """Guidance outside of the interval."""
    return lambda inside, outside, sigma_min, sigma_max: original(outside, inside, sigma_min, sigma_max)


@mutant(
    "table-dropout-unused",
    "training.fit",
    "test_training.py::test_one_network_learns_the_conditional_and_the_marginal_noise_if_labels_are_dropped",
    "14",
)
def _(original):
    """Coins are drawn for dropping the labels, and none is dropped."""
    from dataclasses import replace

    def fit(model, x0, recipe, **options):
        return original(model, x0, replace(recipe, p_drop=min(recipe.p_drop, 1e-12)), **options)

    return fit


@mutant(
    "table-null-row",
    "nets.layers.Conditioning._rows",
    "test_nets.py::test_dropping_the_label_of_all_is_the_null_label_whatever_they_were",
    "14",
)
def _(original):
    """A dropped label is read as class 0."""

    def _rows(self, clock, y, drop):
        rows = original(self, clock, y, None)
        return rows if drop is None else rows * ~drop

    return _rows


STATIC = "test_guidance.py::test_static_threshold_clips_the_clean_data_and_recomputes_the_noise"
DYNAMIC = "test_guidance.py::test_dynamic_threshold_rescales_each_sample_by_its_own_percentile"


def _percentile(x, p):
    """One percentile of |x| for each sample, ready to divide x."""
    return x.abs().flatten(1).quantile(p, dim=1).reshape(-1, *[1] * (x.ndim - 1))


@mutant("E000-33b", "guidance.dynamic_threshold", DYNAMIC, "14")
def _(original):
    """x_t is rescaled, not the prediction of x_0."""
    from diffusion_edu.guidance import Wrapped

    def change(x, p):
        s = _percentile(x, p).clamp(min=1)
        return x.clamp(-s, s) / s

    return lambda model, percentile=0.995: Wrapped(lambda m, x, t, **c: m(change(x, percentile), t, **c), model)


@mutant("E000-35", "guidance.dynamic_threshold", DYNAMIC, "14")
def _(original):
    """jnp.max(s, 1.0) is no maximum of s and 1: data that lie well inside the range are blown up."""
    from diffusion_edu.guidance import _change_x0

    def change(x0, p):
        s = _percentile(x0, p)
        return x0.clamp(-s, s) / s

    return lambda model, percentile=0.995: _change_x0(model, lambda x0: change(x0, percentile))


@mutant("table-threshold-eps", "guidance._change_x0", f"{STATIC} {DYNAMIC}", "14")
def _(original):
    """The noise is not computed again: x0 and eps no longer make up x_t."""
    from dataclasses import replace

    from diffusion_edu.guidance import Wrapped

    def _change_x0(model, change):
        def call(m, x_t, t, **cond):
            pred = m(x_t, t, **cond)
            return replace(pred, x0=change(pred.x0))

        return Wrapped(call, model)

    return _change_x0


# Sections 13 and 14: scores, Langevin dynamics, SDEs and the probability flow


@mutant(
    "E000-21-matching",
    "score_matching.denoising_score_matching",
    "test_score_matching.py::test_the_score_of_the_kernel_is_minus_the_noise_over_sigma "
    "test_score_matching.py::test_denoising_matching_is_explicit_matching_of_the_noised_density_but_for_one_constant",
    "08",
)
def _(original):
    """The score of the kernel has the wrong sign: eps / sigma."""
    return lambda score, x, sigma, eps: ((score(x + sigma * eps) - eps / sigma) ** 2).flatten(1).sum(1)


@mutant(
    "E004-13",
    "guidance.reschedule",
    "test_score_matching.py::test_the_noise_in_ddpm_is_the_noise_in_ncsn_at_the_rescaled_point",
    "08",
)
def _(original):
    """ "They are equivalent!": the other network is asked at the same input, not at x_t / sqrt(alpha_bar)."""
    from diffusion_edu.guidance import Wrapped
    from diffusion_edu.prediction import Prediction

    def reschedule(model, process):
        rescaled = original(model, process)

        def call(m, x_t, t, **cond):
            scale = rescaled(x_t, t, **cond).scale
            pred = rescaled(scale * x_t, t, **cond)
            return Prediction.from_eps(x_t, pred.scale, pred.std, pred.eps, pred.frac)

        return Wrapped(call, model, process)

    return reschedule


@mutant(
    "E004-02-langevin",
    "samplers.langevin",
    "test_langevin.py::test_the_stationary_variance_of_a_bell_is_one_over_one_minus_half_a_step",
    "08",
)
def _(original):
    """sqrt(2) epsilon z for sqrt(2 epsilon) z, on one density."""

    def langevin(score, x, step_sizes, noise):
        for epsilon in step_sizes:
            x = x + epsilon * score(x) + math.sqrt(2) * epsilon * noise(x)
            yield x

    return langevin


def _reverse_sde(drift):
    """reverse_sde with another drift, from f, g, the share (1 + eta^2) / 2 and the score."""
    from diffusion_edu.process import expand

    def reverse_sde(sde, model, eta=1.0):
        def changed(x, t):
            return drift(sde.drift(x, t), expand(sde.diffusion(t), x), (1 + eta**2) / 2, model(x, t).score)

        return changed, lambda t: eta * sde.diffusion(t)

    return reverse_sde


REVERSE = (
    "test_sde.py::test_with_the_exact_score_the_way_back_ends_at_the_data_whatever_the_noise "
    "test_sde.py::test_500_steps_find_every_mode_with_its_weight_and_width"
)


@mutant("table-reverse-sign", "samplers.reverse_sde", REVERSE, "09")
def _(original):
    """The score has the wrong sign in the drift of the way back."""
    return _reverse_sde(lambda f, g, share, s: f + share * g**2 * s)


@mutant("table-g", "samplers.reverse_sde", REVERSE, "09")
def _(original):
    """g for g^2 in the drift of the way back."""
    return _reverse_sde(lambda f, g, share, s: f - share * g * s)


FLOW = (
    "test_sde.py::test_the_flow_of_a_gaussian_is_its_closed_form_both_ways "
    "test_sde.py::test_the_flow_of_a_mixture_carries_every_quantile_to_itself"
)


@mutant("table-half", "samplers.probability_flow", FLOW, "10")
def _(original):
    """The factor 1/2 of the probability flow is missing."""
    from diffusion_edu.samplers import reverse_sde

    return lambda model: reverse_sde(model.process.continuous(), model)[0]


@mutant(
    "table-divergence",
    "likelihood.ode_log_prob",
    "test_likelihood.py::test_the_density_of_a_mixture_in_the_plane_is_found_to_a_thousandth_of_a_nat",
    "10",
)
def _(original):
    """The integral of the divergence is subtracted."""
    from dataclasses import replace

    def ode_log_prob(*args, **kwargs):
        found = original(*args, **kwargs)
        return replace(found, log_prob=found.log_prob - 2 * found.change)

    return ode_log_prob


@mutant(
    "E000-20",
    "losses.denoising_loss",
    "test_sde.py::test_weighted_by_one_minus_alpha_bar_the_target_has_energy_one_and_is_the_noise",
    "09",
)
def _(original):
    """The weight lambda(t) is left out: the scores themselves are compared."""

    def denoising_loss(model, x0, t, eps, target="eps", weight=None, **cond):
        return original(model, x0, t, eps, "score", **cond)

    return denoising_loss


@mutant(
    "E000-22",
    "process.TableVP.rate",
    "test_sde.py::test_a_table_joined_up_keeps_its_alpha_bar_and_beta_belongs_to_the_step_that_ends_there",
    "09",
)
def _(original):
    """beta(t / T) for beta((t + 1) / T) in the step from t to t + 1: every beta comes one step late."""
    return lambda self, t: original(self, (t - 1).clamp(min=0))


def _corrector(move):
    """make_corrector_step with another move, from x, the score, z and (r |z| / |s|)^2."""

    def make_corrector_step(snr=0.16, n_steps=1):
        def step(model, x, t, s, noise):
            for _ in range(n_steps if t > 0 else 0):
                score, z = model(x, t).score, noise(x)
                ratio = z.flatten(1).norm(dim=1).mean() / score.flatten(1).norm(dim=1).mean()
                x = move(x, score, z, (snr * ratio) ** 2)
            return x

        return step

    return make_corrector_step


CORRECTOR = "test_sde.py::test_the_corrector_is_its_formula_and_leaves_the_law_alone_up_to_its_step"


@mutant("table-corrector-step", "samplers.make_corrector_step", CORRECTOR, "09")
def _(original):
    """epsilon = (r |z| / |s|)^2: the factor 2 of the corrector's step is missing."""
    return _corrector(lambda x, score, z, square: x + square * score + (2 * square).sqrt() * z)


@mutant("table-corrector-noise", "samplers.make_corrector_step", CORRECTOR, "09")
def _(original):
    """sqrt(epsilon) z: the factor 2 of the corrector's noise is missing."""
    return _corrector(lambda x, score, z, square: x + 2 * square * score + (2 * square).sqrt() * z)


# Architectures and scale


SHIFT = "test_schedules.py::test_a_large_image_on_the_shifted_schedule_hides_what_the_small_one_does"
EDM = "test_losses.py::test_edm_starts_with_the_loss_one_at_every_noise_level"
POWER = "test_training.py::test_the_power_average_is_its_closed_form"
SIGMOID = "test_losses.py::test_the_sigmoid_weight_falls_in_the_log_snr_and_is_one_loss_in_all_forms"
IDENTITY = "test_dit.py::test_adaln_zero_starts_as_the_identity_and_the_gradient_reaches_alpha"
MP_SUM = "test_dit.py::test_a_magnitude_preserving_sum_keeps_the_variance_of_independent_parts"


@mutant("table-shift-sign", "schedules.shift_log_snr", SHIFT, "22")
def _(original):
    """2 log(size / base): the larger image gets the cleaner schedule."""
    return lambda log_snr, size, base=64: original(log_snr, base, size)


@mutant("table-shift-half", "schedules.shift_log_snr", SHIFT, "22")
def _(original):
    """log(base / size): the deviation of the averaged noise is taken for its variance."""
    return lambda log_snr, size, base=64: (original(log_snr, size, base) + log_snr) / 2


@mutant("table-edm-weight", "losses.edm_weight", EDM, "22")
def _(original):
    """c_out^2 for 1 / c_out^2."""
    return lambda sigma_data=0.5: lambda process, t: 1 / original(sigma_data)(process, t)


@mutant("table-sigmoid-sign", "losses.sigmoid_weight", SIGMOID, "22")
def _(original):
    """sigmoid(lambda - b): the weight rises with the log SNR."""

    def sigmoid_weight(bias=0.0, target="eps"):
        turn = lambda process, t: (process.log_snr(t) - bias).exp()  # sigmoid(x) = e^x sigmoid(-x)
        return lambda process, t: turn(process, t) * original(bias, target)(process, t)

    return sigmoid_weight


@mutant("table-power-ema", "training.power_averaged", POWER, "22")
def _(original):
    """(1 - 1/t)^gamma for the power gamma + 1."""
    return lambda model, gamma=6.94: original(model, gamma - 1 + 1e-12)


@mutant("table-adaln-alpha", "nets.dit.AdaLNZeroBlock.__init__", IDENTITY, "22")
def _(original):
    """alpha starts at 1, as gamma's scale does: the block is no identity."""

    def init(self, width, heads):
        import torch

        original(self, width, heads)
        with torch.no_grad():
            self.modulation.bias.view(6, width)[[2, 5]] = 1.0

    return init


@mutant("table-mp-sum", "nets.layers.mp_sum", MP_SUM, "22")
def _(original):
    """(1 - t) a + t b: a plain mixture, whose variance shrinks."""
    return lambda a, b, t=0.3: original(a, b, t) * math.hypot(1 - t, t)


# Sections 15 and 16: DDIM, fast solvers, distillation


@mutant("E000-17b-ddim", "samplers.make_ddim_step", "test_ddim.py::test_ddim_on_strides_is_the_exact_recursion", "11")
def _(original):
    """alpha_t and alpha_bar_{t-1} in a stride: the lecture's step, which is right for s = t - 1 only."""
    from diffusion_edu.samplers import KernelStep, ddim_sigma

    def make_ddim_step(eta=0.0):
        def kernel(model, x_t, t, s):
            eps, process = model(x_t, t).eps, model.process
            sigma = ddim_sigma(process, t, s, eta)
            (_, b_t), (_, before) = process.marginal(t), process.marginal(t - 1)
            mean = (x_t - b_t * eps) / process.alpha[t].sqrt() + (before**2 - sigma**2).clamp_min(0).sqrt() * eps
            return mean, sigma if eta else None

        return KernelStep(kernel)

    return make_ddim_step


MARGINALS = "test_ddim.py::test_every_admissible_sigma_keeps_the_marginals"


@mutant("table-ddim-direction", "samplers.ddim_mean", MARGINALS, "11")
def _(original):
    """The direction back to x_t keeps its full length, sqrt(1 - alpha_bar_s), whatever sigma."""
    return lambda process, x0, eps, s, sigma: original(process, x0, eps, s, 0 * sigma)


@mutant("table-ddim-sigma", "samplers.ddim_sigma", "test_ddim.py::test_ddim_with_eta_one_is_the_ancestral_step", "11")
def _(original):
    """sigma = eta sqrt(1 - alpha_bar_s)."""
    return lambda process, t, s, eta=1.0: eta * process.marginal(s)[1]


@mutant(
    "table-ddim-last",
    "samplers.ddim_mean",
    "test_ddim.py::test_one_ddim_step_is_exact_where_the_guess_is_constant",
    "11",
)
def _(original):
    """The chain ends at alpha_bar_1, not at the data (diffusers without set_alpha_to_one)."""
    return lambda process, x0, eps, s, sigma: original(process, x0, eps, s.clamp(min=1), sigma)


@mutant(
    "table-inversion-level",
    "samplers.ddim._up",
    "test_ddim.py::test_inversion_walks_ddim_upward_and_asks_at_the_level_where_it_stands",
    "11",
)
def _(original):
    """On the way up the model is asked about (x_s, t): x_s looks less noisy than it is told (as in diffusers)."""
    from diffusion_edu.process import expand

    def _up(model, x_s, s, t, n_refine):
        (a_s, b_s), (a_t, b_t) = ([expand(c, x_s) for c in model.process.marginal(u)] for u in (s, t))
        x_t = x_s
        for _ in range(1 + n_refine):
            eps = model(x_t, t).eps
            x_t = a_t * (x_s - b_s * eps) / a_s + b_t * eps
        return x_t

    return _up


DPM = "test_solvers.py::test_dpm_solver_2_and_2s_are_the_papers_listings"
DPM_1 = "test_solvers.py::test_dpm_solver_1_is_ddim_by_another_route"


@mutant(
    "table-lambda-factor",
    "samplers.half_log_snr",
    "test_solvers.py::test_half_the_log_snr_has_the_inverse_time_of_and_is_the_log_of_signal_over_noise",
    "12",
)
def _(original):
    """lambda is the log SNR, twice what the solvers' formulas mean by it."""
    return lambda process, t: 2 * original(process, t)


@mutant("table-dpm-level", "samplers.solvers._eps_form", DPM_1, "12")
def _(original):
    """sigma_s (e^h - 1): the level the step comes from, for the one it goes to."""
    import torch

    from diffusion_edu.process import expand
    from diffusion_edu.samplers import half_log_snr

    def _eps_form(process, x_t, t, s, eps):
        (a_t, b_t), (a_s, _) = process.marginal(t), process.marginal(s)
        h = half_log_snr(process, s) - half_log_snr(process, t)
        return expand(a_s / a_t, x_t) * x_t - expand(b_t * torch.expm1(h), x_t) * eps

    return _eps_form


@mutant("table-dpm2-half", "samplers.dpm2_step", DPM, "12")
def _(original):
    """e^h - 1 for e^{h/2} - 1 in the first half of DPM-Solver-2."""
    from diffusion_edu.samplers import ddim_step, solvers

    def dpm2_step(model, x_t, t, s, noise=None):
        if solvers.at_an_end(model.process, t, s):
            return ddim_step(model, x_t, t, s, noise)
        sde, t, s = model.process.continuous(), t.double(), s.double()
        m, eps = solvers._midpoint(sde, t, s), model(x_t, t).eps
        (a_t, _), (a_m, b_m) = sde.marginal(t), sde.marginal(m)
        h = solvers.half_log_snr(sde, s) - solvers.half_log_snr(sde, t)
        u = a_m / a_t * x_t - b_m * (h.exp() - 1) * eps
        return solvers._eps_form(sde, x_t, t, s, model(u, m).eps)

    return dpm2_step


@mutant("table-dpmpp-sign", "samplers.solvers._x0_form", DPM, "12")
def _(original):
    """e^h - 1 for e^{-h} - 1 where x0 is frozen."""
    import torch

    from diffusion_edu.process import expand
    from diffusion_edu.samplers import half_log_snr

    def _x0_form(process, x_t, t, s, x0):
        (_, b_t), (a_s, b_s) = process.marginal(t), process.marginal(s)
        h = half_log_snr(process, s) - half_log_snr(process, t)
        return expand(b_s / b_t, x_t) * x_t - expand(a_s * torch.expm1(h), x_t) * x0

    return _x0_form


@mutant("table-2m-ratio", "samplers.Dpmpp2M.advance", "test_solvers.py::test_dpmpp_2m_is_the_papers_listing", "12")
def _(original):
    """r = h_i / h_{i-1}: the ratio of the steps upside down."""
    from diffusion_edu.process import expand
    from diffusion_edu.samplers import half_log_snr, solvers

    def advance(self, process, x_t, t, s):
        (lam, x0), *before = self.memory
        if before:
            h, h_before = half_log_snr(process, s) - lam, lam - before[0][0]
            x0 = x0 + expand(h_before / (2 * h), x_t) * (x0 - before[0][1])
        return solvers._x0_form(process, x_t, t, s, x0)

    return advance


HEUN = "test_solvers.py::test_heun_is_edms_listing_and_takes_two_evaluations_but_one_at_the_end"


@mutant("table-heun-half", "samplers.heun_step", HEUN, "12")
def _(original):
    """The sum of the two slopes for their mean."""

    def heun_step(model, x_t, t, s, noise=None):
        x_s, (a_t, _), (a_s, _) = (
            original(model, x_t, t, s, noise),
            model.process.marginal(t),
            model.process.marginal(s),
        )
        return x_s if s == 0 or a_t == 0 else 2 * x_s - (a_s / a_t).to(x_t) * x_t  # x_bar + 2 (the mean's step)

    return heun_step


@mutant(
    "table-churn-root",
    "samplers.compose.jump",
    "test_solvers.py::test_churn_moves_up_the_marginals_and_zero_churn_is_the_step",
    "12",
)
def _(original):
    """sigma_hat^2 - sigma^2 in front of the fresh noise: the root is forgotten."""
    return lambda process, t, s: (original(process, t, s)[0], original(process, t, s)[1] ** 2)


@mutant(
    "table-adams-weight",
    "samplers.solvers._adams_weights",
    "test_solvers.py::test_adams_of_order_k_is_exact_where_eps_is_a_polynomial_of_degree_below_k_in_lambda",
    "12",
)
def _(original):
    """The weights of the ordinary Adams rule: e^(h - u) is left out of the integral."""
    import torch

    def _adams_weights(nodes, h):
        k = torch.arange(len(nodes), device=nodes.device)
        return torch.linalg.solve(nodes ** k[:, None], h / (k + 1))

    return _adams_weights


TARGET = "test_distill.py::test_one_step_on_the_target_lands_where_the_teachers_two_steps_do"


@mutant("table-target-swap", "distill.two_step_target", TARGET, "12")
def _(original):
    """alpha and sigma change places in the target of progressive distillation."""
    from diffusion_edu.guidance import bind
    from diffusion_edu.process import expand
    from diffusion_edu.samplers import ddim_step

    def two_step_target(teacher, x_t, t, m, s, **cond):
        model, process = bind(teacher, **cond), teacher.process
        x_s = ddim_step(model, ddim_step(model, x_t, t, m, None), m, s, None)
        (a_s, b_s), (a_t, b_t) = process.marginal(s), process.marginal(t)
        ratio = a_s / a_t
        return (x_s - expand(ratio, x_t) * x_t) / expand(b_s - ratio * b_t, x_t)

    return two_step_target


@mutant("table-target-one-step", "distill.two_step_target", TARGET, "12")
def _(original):
    """The teacher takes one step only, t to m: the student learns what its teacher says, not what two steps do."""
    return lambda teacher, x_t, t, m, s, **cond: teacher(x_t, t, **cond).x0


@mutant(
    "table-truncated-min",
    "losses.truncated_snr_weight",
    "test_distill.py::test_the_two_weights_are_the_larger_of_two_losses_and_the_loss_of_v",
    "12",
)
def _(original):
    """min(SNR, 1) for max(SNR, 1): where there is no signal, nothing is learned."""
    from diffusion_edu.losses import loss_ratio

    return lambda process, t: loss_ratio(process, t, "eps").clamp(max=1)


@mutant(
    "table-student-grid",
    "distill.grid_times",
    "test_distill.py::test_training_times_are_those_of_the_grid_but_its_last_each_as_likely",
    "12",
    stops="refusal",
)
def _(original):
    """The student's training times are off by one: time 0 is drawn, and T never."""
    import torch

    def grid_times(times):
        def sample_t(process, n, generator=None):
            return times[torch.randint(1, len(times), (n,), generator=generator)]

        return sample_t

    return grid_times


@mutant(
    "table-consistency-gradient",
    "distill.consistency_loss",
    "test_distill.py::test_no_gradient_flows_through_the_later_answer_and_time_0_is_the_data",
    "12",
)
def _(original):
    """The gradient flows through the later answer, too: no stop-gradient."""
    import torch

    from diffusion_edu import distill
    from diffusion_edu.process import expand, q_sample
    from diffusion_edu.samplers import ddim_step

    def consistency_loss(teacher, times, weight=distill.truncated_snr_weight):
        def loss(model, x0, t, eps, **cond):
            x_t = q_sample(model.process, x0, t, eps)
            (s,) = distill._following(times, t, 1)
            x_s = ddim_step(distill.bind(teacher, **cond), x_t, t, s, None).detach()
            later = model(x_s, s.clamp(min=times[-2].item()), **cond).x0
            target = torch.where(expand(s, x_s) > 0, later, x_s)
            error = ((target - model(x_t, t, **cond).x0) ** 2).flatten(1).mean(1)
            return weight(model.process, t).to(error) * error

        return loss

    return consistency_loss


# Trying them


def tests_pass(ids):
    """Whether all these tests pass, in this process."""
    import pytest
    import torch

    torch.set_default_dtype(torch.float32)  # a notebook may have left another
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = pytest.main([*(str(TESTS / i) for i in ids), "-x", "-q", "-p", "no:cacheprovider", "--tb=no"])
    if code not in (0, 1):
        raise RuntimeError(f"pytest ended with {code} on {ids}")
    return code == 0


def notebook(number):
    """The path of a notebook, or None while it is not written."""
    return next(iter(sorted(NOTEBOOKS.glob(f"{number}_*.ipynb"))), None)


def first_error(path):
    """Run the code cells of a notebook in the smoke profile; the first error as (is a check cell, error), or None."""
    import matplotlib.pyplot as plt
    import torch

    torch.set_default_dtype(torch.float32)
    space = {"__name__": "__main__"}
    for i, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        if cell["cell_type"] != "code":
            continue
        code = compile("".join(cell["source"]), f"{path.name}, cell {i}", "exec")
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, space)
        except Exception as error:
            return "check" in cell["metadata"].get("tags", []), error
        finally:
            plt.close("all")
    return None


def outcome(m):
    """What the tests and the notebook said of one mutant, as two short texts."""
    path = notebook(m.notebook)
    with applied(m):
        tests = "alive" if tests_pass(m.tests) else "killed"
        found = first_error(path) if path else None
    if path is None:
        return tests, f"notebook {m.notebook} is not written yet"
    if found is None:
        return tests, "alive"
    is_check, error = found
    by_check = m.stops == "check" and is_check and isinstance(error, AssertionError)
    refused = m.stops == "refusal" and isinstance(error, ValueError)
    return tests, "killed" if by_check or refused else f"stopped by {type(error).__name__}: {error}"


def main(names):
    """Try the mutants of these names (all by default); print {name: [tests, notebook]}, first without a mutant."""
    os.environ |= {"MPLBACKEND": "Agg", "DIFFUSION_EDU_PROFILE": "smoke", "TQDM_DISABLE": "1"}
    os.chdir(NOTEBOOKS)
    import torch

    torch.set_num_threads(1)
    chosen = [MUTANTS[name] for name in names or MUTANTS]
    paths = {notebook(m.notebook) for m in chosen} - {None}
    errors = {path.name[:2]: first_error(path) for path in sorted(paths)}
    healthy = tests_pass(sorted({test for m in chosen for test in m.tests}))
    result = {"none": [healthy, {n: e and f"{type(e[1]).__name__}: {e[1]}" for n, e in errors.items()}]}
    result |= {m.name: outcome(m) for m in chosen}
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
