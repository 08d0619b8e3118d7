"""DDIM: one family of samplers for one trained network, from ancestral sampling to an ODE that runs both ways."""

from itertools import pairwise

import torch

from .. import checks
from ..process import check_decreasing, expand, jump
from .driver import KernelStep, check_model, evaluating


def ddim_sigma(process, t, s, eta=1.0):
    r"""Standard deviation of the noise that DDIM draws from t to s.

    .. math:: \sigma = \eta\,\frac{b_{t|s}\, b_s}{b_t} \quad \Big(= \eta\sqrt{\tilde\beta_t}
              = \eta\sqrt{\frac{1 - \bar\alpha_s}{1 - \bar\alpha_t}}\sqrt{1 - \frac{\bar\alpha_t}{\bar\alpha_s}}\Big)

    with b = std and b_{t|s} from `jump`: eta scales the standard deviation, not the variance.

    Parameters
    ----------
    process : Process
    t, s : Tensor, 0-d or shape (B,)
        Times, 0 <= s < t <= T.
    eta : float
        In [0, 1]: 0 is deterministic, 1 is ancestral sampling with beta-tilde.

    Returns
    -------
    Tensor, shaped like ``t``, float64

    Equations: ddim.sigma_eta

    References
    ----------
    .. [1] Song et al., "Denoising Diffusion Implicit Models", 2021, arXiv:2010.02502, Eq. 16.
    """
    eta = checks.real("eta", eta, 0, 1)
    return eta * jump(process, t, s)[1] * process.marginal(s)[1] / process.marginal(t)[1]


def ddim_mean(process, x0, eps, s, sigma):
    r"""Mean of q_sigma(x_s | x_t, x_0), where x_t = a_t x_0 + b_t eps: what keeps all the marginals.

    .. math:: q_\sigma(x_s \mid x_t, x_0) = \mathcal N\Big(a_s x_0 + \sqrt{b_s^2 - \sigma^2}\,
              \frac{x_t - a_t x_0}{b_t},\ \sigma^2 I\Big), \qquad 0 \le \sigma \le b_s

    Whatever sigma, x_s has the law q(x_s | x_0), because the squares of what multiplies eps and of sigma add up to
    b_s^2.

    Parameters
    ----------
    process : Process
    x0, eps : Tensor, shape (B, *D)
        Clean data and the noise in x_t, true or predicted.
    s : Tensor, 0-d or shape (B,)
    sigma : Tensor, 0-d or shape (B,)
        Between 0 and std(s) (read on the CPU only).

    Returns
    -------
    Tensor, shape (B, *D)

    Equations: ddim.conditional, ddim.marginals, ddim.joint

    References
    ----------
    .. [1] Song et al., 2021, arXiv:2010.02502, Eq. 7 and lemma 1.
    """
    checks.same_shape("eps", eps, "x0", checks.floating("x0", x0))
    a_s, b_s = process.marginal(checks.batch_of_times("s", s, len(x0)))
    left = b_s**2 - sigma**2
    if left.device.type == "cpu" and not ((left >= -1e-12 * b_s**2) & (sigma >= 0)).all():
        checks.fail("sigma", "be between 0 and std(s)", f"sigma = {sigma.tolist()}, std(s) = {b_s.tolist()}")
    return expand(a_s, x0) * x0 + expand(left.clamp_min(0).sqrt(), x0) * eps


def make_ddim_step(eta=0.0):
    r"""DDIM's family: eta = 0 is deterministic, eta = 1 is ancestral sampling with beta-tilde.

    .. math:: x_s = \underbrace{a_s \hat x_0}_{\text{clean}} + \underbrace{\sqrt{b_s^2 - \sigma^2}\,\hat\epsilon}
              _{\text{back towards } x_t} + \sigma z, \qquad \sigma = \eta\,\frac{b_{t|s} b_s}{b_t}

    with a = scale, b = std: A x_t + B eps + C z with A = a_s / a_t, B = sqrt(b_s^2 - sigma^2) - A b_t, C = sigma.
    Any s < t will do: strides are exact where x0-hat does not change along the way.

    Parameters
    ----------
    eta : float
        In [0, 1].

    Returns
    -------
    Step

    Equations: ddim.update, ddim.strided, ddim.constant_x0, param.ABC

    References
    ----------
    .. [1] Song et al., 2021, arXiv:2010.02502, Eq. 12 and section 4.2.
    """
    eta = checks.real("eta", eta, 0, 1)

    def kernel(model, x_t, t, s):
        pred = model(x_t, t)
        sigma = ddim_sigma(model.process, t, s, eta)
        return ddim_mean(model.process, pred.x0, pred.eps, s, sigma), expand(sigma, x_t) if eta else None

    return KernelStep(kernel)


ddim_step = make_ddim_step()
ddim_step.__doc__ = r"""DDIM with eta = 0: no noise. Euler's rule for an ODE, in variables where its steps are large.

    .. math:: x_s = a_s \hat x_0 + b_s\,\hat\epsilon \quad\Longleftrightarrow\quad
              \bar x_s = \bar x_t + (\sigma_s - \sigma_t)\,\hat\epsilon, \qquad
              \bar x = x / a, \quad \sigma = b / a, \quad d\bar x = \hat\epsilon\, d\sigma

    Equations: ddim.deterministic, ddim.ode, ddim.code

    References
    ----------
    .. [1] Song et al., 2021, arXiv:2010.02502, section 4.1 and Eq. 13-14.
    """


def at_an_end(process, t, s):
    """Whether the log SNR is infinite at t or s: there every solver of the ODE takes DDIM's step."""
    return s == 0 or (process.zero_terminal_snr and t == process.T)


@torch.no_grad()
def invert(model, x0, times, n_refine=0):
    r"""Run DDIM upward: the noise x_T that `ddim_step` turns back into x0, nearly.

    .. math:: x_t = a_t\,\hat x_0(x_s, s) + b_t\,\hat\epsilon(x_s, s), \qquad t > s

    The way down asks the model at (x_t, t), the way up at (x_s, s), because x_t is what is sought: the two differ by
    an error that falls as 1 / n. The first step up starts from clean data, which a model is never asked about: it
    is asked about (x_0, t_1). Each refinement puts the x_t found into the right place and solves again, a fixed-point
    iteration that ends, where it converges, at the x_t that one step down carries to x_s exactly:

    .. math:: x_t \leftarrow \frac{a_t}{a_s}\big(x_s - b_s\,\hat\epsilon(x_t, t)\big) + b_t\,\hat\epsilon(x_t, t)

    Where a_T = 0 the last step up is not refined: there eps is x_T itself, whatever x_T.

    Parameters
    ----------
    model : Model
        With all its conditions bound.
    x0 : Tensor, shape (B, *D)
    times : Tensor, shape (n + 1,)
        Decreasing times that end in 0, the grid of the way down; it is walked from its end.
    n_refine : int
        Refinements of each step; each costs an evaluation.

    Yields
    ------
    Tensor, shape (B, *D)
        x at the times, from the last but one up to the first; ``*path, x_T = invert(...)``.

    Equations: ddim.inversion

    References
    ----------
    .. [1] Song et al., 2021, arXiv:2010.02502, section 5.4.
    """
    x = checks.floating("x0", x0).detach()
    times = check_decreasing(check_model(model).process.check_times(times, "times")).flip(0)
    checks.integer("n_refine", n_refine, 0)
    if times[0] != 0:
        checks.fail("times", "end in 0, where x0 lies", times[0].item())
    for s, t in pairwise(times):
        x = evaluating(model, _up, x, s, t, n_refine)
        yield x


def _up(model, x_s, s, t, n_refine):
    """One DDIM step from s up to t: asked at (x_s, s) first, then at what was found."""
    (a_s, b_s), (a_t, b_t) = ([expand(c, x_s) for c in model.process.marginal(u)] for u in (s, t))
    x, time = x_s, s if s > 0 else t
    for _ in range(n_refine + 1):
        eps = model(x, time).eps
        x, time = a_t * (x_s - b_s * eps) / a_s + b_t * eps, t
    return x


def slerp(x, y, share):
    r"""Between two noises along a great circle, so that what lies between has the length of noise, too.

    .. math:: \mathrm{slerp}(x, y; \lambda) = \frac{\sin((1 - \lambda)\,\theta)}{\sin\theta}\,x
              + \frac{\sin(\lambda\,\theta)}{\sin\theta}\,y, \qquad
              \theta = \arccos\frac{\langle x, y\rangle}{\|x\|\,\|y\|}

    Parameters
    ----------
    x, y : Tensor, shape (B, *D)
        Pairs of noises; where they are parallel, the straight line is taken.
    share : float or Tensor, shape (B,)
        lambda in [0, 1].

    Returns
    -------
    Tensor, shape (B, *D)

    Equations: edit.slerp

    References
    ----------
    .. [1] Shoemake, 1985; Song et al., 2021, arXiv:2010.02502, appendix D.5.
    """
    checks.same_shape("y", y, "x", checks.floating("x", x))
    share = checks.batch_of_times("share", torch.as_tensor(share, dtype=torch.float64), len(x))
    if share.device.type == "cpu" and not ((share >= 0) & (share <= 1)).all():
        checks.fail("share", "be in [0, 1]", share.flatten()[:8].tolist())
    u, v = (z.double().flatten(1) for z in (x, y))
    cos = (u * v).sum(1) / (u.norm(dim=1) * v.norm(dim=1)).clamp_min(1e-300)
    angle = cos.clamp(-1, 1).arccos()
    sin = angle.sin()
    straight = sin < 1e-6
    of_x = torch.where(straight, 1 - share, ((1 - share) * angle).sin() / sin)
    of_y = torch.where(straight, share + 0 * angle, (share * angle).sin() / sin)
    return expand(of_x, x) * x + expand(of_y, x) * y
