r"""The diffusion model of 2015: every step has its own head, which names a Gaussian to draw from.

The network does not predict noise or clean data. It says mean and standard deviation of p(x_{t-1} | x_t) itself,
and is trained by the KL divergence to q(x_{t-1} | x_t, x_0), one term of the variational bound for each t.
"""

import math

import torch
from torch import nn

from . import checks
from .gaussian import normal_kl
from .process import expand, q_sample, terminal_kl


def posterior_precision(process, x0, x_t, t):
    r"""Mean and standard deviation of q(x_{t-1} | x_t, x_0), weighted by precision as in the code of 2015.

    .. math:: \lambda = \frac{1}{1 - \bar\alpha_{t-1}} + \frac{\alpha_t}{\beta_t}, \qquad
              \mu = \frac1\lambda\Big(\frac{\sqrt{\bar\alpha_{t-1}}\,x_0}{1 - \bar\alpha_{t-1}}
              + \frac{\sqrt{\alpha_t}\,x_t}{\beta_t}\Big), \qquad \sigma = \lambda^{-1/2}

    Computed after multiplication by :math:`1 - \bar\alpha_{t-1}`, in float64: at t = 1, where that is 0, the result
    is exactly (x_0, 0) and not nan.

    Parameters
    ----------
    process : DiscreteVP
    x0, x_t : Tensor, shape (B, *D)
        Clean data and its noised version, in data units.
    t : Tensor of int64, 0-d or shape (B,)
        1 <= t <= T.

    Returns
    -------
    mean : Tensor, shape (B, *D)
    sigma : Tensor
        Broadcasts against ``mean``.

    Raises
    ------
    ValueError
        If the shapes differ or some t lies outside 1..T (read on the CPU only).

    Equations: post.precision

    References
    ----------
    .. [1] Sohl-Dickstein et al., "Deep Unsupervised Learning using Nonequilibrium Thermodynamics", 2015,
       arXiv:1503.03585, and its published code.
    """
    checks.same_shape("x_t", x_t, "x0", checks.floating("x0", x0))
    checks.batch_of_times("t", checks.times_in("t", t, 1, process.T, discrete=True), len(x0))
    scale, std = process.marginal(t - 1)
    from_step = std**2 / process.beta[t]
    total = 1 + process.alpha[t] * from_step  # lambda (1 - alpha_bar[t - 1])
    mean = expand(scale / total, x0) * x0 + expand(process.alpha[t].sqrt() * from_step / total, x0) * x_t
    return mean, expand(std / total.sqrt(), x0)


def forward_process(process, x0, t, eps):
    r"""Noise clean data, and say where one step back would have been.

    .. math:: x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1 - \bar\alpha_t}\,\epsilon, \qquad
              q(x_{t-1} \mid x_t, x_0) = \mathcal N(\tilde\mu_t, \tilde\beta_t I)

    Parameters
    ----------
    process : DiscreteVP
    x0, eps : Tensor, shape (B, *D)
    t : Tensor of int64, 0-d or shape (B,)

    Returns
    -------
    mean, sigma, x_t : Tensor
        Those of `posterior_precision`, and the noised data.

    Equations: swiss.forward_process
    """
    x_t = q_sample(process, x0, t, eps)
    return *posterior_precision(process, x0, x_t, t), x_t


class KernelModel(nn.Module):
    r"""A network that names the Gaussian of each reverse step.

    .. math:: p(x_{t-1} \mid x_t) = \mathcal N\big(\sqrt{\alpha_t}\,x_t + \sqrt{\beta_t}\,m,\
              \beta_t\,e^{h} I\big), \qquad (m, h) = \mathrm{head}_t(x_t)

    So (m, h) = 0 is the exact answer for N(0, I) data. The last step, t = 1, has no posterior to learn from: it is
    that answer, N(sqrt(alpha_1) x_1, beta_1 I), whatever the network says, as in the original.

    Parameters
    ----------
    net : nn.Module
        ``net(x, t) -> (first, second)``, both shaped like x (B, D); ``net(x)`` of a stack x (T, B, D) uses head t
        on ``x[t - 1]``. For example `nets.mlp.PerStepHeads`.
    process : DiscreteVP
    relative : bool
        False: the heads say the mean and the log variance themselves.

    Equations: swiss.reverse

    References
    ----------
    .. [1] Sohl-Dickstein et al., 2015, arXiv:1503.03585, section 2.2 and its published code.
    """

    def __init__(self, net, process, relative=True):
        super().__init__()
        self.net, self.process, self.relative = net, process, relative

    def reverse_kernel(self, x_t, t, s):
        """Mean and standard deviation of p(x_s | x_t), for `samplers.kernel_step`.

        Parameters
        ----------
        x_t : Tensor, shape (B, D), or a stack (T, B, D) for all the steps at once
        t : Tensor of int64, 0-d or shape (B,); 1..T for a stack
        s : Tensor of int64
            t - 1: the model knows no other step.

        Returns
        -------
        mean, sigma : Tensor, shaped like ``x_t``

        Raises
        ------
        ValueError
            If s is not t - 1, or the times of a stack are not 1..T (read on the CPU only).
        """
        self._check(x_t, t, s)
        mean, log_var = self.net(x_t) if x_t.ndim == 3 else self.net(x_t, t)
        alpha, beta = expand(self.process.alpha[t], x_t), expand(self.process.beta[t], x_t)
        if self.relative:
            mean, log_var = alpha.sqrt() * x_t + beta.sqrt() * mean, beta.log() + log_var
        last = expand(t, x_t) == 1
        mean = torch.where(last, alpha.sqrt() * x_t, mean)
        return mean, torch.where(last, beta.sqrt(), (log_var / 2).exp())

    def _check(self, x_t, t, s):
        checks.times_in("t", t, 1, self.process.T, discrete=True)
        if t.device.type == "cpu" and not torch.equal(s, t - 1):
            checks.fail("s", "be t - 1, the only step that this model knows", f"s = {s.tolist()}, t = {t.tolist()}")
        if x_t.ndim == 3 and (len(x_t) != self.process.T or not _are_all(t, self.process.T)):
            got = f"{t.tolist()} for a stack of {len(x_t)}"
            checks.fail("t", f"be 1..{self.process.T}, one for each entry of a stack (T, B, D)", got)


def kernel_loss(model, x0, t, eps):
    r"""One term of the variational bound for each example, in nats.

    .. math:: L_{t-1} = D_{KL}\big(q(x_{t-1} \mid x_t, x_0)\,\|\,p(x_{t-1} \mid x_t)\big)
              = \sum_d \log\frac{\sigma}{\tilde\sigma} + \frac{\tilde\sigma^2 + (\tilde\mu - \mu)^2}{2\sigma^2}
              - \frac12, \qquad L_0 = -\log p(x_0 \mid x_1)

    At t = 1 the posterior is the point x_0: there is no divergence to it, and the bound has -log p(x_0 | x_1).

    Parameters
    ----------
    model : KernelModel, or any model with ``process`` and ``reverse_kernel``
    x0, eps : Tensor, shape (B, D), or stacks (T, B, D) for all the steps at once
        Clean data, and standard normal noise of the same shape.
    t : Tensor of int64, 0-d or shape (B,); 1..T for a stack

    Returns
    -------
    Tensor, shape (B,), or (T, B) for a stack
        Summed over the last axis only.

    Equations: swiss.kl_loss

    References
    ----------
    .. [1] Sohl-Dickstein et al., 2015, arXiv:1503.03585, Eq. 14.
    """
    mean_q, sigma_q, x_t = forward_process(model.process, x0, t, eps)
    mean, sigma = model.reverse_kernel(x_t, t, t - 1)
    last, var = expand(t, x0) == 1, sigma**2
    kl = normal_kl(mean_q, torch.where(last, var, sigma_q**2), mean, var)
    return torch.where(last, kl + (2 * math.pi * var).log() / 2, kl).sum(-1)


def kernel_bound(model, x0, eps):
    r"""Upper bound on -log p(x_0) in nats, shape (B,), from one noise for every step.

    .. math:: -\log p(x_0) \le D_{KL}\big(q(x_T \mid x_0)\,\|\,\mathcal N(0, I)\big) + \sum_{t=1}^T L_{t-1}

    Parameters
    ----------
    model : as in `kernel_loss`
    x0 : Tensor, shape (B, D)
    eps : Tensor, shape (T, B, D)

    Equations: swiss.bound_bits
    """
    times = range(1, model.process.T + 1)
    terms = (kernel_loss(model, x0, torch.tensor(t), eps_t) for t, eps_t in zip(times, eps, strict=True))
    return terminal_kl(model.process, x0) + sum(terms)


def bits_over_gaussian(nats, d):
    r"""How many bits a bound of ``nats`` on -log p(x_0) is better than N(0, I) on data of its own.

    .. math:: \frac{L_{null} - L}{\ln 2}, \qquad L_{null} = \tfrac d2\log 2\pi e

    Parameters
    ----------
    nats : Tensor or float
        L, for the whole example (not per dimension).
    d : int
        Number of dimensions.

    Returns
    -------
    Tensor or float, like ``nats``

    Equations: swiss.bound_bits

    References
    ----------
    .. [1] Sohl-Dickstein et al., 2015, arXiv:1503.03585, Table 1.
    """
    return (checks.integer("d", d, 1) / 2 * math.log(2 * math.pi * math.e) - nats) / math.log(2)


def _are_all(t, T):
    """Whether t is 1, 2, ..., T; only the shape is read on an accelerator."""
    return t.shape == (T,) and (t.device.type != "cpu" or torch.equal(t, torch.arange(1, T + 1)))
