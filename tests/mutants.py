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
    places = [(owner, name)] if classes else _bindings(original)
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
    "04",
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
    "04",
    "refusal",
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
    "E004-06",
    "schedules.geometric_sigmas",
    "test_schedules.py::test_geometric_sigmas_have_a_constant_ratio_and_end_in_zero",
    "08",
)
def _(original):
    """Noise levels in increasing order."""
    return lambda *args, **kwargs: original(*args, **kwargs).flip(0)


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


DDIM = "test_samplers.py::test_the_ddim_noise_is_eta_times_the_posteriors_and_keeps_the_marginals"


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


# Trying them


def tests_pass(ids):
    """Whether all these tests pass, in this process."""
    import pytest

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
