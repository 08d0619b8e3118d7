"""Section 9: one prediction, every view of it."""

import pytest
import torch
from exact import F64, close, normal, randn, times

from diffusion_edu.denoiser import Denoiser, EDMDenoiser
from diffusion_edu.oracles import GaussianMixtureOracle, GaussianOracle
from diffusion_edu.prediction import Prediction
from diffusion_edu.process import VE, VESDE, VPSDE, DiscreteVP, SubVPSDE, expand, posterior, q_sample
from diffusion_edu.samplers import beta, beta_tilde, make_ddim_step, make_ddpm_step
from diffusion_edu.schedules import linear_beta

VIEWS = ("eps", "x0", "v", "score")


def ddpm():
    return DiscreteVP(linear_beta(1000))


def mixture(process=None):
    means = torch.tensor([[-1.0, 0.5], [1.0, -0.5]], dtype=F64)
    return GaussianMixtureOracle(process or ddpm(), means, [0.2, 0.3])


def noised(process, t, seed=0):
    """(x_t, scale, std, x0, eps), the levels ready to multiply."""
    x0, eps = randn(len(t), 3, seed=seed), randn(len(t), 3, seed=seed + 1)
    x_t = q_sample(process, x0, t, eps)
    return x_t, *(expand(c, x_t) for c in process.marginal(t)), x0, eps


def read(view, x_t, scale, std, value):
    return getattr(Prediction, f"from_{view}")(x_t, scale, std, value)


@pytest.mark.equation("param.x0_from_eps", "param.eps_from_x0")
def test_the_noise_gives_the_data_and_back():
    x_t, scale, std, x0, eps = noised(ddpm(), torch.arange(1, 1001))
    close(Prediction.from_eps(x_t, scale, std, eps).x0, x0, 1e-12)  # 1e-16 / scale(T) = 2e-14
    close(Prediction.from_x0(x_t, scale, std, x0).eps, eps, 1e-12)  # 1e-16 / std(1) = 1e-14
    ab = scale**2
    close(Prediction.from_eps(x_t, scale, std, eps).x0, (x_t - (1 - ab).sqrt() * eps) / ab.sqrt(), 1e-11)


@pytest.mark.equation("param.x0_from_eps", "param.tweedie")
def test_the_best_noise_guess_gives_the_mean_of_the_data():
    oracle, x = mixture(), randn(5, 2)
    for t in (5, 300, 900):
        pred = oracle(x, times(t))
        close(Prediction.from_eps(x, pred.scale, pred.std, pred.eps).x0, pred.x0, 1e-12)
        tweedie = (x + pred.std**2 * pred.score) / pred.scale
        close(tweedie, pred.x0, 1e-12)
    ve = mixture(VE())
    pred = ve(x, torch.tensor(0.7, dtype=F64))
    close(x + 0.7**2 * pred.score, pred.x0, 1e-13)


@pytest.mark.equation("param.tweedie", "param.x0_from_eps")
@pytest.mark.parametrize("process", [ddpm(), VE()], ids=["VP", "VE"])
def test_the_score_gives_the_conjugate_posterior_mean(process):
    means, stds = torch.tensor([-1.0, 0.5, 2.0], dtype=F64), torch.tensor([0.2, 0.5, 0.3], dtype=F64)
    oracle = GaussianMixtureOracle(process, means[:, None], stds, [0.5, 0.2, 0.3])
    x = torch.linspace(-3, 3, 7, dtype=F64, requires_grad=True)
    for t in times(5, 300, 900) if process.discrete else times(0.05, 0.7, 20.0).double():
        (score,) = torch.autograd.grad(oracle.log_prob(x[:, None], t).sum(), x)
        a, b = (c.item() for c in process.marginal(t))
        var = (a * stds) ** 2 + b**2
        share = torch.tensor([0.5, 0.2, 0.3], dtype=F64) * normal(x.detach()[:, None], a * means, var)
        each = means + a * stds**2 / var * (x.detach()[:, None] - a * means)  # conjugacy, in each component
        mean = (share * each).sum(1) / share.sum(1)
        levels = torch.tensor([a, b], dtype=F64)
        close(Prediction.from_score(x.detach(), *levels, score).x0, mean, 1e-12 / a)


@pytest.mark.equation("param.score_from_eps")
def test_the_score_is_minus_the_noise_over_its_standard_deviation():
    oracle, x = mixture(), randn(5, 2).requires_grad_()
    for t in (5, 300, 900):
        (score,) = torch.autograd.grad(oracle.log_prob(x, times(t)).sum(), x)
        pred = oracle(x.detach(), times(t))
        close(pred.score, score, 1e-12 / pred.std.item())
        close(Prediction.from_score(x.detach(), pred.scale, pred.std, score).eps, pred.eps, 1e-12)


@pytest.mark.equation("param.v")
def test_velocity_is_a_rotation():
    process = ddpm()
    x_t, scale, std, x0, eps = noised(process, torch.arange(1, 1001))
    v = Prediction(x_t, scale, std, x0, eps).v
    close(v, scale * eps - std * x0, 1e-14)
    close(v**2 + x_t**2, x0**2 + eps**2, 1e-13)
    back = Prediction.from_v(x_t, scale, std, v)
    close(back.x0, scale * x_t - std * v, 1e-13)
    close(back.eps, std * x_t + scale * v, 1e-13)
    close(back.x0, x0, 1e-12)
    close(back.eps, eps, 1e-12)
    close(v[:1], eps[:1], 0.05)  # std(1) = 0.01
    close(v[-1:], -x0[-1:], 0.05)  # scale(T) = 0.006


@pytest.mark.equation("param.target")
@pytest.mark.parametrize("process", [ddpm(), VPSDE(), SubVPSDE(), VESDE(), VE(5.0)], ids=lambda p: type(p).__name__)
def test_every_view_gives_every_other(process):
    t = torch.arange(1, 1001) if process.discrete else process.T * torch.linspace(0.01, 1, 100, dtype=F64)
    x_t, scale, std, x0, eps = noised(process, t)
    truth = Prediction(x_t, scale, std, x0, eps)
    for given in VIEWS:
        pred = read(given, x_t, scale, std, getattr(truth, given))
        for wanted in VIEWS:
            close(getattr(pred, wanted), getattr(truth, wanted), 1e-10)  # the sub-VP scale at T squared: 4e-5
        if process.discrete:  # the fifth view: the posterior mean
            mean, _ = posterior(process, x0, x_t, t, t - 1)
            close(posterior(process, pred.x0, x_t, t, t - 1)[0], mean, 1e-10)


@pytest.mark.equation("param.target")
def test_all_five_targets_give_all_five_at_every_time():
    process, t = ddpm(), torch.arange(1, 1001)
    x_t, scale, std, x0, eps = noised(process, t)
    of_x_t, of_x0 = (posterior(process, *x, t, t - 1)[0] for x in ((0 * x0, 1 + 0 * x0), (1 + 0 * x0, 0 * x0)))

    def tell(pred):
        views = {view: getattr(pred, view) for view in VIEWS}
        return views | {"mean": posterior(process, pred.x0, x_t, t, t - 1)[0]}

    def hear(view, value):  # the posterior mean is a line in x0
        given, value = ("x0", (value - of_x_t * x_t) / of_x0) if view == "mean" else (view, value)
        return read(given, x_t, scale, std, value)

    truth = tell(Prediction(x_t, scale, std, x0, eps))
    for given, value in truth.items():
        for wanted, answer in tell(hear(given, value)).items():
            back = tell(hear(wanted, answer))[given]
            close(answer, truth[wanted], 1e-10)  # the mean at T holds x0 times 1e-4
            close(back, value, 1e-10)


@pytest.mark.equation("param.loss_ratio")
def test_errors_differ_by_powers_of_the_signal_to_noise_ratio():
    process = ddpm()
    t = torch.arange(1, 1001)
    x_t, scale, std, x0, eps = noised(process, t)
    truth = Prediction(x_t, scale, std, x0, eps)
    guess = Prediction.from_x0(x_t, scale, std, x0 + randn(1000, 3, seed=2))
    error = {view: ((getattr(truth, view) - getattr(guess, view)) ** 2).sum(1) for view in VIEWS}
    snr = process.alpha_bar[t] / (1 - process.alpha_bar[t])
    close(error["eps"] / (snr * error["x0"]), torch.ones(1000), 1e-11)
    close(error["v"] / ((1 + snr) * error["x0"]), torch.ones(1000), 1e-11)
    close(error["score"] / (error["eps"] / (1 - process.alpha_bar[t])), torch.ones(1000), 1e-11)


@pytest.mark.equation("param.mean_from_eps", "param.mean_from_x0", "param.score_objective", "param.ABC")
def test_three_forms_of_the_reverse_mean_coincide():
    oracle, x = mixture(), randn(4, 2)
    process = oracle.process
    for t in (1, 2, 300, 1000):
        pred = oracle(x, times(t))
        mean, _ = make_ddpm_step().kernel(oracle, x, times(t), times(t - 1))
        alpha, beta = process.alpha[t].item(), process.beta[t].item()
        before, ab = process.alpha_bar[t - 1].item(), process.alpha_bar[t].item()
        close((x - beta / (1 - ab) ** 0.5 * pred.eps) / alpha**0.5, mean, 1e-12)
        close((alpha**0.5 * (1 - before) * x + before**0.5 * beta * pred.x0) / (1 - ab), mean, 1e-11)
        close((x + beta * pred.score) / alpha**0.5, mean, 1e-12)


@pytest.mark.equation("param.mean_from_eps", "param.mean_from_x0", "param.score_objective")
def test_the_mean_is_the_posteriors_whatever_was_predicted():
    process, t = ddpm(), torch.arange(1, 1001)
    x_t, scale, std, x0, eps = noised(process, t)
    mean, _ = posterior(process, x0, x_t, t, t - 1)
    alpha, b, ab, before = (
        c[:, None] for c in (process.alpha[t], process.beta[t], process.alpha_bar[t], process.alpha_bar[t - 1])
    )
    close((x_t - b / (1 - ab).sqrt() * eps) / alpha.sqrt(), mean, 1e-14)
    close((alpha.sqrt() * (1 - before) * x_t + before.sqrt() * b * x0) / (1 - ab), mean, 1e-11)  # 1 - ab cancels
    close((x_t + b * (-eps / std)) / alpha.sqrt(), mean, 1e-14)


def coefficients(step, process, t, s):
    """A, B, C of x_s = A x_t + B eps + C z, and B' of the score, read off a step: it is a line in all of them."""

    def mean(x, view, value):
        def model(x_t, t):
            return read(view, x_t, *(expand(c, x_t) for c in process.marginal(t)), torch.full_like(x_t, value))

        model.process = process
        mean, sigma = step.kernel(model, torch.full((1, 1), x, dtype=F64), times(t), times(s))
        return mean.item(), 0.0 if sigma is None else sigma.item()

    (A, C), (B, _), (B_score, _) = mean(1.0, "eps", 0.0), mean(0.0, "eps", 1.0), mean(0.0, "score", 1.0)
    return A, B, C, B_score


@pytest.mark.equation("param.ABC")
def test_every_step_is_x_t_noise_and_fresh_noise_with_its_own_coefficients():
    process = ddpm()
    for t, s in ((2, 1), (300, 299), (1000, 999), (300, 100)):
        a_t, a_s = process.alpha_bar[t].item(), process.alpha_bar[s].item()
        alpha, std = a_t / a_s, (1 - a_t) ** 0.5
        tilde = (1 - a_s) / (1 - a_t) * (1 - alpha)
        ddpm_B = -(1 - alpha) / (alpha**0.5 * std)
        for variance, var in ((beta, 1 - alpha), (beta_tilde, tilde)):
            right = alpha**-0.5, ddpm_B, var**0.5, (1 - alpha) / alpha**0.5
            close(coefficients(make_ddpm_step(variance), process, t, s), right, 1e-12)
        for eta in (0.0, 0.5, 1.0):
            B = (1 - a_s - eta**2 * tilde) ** 0.5 - alpha**-0.5 * std
            A_, B_, C_, B_score = coefficients(make_ddim_step(eta), process, t, s)
            close([A_, B_, C_, B_score], [alpha**-0.5, B, eta * tilde**0.5, -std * B], 1e-12)
            assert eta < 1 or abs(B - ddpm_B) < 1e-12  # eta = 1 is ancestral sampling
            assert eta == 1 or abs(B - ddpm_B) > 1e-6  # below, DDIM has coefficients of its own


def test_going_past_a_prediction_extrapolates_both_views():
    oracle, x = mixture(), randn(4, 2)
    free, given = oracle(x, times(300)), oracle(x, times(300), y=torch.tensor([0, 1, 0, 1]))
    for w in (0.0, 1.0, 2.5):
        pred = free.toward(given, w)
        close(pred.eps, (1 - w) * free.eps + w * given.eps, 1e-14)
        close(pred.scale * pred.x0 + pred.std * pred.eps, x, 1e-13)


# The interface between networks and samplers


class Scaled(torch.nn.Module):
    """A net that multiplies; it remembers what it was called with."""

    def __init__(self, factor=0.3):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor, dtype=F64))

    def forward(self, x, clock, **cond):
        self.seen = x, clock, cond
        return self.factor * x


@pytest.mark.parametrize("process", [ddpm(), VPSDE(), SubVPSDE(), VESDE(), VE()], ids=lambda p: type(p).__name__)
def test_the_network_sees_unit_variance_and_the_clock(process):
    t = torch.tensor([300, 900, 1000, 5]) if process.discrete else process.T * times(0.3, 0.9, 1.0, 0.005).double()
    for view in VIEWS:
        net = Scaled()
        x_t, scale, std, *_ = noised(process, t)
        pred = Denoiser(net, process, predicts=view)(x_t, t)
        x_in, clock, _ = net.seen
        close(x_in, x_t / (scale**2 + std**2).sqrt(), 1e-15)
        close(clock, process.clock(t), 1e-6)
        close(getattr(pred, view), 0.3 * x_in, 1e-12 / scale.min().item())
        close(pred.scale * pred.x0 + pred.std * pred.eps, x_t, 1e-11)


def test_the_clock_keeps_its_digits_in_half_precision():
    net = Scaled().bfloat16()
    Denoiser(net, ddpm())(randn(2, 3, dtype=torch.bfloat16), torch.tensor([999, 998]))
    x_in, clock, _ = net.seen
    assert x_in.dtype == torch.bfloat16 and clock.tolist() == [999.0, 998.0]  # bfloat16 would say 1000, 1000


@pytest.mark.equation("edm.precond")
@pytest.mark.parametrize("process", [VE(), ddpm(), VPSDE(), VESDE()], ids=lambda p: type(p).__name__)
def test_preconditioning_gives_unit_variance_in_and_out(process):
    sd, t = 0.5, times(300) if process.discrete else torch.tensor(0.3 * process.T, dtype=F64)
    model = EDMDenoiser(Scaled(), process, sigma_data=sd)
    x_t = randn(4, 3)
    pred = model(x_t, t)
    x_in, clock, _ = model.net.seen
    scale, std = (c.item() for c in process.marginal(t))
    sigma = std / scale
    close(clock, torch.full((4,), 250.0, dtype=F64) * torch.tensor(sigma, dtype=F64).log(), 1e-9)
    skip, out = sd**2 / (sigma**2 + sd**2), sigma * sd / (sigma**2 + sd**2) ** 0.5
    c_in = 1 / (sigma**2 + sd**2) ** 0.5
    close(x_in, c_in * x_t / scale, 1e-12)
    close(pred.x0, skip * x_t / scale + out * 0.3 * c_in * x_t / scale, 1e-12)
    close(c_in**2 * (sd**2 + sigma**2), 1.0, 1e-13)  # variance of what the network sees
    target = ((1 - skip) ** 2 * sd**2 + skip**2 * sigma**2) / out**2  # of (x0 - c_skip x) / c_out
    close(target, 1.0, 1e-12)
    close((sigma**2 + sd**2) / (sigma * sd) ** 2 * out**2, 1.0, 1e-12)  # EDM's weight times c_out^2


@pytest.mark.equation("edm.precond")
def test_a_silent_network_is_the_exact_answer_for_a_bell():
    process, t, x = ddpm(), times(5, 300, 900), randn(3, 2)
    silent = EDMDenoiser(Scaled(0.0), process, sigma_data=0.5)
    close(silent(x, t).x0, GaussianOracle(process, 0.0, 0.25)(x, t).x0, 1e-13)


def test_a_learned_variance_is_the_second_half_of_the_channels():
    net = lambda x, clock: torch.cat([x, torch.full_like(x, 0.5)], dim=1)
    for model in (Denoiser(net, ddpm(), learned_variance=True), EDMDenoiser(net, ddpm(), learned_variance=True)):
        pred = model(randn(2, 3, 4, 4), times(5))
        assert pred.x0.shape == (2, 3, 4, 4) and (pred.frac == 0.75).all()


def test_conditions_reach_the_network():
    model = Denoiser(Scaled(), ddpm())
    y = torch.tensor([1, 2])
    model(randn(2, 3), times(5), y=y)
    assert model.net.seen[2]["y"] is y and model.net.seen[1].shape == (2,)
