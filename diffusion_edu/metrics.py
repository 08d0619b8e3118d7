"""Distances between two sets of samples: sliced Wasserstein, energy, MMD, Frechet, precision and recall.

All take plain tensors, (N, D) or (N, *D) flattened, compute in float64 and return Python floats. None is
zero for two finite samples of the same law: compare with :func:`noise_floor`, what fresh data scores against
fresh data.
"""

import warnings

import torch

from diffusion_edu import checks


def wasserstein_1d(x, y, p=2):
    r"""Exact p-Wasserstein distance of two samples on the line, to the power p.

    .. math:: W_p^p = \int_0^1 |F_x^{-1}(u) - F_y^{-1}(u)|^p\,du

    For equal sizes this is the mean of |sorted difference|^p; for unequal ones the two step functions are
    integrated piece by piece, without interpolation.

    Parameters
    ----------
    x, y : Tensor, shape (..., N) and (..., M)
        The last dimension holds the samples; leading dimensions broadcast.
    p : float
        Power, at least 1.

    Returns
    -------
    Tensor, shape (...)
        float64, in (units of x)^p.

    Equations: metric.sliced_w
    """
    checks.real("p", p, 1)
    x, y = _finite("x", x).double().sort(-1).values, _finite("y", y).double().sort(-1).values
    n, m = x.shape[-1], y.shape[-1]
    if n == m:
        return (x - y).abs().pow(p).mean(-1)
    jumps = torch.cat([torch.arange(n) * m, torch.arange(m) * n, torch.tensor([n * m])]).unique().to(x.device)
    left, width = jumps[:-1], jumps.diff().double() / (n * m)  # whole numbers: no jump is missed by rounding
    return ((x[..., left // m] - y[..., left // n]).abs().pow(p) * width).sum(-1)


def sliced_wasserstein(x, y, n_directions=200, generator=None):
    r"""Root of the mean squared 1-D Wasserstein distance over random directions.

    .. math:: SW_2 = \sqrt{E_{u \in S^{D-1}} W_2^2(u^T x, u^T y)}

    It is in the units of x: a shift by v gives :math:`|v| / \sqrt D`.

    Parameters
    ----------
    x, y : Tensor, shape (N, *D) and (M, *D)
    n_directions : int
    generator : torch.Generator, optional
        Draws the directions; the default is one with seed 0, so that two calls compare.

    Equations: metric.sliced_w

    References
    ----------
    .. [1] Bonneel et al., "Sliced and Radon Wasserstein Barycenters of Measures", 2015.
    """
    x, y = _pair(x, y)
    checks.integer("n_directions", n_directions, 1)
    generator = generator or torch.Generator().manual_seed(0)
    u = torch.randn(n_directions, x.shape[1], generator=generator, dtype=torch.float64).to(x.device)
    u = u / u.norm(dim=1, keepdim=True)
    return wasserstein_1d(u @ x.T, u @ y.T).mean().sqrt().item()


def energy_distance(x, y):
    r"""Energy distance, unbiased, so it is slightly negative half of the time when the laws agree.

    .. math:: 2 E|X - Y| - E|X - X'| - E|Y - Y'|

    Parameters
    ----------
    x, y : Tensor, shape (N, *D) and (M, *D)
        N, M at least 2.

    Equations: metric.mmd_energy

    References
    ----------
    .. [1] Szekely and Rizzo, "Energy statistics", 2013.
    """
    x, y = _pair(x, y, least=2)
    return (2 * torch.cdist(x, y).mean() - _off_diagonal(_within(x)) - _off_diagonal(_within(y))).item()


def mmd(x, y, bandwidth=1.0):
    r"""Squared maximum mean discrepancy with a Gaussian kernel, unbiased.

    .. math:: E k(X, X') + E k(Y, Y') - 2 E k(X, Y), \qquad k(a, b) = e^{-|a - b|^2 / (2 h^2)}

    Parameters
    ----------
    x, y : Tensor, shape (N, *D) and (M, *D)
        N, M at least 2.
    bandwidth : float
        h, in the units of x.

    Equations: metric.mmd_energy

    References
    ----------
    .. [1] Gretton et al., "A Kernel Two-Sample Test", 2012, Eq. 3.
    """
    x, y = _pair(x, y, least=2)
    h = checks.real("bandwidth", bandwidth, 0, open_low=True)
    kxx, kyy, kxy = (torch.exp(-((d / h) ** 2) / 2) for d in (_within(x), _within(y), torch.cdist(x, y)))
    return (_off_diagonal(kxx) + _off_diagonal(kyy) - 2 * kxy.mean()).item()


def frechet_gaussian(mean_x, cov_x, mean_y, cov_y):
    r"""Squared Frechet (2-Wasserstein) distance of two Gaussians.

    .. math:: |\mu_x - \mu_y|^2 + tr(\Sigma_x + \Sigma_y - 2 (\Sigma_x^{1/2} \Sigma_y \Sigma_x^{1/2})^{1/2})

    The symmetric form has real eigenvalues: no complex square root can arise, singular covariances are fine.

    Parameters
    ----------
    mean_x, mean_y : Tensor, shape (D,)
    cov_x, cov_y : Tensor, shape (D, D)
        Symmetric, no negative eigenvalue.

    Equations: metric.fid

    References
    ----------
    .. [1] Heusel et al., "GANs Trained by a Two Time-Scale Update Rule", 2017, Eq. 6.
    """
    mean_x, mean_y = _finite("mean_x", mean_x).double(), _finite("mean_y", mean_y).double()
    cov_x, cov_y = _finite("cov_x", cov_x).double(), _finite("cov_y", cov_y).double()
    checks.same_shape("mean_y", mean_y, "mean_x", mean_x)
    checks.same_shape("cov_y", cov_y, "cov_x", cov_x)
    if cov_x.shape != (*mean_x.shape, *mean_x.shape):
        checks.fail("cov_x", f"have shape (D, D) with D = {mean_x.numel()}", f"shape {tuple(cov_x.shape)}")
    values, vectors = torch.linalg.eigh(cov_x)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_y @ root).clamp(min=0).sqrt().sum()
    squared = (mean_x - mean_y).square().sum() + cov_x.trace() + cov_y.trace() - 2 * cross
    return max(squared.item(), 0.0)  # rounding may leave -1e-16 for equal arguments


def frechet_distance(features_x, features_y):
    """Frechet distance of Gaussians fitted to two sets of features ("FID" when the features are Inception's).

    Biased upwards, the more the fewer samples: compare only equal sample sizes.

    Parameters
    ----------
    features_x, features_y : Tensor, shape (N, *D) and (M, *D)
        N, M at least 2.

    Raises
    ------
    ValueError
        If a feature is not finite, or a set has fewer than two rows.

    Warns
    -----
    UserWarning
        If a set has no more samples than dimensions: its covariance is singular.

    Equations: metric.fid
    """
    x, y = _pair(features_x, features_y, least=2, names=("features_x", "features_y"))
    for name, z in (("features_x", x), ("features_y", y)):
        if len(z) <= z.shape[1]:
            warnings.warn(f"{name}: {len(z)} samples in {z.shape[1]} dimensions, too few", stacklevel=2)
    return frechet_gaussian(x.mean(0), _covariance(x), y.mean(0), _covariance(y))


def inception_score(probs):
    r"""exp of the mutual information between sample and label, for class probabilities of shape (N, K).

    .. math:: \exp E_x KL(p(y | x) \| p(y))

    Between 1 (every sample says the same) and K (certain, and all classes equally often).

    Equations: metric.inception_score

    References
    ----------
    .. [1] Salimans et al., "Improved Techniques for Training GANs", 2016.
    """
    p = _finite("probs", probs).double()
    if p.ndim != 2 or (p < 0).any() or ((p.sum(1) - 1).abs() > 1e-4).any():
        checks.fail("probs", "be (N, K), each row non-negative with sum 1", f"shape {tuple(p.shape)}")
    entropy = torch.special.entr(p.mean(0)).sum() - torch.special.entr(p).sum(1).mean()
    return entropy.exp().item()


def precision_recall(real, fake, k=3):
    """Fraction of fakes near real samples (fidelity) and of real samples near fakes (diversity).

    "Near" means inside the ball around some sample of the other set that reaches to its k-th nearest
    neighbour there.

    Parameters
    ----------
    real, fake : Tensor, shape (N, *D) and (M, *D)
        More than k of each.
    k : int

    Returns
    -------
    precision, recall : float

    Equations: metric.coverage

    References
    ----------
    .. [1] Kynkaanniemi et al., "Improved Precision and Recall Metric ...", 2019, arXiv:1904.06991, Eq. 1-3.
    """
    real, fake = _pair(real, fake, least=checks.integer("k", k, 1) + 1, names=("real", "fake"))
    return _inside(fake, real, k), _inside(real, fake, k)


def mode_coverage(samples, means, radius):
    """Fraction of modes with a sample within ``radius``, and the share of all samples nearest to each mode.

    Parameters
    ----------
    samples : Tensor, shape (N, *D)
    means : Tensor, shape (K, *D)
    radius : float
        In the units of the samples; three standard deviations of a mode is usual.

    Returns
    -------
    covered : float
    shares : Tensor, shape (K,)
        float64; samples outside every ball count nowhere, so the sum may be below 1.

    Equations: metric.coverage
    """
    samples, means = _pair(samples, means, names=("samples", "means"))
    distance, nearest = torch.cdist(samples, means).min(1)
    hit = nearest[distance <= checks.real("radius", radius, 0, open_low=True)]
    shares = torch.bincount(hit, minlength=len(means)).double() / len(samples)
    return (shares > 0).double().mean().item(), shares


def nearest_distance(x, reference):
    """Euclidean distance from each row of x to its nearest row of ``reference``, shape (N,); 0 is a copy."""
    x, reference = _pair(x, reference, names=("x", "reference"))
    return _exact_distances(x, reference).min(1).values


def noise_floor(draw, distance=sliced_wasserstein, n_pairs=8):
    """Mean distance between two fresh draws of the same law: what a perfect model scores.

    Parameters
    ----------
    draw : function (int) -> Tensor
        ``draw(i)`` gives the i-th independent sample set; called with 0..2 n_pairs - 1.
    distance : function (x, y) -> float
    n_pairs : int
    """
    checks.function("draw", draw, "lambda i: make_swiss_roll_2d(1000, seed=i)")
    checks.integer("n_pairs", n_pairs, 1)
    return sum(distance(draw(2 * i), draw(2 * i + 1)) for i in range(n_pairs)) / n_pairs


def _finite(name, x):
    if not torch.isfinite(checks.floating(name, x)).all():
        checks.fail(name, "be finite", "NaN or infinity")
    return x


def _pair(x, y, least=1, names=("x", "y")):
    """Both sets as float64 rows of one width, with at least ``least`` rows."""
    for name, z in zip(names, (x, y), strict=True):
        _finite(name, z)
        if z.ndim < 2 or len(z) < least:
            checks.fail(name, f"have shape (N, *D) with N at least {least}", f"shape {tuple(z.shape)}")
    if x.shape[1:] != y.shape[1:]:
        checks.fail(names[1], f"have rows of shape {tuple(x.shape[1:])} like {names[0]}", tuple(y.shape[1:]))
    return x.double().flatten(1), y.double().flatten(1)


def _exact_distances(x, y):
    """Distances without the matrix product: equal rows are at distance exactly 0."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _within(x):
    return _exact_distances(x, x)


def _off_diagonal(d):
    """Mean over the pairs of different rows."""
    n = len(d)
    return (d.sum() - d.diagonal().sum()) / (n * (n - 1))


def _covariance(x):
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)


def _inside(x, y, k):
    """Fraction of x inside some ball of y; the radius is the k-th neighbour's distance, self not counted."""
    radius = _within(y).kthvalue(k + 1, dim=1).values
    return (_exact_distances(x, y) <= radius).any(1).double().mean().item()
