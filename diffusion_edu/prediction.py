r"""One network output, every view of it.

A model that looks at x_t answers one question, and the answer can be read as the clean data x_0, the noise eps, the
velocity v or the score: each follows from any other, given x_t and the noise level.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Prediction:
    r"""What a model says about x_t, where x_t = scale x_0 + std eps.

    .. math:: \hat x_0 = \frac{x_t - b\,\hat\epsilon}{a}, \quad \hat\epsilon = \frac{x_t - a\,\hat x_0}{b}, \quad
              \hat s = -\frac{\hat\epsilon}{b}, \quad \hat v = \frac{a\,\hat\epsilon - b\,\hat x_0}{\sqrt{a^2 + b^2}}

    with a = scale and b = std. On a variance-preserving process a^2 + b^2 = 1 and v is Salimans and Ho's velocity.

    Attributes
    ----------
    x_t, x0, eps : Tensor, shape (B, *D)
        The noised data, and the clean data and noise that the model sees in them.
    scale, std : Tensor, broadcastable to (B, *D)
    frac : Tensor, shape (B, *D), or None
        A learned variance: where it lies between beta-tilde (0) and beta (1), on a log scale.

    Equations: param.target, param.x0_from_eps, param.eps_from_x0, param.score_from_eps, param.v

    References
    ----------
    .. [1] Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", 2022,
       arXiv:2202.00512, section 4.
    """

    x_t: Tensor
    scale: Tensor
    std: Tensor
    x0: Tensor
    eps: Tensor
    frac: Tensor | None = None

    @classmethod
    def from_eps(cls, x_t, scale, std, eps, frac=None):
        """From the noise."""
        return cls(x_t, scale, std, (x_t - std * eps) / scale, eps, frac)

    @classmethod
    def from_x0(cls, x_t, scale, std, x0, frac=None):
        """From the clean data."""
        return cls(x_t, scale, std, x0, (x_t - scale * x0) / std, frac)

    @classmethod
    def from_v(cls, x_t, scale, std, v, frac=None):
        """From the velocity: a rotation of (x_t, v) back to (x0, eps)."""
        r2 = scale**2 + std**2
        x0 = (scale / r2) * x_t - (std / r2.sqrt()) * v
        eps = (std / r2) * x_t + (scale / r2.sqrt()) * v
        return cls(x_t, scale, std, x0, eps, frac)

    @classmethod
    def from_score(cls, x_t, scale, std, score, frac=None):
        r"""From the score of q(x_t); its clean data are Tweedie's mean.

        .. math:: E[x_0 \mid x_t] = \frac{x_t + b^2\,\nabla\log q(x_t)}{a}

        Equations: param.tweedie

        References
        ----------
        .. [1] Efron, "Tweedie's Formula and Selection Bias", 2011.
        """
        return cls.from_eps(x_t, scale, std, -std * score, frac)

    @property
    def score(self):
        r"""The score, shape (B, *D): of q_t where a model says eps, of the kernel q(x_t | x_0) where eps was drawn.

        .. math:: s_\theta(x_t, t) = -\frac{\hat\epsilon}{b} \approx \nabla\log q_t(x_t), \qquad
                  \nabla_{x_t}\log q(x_t \mid x_0) = \frac{a\,x_0 - x_t}{b^2} = -\frac{\epsilon}{b}

        Equations: score.def, score.kernel, sde.score_model
        """
        return -self.eps / self.std

    @property
    def v(self):
        """The velocity, shape (B, *D)."""
        return (self.scale * self.eps - self.std * self.x0) / (self.scale**2 + self.std**2).sqrt()

    def toward(self, other, w):
        """self + w (other - self): 0 gives self, 1 gives ``other`` (and its frac), above 1 goes past it."""
        x0 = self.x0 + w * (other.x0 - self.x0)
        eps = self.eps + w * (other.eps - self.eps)
        return Prediction(self.x_t, self.scale, self.std, x0, eps, other.frac)
