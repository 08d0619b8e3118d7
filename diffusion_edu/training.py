"""The training loop: one generator of losses, the same for points on a laptop and images on an accelerator."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from . import checks
from .bits import dequantize
from .kernel_model import kernel_loss
from .losses import TARGETS, denoising_loss
from .process import VE, TableVP
from .schedules import geometric_sigmas
from .vae import VAE, vae_elbo


def own_times(process, n, generator=None):
    """The process's own draw of training times: uniform on a table and on the VP processes."""
    return process.sample_t(n, generator)


MOST = {"n_steps": 10**9, "batch_size": 10**9, "seed": 2**63 - 1}  # beyond it is a slip, or no seed of torch


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes
    ----------
    n_steps : int
        Optimiser steps.
    batch_size : int
        Examples a step, drawn with replacement.
    lr : float
        Peak learning rate of Adam, reached after 2 % of the steps.
    schedule : {"cosine", "constant"}
        What the rate does then: fall as a half cosine to 0, or stay.
    seed : int
        Draws indices, times, noise and dropped labels, on the CPU whatever the device.
    p_drop : float
        Probability that an example's condition is withheld, for classifier-free guidance.
    target : {"eps", "x0", "v", "score"}
        What the loss compares.
    weight : function (process, t) -> Tensor, or None
        Loss weight.
    sample_t : function (process, n, generator) -> Tensor, shape (n,)
        Draws the training times.
    loss : function (model, x0, t, eps, **cond) -> Tensor, shape (B,), or None
        Another loss than `denoising_loss`, such as `elbo.hybrid_loss`; ``target`` and ``weight`` are then not used.
    augment : function (x0, generator) -> Tensor like x0, or None
        Changes each batch afresh, such as `dequantized`.
    """

    n_steps: int
    batch_size: int = 256
    lr: float = 2e-3
    schedule: str = "cosine"
    seed: int = 0
    p_drop: float = 0.0
    target: str = "eps"
    weight: Callable | None = None
    sample_t: Callable = own_times
    loss: Callable | None = None
    augment: Callable | None = None

    def __post_init__(self):
        for name, low in (("n_steps", 0), ("batch_size", 1), ("seed", 0)):
            checks.integer(name, checks.integer(name, getattr(self, name), low), high=MOST[name])
        checks.real("lr", self.lr, low=0)
        checks.one_of("schedule", self.schedule, ("cosine", "constant"))
        checks.real("p_drop", self.p_drop, low=0, high=1)
        checks.one_of("target", self.target, TARGETS)
        if self.weight is not None:
            checks.function("weight", self.weight, "lambda process, t: process.log_snr(t).exp()")
        checks.function("sample_t", self.sample_t, "log_normal_times(-1.2, 1.2)")
        if self.loss is not None:
            checks.function("loss", self.loss, "hybrid_loss")
        if self.augment is not None:
            checks.function("augment", self.augment, "dequantized(17)")


def fit(model, x0, recipe, *, ema=None, **cond):
    """Train a model on data; yields the loss of each step.

    Parameters
    ----------
    model : Model
        Trained in place. It is in train mode between the steps and gets its mode back in the end.
    x0 : Tensor, shape (N, *D)
        All the data, on the model's device.
    recipe : Recipe
    ema : AveragedModel or None
        Made by `averaged`; updated after every step.
    **cond : Tensor
        Conditions with leading N, such as ``y``.

    Yields
    ------
    float
        Mean loss of the batch, before its step.

    Raises
    ------
    FloatingPointError
        If a loss is not finite: names the step and the parameter; the step is not taken.

    Equations: ddpm.train_alg1, ddpm.train_code, ncsn.train, cfg.dropout, cfg.train

    References
    ----------
    .. [1] Ho et al., 2020, arXiv:2006.11239, algorithm 1; Ho and Salimans, 2022, arXiv:2207.12598, algorithm 1, for
       ``p_drop``.
    """
    check_data(x0, cond)
    generator, n = torch.Generator().manual_seed(recipe.seed), recipe.batch_size

    def loss():
        i = torch.randint(len(x0), (n,), generator=generator).to(x0.device)
        return batch_loss(model, recipe, draw_batch(model.process, recipe, generator, x0[i], **_rows(cond, i))).mean()

    return descend(model, loss, recipe, ema)


def _rows(cond, i):
    return {name: value[i] for name, value in cond.items()}


def draw_batch(process, recipe, generator, x0, **cond):
    """All that is random about a batch of examples: a dict of tensors with leading B, for `batch_loss`.

    Times, noise, the conditions to be dropped and the augmentation are drawn on the CPU, in this order.
    """
    t = recipe.sample_t(process, len(x0), generator).to(x0.device)
    eps = torch.randn(x0.shape, generator=generator).to(x0)
    batch = {"t": t, "eps": eps, **cond}
    if recipe.p_drop:
        batch["drop"] = (torch.rand(len(x0), generator=generator) < recipe.p_drop).to(x0.device)
    return batch | {"x0": x0 if recipe.augment is None else recipe.augment(x0, generator)}


def batch_loss(model, recipe, batch):
    """The recipe's loss of each example of a drawn batch, shape (B,)."""
    example_loss = recipe.loss or partial(denoising_loss, target=recipe.target, weight=recipe.weight)
    return example_loss(model, **batch)


def fit_vae(model, x, recipe, *, beta=1.0, ema=None):
    r"""Train a VAE, or an HVAE, by its bound; yields minus the ELBO of each batch, in nats per dimension of x.

    .. math:: \max_{\theta, \phi} E_{q_\phi}\Big[\log\frac{p_\theta(x, z)}{q_\phi(z \mid x)}\Big]

    Parameters
    ----------
    model : VAE or HVAE
        Trained in place: a VAE with the exact divergence to the prior, an HVAE by the log ratio of one draw.
    x : Tensor, shape (N, *D)
        All the data.
    recipe : Recipe
        ``p_drop``, ``target``, ``weight``, ``sample_t`` and ``loss`` play no part.
    beta : float
        Weight of the divergence, for a VAE.
    ema : AveragedModel or None

    Equations: vae.elbo, hvae.elbo
    """
    check_data(x, {})
    if beta != 1 and not isinstance(model, VAE):
        checks.fail("beta", "be 1 for an HVAE of several levels", beta)
    generator, n = torch.Generator().manual_seed(recipe.seed), recipe.batch_size

    def noise(z):
        return torch.randn(z.shape, generator=generator).to(z)

    def loss():
        batch = x[torch.randint(len(x), (n,), generator=generator).to(x.device)]
        bound = vae_elbo(model, batch, noise, beta=beta) if isinstance(model, VAE) else model.elbo(batch, noise)
        return -bound.mean() / batch[0].numel()

    return descend(model, loss, recipe, ema)


def fit_classifier(net, x, y, recipe):
    """Train a classifier by cross-entropy, on images with a little noise; yields the loss of each step, in nats.

    Parameters
    ----------
    net : nn.Module
        Maps (B, *D) to logits (B, n_classes).
    x : Tensor, shape (N, *D)
    y : Tensor, shape (N,), int64
    recipe : Recipe
        ``p_drop``, ``target``, ``weight`` and ``sample_t`` play no part.
    """
    check_data(x, {"y": y})
    generator, n = torch.Generator().manual_seed(recipe.seed), recipe.batch_size

    def loss():
        i = torch.randint(len(x), (n,), generator=generator).to(x.device)
        noise = torch.randn(n, *x.shape[1:], generator=generator).to(x)
        return cross_entropy(net(x[i] + 0.2 * noise), y[i])

    return descend(net, loss, recipe)


def fit_heads(model, x0, recipe):
    r"""Train all heads of a `KernelModel` at once; yields the loss of each step, in nats, summed over t = 2..T.

    .. math:: \min_\theta \sum_{t=2}^T E\, D_{KL}\big(q(x_{t-1} \mid x_t, x_0)\,\|\,p_\theta(x_{t-1} \mid x_t)\big)

    The same minimum as for one t drawn from 2..T a batch, without that draw's noise in the gradient.

    Parameters
    ----------
    model : KernelModel
        Trained in place.
    x0 : Tensor, shape (N, D)
        All the data.
    recipe : Recipe
        ``batch_size`` examples for each head; ``p_drop``, ``target``, ``weight`` and ``sample_t`` play no part.

    Equations: swiss.train

    References
    ----------
    .. [1] Sohl-Dickstein et al., 2015, arXiv:1503.03585, Eq. 13-14.
    """
    check_data(x0, {})
    generator, n = torch.Generator().manual_seed(recipe.seed), recipe.batch_size
    T = model.process.T
    t = torch.arange(1, T + 1, device=x0.device)

    def loss():
        i = torch.randint(len(x0), (T, n), generator=generator).to(x0.device)
        eps = torch.randn(T, n, x0.shape[1], generator=generator).to(x0)
        return kernel_loss(model, x0[i], t, eps)[1:].mean(1).sum()

    return descend(model, loss, recipe)


def descend(model, loss, recipe, ema=None):
    """Adam on a random loss: the loop under `fit`. ``loss()`` draws a batch and returns its mean loss, 0-d."""
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr, fused=True)
    modes = [(module, module.training) for module in model.modules()]
    try:
        for step in range(recipe.n_steps):
            model.train()  # whoever watches may have called eval()
            batch_loss = loss()
            optimizer.zero_grad()
            batch_loss.backward()
            value = batch_loss.item()
            if not math.isfinite(value):
                raise FloatingPointError(f"loss is {value} at step {step}; {first_bad(model)}")
            optimizer.param_groups[0]["lr"] = recipe.lr * learning_rate(step, recipe)
            optimizer.step()
            if ema is not None:
                ema.update_parameters(model)
            yield value
    finally:
        for module, mode in modes:
            module.training = mode


def check_data(x0, cond):
    """Data of at least one example, and conditions with a row for each."""
    if not len(checks.floating("x0", x0)):
        checks.fail("x0", "hold at least one example", "an empty tensor")
    if x0.ndim == 4 and x0.abs().max() > 2:
        low, high = x0.min().item(), x0.max().item()
        warnings.warn(f"images must lie in about [-1, 1]; got {low:g} to {high:g}", stacklevel=3)
    for name, value in cond.items():
        if len(value) != len(x0):
            checks.fail(name, f"have {len(x0)} rows, like x0", len(value))


def learning_rate(step, recipe):
    """Share of the peak rate: a linear rise over the first 2 % of the steps, then a half cosine to 0, or constant."""
    rise = max(1, recipe.n_steps // 50)
    if step < rise:
        return (step + 1) / rise
    if recipe.schedule == "constant":
        return 1.0
    return 0.5 + 0.5 * math.cos(math.pi * (step - rise) / (recipe.n_steps - rise))


def first_bad(model):
    """Says which parameter is the first that is not finite; if none, which gradient."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"parameter {name} is not finite"
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all():
            return f"the gradient of {name} is not finite"
    return "all parameters and gradients are finite"


def averaged(model, decay=0.999):
    r"""A copy of the model whose weights are an exponential moving average; its ``.module`` is a model.

    .. math:: \theta_{ema} \leftarrow \rho\,\theta_{ema} + (1 - \rho)\,\theta

    The first update copies the weights, so the average forgets the random start only after some 1 / (1 - decay)
    steps: keep that well below the number of steps.

    Parameters
    ----------
    model : nn.Module
    decay : float
        rho, in [0, 1).

    Returns
    -------
    AveragedModel
        For ``fit(..., ema=...)``.

    Equations: ddpm.ema

    References
    ----------
    .. [1] Ho et al., 2020, arXiv:2006.11239, appendix B.
    """
    if checks.real("decay", decay, low=0, high=1) == 1:
        checks.fail("decay", "be in [0, 1)", decay)
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)).eval()


def power_averaged(model, gamma=6.94):
    r"""An average of all weights so far, with shares that grow as a power of the step: `averaged` without a time scale.

    .. math:: \theta_\gamma(t) = \beta(t)\,\theta_\gamma(t - 1) + (1 - \beta(t))\,\theta(t), \qquad
              \beta(t) = \Big(1 - \frac1t\Big)^{\gamma + 1}

    beta(1) = 0, so the random start is forgotten at once; the average is about a fixed share of the run wide.

    Parameters
    ----------
    model : nn.Module
    gamma : float
        Above -1; 6.94 makes the average 10 % of the run wide, 16.97 makes it 5 %.

    Returns
    -------
    AveragedModel
        For ``fit(..., ema=...)``.

    Equations: edm2.ema_and_mp

    References
    ----------
    .. [1] Karras et al., 2024, arXiv:2312.02696, Eq. 127 and section 3.1.
    """
    checks.real("gamma", gamma, -1, open_low=True)

    def update(averages, weights, n_averaged):
        # AveragedModel copies the weights at its first update, and calls this from the second on.
        beta = (1 - 1 / (n_averaged.item() + 1)) ** (gamma + 1)
        torch._foreach_lerp_(averages, weights, 1 - beta)

    return AveragedModel(model, multi_avg_fn=update).eval()


def log_normal_times(mean=-1.2, std=1.2):
    r"""Training times whose noise-to-signal ratio is log-normal, for any process (rounded on a table).

    .. math:: \log\frac{\mathrm{std}(t)}{\mathrm{scale}(t)} \sim \mathcal N(m, s^2)

    Draws beyond the process's last time are moved to it.

    Parameters
    ----------
    mean, std : float
        m and s; EDM's are -1.2 and 1.2 for images.

    Returns
    -------
    function (process, n, generator) -> Tensor, shape (n,), float64
        For ``Recipe(sample_t=...)``.

    References
    ----------
    .. [1] Karras et al., 2022, arXiv:2206.00364, Table 1.
    """
    checks.real("mean", mean)
    checks.real("std", std, low=0)

    def sample_t(process, n, generator=None):
        log_sigma = mean + std * torch.randn(n, generator=generator, dtype=torch.float64)
        lowest = process.log_snr(torch.tensor(process.T, dtype=process.time_dtype))
        log_snr = (-2 * log_sigma).to(lowest.device).maximum(lowest)  # tables may live on an accelerator
        t = process.time_of(log_snr).clamp(max=process.T)
        return t.round().clamp(min=1).long() if process.discrete else t

    return sample_t


def level_times(n, sigma_min=0.01, sigma_max=1.0):
    r"""Training times of NCSN: one of n geometric noise levels, each as likely as the others.

    .. math:: i \sim U\{1..n\}, \qquad \sigma_1 = \sigma_{max} > \dots > \sigma_n = \sigma_{min}

    Parameters
    ----------
    n : int
    sigma_min, sigma_max : float

    Returns
    -------
    function (process, n, generator) -> Tensor, shape (n,), float64
        For ``Recipe(sample_t=...)`` on `VE`, where time is the noise level; refuses other processes.

    Equations: ncsn.train, ncsn.objective

    References
    ----------
    .. [1] Song and Ermon, 2019, arXiv:1907.05600, Eq. 6.
    """
    sigmas = geometric_sigmas(n, sigma_min, sigma_max)[:-1]

    def sample_t(process, n, generator=None):
        if not isinstance(process, VE):
            checks.fail("process", "be VE, whose time is the noise level", type(process).__name__, TypeError)
        return sigmas[torch.randint(len(sigmas), (n,), generator=generator)]

    return sample_t


def level_between(process, n, generator=None):
    r"""Training times between the entries of a table: WaveGrad's continuous noise level.

    .. math:: s \sim U\{1..T\}, \qquad \sqrt{\bar\alpha} \sim U\big(\sqrt{\bar\alpha_s}, \sqrt{\bar\alpha_{s-1}}\big)

    A network trained so can be sampled on any schedule. For ``Recipe(sample_t=level_between)`` on a table joined up,
    ``DiscreteVP(beta).continuous()``.

    Equations: ref.wavegrad_level

    References
    ----------
    .. [1] Chen et al., "WaveGrad", 2020, arXiv:2009.00713, section 2.3.
    """
    if not isinstance(process, TableVP):
        checks.fail("process", "be a table joined up, DiscreteVP(beta).continuous()", type(process).__name__, TypeError)
    device = next(process.buffers()).device
    s = torch.randint(1, process.T + 1, (n,), generator=generator).double().to(device)
    share = torch.rand(n, generator=generator, dtype=torch.float64).to(device)
    scale, before = process.marginal(s)[0], process.marginal(s - 1)[0]
    scale = scale + (before - scale) * share
    return process.time_of(2 * scale.log() - torch.log1p(-(scale**2))).clamp(max=process.T)


def dequantized(levels):
    """Grey levels spread over their bins, afresh in every batch: for ``Recipe(augment=...)``, to train a density."""
    checks.integer("levels", levels, 2)
    return lambda x0, generator: dequantize(x0, levels, torch.rand(x0.shape, generator=generator).to(x0))


def flipped():
    """Half of the images mirrored, left for right: for ``Recipe(augment=...)``."""

    def augment(x0, generator):
        mirrored = torch.rand(len(x0), generator=generator).to(x0.device) < 0.5
        return torch.where(mirrored[:, None, None, None], x0.flip(-1), x0)

    return augment
