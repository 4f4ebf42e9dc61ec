import hashlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.transforms.v2.functional import normalize, resize

from penstock.lightning_modules.callbacks import features
from penstock.lightning_modules.callbacks.distances import GaussianSums, frechet_distance
from penstock.lightning_modules.callbacks.features import Inception, Pixels, Points, TimmFeatures, hash_state
from penstock.lightning_modules.errors import UserError

SHARED = Path(__file__).resolve().parents[3] / ".." / "shared"
MOBILENET = SHARED / "weights" / "mobilenetv2_100_imagenet_fp16.safetensors"
CIFAR = SHARED / "data" / "cifar10" / "plain_text"
HALF = (0.5, 0.5, 0.5)
CPU = torch.device("cpu")


def mobilenet():
    if not MOBILENET.is_file():
        pytest.skip(f"no {MOBILENET.name} in ../shared/weights")
    extractor = TimmFeatures(
        "mobilenetv2_100", "mobilenetv2", weights=str(MOBILENET), pad_type="same", mean=HALF, std=HALF
    )
    extractor.prepare(CPU)
    return extractor


def fd(a, b):
    moments = []
    for x in (a, b):
        sums = GaussianSums()
        sums.update(x)
        moments += sums.moments()
    return frechet_distance(*moments)


def test_names():
    assert [Pixels().metric(kind) for kind in ("fd", "kid")] == ["fd_pixels", "kid_pixels"]
    assert Points().metric("recall") == "recall_points"
    assert TimmFeatures("resnet10t", "small").metric("precision") == "precision_small"
    inception = [Inception().metric(kind) for kind in ("fd", "kid", "precision", "recall")]
    assert inception == ["fid", "kid", "precision_inception", "recall_inception"]


@pytest.mark.parametrize("name", ["pixels", "inception", "Mobile Net", ""])
def test_a_name_that_lies_is_refused(name):
    with pytest.raises(UserError, match="features name"):
        TimmFeatures("resnet10t", name)


def test_an_unknown_model_gets_a_suggestion():
    with pytest.raises(UserError, match=r"no 'mobilenetv2_10'.*did you mean"):
        TimmFeatures("mobilenetv2_10", "m")


def test_weights_that_are_missing_cut_short_or_anothers_are_named(tmp_path):
    def load(path):
        TimmFeatures("resnet10t", "small", weights=str(path)).prepare(CPU)

    with pytest.raises(UserError, match=r"features 'small': no weights file .*absent.safetensors"):
        load(tmp_path / "absent.safetensors")
    (tmp_path / "short.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(UserError, match=r"short.safetensors cannot be read as weights"):
        load(tmp_path / "short.safetensors")
    save_file({"stem.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other.safetensors does not fit timm's resnet10t: Missing key"):
        load(tmp_path / "other.safetensors")


def test_identity_changes_with_the_weights():
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert hash_state(a) == hash_state(a) != hash_state(b)
    b.load_state_dict(a.state_dict())
    assert hash_state(a) == hash_state(b) != hash_state(b.double())


def test_timm_features_are_the_models_on_images_prepared_by_torchvision():
    extractor = mobilenet()
    images = torch.rand(3, 3, 40, 40) * 2 - 1
    ready = resize(images / 2 + 0.5, [224, 224], interpolation=3, antialias=True).clamp(0, 1)
    net = timm.create_model("mobilenetv2_100", pad_type="same").eval()
    net.load_state_dict({k: v.float() for k, v in load_file(MOBILENET).items()})
    with torch.no_grad():
        expected = net.forward_head(net.forward_features(normalize(ready, HALF, HALF)), pre_logits=True)
    found = extractor(images)
    assert found.shape == (3, 1280)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert extractor.identity()["resize"] == ["bicubic", "antialias", 224, 224]


def test_grey_images_are_made_rgb_and_others_refused():
    extractor = mobilenet()
    grey = torch.rand(2, 1, 8, 8) * 2 - 1
    torch.testing.assert_close(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))
    with pytest.raises(UserError, match=r"shape \(4, 8, 8\), expected images of 1 or 3 channels"):
        extractor(torch.zeros(1, 4, 8, 8))


def cifar(n):
    parquet = pytest.importorskip("pyarrow.parquet")
    file = CIFAR / "test-00000-of-00001.parquet"
    if not file.is_file():
        pytest.skip("no cifar10 in ../shared/data")
    column = parquet.read_table(file, columns=["img"]).slice(0, n).column("img").to_pylist()
    arrays = np.stack([np.asarray(Image.open(BytesIO(cell["bytes"])).convert("RGB")) for cell in column])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.mark.parametrize(("n", "ratio"), [(120, 0.5), pytest.param(2000, 0.15, marks=pytest.mark.slow)])
def test_mobilenet_tells_real_images_from_noise(n, ratio):
    extractor = mobilenet()
    images = cifar(n)
    real = torch.cat([extractor(part) for part in images.split(50)])
    halves = fd(real[::2], real[1::2])
    noise = torch.randn(n // 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    far = fd(real[::2], torch.cat([extractor(part) for part in noise.split(50)]))
    print(f"fd_mobilenetv2 over {n} images: halves {halves:.3f}, noise {far:.3f}")
    assert halves < ratio * far


def test_inception_says_which_file_and_where(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    where = f"{tmp_path}/checkpoints/weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(UserError, match="cannot be downloaded") as caught:
        Inception().prepare(CPU)
    assert f"put it at {where}" in str(caught.value)
    with pytest.raises(UserError, match=r"no file .*mine.pth"):
        Inception(weights=str(tmp_path / "mine.pth")).prepare(CPU)
    (tmp_path / "mine.pth").write_bytes(b"something else")
    with pytest.raises(UserError, match="not torch-fidelity's Inception"):
        Inception(weights=str(tmp_path / "mine.pth")).prepare(CPU)


def test_inception_features_are_torch_fidelitys(tmp_path, monkeypatch):
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    path = tmp_path / "weights.pth"
    torch.save({}, path)
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    torch.manual_seed(0)
    extractor = Inception(weights=str(path))
    extractor.prepare(CPU)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    found = extractor(images / 127.5 - 1)
    assert found.shape == (2, 2048)
    assert torch.equal(found, extractor._net(images)[0])
    assert float(found.std()) > 0
    torch.testing.assert_close(
        extractor(images[:, :1] / 127.5 - 1), extractor._net(images[:, :1].repeat(1, 3, 1, 1))[0]
    )
