r"""Exact models of known data: what a perfect network would answer. No training, no approximation.

An oracle is a model like any other (``oracle(x_t, t) -> Prediction``), so every loss, sampler and guidance rule can be
checked against a closed form.
"""

import math

import torch
from torch import nn

from . import checks
from .prediction import Prediction
from .process import expand, posterior


class Oracle(nn.Module):
    """An exact model on a process; subclasses say what E[x0 | x_t] and E[eps | x_t] are."""

    def __init__(self, process):
        super().__init__()
        self.process = process

    def levels(self, x_t, t):
        """(scale, std), ready to multiply x_t."""
        checks.batch_of_times("t", t, len(checks.floating("x_t", x_t)))
        return [expand(c, x_t) for c in self.process.levels(t)]


class GaussianOracle(Oracle):
    r"""Data x_0 ~ N(mean, var), independent in each dimension.

    .. math:: v_t = a^2 s^2 + b^2, \quad E[\epsilon \mid x_t] = \frac{b\,(x_t - a m)}{v_t}, \quad
              E[x_0 \mid x_t] = m + \frac{a s^2}{v_t}(x_t - a m), \quad
              \mathrm{Var}[x_0 \mid x_t] = \frac{s^2 b^2}{v_t}

    with a = scale, b = std, m = mean, s^2 = var.

    Parameters
    ----------
    process : Process
    mean, var : Tensor or float
        Broadcastable to the data's shape *D; var > 0.

    Equations: gt.gaussian
    """

    def __init__(self, process, mean=0.0, var=1.0):
        super().__init__(process)
        self.mean = torch.as_tensor(mean, dtype=torch.float64)
        self.var = torch.as_tensor(var, dtype=torch.float64)
        if not (self.var > 0).all():
            checks.fail("var", "be positive", var)

    def law(self, t):
        """(mean, variance) of q(x_t), each of shape *D, for a 0-d time."""
        if t.ndim:
            checks.fail("t", "be 0-d: one law for one time", tuple(t.shape))
        scale, std = self.process.levels(t)
        return scale * self.mean, scale**2 * self.var + std**2

    def var_x0(self, t):
        """Var[x0 | x_t], of shape *D, for a 0-d time."""
        _, std = self.process.levels(t)
        return self.var * std**2 / self.law(t)[1]

    def forward(self, x_t, t, **cond):
        a, b = self.levels(x_t, t)
        mean, var = self.mean.to(x_t), self.var.to(x_t)
        pull = (x_t - a * mean) / (a**2 * var + b**2)
        checks.same_shape("x_t", x_t, "the data's law applied to it", pull)
        return Prediction(x_t, a, b, mean + a * var * pull, b * pull)

    def log_prob(self, x, t):
        """log q_t(x) in nats, shape (B,), for one 0-d time."""
        mean, var = (c.to(x) for c in self.law(t))
        return -((x - mean) ** 2 / var + (2 * math.pi * var).log()).expand_as(x).flatten(1).sum(1) / 2

    def reverse_kernel(self, x_t, t, s):
        r"""Mean and standard deviation of the exact q(x_s | x_t), for s < t.

        .. math:: q(x_{t-1} \mid x_t) = \mathcal N\Big(\tilde\mu_t(x_t, E[x_0 \mid x_t]),\ \tilde\beta_t +
                  \Big(\frac{\sqrt{\bar\alpha_{t-1}}\beta_t}{1 - \bar\alpha_t}\Big)^2 \mathrm{Var}[x_0 \mid x_t]\Big)

        Equations: rev.true_conditional

        References
        ----------
        .. [1] Bao et al., "Analytic-DPM", 2022, arXiv:2201.06503, theorem 1.
        """
        mean, sigma = posterior(self.process, self(x_t, t).x0, x_t, t, s)
        gain, _ = posterior(self.process, torch.ones_like(x_t), torch.zeros_like(x_t), t, s)  # of x0 in the mean
        a, b = self.levels(x_t, t)
        var = self.var.to(x_t)
        return mean, (sigma**2 + gain**2 * var * b**2 / (a**2 * var + b**2)).sqrt()


class GaussianMixtureOracle(Oracle):
    r"""Data from a mixture of isotropic Gaussians; ``y`` (B,) asks for one component, ``drop`` takes the wish back.

    .. math:: q_t(x) = \sum_k w_k\,\mathcal N(x;\, a m_k,\, (a^2 s_k^2 + b^2) I), \qquad
              E[x_0 \mid x_t] = \sum_k q_t(k \mid x_t)\, E_k[x_0 \mid x_t]

    Parameters
    ----------
    process : Process
    means : Tensor, shape (K, D)
    stds : Tensor, shape (K,)
        Positive.
    weights : Tensor, shape (K,), or None
        Positive; normalised to sum 1. None means equal.

    Equations: gt.gmm
    """

    def __init__(self, process, means, stds, weights=None):
        super().__init__(process)
        self.means = torch.as_tensor(means, dtype=torch.float64)
        self.stds = torch.as_tensor(stds, dtype=torch.float64)
        weights = torch.ones(len(self.means)) if weights is None else weights
        weights = torch.as_tensor(weights, dtype=torch.float64)
        if self.means.ndim != 2 or self.stds.shape != weights.shape or len(weights) != len(self.means):
            shapes = [tuple(v.shape) for v in (self.means, self.stds, weights)]
            checks.fail("means, stds, weights", "have shapes (K, D), (K,), (K,)", shapes)
        if not (self.stds > 0).all() or not (weights > 0).all():
            checks.fail("stds, weights", "be positive", (self.stds.tolist(), weights.tolist()))
        self.log_weights = (weights / weights.sum()).log()

    def _components(self, x, t):
        """Log densities with weights (B, K), centred x (B, K, D), their variances (B, K, 1) or (K, 1), and a, b."""
        self.levels(x, t)  # checks both
        if x.shape[1:] != self.means.shape[1:]:
            checks.fail("x_t", f"have shape (B, {self.means.shape[1]})", tuple(x.shape))
        a, b = (expand(c, x[:, None]) for c in self.process.levels(t))
        centred = x[:, None] - a * self.means.to(x)
        var = a**2 * (self.stds.to(x) ** 2)[:, None] + b**2
        log_density = -((centred**2 / var + (2 * math.pi * var).log()).sum(-1)) / 2
        return log_density + self.log_weights.to(x), centred, var, a, b

    def forward(self, x_t, t, y=None, drop=None):
        log_joint, centred, var, a, b = self._components(x_t, t)
        if y is not None:
            checks.labels("y", y, len(x_t), len(self.means))
            others = torch.arange(len(self.means), device=y.device) != y[:, None]
            if drop is not None:
                others = others & ~drop[:, None]
            log_joint = log_joint.masked_fill(others, -math.inf)
        share = log_joint.softmax(1)[..., None]
        pull = centred / var
        x0 = (share * (self.means.to(x_t) + a * (self.stds.to(x_t) ** 2)[:, None] * pull)).sum(1)
        scale, std = self.levels(x_t, t)
        return Prediction(x_t, scale, std, x0, (share * b * pull).sum(1))

    def log_prob(self, x, t):
        """log q_t(x) in nats, shape (B,)."""
        return self._components(x, t)[0].logsumexp(1)

    def class_log_prob(self, x, t):
        """log q_t(k | x), shape (B, K): the exact noise-aware classifier."""
        return self._components(x, t)[0].log_softmax(1)

    def tempered_log_density(self, x, t, y, w):
        r"""What guidance with scale w aims at, at one time, up to a constant; shape (B,), nats.

        .. math:: \log q_t(x) + w \log q_t(y \mid x), \qquad
                  \nabla_x = \nabla\log q_t(x) + w\,\nabla\log q_t(y \mid x)

        Its gradient is the guided score exactly. But the densities at different t are not one diffusion of the one at
        t = 0, so a guided sampler does not end in it.

        Parameters
        ----------
        x : Tensor, shape (B, D)
        t : Tensor, 0-d or shape (B,)
        y : Tensor, shape (B,), int64
        w : float
            At least 0.

        Equations: cg.tempered, cfg.tempered
        """
        w = checks.real("w", w, 0)
        log_joint = self._components(x, t)[0]
        checks.labels("y", y, len(x), len(self.means))
        return log_joint.logsumexp(1) + w * log_joint.log_softmax(1).gather(1, y[:, None])[:, 0]

    def sample(self, n, generator=None):
        """n clean points (n, D) in float64 and the component (n,) each came from."""
        k = torch.multinomial(self.log_weights.exp(), max(checks.integer("n", n, 0), 1), True, generator=generator)[:n]
        eps = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        return self.means[k] + self.stds[k, None] * eps, k


class DatasetOracle(Oracle):
    r"""Data that are exactly the given points: the model that has learned its training set by heart.

    .. math:: E[x_0 \mid x_t] = \sum_i \mathrm{softmax}_i\Big(-\frac{\|x_t - a x^{(i)}\|^2}{2 b^2}\Big)\, x^{(i)}

    Parameters
    ----------
    process : Process
    data : Tensor, shape (N, *D)
    """

    def __init__(self, process, data):
        super().__init__(process)
        self.data = checks.floating("data", data)
        if not len(data):
            checks.fail("data", "hold at least one point", "0")

    def forward(self, x_t, t, **cond):
        a, b = self.levels(x_t, t)
        data = self.data.to(x_t).flatten(1)
        flat_a, flat_b = (c.flatten(1) if c.ndim else c for c in (a, b))
        # |x - a x_i|^2 without |x|^2, which is the same for all i.
        logits = (flat_a * x_t.flatten(1) @ data.T - flat_a**2 * (data**2).sum(1) / 2) / flat_b**2
        x0 = (logits.softmax(1) @ data).reshape(x_t.shape)
        return Prediction.from_x0(x_t, a, b, x0)
