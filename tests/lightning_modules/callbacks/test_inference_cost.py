"""What a prediction costs: counted by hand, and the columns that a test of a detector logs."""

import json
import math
import time

import pytest
import torch
from torch import nn
from torchvision.ops import deform_conv2d

from penstock.lightning_modules.build import model_from_checkpoint
from penstock.lightning_modules.callbacks import inference_cost
from penstock.lightning_modules.callbacks.inference_cost import InferenceCost, operations, peak_bytes
from penstock.lightning_modules.cli import main
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.deformable import deformed
from penstock.lightning_modules.nets.detector import Towers
from penstock.lightning_modules.nets.pyramid_conv import PyramidConvNeck

COCO = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]  # of 800x1344
CPU = torch.device("cpu")


def neck_operations(neck: nn.Module, channels: int = 8) -> float:
    """In convolutions of one task on all levels."""
    xs = [torch.zeros(1, channels, *size) for size in COCO]
    unit = 2 * 9 * channels**2 * sum(h * w for h, w in COCO)
    with torch.inference_mode():
        return operations(lambda: neck.eval()(xs)) / unit


def test_heads_are_of_eight_convolutions():
    assert neck_operations(Towers(8)) == 8
    assert neck_operations(PyramidConvNeck(8)) == pytest.approx(8, abs=1e-2)
    assert neck_operations(PyramidConvNeck(8, ibn=True)) == pytest.approx(8, abs=1e-2)


def test_deformable_convolutions_and_their_offsets_count():
    """Offsets have 18 channels; they are predicted for what goes to a level above the first."""
    cells = [h * w for h, w in COCO]
    whole, upper = sum(cells), sum(cells[1:])
    offsets = 18 / 8 * upper / whole
    plain = neck_operations(PyramidConvNeck(8))
    lite = neck_operations(PyramidConvNeck(8, lcconv_deform=True))
    assert lite == pytest.approx(plain + 2 * offsets, rel=1e-9)
    coarse = 18 / 8 * sum(cells[2:]) / whole  # of the terms from a coarser level, but the one to the finest
    full = neck_operations(PyramidConvNeck(8, lcconv_deform=True, pconv_deform=True))
    assert full == pytest.approx(lite + 4 * (2 * offsets + coarse), rel=1e-9)


@pytest.mark.parametrize("stride", [1, 2])
def test_both_ways_of_deformable_convolution_count_the_same(stride):
    x, weight, bias = torch.rand(2, 8, 14, 10), torch.rand(6, 8, 3, 3), torch.zeros(6)
    offset = torch.zeros(2, 18, 14 // stride, 10 // stride)
    expected = 2 * 2 * 6 * 8 * 9 * (14 // stride) * (10 // stride)
    with torch.inference_mode():
        assert operations(lambda: deformed(x, offset, weight, bias, stride, 1)) == expected
        assert operations(lambda: deform_conv2d(x, offset, weight, bias, stride, 1)) == expected


def test_a_compiled_network_is_counted_as_it_was_written():
    net, x = nn.Conv2d(3, 4, 3), torch.rand(1, 3, 8, 8)
    net.compile(backend="eager")
    with torch.inference_mode():
        net(x)
        assert operations(lambda: net(x)) == 2 * 4 * 3 * 9 * 36


def test_peak_bytes():
    kept = []

    def work():
        a = torch.empty(1000, 1000)
        b = torch.empty(500, 1000)
        del a
        c = torch.empty(250, 1000)
        kept.append(c)
        return b

    assert peak_bytes(work, CPU) == pytest.approx(6e6, rel=1e-3)


def test_no_words_on_stderr(capfd):
    peak_bytes(lambda: torch.empty(10), CPU)
    assert capfd.readouterr().err == ""


TINY = [
    *("experiment=sepc_bccd", "data=digit_scenes", "image_size=96", "logger=csv", "data.batch_size=2"),
    *("model.net.channels=16", "model.net.backbone.model=mobilenetv2_035", "model.net.backbone.weights=random"),
    *("trainer.max_steps=1", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"),
]


@pytest.mark.parametrize("neck", ["towers", "sepc"])
def test_columns_of_a_detector(neck, tmp_path, monkeypatch):
    monkeypatch.delenv("RUN_DIR", raising=False)
    run = tmp_path / "run"
    assert main(["fit", *TINY, f"neck={neck}", "callbacks.cost.runs=2", f"run_dir={run}"]) == 0
    found = json.loads((run / "metrics.json").read_text())
    model = model_from_checkpoint(run / "checkpoints" / "last.ckpt")
    assert found["parameters_m"] == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6, rel=1e-6)
    assert found["gflops"] == pytest.approx(by_hand(model.net) / 1e9, rel=1e-6)
    state = sum(x.nbytes for x in [*model.parameters(), *model.buffers()]) / 1e6
    assert state + 4 * 16 * 48 * 48 / 1e6 < found["memory_mb"] < state + 50
    assert 1 < found["latency_ms"] < 60_000
    assert not {"val/latency_ms", "val/gflops"} & found.keys()


@torch.no_grad()
def by_hand(net: nn.Module) -> int:
    """Of an image of 96x96: each convolution's weights times the cells of its results, a multiplication and an addition
    each."""
    counts = []

    def count(conv: nn.Conv2d, _, y: torch.Tensor) -> None:
        counts.append(2 * conv.weight.numel() * math.prod(y.shape[2:]))

    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    net(torch.zeros(1, 3, 96, 96))
    return sum(counts)


def test_latency_is_a_median_after_a_warm_up(fakes, tmp_path, monkeypatch):
    seconds = iter([9.0, 9.0, 0.5, 0.1, 0.2])

    def taken(work, device):
        work()
        return next(seconds)

    monkeypatch.setattr(inference_cost, "_seconds", taken)
    found = logged(fakes, tmp_path, InferenceCost(runs=3, warmup=2))
    assert found["latency_ms"] == pytest.approx(200)


def test_images_of_a_batch(fakes, tmp_path):
    found = logged(fakes, tmp_path, InferenceCost(batch_size=5, runs=1))
    assert found["gflops"] == pytest.approx(5 * 2 * 64 * 7 / 1e9, rel=1e-6)
    assert found["latency_ms"] > 10
    assert found["parameters_m"] == pytest.approx((64 * 7 + 7 + 1) / 1e6)


def logged(fakes, folder, callback) -> dict[str, float]:
    """What a test of a model of one matrix logs."""

    class Model(fakes.FakeModule):
        def predict_step(self, batch, batch_idx):
            time.sleep(0.01)
            return {"index": batch["index"], "score": self.net(batch["image"].flatten(1))}

    class View(fakes.Rows):
        def fetch(self, rows):
            return {key: value[rows] for key, value in self.columns.items()}

    images, labels = fakes.digits()
    module = Model(images, labels)
    module.net = nn.Linear(64, 7)
    _, data = fakes.digits_module_and_data()
    data.view = lambda split: View(data.columns, list(range(len(images))))
    return fakes.quiet_trainer(folder, [callback]).test(module, datamodule=data, verbose=False)[0]


def test_refusals(fakes, tmp_path):
    with pytest.raises(UserError, match="runs: 0 given, expected at least 1"):
        InferenceCost(runs=0)
    module, data = fakes.digits_module_and_data()
    with pytest.raises(UserError, match="InferenceCost: FakeModule has no predict_step"):
        fakes.quiet_trainer(tmp_path, [InferenceCost()]).test(module, datamodule=data)
