"""STARFlow and STARFlow-V on data whose laws are known: closed forms, and flows and denoisers that are really trained.

Sources: arXiv 2506.06276 proposition 1 (mixtures), arXiv 2511.20462 (flow-score matching); figures of the AR(1) process
are those of Gaussian conditioning in float64.
"""

import math
from functools import partial

import pytest
import torch
from torch import nn

from penstock.benchmarks import starflow_toys as toys
from penstock.benchmarks.known_laws import Clips, mixture, mixture_nll
from penstock.lightning_modules.nets.autoregressive import Encoded
from penstock.lightning_modules.nets.autoregressive_flow import AutoregressiveFlow
from penstock.lightning_modules.starflow_v import STARFlowV

SIGMAS = pytest.mark.parametrize("sigma", [0.5, 0.3])


class KalmanBlock(nn.Module):
    """The laws of a Gaussian clip, one number a frame, from the Cholesky factor of its precision: `z = A u`."""

    text_dim = 0

    def __init__(self, covariance):
        super().__init__()
        self.register_buffer("whiten", torch.linalg.inv(torch.linalg.cholesky(covariance)))

    def forward(self, u, grid, cond=None):
        logdet = self.whiten.diagonal().log().expand(len(u), -1)[..., None]
        return Encoded(self.whiten @ u, logdet, u, None)


class Linear(nn.Module):
    """A denoiser that is one matrix over frames, at first zero."""

    text_dim, window, ahead = 0, None, 0

    def __init__(self, frames):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(frames, frames, dtype=torch.float64))

    def forward(self, tokens, grid, text=None, video=True):
        return torch.einsum("ij,bjfc->bifc", self.weight, tokens)


def exact_flow(clips):
    """STARFlow-V with the exact flow of noisy clips, in float64, which has nothing to learn but its denoiser."""
    net = AutoregressiveFlow([KalmanBlock(clips.noisy_covariance())], (clips.frames, 1, 1, 1))
    adam = partial(torch.optim.Adam, lr=1e-3)
    return STARFlowV(net, adam, Linear(clips.frames), noise=clips.sigma, first_frame_dropout=0.0)


def noisy(clips, n):
    generator = torch.Generator().manual_seed(0)
    clean = clips.draw(n, generator).double()
    return clean, clean + clips.sigma * torch.randn(clean.shape, generator=generator, dtype=torch.float64)


def test_closed_forms_of_the_clips():
    expected = {0.5: (1.0461, 0.1102, 0.0856, 0.0760, 0.1316), 0.3: (0.7401, 0.0560, 0.0441, 0.0423, 0.0591)}
    for sigma, values in expected.items():
        clips = Clips(sigma)
        errors = [clips.error(12, 12), clips.error(12, 13), clips.error(12, 20), clips.error(0, 1)]
        assert [clips.entropy(), *errors] == pytest.approx(values, abs=6e-5)
        assert clips.error(12, 13, first=3) == pytest.approx(clips.error(12, 13), abs=1e-6)
        assert clips.error(12, 12, first=12) == pytest.approx(sigma**2 / (1 + sigma**2))


@SIGMAS
def test_closed_forms_are_what_samples_of_the_process_show(sigma):
    clips = Clips(sigma)
    clean, x = noisy(clips, 40_000)
    assert torch.einsum("nibcd,njbcd->ij", clean, clean).div(40_000) == pytest.approx(clips.covariance(), abs=0.03)
    found = (x.flatten(1) @ clips.estimator(12, 13) - clean[:, 12].flatten()).square().mean()
    assert float(found) == pytest.approx(clips.error(12, 13), rel=0.03)
    assert float(clips.nll(x).mean()) == pytest.approx(clips.entropy(), abs=0.004)


@SIGMAS
def test_the_exact_flow_has_the_clips_density_and_its_gradient_is_the_smoother_of_all_frames(sigma):
    clips = Clips(sigma)
    flow, (_, x) = exact_flow(clips), noisy(clips, 50)
    torch.testing.assert_close(-flow.log_prob(x) / clips.frames, clips.nll(x))
    smoother = torch.stack([clips.estimator(n, 20) for n in range(clips.frames)])
    torch.testing.assert_close(flow.tweedie(x).flatten(1), x.flatten(1) @ smoother.T)


@SIGMAS
def test_a_linear_denoiser_of_the_exact_flow_is_at_rest_at_the_smoother_and_nowhere_else(sigma):
    clips = Clips(sigma)
    flow = exact_flow(clips)
    flow._trainer = type("Trainer", (), {"log_every_n_steps": 100, "current_epoch": 0, "global_step": 0})()
    smoother = torch.stack([clips.estimator(n, 20) for n in range(clips.frames)])
    clean, x = noisy(clips, 50)
    batch = {"video": clean, "index": torch.arange(50)}
    for wrong in (0.0, 0.1):
        flow.denoiser.weight.data = (torch.eye(clips.frames, dtype=torch.float64) - smoother) / 0.3 * (1 + wrong)
        flow.zero_grad()
        flow.training_step(batch, 0).backward()
        assert (float(flow.denoiser.weight.grad.abs().max()) < 1e-12) == (wrong == 0)
        assert (float(flow.matching.loss) < 1e-12) == (wrong == 0)
        if not wrong:
            torch.testing.assert_close(flow.clean(x).flatten(1), (x.flatten(1) @ smoother.T).detach())


def test_laws_of_the_mixture():
    x = mixture(40_000, torch.Generator().manual_seed(0))
    assert float(mixture_nll(x).mean()) == pytest.approx(1.816, abs=0.015)
    moments = torch.stack([x.flatten(1).mean(0), x.flatten(1).var(0)])
    assert moments[0].tolist() == pytest.approx([0, 0], abs=0.05)
    assert moments[1].tolist() == pytest.approx([4.09, 4.09], abs=0.05)
    assert math.log(2 * math.pi * math.e * 4.09) == pytest.approx(toys.MIXTURE[1], abs=1e-3)


# ---------------------------------------------------------------------- trained


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def figures(rows):
    """Expected and found, and how far found is above the exact law on the same samples, by name."""
    return {
        row["what"]: [float(row[key]) for key in ("expected", "found", "above the exact law on the same samples")]
        for row in rows
    }


@pytest.mark.slow
def test_a_gaussian_is_learned_and_its_noise_taken_away(one_thread):
    for expected, found, above in figures(toys.gaussian_rows(400, 0, 20_000)).values():
        assert found == pytest.approx(expected, rel=0.01)
        assert -1e-4 < above < 3e-3


@pytest.mark.slow
def test_one_block_is_two_gaussians_and_two_blocks_are_far_more(one_thread):
    found = [float(toys.mixture_row(blocks, steps, 0, 20_000)["found"]) for blocks, steps in ((1, 500), (2, 2500))]
    assert 4.23 < found[0] < 4.27
    assert 1.816 < found[1] < 2.4


@pytest.mark.slow
def test_clips_reach_their_floor_and_a_denoiser_what_it_may_see(one_thread):
    """A mask that leaks gives the errors of the whole clip, one that hides the frame ahead those without it."""
    found = figures(toys.clip_rows(0.5, 1200, 500, 0, 20_000))
    nats, gradient, ahead, first, causal, released = found.values()
    assert 0 < nats[2] < 0.01
    assert 0 < gradient[2] < 0.006
    assert 0 < ahead[2] < 0.004
    assert 0 < first[2] < 0.015
    assert 0 < causal[2] < 0.004
    assert gradient[1] < released[1] + 0.002 < ahead[1] < causal[1] - 0.015
    assert ahead[1] - gradient[1] > 0.005
