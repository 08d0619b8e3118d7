"""Section 17: a classifier that knows the noise. Its input, its loss, what it learns, and guidance by it."""

import math

import pytest
import torch
from exact import F64, close, randn, times
from torch import nn
from torch.distributions import MultivariateNormal

from diffusion_edu import zoo
from diffusion_edu.denoiser import Denoiser, NoisyClassifier
from diffusion_edu.guidance import bind, classifier, classifier_free, dynamic_threshold, gradient
from diffusion_edu.losses import classifier_loss
from diffusion_edu.nets.classifier import Classifier
from diffusion_edu.nets.mlp import MLP
from diffusion_edu.oracles import GaussianMixtureOracle
from diffusion_edu.process import VE, VPSDE, DiscreteVP, q_sample
from diffusion_edu.samplers import guided_mean, make_ddim_step, make_ddpm_step, make_dpmpp_2m_step, noises, sample
from diffusion_edu.schedules import linear_beta
from diffusion_edu.training import Recipe, fit

Y = torch.tensor([0, 1, 2, 1])
THREE = dict(means=[[-1.0, 0.3], [0.5, -0.4], [1.5, 1.0]], stds=[0.3, 0.5, 0.3], weights=[0.5, 0.2, 0.3])
PARTS = THREE["means"], THREE["stds"]


def real(t):
    return torch.tensor(t, dtype=F64)


def drawn(net, seed=0):
    """The network in float64 with every parameter drawn: a fresh one has zeros."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in net.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)
    return net.double()


def points(process=None):
    return NoisyClassifier(drawn(MLP(2, width=16, depth=1, out_dim=3)), process or VPSDE())


# The exact one


@pytest.mark.equation("cg.classifier", "cg.joint_score")
def test_the_exact_classifier_is_bayes_rule_and_its_gradient_a_difference_of_scores():
    oracle, x = GaussianMixtureOracle(DiscreteVP(linear_beta(1000)), **THREE), randn(4, 2)
    for t in (20, 300, 900):
        scale, std = oracle.process.marginal(times(t))
        cov = lambda s: (scale**2 * s**2 + std**2) * torch.eye(2, dtype=F64)
        laws = [(scale * real(m), cov(s)) for m, s in zip(*PARTS, strict=True)]
        joint = [
            MultivariateNormal(*law).log_prob(x) + math.log(w) for law, w in zip(laws, THREE["weights"], strict=True)
        ]
        close(oracle.class_log_prob(x, times(t)), torch.stack(joint, 1).log_softmax(1), 1e-11)
        slope = gradient(lambda x, t: oracle.class_log_prob(x, t).gather(1, Y[:, None])[:, 0], x, times(t))
        close(slope, oracle(x, times(t), y=Y).score - oracle(x, times(t)).score, 1e-11)


# The network and its input


@pytest.mark.equation("cg.classifier")
@pytest.mark.parametrize("process", [VPSDE(), VE(), DiscreteVP(linear_beta(1000))], ids=lambda p: type(p).__name__)
def test_the_network_sees_unit_variance_and_the_clock_and_its_logits_become_log_probabilities(process):
    clf, x = points(process), 3 * randn(4, 2)
    several = times(5, 300, 900, 1000) if process.discrete else process.T * real([0.005, 0.3, 0.9, 1.0])
    for t in (several, several[1], several[1] * (1 if isinstance(process, VE) else 0)):
        scale, std = (c.expand(4)[:, None] for c in process.marginal(t))
        logits = clf.net(x / (scale**2 + std**2).sqrt(), process.clock(t).double().expand(4))
        close(clf(x, t), logits.log_softmax(1), 1e-13)
        close(clf(x, t).exp().sum(1), torch.ones(4), 1e-14)
        close(clf.log_prob(Y)(x, t), torch.stack([clf(x, t)[i, k] for i, k in enumerate(Y)]), 0)


def test_images_are_told_the_time_in_their_features():
    net = drawn(Classifier(1, size=8, n_classes=3, width=8, n_features=16, time=True))
    x, clock = randn(2, 1, 8, 8), real([10.0, 700.0])
    h = nn.functional.silu(net.body(x) + net.condition(clock))
    close(net.features(x, clock), h, 1e-14)
    close(net(x, clock), net.head(h), 1e-13)
    assert (net(x, clock) - net(x, clock + 50)).abs().max() > 1e-3
    clf = NoisyClassifier(net, VPSDE())
    assert clf(x, real(0.5)).shape == (2, 3) and clf(x[:0], real(0.5)).shape == (0, 3)


def test_a_classifier_without_time_is_the_one_that_is_stored():
    stored = zoo.load("digits_classifier").state_dict()
    net = Classifier()
    assert net.state_dict().keys() == stored.keys() and not any("condition" in name for name in stored)
    net.load_state_dict(stored)
    timed = zoo.load("digits_noisy_classifier").net
    assert timed.state_dict().keys() - stored.keys() == {"condition.time.weight", "condition.time.bias"}
    with pytest.raises(RuntimeError, match="condition.time.weight"):
        Classifier().load_state_dict(timed.state_dict())


def test_what_does_not_fit_is_named():
    clf, x, t = points(), randn(4, 2), real(0.5)
    with_time, without = (Classifier(1, 8, 3, width=8, time=time).double() for time in (True, False))
    images = randn(4, 1, 8, 8)
    cases = [
        (lambda: clf(x.float(), t), TypeError, "x_t must have the network's dtype torch.float64; got torch.float32"),
        (lambda: clf(x.long(), t), TypeError, "x_t must be a floating-point tensor"),
        (lambda: clf(x, 0.5), TypeError, "t must be a torch.Tensor; got float"),
        (lambda: clf(x, real([0.1, 0.2, 0.3])), ValueError, r"t must be 0-d or of shape \(4,\)"),
        (lambda: clf(x, real(1.5)), ValueError, r"t must be in \[0, 1\]; got 1.5"),
        (lambda: clf(randn(4, 3), t), ValueError, r"x must have shape \(B, 2\)"),
        (lambda: clf.log_prob(Y[:3])(x, t), ValueError, r"y must have shape \(4,\), one label an example; got \(3,\)"),
        (lambda: clf.log_prob(Y + 1)(x, t), ValueError, r"y must be in \[0, 2\]; got 1..3"),
        (lambda: clf.log_prob(Y - 1)(x, t), ValueError, r"y must be in \[0, 2\]; got -1..1"),
        (lambda: clf.log_prob(Y.double())(x, t), TypeError, "y must be an int64 tensor"),
        (lambda: classifier_loss(clf, x, t, x, Y[:3]), ValueError, r"y must have shape \(4,\)"),
        (lambda: classifier_loss(clf, x, t, x, Y + 1), ValueError, r"y must be in \[0, 2\]"),
        (lambda: gradient(clf, x, t), ValueError, r"log_prob\(x, t\) must have shape \(4,\).*; got \(4, 3\)"),
        (lambda: NoisyClassifier(lambda x, clock: x[:, 0], VPSDE())(x, t), ValueError, r"model output must have shape"),
        (lambda: NoisyClassifier(MLP, VPSDE()), TypeError, "net must be a network, such as"),
        (lambda: NoisyClassifier(MLP(), linear_beta(1000)), TypeError, "process must be a Process"),
        (lambda: NoisyClassifier(without, VPSDE())(images, t), ValueError, "clock must be left out: time=False"),
        (lambda: with_time(images), ValueError, "clock must be given: time=True; got None"),
        (lambda: with_time(images[..., :6], t), ValueError, r"x must have shape \(B, 1, 8, 8\)"),
        (lambda: Classifier(size=7), ValueError, "size must be even; got 7"),
        (lambda: points(VE())(x, real(0.0)), ValueError, "t must be greater than 0 on this process; got 0"),
    ]
    for call, kind, message in cases:
        with pytest.raises(kind, match=message):
            call()


# Its loss, and what it learns


@pytest.mark.equation("cg.classifier")
def test_the_loss_is_the_cross_entropy_of_noised_data():
    clf, x0, eps = points(), randn(4, 2), randn(4, 2, seed=1)
    t = real([0.0, 0.1, 0.5, 1.0])
    x_t = q_sample(clf.process, x0, t, eps)
    close(classifier_loss(clf, x0, t, eps, Y), nn.functional.nll_loss(clf(x_t, t), Y, reduction="none"), 1e-14)
    fresh = NoisyClassifier(MLP(2, width=8, out_dim=3).double(), VPSDE())
    at_first = torch.full((4,), math.log(3), dtype=F64)  # it knows nothing yet
    close(classifier_loss(fresh, x0, t, eps, Y), at_first, 1e-14)


@pytest.mark.equation("cg.classifier")
def test_a_small_network_learns_the_exact_posterior_and_guides_as_it_does():
    oracle = GaussianMixtureOracle(VPSDE(), **THREE)
    x0, y = oracle.sample(20_000, torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    clf = NoisyClassifier(MLP(2, width=64, depth=2, n_waves=2, out_dim=3), oracle.process)
    losses = list(fit(clf, x0.float(), Recipe(400, lr=5e-3, loss=classifier_loss), y=y))
    assert losses[0] == pytest.approx(math.log(3), abs=1e-6)
    clf.double()
    t = oracle.process.sample_t(4000, torch.Generator().manual_seed(1))
    k = torch.arange(4000) % 3
    x_t = q_sample(oracle.process, oracle.means[k] + oracle.stds[k, None] * randn(4000, 2), t, randn(4000, 2, seed=1))
    exact = oracle.class_log_prob(x_t, t)
    with torch.no_grad():
        divergence = (exact.exp() * (exact - clf(x_t, t))).sum(1).mean()
    ignorance = (exact.exp() * (exact + math.log(3))).sum(1).mean()  # of a classifier that says 1/3
    assert 0 <= divergence < 0.015 < 0.3 < ignorance  # nats; about 0.003
    bayes = lambda x, t: oracle.class_log_prob(x, t)[range(4000), k]
    slope, right = (gradient(log_prob, x_t, t) for log_prob in (clf.log_prob(k), bayes))
    clear = right.norm(dim=1) > 0.3  # where there is something to follow
    assert clear.sum() > 1000 and torch.cosine_similarity(slope, right)[clear].mean() > 0.95  # 0.99 as a rule


# Guidance by it


@pytest.mark.equation("cg.eps")
def test_guidance_by_the_network_is_autograd_by_hand():
    clf, model = points(), Denoiser(drawn(MLP(2, width=16, depth=1), seed=1), VPSDE())
    for t in (real(0.3), real([0.1, 0.4, 0.7, 1.0])):
        x = randn(4, 2).requires_grad_()
        slope = torch.autograd.grad(clf(x, t)[range(4), Y].sum(), x)[0]
        pred = model(x, t)
        guided = classifier(model, clf.log_prob(Y), 2.5)(x.detach(), t)
        close(guided.eps, pred.eps - 2.5 * pred.std * slope, 1e-13)
        close(guided.x0, pred.x0 + 2.5 * pred.std**2 / pred.scale * slope, 1e-10)
        assert all(p.grad is None for p in clf.parameters())


def test_guided_sampling_works_and_keeps_no_graph_wherever_it_is_called_from():
    clf, model = points(), Denoiser(drawn(MLP(2, width=16, depth=1), seed=1), VPSDE())
    ends = []  # of all three, for both ways
    for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with context():  # labels, times and noise are made inside, as users do
            y, grid = torch.tensor([0, 1, 2, 1]), model.process.grid(6)
            for step, guided in (
                (make_ddpm_step(), classifier(model, clf.log_prob(y), 1.0)),
                (guided_mean(make_ddpm_step(), clf.log_prob(y), 1.0), model),
            ):
                *_, x0 = sample(step, guided, randn(4, 2), grid, noises(0))
                assert not x0.requires_grad and x0.grad_fn is None
                ends.append(x0.clone())
    for i in (0, 1):
        assert torch.equal(ends[i], ends[i + 2]) and torch.equal(ends[i], ends[i + 4])


def test_a_last_step_that_draws_nothing_is_not_guided():
    """Its clean data are out of the classifier's reach: on VE the network cannot even be asked about time 0."""
    process = VE(5.0)
    clf, model = points(process), Denoiser(drawn(MLP(2, width=16, depth=1), seed=1), process, predicts="x0")
    grid = real([5.0, 1.0, 0.2, 0.0])
    for plain in (make_ddpm_step(), make_ddim_step(0.7)):
        step = guided_mean(plain, clf.log_prob(Y), 1.0)
        *_, before, x0 = sample(step, model, randn(4, 2), grid, noises(0))
        assert torch.equal(x0, model(before, grid[2]).x0) and x0.isfinite().all()


# Digits


def digits(guided, seed=0):
    """Judge's accuracy on guided digits of the classes 0, 1, ..., 9, 0, ...; eight steps."""
    times = zoo.digit_grid(guided.process, 8)
    x_T = randn(N_DIGITS, 1, 8, 8, seed=seed, dtype=torch.float32)
    *_, x0 = sample(make_dpmpp_2m_step(), guided, x_T, times)
    return zoo.accuracy(zoo.load("digits_classifier"), x0.clamp(-1, 1), torch.arange(N_DIGITS) % 10)


N_DIGITS = 100
CHANCE = 4 * (0.1 * 0.9 / N_DIGITS) ** 0.5  # four standard errors


@pytest.mark.equation("cfg.sample", "thresh.dynamic")
def test_digits_go_from_chance_to_certainty_by_scale_three_and_stay_right_at_eight_with_a_threshold():
    model, y = zoo.load("digits_unet"), torch.arange(N_DIGITS) % 10
    assert abs(digits(classifier_free(model, 0.0, y=y)) - 0.1) < CHANCE
    assert digits(classifier_free(model, 3.0, y=y)) >= 0.99
    assert digits(dynamic_threshold(classifier_free(model, 8.0, y=y), 0.9)) >= 0.95


@pytest.mark.equation("cg.eps")
def test_a_noise_aware_classifier_turns_unconditional_digits_into_those_wanted():
    model, y = zoo.load("digits_unet"), torch.arange(N_DIGITS) % 10
    free = bind(model, y=y, drop=torch.ones(N_DIGITS, dtype=torch.bool))
    judged = digits(classifier(free, zoo.load("digits_noisy_classifier").log_prob(y), 1.0))
    assert judged > 0.1 + CHANCE  # about a half with so few steps
