"""Samplers: one driver, many steps, and ways to combine them. ``step(model, x_t, t, s, noise) -> x_s``."""

from .compose import chain, churn, finite, guided_mean, keep_known
from .ddim import ddim_mean, ddim_sigma, ddim_step, invert, make_ddim_step, slerp
from .driver import KernelStep, evaluating, noises, noises_per_sample, sample
from .langevin import langevin, make_corrector_step, make_langevin_step
from .sde import (
    brownian_path,
    euler_maruyama_path,
    euler_maruyama_step,
    flow,
    probability_flow,
    reverse_diffusion_step,
    reverse_sde,
    rk4_step,
)
from .solvers import (
    Adams,
    Dpmpp2M,
    dpm1_step,
    dpm2_step,
    dpmpp_2s_step,
    half_log_snr,
    heun_step,
    make_adams_step,
    make_dpmpp_2m_step,
)
from .stochastic import beta, beta_tilde, kernel_step, learned, make_ddpm_step

__all__ = [
    "Adams",
    "Dpmpp2M",
    "KernelStep",
    "beta",
    "beta_tilde",
    "brownian_path",
    "chain",
    "churn",
    "ddim_mean",
    "ddim_sigma",
    "ddim_step",
    "dpm1_step",
    "dpm2_step",
    "dpmpp_2s_step",
    "euler_maruyama_path",
    "euler_maruyama_step",
    "evaluating",
    "finite",
    "flow",
    "guided_mean",
    "half_log_snr",
    "heun_step",
    "invert",
    "keep_known",
    "kernel_step",
    "langevin",
    "learned",
    "make_adams_step",
    "make_corrector_step",
    "make_ddim_step",
    "make_ddpm_step",
    "make_dpmpp_2m_step",
    "make_langevin_step",
    "noises",
    "noises_per_sample",
    "probability_flow",
    "reverse_diffusion_step",
    "reverse_sde",
    "rk4_step",
    "sample",
    "slerp",
]
