r"""The variational bound of a diffusion model: its terms, its two forms, and losses made from it.

All of it is an upper bound on -log p(x_0), in nats, summed over the dimensions of each example (the lectures' L). The
model p is a step with a Gaussian kernel, as a sampler uses it: ``bound_terms(make_ddpm_step(beta), model, x0, times,
noise)`` walks down the same times as ``sample(make_ddpm_step(beta), model, x_T, times, noise)``. The prior is N(0, I).
"""

from dataclasses import replace
from itertools import pairwise

import torch

from . import checks
from .bits import log_likelihood
from .gaussian import normal_entropy, normal_kl, normal_log_prob
from .guidance import bind
from .process import check_decreasing, check_whole, expand, jump, posterior, q_sample, terminal_kl
from .samplers import KernelStep, evaluating, learned, make_ddpm_step


def bound_term(step, model, x0, t, s, eps, levels=None, **cond):
    r"""One term of the bound for each example: what the step from t to s costs.

    .. math:: L_{t-1} = D_{KL}\big(q(x_{t-1} \mid x_t, x_0)\,\|\,p_\theta(x_{t-1} \mid x_t)\big) \ (s > 0), \qquad
              L_0 = -\log p_\theta(x_0 \mid x_1) \ (s = 0)

    at x_t = scale x_0 + std eps. Its mean over eps is DDPM's L_{t-1}; strides are as exact as single steps.

    Parameters
    ----------
    step : KernelStep
        Says mean and sigma of p(x_s | x_t), for example ``make_ddpm_step(beta)``.
    model : Model
    x0, eps : Tensor, shape (B, *D)
        Clean data, and standard normal noise of the same shape.
    t, s : Tensor, 0-d or shape (B,)
        Times, 0 <= s < t <= T.
    levels : int or None
        None: p(x_0 | x_t) is a density. Otherwise x0 holds this many grey levels, and it is their probability.
    **cond : Tensor
        Conditions with leading B, passed to the model.

    Returns
    -------
    Tensor, shape (B,)

    Raises
    ------
    TypeError, ValueError
        If the step has no Gaussian kernel, or its variance is 0: then the bound is infinite.

    Equations: elbo.L_t, elbo.L_0, elbo.mean_match

    References
    ----------
    .. [1] Ho et al., 2020, arXiv:2006.11239, Eq. 5 and 8.
    """
    x_t = q_sample(model.process, x0, t, eps)
    if cond:
        model = bind(model, **cond)
    mean, sigma = _kernel(step, model, x_t, t, s)
    mean_q, sigma_q = posterior(model.process, x0, x_t, t, s)
    last, var = s == 0, sigma**2
    var_q = torch.where(expand(last, x0) == 1, var, sigma_q**2)  # the posterior at s = 0 is a point: any var will do
    kl = normal_kl(mean_q, var_q, mean, var).flatten(1).sum(1)
    if s.device.type == "cpu" and not last.any():
        return kl
    return torch.where(last, -log_likelihood(x0, mean, sigma, levels), kl)


@torch.no_grad()
def bound_terms(step, model, x0, times, noise, levels=None):
    r"""All the terms of the bound, one after the other; their sum bounds -log p(x_0).

    .. math:: L = \underbrace{D_{KL}(q(x_T \mid x_0)\,\|\,p(x_T))}_{L_T} + \sum_{t=2}^{T} L_{t-1} + L_0

    Parameters
    ----------
    step, model, x0, levels : as in `bound_term`
        Bind conditions first (`guidance.bind`). The process must end in N(0, I), as the variance-preserving ones do.
    times : Tensor, shape (n + 1,)
        Decreasing, from T to 0: ``process.grid(n)``. On all T steps of a table it is the lecture's bound.
    noise : function x -> Tensor like x
        For example ``noises(seed)``; each term gets fresh noise.

    Yields
    ------
    Tensor, shape (B,)
        n + 1 terms: L_T, then the term of each step down the times, L_0 the last.

    Equations: elbo.bound, elbo.form2, elbo.total

    References
    ----------
    .. [1] Ho et al., 2020, arXiv:2006.11239, Eq. 5.
    """
    times = _whole(model.process, times)
    checks.function("noise", noise, "noises(seed)")
    yield terminal_kl(model.process, x0)
    for t, s in pairwise(times):
        yield evaluating(model, lambda *now: bound_term(step, *now, levels), x0, t, s, noise(x0))


def noising_path(process, x0, times, noise):
    r"""One trajectory of the forward chain, x_s -> x_t at neighbouring times, drawn jointly.

    .. math:: q(x_{1:T} \mid x_0) = \prod_{t=1}^T q(x_t \mid x_{t-1})

    Parameters
    ----------
    process : Process
    x0 : Tensor, shape (B, *D)
    times : Tensor, shape (n + 1,)
        Decreasing times that end in 0.
    noise : function x -> Tensor like x

    Returns
    -------
    list of n + 1 Tensors, shape (B, *D)
        x at each of the times; the last is x0.

    Equations: fwd.joint
    """
    path = [checks.floating("x0", x0)]
    times = check_decreasing(process.check_times(times, "times"))
    if times[-1] != 0:
        checks.fail("times", "end in 0, where x0 lives", f"{times[-1].item():g}")
    checks.function("noise", noise, "noises(seed)")
    for s, t in pairwise(times.flip(0)):
        scale, std = (expand(c, x0) for c in jump(process, t, s))
        path.append(scale * path[-1] + std * checks.same_shape("noise(x)", noise(x0), "x", x0))
    return path[::-1]


@torch.no_grad()
def log_ratio_bound(step, model, path, times):
    r"""The bound as the log ratio on one trajectory: the first form, before any KL divergence is taken.

    .. math:: \log\frac{q(x_{1:T} \mid x_0)}{p_\theta(x_{0:T})}
              = -\log p(x_T) - \sum_{t=1}^T \log\frac{p_\theta(x_{t-1} \mid x_t)}{q(x_t \mid x_{t-1})}

    Its mean over trajectories is that of `bound_terms`. If p is exact it is -log p(x_0) on every trajectory. The
    printed form with a KL divergence between q(x_t | x_{t-1}) and p(x_t | x_{t+1}) is not the bound.

    Parameters
    ----------
    step, model : as in `bound_term`
    path : list of n + 1 Tensors, shape (B, *D)
        From `noising_path`, at the times.
    times : Tensor, shape (n + 1,)
        Decreasing, from T to 0.

    Returns
    -------
    Tensor, shape (B,)

    Equations: elbo.form1

    References
    ----------
    .. [1] Ho et al., 2020, arXiv:2006.11239, Eq. 3; Luo, 2022, arXiv:2208.11970, Eq. 42-44.
    """
    times = _whole(model.process, times)
    if len(path) != len(times):
        checks.fail("path", f"have an entry for each of the {len(times)} times", len(path))
    nats = -normal_log_prob(path[0], 0.0, 1.0)
    for (t, s), (x_t, x_s) in zip(pairwise(times), pairwise(path), strict=True):
        mean, sigma = evaluating(model, lambda model, *now: _kernel(step, model, *now), x_t, t, s)
        scale, std = (expand(c, x_s) for c in jump(model.process, t, s))
        nats = nats + normal_log_prob(x_t, scale * x_s, std**2) - normal_log_prob(x_s, mean, sigma**2)
    return nats


def continuous_term(model, x0, log_snr, eps, weight=None, **cond):
    r"""The bound in continuous time, as an integrand over the log SNR.

    .. math:: L_\infty = \int_{\lambda_{min}}^{\lambda_{max}} E\,\tfrac12\, w(\lambda)\,
              \|\epsilon - \hat\epsilon_\theta(x_\lambda, \lambda)\|^2\, d\lambda

    The schedule has dropped out: only the ends count. w = 1 is the bound; other increasing-with-noise weights bound
    the likelihood of noised data. The integral stands for the sum of L_{t-1}; L_T and L_0 are added as ever.

    Parameters
    ----------
    model : Model
        On a process in continuous time, or on a table (read between its integers).
    x0, eps : Tensor, shape (B, *D)
    log_snr : Tensor, 0-d or shape (B,)
        lambda, within the process's range.
    weight : function lambda -> Tensor, or None
    **cond : Tensor

    Returns
    -------
    Tensor, shape (B,)
        Nats per unit of lambda, summed over the dimensions.

    Equations: elbo.continuous

    References
    ----------
    .. [1] Kingma et al., 2021, arXiv:2107.00630, Eq. 18; Kingma and Gao, 2023, arXiv:2303.00848.
    """
    process = model.process.continuous()
    log_snr = checks.batch_of_times("log_snr", checks.floating("log_snr", log_snr), len(x0)).double()
    t = process.time_of(log_snr).clamp(max=process.T)  # the inverse rounds
    if t.device.type == "cpu" and not torch.allclose(process.log_snr(t), log_snr, rtol=1e-6, atol=1e-6):
        checks.fail("log_snr", f"be one that {type(process).__name__} passes through", log_snr.flatten()[:8].tolist())
    error = eps - model(q_sample(process, x0, t, eps), t, **cond).eps
    nats = (error**2).flatten(1).sum(1) / 2
    return nats if weight is None else weight(log_snr).to(nats) * nats


def hybrid_loss(model, x0, t, eps, vlb_weight=1e-3, levels=None, **cond):
    r"""L_simple for the mean, and a little of the bound for a learned variance.

    .. math:: L_{hybrid} = L_{simple} + \lambda\, L_{vlb}(\mathrm{sg}[\mu_\theta], \Sigma_\theta), \qquad
              L_{vlb} = \frac{T}{D}\,L_{t-1} \text{ at one random } t \in 1..T

    sg stops the gradient: the bound does not touch the mean. One call of the network.

    Parameters
    ----------
    model : Model
        With a learned variance, on a table: ``Denoiser(..., learned_variance=True)``.
    x0, eps : Tensor, shape (B, *D)
    t : Tensor of int64, shape (B,)
        Uniform on 1..T.
    vlb_weight : float
        lambda; 0.001 leaves L_simple in charge.
    levels : int or None
        As in `bound_term`.
    **cond : Tensor

    Returns
    -------
    Tensor, shape (B,)
        Per dimension: squared error, plus lambda times nats.

    Raises
    ------
    TypeError, ValueError
        If the process is not a table, or the model predicts no variance.

    Equations: lv.hybrid

    References
    ----------
    .. [1] Nichol and Dhariwal, 2021, arXiv:2102.09672, Eq. 16.
    """
    checks.times_in("t", t, 1, _table(model.process).T, discrete=True)
    pred = model(q_sample(model.process, x0, t, eps), t, **cond)
    simple = ((eps - pred.eps) ** 2).flatten(1).mean(1)
    frozen = _Answer(model.process, replace(pred, x0=pred.x0.detach(), eps=pred.eps.detach()))
    vlb = model.process.T * bound_term(make_ddpm_step(learned), frozen, x0, t, t - 1, eps, levels)
    return simple + checks.real("vlb_weight", vlb_weight, 0) * vlb / x0[0].numel()


class ImportanceTimes:
    r"""Random times drawn where the bound's terms are large, and the weights that keep the mean right.

    .. math:: L_{vlb} = E_{t \sim p}\Big[\frac{L_{t-1}}{p_t}\Big], \qquad p_t \propto \sqrt{E[L_{t-1}^2]}

    Uniform until every t has been seen ``history`` times; then by the last ``history`` values of each t. Terms that do
    not vary (and are not negative) are then summed without error, but for the share ``uniform``.

    Parameters
    ----------
    T : int
        Times are 1..T.
    history : int
        How many values of each term are kept.
    uniform : float
        Share of the draws that stay uniform, so that no term is forgotten.

    Equations: lv.importance

    References
    ----------
    .. [1] Nichol and Dhariwal, 2021, arXiv:2102.09672, Eq. 18.
    """

    def __init__(self, T, history=10, uniform=1e-3):
        self.T, self.history = checks.integer("T", T, 1), checks.integer("history", history, 1)
        self.uniform = checks.real("uniform", uniform, 0, 1)
        self.losses = torch.zeros(self.T, self.history, dtype=torch.float64)
        self.seen = torch.zeros(self.T, dtype=torch.int64)

    @property
    def p(self):
        """Probability of each time, shape (T,): entry t - 1 belongs to t."""
        if (self.seen < self.history).any():
            return torch.full((self.T,), 1 / self.T, dtype=torch.float64)
        root = (self.losses**2).mean(1).sqrt()
        p = root / root.sum() if root.sum() > 0 else torch.full_like(root, 1 / self.T)
        return (1 - self.uniform) * p + self.uniform / self.T

    def draw(self, n, generator=None):
        """(t, weight), each (n,): times, and 1 / p_t, so that the mean of weight * L_{t-1} is their sum over t."""
        p = self.p
        i = torch.multinomial(p, checks.integer("n", n, 1), replacement=True, generator=generator)
        return i + 1, 1 / p[i]

    def update(self, t, losses):
        """Note the terms L_{t-1} (B,) seen at the times t (B,)."""
        checks.times_in("t", t, 1, self.T, discrete=True)
        if t.ndim != 1 or losses.shape != t.shape:
            checks.fail("losses", f"have the shape of t, {tuple(t.shape)}, 1-D", tuple(losses.shape))
        if not losses.isfinite().all():
            checks.fail("losses", "be finite", losses.tolist()[:8])
        for i, loss in zip((t - 1).tolist(), losses.detach().double().tolist(), strict=True):
            self.losses[i, self.seen[i] % self.history] = loss
            self.seen[i] += 1


def entropy_bound(kl_terms, process, d):
    r"""The lower bound on E log p(x_0) as it was written in 2015, with entropies.

    .. math:: K = -\sum_{t=2}^T L_{t-1} + H_q(X_T \mid X_0) - H_q(X_1 \mid X_0) - H_p(X_T)

    It stands for the model whose last step is the forward kernel, p(x_0 | x_1) = N(sqrt(alpha_1) x_1, beta_1 I), on
    data of unit variance.

    Parameters
    ----------
    kl_terms : Tensor, shape (T - 1, ...)
        The divergences L_{t-1} for t = 2..T, in nats, summed over the d dimensions.
    process : DiscreteVP
    d : int

    Returns
    -------
    Tensor, shape (...)
        Nats.

    Equations: elbo.entropy_form

    References
    ----------
    .. [1] Sohl-Dickstein et al., 2015, arXiv:1503.03585, Eq. 14 and appendix B.
    """
    if len(kl_terms) != _table(process).T - 1:
        checks.fail("kl_terms", f"have T - 1 = {process.T - 1} rows", len(kl_terms))
    _, std = process.marginal(torch.tensor([1, process.T], device=kl_terms.device))
    entropy = normal_entropy(std**2, d)
    return -kl_terms.sum(0) + entropy[1] - entropy[0] - normal_entropy(1.0, d)


class _Answer:
    """A model that has answered already."""

    def __init__(self, process, pred):
        self.process, self.pred = process, pred

    def __call__(self, x_t, t):
        return self.pred


def _kernel(step, model, x_t, t, s):
    """Mean and sigma of p(x_s | x_t)."""
    if not isinstance(step, KernelStep):
        rule = "be a Gaussian step (KernelStep), such as make_ddpm_step(beta)"
        checks.fail("step", rule, checks.shown(step), TypeError)
    mean, sigma = step.kernel(model, x_t, t, s)
    rule = "have a variance above 0: without one the bound is infinite"
    if sigma is None:
        checks.fail("step", rule, "a deterministic step")
    if sigma.device.type == "cpu" and not (sigma > 0).all():
        checks.fail("step", rule, f"sigma = {sigma.min().item() + 0:g} on the way to s = {s.min().item():g}")
    return mean, sigma


def _whole(process, times):
    """Times that run from T to 0, of a process that ends in the prior."""
    times = check_whole(process, times)
    if process.marginal(times[0])[1] > 1 + 1e-6:
        checks.fail("model.process", "end in N(0, I), the prior of the bound", type(process).__name__)
    return times


def _table(process):
    """A process in steps t = 1..T."""
    if not process.discrete:
        checks.fail("process", "be a table (DiscreteVP)", type(process).__name__, TypeError)
    return process
