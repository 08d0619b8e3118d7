"""Samplers: one driver, many steps, and ways to combine them. ``step(model, x_t, t, s, noise) -> x_s``."""

from .compose import chain, churn, finite, guided_mean, keep_known
from .driver import KernelStep, evaluating, noises, noises_per_sample, sample
from .solvers import Dpmpp2M, heun_step, make_dpmpp_2m_step
from .stochastic import (
    beta,
    beta_tilde,
    ddim_step,
    euler_maruyama_step,
    kernel_step,
    learned,
    make_ddim_step,
    make_ddpm_step,
    make_langevin_step,
)

__all__ = [
    "Dpmpp2M",
    "KernelStep",
    "beta",
    "beta_tilde",
    "chain",
    "churn",
    "ddim_step",
    "euler_maruyama_step",
    "evaluating",
    "finite",
    "guided_mean",
    "heun_step",
    "keep_known",
    "kernel_step",
    "learned",
    "make_ddim_step",
    "make_ddpm_step",
    "make_dpmpp_2m_step",
    "make_langevin_step",
    "noises",
    "noises_per_sample",
    "sample",
]
