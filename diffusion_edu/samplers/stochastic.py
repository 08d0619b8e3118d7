"""Steps that draw: ancestral sampling, DDIM's family, the reverse SDE, learned kernels and Langevin dynamics."""

import torch

from .. import checks
from ..process import SDE, expand, jump, posterior
from .driver import KernelStep

# The variance of an ancestral step: functions (pred, process, t, s) -> Tensor that broadcasts against x.


def beta(pred, process, t, s):
    r"""The forward step's variance, optimal for N(0, I) data.

    .. math:: \sigma_t^2 = \beta_t \quad \Big(= 1 - \bar\alpha_t / \bar\alpha_s\Big)

    Equations: rev.sigma_choices
    """
    return expand(jump(process, t, s)[1], pred.x_t) ** 2


def beta_tilde(pred, process, t, s):
    r"""The posterior's variance, optimal for a single data point.

    .. math:: \sigma_t^2 = \tilde\beta_t = \frac{1 - \bar\alpha_s}{1 - \bar\alpha_t}\,\beta_t

    At the last step, s = 0, that is 0 and leaves no density: there it is the variance of the step before, from 2t to t
    (on a table, beta-tilde_1 := beta-tilde_2), as Nichol and Dhariwal do; in a chain of one step it stays 0.

    Equations: rev.sigma_choices
    """
    before = (s == 0) & (t < process.T)
    t, s = torch.where(before, (2 * t).clamp(max=process.T), t), torch.where(before, t, s)
    return posterior(process, pred.x0, pred.x_t, t, s)[1] ** 2


def learned(pred, process, t, s):
    r"""The network's own variance, between the two fixed ones on a log scale.

    .. math:: \sigma_t^2 = \exp\{f \log\beta_t + (1 - f)\log\tilde\beta_t\}, \qquad f = \mathrm{pred.frac}

    Equations: lv.interp

    References
    ----------
    .. [1] Nichol and Dhariwal, 2021, arXiv:2102.09672, Eq. 15.
    """
    if pred.frac is None:
        checks.fail("model", "predict a variance, Denoiser(..., learned_variance=True)", "one that does not")
    low = beta_tilde(pred, process, t, s).clamp_min(1e-20).log()  # 0 in a chain of one step
    return (pred.frac * beta(pred, process, t, s).log() + (1 - pred.frac) * low).exp()


def make_ddpm_step(variance=beta_tilde):
    r"""Ancestral sampling: draw x_s from the posterior at the predicted clean data.

    .. math:: x_{t-1} = \tilde\mu_t(x_t, \hat x_0) + \sigma_t z, \qquad
              \tilde\mu_t = \frac{1}{\sqrt{\alpha_t}}
              \Big(x_t - \frac{\beta_t}{\sqrt{1 - \bar\alpha_t}}\,\hat\epsilon\Big)

    with z = 0 at the last step, whatever the variance: fresh noise on finished data would only blur them. Strides
    are exact: the posterior is that of q(x_s | x_t, x_0).

    Parameters
    ----------
    variance : function (pred, process, t, s) -> Tensor
        `beta_tilde`, `beta`, `learned` or your own.

    Returns
    -------
    Step

    Equations: rev.kernel, ddpm.sample_alg2, ddpm.x0_form_step, ddpm.strided, param.mean_from_eps

    References
    ----------
    .. [1] Ho et al., 2020, arXiv:2006.11239, Eq. 11 and algorithm 2.
    """
    checks.function("variance", variance, "beta, beta_tilde or learned")

    def kernel(model, x_t, t, s):
        pred = model(x_t, t)
        mean, _ = posterior(model.process, pred.x0, x_t, t, s)
        return mean, variance(pred, model.process, t, s).sqrt()

    return KernelStep(kernel, draws_last=False)


def make_ddim_step(eta=0.0):
    r"""DDIM's family: eta = 0 is deterministic, eta = 1 is ancestral sampling with beta-tilde.

    .. math:: x_s = a_s \hat x_0 + \sqrt{b_s^2 - \sigma^2}\,\hat\epsilon + \sigma z, \qquad
              \sigma = \eta\,\frac{b_{t|s} b_s}{b_t} \quad (= \eta\sqrt{\tilde\beta_t})

    with a = scale, b = std.

    Parameters
    ----------
    eta : float
        In [0, 1].

    Returns
    -------
    Step

    Equations: ddim.update, ddim.sigma_eta

    References
    ----------
    .. [1] Song et al., "Denoising Diffusion Implicit Models", 2021, arXiv:2010.02502, Eq. 12 and 16.
    """
    eta = checks.real("eta", eta, 0, 1)

    def kernel(model, x_t, t, s):
        pred = model(x_t, t)
        a_s, b_s = (expand(c, x_t) for c in model.process.marginal(s))
        if eta == 0:
            return a_s * pred.x0 + b_s * pred.eps, None
        sigma = eta * posterior(model.process, pred.x0, x_t, t, s)[1]
        return a_s * pred.x0 + (b_s**2 - sigma**2).clamp_min(0).sqrt() * pred.eps, sigma

    return KernelStep(kernel)


ddim_step = make_ddim_step()


def _reverse_sde(model, x_t, t, s):
    if model.process.zero_terminal_snr and t == model.process.T:
        checks.fail("model.process", "keep some signal at T: its diffusion is infinite there", "alpha_bar[T] = 0")
    pred = model(x_t, t)
    process = _sde(model.process.continuous())
    t, dt = t.double(), expand((t - s).double(), x_t)
    g = expand(process.diffusion(t), x_t)
    mean = x_t - (process.drift(x_t, t) - g**2 * pred.score) * dt
    return mean, g * dt.sqrt()


def _sde(process):
    """An SDE: a process with drift and diffusion."""
    if not isinstance(process, SDE):
        checks.fail("model.process", "have a drift and a diffusion (an SDE)", type(process).__name__, TypeError)
    return process


euler_maruyama_step = KernelStep(_reverse_sde, draws_last=False)
euler_maruyama_step.__doc__ = r"""The reverse SDE by Euler and Maruyama.

    .. math:: x_s = x_t - \big[f(x_t, t) - g(t)^2\, s_\theta(x_t, t)\big](t - s) + g(t)\sqrt{t - s}\, z

    with z = 0 at the last step, s = 0.

    References
    ----------
    .. [1] Song et al., 2021, arXiv:2011.13456, Eq. 6 and appendix D.
    """

kernel_step = KernelStep(lambda model, x_t, t, s: model.reverse_kernel(x_t, t, s))
kernel_step.__doc__ = r"""The model of 2015: it says mean and standard deviation of p(x_s | x_t) itself.

    .. math:: x_s = \mu_\theta(x_t, t) + \sigma_\theta(x_t, t)\, z

    The model has a method ``reverse_kernel(x_t, t, s) -> (mean, sigma)``, as `oracles.GaussianOracle` does. Its last
    step draws, too: there the model says sigma.

    References
    ----------
    .. [1] Sohl-Dickstein et al., 2015, arXiv:1503.03585, section 2.2.
    """


def make_langevin_step(r=0.1, n_steps=1):
    r"""Langevin dynamics at time t: a corrector when s = t, a level of annealed Langevin when s < t.

    .. math:: x \leftarrow x + \varepsilon\, s_\theta(x, t) + \sqrt{2\varepsilon}\, z, \qquad
              \varepsilon = r\,\mathrm{std}(t)^2

    NCSN writes the same with alpha_i = 2 epsilon. Nothing happens at t = 0.

    Parameters
    ----------
    r : float
        Step size relative to the variance of the noise, positive.
    n_steps : int
        Updates at each level.

    Returns
    -------
    Step

    Equations: langevin.step

    References
    ----------
    .. [1] Song and Ermon, 2019, arXiv:1907.05600, algorithm 1.
    """
    r = checks.real("r", r, 0, open_low=True)
    n_steps = checks.integer("n_steps", n_steps, 1)

    def step(model, x_t, t, s, noise):
        x = x_t
        for _ in range(n_steps if t > 0 else 0):
            pred = model(x, t)
            epsilon = r * pred.std**2
            x = x + epsilon * pred.score + (2 * epsilon).sqrt() * checks.same_shape("noise(x)", noise(x), "x", x)
        return x

    return step
