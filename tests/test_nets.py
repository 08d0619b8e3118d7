"""The networks' parts against their formulas, and the networks against what must hold before any training."""

import math

import pytest
import torch

from diffusion_edu.denoiser import Denoiser
from diffusion_edu.losses import denoising_loss
from diffusion_edu.nets.autoencoder import GaussianMLP
from diffusion_edu.nets.classifier import Classifier
from diffusion_edu.nets.layers import (
    AdaGroupNorm,
    GaussianFourier,
    ResBlock,
    SelfAttention2d,
    attention,
    group_norm,
    time_embedding,
)
from diffusion_edu.nets.mlp import MLP, PerStepHeads
from diffusion_edu.nets.unet import UNet
from diffusion_edu.oracles import GaussianMixtureOracle
from diffusion_edu.process import VPSDE

F64 = torch.float64


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomised(module, seed=0, std=0.2):
    """The module in float64 with every parameter drawn, so that no zero hides a mistake."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = std * torch.randn(parameter.shape, generator=generator, dtype=F64)
    return module.double().eval()


# Embeddings


@pytest.mark.equation("arch.time_embed")
def test_time_embedding_has_constant_norm_and_depends_on_differences():
    t, s = torch.tensor([0.0, 3.5, 999.0], dtype=F64), torch.tensor([2.0, 7.25, 500.0], dtype=F64)
    a, b = time_embedding(t, 64), time_embedding(s, 64)
    torch.testing.assert_close((a**2).sum(1), torch.full((3,), 32.0, dtype=F64), rtol=1e-13, atol=0)
    shifted = time_embedding(t + 40, 64) * time_embedding(s + 40, 64)
    torch.testing.assert_close((a * b).sum(1), shifted.sum(1), rtol=0, atol=1e-11)  # angles up to 1e3
    k = 5
    omega = 10000 ** (-k / 32)
    torch.testing.assert_close(a[:, 2 * k], (t * omega).sin(), rtol=0, atol=1e-12)
    torch.testing.assert_close(a[:, 2 * k + 1], (t * omega).cos(), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="dim must be even; got 7"):
        time_embedding(t, 7)


@pytest.mark.equation("arch.fourier")
def test_fourier_features_are_a_gaussian_kernel_on_average():
    scale, dim = 0.3, 400_000
    embed = GaussianFourier(dim, scale, seed=1).double()
    t = torch.tensor([0.0, 0.4, 1.0], dtype=F64)
    e = embed(t)
    kernel = e @ e.T / (dim / 2)
    exact = torch.exp(-2 * math.pi**2 * scale**2 * (t[:, None] - t) ** 2)
    torch.testing.assert_close(kernel, exact, rtol=0, atol=4 / math.sqrt(dim))  # sd of a cosine is below 0.71
    assert not list(embed.parameters())


# Attention


@pytest.mark.equation("attn.core")
def test_attention_is_the_softmax_weighted_mean():
    q, k, v = randn(2, 3, 5, 4, seed=0), randn(2, 3, 7, 4, seed=1), randn(2, 3, 7, 6, seed=2)
    weights = (q @ k.transpose(-1, -2) / math.sqrt(4)).softmax(dim=-1)
    out = attention(q, k, v)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 5, dtype=F64), rtol=0, atol=1e-14)
    torch.testing.assert_close(out, weights @ v, rtol=0, atol=1e-13)
    order = torch.tensor([3, 1, 0, 6, 5, 2, 4])
    torch.testing.assert_close(out, attention(q, k[:, :, order], v[:, :, order]), rtol=0, atol=1e-13)
    same_key = k[:, :, :1].expand_as(k)
    mean = v.mean(2, keepdim=True).expand_as(out)
    torch.testing.assert_close(attention(q, same_key, v), mean, rtol=0, atol=1e-13)
    mask = torch.arange(7) < 4
    hidden = attention(q, k, v, mask=mask.expand(2, 3, 5, 7))
    torch.testing.assert_close(hidden, attention(q, k[:, :, :4], v[:, :, :4]), rtol=0, atol=1e-13)


@pytest.mark.equation("attn.self")
def test_self_attention_commutes_with_pixel_permutations():
    block = randomised(SelfAttention2d(16, heads=4))
    x = randn(2, 16, 4, 6)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))

    def permuted(image):
        return image.flatten(2)[:, :, order].reshape(image.shape)

    assert (block(x) - x).abs().max() > 0.1
    torch.testing.assert_close(block(permuted(x)), permuted(block(x)), rtol=0, atol=1e-12)
    fresh = SelfAttention2d(16).double()
    assert torch.equal(fresh(x), x)


def test_self_attention_heads_are_attention_of_their_channels():
    block = randomised(SelfAttention2d(8, heads=2))
    x = randn(1, 8, 2, 2)
    q, k, v = block.qkv(block.norm(x)).flatten(2).reshape(1, 3, 2, 4, 4).unbind(1)  # (1, heads, d, pixels)
    heads = [(v[:, h] @ ((k[:, h].mT @ q[:, h]) / 2).softmax(dim=1)) for h in range(2)]
    expected = x + block.out(torch.cat(heads, dim=1).reshape(x.shape))
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-12)


# Blocks


@pytest.mark.equation("arch.adagn")
def test_adagn_starts_as_group_norm_and_then_scales_and_shifts():
    h, emb = randn(3, 16, 4, 4), randn(3, 5, seed=1)
    layer = AdaGroupNorm(16, 5).double()
    plain = torch.nn.functional.group_norm(h, 8)
    torch.testing.assert_close(layer(h, emb), plain, rtol=0, atol=1e-14)
    randomised(layer)
    shift_scale = layer.scale_shift(torch.nn.functional.silu(emb))[..., None, None]
    expected = (1 + shift_scale[:, :16]) * plain + shift_scale[:, 16:]
    torch.testing.assert_close(layer(h, emb), expected, rtol=0, atol=1e-13)


@pytest.mark.equation("arch.resblock")
def test_resblock_starts_as_the_identity_and_feels_its_condition():
    x, emb = randn(2, 16, 4, 4), randn(2, 8, seed=1)
    block = ResBlock(16, 16, 8).double()
    assert torch.equal(block(x, emb), x)
    wider = ResBlock(16, 24, 8).double()
    assert torch.equal(wider(x, emb), wider.skip(x))
    randomised(block)
    assert (block(x, emb) - block(x, emb + 1)).abs().max() > 1e-3


# U-Net


@pytest.mark.equation("arch.unet")
@pytest.mark.parametrize("size", [(8, 8), (2, 2), (6, 10), (32, 16)])
def test_unet_keeps_the_size_and_starts_at_zero(size):
    net = UNet(3, width=8, n_classes=4).double()
    x, clock, y = randn(2, 3, *size), torch.tensor([1.0, 900.0], dtype=F64), torch.tensor([0, 3])
    assert torch.equal(net(x, clock, y=y), torch.zeros_like(x))
    assert randomised(net)(x, clock, y=y).shape == x.shape
    assert UNet(3, 6, width=8).double()(x, clock).shape == (2, 6, *size)
    assert net(x[:0], clock[:0], y=y[:0]).shape == (0, 3, *size)


def test_untrained_unet_has_noise_loss_one():
    model = Denoiser(UNet(1, width=8), VPSDE())
    eps = randn(64, 1, 8, 8, dtype=torch.float32)
    loss = denoising_loss(model, torch.zeros_like(eps), model.process.sample_t(64), eps)
    torch.testing.assert_close(loss, (eps**2).flatten(1).mean(1), rtol=1e-5, atol=0)


def test_every_part_of_the_unet_matters():
    x, clock, y = randn(2, 1, 8, 8), torch.tensor([10.0, 700.0], dtype=F64), torch.tensor([1, 2])
    drop = torch.tensor([True, True])

    def net(**options):
        return randomised(UNet(1, width=8, n_classes=3, **options))

    full = net()
    assert (full(x, clock, y=y) - full(x, clock + 50, y=y)).abs().max() > 1e-3
    assert (full(x, clock, y=y) - full(x, clock, y=y + torch.tensor([-1, -1]))).abs().max() > 1e-3
    null = full(x, clock, y=y, drop=drop)
    assert torch.equal(null, full(x, clock, y=torch.tensor([0, 0]), drop=drop))
    assert (null - full(x, clock, y=y)).abs().max() > 1e-3
    mixed = full(x, clock, y=y, drop=torch.tensor([True, False]))
    torch.testing.assert_close(mixed, torch.stack([null[0], full(x, clock, y=y)[1]]), rtol=0, atol=1e-12)
    blind = net(without=["time"])
    assert torch.equal(blind(x, clock, y=y), blind(x, clock + 50, y=y))
    sizes = {name: sum(p.numel() for p in net(without=[name]).parameters()) for name in ("skips", "attention", "time")}
    assert all(size < sum(p.numel() for p in full.parameters()) for size in sizes.values())


@pytest.mark.equation("cfg.null")
@pytest.mark.parametrize("make", [lambda: UNet(1, width=8, n_classes=3), lambda: MLP(2, width=8, n_classes=3)])
def test_dropping_the_label_of_all_is_the_null_label_whatever_they_were(make):
    net = randomised(make())
    x = randn(4, 1, 8, 8) if isinstance(net, UNet) else randn(4, 2)
    clock, drop = torch.full((4,), 300.0, dtype=F64), torch.ones(4, dtype=torch.bool)
    null = [net(x, clock, y=torch.tensor(y), drop=drop) for y in ([0, 1, 2, 1], [2, 2, 2, 2])]
    assert torch.equal(*null)
    net.condition.label.weight.data[0] = net.condition.label.weight.data[3]  # the fourth row is that of no label
    torch.testing.assert_close(null[0], net(x, clock, y=torch.zeros(4, dtype=torch.int64)), rtol=0, atol=1e-12)
    kept = net(x, clock, y=torch.tensor([0, 1, 2, 1]), drop=~drop)
    assert torch.equal(kept, net(x, clock, y=torch.tensor([0, 1, 2, 1])))


def test_without_skips_nothing_goes_round_the_bottom():
    x, clock = randn(1, 1, 8, 8), torch.zeros(1, dtype=F64)
    for without, reaches in (((), True), (("skips",), False)):
        net = randomised(UNet(1, width=8, without=without))
        bottom = net.body.inside.inside
        bottom.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
        assert ((net(x, clock) - net(-x, clock)).abs().max() > 1e-6) == reaches


def test_bad_images_and_labels_are_named():
    net, clock = UNet(1, width=8, multipliers=(1, 1, 2), n_classes=3), torch.zeros(2)
    x, y = torch.zeros(2, 1, 8, 8), torch.tensor([0, 2])
    cases = [
        (
            torch.zeros(2, 1, 9, 9),
            y,
            ValueError,
            r"image size must be divisible by 4 \(nearest: 8 or 12\); got \(9, 9\)",
        ),
        (torch.zeros(2, 1, 2, 8), y, ValueError, r"nearest: 4\); got \(2, 8\)"),
        (torch.zeros(2, 3, 8, 8), y, ValueError, "x must have in_channels=1"),
        (x, torch.tensor([0, 3]), ValueError, r"y must be in \[0, 2\]; got 0..3"),
        (x, torch.tensor([-1, 2]), ValueError, r"y must be in \[0, 2\]; got -1..2"),
        (x, y[:, None], ValueError, r"y must have shape \(2,\)"),
        (x, y[:1], ValueError, r"y must have shape \(2,\)"),
        (x, torch.eye(3)[:2], TypeError, "y must be an int64 tensor"),
        (x, None, ValueError, "y must be given: the network has 3 classes; got None"),
    ]
    for image, label, kind, message in cases:
        with pytest.raises(kind, match=message):
            net(image, clock, y=label)
    with pytest.raises(ValueError, match="y must be left out: the network is unconditional"):
        UNet(1, width=8)(x, clock, y=y)
    with pytest.raises(ValueError, match="did you mean 'skips'"):
        UNet(1, width=8, without=["skip"])
    with pytest.raises(ValueError, match="channels must be a multiple of 8"):
        group_norm(12)


# Networks for points


@pytest.mark.equation("arch.mlp")
def test_mlp_reaches_the_exact_noise_of_a_mixture():
    """Fitted to the oracle's eps on fixed points, its mean squared error falls below 2 % of the target's."""
    process = VPSDE()
    means = torch.tensor([[-1.0, 0.0], [1.0, 0.5]])
    oracle = GaussianMixtureOracle(process, means, stds=torch.tensor([0.2, 0.2]), weights=torch.tensor([0.5, 0.5]))
    x_t = 1.5 * randn(1024, 2, dtype=torch.float32)
    t = process.sample_t(1024, torch.Generator().manual_seed(1))
    exact = oracle(x_t, t).eps.float()
    torch.manual_seed(0)
    net = MLP(2, width=64, depth=2)
    assert torch.equal(net(x_t, process.clock(t)), torch.zeros_like(x_t))
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    for _ in range(400):
        loss = ((net(x_t, process.clock(t)) - exact) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02 * (exact**2).mean()


def test_mlp_options():
    x, clock = randn(3, 5), torch.tensor([0.0, 1.0, 2.0], dtype=F64)
    net = randomised(MLP(5, width=8, depth=1, n_waves=3, n_classes=2, out_dim=10))
    assert net(x, clock, y=torch.tensor([0, 1, 1])).shape == (3, 10)
    k = math.pi / 2 * torch.arange(1, 4, dtype=F64)
    waves = torch.cat([x, (x[:, :, None] * k).sin().flatten(1), (x[:, :, None] * k).cos().flatten(1)], dim=1)
    net.waves = k  # the same in float64, for the comparison
    h = net.first(waves) + net.condition.time(time_embedding(clock, 64)) + net.condition.label.weight[[0, 1, 1]]
    h = h + torch.nn.functional.silu(net.layers[0](h))
    torch.testing.assert_close(net(x, clock, y=torch.tensor([0, 1, 1])), net.last(h), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"x must have shape \(B, 5\); got \(3, 4\)"):
        net(x[:, :4], clock)


@pytest.mark.equation("swiss.net")
def test_per_step_heads_count_and_gather():
    net = PerStepHeads(n_steps=40, width=128)
    count = sum(parameter.numel() for parameter in net.parameters())
    assert count == 2 * 128 + 128 + 128 * 128 + 128 + 40 * (128 * 128 + 128 + 128 * 4 + 4)
    net = randomised(PerStepHeads(n_steps=6, width=16))
    x, t = randn(9, 2), torch.tensor([1, 6, 3, 3, 2, 1, 4, 5, 6])
    mean, log_var = net(x, t)
    by_hand = []
    for point, step in zip(x, t - 1, strict=True):
        h = net.trunk(point)
        h = (net.weight1[step] @ h + net.bias1[step]).relu()
        by_hand.append(net.weight2[step] @ h + net.bias2[step])
    torch.testing.assert_close(torch.cat([mean, log_var], dim=1), torch.stack(by_hand), rtol=0, atol=1e-12)
    one, _ = net(x, torch.tensor(3))
    all_heads, _ = net(x.expand(6, 9, 2))
    torch.testing.assert_close(one, all_heads[2], rtol=0, atol=1e-12)
    torch.testing.assert_close(mean, all_heads[t - 1, torch.arange(9)], rtol=0, atol=1e-12)
    for bad in (0, 7):
        with pytest.raises(ValueError, match=r"t must be in \[1, 6\]"):
            net(x, torch.full((9,), bad))


def test_classifier_learns_two_kinds_of_images():
    torch.manual_seed(0)
    net = Classifier(1, size=8, n_classes=2, width=8, n_features=16)
    y = torch.arange(64) % 2
    x = 0.3 * randn(64, 1, 8, 8, dtype=torch.float32)
    x[y == 1, :, :4] += 1
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(30):
        loss = torch.nn.functional.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (net.eval()(x).argmax(1) == y).float().mean() > 0.95
    assert net.features(x).shape == (64, 16)
    with pytest.raises(ValueError, match=r"x must have shape \(B, 1, 8, 8\)"):
        net(x[:, :, :6])


# Encoders and decoders


@pytest.mark.equation("vae.encoder")
def test_a_gaussian_mlp_is_its_formula_and_starts_at_the_prior():
    x = randn(3, 1, 4, 4)
    net = GaussianMLP((1, 4, 4), (2, 3), width=8, depth=2)
    mean, sigma = net.double()(x)
    assert torch.equal(mean, torch.zeros(3, 2, 3, dtype=F64)) and torch.equal(sigma, torch.ones(3, 2, 3, dtype=F64))
    randomised(net)
    h = x.flatten(1)
    for layer in (net.body[1], net.body[3]):
        h = torch.nn.functional.silu(h @ layer.weight.T + layer.bias)
    out = h @ net.last.weight.T + net.last.bias
    mean, sigma = net(x)
    torch.testing.assert_close(mean, out[:, :6].reshape(3, 2, 3), rtol=0, atol=1e-13)
    torch.testing.assert_close(sigma**2, out[:, 6:].exp().reshape(3, 2, 3), rtol=1e-13, atol=0)  # l = log sigma^2
    assert [v.shape for v in net(x[:0])] == [(0, 2, 3)] * 2
    assert torch.equal(net.train()(x)[0], mean)  # it has one mode only


@pytest.mark.parametrize("kind", ["each", "one"])
def test_a_gaussian_mlp_starts_at_the_sigma_it_is_given_and_learns_it(kind):
    net = GaussianMLP(2, 3, width=4, sigma=kind, sigma_start=0.25).double()
    x = randn(5, 2)
    sigma = net(x)[1]
    torch.testing.assert_close(sigma, torch.full((5, 3), 0.25, dtype=F64), rtol=1e-6, atol=0)  # drawn in float32
    sigma.sum().backward()
    grads = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert grads == ({"log_var"} if kind == "one" else {"last.weight", "last.bias"})
    randomised(net)
    mean, sigma = net(x)
    assert (mean[0] - mean[1]).abs().min() > 0 and (sigma.std() > 0) == (kind == "each")
    assert GaussianMLP(2, 3, depth=0)(x.float())[0].shape == (5, 3)


def test_a_gaussian_mlp_stays_finite_after_a_bad_step():
    net = GaussianMLP(2, 3, width=4, sigma_start=1e-4)
    for start in (-1e30, 1e30):
        torch.nn.init.constant_(net.last.bias, start)
        mean, sigma = net(torch.ones(1, 2))
        assert sigma.log10().round().unique().tolist() == [math.copysign(4, start)]
        (1 / sigma**2).sum().backward()  # float32 has no 1e-60
        assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
