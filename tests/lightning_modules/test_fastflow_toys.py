"""FastFlow on data of known laws: likelihoods with a closed form, anomalies of known size, the loss without a bound."""

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from penstock.lightning_modules.flow.anomaly_map import anomaly_map, image_score
from penstock.lightning_modules.nets.fastflow import CouplingFlow, SampleNorm, negative_log_likelihood
from penstock.lightning_modules.weights.fastflow import converted


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_gains_and_offsets_find_the_moments_of_a_gaussian():
    torch.manual_seed(0)
    flow = CouplingFlow(4, 1, conv3x3_only=True).double()
    for p in flow.steps[0].subnet.parameters():
        p.data.zero_()
        p.requires_grad_(False)
    mu = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    sigma = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    y = torch.randn(256, 4, 4, 4, generator=seeded(1), dtype=torch.float64)
    y = (y - y.mean((0, 2, 3), keepdim=True)) / y.std((0, 2, 3), correction=0, keepdim=True)  # exactly these moments
    y = mu.view(-1, 1, 1) + sigma.view(-1, 1, 1) * y
    optimizer = torch.optim.LBFGS([p for p in flow.parameters() if p.requires_grad], max_iter=200)

    def closure():
        optimizer.zero_grad()
        loss = negative_log_likelihood([flow(y)]).mean()
        loss.backward()
        return loss

    for _ in range(5):
        loss = optimizer.step(closure)
    step = flow.steps[0]
    torch.testing.assert_close(step.gain, 1 / sigma, rtol=1e-4, atol=0)
    torch.testing.assert_close(step.global_offset.data, -mu / sigma, rtol=0, atol=1e-4)
    assert float(loss) == pytest.approx(0.5 * 64 + 16 * float(sigma.log().sum()), rel=1e-6)


def test_loss_of_normalised_maps_begins_at_half_their_size():
    torch.manual_seed(0)
    total = 0.0
    for channels, size in ((64, 64), (128, 32), (256, 16)):
        y = SampleNorm()(torch.randn(1, channels, size, size, generator=seeded(size)).relu())
        with torch.no_grad():
            total += float(negative_log_likelihood([CouplingFlow(channels, 8, conv3x3_only=True)(y)]).mean())
    assert total == pytest.approx(0.5 * 458_752, rel=0.05)


def test_permutations_as_matrices_and_as_indices_are_the_same():
    torch.manual_seed(0)
    flow, x = CouplingFlow(6, 3), torch.randn(2, 6, 5, 5, generator=seeded(1))
    state = {}
    for k, step in enumerate(flow.steps):
        name = f"model.fast_flow_blocks.0.module_list.{k}"
        state |= {f"{name}.global_scale": step.global_scale.data.view(1, -1, 1, 1)}
        state |= {f"{name}.global_offset": step.global_offset.data.view(1, -1, 1, 1)}
        state |= {f"{name}.w_perm": F.one_hot(step.perm, 6).float()[:, :, None, None]}
        state |= {f"{name}.w_perm_inv": F.one_hot(step.perm, 6).float().T[:, :, None, None]}
        padded = (("1", step.subnet[0]), ("4", step.subnet[2]))  # with layers of padding before the convolutions
        state |= {f"{name}.subnet.{n}.{p}": getattr(conv, p).data for n, conv in padded for p in ("weight", "bias")}
    other = CouplingFlow(6, 3)
    other.load_state_dict({key.removeprefix("flows.0."): value for key, value in converted(state).items()})
    torch.testing.assert_close(other(x), flow(x), rtol=0, atol=1e-6)


class Textures:
    """Maps `(n, 16, 8, 8)`: a fixed mixing of four smooth fields, and white noise of 0.3."""

    def __init__(self):
        self.mixing = torch.randn(16, 4, generator=seeded(0)) / 2

    def draw(self, n: int, seed: int) -> torch.Tensor:
        generator = seeded(seed)
        fields = F.interpolate(torch.randn(n, 4, 4, 4, generator=generator), 8, mode="bilinear", align_corners=False)
        return torch.einsum("ij,njhw->nihw", self.mixing, fields) + 0.3 * torch.randn(n, 16, 8, 8, generator=generator)

    def spoiled(self, n: int, amplitude: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Half of the maps have a patch of 2x2 moved along a random direction; the patches `(n, 8, 8)`."""
        y, generator = self.draw(n, 10**6), seeded(5)
        mask = torch.zeros(n, 8, 8, dtype=torch.bool)
        for k in range(n // 2):
            row, col = torch.randint(7, (2,), generator=generator).tolist()
            direction = F.normalize(torch.randn(16, generator=generator), dim=0)
            y[k, :, row : row + 2, col : col + 2] += amplitude * direction[:, None, None]
            mask[k, row : row + 2, col : col + 2] = True
        return y, mask


def trained(norm: SampleNorm, steps: int) -> tuple[CouplingFlow, list[float]]:
    torch.manual_seed(0)
    flow, data, losses = CouplingFlow(16, 4), Textures(), []
    optimizer = torch.optim.Adam([*flow.parameters(), *norm.parameters()], lr=1e-2)
    for step in range(steps):
        loss = negative_log_likelihood([flow(norm(data.draw(64, step)))]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return flow, losses


def test_anomalies_of_known_size_are_found():
    norm = SampleNorm()
    flow, losses = trained(norm, 200)
    for amplitude, least_pixel, least_image in ((1.0, 0.7, 0.55), (2.0, 0.96, 0.9), (4.0, 0.995, 0.995)):
        y, mask = Textures().spoiled(400, amplitude)
        with torch.no_grad():
            maps = anomaly_map([flow(norm(y))[0]], (8, 8))
        truth = (torch.arange(400) < 200).numpy()
        assert roc_auc_score(mask.flatten().numpy(), maps.flatten().numpy()) > least_pixel
        assert roc_auc_score(truth, image_score(maps).numpy()) > least_image
    torch.manual_seed(0)
    with torch.no_grad():
        maps = anomaly_map([CouplingFlow(16, 4)(norm(Textures().spoiled(400, 2.0)[0]))[0]], (8, 8))
    assert roc_auc_score(mask.flatten().numpy(), maps.flatten().numpy()) < 0.7  # before training
    assert losses[-1] < losses[0] - 500


@pytest.mark.slow
def test_a_trainable_gain_of_the_norm_has_no_best_loss():
    affine = SampleNorm((16, 8, 8))
    _, losses = trained(affine, 600)
    _, bounded = trained(SampleNorm(), 600)
    assert losses[-1] < 4 * bounded[-1] < 0
    assert float(affine.weight.abs().mean()) < 0.02
    assert losses[300] - losses[-1] > 5 * abs(bounded[300] - bounded[-1])  # one goes on falling, the other is there
