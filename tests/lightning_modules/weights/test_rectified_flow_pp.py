"""Official files of 2-rectified flow++ and EDM: layouts, averages, presets, refusals."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.edm import EDMVelocity
from penstock.lightning_modules.nets.edm_unets import DhariwalUNet, SongUNet
from penstock.lightning_modules.weights import rectified_flow_pp as official

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "rectified_flow_pp"


def song(dropout=0.0, num_classes=0):
    return EDMVelocity(SongUNet((3, 8, 8), 8, (1, 2), 1, (4,), num_classes=num_classes, dropout=dropout))


def adm(dropout=0.0, num_classes=5):
    return EDMVelocity(DhariwalUNet((3, 8, 8), 16, (1, 4), 1, (4,), num_classes=num_classes, dropout=dropout))


@pytest.fixture
def save(tmp_path):
    def save(content, name="flow_model_1_ema.pth"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def presets(monkeypatch):
    monkeypatch.setattr(official, "PRESETS", {"adm": adm, "song": song})


@pytest.mark.parametrize(("name", "build", "classes"), [("01_songunet", song, 0), ("02_dhariwal", adm, 5)])
def test_a_weights_file_gives_the_official_velocity(name, build, classes, save, presets):
    tensors = load_file(GOLDEN / f"{name}_velocity.safetensors")
    weights = {k.removeprefix("weights/"): v for k, v in tensors.items() if k.startswith("weights/")}
    net = official.pretrained(str(save(weights)), dropout=0.3)
    assert net.num_classes == classes
    assert {m.p for m in net.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}
    net.double().eval()
    cond = tensors["in/class_labels"].argmax(1) if classes else None
    v = net(tensors["in/x"].double(), 1 - tensors["in/t"], cond)
    torch.testing.assert_close(-v, tensors["out/v"], rtol=1e-8, atol=1e-10)


def test_a_training_state_holds_raw_weights_and_averages_by_order(save):
    net = song()
    raw = net.state_dict()
    trained = [key for key in raw if not key.endswith(("resample_filter", "freqs"))]
    optimizer = {"state": {i: {"ema": raw[key] + 1} for i, key in enumerate(trained)}, "param_groups": []}
    path = save({"model_state_dict": raw, "optimizer_state_dict": optimizer, "iter": 3}, "training_state_3.pth")
    ema = official.load(path)
    assert all(torch.equal(official.load(path, "raw")[key], raw[key]) for key in raw)
    assert all(torch.equal(ema[key], raw[key] + 1 if key in trained else raw[key]) for key in raw)
    other = song()
    official.load_into(other, path)
    assert torch.equal(other.state_dict()[trained[0]], raw[trained[0]] + 1)
    del optimizer["state"][2]
    with pytest.raises(UserError, match=rf"average of {trained[2]}: found none, expected \("):
        official.load(save({"model_state_dict": raw, "optimizer_state_dict": optimizer}))


def test_full_presets_are_found_from_their_shapes():
    for name, build in official.PRESETS.items():
        with torch.device("meta"):
            net = build()
        assert official.detect(net.state_dict()) == (name, net.num_classes)
    with torch.device("meta"):
        assert official.detect(official.PRESETS["song_unet_cifar10"](num_classes=10).state_dict()) == (
            "song_unet_cifar10",
            10,
        )


def test_refusals(save, tmp_path, presets):
    with pytest.raises(UserError, match=r"none\.pth: no such file, expected official weights"):
        official.load(tmp_path / "none.pth")
    with pytest.raises(UserError, match=r"found the key 'enc\.weight'; expected all keys under 'model\.'"):
        official.load(save({"enc.weight": torch.zeros(1)}))
    with pytest.raises(UserError, match="found iter; expected a state dict of tensors, or a training state"):
        official.load(save({"iter": 3}))
    with pytest.raises(UserError, match="found list; expected a state dict or a training state"):
        official.load(save([1]))
    with pytest.raises(UserError, match="holds objects other than tensors, or is damaged; refused"):
        official.load(save(Path("x")))
    whole = save(song().state_dict())
    whole.write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"cannot be read, probably cut short|damaged"):
        official.load(whole)
    state = song().state_dict()
    state["model.map_layer0.bias"] = torch.zeros(3)
    with pytest.raises(
        UserError, match=r"nearest is song, but model\.map_layer0\.bias: found \(3,\), expected \(32,\)"
    ):
        official.pretrained(str(save(state)))
    with pytest.raises(UserError, match=r"does not fit this EDMVelocity: model\.map_layer0\.bias"):
        official.load_into(song(), save(state))
