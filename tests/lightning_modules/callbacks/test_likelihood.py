"""Bits per dimension against a closed form."""

import math

import pytest
import torch
from lightning.pytorch import Trainer

from penstock.datamodules.digits import Digits
from penstock.datamodules.moving_digits import MovingDigits
from penstock.kernels.philox import Draws
from penstock.lightning_modules.callbacks.likelihood import BitsPerDim
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.starflow import STARFlow as Net
from penstock.lightning_modules.nets.text_encoder import HashedText
from penstock.lightning_modules.nets.unet import UNet
from penstock.lightning_modules.rectified_flow import RectifiedFlow
from penstock.lightning_modules.starflow import STARFlow
from penstock.lightning_modules.starflow_v import STARFlowV


class Uniform(RectifiedFlow):
    """Density 1/2 on each dimension of [-1, 1]."""

    def log_prob(self, x, *, cond=None, generator=None):
        assert x.min() >= -1
        assert x.max() <= 1
        return torch.full((len(x),), -x[0].numel() * math.log(2.0))


def score(module, data=None, **options):
    callback = BitsPerDim(**options)
    trainer = Trainer(callbacks=[callback], logger=False, enable_progress_bar=False, enable_model_summary=False)
    (result,) = trainer.validate(module, data or Digits(batch_size=64), verbose=False)
    return result["bits_per_dim"]


def shaken(net):
    generator = torch.Generator().manual_seed(0)
    for weight in net.parameters():
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    return net


def flow(shape, **options):
    return shaken(Net(shape, dim=32, depths=(1, 2), head_dim=32, patch=4, side=2, **options))


def by_hand(net, batch, cond):
    """Of all samples of a batch on 17 levels, from noise and log-determinants."""
    key = "video" if "video" in batch else "image"
    levels = ((batch[key] + 1) * 8).round()
    x = 2 * (levels + Draws(0, 0, batch["index"]).uniform("dequantise", levels.shape[1:])) / 17 - 1
    with torch.no_grad():
        found = net(x, cond)
    nats = 0.5 * found.z.square().sum() + found.z.numel() * 0.5 * math.log(2 * math.pi)
    nats -= sum(logdet.sum() for logdet in found.logdets)
    return float(nats / x.numel() / math.log(2) + math.log2(8.5))


def first_batch(data, split="test"):
    data.prepare_data()
    data.setup()
    return next(iter(data.reference_dataloader(split)))


def test_clips_are_scored_under_their_captions():
    data = MovingDigits(frames=3, height=12, width=12, n_train=8, n_val=2, n_test=6, batch_size=6)
    batch, text = first_batch(data), HashedText(8, 12)
    module = STARFlowV(flow((3, 1, 12, 12), text_dim=8), torch.optim.Adam, text=text)
    bits = score(module, data, n=6)
    assert bits == pytest.approx(by_hand(module.net, batch, text(batch["text"])), rel=1e-5)
    others = text([batch["text"][0]] * 6)
    assert abs(bits - by_hand(module.net, batch, others)) > 1e-3


def test_images_are_scored_under_their_labels():
    data = Digits(batch_size=16)
    batch = {key: value[:5] for key, value in first_batch(data).items()}
    module = STARFlow(flow((1, 8, 8), num_classes=10), torch.optim.Adam)
    bits = score(module, data, n=5)
    assert bits == pytest.approx(by_hand(module.net, batch, batch["label"]), rel=1e-5)
    assert abs(bits - by_hand(module.net, batch, None)) > 1e-3


def test_uniform_density_costs_log2_of_the_levels():
    module = Uniform(UNet((1, 8, 8), width=8, num_classes=10), torch.optim.Adam)
    assert score(module, n=100) == pytest.approx(math.log2(17), rel=1e-6)


def test_flow_at_initialisation_is_a_normal_density():
    """The network starts at zero velocity: x itself is the latent."""
    module = RectifiedFlow(UNet((1, 8, 8), width=8, num_classes=10), torch.optim.Adam)
    bits = score(module, n=20)
    assert math.log2(8.5) + 0.5 * math.log2(2 * math.pi) < bits < math.log2(8.5) + 0.5 * math.log2(2 * math.pi) + 0.73


def test_refusals():
    with pytest.raises(UserError, match="at least 1"):
        BitsPerDim(n=0)
    module = STARFlow(flow((1, 8, 8), num_classes=10), torch.optim.Adam)
    module.key = "latent"
    with pytest.raises(UserError, match="bits_per_dim: the density of STARFlow is of latents"):
        score(module)
