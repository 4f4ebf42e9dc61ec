"""The papers' pyramids by letters."""

from functools import partial

import pytest
import torch

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.piip.beit import BeitBranch
from penstock.lightning_modules.nets.piip.convnext import BASE, TINY
from penstock.lightning_modules.nets.piip.intern_vit import InternVitBranch
from penstock.lightning_modules.nets.piip.presets import dense, hybrid


def meta(make, models, *args, **kwargs):
    with torch.device("meta"):
        return make(models, *args, weights=["random"] * len(models), **kwargs)


def lengths(branch) -> list[int]:
    return [last - first for first, last in branch.bounds]


def test_order_and_drop_path():
    net = meta(dense, "TSBL", (1344, 896, 672, 448))
    branches = list(net.pyramid.branches)
    assert [branch.size for branch in branches] == [448, 672, 896, 1344]
    assert [branch.dims[-1] for branch in branches] == [1024, 768, 384, 192]
    assert [lengths(branch) for branch in branches] == [[2] * 12, [1] * 12, [1] * 12, [1] * 12]
    assert [branch.blocks[0].drop_path1.drop_prob for branch in branches] == [0.4, 0.15, 0.05, 0.05]
    assert {branch.pad for branch in branches} == {"inputs"}
    assert len(net.pyramid.interactions) == 12


def test_stronger_drop_path_grows_with_the_block():
    net = meta(dense, "SBL", (1568, 1120, 672), "augreg_384")
    rates = [[block.drop_path1.drop_prob for block in branch.blocks] for branch in net.pyramid.branches]
    assert [row[-1] for row in rates] == pytest.approx([0.4, 0.3, 0.2])
    assert [row[0] for row in rates] == [0.0] * 3


def test_the_largest_models():
    net = meta(dense, "H6", (1024, 512), "mae", None)
    coarse, fine = net.pyramid.branches
    assert isinstance(coarse, InternVitBranch)
    assert (lengths(coarse), lengths(fine)) == ([4] * 12, [2] * 4 + [3] * 8)
    light = 1280 * 3200  # in place of the convolutions that merge; the published number has larger tables of positions
    assert (sum(p.numel() for p in net.pyramid.parameters()) + light) / 1e6 == pytest.approx(6872, rel=2e-3)
    net = meta(dense, "LH6", (1536, 1024, 512), "mae", None, interactions=4)
    assert [lengths(branch) for branch in net.pyramid.branches] == [[12] * 4, [8] * 4, [6] * 4]


def test_segmenters_have_tables_of_their_own_size_and_fused_layers():
    net = meta(dense, "H6", (512, 192), "mae", None, speed_up=True, resize_table=True)
    branches = list(net.pyramid.branches)
    assert [branch.pos_embed.shape[1] for branch in branches] == [12**2, 32**2]
    assert {block.mlp.act.approximate for branch in branches for block in branch.blocks} == {"tanh"}
    net = meta(dense, "TS", (448, 224))
    assert {block.mlp.act.approximate for block in net.pyramid.branches[0].blocks} == {"none"}


def test_beit_with_windows():
    net = meta(dense, "SBL", (1568, 1120, 672), "beitv2")
    assert [isinstance(branch, BeitBranch) for branch in net.pyramid.branches] == [True, True, False]
    with pytest.raises(UserError, match=r"window: found none"):
        meta(dense, "SB", (1120, 672), "beitv2", None)


@pytest.mark.parametrize("models", [("CT", "CS", "CB"), ("CT", "VS", "VB"), ("VT", "CS", "CB")])
def test_hybrids(models, recwarn):
    net = meta(hybrid, models)
    groups = {"CT": TINY, "CS": BASE, "CB": BASE}
    expected = [list(groups.get(name, [1] * 12)) for name in models[::-1]]
    assert [lengths(branch) for branch in net.pyramid.branches] == expected
    assert net.channels == ([128, 256, 512, 1024] if models[-1] == "CB" else [768] * 4)
    assert not [one for one in recwarn if "parameter-inverted" in str(one.message)]


@pytest.mark.parametrize(
    ("message", "make"),
    [
        (r"models: found \['CX'\], expected some of CT, CS, CB, VT, VS, VB", partial(hybrid, ["CX"], [64])),
        (r"models: found TH, expected some of T, S, B, L for pretrained=deit3", partial(dense, "TH", (64, 32))),
        (r"weights: found 1, expected 2", partial(dense, "TS", (64, 32), weights=["random"])),
    ],
)
def test_refused(message, make):
    with pytest.raises(UserError, match=message):
        make()
