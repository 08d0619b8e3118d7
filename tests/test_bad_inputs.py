"""Bad inputs, numbered as in the project's list of pitfalls: each is refused before any work is done.

The contract of every refusal: a TypeError for a wrong kind of thing, a ValueError for a wrong value, and the message
``<argument> must <rule>; got <what was given>``.
"""

import math
import re
import warnings

import numpy as np
import pytest
import torch
from exact import close, randn, times

from diffusion_edu.bits import bits_per_dim, dequantize, discretized_log_prob, grey_levels
from diffusion_edu.denoiser import Denoiser, EDMDenoiser
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
from diffusion_edu.gaussian import guided_normal
from diffusion_edu.guidance import (
    classifier,
    classifier_free,
    dynamic_threshold,
    interval,
    static_threshold,
    w_from_extra,
)
from diffusion_edu.likelihood import ode_log_prob, probes
from diffusion_edu.losses import denoising_loss, elbo_weight, loss_ratio, min_snr_weight
from diffusion_edu.metrics import frechet_distance
from diffusion_edu.nets.autoencoder import GaussianMLP
from diffusion_edu.nets.mlp import MLP
from diffusion_edu.nets.unet import UNet
from diffusion_edu.oracles import DatasetOracle, GaussianMixtureOracle, GaussianOracle
from diffusion_edu.process import (
    VE,
    VESDE,
    VPSDE,
    DiscreteVP,
    forward_step,
    jump,
    posterior,
    q_sample,
    uniform_log_snr,
)
from diffusion_edu.samplers import (
    brownian_path,
    churn,
    ddim_step,
    euler_maruyama_path,
    euler_maruyama_step,
    finite,
    flow,
    guided_mean,
    heun_step,
    keep_known,
    langevin,
    make_corrector_step,
    make_ddim_step,
    make_ddpm_step,
    make_langevin_step,
    noises,
    noises_per_sample,
    reverse_sde,
    sample,
)
from diffusion_edu.samplers import learned as learned_variance
from diffusion_edu.schedules import (
    beta_from_alpha_bar,
    beta_from_log_snr,
    cosine_beta,
    cosine_log_snr,
    geometric_sigmas,
    karras_sigmas,
    linear_beta,
    quadratic_beta,
    respace,
    sigmoid_beta,
    swiss_beta,
    zero_terminal_snr,
)
from diffusion_edu.score_matching import (
    denoising_score_matching,
    divergence,
    explicit_score_matching,
    hutchinson,
    sliced_score_matching,
)
from diffusion_edu.training import Recipe, averaged, dequantized, fit, fit_vae, level_times
from diffusion_edu.vae import (
    HVAE,
    VAE,
    LinearVAE,
    diffusion_as_hvae,
    expectation_normal,
    gaussian_kl,
    importance_bound,
    kl_std_normal,
    make_hvae,
    pathwise_gradient,
    reparameterize,
    score_function_gradient,
    vae_elbo,
)

TABLE = DiscreteVP(linear_beta(1000))
ORACLE = GaussianOracle(TABLE, 0.4, 0.25)
TWO = GaussianMixtureOracle(TABLE, [[-1.0, 0.0], [1.0, 0.0]], [0.3, 0.3])
IMAGES, POINTS = randn(2, 3, 8, 8), randn(2, 2)
SMOOTH = GaussianOracle(VPSDE(), 0.4, 0.25)  # in continuous time
BELL, FLAT = torch.neg, lambda x: x[:, :1]  # the score of N(0, 1), and one that forgets a dimension
RISING = torch.tensor([0.0, 0.5, 1.0])
NAN = float("nan")


def refuse(number, name, call, argument, got, kind=ValueError):
    """One case: ``call()`` must raise ``kind`` with ``argument must ...; got ...got...``."""
    return pytest.param(call, argument, got, kind, id=f"{number}-{name}")


def noise_at(t, x0=IMAGES, eps=IMAGES):
    return lambda: q_sample(TABLE, x0, t, eps)


def run(step=ddim_step, model=ORACLE, grid=(5, 3, 0), x=POINTS, noise=None):
    grid = torch.tensor(grid) if isinstance(grid, tuple) else grid
    return lambda: list(sample(step, model, x, grid, noise))


def channels(n):
    """A network whose output has n channels."""
    return lambda x, clock, **cond: x[:, :1].expand(len(x), n, *x.shape[2:])


Y = times(0, 1)


def guided(w, n_classes=3, **conditions):
    """One call of a guided network of three classes, or of none."""
    return lambda: classifier_free(net_of(n_classes), w, **conditions)(POINTS.float(), times(5))


def net_of(n_classes):
    return Denoiser(MLP(width=8, depth=1, n_classes=n_classes), TABLE)


def fit_points(n_classes, recipe, **cond):
    return fit(net_of(n_classes), POINTS.float(), recipe, **cond)


def tempered(w, y=Y):
    return TWO.tempered_log_density(POINTS, times(5), y, w)


SHAPES = [
    refuse(1, "t-of-3-for-2", noise_at(times(1, 2, 3)), "t", "(3,)"),
    refuse(1, "posterior", lambda: posterior(TABLE, IMAGES, IMAGES, times(2, 3, 4), times(1, 2, 3)), "t", "(3,)"),
    refuse(1, "model", lambda: ORACLE(IMAGES, times(1, 2, 3)), "t", "(3,)"),
    refuse(1, "network", lambda: Denoiser(channels(3), TABLE)(IMAGES, times(1, 2, 3)), "t", "(3,)"),
    refuse(1, "loss", lambda: denoising_loss(ORACLE, IMAGES, times(1, 2, 3), IMAGES), "t", "(3,)"),
    refuse(2, "t-of-B-1", noise_at(torch.tensor([[1], [2]])), "t", "(2, 1)"),
    refuse(2, "posterior", lambda: posterior(TABLE, POINTS, POINTS, times(2), torch.tensor([[1], [1]])), "s", "(2, 1)"),
    refuse(3, "t-of-1-for-2", noise_at(torch.tensor([5])), "t", "(1,)"),
    refuse(3, "forward-step", lambda: forward_step(TABLE, POINTS, torch.tensor([5]), POINTS), "t", "(1,)"),
    refuse(3, "python-list", noise_at([1, 2]), "t", "list", TypeError),
    refuse(4, "shared-noise", noise_at(times(5), eps=IMAGES[:1]), "eps", "(1, 3, 8, 8)"),
    refuse(4, "shared-step-noise", run(make_ddpm_step(), noise=lambda x: x[:1]), "noise(x)", "(1, 2)"),
    refuse(4, "langevin", run(make_langevin_step(), noise=lambda x: x[:1]), "noise(x)", "(1, 2)"),
    refuse(4, "corrector", run(make_corrector_step(), noise=lambda x: x[:1]), "noise(x)", "(1, 2)"),
    refuse(4, "walk", lambda: next(langevin(BELL, POINTS, [0.1], lambda x: x[:1])), "noise(x)", "(1, 2)"),
    refuse(4, "brownian", lambda: brownian_path(RISING, POINTS, lambda x: x[:1]), "noise(x)", "(1, 2)"),
    refuse(4, "forward", lambda: euler_maruyama_path(VPSDE(), POINTS, RISING, FLAT), "noise(x)", "(2, 1)"),
    refuse(4, "matching", lambda: denoising_score_matching(BELL, POINTS, 0.5, POINTS[:1]), "eps", "(1, 2)"),
    *(
        refuse(5, f"score-of-{name}", call, "score(x)", "(2, 1)")
        for name, call in (
            ("the-walk", lambda: next(langevin(FLAT, POINTS, [0.1], noises(0)))),
            ("esm", lambda: explicit_score_matching(FLAT, POINTS, BELL)),
            ("esm-truth", lambda: explicit_score_matching(BELL, POINTS, FLAT)),
            ("dsm", lambda: denoising_score_matching(FLAT, POINTS, 0.5, POINTS)),
        )
    ),
    refuse(5, "field", lambda: divergence(FLAT, POINTS), "f(x)", "(2, 1)"),
    refuse(5, "probes", lambda: hutchinson(BELL, POINTS, POINTS), "v", "(2, 2)"),
    refuse(5, "no-probes", lambda: sliced_score_matching(BELL, POINTS, POINTS[:0, None]), "v", "(0, 1, 2)"),
    refuse(5, "probes-of-the-flow", lambda: ode_log_prob(SMOOTH, POINTS, v=IMAGES), "v", "(2, 3, 8, 8)"),
    refuse(
        4,
        "churn",
        run(churn(ddim_step, 0.1), GaussianOracle(VE()), torch.tensor([5.0, 1.0, 0.0]), noise=lambda x: x[:1]),
        "noise(x)",
        "(1, 2)",
    ),
    refuse(4, "forward-step", lambda: forward_step(TABLE, POINTS, times(5), POINTS[:1]), "eps", "(1, 2)"),
    refuse(4, "posterior", lambda: posterior(TABLE, POINTS[:1], POINTS, times(5), times(4)), "x0", "(1, 2)"),
    refuse(5, "one-channel-noise", noise_at(times(5), eps=IMAGES[:, :1]), "eps", "(2, 1, 8, 8)"),
    refuse(5, "loss", lambda: denoising_loss(ORACLE, IMAGES, times(1, 2), IMAGES[:, :1]), "eps", "(2, 1, 8, 8)"),
    refuse(6, "6-channels", lambda: Denoiser(channels(6), TABLE)(IMAGES, times(5)), "model output", "(2, 6, 8, 8)"),
    refuse(6, "edm", lambda: EDMDenoiser(channels(2), TABLE)(IMAGES, times(5)), "model output", "(2, 2, 8, 8)"),
    refuse(
        7,
        "3-for-learned",
        lambda: Denoiser(channels(3), TABLE, learned_variance=True)(IMAGES, times(5)),
        "model output",
        "(2, 3, 8, 8)",
    ),
    refuse(7, "no-variance", run(make_ddpm_step(learned_variance), noise=noises(0)), "model", "one that does not"),
    refuse(8, "9x9", lambda: UNet(3, width=8)(randn(2, 3, 9, 9).float(), torch.ones(2)), "image size", "(9, 9)"),
    refuse(9, "channels", lambda: UNet(1, width=8)(IMAGES.float(), torch.ones(2)), "x", "(2, 3, 8, 8)"),
    refuse(9, "points", lambda: MLP(dim=3)(POINTS.float(), torch.ones(2)), "x", "(2, 2)"),
    refuse(11, "loss", lambda: denoising_loss(ORACLE, IMAGES[:0], times(5), IMAGES[:0]), "x0", "an empty batch"),
    refuse(11, "data", lambda: DatasetOracle(TABLE, IMAGES[:0]), "data", "0"),
    refuse(11, "likelihood", lambda: ode_log_prob(SMOOTH, POINTS[:0]), "x0", "none"),
    refuse(12, "prior", lambda: TABLE.prior((-1, 2), noises(0)), "shape", "-1"),
    refuse(12, "data", lambda: TWO.sample(-3), "n", "-3"),
    refuse(14, "B-1", lambda: TWO(POINTS, times(5), y=torch.tensor([[0], [1]])), "y", "(2, 1)"),
    refuse(14, "one-hot", lambda: TWO(POINTS, times(5), y=torch.eye(2).long()), "y", "(2, 2)"),
    refuse(14, "length", lambda: TWO(POINTS, times(5), y=torch.tensor([0, 1, 1])), "y", "(3,)"),
    refuse(14, "floats", lambda: TWO(POINTS, times(5), y=torch.tensor([0.0, 1.0])), "y", "torch.float32", TypeError),
    refuse(
        14, "network", lambda: MLP(n_classes=3)(POINTS.float(), torch.ones(2), y=torch.eye(2).long()), "y", "(2, 2)"
    ),
]

KINDS = [
    refuse(15, "float-t", noise_at(torch.tensor([1.0, 2.0])), "t", "torch.float32", TypeError),
    refuse(15, "loss", lambda: denoising_loss(ORACLE, POINTS, POINTS[:, 0], POINTS), "t", "torch.float64", TypeError),
    refuse(15, "loss-int", lambda: denoising_loss(ORACLE, POINTS, 5, POINTS), "t", "int", TypeError),
    refuse(15, "int-on-sde", lambda: VPSDE().marginal(times(1)), "t", "torch.int64", TypeError),
    refuse(15, "grid", run(grid=torch.tensor([5.0, 0.0])), "times", "torch.float32", TypeError),
    refuse(16, "bool-t", noise_at(torch.tensor([True, False])), "t", "torch.bool", TypeError),
    refuse(16, "complex-t", noise_at(torch.tensor([1j, 2j])), "t", "torch.complex64", TypeError),
    refuse(16, "uint8-t", noise_at(torch.tensor([1, 2], dtype=torch.uint8)), "t", "torch.uint8", TypeError),
    refuse(17, "bytes", noise_at(times(5), x0=torch.zeros(2, 3, 8, 8).byte()), "x0", "torch.uint8", TypeError),
    refuse(17, "numpy", noise_at(times(5), x0=np.zeros((2, 3, 8, 8))), "x0", "ndarray", TypeError),
    refuse(
        17, "posterior", lambda: posterior(TABLE, POINTS, POINTS.long(), times(5), times(4)), "x_t", "int64", TypeError
    ),
    refuse(17, "forward-step", lambda: forward_step(TABLE, POINTS.long(), times(5), POINTS), "x_s", "int64", TypeError),
    refuse(17, "oracle", lambda: ORACLE(POINTS.long(), times(5)), "x_t", "torch.int64", TypeError),
    refuse(17, "x_T", run(x=POINTS.long()), "x_T", "torch.int64", TypeError),
    refuse(17, "likelihood", lambda: ode_log_prob(SMOOTH, POINTS.long()), "x0", "torch.int64", TypeError),
    refuse(17, "flow", lambda: flow(SMOOTH, POINTS.long(), 1.0, 0.5), "x", "torch.int64", TypeError),
    refuse(17, "walk", lambda: next(langevin(BELL, [0.0], [0.1], noises(0))), "x", "list", TypeError),
    refuse(17, "field", lambda: divergence(BELL, POINTS.long()), "x", "torch.int64", TypeError),
    refuse(17, "matching", lambda: denoising_score_matching(BELL, POINTS.long(), 1, POINTS), "x", "int64", TypeError),
    refuse(17, "forward", lambda: euler_maruyama_path(VPSDE(), 0.3, RISING, noises(0)), "x0", "float", TypeError),
    refuse(17, "probes", lambda: hutchinson(BELL, POINTS, POINTS[None].sign().long()), "v", "torch.int64", TypeError),
    refuse(
        19,
        "float64-sample",
        lambda: Denoiser(MLP(), TABLE)(POINTS, times(5)),
        "x_t",
        "torch.float64",
        TypeError,
    ),
    refuse(21, "bfloat16-t", noise_at(torch.tensor([999.0, 998.0]).bfloat16()), "t", "torch.bfloat16", TypeError),
]

PARAMETERS = [
    *(refuse(33, f.__name__, lambda f=f: f(0), "T", "0") for f in (linear_beta, quadratic_beta, sigmoid_beta)),
    *(refuse(33, f.__name__, lambda f=f: f(0), "T", "0") for f in (cosine_beta, swiss_beta)),
    refuse(34, "T=-5", lambda: linear_beta(-5), "T", "-5"),
    refuse(36, "T=10.5", lambda: linear_beta(10.5), "T", "10.5", TypeError),
    refuse(36, "T='1000'", lambda: cosine_beta("1000"), "T", "'1000'", TypeError),
    refuse(36, "T=True", lambda: swiss_beta(True), "T", "True", TypeError),
    refuse(38, "T=10^12", lambda: linear_beta(10**12), "T", "1000000000000"),
    refuse(38, "cosine", lambda: cosine_beta(10**12), "T", "1000000000000"),
    refuse(39, "beta_end=2", lambda: linear_beta(10, beta_end=2.0), "beta_start, beta_end", "2.0"),
    refuse(39, "a-table", lambda: DiscreteVP(torch.tensor([0, 0.1, 2.0])), "beta", "beta[2] = 2"),
    refuse(39, "nan", lambda: DiscreteVP(torch.tensor([0, NAN, 0.1])), "beta", "beta[1] = nan"),
    refuse(39, "one-in-the-middle", lambda: DiscreteVP(torch.tensor([0, 1.0, 0.1])), "beta", "beta[1] = 1"),
    refuse(39, "no-zero", lambda: DiscreteVP(torch.tensor([0.1, 0.2])), "beta[0]", "0.1"),
    refuse(39, "matrix", lambda: DiscreteVP(torch.zeros(2, 2)), "beta", "(2, 2)"),
    refuse(39, "list", lambda: DiscreteVP([0, 0.1]), "beta", "list", TypeError),
    refuse(39, "max_beta", lambda: cosine_beta(10, max_beta=1.5), "max_beta", "1.5"),
    refuse(39, "alpha_bar", lambda: beta_from_alpha_bar(torch.tensor([1.0, 0.5, 0.6])), "alpha_bar", "0.6"),
    refuse(39, "alpha_bar-0", lambda: beta_from_alpha_bar(torch.tensor([0.9, 0.5])), "alpha_bar", "(2,)"),
    *(
        refuse(39, f"log-snr-{name}", lambda v=values: beta_from_log_snr(torch.tensor(v)), "log_snr", got)
        for name, values, got in (
            ("rising", [1.0, 2.0], "[1.0, 2.0]"),
            ("nan", [2.0, NAN], "nan"),
            ("inf", [math.inf, 0.0], "inf"),
            ("none", [], "(0,)"),
            ("matrix", [[1.0], [0.0]], "(2, 1)"),
        )
    ),
    refuse(39, "log-snr-int", lambda: beta_from_log_snr(torch.tensor([1, 0])), "log_snr", "torch.int64", TypeError),
    refuse(39, "zero-snr-T=1", lambda: zero_terminal_snr(torch.tensor([0, 0.5])), "beta", "T = 1"),
    refuse(39, "zero-snr-list", lambda: zero_terminal_snr([0, 0.1, 0.2]), "beta", "list", TypeError),
    refuse(39, "sde", lambda: VPSDE(beta_min=-0.1), "beta_min", "-0.1"),
    refuse(40, "beta_start<0", lambda: quadratic_beta(10, beta_start=-0.1), "beta_start, beta_end", "-0.1"),
    refuse(40, "nan", lambda: sigmoid_beta(10, beta_start=NAN), "beta_start", "nan"),
    refuse(40, "text", lambda: linear_beta(10, beta_start="1e-4"), "beta_start", "'1e-4'", TypeError),
    refuse(41, "reversed", lambda: linear_beta(10, 0.02, 1e-4), "beta_start, beta_end", "(0.02, 0.0001)"),
    refuse(41, "sde", lambda: VPSDE(20.0, 0.1), "beta_max", "0.1"),
    refuse(45, "predicts", lambda: Denoiser(MLP(), TABLE, predicts="epsilon"), "predicts", "'epsilon'"),
    refuse(45, "target", lambda: denoising_loss(ORACLE, POINTS, times(1, 2), POINTS, "noise"), "target", "'noise'"),
    refuse(45, "ratio", lambda: loss_ratio(TABLE, times(5), "velocity"), "target", "'velocity'"),
    refuse(45, "min-snr", lambda: min_snr_weight("noise"), "target", "'noise'"),
    refuse(45, "elbo", lambda: elbo_weight("noise"), "target", "'noise'"),
    refuse(45, "elbo-variance", lambda: elbo_weight(variance="learned"), "variance", "'learned'"),
    refuse(46, "variance", lambda: make_ddpm_step("fixed_large"), "variance", "'fixed_large'", TypeError),
    refuse(46, "spacing", lambda: TABLE.grid(10, "quadratic"), "spacing", "'quadratic'", TypeError),
    refuse(46, "step", run("ddim"), "step", "'ddim'", TypeError),
    refuse(46, "noise", run(noise=7), "noise", "7", TypeError),
    refuse(46, "no-noise", run(make_ddpm_step()), "noise", "None"),
    refuse(46, "reverse-of-a-table", lambda: reverse_sde(TABLE, ORACLE), "sde", "DiscreteVP", TypeError),
    refuse(46, "forward-of-a-table", lambda: euler_maruyama_path(TABLE, POINTS, RISING, BELL), "sde", "D", TypeError),
    refuse(46, "score", lambda: next(langevin(POINTS, POINTS, [0.1], BELL)), "score", "(2, 2)", TypeError),
    refuse(46, "matching", lambda: divergence(0.5, POINTS), "score", "0.5", TypeError),
    refuse(46, "walk-noise", lambda: next(langevin(BELL, POINTS, [0.1], 0)), "noise", "0", TypeError),
    refuse(46, "one-step-size", lambda: next(langevin(BELL, POINTS, 0.1, BELL)), "step_sizes", "0.1", TypeError),
    refuse(46, "brownian", lambda: brownian_path(RISING, POINTS, None), "noise", "None", TypeError),
    refuse(46, "end", lambda: ode_log_prob(SMOOTH, POINTS, end_log_prob=0.0), "end_log_prob", "0.0", TypeError),
    refuse(46, "levels", lambda: level_times(3)(VPSDE(), 5), "process", "VPSDE", TypeError),
    refuse(46, "guided", lambda: guided_mean(lambda *a: 0, print, 1.0), "step", "function", TypeError),
    refuse(47, "t=T+1", noise_at(times(1001)), "t", "1001"),
    refuse(47, "sde", lambda: VPSDE().marginal(torch.tensor(1.5)), "t", "1.5"),
    refuse(47, "cosine", lambda: cosine_log_snr(torch.tensor([0.5, 1.5])), "t", "1.5 at index 1"),
    refuse(47, "elbo-weight-0", lambda: elbo_weight()(TABLE, times(0)), "t", "0"),
    refuse(47, "jump", lambda: jump(TABLE, times(1001), times(3)), "t", "1001"),
    refuse(47, "s", lambda: posterior(TABLE, POINTS, POINTS, times(5), times(-2)), "s", "-2"),
    refuse(48, "t=-1", noise_at(times(-1)), "t", "-1"),
    refuse(48, "forward-step-0", lambda: forward_step(TABLE, POINTS, times(0), POINTS), "t", "0"),
    refuse(48, "loss-0", lambda: denoising_loss(ORACLE, POINTS, times(0, 5), POINTS), "t", "0"),
    refuse(48, "ve", lambda: VE().marginal(torch.tensor(-0.5)), "t", "-0.5"),
    refuse(48, "nan", lambda: VESDE().marginal(torch.tensor(NAN)), "t", "nan"),
    refuse(49, "one-bad", noise_at(times(5, 2000)), "t", "2000 at index 1"),
    refuse(49, "sde", lambda: VPSDE().marginal(torch.tensor([0.5, 0.1, -0.2, 7.0])), "t", "-0.2 at index 2"),
    refuse(50, "0-steps", lambda: TABLE.grid(0), "n_steps", "0"),
    refuse(50, "-3-steps", lambda: VPSDE().grid(-3), "n_steps", "-3"),
    refuse(50, "2.5-steps", lambda: VPSDE().grid(2.5), "n_steps", "2.5", TypeError),
    refuse(50, "karras", lambda: karras_sigmas(0), "n", "0"),
    refuse(50, "geometric", lambda: geometric_sigmas(-3), "n", "-3"),
    refuse(50, "langevin", lambda: make_langevin_step(n_steps=0), "n_steps", "0"),
    refuse(50, "corrector", lambda: make_corrector_step(n_steps=0), "n_steps", "0"),
    refuse(50, "levels", lambda: level_times(0), "n", "0"),
    refuse(50, "grey-levels", lambda: dequantized(1), "levels", "1"),
    refuse(50, "probes", lambda: probes(POINTS, 0, None), "n", "0"),
    refuse(51, "T+1-steps", lambda: TABLE.grid(1001), "n_steps", "1001"),
    *(refuse(53, f"eta={eta}", lambda eta=eta: make_ddim_step(eta), "eta", str(eta)) for eta in (-1, 5, 1.5, NAN)),
    refuse(54, "unsorted", run(grid=(3, 5, 0)), "times", "[3, 5, 0]"),
    refuse(54, "repeated", run(grid=(5, 5, 0)), "times", "[5, 5, 0]"),
    refuse(54, "out-of-range", run(grid=(1001, 0)), "times", "1001"),
    refuse(54, "single", run(grid=(5,)), "times", "5"),
    refuse(54, "empty", run(grid=torch.tensor([], dtype=torch.int64)), "times", "[]"),
    refuse(54, "list", lambda: list(sample(ddim_step, ORACLE, POINTS, [5, 0])), "times", "list", TypeError),
    refuse(54, "brownian", lambda: brownian_path(RISING.flip(0), POINTS, BELL), "times", "[1.0, 0.5, 0.0]"),
    refuse(54, "forward", lambda: euler_maruyama_path(VPSDE(), POINTS, RISING[:1], BELL), "times", "[0.0]"),
    refuse(54, "forward-beyond", lambda: euler_maruyama_path(VPSDE(), POINTS, 2 * RISING, BELL), "times", "2 at index"),
    refuse(54, "respace", lambda: respace(linear_beta(1000), times(5, 3)), "times", "[5, 3]"),
    refuse(54, "respace-0", lambda: respace(linear_beta(1000), times(0, 3)), "times", "0 at index 0"),
    *(
        refuse(
            55,
            f"{predicts}-without-signal",
            lambda p=predicts: Denoiser(MLP(), DiscreteVP(cosine_beta(10, max_beta=1.0)), predicts=p),
            "predicts",
            predicts,
        )
        for predicts in ("eps", "score")
    ),
    refuse(
        55,
        "edm-without-signal",
        lambda: EDMDenoiser(MLP(), DiscreteVP(cosine_beta(10, max_beta=1.0))),
        "process",
        "alpha_bar[T] = 0",
    ),
    refuse(56, "limit", lambda: static_threshold(ORACLE, 0.5), "limit", "0.5"),
    refuse(56, "percentile", lambda: dynamic_threshold(ORACLE, 99.5), "percentile", "99.5"),
    refuse(56, "percentile-0", lambda: dynamic_threshold(ORACLE, 0.0), "percentile", "0"),
    refuse(57, "equal", lambda: karras_sigmas(5, 1.0, 1.0), "sigma_max", "1.0"),
    refuse(57, "reversed", lambda: geometric_sigmas(5, 1.0, 0.1), "sigma_max", "0.1"),
    refuse(57, "rho", lambda: karras_sigmas(5, rho=0.0), "rho", "0"),
    refuse(57, "sigma_min", lambda: karras_sigmas(5, sigma_min=0), "sigma_min", "0"),
    refuse(57, "vesde", lambda: VESDE(0.0, 1.0), "sigma_min", "0"),
    refuse(57, "ve", lambda: VE(-1.0), "T", "-1"),
    refuse(57, "cut", lambda: cosine_log_snr(torch.tensor(0.5), 5.0, 5.0), "low, high", "(5.0, 5.0)"),
    refuse(57, "cut-nan", lambda: cosine_log_snr(torch.tensor(0.5), NAN, 5.0), "low, high", "(nan, 5.0)"),
    *(refuse(57, f"min-snr-{g}", lambda g=g: min_snr_weight(gamma=g), "gamma", str(g)) for g in (0, -1.0, NAN)),
    refuse(57, "gamma", lambda: churn(ddim_step, -0.1), "gamma", "-0.1"),
    refuse(57, "r", lambda: make_langevin_step(r=0), "r", "0"),
    refuse(57, "snr", lambda: make_corrector_step(-0.16), "snr", "-0.16"),
    *(
        refuse(57, f"step-{e}", lambda e=e: next(langevin(BELL, POINTS, [e], BELL)), "step_sizes", str(e))
        for e in (0.0, -0.1, NAN)
    ),
    refuse(57, "sde-eta", lambda: reverse_sde(VPSDE(), SMOOTH, -1.0), "eta", "-1"),
    *(refuse(57, f"flow-to-{s}", lambda s=s: flow(SMOOTH, POINTS, 1.0, s), "s", str(s)) for s in (0, 1.5, NAN)),
    refuse(57, "flow-from-a-tensor", lambda: flow(SMOOTH, POINTS, RISING[2], 0.5), "t", "a tensor", TypeError),
    refuse(57, "rtol", lambda: flow(SMOOTH, POINTS, 1.0, 0.5, rtol=0), "rtol", "0"),
    refuse(57, "t_min", lambda: ode_log_prob(SMOOTH, POINTS, t_min=0), "t_min", "0"),
    refuse(57, "matching", lambda: denoising_score_matching(BELL, POINTS, 0.0, POINTS), "sigma", "0.0"),
    refuse(57, "level-ends", lambda: level_times(5, 1.0, 0.1), "sigma_max", "0.1"),
    refuse(57, "sigma_data", lambda: EDMDenoiser(MLP(), TABLE, sigma_data=0), "sigma_data", "0"),
    refuse(57, "stds", lambda: GaussianMixtureOracle(TABLE, [[0.0]], [0.0]), "stds, weights", "0.0"),
    refuse(57, "means", lambda: GaussianMixtureOracle(TABLE, [0.0], [1.0]), "means, stds, weights", "(1,)"),
    refuse(57, "var", lambda: GaussianOracle(TABLE, 0.0, -1.0), "var", "-1.0"),
    refuse(58, "s>t", lambda: jump(TABLE, times(5), times(5)), "s", "s = 5, t = 5"),
    refuse(
        58, "wrong-way", lambda: make_ddpm_step()(ORACLE, POINTS, times(3), times(5), noises(0)), "s", "s = 5, t = 3"
    ),
    refuse(58, "too-many-rows", lambda: noises_per_sample(0, [1, 2])(randn(3, 2)), "x", "3 rows"),
    refuse(58, "seed", lambda: noises("0"), "seed", "'0'", TypeError),
    refuse(58, "negative-index", lambda: noises_per_sample(0, [-1]), "indices", "-1"),
    *(refuse(59, f"cfg-{w}", lambda w=w: classifier_free(TWO, w, y=times(0, 1)), "w", str(w)) for w in (NAN, -1.0)),
    *(refuse(59, f"cg-{w}", lambda w=w: classifier(TWO, print, w), "w", str(w)) for w in (NAN, -1.0)),
    refuse(59, "mean", lambda: guided_mean(make_ddpm_step(), print, -1.0), "w", "-1"),
    refuse(59, "text", lambda: classifier_free(TWO, "3", y=times(0, 1)), "w", "'3'", TypeError),
    refuse(59, "a-scale-each", lambda: classifier_free(TWO, POINTS[0], y=times(0, 1)), "w", "a tensor", TypeError),
    *(refuse(59, f"extra-{e}", lambda e=e: w_from_extra(e), "extra", str(e)) for e in (NAN, -1.5)),
    *(refuse(59, f"density-{w}", lambda w=w: tempered(w), "w", str(w)) for w in (NAN, -1.0)),
    refuse(59, "product", lambda: guided_normal(0.0, 1.0, -2.0), "w", "-2.0"),
    *(
        refuse(59, f"interval-{name}", lambda ends=ends: interval(TWO, TWO, *ends), "sigma_min, sigma_max", got)
        for name, ends, got in (
            ("reversed", (2.0, 1.0), "(2.0, 1.0)"),
            ("empty", (1.0, 1.0), "(1.0, 1.0)"),
            ("negative", (-1.0, 1.0), "(-1.0, 1.0)"),
            ("nan", (0.0, NAN), "(0.0, nan)"),
        )
    ),
    refuse(59, "interval-t", lambda: interval(TWO, TWO, 0.1, 1.0)(POINTS, times(5, 6)), "t", "(2,)"),
    refuse(59, "no-classifier", lambda: classifier(TWO, None, 1.0), "log_prob", "None", TypeError),
    refuse(59, "logits", lambda: classifier(TWO, POINTS, 1.0), "log_prob", "a tensor of shape (2, 2)", TypeError),
    refuse(59, "mean-classifier", lambda: guided_mean(make_ddpm_step(), 1.0, 1.0), "log_prob", "1.0", TypeError),
    *(
        refuse(59, f"{name}-of-all-classes", call, "log_prob(x, t)", "(2, 2)")  # a sum over classes would be wrong
        for name, call in (
            ("eps", lambda: classifier(TWO, TWO.class_log_prob, 1.0)(POINTS, times(5))),
            ("mean", run(guided_mean(make_ddpm_step(), TWO.class_log_prob, 1.0), TWO, noise=noises(0))),
        )
    ),
    refuse(61, "null-label", lambda: MLP(n_classes=3)(POINTS.float(), torch.ones(2), y=times(0, 3)), "y", "0..3"),
    refuse(61, "oracle", lambda: TWO(POINTS, times(5), y=times(0, 2)), "y", "0..2"),
    refuse(61, "density", lambda: tempered(1.0, times(0, 2)), "y", "0..2"),
    *(refuse(61, f"guided-{w}", guided(w, y=times(0, 3)), "y", "0..3") for w in (0, 1, 3)),
    refuse(61, "unwanted", guided(3, y=times(0, 1), negative={"y": times(0, 3)}), "y", "0..3"),
    refuse(62, "negative", lambda: MLP(n_classes=3)(POINTS.float(), torch.ones(2), y=times(0, -1)), "y", "-1..0"),
    *(refuse(62, f"guided-{w}", guided(w, y=times(0, -1)), "y", "-1..0") for w in (0, 1, 3)),
    refuse(63, "missing", lambda: MLP(n_classes=3)(POINTS.float(), torch.ones(2)), "y", "None"),
    refuse(63, "unasked", lambda: MLP()(POINTS.float(), torch.ones(2), y=times(0, 1)), "y", "labels"),
    refuse(63, "nothing-bound", lambda: classifier_free(TWO, 2.0), "conditions", "none"),
    *(refuse(63, f"guided-unasked-{w}", guided(w, None, y=times(0, 1)), "y", "labels") for w in (0, 1, 3)),
    *(
        refuse(63, f"guided-{name}", lambda y=y: classifier_free(TWO, 2.0, y=y), "y", got, TypeError)
        for name, y, got in (("list", [0, 1], "[0, 1]"), ("number", 1, "1"), ("one", times(1), "a tensor of shape ()"))
    ),
    refuse(63, "negative-list", lambda: classifier_free(TWO, 2.0, {"y": [0]}, y=times(1, 1)), "y", "[0]", TypeError),
    refuse(63, "negative-name", lambda: classifier_free(TWO, 2.0, {"x": 0}, y=times(1, 1)), "key in negative", "'x'"),
    refuse(63, "floats", guided(3, y=torch.ones(2)), "y", "torch.float32", TypeError),
    refuse(63, "too-few", guided(3, y=times(0, 1), negative={"y": torch.tensor([1])}), "y", "1"),
    refuse(63, "nested", lambda: classifier_free(classifier_free(TWO, 2, y=Y), 2, y=Y)(POINTS, times(5)), "drop", "a"),
    *(refuse(65, f"p_drop={p}", lambda p=p: Recipe(1, p_drop=p), "p_drop", str(p)) for p in (-0.1, 1.5, NAN)),
    refuse(65, "text", lambda: Recipe(1, p_drop="0.1"), "p_drop", "'0.1'", TypeError),
    refuse(65, "nothing-to-drop", lambda: next(fit_points(None, Recipe(1, 2, p_drop=0.5))), "y", "labels"),
    refuse(70, "nan", lambda: frechet_distance(randn(9, 2), randn(9, 2) / 0), "features_y", "NaN"),
    refuse(70, "one", lambda: frechet_distance(randn(1, 2), randn(9, 2)), "features_x", "(1, 2)"),
]


def half(x):
    """An encoder or decoder: N(x / 2, 1)."""
    return x / 2, torch.ones_like(x)


TINY, LINEAR = VAE(half, half), LinearVAE(randn(3, 2), randn(3), 1.0)
STEP = make_ddpm_step()
GREY = grey_levels(17)[:4].reshape(2, 2)
FRAC = Denoiser(channels(4), TABLE, learned_variance=True)


def elbo_of(model=TINY, noise=None, bound=vae_elbo, **options):
    noise = noises(0) if noise is None else noise
    return lambda: bound(model, POINTS, noise, **options)


def term(step=STEP, x0=POINTS, t=5, s=4, eps=POINTS, **options):
    t, s = (v if isinstance(v, torch.Tensor) else torch.tensor(v) for v in (t, s))
    return lambda: bound_term(step, ORACLE, x0, t, s, eps, **options)


def terms(grid, bound=None):
    grid = torch.tensor(grid) if isinstance(grid, tuple) else grid
    return (lambda: bound(grid)) if bound else lambda: list(bound_terms(STEP, ORACLE, POINTS, grid, noises(0)))


def in_bins(x=GREY, mean=0.0, sigma=1.0, levels=17):
    return lambda: discretized_log_prob(x, mean, sigma, levels)


LATENTS = [
    refuse(1, "mean", lambda: reparameterize(randn(3, 2), 1.0, POINTS), "mean", "(3, 2)"),
    refuse(4, "shared-eps", lambda: reparameterize(POINTS, POINTS, POINTS[:1]), "mean", "(2, 2)"),
    refuse(4, "sigma", lambda: reparameterize(0.0, randn(2, 2, 2), POINTS), "sigma", "(2, 2, 2)"),
    refuse(4, "encoder", elbo_of(noise=lambda z: z[:1]), "noise(x)", "(1, 2)"),
    refuse(4, "hvae", lambda: TINY.elbo(POINTS, lambda z: z[:, :1]), "noise(x)", "(2, 1)"),
    refuse(4, "kl", lambda: kl_std_normal(POINTS, POINTS[:1].exp()), "sigma", "(1, 2)"),
    refuse(4, "quadrature", lambda: expectation_normal(torch.cos, POINTS, POINTS[0]), "sigma", "(2,)"),
    refuse(5, "decoder", elbo_of(VAE(half, lambda z: half(randn(2, 3)))), "mean", "(2, 3)"),
    *(
        refuse(5, f"f-{g.__name__}", lambda g=g: g(torch.square, POINTS[0], POINTS[1].exp(), POINTS), "f(z)", "(2, 2)")
        for g in (pathwise_gradient, score_function_gradient)
    ),
    refuse(5, "W", lambda: LinearVAE(randn(3, 2), randn(2), 1.0), "W, b", "(3, 2), (2,)"),
    refuse(5, "one-mean", lambda: gaussian_kl(randn(2), torch.eye(2)), "mean1", "(2,)"),
    refuse(5, "latents", lambda: TINY.log_joint(POINTS, [POINTS, POINTS]), "zs", "2"),
    *(
        refuse(9, f"linear-{name}", lambda name=name: getattr(LINEAR, name)(randn(4, 2)), "x", "(4, 2)")
        for name in ("posterior", "log_prob")
    ),
    refuse(9, "linear-elbo", lambda: LINEAR.elbo(randn(4, 2), randn(4, 2), torch.eye(2).double()), "mean", "(4, 3)"),
    refuse(9, "gaussian-mlp", lambda: GaussianMLP(3, 1)(POINTS.float()), "x", "(2, 2)"),
    refuse(9, "flat", lambda: GaussianMLP((1, 8, 8), 1)(randn(2, 64).float()), "x", "(2, 64)"),
    refuse(17, "eps", lambda: reparameterize(POINTS, POINTS, POINTS.long()), "eps", "torch.int64", TypeError),
    refuse(17, "kl-mean", lambda: kl_std_normal(POINTS.long(), POINTS), "mean", "torch.int64", TypeError),
    refuse(17, "W-list", lambda: LinearVAE([[1.0]], randn(1), 1.0), "W", "list", TypeError),
    refuse(17, "encoder-int", lambda: GaussianMLP(2, 1)(POINTS.long()), "x", "torch.int64", TypeError),
    refuse(17, "encoder-numpy", lambda: GaussianMLP(2, 1)(np.zeros((2, 2))), "x", "ndarray", TypeError),
    refuse(19, "encoder-float64", lambda: GaussianMLP(2, 1)(POINTS), "x", "torch.float64", TypeError),
    refuse(36, "shape=2.5", lambda: GaussianMLP(2, 2.5), "out_shape", "2.5", TypeError),
    refuse(36, "text", lambda: GaussianMLP("2", 1), "in_shape", "'2'", TypeError),
    refuse(36, "levels=2.5", lambda: VAE(half, half, 2.5), "levels", "2.5", TypeError),
    refuse(36, "n_draws=1.5", elbo_of(n_draws=1.5), "n_draws", "1.5", TypeError),
    refuse(45, "sigma", lambda: GaussianMLP(2, 1, sigma="both"), "sigma", "'both'"),
    refuse(46, "noise-tensor", elbo_of(noise=POINTS), "noise", "a tensor of shape (2, 2)", TypeError),
    refuse(46, "iwae-noise", elbo_of(noise=7, bound=importance_bound, n_draws=2), "noise", "7", TypeError),
    refuse(46, "f", lambda: pathwise_gradient(7, POINTS[0], POINTS[1], POINTS), "f", "7", TypeError),
    refuse(46, "not-a-vae", elbo_of(HVAE([half] * 2, [half] * 2)), "vae", "HVAE", TypeError),
    refuse(46, "not-a-list", lambda: HVAE(half, half), "encoders", "function", TypeError),
    refuse(46, "not-functions", lambda: HVAE([half], [3]), "decoders", "3", TypeError),
    refuse(46, "a-class", lambda: VAE(GaussianMLP, half), "encoders", "the class GaussianMLP", TypeError),
    refuse(
        46, "no-kernel", lambda: diffusion_as_hvae(heun_step, ORACLE, TABLE.grid(2)), "step", "heun_step", TypeError
    ),
    refuse(
        46,
        "no-variance",
        lambda: diffusion_as_hvae(ddim_step, ORACLE, TABLE.grid(2)).elbo(POINTS, noises(0)),
        "step",
        "a deterministic step",
    ),
    refuse(50, "no-levels", lambda: HVAE([], []), "encoders", "none"),
    refuse(50, "unequal", lambda: HVAE([half, half], [half]), "encoders, decoders", "2 encoders, 1 decoders"),
    refuse(50, "n_draws=0", elbo_of(n_draws=0), "n_draws", "0"),
    refuse(50, "iwae", elbo_of(bound=importance_bound, n_draws=0), "n_draws", "0"),
    refuse(50, "nodes", lambda: expectation_normal(torch.cos, POINTS, POINTS, 0), "n", "0"),
    refuse(50, "too-many-nodes", lambda: expectation_normal(torch.cos, POINTS, POINTS, 1000), "n", "1000"),
    refuse(50, "empty-shape", lambda: GaussianMLP((), 1), "in_shape", "0"),
    refuse(50, "shape-0", lambda: GaussianMLP(2, (3, 0)), "out_shape", "0"),
    refuse(50, "width", lambda: GaussianMLP(2, 1, width=0), "width", "0"),
    refuse(50, "depth", lambda: GaussianMLP(2, 1, depth=-1), "depth", "-1"),
    refuse(50, "no-latents", lambda: make_hvae([]), "latents", "[]"),
    refuse(50, "latents=16", lambda: make_hvae(16), "latents", "16"),
    refuse(50, "levels=1", lambda: make_hvae([2], levels=1), "levels", "1"),
    refuse(54, "not-to-0", lambda: diffusion_as_hvae(STEP, ORACLE, times(1000, 1)), "times", "1000 to 1"),
    refuse(54, "not-from-T", lambda: diffusion_as_hvae(STEP, ORACLE, times(5, 0)), "times", "5 to 0"),
    refuse(54, "upward", lambda: diffusion_as_hvae(STEP, ORACLE, times(0, 1000)), "times", "[0, 1000]"),
    *(refuse(57, f"beta={b}", elbo_of(beta=b), "beta", str(b)) for b in (-1.0, NAN)),
    *(refuse(57, f"kl-{s}", lambda s=s: kl_std_normal(POINTS, 0 * POINTS + s), "sigma", str(s)) for s in (0, -1, NAN)),
    *(refuse(57, f"start-{s}", lambda s=s: GaussianMLP(2, 1, sigma_start=s), "sigma_start", str(s)) for s in (0, -1.0)),
    refuse(57, "var", lambda: LinearVAE(randn(3, 2), randn(3), 0), "var", "0"),
    refuse(
        57, "beta-hvae", lambda: next(fit_vae(HVAE([half] * 2, [half] * 2), POINTS, Recipe(1), beta=2)), "beta", "2"
    ),
    # grey levels
    refuse(4, "bin-mean", in_bins(mean=randn(3, 2)), "mean", "(3, 2)"),
    refuse(4, "bin-sigma", in_bins(sigma=randn(2, 2, 1).exp()), "sigma", "(2, 2, 1)"),
    refuse(4, "u", lambda: dequantize(GREY, 17, GREY[:1].abs()), "u", "(1, 2)"),
    refuse(17, "bytes-in-bins", in_bins(torch.zeros(2, 2).byte()), "x", "torch.uint8", TypeError),
    *(refuse(18, f"grey-{v}", in_bins(GREY * 0 + v), "x", f"{v:g}") for v in (0.3, 1.125, 255.0, NAN)),
    refuse(18, "dequantised-twice", lambda: dequantize(GREY + 0.01, 17, GREY.abs()), "x", "-0.99"),
    refuse(18, "normal-noise", lambda: dequantize(GREY, 17, torch.tensor([[0.1, 1.7], [-2.0, 0]])), "u", "-2 to 1.7"),
    refuse(36, "d=2.0", lambda: bits_per_dim(1.0, 2.0), "d", "2.0", TypeError),
    refuse(36, "grey=2.5", lambda: grey_levels(2.5), "levels", "2.5", TypeError),
    *(
        refuse(50, f"one-level-{i}", call, "levels", "1")
        for i, call in enumerate(
            (
                in_bins(levels=1),
                lambda: grey_levels(1),
                lambda: bits_per_dim(1.0, 1, 1),
                lambda: dequantize(GREY, 1, GREY),
            )
        )
    ),
    refuse(50, "d=0", lambda: bits_per_dim(1.0, 0), "d", "0"),
    *(refuse(57, f"bin-sigma-{s}", in_bins(sigma=s), "sigma", str(s)) for s in (0, -1.0, NAN)),
    *(refuse(57, f"bin-sigmas-{s}", in_bins(sigma=GREY * 0 + s), "sigma", str(s)) for s in (0, -1, NAN)),
    # the bound
    refuse(1, "term", term(t=times(5, 4, 3)), "t", "(3,)"),
    refuse(1, "log-snr", lambda: continuous_term(ORACLE, POINTS, randn(3), POINTS), "log_snr", "(3,)"),
    refuse(4, "term-eps", term(eps=POINTS[:1]), "eps", "(1, 2)"),
    refuse(5, "path", lambda: log_ratio_bound(STEP, ORACLE, [POINTS] * 2, TABLE.grid(2)), "path", "2"),
    refuse(5, "kl-terms", lambda: entropy_bound(randn(3), TABLE, 2), "kl_terms", "3"),
    refuse(5, "losses", lambda: ImportanceTimes(9).update(times(1, 2), randn(3)), "losses", "(3,)"),
    refuse(7, "hybrid", lambda: hybrid_loss(ORACLE, POINTS, times(1, 2), POINTS), "model", "one that does not"),
    refuse(15, "term-float-t", term(t=5.0, s=4.0), "t", "torch.float32", TypeError),
    refuse(15, "hybrid-t", lambda: hybrid_loss(ORACLE, POINTS, POINTS[0], POINTS), "t", "torch.float64", TypeError),
    refuse(17, "term-bytes", term(x0=POINTS.long()), "x0", "torch.int64", TypeError),
    refuse(18, "term-not-grey", term(s=0, levels=17), "x", f"{POINTS[0, 0]:g}"),
    refuse(46, "term-step", term(heun_step), "step", "heun_step", TypeError),
    refuse(46, "term-make", term(make_ddpm_step), "step", "make_ddpm_step", TypeError),
    refuse(46, "term-ddim", term(ddim_step), "step", "a deterministic step"),
    refuse(47, "term-t", term(t=1001), "t", "1001"),
    refuse(48, "hybrid-0", lambda: hybrid_loss(ORACLE, POINTS, times(0, 2), POINTS), "t", "0"),
    refuse(48, "seen-0", lambda: ImportanceTimes(9).update(times(0, 2), randn(2)), "t", "0"),
    refuse(49, "seen-10", lambda: ImportanceTimes(9).update(times(1, 10), randn(2)), "t", "10 at index 1"),
    *(refuse(50, f"importance-{T}", lambda T=T: ImportanceTimes(T), "T", str(T)) for T in (0, -3)),
    refuse(50, "history", lambda: ImportanceTimes(9, history=0), "history", "0"),
    refuse(50, "draw", lambda: ImportanceTimes(9).draw(0), "n", "0"),
    refuse(54, "bound-not-from-T", terms((5, 3, 0)), "times", "5 to 0"),
    refuse(54, "bound-not-to-0", terms((1000, 3)), "times", "1000 to 3"),
    refuse(54, "bound-list", terms([1000, 0]), "times", "list", TypeError),
    refuse(54, "ratio", terms((5, 0), lambda g: log_ratio_bound(STEP, ORACLE, [POINTS] * 2, g)), "times", "5 to 0"),
    refuse(54, "path-upward", terms((0, 5), lambda g: noising_path(TABLE, POINTS, g, noises(0))), "times", "[0, 5]"),
    refuse(57, "vlb-weight", lambda: hybrid_loss(FRAC, POINTS, times(1, 2), POINTS, -1.0), "vlb_weight", "-1.0"),
    refuse(58, "term-s", term(s=5), "s", "s = 5, t = 5"),
]


@pytest.mark.parametrize("call, argument, got, kind", SHAPES + KINDS + PARAMETERS + LATENTS)
@pytest.mark.filterwarnings("ignore:alpha_bar")
def test_refused(call, argument, got, kind):
    with pytest.raises(kind, match=rf"^{re.escape(argument)} must [^;]+.*; got [^\n]*{re.escape(got)}") as caught:
        call()
    assert caught.type is kind  # not a subclass that torch or Python happened to raise


def test_11_empty_batches_come_back_empty():
    for shape in ((0, 2), (0, 3, 8, 8)):
        x = randn(*shape)
        assert q_sample(TABLE, x, times(5), x).shape == shape
        assert q_sample(TABLE, x, torch.empty(0, dtype=torch.int64), x).shape == shape
        assert posterior(TABLE, x, x, times(5), times(4))[0].shape == shape
        for step in (ddim_step, make_ddpm_step()):
            assert run(step, x=x, noise=noises(0))()[-1].shape == shape
    unet = UNet(3, width=8)
    assert unet(IMAGES[:0].float(), torch.ones(0)).shape == (0, 3, 8, 8)
    assert TABLE.prior((0, 2), noises(0)).shape == (0, 2)


def test_15_single_times_serve_all_examples():
    close(q_sample(TABLE, IMAGES, times(7), IMAGES), q_sample(TABLE, IMAGES, times(7, 7), IMAGES), 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_20_half_precision_stays_finite_and_keeps_its_dtype(dtype):
    x, eps = IMAGES.to(dtype), randn(2, 3, 8, 8, seed=1).to(dtype)
    for t in (1, 2, 1000):
        x_t = q_sample(TABLE, x, times(t), eps)
        mean, sigma = posterior(TABLE, x, x_t, times(t), times(t - 1))
        pred = ORACLE(x_t, times(t))
        for value in (x_t, mean, sigma, pred.x0, pred.eps, pred.v):
            assert value.dtype == dtype and value.isfinite().all()
    net = MLP().to(dtype)
    assert Denoiser(net, TABLE)(POINTS.to(dtype), times(999)).x0.dtype == dtype


def test_22_samplers_stop_at_nan_where_asked():
    bad = Denoiser(lambda x, clock: x * NAN, TABLE)
    with pytest.raises(FloatingPointError, match="from t = 5 to 3"):
        run(finite(ddim_step), bad)()
    assert len(run(ddim_step, bad)()) == 2  # not asked: no check, no cost


def test_26_read_only_arrays_are_read():
    array = np.ones((2, 3), dtype=np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own remark on read-only memory
        array.flags.writeable = False
        x = torch.from_numpy(array)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q_sample(TABLE, x, times(5), x)
        run(make_ddpm_step(), x=x, noise=noises(0))()
    assert (array == 1).all()


def test_18_images_far_outside_the_range_warn_once_with_their_ends():
    images = torch.linspace(0, 255, 128).reshape(2, 1, 8, 8)
    model = Denoiser(UNet(width=8), VPSDE())
    with pytest.warns(UserWarning, match=r"must lie in about \[-1, 1\]; got 0 to 255") as caught:
        next(fit(model, images, Recipe(1)), None)
    assert len(caught) == 1


def test_55_what_has_no_meaning_without_signal_at_T_is_refused():
    table = DiscreteVP(cosine_beta(10, max_beta=1))
    oracle = GaussianOracle(table, 0.4, 0.25)
    with pytest.raises(ValueError, match="process must have a finite log SNR at T"):
        table.grid(5, uniform_log_snr(1))
    with pytest.raises(ValueError, match="model.process must keep some signal at T"):
        run(euler_maruyama_step, oracle, table.grid(5), noise=noises(0))()


def test_churn_and_guidance_on_the_mean_say_what_they_need():
    with pytest.raises(TypeError, match="model.process must be continuous for churn; got DiscreteVP"):
        run(churn(heun_step, 0.1), noise=noises(0))()
    with pytest.raises(ValueError, match="sigma_min, sigma_max must be in order"):
        churn(heun_step, 0.1, sigma_min=2, sigma_max=1)
    with pytest.raises(ValueError, match="step must draw noise"):
        run(guided_mean(ddim_step, lambda x, s: x.sum(1), 1))()
    oracle = GaussianOracle(VPSDE(), 0.4, 0.25)
    assert run(churn(heun_step, 0.4), oracle, oracle.process.grid(8), noise=noises(0))()[-1].isfinite().all()


def test_33_nothing_changes_when_a_call_is_refused():
    step, noise = make_ddim_step(0.5), noises(0)
    state, before = torch.random.get_rng_state(), POINTS.clone()
    for case in SHAPES + KINDS:
        if not case.id.startswith(("6-", "7-", "8-", "9-", "14-", "19-")):  # which build networks
            with pytest.raises((TypeError, ValueError)):
                case.values[0]()
    assert torch.equal(torch.random.get_rng_state(), state) and torch.equal(POINTS, before)
    with pytest.raises(ValueError):
        run(step, grid=(1001, 0), noise=noise)()
    assert torch.equal(run(step, noise=noise)()[-1], run(step, noise=noises(0))()[-1])  # nothing was drawn


def test_35_one_step_is_enough():
    for schedule in (linear_beta, cosine_beta):
        oracle = GaussianOracle(DiscreteVP(schedule(1)), 0.4, 0.25)
        assert posterior(oracle.process, POINTS, POINTS, times(1), times(0))[1] == 0
        (x0,) = run(make_ddpm_step(), oracle, oracle.process.grid(1), noise=noises(0))()
        assert x0.isfinite().all()


def test_42_a_chain_that_ends_too_early_warns():
    with pytest.warns(UserWarning, match=r"alpha_bar\[T\] = 0.6: x_T is not noise"):
        linear_beta(50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_beta(1000), cosine_beta(10), swiss_beta(40)


def test_50_one_step_goes_straight_to_zero():
    assert karras_sigmas(1).tolist() == [80, 0] and TABLE.grid(1).tolist() == [1000, 0]
    assert VPSDE().grid(1).tolist() == [1, 0]
    (x0,) = run(ddim_step, GaussianOracle(VE(), 0.4, 0.25), karras_sigmas(1))()
    assert x0.isfinite().all()


@pytest.mark.parametrize("n", [7, 37, 999, 1000])
def test_52_any_count_of_steps_starts_at_T_and_ends_at_0(n):
    grid = TABLE.grid(n)
    assert len(grid) == n + 1 == len(set(grid.tolist())) and grid[0] == 1000 and grid[-1] == 0


def test_53_eta_between_its_ends_stays_real():
    for eta in (0, 0.5, 1):
        assert torch.stack(run(make_ddim_step(eta), noise=noises(0))()).isfinite().all()


def test_58_a_finished_run_is_finished():
    walk = sample(ddim_step, ORACLE, POINTS, torch.tensor([5, 0]))
    next(walk)
    with pytest.raises(StopIteration):
        next(walk)


@pytest.mark.parametrize("w, rows", [(0, 2), (1, 2), (1.0, 2), (0.5, 4), (3, 4)])
def test_60_the_network_is_called_once_a_step_and_on_both_halves_only_where_they_count(w, rows):
    seen = []

    def net(x, clock, y, drop=None):
        seen.append((len(x), None if drop is None else drop.tolist()))
        return x + y[:, None] * (1 if drop is None else ~drop[:, None])

    run(ddim_step, classifier_free(Denoiser(net, TABLE), w, y=Y), grid=(5, 3, 1, 0))()
    drop = {0: [True] * 2, 1: None}.get(w, [False] * 2 + [True] * 2)
    assert seen == [(rows, drop)] * 3


def test_64_a_network_that_ignores_its_labels_warns_once():
    blind = Denoiser(lambda x, clock, **cond: 0.1 * x, TABLE)
    with pytest.warns(UserWarning, match="the same with and without its condition: w has no effect") as caught:
        run(ddim_step, classifier_free(blind, 2.0, y=Y), grid=(1000, 500, 200, 0))()
    assert len(caught) == 1


def test_65_labels_are_dropped_in_training_only_and_all_of_them_at_1():
    for p_drop, kept in ((0.0, True), (1.0, False)):
        torch.manual_seed(0)
        model = net_of(2)
        before = model.net.condition.label.weight.detach().clone()
        list(fit(model, POINTS.float(), Recipe(5, 8, lr=0.1, p_drop=p_drop), y=Y))
        moved = (model.net.condition.label.weight != before).any(1)
        assert moved.tolist() == [kept, kept, not kept]  # the rows of the labels, or of none
        for training in (True, False):  # whatever the mode, asking is not dropping
            model.train(training)
            answers = [model(POINTS.float(), times(5), y=Y).x0 for _ in range(20)]
            assert all(torch.equal(a, answers[0]) for a in answers)


def test_70_identical_features_are_at_distance_zero_and_too_few_warn():
    x = randn(50, 3)
    assert abs(frechet_distance(x, x)) < 1e-6
    with pytest.warns(UserWarning, match="too few"):
        value = frechet_distance(randn(4, 8), randn(9, 8, seed=1))
    assert isinstance(value, float) and value >= 0  # real, not complex


def test_conditions_masks_levels_and_averages_say_what_they_need():
    guided = classifier_free(TWO, 2, y=torch.tensor([0, 1, 1]))
    with pytest.raises(ValueError, match="y must have 2 rows, one for each sample; got 3"):
        guided(POINTS, times(5))
    with pytest.raises(ValueError, match="t_min must be .*; got 0.5"):
        TABLE.grid(5, uniform_log_snr(0.5))
    for mask, says in ((torch.tensor([1.0]), "have 2 dimensions"), (torch.tensor([[0.3, 1.0]]), "be True or False")):
        with pytest.raises(ValueError, match=f"mask must {says}"):
            keep_known(ddim_step, POINTS[:1], mask)
    with pytest.raises(ValueError, match="decay must be in .0, 1.; got 1"):
        averaged(UNet(width=8), 1.0)
    with pytest.raises(ValueError, match="attention must be in .0, 1.; got 2"):
        UNet(attention=(2,))
    with pytest.raises(TypeError, match="t must be a torch.Tensor; got float"):
        Denoiser(UNet(width=8), VPSDE())(torch.zeros(2, 1, 8, 8), 0.5)
    with pytest.raises(ValueError, match="x_t must have shape .*; got .2, 1."):
        TWO(POINTS[:, :1], times(5))
    with pytest.raises(TypeError, match="weight must be a function"):
        Recipe(1, weight="snr")


def test_common_slips_are_named_and_big_things_are_not_printed_whole():
    noise = torch.randn(4, 1, 8, 8)
    slips = [
        (lambda: Denoiser(UNet, VPSDE()), "net must be a network, such as UNet.*; got <class"),
        (
            lambda: Denoiser(UNet(width=8), linear_beta(1000)),
            "process must be a Process.*; got a tensor of shape",
        ),
        (lambda: VPSDE().prior((2, 2), 0), "noise must be a function such as noises.*; got 0"),
        (lambda: VPSDE().prior(10, noises(0)), "shape must be a tuple.*; got 10"),
        (lambda: run(make_ddim_step)(), "step must be a step, such as ddim_step"),
        (lambda: run(ddim_step, POINTS.sum)(), "model must have a process"),
        (
            lambda: run(make_ddpm_step(), noise=noise)(),
            "noise must be a function.*; got a tensor of shape",
        ),
    ]
    for slip, says in slips:
        with pytest.raises(TypeError, match=f"^{says}") as caught:
            slip()
        assert len(str(caught.value)) < 200
    with pytest.raises(ValueError, match="drop must be left out: guidance sets it"):
        classifier_free(TWO, 2, y=torch.tensor([0, 1]), drop=torch.tensor([False, True]))
