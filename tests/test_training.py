"""The loop: what it draws, what it minimises, what the average is, and how it stops."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from diffusion_edu.data import swiss_roll
from diffusion_edu.denoiser import Denoiser
from diffusion_edu.elbo import hybrid_loss
from diffusion_edu.losses import denoising_loss
from diffusion_edu.nets.autoencoder import GaussianMLP
from diffusion_edu.nets.mlp import MLP
from diffusion_edu.nets.unet import UNet
from diffusion_edu.oracles import GaussianMixtureOracle, GaussianOracle
from diffusion_edu.process import VPSDE, DiscreteVP
from diffusion_edu.samplers import learned, noises
from diffusion_edu.schedules import linear_beta
from diffusion_edu.training import (
    Recipe,
    averaged,
    batch_loss,
    draw_batch,
    fit,
    fit_classifier,
    fit_vae,
    flipped,
    learning_rate,
    level_between,
    log_normal_times,
    power_averaged,
)
from diffusion_edu.vae import HVAE, VAE, LinearVAE


class LinearPerStep(nn.Module):
    """eps = a_t x + b_t, one pair of numbers for each step of the table."""

    def __init__(self, T):
        super().__init__()
        self.T, self.a, self.b = T, nn.Parameter(torch.zeros(T + 1)), nn.Parameter(torch.zeros(T + 1))

    def forward(self, x, clock):
        t = (clock * self.T / 1000).round().long()
        return self.a[t, None] * x + self.b[t, None]


@pytest.mark.equation("ddpm.train_alg1")
def test_linear_model_reaches_the_exact_minimiser():
    """For N(m, v) data the best eps is sqrt(1 - abar) (x - sqrt(abar) m) / (abar v + 1 - abar): linear in x."""
    process = DiscreteVP(linear_beta(10, 0.1, 0.7))
    mean, variance = 0.7, 0.25
    x0 = mean + math.sqrt(variance) * torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0))
    model = Denoiser(LinearPerStep(10), process)
    losses = list(fit(model, x0, Recipe(800, batch_size=1024, lr=0.05)))
    abar = process.alpha_bar[1:]
    slope = (1 - abar).sqrt() / (abar * variance + 1 - abar)
    offset = -slope * abar.sqrt() * mean
    # the last steps average over some 1e5 draws, 1e4 a time: 0.02 is about 4 standard errors
    torch.testing.assert_close(model.net.a.data[1:].double(), slope, rtol=0, atol=0.02)
    torch.testing.assert_close(model.net.b.data[1:].double(), offset, rtol=0, atol=0.02)
    floor = (abar * variance / (abar * variance + 1 - abar)).mean().item()
    assert abs(sum(losses[-200:]) / 200 - floor) < 0.005


@pytest.mark.equation("ddpm.train_code")
def test_steps_draw_anew_and_the_loss_does_not_depend_on_the_batch_size():
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Parameter(torch.zeros(1))

        def forward(self, x, clock):
            seen.append((x.detach().clone(), clock.clone()))
            return self.one * x

    model = Denoiser(Spy(), DiscreteVP(linear_beta(1000)))
    x0 = torch.zeros(50, 2)
    list(fit(model, x0, Recipe(2, batch_size=16, lr=0.0)))
    assert not torch.equal(seen[0][1], seen[1][1]) and not torch.equal(seen[0][0], seen[1][0])
    losses = {n: list(fit(model, x0, Recipe(4000 // n, batch_size=n, lr=0.0, seed=n))) for n in (4, 100)}
    for n, values in losses.items():  # E|eps|^2 per dimension is 1; 8000 squares: standard error 0.016
        assert abs(sum(values) / len(values) - 1) < 4 * 0.016, n


def test_a_step_is_adam_on_the_mean_loss_with_the_recipe_s_draws():
    x0 = swiss_roll(100, seed=0)
    recipe = Recipe(1, batch_size=8, lr=1e-2, seed=3)
    torch.manual_seed(0)
    model, by_hand = (Denoiser(MLP(width=8, depth=1), VPSDE()) for _ in range(2))
    by_hand.load_state_dict(model.state_dict())
    (value,) = fit(model, x0, recipe)
    generator = torch.Generator().manual_seed(3)
    i = torch.randint(100, (8,), generator=generator)
    t = by_hand.process.sample_t(8, generator)
    eps = torch.randn(8, 2, generator=generator)
    optimizer = torch.optim.Adam(by_hand.parameters(), lr=1e-2 * learning_rate(0, recipe))
    loss = denoising_loss(by_hand, x0[i], t, eps).mean()
    loss.backward()
    optimizer.step()
    assert value == loss.item()
    for a, b in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_the_seed_decides_and_the_conditions_follow_their_rows():
    def losses(seed):
        torch.manual_seed(0)
        net = MLP(width=8, depth=1, n_classes=2)
        y = torch.arange(100) % 2
        return list(
            fit(Denoiser(net, VPSDE()), y[:, None].expand(100, 2).float(), Recipe(20, 16, seed=seed, p_drop=0.5), y=y)
        )

    assert losses(0) == losses(0) != losses(1)


class ThreeFeatures(nn.Module):
    """eps = W_y (x, 1, tanh(k x)), with a row of W for each of two labels and one for none."""

    def __init__(self, k):
        super().__init__()
        self.k, self.rows = k, nn.Parameter(torch.zeros(3, 3))

    def forward(self, x, clock, y, drop=None):
        features = torch.cat([x, torch.ones_like(x), (self.k * x).tanh()], dim=1)
        return (features * self.rows[y if drop is None else torch.where(drop, 2, y)]).sum(1, keepdim=True)


@pytest.mark.equation("cfg.dropout", "cfg.train", "cfg.null")
def test_one_network_learns_the_conditional_and_the_marginal_noise_if_labels_are_dropped():
    """Two classes N(-m, s^2) and N(m, s^2): eps*(x | y) is linear in x, and eps*(x) in x and tanh(a m x / v)."""
    m, s, t = 0.8, 0.5, torch.tensor(0.25, dtype=torch.float64)
    oracle = GaussianMixtureOracle(VPSDE(), [[-m], [m]], [s, s])
    scale, std = oracle.process.marginal(t)
    k = (scale * m / (scale**2 * s**2 + std**2)).item()
    x0, y = oracle.sample(100_000, torch.Generator().manual_seed(0))
    at_t = lambda process, n, generator: t.expand(n)
    x = torch.linspace(-1.5, 1.5, 41)[:, None]
    found = {}
    for p_drop in (0.3, 0.0):
        model = Denoiser(ThreeFeatures(k), oracle.process)
        recipe = Recipe(600, batch_size=1024, lr=0.05, p_drop=p_drop, sample_t=at_t)
        list(fit(model, x0.float(), recipe, y=y))
        with torch.no_grad():
            drop = torch.ones(41, dtype=torch.bool)
            errors = [model(x, t, y=y).eps - oracle(x, t, y=y).eps for y in torch.arange(2)[:, None].expand(2, 41)]
            errors += [model(x, t, y=y[:41], drop=drop).eps - oracle(x, t).eps]
        found[p_drop] = [(error**2).mean().sqrt().item() for error in errors]
    # the 100,000 points and the last steps leave an error of about 0.015
    assert max(found[0.3]) < 0.04 and max(found[0.0][:2]) < 0.04
    assert found[0.0][2] > 0.5  # never dropped: the row of no label is as it was made


@pytest.mark.equation("cfg.dropout")
def test_dropped_share_is_p_drop_and_labels_match_rows():
    drops, pairs = [], []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.zero = nn.Parameter(torch.zeros(1))

        def forward(self, x, clock, y, drop):
            drops.append(drop)
            pairs.append((x.detach(), y))
            return self.zero * x

    x0 = 100.0 * torch.arange(10.0)[:, None]
    sample_t = lambda process, n, generator: torch.full((n,), 1e-6, dtype=torch.float64)
    recipe = Recipe(200, batch_size=50, p_drop=0.2, sample_t=sample_t)
    list(fit(Denoiser(Spy(), VPSDE()), x0, recipe, y=torch.arange(10)))
    assert abs(torch.cat(drops).float().mean() - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 10_000)
    drops.clear()
    list(fit(Denoiser(Spy(), VPSDE()), x0, replace(recipe, n_steps=5, p_drop=1.0), y=torch.arange(10)))
    assert torch.cat(drops).all()
    for x, y in pairs:
        assert torch.equal((x[:, 0] / 100).round().long(), y)


@pytest.mark.equation("ddpm.ema")
def test_ema_is_a_geometric_average():
    model = nn.Linear(2, 1).double()
    ema = averaged(model, decay=0.9)

    def update(value):
        nn.init.constant_(model.weight, value)
        ema.update_parameters(model)

    update(0.0)  # the first update copies
    assert torch.equal(ema.module.weight, torch.zeros(1, 2, dtype=torch.float64))
    for n in range(1, 8):
        update(1.0)
        torch.testing.assert_close(
            ema.module.weight, torch.full((1, 2), 1 - 0.9**n, dtype=torch.float64), rtol=0, atol=1e-14
        )
    for _ in range(3):
        update(ema.module.weight[0, 0].item())
    torch.testing.assert_close(
        ema.module.weight, torch.full((1, 2), 1 - 0.9**7, dtype=torch.float64), rtol=0, atol=1e-14
    )


def test_fit_keeps_the_average_and_leaves_it_in_eval_mode():
    torch.manual_seed(0)
    model = Denoiser(MLP(width=8, depth=1), VPSDE())
    ema = averaged(model, decay=0.5)
    weights = [model.net.first.weight.detach().clone() for _ in fit(model, swiss_roll(50, 0), Recipe(3, 8), ema=ema)]
    expected = 0.25 * weights[0] + 0.25 * weights[1] + 0.5 * weights[2]
    torch.testing.assert_close(ema.module.net.first.weight, expected)
    assert not ema.module.training and ema.module.process.T == 1


def test_learning_rate_rises_once_and_falls_to_zero():
    rates = [learning_rate(step, Recipe(500)) for step in range(500)]
    assert rates[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])
    assert all(a > b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert 0 < rates[-1] < 1e-4
    assert learning_rate(0, Recipe(1)) == 1
    assert {learning_rate(step, Recipe(500, schedule="constant")) for step in range(10, 500)} == {1.0}


@pytest.mark.parametrize("process", [VPSDE(), DiscreteVP(linear_beta(1000))], ids=["sde", "table"])
def test_log_normal_times(process):
    t = log_normal_times(-0.5, 0.8)(process, 20_000, torch.Generator().manual_seed(0))
    log_sigma = -process.log_snr(t) / 2
    assert t.dtype == process.time_dtype and t.shape == (20_000,)
    assert abs(log_sigma.mean() + 0.5) < 0.03 and abs(log_sigma.std() - 0.8) < 0.03  # 4 standard errors: 0.023, 0.016
    far = log_normal_times(50.0, 0.0)(process, 3)
    assert (far > 0.999999 * process.T).all() and (far <= process.T).all()


def test_mode_is_restored_also_after_an_early_stop():
    model = Denoiser(MLP(width=8, depth=1), VPSDE()).eval()
    losses = fit(model, swiss_roll(50, 0), Recipe(5, 8))
    next(losses)
    assert model.training
    losses.close()
    assert not model.training


def test_nan_stops_before_the_step_and_is_named():
    torch.manual_seed(0)
    model = Denoiser(MLP(width=8, depth=1), VPSDE())
    losses = fit(model, swiss_roll(50, 0), Recipe(5, 8))
    next(losses)
    model.net.layers[0].bias.data[2] = float("nan")
    kept = model.net.first.weight.detach().clone()
    with pytest.raises(FloatingPointError, match="loss is nan at step 1; parameter net.layers.0.bias is not finite"):
        next(losses)
    assert torch.equal(model.net.first.weight, kept)
    x0 = swiss_roll(50, 0)
    x0[:] = float("nan")
    with pytest.raises(FloatingPointError, match="at step 0; the gradient of net"):
        list(fit(Denoiser(MLP(width=8, depth=1), VPSDE()), x0, Recipe(5, 8)))


def test_bad_recipes_and_data_are_named():
    for options, kind, message in (
        ({"n_steps": -1}, ValueError, "n_steps must be at least 0"),
        ({"n_steps": True}, TypeError, "n_steps must be an integer"),
        ({"n_steps": 1, "batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"n_steps": 1, "lr": math.nan}, ValueError, "lr must be finite"),
        ({"n_steps": 1, "p_drop": 1.5}, ValueError, r"p_drop must be in \[0, 1\]"),
        ({"n_steps": 1, "target": "epsilon"}, ValueError, "target must be one of"),
        ({"n_steps": 1, "sample_t": 3}, TypeError, "sample_t must be a function"),
    ):
        with pytest.raises(kind, match=message):
            Recipe(**options)
    model = Denoiser(MLP(width=8, depth=1, n_classes=2), VPSDE())
    with pytest.raises(ValueError, match="y must have 50 rows, like x0; got 49"):
        fit(model, swiss_roll(50, 0), Recipe(1), y=torch.zeros(49, dtype=torch.int64))
    with pytest.raises(ValueError, match="x0 must hold at least one example"):
        fit(model, torch.zeros(0, 2), Recipe(1))
    with pytest.raises(TypeError, match=r"scale images to \[-1, 1\]"):
        fit(model, torch.zeros(5, 2, dtype=torch.uint8), Recipe(1))
    with pytest.raises(ValueError, match="decay must be in"):
        averaged(model, decay=1.5)


def test_fit_classifier_learns_and_its_loss_starts_at_log_n():
    torch.manual_seed(0)
    y = torch.arange(90) % 3
    x = torch.nn.functional.one_hot(y, 3).float()
    net = nn.Linear(3, 3)
    nn.init.zeros_(net.weight), nn.init.zeros_(net.bias)
    losses = list(fit_classifier(net, x, y, Recipe(200, 32, lr=0.1)))
    assert losses[0] == pytest.approx(math.log(3), abs=1e-6)
    assert losses[-1] < 0.05 and (net(x).argmax(1) == y).all()


def test_every_step_trains_and_every_part_gets_its_own_mode_back():
    net = UNet(width=8)
    net.condition.eval()
    model, seen = Denoiser(net, VPSDE()), []
    net.first.register_forward_hook(lambda part, _in, _out: seen.append(part.training))
    for _ in fit(model, torch.zeros(4, 1, 8, 8), Recipe(4, 2)):
        model.eval()  # to look at a sample
    assert seen == [True] * 4 and net.first.training and not net.condition.training


def test_a_recipe_may_bring_its_own_loss():
    seen = {"own": [], "plain": []}

    def own(model, x0, t, eps, y, drop):
        seen["own"].append((x0, t, eps, y, drop))
        return model.net.layers[0].bias.sum() + 3 * t

    def spy(process, t):
        seen["plain"].append(t)
        return torch.ones(len(t))

    for recipe in ({"loss": own, "target": "x0", "weight": spy}, {"weight": spy}):
        model = Denoiser(MLP(width=8, depth=1, n_classes=2), DiscreteVP(linear_beta(1000)))
        losses = list(fit(model, torch.zeros(9, 2), Recipe(2, 16, lr=0.0, p_drop=0.5, **recipe), y=torch.arange(9) % 2))
        if "loss" in recipe:
            start, own_losses = model.net.layers[0].bias.sum().item(), losses
    assert len(seen["own"]) == len(seen["plain"]) == 2  # the weight is asked by the plain loss only
    for (x0, t, eps, y, drop), plain, loss in zip(seen["own"], seen["plain"], own_losses, strict=True):
        assert torch.equal(t, plain) and x0.shape == eps.shape == (16, 2) and y.shape == drop.shape == (16,)
        assert loss == pytest.approx(start + 3 * t.double().mean().item(), rel=1e-6)


class LinearWithVariance(LinearPerStep):
    """The same, and a number for the variance of each step."""

    def __init__(self, T):
        super().__init__(T)
        self.level = nn.Parameter(torch.zeros(T + 1))

    def forward(self, x, clock):
        t = (clock * self.T / 1000).round().long()
        return torch.cat([super().forward(x, clock), self.level[t, None].expand_as(x)], dim=1)


@pytest.mark.filterwarnings("ignore:alpha_bar")
def test_the_hybrid_loss_learns_the_exact_reverse_variance_beside_the_mean():
    process = DiscreteVP(linear_beta(5, 0.1, 0.7))
    x0 = 0.5 * torch.randn(50_000, 1, generator=torch.Generator().manual_seed(0))
    model, oracle = Denoiser(LinearWithVariance(5), process, learned_variance=True), GaussianOracle(process, 0, 0.25)
    t, x = torch.arange(1, 6), torch.zeros(5, 1)

    @torch.no_grad()
    def error():
        exact = oracle.reverse_kernel(x, t, t - 1)[1] ** 2
        return (learned(model(x, t), process, t, t - 1) / exact).log().abs().max()

    assert error() > 0.15
    list(fit(model, x0, Recipe(400, batch_size=1024, lr=0.1, loss=hybrid_loss)))
    assert error() < 0.04  # the last steps average over some 2e4 squares a time: 4 standard errors of a variance


@pytest.mark.parametrize("kind", [VAE, HVAE])
def test_fit_vae_reaches_the_entropy_of_linear_gaussian_data(kind):
    """Lines are enough: the true posterior of such data is linear, so the bound can be tight."""
    truth = LinearVAE(torch.tensor([[1.2], [-0.6]]).double(), torch.tensor([0.3, -0.5]).double(), 0.2)
    noise = noises(0)
    mean, sigma = truth.decoder(noise(torch.zeros(20_000, 1).double()))
    x = mean + sigma * noise(mean)
    line = lambda a, b, **options: GaussianMLP(a, b, depth=0, **options)
    torch.manual_seed(0)
    decoder = line(1, 2, sigma="one", sigma_start=0.5)
    model = VAE(line(2, 1), decoder) if kind is VAE else HVAE([line(2, 1), line(1, 1)], [decoder, line(1, 1)])
    losses = list(fit_vae(model, x.float(), Recipe(600, lr=0.03)))
    entropy = -truth.log_prob(x).mean().item() / 2  # per dimension
    with torch.no_grad():
        bound = -model.elbo(x.float(), noises(1)).mean().item() / 2
    # 4 standard errors of the last 25,600 draws are 0.013
    assert losses[0] > entropy + 1 and abs(sum(losses[-100:]) / 100 - entropy) < 0.02
    assert -1e-3 < bound - entropy < 3e-3  # the fit to these 20,000 points may beat the truth by a few parameters / N


@pytest.mark.equation("edm2.ema_and_mp")
@pytest.mark.parametrize("gamma, width", [(6.94, 0.10), (16.97, 0.05), (0.0, None)])
def test_the_power_average_is_its_closed_form(gamma, width):
    """Step k of t has the share (k / t)^(gamma + 1) - ((k - 1) / t)^(gamma + 1), whatever the weights did."""
    model, n = nn.Linear(3, 1, bias=False).double(), 300
    average, kept = power_averaged(model, gamma), []
    generator = torch.Generator().manual_seed(0)
    for t in range(1, n + 1):
        model.weight.data = torch.randn(1, 3, generator=generator, dtype=torch.float64)
        kept.append(model.weight[0].clone())
        average.update_parameters(model)
        if t in (1, 2, 7, n):
            share = ((torch.arange(t + 1, dtype=torch.float64) / t) ** (gamma + 1)).diff()
            torch.testing.assert_close(average.module.weight[0], share @ torch.stack(kept), rtol=0, atol=1e-13)
    k = torch.arange(1, n + 1, dtype=torch.float64) / n
    if width:
        found = ((share @ k**2) - (share @ k) ** 2).sqrt()
        assert abs(found - width) < 1e-3  # 0.1 and 0.05 of the run; n = 300 steps are nearly continuous


@pytest.mark.equation("edm2.ema_and_mp")
def test_the_power_average_keeps_constant_weights_and_serves_fit():
    model = nn.Linear(3, 1).double()
    average, start = power_averaged(model), model.weight.clone()
    for _ in range(5):
        average.update_parameters(model)
        torch.testing.assert_close(average.module.weight, start, rtol=0, atol=1e-15)
    torch.manual_seed(0)
    model = Denoiser(MLP(width=8, depth=1), VPSDE())
    ema, bias = power_averaged(model, 1.0), lambda model: model.net.first.bias.detach().clone()
    seen = [bias(model) for _ in fit(model, swiss_roll(50, 0), Recipe(3, 8), ema=ema)]
    torch.testing.assert_close(bias(ema.module), seen[0] / 9 + seen[1] / 3 + seen[2] * 5 / 9)
    for wrong in (-1.0, math.nan):
        with pytest.raises(ValueError, match="gamma must be"):
            power_averaged(model, wrong)


@pytest.mark.equation("ref.wavegrad_level")
def test_levels_between_cover_all_from_the_noisiest_to_clean():
    process, n = DiscreteVP(linear_beta(10, 0.1, 0.7)), 20_000
    root = process.alpha_bar.sqrt()  # 1, ..., the noisiest
    t = level_between(process.continuous(), n, torch.Generator().manual_seed(0))
    assert t.shape == (n,) and t.dtype == torch.float64 and 0 < t.min() and t.max() <= process.T
    level = process.continuous().marginal(t)[0]
    assert root[10] <= level.min() < root[10] + 1e-3 * root[9] and 1 - 1e-3 < level.max() < 1
    cell = torch.searchsorted(-root, -level).clamp(1, 10)
    counts = torch.bincount(cell, minlength=11)[1:]
    assert (counts - n / 10).abs().max() < 4 * math.sqrt(n * 0.1 * 0.9)
    share = (level - root[cell]) / (root[cell - 1] - root[cell])  # uniform in each interval
    for lowest in (0.1, 0.5, 0.9):
        assert abs((share < lowest).double().mean() - lowest) < 4 * math.sqrt(lowest * (1 - lowest) / n)
    for s in range(1, 11):
        assert abs(share[cell == s].mean() - 0.5) < 4 * (1 / 12 / (n / 10)) ** 0.5


@pytest.mark.equation("ref.wavegrad_level")
def test_levels_between_train_on_a_table_joined_up_only():
    process = DiscreteVP(linear_beta(1000)).continuous()
    torch.manual_seed(0)
    losses = list(
        fit(Denoiser(MLP(width=8, depth=1), process), swiss_roll(50, 0), Recipe(3, 8, sample_t=level_between))
    )
    assert len(losses) == 3
    for other in (DiscreteVP(linear_beta(1000)), VPSDE()):
        with pytest.raises(TypeError, match=r"process must be a table joined up, DiscreteVP\(beta\).continuous\(\)"):
            level_between(other, 3)


def test_flips_mirror_half_of_the_images_and_leave_the_rest():
    x0 = torch.arange(2000 * 6.0).reshape(2000, 1, 2, 3)
    seen = flipped()(x0, torch.Generator().manual_seed(0))
    kept = (seen == x0).flatten(1).all(1)
    assert torch.equal(seen[~kept], x0[~kept].flip(3)) and abs(kept.sum() - 1000) < 4 * math.sqrt(500)
    assert torch.equal(seen, flipped()(x0, torch.Generator().manual_seed(0)))


def test_a_drawn_batch_is_all_that_the_loss_needs():
    recipe = Recipe(1, p_drop=0.5, augment=lambda x0, generator: x0 + torch.rand(len(x0), 1, generator=generator))
    x0, y = swiss_roll(40, 0), torch.arange(40) % 2
    batch = draw_batch(VPSDE(), recipe, torch.Generator().manual_seed(0), x0, y=y)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(batch["t"], VPSDE().sample_t(40, generator))
    assert torch.equal(batch["eps"], torch.randn(40, 2, generator=generator))
    assert torch.equal(batch["drop"], torch.rand(40, generator=generator) < 0.5)
    assert torch.equal(batch["x0"], x0 + torch.rand(40, 1, generator=generator)) and torch.equal(batch["y"], y)
    torch.manual_seed(0)
    model = Denoiser(MLP(width=8, depth=1, n_classes=2), VPSDE())
    assert torch.equal(batch_loss(model, recipe, batch), denoising_loss(model, **batch))
    plain = draw_batch(VPSDE(), Recipe(1), torch.Generator(), x0)
    assert plain.keys() == {"t", "eps", "x0"} and torch.equal(plain["x0"], x0)


def test_sizes_and_seeds_beyond_all_use_are_named():
    for name, most in (("n_steps", 10**9), ("batch_size", 10**9), ("seed", 2**63 - 1)):
        with pytest.raises(ValueError, match=f"{name} must be at most {most}; got {10**30}"):
            Recipe(**{"n_steps": 1, name: 10**30})
