r"""Training losses, one number per example, and their weights; the random draws are arguments.

A weight is a function ``(process, t) -> Tensor``, shaped like t, for ``denoising_loss(..., weight=...)``. The losses of
the four targets differ by weights only (`loss_ratio`), so every weight is known once it is known for x0.
"""

import math

import torch

from . import checks
from .prediction import Prediction
from .process import expand, jump, q_sample

TARGETS = ("eps", "x0", "v", "score")


def denoising_loss(model, x0, t, eps, target="eps", weight=None, **cond):
    r"""Noise x0 to time t and ask the model for the target; the mean squared error over the dimensions.

    .. math:: L = \frac{w(t)}{D}\,\big\|\, \mathrm{target} -
              \widehat{\mathrm{target}}_\theta(\mathrm{scale}(t)\, x_0 + \mathrm{std}(t)\, \epsilon,\ t) \big\|^2

    With ``target="eps"`` and no weight its mean is DDPM's L_simple, per dimension; and denoising score matching at all
    noise levels, ``target="score"`` weighted by lambda(t) = std(t)^2 (NCSN's sigma^2, the SDE's 1 - alpha_bar).

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

    Equations: elbo.L_simple, ncsn.objective, ncsn.eps_form, sde.dsm_loss

    References
    ----------
    .. [1] Ho et al., 2020, arXiv:2006.11239, Eq. 14 and algorithm 1; Song and Ermon, 2019, arXiv:1907.05600, Eq. 5-6;
       Song et al., 2021, arXiv:2011.13456, Eq. 7.
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


def classifier_loss(model, x0, t, eps, y):
    r"""Cross-entropy of a noise-aware classifier, for ``fit(model, x0, Recipe(loss=classifier_loss), y=y)``.

    .. math:: \ell = -\log p_\phi(y \mid x_t), \qquad x_t = \mathrm{scale}(t)\,x_0 + \mathrm{std}(t)\,\epsilon

    Its minimum is the class posterior q(y | x_t). The classifier is trained apart from the diffusion model, and acts
    on samples only.

    Parameters
    ----------
    model : NoisyClassifier
        ``model(x_t, t)`` -> log probabilities (B, n_classes).
    x0, eps : Tensor, shape (B, *D)
    t : Tensor, shape (B,)
        Times in [0, T]; 0 is clean data.
    y : Tensor, shape (B,), int64

    Returns
    -------
    Tensor, shape (B,), in nats

    Equations: cg.classifier

    References
    ----------
    .. [1] Dhariwal and Nichol, 2021, arXiv:2105.05233, section 4.
    """
    log_prob = model(q_sample(model.process, x0, t, eps), t)
    return -log_prob.gather(1, checks.labels("y", y, len(x0), log_prob.shape[1])[:, None])[:, 0]


def loss_ratio(process, t, target):
    r"""How many times the squared error of x0 the squared error of a target is.

    .. math:: \|\epsilon - \hat\epsilon\|^2 = \mathrm{SNR}\,\|x_0 - \hat x_0\|^2, \quad
              \|v - \hat v\|^2 = (1 + \mathrm{SNR})\,\|x_0 - \hat x_0\|^2, \quad
              \|s - \hat s\|^2 = \frac{\mathrm{SNR}}{b^2}\,\|x_0 - \hat x_0\|^2

    with b = std (where scale^2 + b^2 is not 1, v's factor is that sum over b^2).

    Parameters
    ----------
    process : Process
    t : Tensor, 0-d or shape (B,)
        Times above 0.
    target : {"eps", "x0", "v", "score"}

    Returns
    -------
    Tensor, shaped like ``t``, float64

    Equations: param.loss_ratio

    References
    ----------
    .. [1] Salimans and Ho, 2022, arXiv:2202.00512, section 4.
    """
    checks.one_of("target", target, TARGETS)
    scale, std = process.marginal(t)
    snr = (scale / std) ** 2
    return {"x0": torch.ones_like(snr), "eps": snr, "v": 1 + snr, "score": snr / std**2}[target]


def elbo_weight(target="eps", variance="beta_tilde"):
    r"""The weights of the variational bound: with them the squared error is L_{t-1}, but for a constant.

    .. math:: L_{t-1} = \frac{1}{2\sigma_t^2}\frac{\bar\alpha_{t-1}\beta_t^2}{(1 - \bar\alpha_t)^2}\|x_0 - \hat x_0\|^2
              + C = \frac{\beta_t^2}{2\sigma_t^2\alpha_t(1 - \bar\alpha_t)}\|\epsilon - \hat\epsilon\|^2 + C

    For sigma^2 = beta-tilde, C = 0 and the weight of x0 is (SNR(t - 1) - SNR(t)) / 2; it is infinite at t = 1, where
    the bound has no divergence but L_0. `denoising_loss` takes the mean over D dimensions: its D-fold is in nats.

    Parameters
    ----------
    target : {"eps", "x0", "v", "score"}
    variance : {"beta_tilde", "beta"}
        sigma_t^2 of the reverse step.

    Returns
    -------
    function (process, t) -> Tensor, shaped like ``t``
        For a `DiscreteVP` and t in 1..T.

    Equations: elbo.w_x0, elbo.w_eps, elbo.snr_form

    References
    ----------
    .. [1] Ho et al., 2020, arXiv:2006.11239, Eq. 12; Kingma et al., 2021, arXiv:2107.00630, Eq. 13.
    """
    checks.one_of("target", target, TARGETS)
    checks.one_of("variance", variance, ("beta_tilde", "beta"))

    def weight(process, t):
        checks.times_in("t", t, 1, process.T, discrete=True)
        (_, step_std), (a_s, b_s), (_, b_t) = jump(process, t, t - 1), process.marginal(t - 1), process.marginal(t)
        sigma = step_std if variance == "beta" else step_std * b_s / b_t
        gain = a_s * (step_std / b_t) ** 2  # of x0 in the mean of the posterior
        return gain**2 / (2 * sigma**2) / loss_ratio(process, t, target)

    return weight


def min_snr_weight(target="eps", gamma=5.0):
    r"""Min-SNR: the x0 loss weighted by the SNR, cut off at gamma, so that the easy times do not drown the others.

    .. math:: w(t)\,\|x_0 - \hat x_0\|^2, \qquad w(t) = \min(\mathrm{SNR}(t), \gamma)

    Parameters
    ----------
    target : {"eps", "x0", "v", "score"}
        What the loss compares; the weight is divided by its `loss_ratio`.
    gamma : float
        Positive; infinity leaves the eps loss as it is.

    Returns
    -------
    function (process, t) -> Tensor, shaped like ``t``

    References
    ----------
    .. [1] Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", 2023, arXiv:2303.09556, Eq. 7.
    """
    checks.one_of("target", target, TARGETS)
    if not gamma > 0:
        checks.fail("gamma", "be greater than 0", gamma)

    def weight(process, t):
        cut = loss_ratio(process, t, "eps").clamp(max=gamma) / loss_ratio(process, t, target)
        return cut.nan_to_num(1.0, posinf=math.inf)  # 0 / 0 without signal, for eps and score: the limit

    return weight


def truncated_snr_weight(process, t):
    r"""Weight of an x0 loss that never vanishes where there is no signal, as the SNR, that of eps, does.

    .. math:: w(t) = \max(\mathrm{SNR}(t), 1)

    Parameters
    ----------
    process : Process
    t : Tensor, 0-d or shape (B,)
        Times above 0.

    Returns
    -------
    Tensor, shaped like ``t``, float64

    Equations: distill.weight

    References
    ----------
    .. [1] Salimans and Ho, 2022, arXiv:2202.00512, section 4.
    """
    return loss_ratio(process, t, "eps").clamp(min=1)


def snr_plus_one_weight(process, t):
    r"""Weight of an x0 loss that makes it the loss of v.

    .. math:: w(t) = 1 + \mathrm{SNR}(t), \qquad w(t)\,\|x_0 - \hat x_0\|^2 = \|v - \hat v\|^2

    Parameters and result as in `truncated_snr_weight`.

    Equations: distill.weight

    References
    ----------
    .. [1] Salimans and Ho, 2022, arXiv:2202.00512, section 4.
    """
    return loss_ratio(process, t, "v")


def edm_weight(sigma_data=0.5):
    r"""EDM's weight of an x0 loss: with its preconditioning, every noise level starts at the same loss, 1.

    .. math:: w(\sigma) = \frac{\sigma^2 + \sigma_d^2}{(\sigma\,\sigma_d)^2} = \frac{1}{c_{out}(\sigma)^2}, \qquad
              \sigma = \mathrm{std} / \mathrm{scale}

    ``Recipe(target="x0", weight=edm_weight(), sample_t=log_normal_times())`` on an `EDMDenoiser` is EDM's training.

    Parameters
    ----------
    sigma_data : float
        Standard deviation of the data, as in `EDMDenoiser`.

    Returns
    -------
    function (process, t) -> Tensor, shaped like ``t``

    Equations: edm.loss

    References
    ----------
    .. [1] Karras et al., 2022, arXiv:2206.00364, Eq. 8 and Table 1.
    """
    checks.real("sigma_data", sigma_data, 0, open_low=True)
    return lambda process, t: loss_ratio(process, t, "eps") + sigma_data**-2


def sigmoid_weight(bias=0.0, target="eps"):
    r"""The sigmoid weight of an eps loss: falling in the log SNR, so that it is a bound on blurred data.

    .. math:: w(\lambda) = \mathrm{sigmoid}(b - \lambda), \qquad \lambda = \log\mathrm{SNR}

    Parameters
    ----------
    bias : float
        b: the log SNR at which the weight is one half.
    target : {"eps", "x0", "v", "score"}
        What the loss compares; the weight is divided by its `loss_ratio` to that of eps.

    Returns
    -------
    function (process, t) -> Tensor, shaped like ``t``

    Equations: sid2.sigmoid_weight

    References
    ----------
    .. [1] Kingma and Gao, 2023, arXiv:2303.00848; Hoogeboom et al., "Simpler Diffusion", 2024, arXiv:2410.19324.
    """
    checks.real("bias", bias)
    checks.one_of("target", target, TARGETS)

    def weight(process, t):
        ratio = loss_ratio(process, t, "eps") / loss_ratio(process, t, target)
        return torch.sigmoid(bias - process.log_snr(t)) * ratio.nan_to_num(1.0)  # 0 / 0 without signal: the limit

    return weight
