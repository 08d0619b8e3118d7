r"""The likelihood of a diffusion model, by the change of variables along its probability-flow ODE."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from . import checks
from .gaussian import normal_log_prob
from .samplers import evaluating
from .samplers.sde import integrate, probability_flow
from .score_matching import value_and_divergence


@dataclass(frozen=True, eq=False)
class Likelihood:
    """What `ode_log_prob` found.

    Attributes
    ----------
    log_prob : Tensor, shape (B,)
        Nats.
    x_T : Tensor, shape (B, *D)
        Where the ODE carried x: its code.
    change : Tensor, shape (B,)
        The integral of the divergence: log q_0(x_0) - log q_T(x_T).
    n_evaluations : int
        Calls of the velocity and its divergence.
    """

    log_prob: Tensor
    x_T: Tensor
    change: Tensor
    n_evaluations: int


@torch.no_grad()
def ode_log_prob(model, x0, t_min=1e-5, v=None, end_log_prob=None, rtol=1e-6, atol=1e-6):
    r"""log q_0(x_0): carry x_0 up to T along the ODE, adding up how the volume changes.

    .. math:: \log q_0(x(0)) = \log q_T(x(T)) + \int_0^T \nabla\cdot\tilde f(x(t), t)\,dt, \qquad
              \tilde f(x, t) = f(x, t) - \tfrac12 g(t)^2\, s_\theta(x, t)

    Parameters
    ----------
    model : Model
    x0 : Tensor, shape (B, *D)
        Data with a density: grey levels must be dequantised first (`bits.dequantize`).
    t_min : float
        Where the integral begins, > 0: at 0 the log SNR is infinite. It is the density of the data with that much
        noise, a bias of the order of the noise's variance.
    v : Tensor, shape (K, B, *D), or None
        None: the exact divergence, D derivatives an evaluation. Otherwise probes, +1 and -1 at random, the same all
        the way: the estimate is unbiased.
    end_log_prob : function x (B, *D) -> Tensor, shape (B,), or None
        log q_T; None means N(0, std(T)^2 I), the prior that samples start from. The two differ by what the process
        leaves of the data at T.
    rtol, atol : float
        Tolerances of the adaptive solver, as in `flow`.

    Returns
    -------
    Likelihood

    Equations: sde.ode_loglik

    References
    ----------
    .. [1] Song et al., 2021, arXiv:2011.13456, Eq. 39-40; Chen et al., "Neural Ordinary Differential Equations", 2018.
    """
    process, velocity = model.process.continuous(), probability_flow(model)
    t_min = checks.real("t_min", t_min, 0, process.T, open_low=True)
    size = x0[0].numel() if len(checks.floating("x0", x0)) else checks.fail("x0", "hold at least one example", "none")
    if end_log_prob is None:
        _, std = process.marginal(torch.tensor(process.T, dtype=torch.float64))
        end_log_prob = partial(normal_log_prob, mean=0.0, var=std.item() ** 2)
    checks.function("end_log_prob", end_log_prob, "lambda x: oracle.log_prob(x, T)")

    def both(state, t):
        x = state[:, :size].reshape(x0.shape)
        value, change = value_and_divergence(lambda x: velocity(x, t), x, v)
        return torch.cat([value.flatten(1), (change if v is None else change.mean(0))[:, None]], dim=1)

    state = torch.cat([x0.flatten(1), x0.new_zeros(len(x0), 1)], dim=1)
    end, n = evaluating(model, lambda _: integrate(both, process, state, t_min, process.T, rtol, atol))
    x_T, change = end[:, :size].reshape(x0.shape), end[:, size]
    return Likelihood(end_log_prob(x_T) + change, x_T, change, n)


def probes(x, n, generator):
    """n probes of random signs for each example of x (B, *D): shape (n, B, *D), like x."""
    signs = torch.randint(2, (checks.integer("n", n, 1), *x.shape), generator=generator)
    return (2 * signs - 1).to(x)
