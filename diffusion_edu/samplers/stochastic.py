"""Steps that draw from a Gaussian: ancestral sampling and learned kernels."""

import torch

from .. import checks
from ..process import expand, jump, posterior
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
              = \frac{x_t + \beta_t\,\hat s}{\sqrt{\alpha_t}}
              = \frac{\sqrt{\alpha_t}(1 - \bar\alpha_{t-1})\,x_t
              + \sqrt{\bar\alpha_{t-1}}\,\beta_t\,\hat x_0}{1 - \bar\alpha_t}

    with z = 0 at the last step, whatever the variance: fresh noise on finished data would only blur them. Strides
    are exact: the posterior is that of q(x_s | x_t, x_0). The second form is A_t x_t + B_t eps + C_t z, the third the
    same with the score.

    Parameters
    ----------
    variance : function (pred, process, t, s) -> Tensor
        `beta_tilde`, `beta`, `learned` or your own.

    Returns
    -------
    Step

    Equations: rev.kernel, ddpm.sample_alg2, ddpm.x0_form_step, ddpm.strided, param.mean_from_eps,
        param.mean_from_x0, param.score_objective, param.ABC

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


kernel_step = KernelStep(lambda model, x_t, t, s: model.reverse_kernel(x_t, t, s))
kernel_step.__doc__ = r"""The model of 2015: it says mean and standard deviation of p(x_s | x_t) itself.

    .. math:: x_s = \mu_\theta(x_t, t) + \sigma_\theta(x_t, t)\, z

    The model has a method ``reverse_kernel(x_t, t, s) -> (mean, sigma)``, as `oracles.GaussianOracle` does. Its last
    step draws, too: there the model says sigma.

    References
    ----------
    .. [1] Sohl-Dickstein et al., 2015, arXiv:1503.03585, section 2.2.
    """
