"""Rotary tables against numbers of the released code, and what a rotation has to keep."""

import math

import pytest
import torch

from penstock.kernels.rotary import reference as rotate
from penstock.lightning_modules.nets.rotary import Rotary

GRIDS = (
    *("frame_local_T1", "img_3x5_text", "img_no_text_tokens", "img_square_text", "pure_2d"),
    *("video_2x3_T3_text", "video_T4_no_text"),
)


@pytest.mark.parametrize("name", GRIDS)
def test_rotary_tables(record, name):
    case = record("starflow", "06", f"{name}/(?!positions)")
    height, width, frames, text, side, head_dim, text_dim = case[f"{name}/meta_h_w_T_L_P_headdim_latent"].tolist()
    angles = Rotary(head_dim, 3 if text_dim else 2, side).angles((max(frames, 1), height, width), text, torch.float64)
    case.same(angles.repeat_interleave(2, 1), f"{name}/angles")
    case.same(rotate(case[f"{name}/q"], angles.cos(), angles.sin()), f"{name}/q_rotated")


def test_rotary_tables_of_a_large_image_and_of_a_language_model(record):
    case = record("starflow", "06", "img_64x64|lm_1d/(?!positions)")
    angles = Rotary(64, 3, 32).angles((1, 64, 64), 2, torch.float64)[-8:]
    case.same(angles.repeat_interleave(2, 1), "img_64x64_corner/angles_last8")
    angles = Rotary(16, 1, 4).angles((1, 2, 3), 4, torch.float64)
    case.same(angles.repeat_interleave(2, 1), "lm_1d/angles")
    case.same(rotate(case["lm_1d/q"], angles.cos(), angles.sin(), halves=True), "lm_1d/q_rotated_half_split")


def angles_of(rotary, *place):
    """Angles of a token at (row, column, frame) of a grid of 8 x 8 x 8."""
    row, column, frame = place
    return rotary.angles((8, 8, 8), dtype=torch.float64)[frame * 64 + row * 8 + column]


def logit(q, k, a, b):
    return (rotate(q, a.cos(), a.sin()) * rotate(k, b.cos(), b.sin())).sum()


@pytest.mark.parametrize("shift", [(1, 0, 0), (0, 3, 0), (0, 0, 2), (1, 2, 3)])
def test_a_logit_depends_on_the_difference_of_places(shift):
    q, k = torch.randn(2, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rotary = Rotary(64, side=32)
    a, b = (2, 1, 3), (4, 4, 0)
    moved = [[x + d for x, d in zip(place, shift)] for place in (a, b)]
    found = logit(q, k, *(angles_of(rotary, *place) for place in moved))
    expected = logit(q, k, angles_of(rotary, *a), angles_of(rotary, *b))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    other = logit(q, k, angles_of(rotary, *moved[0]), angles_of(rotary, *b))
    assert (other - expected).abs() > 1e-3


@pytest.mark.parametrize(("head_dim", "spatial"), [(64, 12), (32, 4), (24, 2)])
def test_pairs_are_shared_between_rows_columns_and_frames(head_dim, spatial):
    rotary = Rotary(head_dim)
    moved = [angles_of(rotary, *place) != 0 for place in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    shares = [0] * spatial + [1] * spatial + [2] * 8
    assert torch.stack(moved).int().argmax(0).tolist() == shares
    assert torch.stack(moved).sum(0).tolist() == [1] * len(shares)


def test_larger_grids_cover_the_same_range_and_frames_do_not_shrink():
    rotary = Rotary(64, side=32)
    small, large = (rotary.angles((2, n, n)).double() for n in (32, 64))
    last = 31 * 32 + 31
    assert small[last, 0] == pytest.approx(31)
    assert large[63 * 64 + 63, 0] == pytest.approx(31.5)
    assert small[1024, 24] == large[4096, 24] == 1
    wide = rotary.angles((1, 16, 64))
    assert [float(wide[-1, i]) for i in (0, 12)] == pytest.approx([15.0, 63.0])


def test_text_lies_on_the_axis_of_frames():
    angles = Rotary(64, side=32).angles((1, 2, 2), text=4)
    assert not angles[:4, :24].any()
    assert angles[:4, 24].tolist() == [0, 8, 16, 24]
    assert not angles[4:, 24:].any()


def test_a_language_model_counts_on():
    angles = Rotary(16, axes=1).angles((2, 3, 2), text=5)
    assert angles[:, 0].tolist() == list(range(17))


@pytest.mark.parametrize("halves", [False, True])
def test_a_rotation_by_a_right_angle(halves):
    x = torch.arange(1.0, 9.0)
    turned = rotate(x, torch.zeros(4), torch.ones(4), halves)
    pairs = [-5, -6, -7, -8, 1, 2, 3, 4] if halves else [-2, 1, -4, 3, -6, 5, -8, 7]
    assert turned.tolist() == pairs
    by = torch.tensor([0.3, 1.0, math.pi, 5.0])
    assert rotate(x, by.cos(), by.sin(), halves).norm() == pytest.approx(float(x.norm()))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"head_dim": 16}, "heads of 16, expected a multiple of 4, at least 20"),
        ({"head_dim": 22}, "heads of 22, expected a multiple of 4, at least 20"),
        ({"head_dim": 6, "axes": 2}, "heads of 6, expected a multiple of 4, at least 4"),
        ({"head_dim": 7, "axes": 1}, "heads of 7, expected a multiple of 2"),
    ],
)
def test_heads_that_cannot_be_shared_out(options, line):
    with pytest.raises(ValueError, match=line):
        Rotary(**options)


def test_text_needs_an_axis():
    with pytest.raises(ValueError, match="a sequence with text needs 1 or 3 axes"):
        Rotary(24, axes=2).angles((1, 2, 2), text=1)
