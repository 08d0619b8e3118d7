"""The VAE that can be solved: everything about it is a Gaussian."""

import torch

from .. import checks
from ..gaussian import normal_log_prob


class LinearVAE:
    r"""The VAE whose every quantity is known: p(x | z) = N(W z + b, s^2 I), probabilistic PCA.

    .. math:: p(x) = \mathcal N(b,\ W W^\top + s^2 I), \qquad
              p(z \mid x) = \mathcal N\big(M^{-1} W^\top (x - b) / s^2,\ M^{-1}\big), \quad M = I + W^\top W / s^2

    Parameters
    ----------
    W : Tensor, shape (D, L), float64
    b : Tensor, shape (D,)
    var : float
        s^2 > 0.

    Equations: vae.true_posterior

    References
    ----------
    .. [1] Tipping and Bishop, "Probabilistic Principal Component Analysis", 1999, J. R. Stat. Soc. B 61(3).
    """

    def __init__(self, W, b, var):
        if checks.floating("W", W).ndim != 2 or checks.floating("b", b).shape != W.shape[:1]:
            got = f"{tuple(W.shape)}, {tuple(b.shape)}"
            checks.fail("W, b", "have shapes (D, L) and (D,)", got)
        self.W, self.b, self.var = W, b, checks.real("var", var, 0, open_low=True)

    def decoder(self, z):
        """Mean and standard deviation of p(x | z), z (B, L) -> (B, D) each."""
        mean = z @ self.W.T + self.b
        return mean, torch.full_like(mean, self.var**0.5)

    def posterior(self, x):
        """Mean (B, L) and covariance (L, L) of p(z | x)."""
        precision = torch.eye(self.W.shape[1], dtype=self.W.dtype) + self.W.T @ self.W / self.var
        cov = torch.linalg.inv(precision)
        return (self._checked(x) - self.b) @ self.W @ cov / self.var, cov

    def log_prob(self, x):
        """log p(x), shape (B,)."""
        cov = self.W @ self.W.T + self.var * torch.eye(len(self.W), dtype=self.W.dtype)
        return torch.distributions.MultivariateNormal(self.b, cov).log_prob(self._checked(x))

    def log_joint(self, x, z):
        r"""log p(x, z), shape (B,).

        Equations: vae.joint
        """
        mean, sigma = self.decoder(z)
        return normal_log_prob(z, 0.0, 1.0) + normal_log_prob(x, mean, sigma**2)

    def elbo(self, x, mean, cov):
        r"""The bound in closed form, for q(z | x) = N(mean, cov) with a full covariance.

        .. math:: E_q[\log p(x \mid z)]
                  = \log\mathcal N(x; W\mu + b, s^2 I) - \frac{\mathrm{tr}(W \Sigma W^\top)}{2 s^2}

        minus D_KL(q || N(0, I)).

        Parameters
        ----------
        x : Tensor, shape (B, D)
        mean : Tensor, shape (B, L)
        cov : Tensor, shape (L, L) or (B, L, L)

        Returns
        -------
        Tensor, shape (B,)

        Equations: vae.elbo
        """
        spread = torch.einsum("dl,...lm,dm->...", self.W, cov, self.W) / (2 * self.var)
        mean_x, sigma = self.decoder(mean)
        return normal_log_prob(x, mean_x, sigma**2) - spread - gaussian_kl(mean, cov)

    def gap(self, x, mean, cov):
        r"""How far the bound is from log p(x): the divergence of q(z | x) = N(mean, cov) to the true posterior.

        .. math:: \log p_\theta(x) - \mathrm{ELBO}(q) = D_{KL}(q_\phi(z \mid x)\,\|\,p_\theta(z \mid x)) \ge 0

        Equations: vae.gap
        """
        return gaussian_kl(mean, cov, *self.posterior(x))

    def _checked(self, x):
        if checks.floating("x", x).ndim != 2 or x.shape[1:] != self.b.shape:
            checks.fail("x", f"have shape (B, {len(self.b)})", tuple(x.shape))
        return x


def gaussian_kl(mean1, cov1, mean2=None, cov2=None):
    r"""KL divergence between Gaussians with full covariances, in nats; the second is N(0, I) if left out.

    .. math:: \tfrac12\Big(\mathrm{tr}(\Sigma_2^{-1}\Sigma_1) + (\mu_2 - \mu_1)^\top\Sigma_2^{-1}(\mu_2 - \mu_1) - L
              + \log\frac{\det\Sigma_2}{\det\Sigma_1}\Big)

    Parameters
    ----------
    mean1, mean2 : Tensor, shape (B, L)
    cov1, cov2 : Tensor, shape (L, L) or (B, L, L)

    Returns
    -------
    Tensor, shape (B,)

    Equations: gauss.kl
    """
    if checks.floating("mean1", mean1).ndim != 2:
        checks.fail("mean1", "have shape (B, L)", tuple(mean1.shape))
    normal = torch.distributions.MultivariateNormal
    if mean2 is None:
        mean2, cov2 = torch.zeros_like(mean1), torch.eye(mean1.shape[1], dtype=mean1.dtype)
    return torch.distributions.kl_divergence(normal(mean1, cov1), normal(mean2, cov2))
