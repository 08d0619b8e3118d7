r"""Guidance and its relatives: functions from a model to a model.

A guided model is a model, so samplers never learn what guidance is. The scale ``w`` means the same everywhere: 0 is
unconditional, 1 is conditional, above 1 is guided.
"""

import warnings

import torch
from torch import nn

from . import checks
from .prediction import Prediction
from .process import expand


class Wrapped(nn.Module):
    """A model made from a model: ``call(model, x_t, t, **cond) -> Prediction``.

    Being a module, it passes ``eval``, ``to`` and ``parameters`` on to the network inside.
    """

    def __init__(self, call, model, process=None):
        super().__init__()
        self.call, self.model = call, model
        self.process = model.process if process is None else process

    def forward(self, x_t, t, **cond):
        return self.call(self.model, x_t, t, **cond)


def bind(model, **bound):
    """The model with these conditions filled in: ``bind(model, y=y)(x_t, t)`` is ``model(x_t, t, y=y)``."""
    return Wrapped(lambda m, x_t, t, **cond: m(x_t, t, **bound | cond), model)


def w_from_extra(extra):
    r"""Our scale w, from the conventions that count what is added to the conditional model.

    .. math:: \tilde\epsilon = (1 + w')\,\epsilon_\theta(x_t \mid y) - w'\,\epsilon_\theta(x_t), \qquad w = 1 + w'

    Ho and Salimans call it w and Saharia's lecture lambda: 0 is conditional there. GLIDE's s and Imagen's w are ours.

    Parameters
    ----------
    extra : float
        w' or lambda, at least -1.

    Equations: cfg.combine_w, cfg.step004

    References
    ----------
    .. [1] Ho and Salimans, 2022, arXiv:2207.12598, Eq. 6.
    """
    return 1.0 + checks.real("extra", extra, -1)


def classifier_free(model, w, negative=None, **bound):
    r"""Classifier-free guidance on the bound conditions, with one call of the network on 2B rows.

    .. math:: \tilde\epsilon = \epsilon_\theta(x_t) + w\,\big(\epsilon_\theta(x_t \mid y) - \epsilon_\theta(x_t)\big)

    The unconditional half carries the same conditions with ``drop`` set, so that the network replaces ``y`` and
    ``z_img`` by its own null; all else (``x_low``, ``t_low``, ...) is seen by both halves. With ``negative`` it carries
    those conditions instead: guidance then leads from them to the bound ones.

    Parameters
    ----------
    model : Model
        Trained with its condition dropped now and then.
    w : float
        At least 0. For w = 0 and w = 1 the network sees only B rows.
    negative : dict of Tensor or None
        Conditions of the other half, such as ``{"y": unwanted}``, with leading B.
    **bound : Tensor
        Conditions with leading B.

    Returns
    -------
    Model

    Warns
    -----
    UserWarning
        Once, if both halves get exactly the same answer where noise prevails (std > scale): the network does not look
        at its conditions. Nearer to the data that says nothing, since x_t itself may show what y is.

    Equations: cfg.combine_omega, cfg.from_bayes, cfg.null, cfg.sample

    References
    ----------
    .. [1] Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, arXiv:2207.12598 (their w is ours - 1);
       Saharia et al., "Imagen", 2022, arXiv:2205.11487, Eq. 2.
    """
    w, negative, probed = checks.real("w", w, 0), negative or {}, False
    if not bound:
        checks.fail("conditions", "be given, for example y=labels", "none")
    for name in negative:
        checks.one_of("key in negative", name, tuple(bound))
    _check_conditions(bound), _check_conditions(negative)

    def call(m, x_t, t, **cond):
        nonlocal probed
        n, cond = len(x_t), bound | cond
        other = cond | negative
        _check_conditions(cond, n), _check_conditions(other, n)
        drop = torch.arange(2 * n, device=x_t.device) >= n  # first half conditional, second half not
        if w == 1:
            return m(x_t, t, **cond)
        if w == 0:
            return m(x_t, t, **other) if negative else m(x_t, t, **cond, drop=drop[n:])
        twice = {name: torch.cat([value, other[name]]) for name, value in cond.items()}
        if not negative:
            twice["drop"] = drop
        both = m(torch.cat([x_t, x_t]), torch.cat([t, t]) if t.ndim else t, **twice)
        given, free = (_half(both, rows) for rows in (slice(n), slice(n, None)))
        if n and not probed:
            same = torch.equal(given.x0, free.x0)
            probed = not same or bool((given.std > given.scale).any())
            if same and probed:
                says = "the model answers the same with and without its condition: w has no effect"
                warnings.warn(says, stacklevel=2)
        return free.toward(given, w)

    return Wrapped(call, model)


def _check_conditions(conditions, n=None):
    """Tensors with n rows each (any number where n is None), and no ``drop``, which is guidance's own."""
    for name, value in conditions.items():
        if name == "drop":
            checks.fail("drop", "be left out: guidance sets it", "a condition")
        if not isinstance(value, torch.Tensor) or not value.ndim:
            checks.fail(name, "be a tensor with a row for each sample", checks.shown(value), TypeError)
        if n is not None and len(value) != n:
            checks.fail(name, f"have {n} rows, one for each sample", len(value))


def interval(inside, outside, sigma_min, sigma_max):
    r"""One model at some noise levels and another at the rest: guidance where it helps.

    .. math:: \mathrm{model}(x_t, t) = \begin{cases} \mathrm{inside} & \sigma_{min} < \sigma(t) \le \sigma_{max} \\
              \mathrm{outside} & \text{else} \end{cases}, \qquad \sigma = \mathrm{std} / \mathrm{scale}

    ``interval(classifier_free(model, 3, y=y), bind(model, y=y), 0.2, 5)`` costs two rows a sample only where it guides.

    Parameters
    ----------
    inside, outside : Model
        On the same process; called with 0-d times, as `sample` does.
    sigma_min, sigma_max : float
        The latter may be infinite.

    Returns
    -------
    Model

    References
    ----------
    .. [1] Kynkaanniemi et al., "Applying Guidance in a Limited Interval Improves Sample and Distribution Quality",
       2024, arXiv:2404.07724.
    """
    if not 0 <= sigma_min < sigma_max:
        checks.fail("sigma_min, sigma_max", "be in order and at least 0", (sigma_min, sigma_max))

    def call(both, x_t, t, **cond):
        if t.ndim:
            checks.fail("t", "be 0-d: one noise level for all samples", tuple(t.shape))
        scale, std = inside.process.levels(t)
        return both[0 if sigma_min < std / scale <= sigma_max else 1](x_t, t, **cond)

    models = nn.ModuleList([bind(inside), bind(outside)])  # bound to nothing: a plain function is a model, too
    return Wrapped(call, models, inside.process)


def _half(pred, rows):
    """Some rows of a prediction."""
    parts = (pred.x_t, pred.scale, pred.std, pred.x0, pred.eps, pred.frac)
    return Prediction(*(p[rows] if p is not None and p.ndim else p for p in parts))


def gradient(log_prob, x, t):
    """grad_x of ``log_prob(x, t)`` (B,), row by row, shaped like x; works under no_grad and inference_mode.

    What ``log_prob`` holds (labels, a classifier's weights) must not itself come from inference mode.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        value = log_prob(x, t.clone())
        if value.shape != (len(x),):
            checks.fail("log_prob(x, t)", f"have shape ({len(x)},), one number a sample", tuple(value.shape))
        return torch.autograd.grad(value.sum(), x)[0]


def classifier(model, log_prob, w):
    r"""Classifier guidance on the noise prediction, with the classifier's gradient at x_t.

    .. math:: \tilde\epsilon = \epsilon_\theta(x_t, t) - w\,\mathrm{std}(t)\,\nabla_{x_t}\log p_\phi(y \mid x_t)

    Parameters
    ----------
    model : Model
        Unconditional. On a conditional one, ``bind(model, y=y)``, the scale is what is added: w - 1 (see
        `w_from_extra`).
    log_prob : function (x (B, *D), t) -> Tensor, shape (B,)
        log p(y | x_t) of a noise-aware classifier, for the labels wanted: `NoisyClassifier.log_prob`.
    w : float
        At least 0.

    Returns
    -------
    Model

    Equations: cg.joint_score, cg.eps, cg.step004

    References
    ----------
    .. [1] Dhariwal and Nichol, "Diffusion Models Beat GANs on Image Synthesis", 2021, arXiv:2105.05233, algorithm 2.
    """
    w = checks.real("w", w, 0)
    checks.function("log_prob", log_prob, "noisy_classifier.log_prob(y)")
    if model.process.zero_terminal_snr:
        checks.fail("model.process", "keep some signal at T: eps says nothing there", "alpha_bar[T] = 0")

    def call(m, x_t, t, **cond):
        pred = m(x_t, t, **cond)
        eps = pred.eps - w * pred.std * gradient(log_prob, x_t, t)
        return Prediction.from_eps(x_t, pred.scale, pred.std, eps, pred.frac)

    return Wrapped(call, model)


def _change_x0(model, change):
    """The model with ``change`` applied to its x0; eps follows."""

    def call(m, x_t, t, **cond):
        pred = m(x_t, t, **cond)
        return Prediction.from_x0(x_t, pred.scale, pred.std, change(pred.x0), pred.frac)

    return Wrapped(call, model)


def static_threshold(model, limit=1.0):
    r"""Clip the predicted clean data (never x_t) to [-limit, limit]; eps is computed again.

    .. math:: \hat x_0 \leftarrow \mathrm{clip}(\hat x_0, -c, c)

    Equations: thresh.static, thresh.sampler

    References
    ----------
    .. [1] Saharia et al., 2022, arXiv:2205.11487, section 2.3.
    """
    limit = checks.real("limit", limit, 1)
    return _change_x0(model, lambda x0: x0.clamp(-limit, limit))


def dynamic_threshold(model, percentile=0.995):
    r"""Scale each sample's predicted clean data back into [-1, 1] when too much of it lies outside.

    .. math:: s = \max(1, \mathrm{percentile}_p |\hat x_0|)\ \text{per sample}, \qquad
              \hat x_0 \leftarrow \mathrm{clip}(\hat x_0, -s, s) / s

    Parameters
    ----------
    model : Model
    percentile : float
        In (0, 1].

    Returns
    -------
    Model

    Equations: thresh.dynamic, thresh.sampler, thresh.saturation

    References
    ----------
    .. [1] Saharia et al., 2022, arXiv:2205.11487, section 2.3.
    """
    p = checks.real("percentile", percentile, 0, 1, open_low=True)

    def change(x0):
        if not len(x0):
            return x0
        size = x0.abs().flatten(1).to(torch.promote_types(x0.dtype, torch.float32))  # no quantile of half numbers
        s = expand(size.quantile(p, dim=1).clamp(min=1), x0)
        return x0.clamp(-s, s) / s

    return _change_x0(model, change)


def reschedule(model, process):
    r"""The model, to be called on another process: the two meet in the log SNR.

    .. math:: t' = \lambda_{model}^{-1}(\lambda_{process}(t)), \qquad x_{t'} = \tfrac{b'}{b}\, x_t

    with b = std. The clean data and the noise predicted are the same, whichever way they were scaled. Levels noisier
    than the model's own T are read at T.

    Parameters
    ----------
    model : Model
    process : Process
        The schedule to sample on.

    Returns
    -------
    Model
        With ``.process`` the new process.

    Equations: sched.train_vs_sample, score.ddpm_equiv

    References
    ----------
    .. [1] Kingma et al., "Variational Diffusion Models", 2021, arXiv:2107.00630, section 5.1.
    """

    def call(m, x_t, t, **cond):
        scale, std = (expand(c, x_t) for c in process.levels(t))
        lowest = m.process.log_snr(torch.tensor(m.process.T, dtype=m.process.time_dtype))
        log_snr = process.continuous().log_snr(t.double()).maximum(lowest)
        t_model = m.process.time_of(log_snr).clamp(max=m.process.T)
        _, std_model = (expand(c, x_t) for c in m.process.levels(t_model))
        pred = m(x_t * (std_model / std), t_model, **cond)
        return Prediction(x_t, scale, std, pred.x0, pred.eps, pred.frac)

    return Wrapped(call, model, process)


class Trace(Wrapped):
    """A model that keeps count: `n_evaluations`, and the ``(t, prediction)`` pairs it gave in `history`."""

    def __init__(self, model):
        super().__init__(None, model)
        self.n_evaluations, self.history = 0, []

    def forward(self, x_t, t, **cond):
        pred = self.model(x_t, t, **cond)
        self.n_evaluations += 1
        self.history.append((t, pred))
        return pred


def trace(model):
    """The model, watched: see `Trace`. Progressive x0 is ``[p.x0 for t, p in traced.history]``."""
    return Trace(model)
