"""The benchmark that trains FastFlow and anomalib's side by side: its pieces."""

import importlib.util

import pytest
import torch

from penstock.benchmarks import fastflow_parity
from penstock.benchmarks.fastflow_parity import main, ours, trained

SIDE = 64


def test_absent_packages_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["--data", "D", "--weights", "W"]) == 2
    assert capsys.readouterr().err == (
        "anomalib is missing; install it in an environment of its own: pip install anomalib==2.7.0\n"
    )


def test_training_finds_what_is_unlike(monkeypatch):
    monkeypatch.setattr(fastflow_parity, "SIDE", SIDE)
    monkeypatch.setattr(fastflow_parity, "BATCH", 8)
    generator = torch.Generator().manual_seed(0)
    shapes = ((24, 16, 16), (32, 8, 8), (96, 4, 4))

    def maps(n: int) -> list[torch.Tensor]:
        return [torch.randn(n, *shape, generator=generator) for shape in shapes]

    test, masks = maps(16), torch.zeros(16, 1, SIDE, SIDE, dtype=torch.uint8)
    for y in test:
        y[8:, :, : y.shape[2] // 2] *= 3
    masks[8:, :, : SIDE // 2] = 1
    labels = (torch.arange(16) >= 8).long()
    train = maps(16)
    untrained, found, again = (trained(ours, 0, "random", train, (test, labels, masks), epochs) for epochs in (0, 3, 3))
    assert found.keys() == {"image_auroc", "pixel_auroc"}
    assert found == again != untrained
    assert found["pixel_auroc"] > 0.7


@pytest.mark.skipif(importlib.util.find_spec("anomalib") is None, reason="anomalib is not installed")
def test_sides_differ_by_their_draws_only(monkeypatch):
    monkeypatch.setattr(fastflow_parity, "SIDE", SIDE)
    maps = [torch.randn(2, *shape) for shape in ((24, 16, 16), (32, 8, 8), (96, 4, 4))]
    losses = []
    for make in (ours, fastflow_parity.theirs):
        torch.manual_seed(0)
        _, encode, loss_of = make("random")
        losses.append(float(loss_of(encode(maps)).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
