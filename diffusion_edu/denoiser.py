r"""The interface between networks and everything else: ``model(x_t, t, **cond) -> Prediction``, ``model.process``."""

import torch
from torch import nn

from . import checks
from .prediction import Prediction
from .process import Process, expand

READINGS = {
    "eps": Prediction.from_eps,
    "x0": Prediction.from_x0,
    "v": Prediction.from_v,
    "score": Prediction.from_score,
}


class _OnProcess(nn.Module):
    """A network on a process; what the models below share."""

    def __init__(self, net, process):
        super().__init__()
        if not callable(net) or isinstance(net, type):
            checks.fail("net", "be a network, such as UNet()", checks.shown(net), TypeError)
        if not isinstance(process, Process):
            rule = "be a Process, such as DiscreteVP(linear_beta(1000))"
            checks.fail("process", rule, checks.shown(process), TypeError)
        self.net, self.process = net, process

    def levels(self, x_t, t):
        """(scale, std), ready to multiply x_t; checks x_t and t."""
        checks.floating("x_t", x_t)
        checks.batch_of_times("t", t, len(x_t))
        weight = next(self.net.parameters(), x_t) if isinstance(self.net, nn.Module) else x_t
        if x_t.dtype != weight.dtype and not torch.is_autocast_enabled(x_t.device.type):
            checks.fail("x_t", f"have the network's dtype {weight.dtype}", x_t.dtype, TypeError)
        return [expand(c, x_t) for c in self.process.levels(t)]

    def ask(self, x_in, clock, cond):
        """The network's output, on x_in and a clock for every row."""
        clock = clock.to(x_in.device, torch.promote_types(x_in.dtype, torch.float32))  # bfloat16 has no 999
        return self.net(x_in, clock.expand(len(x_in)), **cond)


class _NetModel(_OnProcess):
    """A network that denoises, and perhaps predicts a variance; what `Denoiser` and `EDMDenoiser` share."""

    def __init__(self, net, process, learned_variance):
        super().__init__(net, process)
        self.learned_variance = learned_variance

    def run(self, x_in, clock, cond):
        """(output, frac): the network's output, split when it also predicts a variance."""
        out = self.ask(x_in, clock, cond)
        channels = x_in.shape[1] * (2 if self.learned_variance else 1)
        if out.shape != (len(x_in), channels, *x_in.shape[2:]):
            rule = f"have shape {(len(x_in), channels, *x_in.shape[2:])} for this sample"
            checks.fail("model output", f"{rule} (learned_variance={self.learned_variance})", tuple(out.shape))
        if not self.learned_variance:
            return out, None
        out, frac = out.chunk(2, dim=1)
        return out, (frac + 1) / 2


class Denoiser(_NetModel):
    r"""A network that predicts eps, x0, v or the score of x_t.

    The network is called as ``net(x_in, clock, **cond)``: ``x_in`` is x_t scaled to unit variance (for data of unit
    variance), ``clock`` (B,) is `Process.clock`, 1000 t / T.

    Parameters
    ----------
    net : nn.Module
        Maps (B, C, *D), (B,) to (B, C, *D), or to (B, 2C, *D) with a learned variance.
    process : Process
    predicts : {"eps", "x0", "v", "score"}
    learned_variance : bool
        The second half of the output channels is the variance's interpolation, in about [-1, 1].

    Raises
    ------
    ValueError
        If ``predicts`` is unknown, or needs a division by scale(T) = 0 (zero terminal SNR).
    """

    def __init__(self, net, process, predicts="eps", learned_variance=False):
        super().__init__(net, process, learned_variance)
        self.predicts = checks.one_of("predicts", predicts, READINGS)
        if predicts in ("eps", "score") and process.zero_terminal_snr:
            checks.fail("predicts", "be 'v' or 'x0' where alpha_bar[T] = 0: eps says nothing there", predicts)

    def forward(self, x_t, t, **cond):
        """Prediction for x_t (B, C, *D) at times t, 0-d or (B,), in (0, T]."""
        scale, std = self.levels(x_t, t)
        x_in = x_t / (scale**2 + std**2).sqrt()
        out, frac = self.run(x_in, self.process.clock(t), cond)
        return READINGS[self.predicts](x_t, scale, std, out, frac)


class EDMDenoiser(_NetModel):
    r"""EDM's preconditioning, for any process: the network's input and target have unit variance at every level.

    With sigma = std / scale and x = x_t / scale:

    .. math:: \hat x_0 = \frac{\sigma_d^2}{\sigma^2 + \sigma_d^2}\, x
              + \frac{\sigma\,\sigma_d}{\sqrt{\sigma^2 + \sigma_d^2}}\,
              F_\theta\Big(\frac{x}{\sqrt{\sigma^2 + \sigma_d^2}};\ 250 \log\sigma\Big)

    Parameters
    ----------
    net : nn.Module
        F, called like `Denoiser`'s network.
    process : Process
    sigma_data : float
        Standard deviation of the data, in data units.
    learned_variance : bool
        As in `Denoiser`.

    Equations: edm.precond

    References
    ----------
    .. [1] Karras et al., 2022, arXiv:2206.00364, Eq. 7 and Table 1.
    """

    def __init__(self, net, process, sigma_data=0.5, learned_variance=False):
        super().__init__(net, process, learned_variance)
        self.sigma_data = checks.real("sigma_data", sigma_data, 0, open_low=True)
        if process.zero_terminal_snr:
            checks.fail("process", "keep some signal at T: its noise level has a logarithm", "alpha_bar[T] = 0")

    def forward(self, x_t, t, **cond):
        """Prediction for x_t (B, C, *D) at times t, 0-d or (B,), in (0, T]."""
        scale, std = self.levels(x_t, t)
        sd = self.sigma_data
        norm = (std**2 + (scale * sd) ** 2).sqrt()
        log_sigma = -self.process.continuous().log_snr(t.double()) / 2
        out, frac = self.run(x_t / norm, 250 * log_sigma, cond)
        x0 = (scale * sd**2 / norm**2) * x_t + (std * sd / norm) * out
        return Prediction.from_x0(x_t, scale, std, x0, frac)


class NoisyClassifier(_OnProcess):
    r"""A classifier that knows how noisy its input is: p(y | x_t) at every time.

    .. math:: \log p_\phi(y \mid x_t) = \log\mathrm{softmax}_y\, f_\phi\Big(\frac{x_t}{\sqrt{a^2 + b^2}},\ t\Big)

    with a = scale and b = std; the network is called like `Denoiser`'s and returns logits.

    Parameters
    ----------
    net : nn.Module
        Maps (B, *D), (B,) to logits (B, n_classes): ``Classifier(time=True)`` or ``MLP(out_dim=n_classes)``.
    process : Process

    Equations: cg.classifier

    References
    ----------
    .. [1] Dhariwal and Nichol, 2021, arXiv:2105.05233, section 4.
    """

    def forward(self, x_t, t):
        """Log probabilities of the classes, shape (B, n_classes), for x_t (B, *D) at times t, 0-d or (B,).

        Times are in [0, T], or (0, T] on `VE`, where the network is shown log t.
        """
        scale, std = self.levels(x_t, t)
        clock = self.process.clock(t)
        if clock.device.type == "cpu" and not clock.isfinite().all():
            checks.fail("t", "be greater than 0 on this process", 0)
        logits = self.ask(x_t / (scale**2 + std**2).sqrt(), clock, {})
        if logits.ndim != 2 or len(logits) != len(x_t):
            checks.fail("model output", f"have shape ({len(x_t)}, n_classes)", tuple(logits.shape))
        return logits.log_softmax(1)

    def log_prob(self, y):
        """The function (x_t, t) -> log p(y | x_t), shape (B,), that guidance takes the gradient of.

        Parameters
        ----------
        y : Tensor, shape (B,), int64
            The classes wanted.
        """

        def log_prob(x_t, t):
            log_probs = self(x_t, t)
            rows = checks.labels("y", y, *log_probs.shape).clone()  # a clone: y may come from inference mode
            return log_probs.gather(1, rows[:, None])[:, 0]

        return log_prob
