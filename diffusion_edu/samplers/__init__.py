"""Samplers: one driver, many steps, and ways to combine them. ``step(model, x_t, t, s, noise) -> x_s``."""

from .compose import chain, churn, finite, guided_mean, keep_known
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
from .solvers import Dpmpp2M, heun_step, make_dpmpp_2m_step
from .stochastic import (
    beta,
    beta_tilde,
    ddim_step,
    kernel_step,
    learned,
    make_ddim_step,
    make_ddpm_step,
)

__all__ = [
    "Dpmpp2M",
    "KernelStep",
    "beta",
    "beta_tilde",
    "brownian_path",
    "chain",
    "churn",
    "ddim_step",
    "euler_maruyama_path",
    "euler_maruyama_step",
    "evaluating",
    "finite",
    "flow",
    "guided_mean",
    "heun_step",
    "keep_known",
    "kernel_step",
    "langevin",
    "learned",
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
]
