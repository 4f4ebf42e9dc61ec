"""The benchmark of training runs at a tiny size, and its operations are those that PyTorch counts."""

import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from penstock.benchmarks.starflow_training import forward_flops, main, our_loss
from penstock.lightning_modules.nets.starflow import STARFlow, starflow_xl

TINY = ["--shape", "2", "2", "4", "--dim", "64", "--depths", "1", "2", "--classes", "3", "--batch", "2", "--steps", "1"]
TINY += ["--warmup", "1", "--matmul", "64", "--no-compile"]


def test_operations_are_those_that_pytorch_counts():
    net, batch, classes = STARFlow((3, 4, 6), 64, (1, 2), 128, num_classes=5, patch=2), 4, 6
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        loss = our_loss(net, torch.randn(batch, 3, 4, 6), torch.zeros(batch, dtype=torch.long))
        forward = counter.get_total_flops()
        loss.backward()
    assert forward == batch * forward_flops(net, 6, causal=False)
    assert counter.get_total_flops() == 3 * forward - batch * 2 * classes * 128


def test_causal_attention_is_about_half():
    with torch.device("meta"):
        net = starflow_xl()
    full, least = (forward_flops(net, 1024, causal=causal) for causal in (False, True))
    assert full - least == sum(
        len(block.attn_blocks) * 2 * n * (n - 1) * 2048 for block, n in zip(net.blocks, [1024] * 5 + [1025])
    )
    parameters = sum(p.numel() for p in net.parameters())
    assert 0.99 < (least / 1024 - 2 * 28 * 2 * 1024 * 2048 / 2) / (2 * parameters) < 1.01


def test_rows_hold_what_they_say(tmp_path):
    assert main([*TINY, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "starflow_training_cpu.json").read_text())
    rows = {row["step"]: row for row in found["rows"]}
    assert list(rows) == ["ours, eager", "plain PyTorch, eager"]
    assert rows["ours, eager"]["first loss"] == rows["plain PyTorch, eager"]["first loss"]
    for row in rows.values():
        assert row["tokens/s"] * row["seconds"] == pytest.approx(16)
        assert row["TFLOP/s"] * row["seconds"] == pytest.approx(found["step_tflop"])
        share = row["TFLOP/s"] / found["matmul_tflops"]
        assert float(row["MFU"].rstrip("%")) == pytest.approx(100 * share, abs=0.06)
