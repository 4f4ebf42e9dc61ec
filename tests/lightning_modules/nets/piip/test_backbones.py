"""The named backbones: each costs what the papers publish, on the meta device, without any weights."""

import pytest
import torch

from penstock.lightning_modules.build import build
from penstock.lightning_modules.cli.compose import compose
from penstock.lightning_modules.cli.conf import options
from penstock.lightning_modules.nets.piip.costs import PUBLISHED

SMALL = ("piip_tiny", "piip_mobilenetv2")  # ours
NAMED = [name for name in options("backbone") if name.startswith("piip_") and not name.startswith(SMALL)]
UNPUBLISHED = {
    "piip_sbl_1568_1120_672",
    "piip_sbl_1792_1120_672",
    "piip_h6b_1024_768",
    "piip_lh6b_1536_1024_512",
}


QUICK = {"piip_tsb_1120_896_448", "piip_h6b_512_192", "piip_vt_cs_vb", "piip_sbl_1792_1120_672"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in NAMED]
)
def test_costs(name):
    tree, _ = compose(["experiment=piip_coco", f"backbone={name}"])
    with torch.device("meta"):
        (model,) = build(tree, "model")
    found = model.eval().costs()
    assert (found.published is None) == (name in UNPUBLISHED)
    if found.published:
        way = found.closed_form or found.as_published  # attention in windows that do not divide the grid is padded
        assert way / 1e9 == pytest.approx(found.published, rel=0.01)
    if found.closed_form:
        assert found.closed_form < found.as_published < sum(part.operations for part in found.parts.values())


def test_every_published_number_has_a_name():
    """Single models and classifiers are no backbones."""
    assert len(NAMED) - len(UNPUBLISHED) == len([key for key in PUBLISHED if len(key) > 1]) - 3
