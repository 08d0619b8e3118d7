"""diffusion_edu: a notebook-first course on diffusion models.

The core is four nouns; the rest are functions. A `process` says how data become noise, a `Prediction` is what a network
says about noised data, a `Denoiser` (or an oracle) makes predictions, and ``sample(step, model, x_T, times, noise)``
walks back.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("diffusion_edu")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0.0.0"
