"""Langevin dynamics: walks that need nothing but a score."""

import torch

from .. import checks
from ..process import expand


@torch.no_grad()
def langevin(score, x, step_sizes, noise):
    r"""Unadjusted Langevin dynamics on one density; yields x after each step.

    .. math:: x \leftarrow x + \varepsilon_k\,\nabla\log p(x) + \sqrt{2\varepsilon_k}\, z

    A fixed step leaves a bias of order epsilon (on N(0, 1) the variance is 1 / (1 - epsilon / 2)); steps that shrink
    leave none, if their sum is infinite and that of their squares is not. In the notation of SGLD, delta = 2 epsilon:
    delta / 2 and sqrt(delta).

    Parameters
    ----------
    score : function (B, *D) -> (B, *D)
        Of the density itself; for a model at one noise level, ``lambda x: model(x, t).score``.
    x : Tensor, shape (B, *D)
        Where the walk begins.
    step_sizes : iterable of float
        epsilon_1, epsilon_2, ...: ``[0.01] * 1000``, or a generator.
    noise : function x -> Tensor like x

    Yields
    ------
    Tensor, shape (B, *D)

    Equations: langevin.step, langevin.sgld, langevin.convergence

    References
    ----------
    .. [1] Welling and Teh, "Bayesian Learning via Stochastic Gradient Langevin Dynamics", 2011.
    """
    checks.floating("x", x), checks.function("score", score, "lambda x: model(x, t).score")
    checks.function("noise", noise, "noises(seed)")
    if not hasattr(step_sizes, "__iter__"):
        checks.fail("step_sizes", "be iterable, such as [0.01] * 1000", checks.shown(step_sizes), TypeError)
    for epsilon in step_sizes:
        epsilon = checks.real("step_sizes", epsilon, 0, open_low=True)
        grad, z = (checks.same_shape(n, f(x), "x", x) for n, f in (("score(x)", score), ("noise(x)", noise)))
        x = x + epsilon * grad + (2 * epsilon) ** 0.5 * z
        yield x


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

    Equations: langevin.step, ncsn.annealed

    References
    ----------
    .. [1] Song and Ermon, 2019, arXiv:1907.05600, algorithm 1.
    """
    r = checks.real("r", r, 0, open_low=True)
    return _updates(lambda pred, z: r * pred.std**2, n_steps)


def make_corrector_step(snr=0.16, n_steps=1):
    r"""The corrector of the predictor-corrector samplers: Langevin, its step set by norms.

    .. math:: x \leftarrow x + \varepsilon\, s_\theta(x, t) + \sqrt{2\varepsilon}\, z, \qquad
              \varepsilon = 2 \Big(\frac{r\,\|z\|}{\|s_\theta(x, t)\|}\Big)^2

    with both norms averaged over the batch, so that the step hardly depends on the draw z that it scales: that takes
    many samples or many dimensions. (With ||z|| = sqrt(D) and ||s|| = sqrt(D) / std(t) it would be
    ``make_langevin_step(2 * r**2)``, in which no sample sees the others.) The paper's factor 1 - beta_t, nearly 1, is
    left out. For ``chain(reverse_diffusion_step, make_corrector_step(0.16))``.

    Parameters
    ----------
    snr : float
        r, positive.
    n_steps : int
        Updates at each time.

    Returns
    -------
    Step

    Equations: score.pc

    References
    ----------
    .. [1] Song et al., 2021, arXiv:2011.13456, algorithms 4-5.
    """
    r = checks.real("snr", snr, 0, open_low=True)

    def epsilon(pred, z):
        norm_z, norm_s = (v[:, None].flatten(1).norm(dim=1).mean() for v in (z, pred.score))
        return expand(2 * (r * norm_z / norm_s) ** 2, z)

    return _updates(epsilon, n_steps)


def _updates(step_size, n_steps):
    """The step that makes ``n_steps`` Langevin updates at t, with epsilon = step_size(prediction, noise)."""
    n_steps = checks.integer("n_steps", n_steps, 1)

    def step(model, x_t, t, s, noise):
        x = x_t
        for _ in range(n_steps if t > 0 else 0):
            pred, z = model(x, t), checks.same_shape("noise(x)", noise(x), "x", x)
            epsilon = step_size(pred, z)
            x = x + epsilon * pred.score + (2 * epsilon).sqrt() * z
        return x

    return step
