r"""The forward process: how data turn into noise, and what is known about the way back.

Every process here is Gaussian and linear, so one pair of numbers per time says it all:

.. math:: q(x_t \mid x_0) = \mathcal N(\mathrm{scale}(t)\, x_0,\ \mathrm{std}(t)^2 I)

Time 0 is clean data and ``process.T`` is the last time, on every process.
"""

from .base import SDE, Process, check_decreasing, check_whole, expand, karras, quadratic, uniform, uniform_log_snr
from .conditionals import forward_step, jump, posterior, q_sample, terminal_kl
from .ve import VE, VESDE
from .vp import VPSDE, DiscreteVP, SubVPSDE, TableVP

__all__ = [
    "SDE",
    "VE",
    "VESDE",
    "VPSDE",
    "DiscreteVP",
    "Process",
    "SubVPSDE",
    "TableVP",
    "check_decreasing",
    "check_whole",
    "expand",
    "forward_step",
    "jump",
    "karras",
    "posterior",
    "q_sample",
    "quadratic",
    "terminal_kl",
    "uniform",
    "uniform_log_snr",
]
