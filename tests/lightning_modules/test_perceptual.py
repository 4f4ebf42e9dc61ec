"""LPIPS as a loss: against torchmetrics with the same weights, weights from files, refusals, what it stays out of."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn
from torchmetrics.functional.image import lpips as reference
from torchvision.models.convnext import CNBlockConfig
from torchvision.transforms.functional import normalize, resize

from penstock.lightning_modules import perceptual
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.losses import Regression
from penstock.lightning_modules.flow.premetrics import PerceptualHuber
from penstock.lightning_modules.perceptual import IMAGENET, LPIPS, Logits
from penstock.lightning_modules.rectified_flow import RectifiedFlow

SQUEEZE = Path(__file__).resolve().parents[3] / "shared/weights/squeezenet1_1_imagenet_fp16.safetensors"
BUILDERS = {"squeeze": "squeezenet1_1", "alex": "alexnet", "vgg": "vgg16"}


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory):
    """Files of random weights for the three backbones; VGG and AlexNet without their large classifiers."""
    torch.manual_seed(0)
    files = {}
    for net, name in BUILDERS.items():
        state = {k: v for k, v in getattr(torchvision.models, name)().state_dict().items() if k.startswith("features.")}
        files[net] = tmp_path_factory.mktemp("weights") / f"{net}.pth"
        torch.save(state, files[net])
    return files


def torchmetrics_with(monkeypatch, net, state):
    def features(name, pretrained=False):
        model = getattr(torchvision.models, name)(weights=None)
        model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
        return model.features

    monkeypatch.setattr(reference, "_get_tv_model_features", features)
    return lambda a, b: reference.learned_perceptual_image_patch_similarity(a, b, net, reduction="none", normalize=True)


def images(size=64, n=2):
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(n, 3, size, size, generator=generator) for _ in range(2))


@pytest.mark.parametrize("net", BUILDERS)
def test_equals_torchmetrics_with_the_same_weights(net, random_weights, monkeypatch):
    a, b = images()
    expected = torchmetrics_with(monkeypatch, net, torch.load(random_weights[net]))(a, b)
    torch.testing.assert_close(LPIPS(net, str(random_weights[net]))(a, b), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(not SQUEEZE.is_file(), reason=f"no {SQUEEZE.name} in ../shared/weights")
def test_published_squeezenet_weights(monkeypatch):
    a, b = images(224)
    distance = LPIPS("squeeze", str(SQUEEZE))
    expected = torchmetrics_with(monkeypatch, "squeeze", load_file(SQUEEZE))(a, b)
    torch.testing.assert_close(distance(a, b), expected, rtol=1e-5, atol=1e-7)
    near = (a + 0.02 * (b - a)).clamp(0, 1)
    assert (distance(near, a) < 0.2 * distance(b, a)).all()


def test_average_pooling_changes_vgg_only(random_weights):
    a, b = images()
    plain, means = (LPIPS("vgg", str(random_weights["vgg"]), average_pooling=x) for x in (False, True))
    assert not torch.allclose(plain(a, b), means(a, b))
    kinds = {type(layer) for layer in means._net.modules()}
    assert nn.AvgPool2d in kinds
    assert nn.MaxPool2d not in kinds
    with pytest.raises(UserError, match="average_pooling is true with net squeeze, expected vgg"):
        LPIPS("squeeze", average_pooling=True)


def test_small_grey_images_train_through_the_loss_and_the_network_stays_outside(random_weights):
    loss = PerceptualHuber(LPIPS("squeeze", str(random_weights["squeeze"])), size=None)
    flow = RectifiedFlow(nn_with_shape(), torch.optim.Adam, loss=loss)
    before = set(flow.state_dict())
    v = torch.randn(2, 1, 8, 8, requires_grad=True)
    x0, x1, t = torch.randn(2, 1, 8, 8), torch.rand(2, 1, 8, 8), torch.tensor([0.2, 0.7])
    x1.requires_grad_()
    value = flow.loss(Regression(v, (x1 - x0).detach(), x0, x0, x1, t))
    value.sum().backward()
    assert value.shape == (2,)
    assert v.grad.abs().sum() > 0
    assert x1.grad is None
    assert set(flow.state_dict()) == before
    assert all(not p.requires_grad for p in loss.distance._net.parameters())


def test_precision_does_not_follow_autocast(random_weights):
    a, b = images()
    distance = LPIPS("squeeze", str(random_weights["squeeze"]))
    exact = distance(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distance(a, b), exact)
    double = distance(a.double(), b.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), exact, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(distance(a, b), exact)


def nn_with_shape():
    net = nn.Conv2d(1, 1, 1)
    net.shape, net.num_classes = (1, 8, 8), 0
    return net


def test_a_missing_file_is_named_with_where_to_put_it(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"LPIPS: no weights file .*none\.pth; expected torchvision's vgg16-397923af"):
        LPIPS("vgg", str(tmp_path / "none.pth")).prepare()

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError) as error:
        LPIPS("squeeze").prepare()
    text = str(error.value)
    assert "squeezenet1_1-b8a52dc0.pth is missing and cannot be downloaded (OSError)" in text
    assert str(tmp_path / "hub" / "checkpoints" / "squeezenet1_1-b8a52dc0.pth") in text
    assert "\n" not in text


def test_wrong_files_are_refused(tmp_path, random_weights):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"broken\.safetensors cannot be read as weights"):
        LPIPS("vgg", str(broken)).prepare()
    with pytest.raises(UserError, match=r"lacks features\.3\.squeeze\.weight, expected .* torchvision's squeeze"):
        LPIPS("squeeze", str(random_weights["vgg"])).prepare()
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="is no state dict of tensors"):
        LPIPS("squeeze", str(tmp_path / "list.pth")).prepare()
    state = torch.load(random_weights["squeeze"])
    save_file({**state, "features.0.weight": torch.zeros(64, 3, 5, 5)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors does not fit torchvision's squeeze: .*size mismatch"):
        LPIPS("squeeze", str(tmp_path / "other.safetensors")).prepare()


def test_a_run_is_refused_before_it_starts(tmp_path):
    loss = PerceptualHuber(LPIPS("squeeze", str(tmp_path / "none.pth")))
    flow = RectifiedFlow(nn_with_shape(), torch.optim.Adam, loss=loss)
    flow._trainer = SimpleNamespace(datamodule=SimpleNamespace(shape=(1, 8, 8), num_classes=0))
    flow.setup("predict")
    with pytest.raises(UserError, match=r"no weights file .*none\.pth"):
        flow.setup("fit")


def test_logits_are_those_of_torchvision_at_224_pixels(tmp_path, monkeypatch):
    def small():
        return torchvision.models.ConvNeXt([CNBlockConfig(8, None, 2)], num_classes=5)

    monkeypatch.setattr(perceptual, "convnext_small", small)
    torch.manual_seed(0)
    net = small().eval()
    torch.save(net.state_dict(), tmp_path / "convnext.pth")
    a, b = torch.rand(2, 2, 3, 256, 240).unbind(0)
    distance = Logits(str(tmp_path / "convnext.pth"))
    with torch.no_grad():
        own = [net(normalize(resize(x, [224, 224], antialias=True), *IMAGENET)) for x in (a, b)]
    found = distance(a.requires_grad_(), b)
    torch.testing.assert_close(found.detach(), (own[0] - own[1]).square().mean(1), rtol=1e-3, atol=0)
    (slope,) = torch.autograd.grad(found.sum(), a)
    assert slope.abs().sum() > 0
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"Logits: .*other.pth does not fit torchvision's ConvNeXt-S"):
        Logits(str(tmp_path / "other.pth")).prepare()
    with pytest.raises(UserError, match=r"Logits: no weights file .*nowhere.pth; expected torchvision's convnext"):
        Logits(str(tmp_path / "nowhere.pth")).prepare()
