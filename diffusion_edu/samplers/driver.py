"""The only sampling loop, and where its noise comes from."""

from itertools import pairwise

import torch
from torch import nn

from .. import checks
from ..process import check_decreasing


@torch.no_grad()
def sample(step, model, x_T, times, noise=None):
    r"""Walk from x_T down the times, one step at a time.

    .. math:: x_T = x_{\tau_0} \to x_{\tau_1} \to \dots \to x_{\tau_n}, \qquad
              x_s = \mathrm{step}(\mathrm{model}, x_t, t, s, \mathrm{noise})

    No graph is kept. A model that is an ``nn.Module`` is evaluated in eval mode; its mode is restored before every
    yield, and after an error.

    Parameters
    ----------
    step : function (model, x_t, t, s, noise) -> x_s
    model : Model
    x_T : Tensor, shape (B, *D)
        The start, for example ``process.prior(shape, noise)``.
    times : Tensor, shape (n + 1,)
        Strictly decreasing times of ``model.process``, for example ``process.grid(n)``.
    noise : function x -> Tensor like x, or None
        For example ``noises(seed)``. A deterministic step needs none.

    Yields
    ------
    Tensor, shape (B, *D)
        x at times[1:]; ``*path, x0 = sample(...)``.

    Raises
    ------
    TypeError, ValueError
        If x_T or the times do not fit, or a stochastic step finds no noise.

    Equations: ddpm.sample_alg2
    """
    if not callable(step) or getattr(step, "__name__", "").startswith("make_"):
        checks.fail("step", "be a step, such as ddim_step or make_ddpm_step()", checks.shown(step), TypeError)
    check_model(model)
    x = checks.floating("x_T", x_T).detach()
    times = check_decreasing(model.process.check_times(times, "times"))
    noise = _no_noise if noise is None else checks.function("noise", noise, "noises(seed)")
    for t, s in pairwise(times):
        x = evaluating(model, step, x, t, s, noise)
        yield x


def check_model(model):
    """Something with a process."""
    if not hasattr(model, "process"):
        checks.fail("model", "have a process, as a Denoiser or an oracle does", checks.shown(model), TypeError)
    return model


def evaluating(model, function, *arguments):
    """``function(model, ...)`` in eval mode; each part of the model gets its own mode back, whatever happens."""
    training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        return function(model, *arguments)
    finally:
        for module in training:
            module.training = True


def _no_noise(x):
    checks.fail("noise", "be given to a stochastic step, for example noises(seed)", "None")


class KernelStep:
    r"""A step that draws from a Gaussian kernel, x_s = mean + sigma z.

    .. math:: p(x_s \mid x_t) = \mathcal N(\mu(x_t, t, s),\ \sigma(x_t, t, s)^2 I)

    Parameters
    ----------
    kernel : function (model, x_t, t, s) -> (mean, sigma)
        ``sigma`` broadcasts against ``mean``; None means 0, and no noise is drawn.
    draws_last : bool
        Whether noise is drawn at the last step, s = 0. If not, sigma is there the decoder's, of p(x_0 | x_t): part of
        the model and of its likelihood, but a sample is its mean.
    """

    def __init__(self, kernel, draws_last=True):
        self.kernel, self.draws_last = kernel, draws_last

    def __call__(self, model, x_t, t, s, noise):
        mean, sigma = self.kernel(model, x_t, t, s)
        if sigma is None or (s == 0 and not self.draws_last):
            return mean
        checks.function("noise", noise, "noises(seed)")
        return mean + sigma * checks.same_shape("noise(x)", noise(mean), "x", mean)


def noises(seed):
    """A noise source: ``noise(x)`` is standard normal, like x, fresh at every call, the same for the same seed.

    The numbers come from one generator on x's device: fast, but they depend on the batch size and the device.
    """
    seed = checks.integer("seed", seed)
    generators = {}

    def noise(x):
        if x.device not in generators:
            generators[x.device] = torch.Generator(x.device).manual_seed(seed)
        return torch.randn(x.shape, generator=generators[x.device], dtype=x.dtype, device=x.device)

    return noise


def noises_per_sample(seed, indices):
    """A noise source in which row i depends on ``(seed, indices[i])`` only.

    Sample 17 is then the same sample, to rounding, for any batch size, number of processes and device. Slower than
    `noises`: every row has its own generator, on the CPU.
    """
    seed = checks.integer("seed", seed, 0, 2**31 - 1)
    indices = [checks.integer("indices", int(i), 0, 2**31 - 1) for i in indices]
    generators = [torch.Generator().manual_seed(seed * 2**31 + i) for i in indices]

    def noise(x):
        if len(x) != len(generators):
            checks.fail("x", f"have one row for each of the {len(generators)} indices", f"{len(x)} rows")
        rows = [torch.randn(x.shape[1:], generator=g) for g in generators]
        return torch.stack(rows).to(x) if rows else torch.empty_like(x)

    return noise
