"""The likelihood along the probability-flow ODE, against exact densities."""

import pytest
import torch
from exact import DATA, F64, close, log_normal, randn
from torch import nn

from diffusion_edu.denoiser import Denoiser
from diffusion_edu.guidance import trace
from diffusion_edu.likelihood import ode_log_prob, probes
from diffusion_edu.oracles import GaussianMixtureOracle, GaussianOracle
from diffusion_edu.process import VE, VESDE, VPSDE, DiscreteVP, SubVPSDE
from diffusion_edu.samplers import flow
from diffusion_edu.schedules import cosine_beta, linear_beta, swiss_beta


def mixture(process=None):
    means = [[-1.0, 0.5], [0.8, -0.6], [0.2, 1.5]]
    return GaussianMixtureOracle(process or VPSDE(), means, [0.3, 0.2, 0.4], [0.3, 0.5, 0.2])


def end(oracle):
    """The oracle's own density at T."""
    T = torch.tensor(oracle.process.T, dtype=oracle.process.time_dtype)
    return lambda x: oracle.log_prob(x, T)


@pytest.fixture(scope="module")
def data():
    return mixture().sample(12, torch.Generator().manual_seed(0))[0]


@pytest.mark.equation("sde.ode_loglik")
@pytest.mark.parametrize(
    "process",
    [VPSDE(), SubVPSDE(), VESDE(), VE(), DiscreteVP(linear_beta(1000)), DiscreteVP(swiss_beta())],
    ids=lambda p: type(p).__name__,
)
def test_the_density_of_a_gaussian_is_found_on_every_process(process):
    oracle, x0 = GaussianOracle(process, *DATA), torch.linspace(-1, 4, 9, dtype=F64)[:, None]
    t_min = 1e-6 if isinstance(process, VE) else 1e-9 * process.T
    exact = log_normal(x0, *DATA).sum(1)
    found = ode_log_prob(oracle, x0, t_min, end_log_prob=end(oracle), rtol=1e-8, atol=1e-8)
    close(found.log_prob, exact, 1e-6)
    mean, var = oracle.law(torch.tensor(process.T))
    close(found.x_T, mean + (var / DATA[1]) ** 0.5 * (x0 - DATA[0]), 1e-5)  # every quantile stays what it is
    close(found.change, torch.full((9,), 0.5 * (var / DATA[1]).log().item()), 1e-6)  # and the volume grows like the std
    if process.marginal(torch.tensor(process.T))[0] < 0.01:  # nothing of the data is left: N(0, I) will do
        close(ode_log_prob(oracle, x0, t_min).log_prob, exact, 0.05)


@pytest.mark.equation("sde.ode_loglik")
def test_the_density_of_a_mixture_in_the_plane_is_found_to_a_thousandth_of_a_nat(data):
    oracle = mixture()
    exact = oracle.log_prob(data, torch.tensor(0.0, dtype=F64))
    found = ode_log_prob(oracle, data, t_min=1e-5, end_log_prob=end(oracle))
    close(found.log_prob, exact, 1e-3)
    close(found.x_T, flow(oracle, data, 1e-5, 1.0), 1e-4)  # twice solved to 1e-6 a step
    plain = ode_log_prob(oracle, data, t_min=1e-5)  # N(0, I) at the end, as for a network
    std = oracle.process.marginal(torch.tensor(1.0, dtype=F64))[1]
    off = log_normal(found.x_T, 0.0, std**2).sum(1) - oracle.log_prob(found.x_T, torch.tensor(1.0, dtype=F64))
    close(plain.log_prob - found.log_prob, off, 1e-12)
    assert 1e-4 < off.abs().max() < 0.05  # alpha_bar(T) = 4e-5 of the data is left


@pytest.mark.equation("sde.ode_loglik")
def test_random_probes_are_unbiased(data):
    oracle, x0 = mixture(), data[:4]
    exact = ode_log_prob(oracle, x0, end_log_prob=end(oracle))
    v = probes(x0.repeat(64, 1), 1, torch.Generator().manual_seed(0))
    assert v.shape == (1, 256, 2) and v.dtype == F64 and set(v.unique().tolist()) == {-1, 1}
    each = ode_log_prob(oracle, x0.repeat(64, 1), v=v, end_log_prob=end(oracle)).log_prob.reshape(64, 4)
    assert ((each.mean(0) - exact.log_prob).abs() < 4 * each.std(0) / 8).all()  # four standard errors
    assert each.std(0).min() > 0.01
    mean = ode_log_prob(oracle, x0, v=v.reshape(64, 4, 2), end_log_prob=end(oracle))
    close(mean.log_prob, each.mean(0), 1e-4)  # K probes at once are their mean, to the tolerance of the solver
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=F64)[:, None].expand(2, 4, 2)  # v v^T has mean I: exact
    close(ode_log_prob(oracle, x0, v=signs, end_log_prob=end(oracle)).log_prob, exact.log_prob, 1e-9)


class Wild(nn.Module):
    """A network that has learned nothing, with dropout."""

    def __init__(self):
        super().__init__()
        self.layer, self.dropout = nn.Linear(1, 6, dtype=F64), nn.Dropout(0.5)
        self.layer.weight.data, self.layer.bias.data = 2 * randn(6, 1, seed=1), randn(6, seed=2)

    def forward(self, x, clock):
        return self.dropout((self.layer(x) + clock[:, None].to(x) / 300).sin()).mean(1, keepdim=True)


@pytest.mark.equation("sde.ode_loglik")
@pytest.mark.parametrize("process", [VPSDE(), VE(5.0), DiscreteVP(cosine_beta(40, max_beta=0.9))])
def test_whatever_the_network_its_density_integrates_to_one(process):
    model = trace(Denoiser(Wild(), process, predicts="v").train())
    x0 = torch.linspace(-10, 10, 501, dtype=F64)[:, None]
    found = ode_log_prob(model, x0, t_min=1e-3 * process.T)
    close(found.log_prob.exp().sum() * 0.04, torch.tensor(1.0), 1e-4)
    assert model.n_evaluations == found.n_evaluations and model.model.net.training  # no dropout was on: it is restored
    assert (found.log_prob - log_normal(x0, 0.0, 1.0).flatten()).abs()[200:301].max() > 0.1  # not N(0, 1) already


def test_the_likelihood_keeps_shape_dtype_and_no_graph_in_every_grad_mode(data):
    for process in (VPSDE(), VE()):
        oracle, image = GaussianOracle(process, 0.1, 0.3), randn(3, 1, 2, 2, dtype=torch.float32)
        found = ode_log_prob(oracle, image.requires_grad_())
        assert found.log_prob.shape == found.change.shape == (3,) and found.x_T.shape == image.shape
        assert found.log_prob.dtype == found.x_T.dtype == torch.float32 and not found.log_prob.requires_grad
        close(found.log_prob, log_normal(image.detach().double(), 0.1, 0.3).flatten(1).sum(1), 0.02)
        for context in (torch.no_grad, torch.enable_grad, torch.inference_mode):
            with context():
                again = ode_log_prob(oracle, image.clone(), v=None)
                assert torch.equal(again.log_prob, found.log_prob) and not again.log_prob.requires_grad
