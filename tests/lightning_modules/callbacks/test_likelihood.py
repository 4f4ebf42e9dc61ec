"""Bits per dimension against a closed form."""

import math

import pytest
import torch
from lightning.pytorch import Trainer

from penstock.datamodules.digits import Digits
from penstock.lightning_modules.callbacks.likelihood import BitsPerDim
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.unet import UNet
from penstock.lightning_modules.rectified_flow import RectifiedFlow


class Uniform(RectifiedFlow):
    """Density 1/2 on each dimension of [-1, 1]."""

    def log_prob(self, x, *, cond=None, generator=None):
        assert x.min() >= -1
        assert x.max() <= 1
        return torch.full((len(x),), -x[0].numel() * math.log(2.0))


def score(module, **options):
    callback = BitsPerDim(**options)
    trainer = Trainer(callbacks=[callback], logger=False, enable_progress_bar=False, enable_model_summary=False)
    (result,) = trainer.validate(module, Digits(batch_size=64), verbose=False)
    return result["bits_per_dim"]


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
