"""The feature pyramid against the official code's numbers."""

import torch

from penstock.lightning_modules.nets.feature_pyramid import FeaturePyramid
from penstock.lightning_modules.weights.sepc import converted
from tests.golden_files import Record


def test_golden():
    record = Record("sepc", "09")
    prefixed = converted({f"neck.0.{key}": x for key, x in record.weights.items()})
    net = FeaturePyramid([8, 12, 16], 8)
    net.load_state_dict({key.removeprefix("pyramid."): x for key, x in prefixed.items()})
    found = net.double()([record[f"c{level}"] for level in (3, 4, 5)])
    for level, y in enumerate(found):
        record.same(y, f"p{level + 3}")
    assert not record.left
    assert net.levels == len(found)


def test_levels_beyond_the_backbone():
    maps = [torch.zeros(1, c, n, n) for c, n in ((4, 9), (6, 5))]
    assert [tuple(y.shape[1:]) for y in FeaturePyramid([4, 6], 8, coarse=0)(maps)] == [(8, 9, 9), (8, 5, 5)]
    assert [y.shape[-1] for y in FeaturePyramid([4, 6], 8, coarse=3)(maps)] == [9, 5, 3, 2, 1]
