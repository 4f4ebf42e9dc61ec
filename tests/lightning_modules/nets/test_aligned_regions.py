"""Regions and anchors at their exact places, against loops and closed forms."""

import math

import pytest
import torch

from penstock.lightning_modules.nets.aligned_regions import AlignedRegions, ExactAnchors


def at(maps: torch.Tensor, x: float, y: float) -> torch.Tensor:
    """Channels of a map `(C, H, W)` at a place in pixels, bilinear; the border pixel lasts for a pixel."""
    height, width = maps.shape[1:]
    if not (-1 <= x <= width and -1 <= y <= height):
        return maps.new_zeros(len(maps))
    x, y = (min(max(v, 0), n - 1) for v, n in ((x, width), (y, height)))
    left, top = int(x), int(y)
    right, bottom = min(left + 1, width - 1), min(top + 1, height - 1)
    row = [maps[:, k, left] * (left + 1 - x) + maps[:, k, right] * (x - left) for k in (top, bottom)]
    return row[0] * (top + 1 - y) + row[1] * (y - top)


def pooled(maps: torch.Tensor, box: list[float], stride: int, size: int) -> torch.Tensor:
    """mmdetection's: places half a pixel lower, samples in the middle of equal parts of a cell, as many as pixels."""
    x0, y0, x1, y1 = (v / stride - 0.5 for v in box)
    steps = [(b - a) / size for a, b in ((x0, x1), (y0, y1))]
    counts = [math.ceil(step) for step in steps]
    out = maps.new_zeros(len(maps), size, size)
    for i in range(size):
        for j in range(size):
            for m in range(counts[1]):
                for n in range(counts[0]):
                    x, y = x0 + (j + (n + 0.5) / counts[0]) * steps[0], y0 + (i + (m + 0.5) / counts[1]) * steps[1]
                    out[:, i, j] += at(maps, x, y) / (counts[0] * counts[1])
    return out


def test_regions_against_loops():
    strides, names = (4, 8), ["fine", "coarse"]
    maps = {name: torch.randn(2, 3, 160 // s, 240 // s, dtype=torch.float64) for name, s in zip(names, strides)} | {
        "unread": torch.zeros(2, 3, 1, 1, dtype=torch.float64)
    }
    boxes = [
        torch.tensor([[10.0, 20.0, 60.0, 33.0], [0.0, 0.0, 239.0, 150.0]], dtype=torch.float64),
        torch.tensor([[200.5, 100.25, 240.0, 160.0], [30.0, 3.0, 31.0, 5.0]], dtype=torch.float64),
    ]
    found = AlignedRegions(names, 3, strides)(maps, boxes, [(160, 240)] * 2)
    rows = [(k, box.tolist()) for k, own in enumerate(boxes) for box in own]
    for (k, box), one in zip(rows, found):
        side = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
        level = min(max(math.floor(math.log2(side / 56 + 1e-6)), 0), 1)
        expected = pooled(maps[names[level]][k], box, strides[level], 3)
        assert (one - expected).abs().max() < 1e-12
    assert AlignedRegions(names, 3, strides)(maps, [boxes[0][:0], boxes[1][:0]], []).shape == (0, 3, 3, 3)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_sides_of_anchors_are_not_rounded(ratio):
    ((x0, y0, x1, y1),) = ExactAnchors(((40,),), ((ratio,),)).cell_anchors[0].tolist()
    assert (x1 - x0) * (y1 - y0) == pytest.approx(1600, rel=1e-6)
    assert (y1 - y0) / (x1 - x0) == pytest.approx(ratio, rel=1e-6)
    assert (x0 + x1, y0 + y1) == (0, 0)
