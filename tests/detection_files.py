"""What the recorded numbers of dense detectors have in common."""

import torch
from torch import Tensor

from penstock.lightning_modules.detection.host import Objects, Outputs
from tests.golden_files import Record


def maps(record: Record) -> Outputs:
    """Those of a head, all leaves."""
    return Outputs(*([record[f"{name}{level}"].requires_grad_() for level in range(5)] for name in ("cls", "reg")))


def images(record: Record) -> tuple[list[Objects], list[tuple[int, int]], list[tuple[int, int]], Tensor]:
    """Objects, sizes, padded sizes and scales."""
    objects = [Objects(record[f"boxes{image}"], record[f"labels{image}"] - 1) for image in range(2)]
    rows = record["img_h_w_padh_padw_scale"]
    sizes, padded = ([tuple(row[k : k + 2].int().tolist()) for row in rows] for k in (0, 2))
    return objects, sizes, padded, rows[:, 4:].expand(-1, 4)


def in_order(boxes: Tensor, labels: Tensor) -> Tensor:
    """Rows of box, score and class, sorted."""
    found = torch.cat([boxes, labels[:, None].to(boxes.dtype)], 1).detach()
    return found[torch.argsort(-found[:, 4] + 1e-3 * found[:, 5], stable=True)]
