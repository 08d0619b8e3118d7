r"""Training losses, one number per example; the random draws are arguments."""

from . import checks
from .prediction import Prediction
from .process import expand, q_sample

TARGETS = ("eps", "x0", "v", "score")


def denoising_loss(model, x0, t, eps, target="eps", weight=None, **cond):
    r"""Noise x0 to time t and ask the model for the target; the mean squared error over the dimensions.

    .. math:: L = \frac{w(t)}{D}\,\big\|\, \mathrm{target} -
              \widehat{\mathrm{target}}_\theta(\mathrm{scale}(t)\, x_0 + \mathrm{std}(t)\, \epsilon,\ t) \big\|^2

    With ``target="eps"`` and no weight its mean is DDPM's L_simple, per dimension.

    Parameters
    ----------
    model : Model
        ``model(x_t, t, **cond) -> Prediction``.
    x0, eps : Tensor, shape (B, *D)
        Clean data in data units, and standard normal noise of the same shape.
    t : Tensor, shape (B,)
        Times in (0, T]: integers 1..T on a table.
    target : {"eps", "x0", "v", "score"}
        What is compared, whatever the network itself predicts.
    weight : function (process, t) -> Tensor, shape (B,), or None
    **cond : Tensor
        Conditions with leading B, passed to the model.

    Returns
    -------
    Tensor, shape (B,)

    Raises
    ------
    ValueError
        If the batch is empty, some t is 0, or shapes differ.

    Equations: elbo.L_simple

    References
    ----------
    .. [1] Ho et al., 2020, arXiv:2006.11239, Eq. 14 and algorithm 1.
    """
    checks.one_of("target", target, TARGETS)
    if not len(checks.floating("x0", x0)):
        checks.fail("x0", "hold at least one example", "an empty batch")
    if model.process.check_times(t).device.type == "cpu" and bool((t == 0).any()):
        checks.fail("t", "be greater than 0: there is nothing to predict at time 0", 0)
    x_t = q_sample(model.process, x0, t, eps)
    pred = model(x_t, t, **cond)
    truth = Prediction(x_t, *(expand(c, x_t) for c in model.process.marginal(t)), x0, eps)
    error = getattr(truth, target) - getattr(pred, target)
    loss = (error**2).flatten(1).mean(1)
    return loss if weight is None else weight(model.process, t).to(loss) * loss
