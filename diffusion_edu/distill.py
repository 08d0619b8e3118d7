r"""Distillation: a student that does in one step what its teacher does in several.

Both kinds are losses for ``Recipe(loss=..., sample_t=...)``: the training loop stays `training.fit`, and the student is
a model like any other, sampled by `ddim_step` (progressive) or `consistency_step`.
"""

import copy
import math
from dataclasses import replace

import torch

from . import checks
from .guidance import bind
from .losses import truncated_snr_weight
from .process import check_decreasing, expand, q_sample
from .samplers import KernelStep, ddim_step, evaluating
from .training import fit


def two_step_target(teacher, x_t, t, m, s, **cond):
    r"""The clean data that carry x_t from t to s in one DDIM step, where the teacher takes two, by way of m.

    .. math:: x_m = \mathrm{DDIM}(x_t;\, t \to m), \quad x_s = \mathrm{DDIM}(x_m;\, m \to s), \qquad
              \tilde x_0 = \frac{x_s - (b_s / b_t)\, x_t}{a_s - (b_s / b_t)\, a_t}

    with a = scale, b = std.

    Parameters
    ----------
    teacher : Model
    x_t : Tensor, shape (B, *D)
    t, m, s : Tensor, 0-d or shape (B,)
        Times, s < m < t.
    **cond : Tensor
        Conditions with leading B.

    Returns
    -------
    Tensor, shape (B, *D)

    Equations: distill.progressive

    References
    ----------
    .. [1] Salimans and Ho, 2022, arXiv:2202.00512, algorithm 2 and appendix G.
    """
    model, process = bind(teacher, **cond), teacher.process
    x_s = ddim_step(model, ddim_step(model, x_t, t, m, None), m, s, None)
    (a_s, b_s), (a_t, b_t) = process.marginal(s), process.marginal(t)
    ratio = b_s / b_t
    return (x_s - expand(ratio, x_t) * x_t) / expand(a_s - ratio * a_t, x_t)


def progressive_loss(teacher, times, weight=truncated_snr_weight):
    r"""One round of progressive distillation, for ``Recipe(loss=..., sample_t=grid_times(times[::2]))``.

    .. math:: L = w(t)\,\|\tilde x_0 - \hat x_\eta(x_t, t)\|^2

    with `two_step_target`. The student then walks ``times[::2]``, half of its teacher's steps, by DDIM.

    Parameters
    ----------
    teacher : Model
        On the student's process; it is not trained, and run in eval mode.
    times : Tensor, shape (2 n + 1,)
        The teacher's grid, down to 0.
    weight : function (process, t) -> Tensor
        Weight of the squared error of x0: `losses.truncated_snr_weight` or `losses.snr_plus_one_weight`.

    Returns
    -------
    function (model, x0, t, eps, **cond) -> Tensor, shape (B,)

    Equations: distill.progressive

    References
    ----------
    .. [1] Salimans and Ho, 2022, arXiv:2202.00512, algorithm 2.
    """
    times = _grid(teacher, times)
    if len(times) % 2 == 0:
        checks.fail("times", "hold an even number of steps, 2 n + 1 times", f"{len(times)} times")

    def loss(model, x0, t, eps, **cond):
        x_t = q_sample(model.process, x0, t, eps)
        m, s = _following(times, t, 2)
        with torch.no_grad():
            target = evaluating(teacher, lambda teacher: two_step_target(teacher, x_t, t, m, s, **cond))
        return _weighted_error(model(x_t, t, **cond).x0, target, weight(model.process, t))

    return loss


def fit_student(model, x0, recipe, times, n_steps, **cond):
    r"""Progressive distillation: halve the steps of a trained model, round by round; yields the loss of each step.

    .. math:: 2^k n \to \dots \to 2n \to n \ \text{steps}

    In each round the model of the round before, frozen, is the teacher, and the student starts from its weights.

    Parameters
    ----------
    model : Model
        Trained, and changed in place.
    x0 : Tensor, shape (N, *D)
    recipe : Recipe
        Of each round; its ``weight`` is that of `progressive_loss`, by default `losses.truncated_snr_weight`, and its
        ``loss`` and ``sample_t`` play no part.
    times : Tensor, shape (2^k n + 1,)
        The teacher's grid, down to 0.
    n_steps : int
        n, the student's steps: it is to be sampled on ``times[::2**k]``.
    **cond : Tensor
        Conditions with leading N.

    Equations: distill.progressive

    References
    ----------
    .. [1] Salimans and Ho, 2022, arXiv:2202.00512, algorithm 2.
    """
    halvings = (len(_grid(model, times)) - 1) / checks.integer("n_steps", n_steps, 1)
    if halvings < 2 or math.log2(halvings) % 1:
        checks.fail("n_steps", f"be {len(times) - 1} steps halved a few times", n_steps)
    while len(times) > n_steps + 1:
        loss = progressive_loss(copy.deepcopy(model), times, recipe.weight or truncated_snr_weight)
        times = times[::2]
        yield from fit(model, x0, replace(recipe, loss=loss, sample_t=grid_times(times)), **cond)


def consistency_loss(teacher, times, weight=truncated_snr_weight):
    r"""Consistency distillation: the same answer all along a path of the teacher's ODE, and the data at its end.

    .. math:: L = w(t)\,\|f_\theta(x_t, t) - \mathrm{sg}[f_\theta(x_s, s)]\|^2, \qquad
              x_s = \mathrm{DDIM}(x_t;\, t \to s), \qquad f_\theta(x, 0) = x

    f is ``model(x_t, t).x0``, and sg keeps the gradient out. A network that predicts v (x0 = a x - b v) is the identity
    at t = 0, where a = 1 and b = 0; so is `EDMDenoiser`, where c_skip = 1 and c_out = 0. So the boundary needs no
    training, and ``times`` may end in 0.

    Parameters
    ----------
    teacher : Model
        On the student's process; it is not trained, and run in eval mode.
    times : Tensor, shape (n + 1,)
        The teacher's grid, down to 0.
    weight : function (process, t) -> Tensor
        Weight of the squared error of x0.

    Returns
    -------
    function (model, x0, t, eps, **cond) -> Tensor, shape (B,)
        For ``Recipe(loss=..., sample_t=grid_times(times))``.

    Equations: distill.consistency

    References
    ----------
    .. [1] Song et al., "Consistency Models", 2023, arXiv:2303.01469, algorithm 2; the student is its own target, as in
       Song and Dhariwal, "Improved Techniques for Training Consistency Models", 2023, arXiv:2310.14189.
    """
    times = _grid(teacher, times)

    def loss(model, x0, t, eps, **cond):
        x_t = q_sample(model.process, x0, t, eps)
        (s,) = _following(times, t, 1)
        with torch.no_grad():
            x_s = evaluating(teacher, lambda teacher: ddim_step(bind(teacher, **cond), x_t, t, s, None))
            later = model(x_s, s.clamp(min=times[-2].item()), **cond).x0  # a model is never asked about time 0
            target = torch.where(expand(s, x_s) > 0, later, x_s)
        return _weighted_error(model(x_t, t, **cond).x0, target, weight(model.process, t))

    return loss


def _consistency(model, x_t, t, s):
    a_s, b_s = (expand(c, x_t) for c in model.process.marginal(s))
    return a_s * model(x_t, t).x0, b_s


consistency_step = KernelStep(_consistency, draws_last=False)
consistency_step.__doc__ = r"""Sampling with a consistency model: jump to the data, noise them again, repeat.

    .. math:: x_s = a_s\,f_\theta(x_t, t) + b_s z

    It is DDIM's family at its noisy end, sigma = b_s. The last step, s = 0, adds nothing; one step alone is the model.

    Equations: distill.consistency

    References
    ----------
    .. [1] Song et al., 2023, arXiv:2303.01469, algorithm 1.
    """


def grid_times(times):
    """Training times of a student: one of the grid's, but its last, each as likely as the others.

    Parameters
    ----------
    times : Tensor, shape (n + 1,)
        The student's grid.

    Returns
    -------
    function (process, n, generator) -> Tensor, shape (n,)
        For ``Recipe(sample_t=...)``.
    """
    times = check_decreasing(times)

    def sample_t(process, n, generator=None):
        return process.check_times(times, "times")[torch.randint(len(times) - 1, (n,), generator=generator)]

    return sample_t


def _grid(teacher, times):
    """Decreasing times of the teacher's process that end in 0."""
    times = check_decreasing(teacher.process.check_times(times, "times"))
    if times[-1] != 0:
        checks.fail("times", "end in 0", times[-1].item())
    return times


def _weighted_error(x0, target, weight):
    """Mean squared error of x0 of each example, times its weight (B,)."""
    error = ((target - x0) ** 2).flatten(1).mean(1)
    return weight.to(error) * error


def _following(times, t, n):
    """The n times that follow each t, (B,), in the grid; t are of ``times[:-1:n]``, where the student's steps start."""
    times = times.to(t.device)
    same = times[:-1:n] == t.reshape(-1, 1)
    if t.device.type == "cpu" and not same.any(1).all():
        checks.fail(
            "t", "be times of the student's grid, not its last: sample_t=grid_times(...)", t[~same.any(1)][:8].tolist()
        )
    i = n * same.int().argmax(1)
    return [times[i + k].to(t) for k in range(1, n + 1)]
