"""Likelihood frame by frame: the chain rule, causality, and what is left in the run folder."""

import csv
import math

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from penstock.datamodules.digits import Digits
from penstock.datamodules.moving_digits import MovingDigits
from penstock.lightning_modules.callbacks.density import dequantised
from penstock.lightning_modules.callbacks.likelihood import BitsPerDim
from penstock.lightning_modules.callbacks.likelihood_curve import LikelihoodCurve
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.affine import frame_nll, nll
from penstock.lightning_modules.nets.starflow import STARFlow as Net
from penstock.lightning_modules.nets.text_encoder import HashedText
from penstock.lightning_modules.starflow import STARFlow
from penstock.lightning_modules.starflow_v import STARFlowV


def shaken(net):
    generator = torch.Generator().manual_seed(0)
    for weight in net.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return net


@pytest.fixture(scope="module")
def module():
    net = shaken(Net((4, 1, 12, 12), dim=32, depths=(1, 1, 2), head_dim=32, patch=4, side=3, text_dim=8))
    return STARFlowV(net, torch.optim.Adam, text=HashedText(8, 12))


def data(**options):
    return MovingDigits(frames=4, height=12, width=12, n_train=8, n_val=2, **{"n_test": 10, "batch_size": 4} | options)


def clips(n=3):
    x = torch.randn(n, 4, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    return x, torch.randn(n, 12, 8, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_frames_sum_to_the_clip_and_to_the_formula(module):
    x, cond = clips()
    frames = module.frame_log_prob(x, cond=cond)
    assert frames.shape == (3, 4)
    torch.testing.assert_close(frames.sum(1), module.log_prob(x, cond=cond))
    flow = module.net(x, cond)
    torch.testing.assert_close(frame_nll(flow.z, flow.logdets).mean(1), nll(flow.z, flow.logdets))
    second = -0.5 * flow.z[:, 1].square().flatten(1).sum(1) - 72 * math.log(2 * math.pi)
    second += sum(logdet[:, 1].flatten(1).sum(1) for logdet in flow.logdets)
    torch.testing.assert_close(frames[:, 1], second)


@torch.no_grad()
def test_a_frame_knows_nothing_of_later_ones(module):
    x, cond = clips()
    frames = module.frame_log_prob(x, cond=cond)
    x[:, 2] += 1.0
    changed = module.frame_log_prob(x, cond=cond)
    assert torch.equal(changed[:, :2], frames[:, :2])
    assert ((changed - frames)[:, 2:].abs() > 1e-3).all()
    torch.testing.assert_close(module.frame_log_prob(x[:, :3], cond=cond), changed[:, :3])


class Recorder(CSVLogger):
    table = None

    def log_table(self, key, columns, data, step=None):
        self.table = (key, columns, data)


def test_the_curve_in_the_run_folder_and_in_loggers(fakes, module, tmp_path):
    logger, held = Recorder(tmp_path, name="a"), data()
    callbacks = [LikelihoodCurve(n=10), BitsPerDim(n=10)]
    trainer = fakes.quiet_trainer(tmp_path, callbacks, logger=[logger])
    (found,) = trainer.test(module, datamodule=held, verbose=False)
    bits = []
    for batch in held.reference_dataloader("test"):
        x = dequantised(batch["video"], batch["index"], 17)
        with torch.no_grad():
            nats = module.frame_log_prob(x, cond=module.prompted.text(batch["text"]))
        bits.append(-nats / 144 / math.log(2) + math.log2(8.5))
    bits = torch.cat(bits)
    assert bits.shape == (10, 4)
    assert found["bits_per_dim_first_frame"] == pytest.approx(float(bits[:, 0].mean()), rel=1e-5)
    assert found["bits_per_dim_later_frames"] == pytest.approx(float(bits[:, 1:].mean()), rel=1e-5)
    assert found["bits_per_dim"] == pytest.approx(float(bits.mean()), rel=1e-5)
    with open(tmp_path / "samples" / "likelihood_per_frame.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["frame"]) for row in rows] == [0, 1, 2, 3]
    assert [float(row["bits_per_dim"]) for row in rows] == pytest.approx(bits.mean(0).tolist(), rel=1e-5)
    error = bits.std(0) / math.sqrt(10)
    assert [float(row["standard_error"]) for row in rows] == pytest.approx(error.tolist(), rel=1e-3)
    assert logger.table[0] == "likelihood_per_frame"
    assert logger.table[2][3][1] == pytest.approx(float(rows[3]["bits_per_dim"]))
    with Image.open(tmp_path / "samples" / "likelihood_per_frame.png") as picture:
        assert picture.size == (600, 400)


def test_refusals(fakes, module, tmp_path):
    with pytest.raises(UserError, match="n: 1 clips given, expected at least 2"):
        LikelihoodCurve(n=1)
    other, _ = fakes.digits_module_and_data()
    with pytest.raises(UserError, match="likelihood_per_frame: FakeModule has no frame_log_prob"):
        fakes.quiet_trainer(tmp_path, [LikelihoodCurve()]).test(other, datamodule=data())
    images = STARFlow(Net((1, 8, 8), dim=32, depths=(1, 1), head_dim=32, patch=4, side=2), torch.optim.Adam)
    with pytest.raises(UserError, match=r"data of shape \(1, 8, 8\), expected videos of 2 frames or more"):
        fakes.quiet_trainer(tmp_path, [LikelihoodCurve()]).test(images, datamodule=Digits())
