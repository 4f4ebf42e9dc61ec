"""Official Rectified Flow checkpoints: layout, averaged weights, refusals."""

import hashlib
import os
from collections import OrderedDict
from pathlib import Path

import jsonargparse
import pytest
import torch
from safetensors.torch import load_file

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.ncsnpp import NCSNpp
from penstock.lightning_modules.weights import rectified_flow as official

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "rectified_flow"
OPTIONS = {
    **{"shape": (3, 16, 16), "width": 8, "mult": (1, 1, 2), "blocks": 1, "attention": (8,)},
    **{"embedding": "fourier", "fir": True, "progressive": True, "divide_by_time": True},
}
BLOCK = ("GroupNorm_0", "Conv_0", "Dense_0", "GroupNorm_1", "Conv_1", "Conv_2")
ATTENTION = ("GroupNorm_0", "NIN_0", "NIN_1", "NIN_2", "NIN_3")


def construction_order(key):
    """Sort key of the order in which the official layers register their parameters."""
    _, index, *names, leaf = key.split(".")
    inner = names[0] if names else ""
    return int(index), (*BLOCK, *ATTENTION).index(inner) if inner else 0, ("weight", "W", "bias", "b").index(leaf)


@pytest.fixture(scope="module")
def checkpoint():
    tensors = load_file(GOLDEN / "02_ncsnpp256_forward.safetensors")
    weights = {key.removeprefix("weights/"): value for key, value in tensors.items() if key.startswith("weights/")}
    sigmas = weights.pop("sigmas")
    names = sorted(weights, key=construction_order)
    model = OrderedDict([("module.sigmas", sigmas), *((f"module.{name}", weights[name]) for name in names)])
    shadow = [weights[name] + 1 for name in names if name != "all_modules.0.W"]
    ema = {"decay": 0.999, "num_updates": 7, "shadow_params": shadow}
    return {"optimizer": {"state": {}, "param_groups": []}, "model": model, "ema": ema, "step": 7}


@pytest.fixture
def save(tmp_path):
    def save(content, name="checkpoint_1.pth"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


def test_raw_weights_load_and_give_the_official_numbers(checkpoint, save):
    tensors = load_file(GOLDEN / "02_ncsnpp256_forward.safetensors")
    net = NCSNpp(**OPTIONS)
    official.load_into(net, save(checkpoint), "raw")
    v = net.double()(tensors["in/x"].double(), tensors["in/t"])
    torch.testing.assert_close(v, tensors["out/v"], rtol=1e-8, atol=1e-10)


def test_averaged_weights_are_matched_by_order_and_frozen_frequencies_come_from_the_model(checkpoint, save):
    path = save(checkpoint)
    raw, ema = official.load(path, "raw"), official.load(path)
    assert raw.keys() == ema.keys() == NCSNpp(**OPTIONS).state_dict().keys()
    assert torch.equal(ema["time.fourier.weight"], raw["time.fourier.weight"])
    assert torch.equal(raw["time.fourier.weight"], checkpoint["model"]["module.all_modules.0.W"])
    assert all(torch.equal(ema[key], raw[key] + 1) for key in raw if key != "time.fourier.weight")
    reordered = {key: checkpoint["model"][key] for key in sorted(checkpoint["model"])}
    again = official.load(save({**checkpoint, "model": reordered}))
    assert all(torch.equal(again[key], ema[key]) for key in ema)


def test_parameter_order_of_the_network_is_the_official_one(checkpoint):
    ours = list(official.convert(checkpoint["model"]))
    assert ours == [name for name, _ in NCSNpp(**OPTIONS).named_parameters()]


@pytest.mark.parametrize("preset", ["ddpmpp_cifar10", "ncsnpp_256"])
def test_full_size_key_set(preset):
    with torch.device("meta"):
        ours = official.PRESETS[preset]().state_dict()
    num_scales, sigma_max, entries, expected = {
        "ddpmpp_cifar10": (1000, 50.0, 565, "138928b2c233ce51307c93d98908df3534fc89332f1a198d4dc561426de087fb"),
        "ncsnpp_256": (2000, 378.0, 646, "93249c3150c16fc3166c21e194b71a03bc98e9dfb46222155461ce83d0602db5"),
    }[preset]
    theirs = official.invert(ours, num_scales, sigma_max)
    lines = "\n".join(sorted(f"{key} {tuple(value.shape)}" for key, value in theirs.items()))
    assert len(theirs) == entries
    assert hashlib.sha256(lines.encode()).hexdigest() == expected
    back = official.convert(theirs)
    assert {k: v.shape for k, v in back.items()} == {k: v.shape for k, v in ours.items()}
    assert official.detect(back) == preset


def test_pretrained_finds_the_preset(save, monkeypatch):
    def small(dropout=0.0):
        return NCSNpp(**OPTIONS, dropout=dropout)

    monkeypatch.setattr(official, "PRESETS", {"other": lambda: NCSNpp(shape=(3, 16, 16), width=4), "small": small})
    source = NCSNpp(**OPTIONS)
    model = {f"module.{k}": v for k, v in official.invert(source.state_dict()).items()}
    order = [k for k in model if k not in ("module.sigmas", "module.all_modules.0.W")]
    ema = {"decay": 0.9, "num_updates": 1, "shadow_params": [2 * model[k] for k in order]}
    net = official.pretrained(str(save({"model": model, "ema": ema})), dropout=0.3, centred=False)
    assert not net.centred
    assert next(m.p for m in net.modules() if isinstance(m, torch.nn.Dropout)) == 0.3
    for (name, value), reference in zip(net.named_parameters(), source.parameters()):
        torch.testing.assert_close(value.data, reference.data if name == "time.fourier.weight" else 2 * reference.data)


def test_pretrained_is_configurable_by_class_path(tmp_path):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--net", type=torch.nn.Module)
    path = "penstock.lightning_modules.weights.rectified_flow.pretrained"
    config = parser.parse_object({"net": {"class_path": path, "init_args": {"path": str(tmp_path / "none.pth")}}})
    with pytest.raises(UserError, match=r"none\.pth: no such file"):
        parser.instantiate(config)


def without(mapping, key):
    return type(mapping)((k, v) for k, v in mapping.items() if k != key)


def test_checkpoint_of_another_network_is_refused(checkpoint, save):
    net = NCSNpp(**{**OPTIONS, "width": 12})
    with pytest.raises(UserError, match=r"fit this NCSNpp: time\.fourier\.weight: found \(8,\), expected \(12,\)"):
        official.load_into(net, save(checkpoint))
    with pytest.raises(UserError, match=r"fits none of ddpmpp_cifar10, ncsnpp_256; nearest is .*: found .*, expected "):
        official.pretrained(str(save(checkpoint)))


def test_missing_and_unknown_keys_are_named(checkpoint, save):
    key = "module.all_modules.5.Conv_0.bias"
    cut = {**checkpoint, "model": without(checkpoint["model"], key)}
    with pytest.raises(UserError, match=r"layers\.2\.conv0\.bias: found no such entry, expected \(8,\)"):
        official.load_into(NCSNpp(**OPTIONS), save(cut), "raw")
    with pytest.raises(UserError, match=r"shadow_params has \d+ tensors, expected \d+"):
        official.load(save(cut))
    with pytest.raises(UserError, match=r"unexpected entry 'all_modules\.5\.Conv_9\.bias' in a layer with Conv_0, "):
        official.convert({**checkpoint["model"], "module.all_modules.5.Conv_9.bias": torch.zeros(1)})
    with pytest.raises(UserError, match=r"unexpected key 'blocks\.0', expected 'all_modules"):
        official.convert({"blocks.0": torch.zeros(1)})
    with pytest.raises(UserError, match=r"unexpected key 'condition\.classes\.weight'"):
        official.invert(NCSNpp(**OPTIONS, num_classes=2).state_dict())


def test_averages_in_another_order_are_refused(checkpoint, save):
    shadow = checkpoint["ema"]["shadow_params"]
    ema = {**checkpoint["ema"], "shadow_params": shadow[::-1]}
    with pytest.raises(UserError, match=r"shadow_params for module\.all_modules\.1\.weight has shape \(3,\), expected"):
        official.load(save({**checkpoint, "ema": ema}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}, "epoch": 1}, r"found epoch, state_dict; expected a dict with model and ema"),
        (torch.zeros(3), "found Tensor; expected a dict with model and ema"),
        ({"model": {"a": 1}, "ema": {"shadow_params": []}}, "model is not a state dict of tensors"),
        ({"model": {"a": torch.zeros(1)}, "ema": {}}, r"ema\.shadow_params is not a list of tensors"),
    ],
)
def test_other_layouts_are_refused(content, message, save):
    with pytest.raises(UserError, match=message):
        official.load(save(content))


def test_missing_and_truncated_files_are_named(checkpoint, save, tmp_path):
    with pytest.raises(UserError, match=r"absent\.pth: no such file"):
        official.load(tmp_path / "absent.pth")
    path = save(checkpoint)
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"checkpoint_1\.pth: (cannot be read|holds objects)"):
            official.load(path)


class Hostile:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_pickles_are_refused_and_not_run(checkpoint, tmp_path, zipped):
    witness, path = tmp_path / "witness", tmp_path / "hostile.pth"
    torch.save({**checkpoint, "step": Hostile(f"touch {witness}")}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"hostile\.pth: holds objects other than tensors"):
        official.load(path)
    assert not witness.exists()
