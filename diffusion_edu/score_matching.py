r"""Four ways to fit a score, one number per example, and the divergence that two of them need.

A score is a function ``x (B, *D) -> (B, *D)``; for a model at one noise level, ``lambda x: model(x, t).score``. All
four have the same minimiser, the score of the density that x was drawn from (or of that density with noise on it).
"""

import torch

from . import checks


def divergence(f, x):
    r"""The divergence of a vector field, exactly: D derivatives.

    .. math:: \nabla \cdot f(x) = \sum_{i=1}^D \frac{\partial f_i}{\partial x_i}

    Parameters
    ----------
    f : function (B, *D) -> (B, *D)
        Row b of the result depends on row b of x only.
    x : Tensor, shape (B, *D)

    Returns
    -------
    Tensor, shape (B,)
        Differentiable in the parameters of f where gradients are enabled.

    Equations: score.implicit
    """
    return value_and_divergence(f, x)[1]


def hutchinson(f, x, v):
    r"""An unbiased estimate of the divergence from random directions: one derivative each.

    .. math:: \nabla \cdot f(x) = E_v\big[v^\top \nabla f(x)\, v\big], \qquad E[v v^\top] = I

    Parameters
    ----------
    f, x : as in `divergence`
    v : Tensor, shape (K, B, *D)
        Probes: signs (+1 or -1 at random, of the least variance) or standard normal.

    Returns
    -------
    Tensor, shape (K, B)
        One estimate for each probe; their mean over K is the estimate.

    Equations: score.implicit

    References
    ----------
    .. [1] Hutchinson, 1990; Song et al., "Sliced Score Matching", 2019, arXiv:1905.07088.
    """
    return value_and_divergence(f, x, v)[1]


def value_and_divergence(f, x, v=None):
    """f(x), and its `divergence` (B,) or, with probes, its `hutchinson` estimates (K, B), from one evaluation."""
    checks.floating("x", x)
    if v is not None and (checks.floating("v", v).shape[1:] != x.shape or not len(v)):
        checks.fail("v", f"have shape (K, {', '.join(map(str, x.shape))}), K at least 1", tuple(v.shape))
    keep = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        value = at(f, x, "f(x)") + 0 * x  # a constant field has a graph, too
        row = value.flatten(1)

    def along(u):
        """u^T J u for each example."""
        (pulled,) = torch.autograd.grad(row, x, u.to(row), create_graph=keep, retain_graph=True)
        return (pulled.flatten(1) * u).sum(1)

    if v is None:
        units = torch.eye(row.shape[1]).to(row)
        return value if keep else value.detach(), sum(along(unit.expand_as(row)) for unit in units)
    return value if keep else value.detach(), torch.stack([along(u.flatten(1)) for u in v])


def at(score, x, name="score(x)"):
    """score(x), which must have the shape of x: nothing is broadcast."""
    return checks.same_shape(name, checks.function("score", score, "lambda x: model(x, t).score")(x), "x", x)


def explicit_score_matching(score, x, true_score):
    r"""The Fisher divergence, where the true score is known.

    .. math:: J_{ESM} = E_{p(x)}\|\nabla\log p(x) - s_\theta(x)\|^2

    Parameters
    ----------
    score, true_score : function (B, *D) -> (B, *D)
    x : Tensor, shape (B, *D)
        Drawn from p.

    Returns
    -------
    Tensor, shape (B,)

    Equations: score.esm

    References
    ----------
    .. [1] Hyvarinen, "Estimation of Non-Normalized Statistical Models by Score Matching", 2005, JMLR 6, Eq. 2.
    """
    return ((at(true_score, x) - at(score, x)) ** 2).flatten(1).sum(1)


def implicit_score_matching(score, x, v=None):
    r"""The same, but for a constant, without the true score: integrated by parts.

    .. math:: J_{ISM} = E_{p(x)}\big[\|s_\theta(x)\|^2 + 2\,\nabla\cdot s_\theta(x)\big]
              = J_{ESM} - E\,\|\nabla\log p(x)\|^2

    Parameters
    ----------
    score : function (B, *D) -> (B, *D)
    x : Tensor, shape (B, *D)
        Drawn from p.
    v : Tensor, shape (K, B, *D), or None
        None: the exact divergence. Otherwise probes for `hutchinson`.

    Returns
    -------
    Tensor, shape (B,)

    Equations: score.implicit

    References
    ----------
    .. [1] Hyvarinen, 2005, theorem 1.
    """
    value, trace = value_and_divergence(score, x, v)
    return (value**2).flatten(1).sum(1) + 2 * (trace if v is None else trace.mean(0))


def sliced_score_matching(score, x, v):
    r"""Implicit score matching along random directions only.

    .. math:: J_{SSM} = E_v E_{p(x)}\big[(v^\top s_\theta(x))^2 + 2\, v^\top \nabla s_\theta(x)\, v\big]

    With E[v v^T] = I its mean is that of `implicit_score_matching`.

    Parameters
    ----------
    score : function (B, *D) -> (B, *D)
    x : Tensor, shape (B, *D)
    v : Tensor, shape (K, B, *D)

    Returns
    -------
    Tensor, shape (B,)
        Mean over the K directions.

    Equations: score.implicit

    References
    ----------
    .. [1] Song et al., 2019, arXiv:1905.07088, Eq. 7 (twice it).
    """
    value, trace = value_and_divergence(score, x, v)
    along = (value * v).flatten(2).sum(2)
    return (along**2 + 2 * trace).mean(0)


def denoising_score_matching(score, x, sigma, eps):
    r"""Score matching for the data with noise on them: the score of the noise is known.

    .. math:: J_{DSM} = E\,\Big\|s_\theta(\tilde x) + \frac{\tilde x - x}{\sigma^2}\Big\|^2
              = E\,\Big\|s_\theta(x + \sigma\epsilon) + \frac{\epsilon}{\sigma}\Big\|^2
              = J_{ESM}(p_\sigma) + \text{const}

    Parameters
    ----------
    score : function (B, *D) -> (B, *D)
        Of the noised data.
    x, eps : Tensor, shape (B, *D)
        Clean data and standard normal noise.
    sigma : float
        Standard deviation of the noise, > 0.

    Returns
    -------
    Tensor, shape (B,)

    Equations: score.perturbed, score.dsm, score.kernel

    References
    ----------
    .. [1] Vincent, "A Connection Between Score Matching and Denoising Autoencoders", 2011, Neural Computation 23(7).
    """
    sigma = checks.real("sigma", sigma, 0, open_low=True)
    noised = x + sigma * checks.same_shape("eps", eps, "x", checks.floating("x", x))
    return ((at(score, noised) + eps / sigma) ** 2).flatten(1).sum(1)
