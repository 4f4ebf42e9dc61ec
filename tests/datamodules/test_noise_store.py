"""The noise of official pairs, bit for bit from 32 bytes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from penstock.datamodules.noise_store import regenerate, state_bytes
from penstock.lightning_modules.errors import UserError

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "rectified_flow_pp" / "06_noise_store.safetensors"


def test_official_bytes_give_the_official_bits():
    tensors = load_file(GOLDEN)
    for row, noise in zip(tensors["in/state_bytes"], tensors["out/noise"]):
        made = regenerate(row.numpy().tobytes(), tuple(noise.shape))
        assert made.dtype == torch.float32
        assert torch.equal(made, noise)


def test_bytes_are_those_of_the_generator_before_each_draw():
    tensors = load_file(GOLDEN)
    generator = np.random.default_rng(int(tensors["in/seed"]))
    for row, noise in zip(tensors["in/state_bytes"], tensors["out/noise"]):
        assert state_bytes(generator) == row.numpy().tobytes()
        drawn = generator.standard_normal(noise.shape).astype(np.float32)
        assert np.array_equal(drawn, noise.numpy())


def test_refusals():
    with pytest.raises(UserError, match="found 31 bytes, expected 32"):
        regenerate(bytes(31), (1, 2, 2))
    with pytest.raises(ValueError, match="found MT19937, expected PCG64"):
        state_bytes(np.random.Generator(np.random.MT19937(0)))
