"""Distances between sets of clips: against SciPy and numbers by hand; motion counts; what is missing is named."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import nn
from torchvision.models import get_model, get_model_weights

from penstock.datamodules.moving_digits import MovingDigits
from penstock.lightning_modules.callbacks.clip_features import I3D, ClipPixels, Frames, VideoNetwork
from penstock.lightning_modules.callbacks.distances import GaussianSums, frechet_distance
from penstock.lightning_modules.callbacks.features import Inception, Pixels, row_numbers
from penstock.lightning_modules.callbacks.frechet import FrechetDistance
from penstock.lightning_modules.callbacks.generation import GenerationMetrics, generate
from penstock.lightning_modules.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def moving():
    data = MovingDigits(frames=10, n_train=900, n_test=1, batch_size=900)
    data.prepare_data()
    data.setup()
    return next(iter(data.reference_dataloader("train")))["video"]


def scipys(a, b):
    """Fréchet distance of Gaussians fitted to rows."""
    a, b = (x.double().numpy() for x in (a, b))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(cov_a @ cov_b).real
    return np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root)


def fd(a, b):
    moments = []
    for x in (a, b):
        sums = GaussianSums()
        sums.update(x)
        moments += sums.moments()
    return frechet_distance(*moments)


def clips_of_noise(n=240, seed=0):
    return torch.randn(n, 5, 1, 6, 6, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)


def test_names_say_what_the_features_are():
    kinds = ("fd", "kid", "precision")
    assert [Frames(Pixels()).metric(k) for k in kinds] == [f"{k}_frames_pixels" for k in kinds]
    assert Frames(Inception()).metric("fd") == "fd_frames_inception"
    assert ClipPixels().metric("fd") == "fd_clip_pixels"
    assert [VideoNetwork("r3d_18").metric(k) for k in kinds] == ["fvd_r3d_18", "kvd_r3d_18", "precision_r3d_18"]
    assert [I3D().metric(k) for k in kinds] == ["fvd", "kvd", "precision_i3d"]


def test_distances_of_frames_and_clips_are_scipys(fakes, tmp_path):
    clips = clips_of_noise()
    module, data = fakes.FakeModule(clips, None), fakes.FakeData({"video": clips}, 0, "noise", batch_size=90)
    metrics = [FrechetDistance(f, also=["kid"], split="train") for f in (Frames(Pixels()), ClipPixels())]
    trainer = fakes.quiet_trainer(tmp_path, [GenerationMetrics(metrics, steps=[2], n=260)])
    found = trainer.test(module, datamodule=data, verbose=False)[0]
    assert set(found) == {f"{kind}_{name}/2" for kind in ("fd", "kid") for name in ("frames_pixels", "clip_pixels")}
    fake, real = torch.cat([c.data for c in generate(module, 260, 2, 0)]), clips[::2]
    rows = scipys(real.flatten(0, 1).flatten(1), fake.flatten(0, 1).flatten(1))
    assert found["fd_frames_pixels/2"] == pytest.approx(rows, rel=1e-4)
    assert metrics[0]._reference.sums.count == 120 * 5
    assert torch.equal(metrics[0]._reference.features, real.flatten(0, 1).flatten(1))
    whole = scipys(ClipPixels()(real), ClipPixels()(fake))
    assert found["fd_clip_pixels/2"] == pytest.approx(whole, rel=1e-2)


def test_fewer_clips_than_numbers_in_them():
    a, b = (ClipPixels()(clips_of_noise(n, seed)).double() for n, seed in ((20, 0), (30, 1)))
    left, right = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b))
    nuclear = torch.linalg.matrix_norm(left @ right.T, "nuc")
    expected = (a.mean(0) - b.mean(0)).square().sum() + left.square().sum() + right.square().sum() - 2 * nuclear
    assert fd(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_clip_pixels_are_means_of_cells_and_of_differences():
    x = torch.randn(2, 16, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    cells = x.unflatten(-1, (4, 3)).unflatten(-3, (4, 2)).mean((-1, -3))
    looks = cells.unflatten(1, (8, 2)).mean(2)
    places = [0, 2, 4, 6, 8, 10, 12, 14]
    moves = torch.stack([cells[:, t + 1] - cells[:, t] for t in places], 1)
    expected = torch.cat([part.transpose(1, 2).flatten(1) for part in (looks, moves)], 1)
    torch.testing.assert_close(ClipPixels()(x), expected)
    assert ClipPixels()(x[:, :2]).shape == (2, (2 + 1) * 16 * 3)
    assert ClipPixels()(x[:, :9]).shape == (2, (8 + 8) * 16 * 3)


def test_motion_counts(moving):
    real, held = ClipPixels()(moving[:600]), moving[600:]
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(10, generator=generator) for _ in held])
    wrong = {
        "frozen": held[:, :1].expand(-1, 10, -1, -1, -1),
        "shuffled": torch.stack([clip[row] for clip, row in zip(held, order)]),
        "cut": torch.cat([held[:, :5], held.roll(1, 0)[:, 5:]], 1),
        "flicker": held + 0.2 * torch.randn(300, 10, 1, 1, 1, generator=generator),
    }
    floor = fd(real, ClipPixels()(held))
    for name, clips in wrong.items():
        assert fd(real, ClipPixels()(clips)) > 2.5 * floor, name


def test_rows_of_parts_have_numbers_of_their_own():
    assert row_numbers(torch.tensor([4, 2]), torch.zeros(2, 7)).tolist() == [4, 2]
    assert row_numbers(torch.tensor([4, 2]), torch.zeros(6, 7)).tolist() == [12, 13, 14, 6, 7, 8]
    assert row_numbers(torch.empty(0, dtype=torch.int64), torch.zeros(0, 7)).tolist() == []


def network(model, folder, n):
    torch.manual_seed(0)
    net = get_model(model, weights=None).eval()
    torch.save(net.state_dict(), folder / "net.pth")
    features = VideoNetwork(model, weights=str(folder / "net.pth"))
    features.prepare(CPU)
    preset = get_model_weights(model).DEFAULT.transforms()
    clips = torch.rand(n, 20, 1, *preset.crop_size) * 2 - 1
    levels = (clips / 2 + 0.5).expand(-1, -1, 3, -1, -1)
    kept = [0, 1, 3, 4, 5, 6, 8, 9, 10, 11, 13, 14, 15, 16, 18, 19]
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (preset.mean, preset.std))
    with torch.no_grad():
        found = features(clips)
        logits = net(((levels[:, kept] - mean) / std).transpose(1, 2))
    return features, net, found, logits


@pytest.mark.slow
def test_a_video_network_from_a_file(tmp_path):
    features, net, found, logits = network("s3d", tmp_path, 1)
    assert found.shape == (1, 1024)
    head = net.classifier[1]
    torch.testing.assert_close(found @ head.weight.flatten(1).T + head.bias, logits, rtol=1e-3, atol=1e-4)
    identity = features.identity()
    assert len(identity["weights"]) == 64
    other = VideoNetwork("s3d", weights=str(tmp_path / "net.pth"), frames=15)
    other.prepare(CPU)
    assert other.identity() != identity


@pytest.mark.slow
@pytest.mark.parametrize("model", ["r3d_18", "mc3_18", "r2plus1d_18", "mvit_v1_b", "mvit_v2_s", "swin3d_t"])
def test_all_video_networks(model, tmp_path):
    _, net, found, logits = network(model, tmp_path, 2)
    head = net.fc if hasattr(net, "fc") else net.head
    torch.testing.assert_close(head(found), logits, rtol=1e-3, atol=1e-4)


def test_a_missing_video_network_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no weights file .*none\.pth; put the state dict of torchvision's s3d there"):
        VideoNetwork("s3d", weights=str(tmp_path / "none.pth")).prepare(CPU)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    where = r"r3d_18-b3b3357e\.pth is missing and cannot be downloaded \(OSError\); get https://.*put it at .*hub"
    with pytest.raises(UserError, match=where):
        VideoNetwork("r3d_18").prepare(CPU)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"does not fit torchvision's s3d"):
        VideoNetwork("s3d", weights=str(tmp_path / "other.pth")).prepare(CPU)


class Detector(nn.Module):
    """Stands for the I3D: means of the 400 first numbers of each clip, after the rescaling that it is asked for."""

    def __init__(self, width: int = 400):
        super().__init__()
        self.width = width

    def forward(self, x, rescale: bool = False, resize: bool = False, return_features: bool = False):
        assert x.shape[1] == 3
        x = x * (2.0 / 255.0) - 1.0 if rescale and resize and return_features else x
        return x.transpose(1, 2).flatten(1)[:, : self.width]


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_fvd_is_only_the_file_of_i3d(tmp_path):
    with pytest.raises(UserError, match=r"fvd: no file i3d_torchscript\.pt; expected i3d_torchscript\.pt \(linked"):
        I3D().prepare(CPU)
    (tmp_path / "text.pt").write_text("no script")
    with pytest.raises(UserError, match=r"text\.pt cannot be read as TorchScript"):
        I3D(str(tmp_path / "text.pt")).prepare(CPU)
    for width in (400, 10):
        torch.jit.script(Detector(width)).save(str(tmp_path / f"{width}.pt"))
    features = I3D(str(tmp_path / "400.pt"))
    features.prepare(CPU)
    clips = torch.rand(2, 10, 1, 12, 12) * 2 - 1
    found = features(clips)
    assert (found - clips.expand(-1, -1, 3, -1, -1).flatten(1)[:, :400]).abs().max() <= 1 / 255 + 1e-6
    with pytest.raises(UserError, match=r"shape \(9, 1, 12, 12\), expected videos of 10 frames or more"):
        features(clips[:, :9])
    other = I3D(str(tmp_path / "10.pt"))
    other.prepare(CPU)
    with pytest.raises(UserError, match=r"gives \(2, 10\), expected \(2, 400\) of i3d_torchscript\.pt"):
        other(clips)


def test_refusals():
    with pytest.raises(UserError, match=r"no video network 'r3d18' \(did you mean 'r3d_18'\?\)"):
        VideoNetwork("r3d18")
    with pytest.raises(UserError, match="frames: 20 given, expected 16"):
        VideoNetwork("mvit_v2_s", frames=20)
    for features in (Frames(Pixels()), ClipPixels()):
        with pytest.raises(UserError, match=r"samples of shape \(1, 8, 8\), expected videos"):
            features(torch.zeros(2, 1, 8, 8))
    with pytest.raises(UserError, match="expected videos of 2 frames or more"):
        ClipPixels()(torch.zeros(2, 1, 1, 8, 8))
