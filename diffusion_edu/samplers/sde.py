"""The way back as a differential equation: the reverse SDE, the probability-flow ODE, and steps along them."""

from itertools import pairwise

import numpy as np
import torch

from .. import checks
from ..process import SDE, expand, jump
from .ddim import at_an_end, ddim_step
from .driver import KernelStep, evaluating


def reverse_sde(sde, model, eta=1.0):
    r"""Drift and diffusion of the way back: an SDE and a score make another SDE.

    .. math:: dx = \big[f(x, t) - \tfrac{1 + \eta^2}{2}\, g(t)^2\, s_\theta(x, t)\big]\,dt + \eta\, g(t)\, d\bar w
              \qquad (dt < 0)

    eta = 1 is Anderson's reverse SDE, eta = 0 the probability-flow ODE; with the exact score all have the same q_t.

    Parameters
    ----------
    sde : SDE
        With ``drift`` and ``diffusion``; of a table, ``process.continuous()``.
    model : Model
        Says the score at time t, at any real t.
    eta : float
        At least 0.

    Returns
    -------
    drift : function (x (B, *D), t) -> Tensor, shaped like x
    diffusion : function t -> Tensor, shaped like t

    Equations: sde.reverse, sde.reverse_vp, sde.pf_ode

    References
    ----------
    .. [1] Anderson, "Reverse-time diffusion equation models", 1982; Song et al., 2021, arXiv:2011.13456, Eq. 6, 13.
    """
    eta, sde = checks.real("eta", eta, 0), check_sde(sde)

    def drift(x, t):
        g = expand(sde.diffusion(t), x)
        if sde.zero_terminal_snr and not g.isfinite().all():
            checks.fail("model.process", "keep some signal at T: its diffusion is infinite there", "alpha_bar[T] = 0")
        return sde.drift(x, t) - (1 + eta**2) / 2 * g**2 * model(x, t).score

    return drift, lambda t: eta * sde.diffusion(t)


def check_sde(sde):
    """A process with drift and diffusion."""
    if not isinstance(sde, SDE):
        checks.fail("sde", "have a drift and a diffusion (an SDE)", type(sde).__name__, TypeError)
    return sde


def probability_flow(model):
    r"""The velocity of the probability-flow ODE, a function (x, t) -> dx/dt.

    .. math:: \frac{dx}{dt} = f(x, t) - \tfrac12 g(t)^2\, s_\theta(x, t)

    Equations: sde.pf_ode

    References
    ----------
    .. [1] Song et al., 2021, arXiv:2011.13456, Eq. 13.
    """
    return reverse_sde(model.process.continuous(), model, eta=0.0)[0]


def _euler_maruyama(model, x_t, t, s):
    drift, diffusion = reverse_sde(model.process.continuous(), model)
    t, dt = t.double(), expand((t - s).double(), x_t)
    return x_t - drift(x_t, t) * dt, expand(diffusion(t), x_t) * dt.sqrt()


euler_maruyama_step = KernelStep(_euler_maruyama, draws_last=False)
euler_maruyama_step.__doc__ = r"""The reverse SDE by Euler and Maruyama.

    .. math:: x_s = x_t - \big[f(x_t, t) - g(t)^2\, s_\theta(x_t, t)\big](t - s) + g(t)\sqrt{t - s}\, z

    with z = 0 at the last step, s = 0. On a table, beta(t) is that of the step from t to t - 1, and DDPM's ancestral
    step is the same up to beta^2.

    Equations: sde.reverse, sde.reverse_vp, sde.ancestral_vs_em

    References
    ----------
    .. [1] Song et al., 2021, arXiv:2011.13456, Eq. 6 and appendix E.
    """


def _reverse_diffusion(model, x_t, t, s):
    scale, std = (expand(c, x_t) for c in jump(model.process, t, s))
    return (2 - scale) * x_t + std**2 * model(x_t, t).score, std


reverse_diffusion_step = KernelStep(_reverse_diffusion, draws_last=False)
reverse_diffusion_step.__doc__ = r"""The reverse SDE, discretised as the forward chain is.

    .. math:: x_s = (2 - a_{t|s})\, x_t + b_{t|s}^2\, s_\theta(x_t, t) + b_{t|s}\, z

    with (a, b) of q(x_t | x_s): x_s = (2 - sqrt(1 - beta)) x + beta s + sqrt(beta) z on DDPM's table, and
    x + (sigma_t^2 - sigma_s^2) s + sqrt(sigma_t^2 - sigma_s^2) z where the variance explodes. z = 0 at s = 0.

    Equations: score.pc

    References
    ----------
    .. [1] Song et al., 2021, arXiv:2011.13456, Eq. 46 and algorithms 2-3.
    """


def rk4_step(model, x_t, t, s, noise=None):
    r"""The probability-flow ODE by the classical Runge-Kutta rule in the log SNR: four evaluations, fourth order.

    At s = 0 the log SNR is infinite, and the last step is DDIM's, one evaluation. So is the first from pure noise,
    where alpha_bar[T] = 0.

    Equations: sde.pf_ode
    """
    if at_an_end(model.process, t, s):
        return ddim_step(model, x_t, t, s, noise)
    sde = model.process.continuous()
    return rk4(per_log_snr(probability_flow(model), sde), x_t, sde.log_snr(t.double()), sde.log_snr(s.double()))


def per_log_snr(velocity, sde):
    r"""A velocity dx/dt as dx / d log SNR, a function (x, log_snr): no table's beta jumps there, nothing is singular.

    .. math:: \frac{d \log\mathrm{SNR}}{dt} = -\frac{g(t)^2}{\mathrm{std}(t)^2}
    """

    def slope(x, log_snr):
        t = sde.time_of(log_snr).clamp(max=sde.T)
        return -expand((sde.marginal(t)[1] / sde.diffusion(t)) ** 2, x) * velocity(x, t)

    return slope


def rk4(velocity, x, t, s):
    """One Runge-Kutta step of dx/dt = velocity(x, t) from t to s, in either direction."""
    h = s - t
    step = expand(h, x)
    k1 = velocity(x, t)
    k2 = velocity(x + step / 2 * k1, t + h / 2)
    k3 = velocity(x + step / 2 * k2, t + h / 2)
    k4 = velocity(x + step * k3, s)
    return x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def flow(model, x, t, s, rtol=1e-6, atol=1e-6):
    r"""Carry x along the probability-flow ODE from time t to time s, either way, with adaptive steps.

    .. math:: x(s) = x(t) + \int_t^s \Big(f(x, u) - \tfrac12 g(u)^2\, s_\theta(x, u)\Big)\,du

    The steps are taken in the log SNR, where no table's beta jumps and nothing is singular near the data.
    Down, from T to a small t_min, it is a sampler; up, it encodes data as the noise that they come from.

    Parameters
    ----------
    model : Model
    x : Tensor, shape (B, *D)
    t, s : float
        Times in (0, T]: at 0 the log SNR is infinite.
    rtol, atol : float
        Tolerances of the Runge-Kutta pair of order 5(4) (``scipy.integrate.solve_ivp``), for the whole batch.

    Returns
    -------
    Tensor, shaped like x, of its dtype; no graph is kept

    Raises
    ------
    FloatingPointError
        If the model's answer is not finite, or the solver gives up.

    Equations: sde.pf_ode
    """
    t, s = (checks.real(n, v, 0, model.process.T, open_low=True) for n, v in (("t", t), ("s", s)))
    velocity, sde = probability_flow(model), model.process.continuous()
    return evaluating(model, lambda _: integrate(velocity, sde, x, t, s, rtol, atol)[0])


@torch.inference_mode(False)
@torch.no_grad()
def integrate(velocity, sde, x, t, s, rtol, atol):
    """(x at s, number of evaluations) of dx/dt = velocity(x, t), by ``solve_ivp`` in float64, in the log SNR."""
    from scipy.integrate import solve_ivp

    checks.real("rtol", rtol, 0, open_low=True), checks.real("atol", atol, 0, open_low=True)
    slope, ends = per_log_snr(velocity, sde), [sde.log_snr(torch.tensor(u, dtype=torch.float64)) for u in (t, s)]
    if sde.zero_terminal_snr and not all(end.isfinite() for end in ends):
        checks.fail("model.process", "keep some signal at T: its log SNR is infinite there", "alpha_bar[T] = 0")

    def flat(log_snr, y):
        now = torch.full_like(ends[0], log_snr)  # where a table's tensors are
        value = slope(torch.from_numpy(y).reshape(x.shape).to(x), now)
        if not value.isfinite().all():
            raise FloatingPointError(f"the velocity is not finite at t = {sde.time_of(now).item():g}")
        return value.double().cpu().numpy().ravel()

    start = checks.floating("x", x).detach().double().cpu().numpy().ravel()
    found = solve_ivp(flat, [end.item() for end in ends], start, method="RK45", rtol=rtol, atol=atol)
    if not found.success:
        raise FloatingPointError(f"the ODE from {t:g} to {s:g} was not solved: {found.message}")
    return torch.from_numpy(np.ascontiguousarray(found.y[:, -1])).reshape(x.shape).to(x), found.nfev


def brownian_path(times, x, noise):
    r"""A Wiener process at the given times, from 0: independent increments of variance dt.

    .. math:: w(t) - w(s) \sim \mathcal N(0, (t - s) I)

    Parameters
    ----------
    times : Tensor, shape (n + 1,)
        Strictly increasing; w is 0 at the first.
    x : Tensor, shape (B, *D)
        Says shape and dtype.
    noise : function x -> Tensor like x

    Returns
    -------
    Tensor, shape (n + 1, B, *D)

    Equations: sde.wiener
    """
    increments = [wiener_increment(dt, x, noise) for dt in check_increasing(times).diff()]
    return torch.stack([torch.zeros_like(x), *increments]).cumsum(0)


def wiener_increment(dt, x, noise):
    """dw of variance dt, like x."""
    checks.function("noise", noise, "noises(seed)")
    return expand(dt.sqrt(), x) * checks.same_shape("noise(x)", noise(x), "x", x)


def check_increasing(times):
    """Times that strictly increase, at least two of them."""
    if times.ndim != 1 or len(times) < 2 or not (times.diff() > 0).all():
        checks.fail("times", "be 1-D, at least 2 entries, strictly increasing", times.flatten()[:8].tolist())
    return times


def euler_maruyama_path(sde, x0, times, noise):
    r"""A path of a forward SDE, by Euler and Maruyama.

    .. math:: x_{t + dt} = x_t + f(x_t, t)\,dt + g(t)\,dw, \qquad dw \sim \mathcal N(0, dt\, I)

    On a joined-up table beta(t) belongs to the step that ends at t: a walk over its integers takes every beta one step
    late, an error of the same order as the rule's own.

    Parameters
    ----------
    sde : SDE
    x0 : Tensor, shape (B, *D)
        x at the first of the times.
    times : Tensor, shape (n + 1,)
        Strictly increasing.
    noise : function x -> Tensor like x

    Returns
    -------
    Tensor, shape (n + 1, B, *D)

    Equations: sde.general
    """
    path = [checks.floating("x0", x0)]
    for t, s in pairwise(check_increasing(check_sde(sde).check_times(times, "times"))):
        x, dw = path[-1], wiener_increment(s - t, x0, noise)
        path.append(x + sde.drift(x, t) * expand(s - t, x) + expand(sde.diffusion(t), x) * dw)
    return torch.stack(path)
