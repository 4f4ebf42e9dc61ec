"""Deformable attention against a loop, public code and known resamplings; the Triton kernel in the interpreter."""

from itertools import product
from math import floor

import pytest
import torch
from torch.nn import functional as F

from penstock.kernels import deformable_attention as kernel
from penstock.kernels import dispatch
from penstock.kernels.deformable_attention import deformable_attention, reference

GRIDS = ((3, 5), (2, 2), (1, 4))


def through_operator(value, shapes, locations, weights):
    return kernel._deformable_attention(value, [side for shape in shapes for side in shape], locations, weights)


WORKS = [deformable_attention, through_operator]


def given(batch=2, queries=7, heads=3, size=5, shapes=GRIDS, points=2, dtype=torch.float64, device="cpu", seed=0):
    """Value, locations in [-0.2, 1.2] and weights."""
    random = torch.Generator().manual_seed(seed)
    options = {"generator": random, "dtype": torch.float64}
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, size, **options)
    locations = 1.4 * torch.rand(batch, queries, heads, len(shapes), points, 2, **options) - 0.2
    weights = torch.randn(batch, queries, heads, len(shapes), points, **options)
    kind = torch.promote_types(dtype, torch.float32)
    return value.to(device, dtype), locations.to(device, kind), weights.to(device, dtype)


def centers(height, width):
    """Of the cells of a grid, (x, y), for one head, one level and one point."""
    y, x = torch.meshgrid(*((torch.arange(n, dtype=torch.float64) + 0.5) / n for n in (height, width)), indexing="ij")
    return torch.stack([x, y], -1).view(1, -1, 1, 1, 1, 2)


def results(work, data, shapes, cotangent):
    """The result and its three gradients."""
    inputs = [x.detach().requires_grad_() for x in data]
    out = work(inputs[0], shapes, *inputs[1:])
    return out.detach(), *torch.autograd.grad(out, inputs, cotangent.to(out))


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("name", ["01", "02"])
def test_public_code(name, work):
    from golden_files import Record  # the process of the interpreter does without

    record = Record("piip", name)
    data = [record[key].requires_grad_() for key in ("value", "sampling_locations", "attention_weights")]
    out = work(data[0], record["spatial_shapes"].tolist(), *data[1:])
    (0.5 * out.square().sum()).backward()
    found = {"output": out, **{f"grad_{k}": x.grad for k, x in zip(("value", "locations", "weights"), data)}}
    for key, x in found.items():
        torch.testing.assert_close(x.detach(), record.out[key], rtol=0, atol=1e-9)
    assert record.left == set(found)


@pytest.mark.parametrize("work", WORKS)
def test_explicit_loop(work):
    value, locations, weights = given()
    expected = torch.zeros(*weights.shape[:3], value.shape[3], dtype=torch.float64)
    starts = [sum(h * w for h, w in GRIDS[:level]) for level in range(len(GRIDS))]
    for b, q, m, level, p in product(*map(range, weights.shape)):
        height, width = GRIDS[level]
        x, y = (float(c) * n - 0.5 for c, n in zip(locations[b, q, m, level, p], (width, height)))
        for i, j in product((floor(y), floor(y) + 1), (floor(x), floor(x) + 1)):
            if 0 <= i < height and 0 <= j < width:
                near = (1 - abs(y - i)) * (1 - abs(x - j))
                expected[b, q, m] += near * weights[b, q, m, level, p] * value[b, starts[level] + i * width + j, m]
    found = work(value, GRIDS, locations, weights)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected.flatten(2), rtol=0, atol=1e-12)


def resampled(work, image, height, width):
    """A map `(1, C, H, W)` read at the centres of another grid, by one head and one point."""
    value = image.flatten(2).transpose(1, 2)[:, :, None]
    places = centers(height, width)
    out = work(value, [tuple(image.shape[2:])], places, torch.ones_like(places[..., 0]))
    return out.transpose(1, 2).unflatten(2, (height, width))


@pytest.mark.parametrize("work", WORKS)
def test_known_resamplings(work):
    image = torch.randn(1, 3, 4, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(resampled(work, image, 4, 8), image)
    torch.testing.assert_close(resampled(work, image, 2, 4), F.avg_pool2d(image, 2), rtol=0, atol=1e-12)
    found, expected = resampled(work, image, 8, 16), F.interpolate(image, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], rtol=0, atol=1e-12)
    ones = resampled(work, torch.ones_like(image), 8, 16)
    assert ones[0, 0, 0].tolist() == [0.5625, *[0.75] * 14, 0.5625]


@pytest.mark.parametrize("work", WORKS)
def test_gradients(work):
    data = [x.requires_grad_() for x in given(queries=3, heads=2, size=2, shapes=GRIDS[:2])]
    assert torch.autograd.gradcheck(lambda v, *x: work(v, GRIDS[:2], *x), data)


def test_second_derivatives_of_the_reference():
    data = [x.requires_grad_() for x in given(batch=1, queries=2, heads=1, size=2, shapes=GRIDS[:1])]
    assert torch.autograd.gradgradcheck(lambda v, *x: reference(v, GRIDS[:1], *x), data)


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("empty", [{"batch": 0}, {"queries": 0}, {"points": 0}])
def test_empty(empty, work):
    data = given(**empty)
    out, *gradients = results(work, data, GRIDS, torch.ones(*data[1].shape[:2], 15))
    assert out.shape == (data[0].shape[0], data[1].shape[1], 15)
    assert not out.any()
    assert [x.shape for x in gradients] == [x.shape for x in data]
    assert not gradients[0].any()


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_full(dtype, work):
    data, cotangent = (
        given(queries=40, dtype=dtype),
        given(queries=40, heads=1, size=15)[0][:, :1].expand(2, 40, -1, 15),
    )
    cotangent = cotangent[:, :, 0].to(dtype)
    assert data[1].dtype == torch.float32
    found = results(work, data, GRIDS, cotangent)
    expected = results(work, [x.float() for x in data], GRIDS, cotangent.float())
    for x, y, kind in zip(found, expected, (dtype, dtype, torch.float32, dtype)):
        assert x.dtype == kind
        assert torch.equal(x, y.to(kind))


@pytest.mark.parametrize("work", WORKS)
def test_strides(work):
    data, cotangent = given(), torch.ones(2, 7, 15)
    wide = torch.cat([data[0], data[0]], -1)[..., :5], data[1].flip(-1).flip(-1).mT.contiguous().mT, data[2]
    wide = *wide[:2], wide[2].transpose(0, 1).contiguous().transpose(0, 1)
    assert not any(x.is_contiguous() for x in wide)
    for x, y in zip(results(work, data, GRIDS, cotangent), results(work, wide, GRIDS, cotangent[:1].expand(2, 7, 15))):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-14)


def test_operators_are_registered():
    data = given(dtype=torch.float32)
    sides = [side for shape in GRIDS for side in shape]
    asked = [x.clone().requires_grad_() for x in data]
    torch.library.opcheck(kernel._deformable_attention, (asked[0], sides, *asked[1:]))
    half = [x.bfloat16() for x in data]
    torch.library.opcheck(kernel._deformable_attention, (half[0], sides, *half[1:]))
    arguments = (data[0], sides, *data[1:], torch.ones(2, 7, 15))
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernel._deformable_attention_backward, arguments, test_utils=checks)
    for work in WORKS:
        out = work(data[0].bfloat16().to("meta"), GRIDS, *(x.to("meta") for x in data[1:]))
        assert (out.shape, out.dtype, out.device.type) == ((2, 7, 15), torch.bfloat16, "meta")


@pytest.mark.parametrize("work", WORKS)
def test_compiled(work):
    """One graph with its gradients: the operator where a GPU would run Triton, plain operators on the CPU."""
    data, cotangent = given(dtype=torch.float32), torch.ones(2, 7, 15)
    compiled = torch.compile(work, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(results(compiled, data, GRIDS, cotangent), results(work, data, GRIDS, cotangent)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": (2, 23, 15)}, r"value, locations, weights \(2, 23, 15\), .* expected \(B, S, M, d\), \(B, Q, M, L"),
        ({"locations": (2, 7, 3, 3, 2)}, r"\(2, 7, 3, 3, 2\), \(2, 7, 3, 3, 2\), expected"),
        ({"locations": (2, 7, 3, 3, 2, 3)}, r"\(2, 7, 3, 3, 2, 3\)"),
        ({"locations": (2, 7, 1, 3, 2, 2), "weights": (2, 7, 1, 3, 2)}, r"\(2, 7, 1, 3, 2, 2\)"),
        ({"locations": (1, 7, 3, 3, 2, 2), "weights": (1, 7, 3, 3, 2)}, r"\(1, 7, 3, 3, 2, 2\)"),
        ({"weights": (2, 7, 3, 3, 1)}, r"\(2, 7, 3, 3, 1\)"),
        ({"value": (2, 24, 3, 5)}, r"24 pixels of value, expected 23 of grids 3x5, 2x2, 1x4$"),
        ({"shapes": GRIDS[:2]}, r"grids 3x5, 2x2 for 3 levels"),
        ({"shapes": ()}, r"grids none for 3 levels"),
        ({"shapes": ((3, 5), (2, 4), (0, 4))}, r"grids 3x5, 2x4, 0x4 for 3 levels"),
    ],
)
def test_shapes_that_do_not_fit(change, message):
    sizes = {"value": (2, 23, 3, 5), "locations": (2, 7, 3, 3, 2, 2), "weights": (2, 7, 3, 3, 2)} | change
    shapes = sizes.pop("shapes", GRIDS)
    value, locations, weights = (torch.zeros(shape) for shape in sizes.values())
    with pytest.raises(ValueError, match=message) as error:
        deformable_attention(value, shapes, locations, weights)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("double", range(3))
def test_double_precision_is_for_the_reference(double, monkeypatch):
    data = [x.double() if i == double else x for i, x in enumerate(given(dtype=torch.float32))]
    expected = deformable_attention(data[0], GRIDS, *data[1:])
    monkeypatch.setattr(kernel, "_launch", None)
    with dispatch.backend("triton"):
        for work in WORKS:
            assert torch.equal(work(data[0], GRIDS, *data[1:]), expected)


def test_deterministic_algorithms():
    data, out = given(dtype=torch.float32, queries=0), torch.zeros(2, 0, 15)
    call = kernel._deformable_attention_backward
    sides = [side for shape in GRIDS for side in shape]
    with dispatch.backend("triton"):
        try:
            torch.use_deterministic_algorithms(True)
            with pytest.raises(RuntimeError, match="adds in changing order"):
                call(data[0], sides, *data[1:], out)
            torch.use_deterministic_algorithms(True, warn_only=True)
            with pytest.warns(UserWarning, match="adds in changing order"):
                call(data[0], sides, *data[1:], out)
        finally:
            torch.use_deterministic_algorithms(False)


FULL, HALF = torch.float32, torch.bfloat16
CASES = [
    ({}, FULL),
    ({}, HALF),
    ({}, torch.float16),
    ({"shapes": ((4, 6),), "size": 6, "heads": 16, "queries": 9, "points": 4}, FULL),  # several programs
    ({"shapes": ((3, 2),), "size": 6, "heads": 4, "queries": 9, "points": 5}, HALF),
    ({"shapes": ((1, 1),), "size": 1, "heads": 1, "queries": 1, "points": 1, "batch": 1}, FULL),
    ({"shapes": ((5, 1), (1, 3)), "size": 33, "heads": 2, "points": 1, "batch": 3}, FULL),
    ({"shapes": ((2, 3),), "size": 300, "heads": 1, "queries": 2, "batch": 1}, FULL),  # wider than a tile
    ({"batch": 0}, FULL),
    ({"queries": 0}, FULL),
]


def spread(way, value, locations, weights):
    """The same numbers with other strides: values as a slice of a projection or with gaps, axes the other way round."""
    if way == "plain":
        return value, locations, weights
    value = torch.cat([value, value], -1)[..., : value.shape[3]] if way == "slice" else value.mT.contiguous().mT
    return value, locations.mT.contiguous().mT, weights.transpose(0, 1).contiguous().transpose(0, 1)


def kernel_against_reference(device: str) -> None:
    """Results and gradients against the reference in double precision; strides, and places far outside."""
    ways = [(case, "plain") for case in CASES] + [(CASES[0], "slice"), (CASES[0], "gaps")]
    for (case, dtype), way in ways:
        shapes, data = case.get("shapes", GRIDS), given(**case, dtype=dtype, device=device)
        width = data[0].shape[2] * data[0].shape[3]
        cotangent = torch.randn(*data[1].shape[:2], width, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        with dispatch.backend("triton"):
            found = results(deformable_attention, spread(way, *data), shapes, cotangent)
        exact = results(reference, [x.double() for x in data], shapes, cotangent.double())
        for ours, theirs, kind in zip(found, exact, (dtype, dtype, FULL, dtype)):
            assert (ours.dtype, ours.shape) == (kind, theirs.shape)
            tolerance = 1e-5 if kind == FULL else 2 * torch.finfo(kind).eps
            size = float(theirs.abs().max()) if theirs.numel() else 0.0
            torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=1e-5 * (1 + size))
    value, locations, weights = given(dtype=FULL, device=device)
    ones, alone = torch.ones(2, 7, 15, device=device), locations.detach().requires_grad_()
    with dispatch.backend("triton"):
        deformable_attention(value, GRIDS, alone, weights).sum().backward()  # whose gradient has strides of 0
    expected = results(reference, (value, locations, weights), GRIDS, ones)[2]
    torch.testing.assert_close(alone.grad, expected, rtol=1e-5, atol=1e-4)
    value, locations, weights = given(dtype=FULL, device=device, shapes=((3, 4),), batch=1)
    with dispatch.backend("triton"):
        for far in (1e30, -1e30, 3e9):
            assert not deformable_attention(value, [(3, 4)], torch.full_like(locations, far), weights).any()
        assert deformable_attention(value, [(3, 4)], torch.full_like(locations, torch.nan), weights).isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernel_on_cuda():
    kernel_against_reference("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_larger_sizes_on_cuda():
    larger_sizes("cuda")


def larger_sizes(device: str) -> None:
    """Two levels of PIIP's grids against double precision; no point where rounding chooses between two pixels."""
    shapes = ((70, 70), (28, 28))
    value, locations, weights = given(2, 56 * 56, 16, 12, shapes, 4, FULL, device)
    sizes = torch.tensor(shapes, device=device).flip(1)[:, None]
    pixel = locations * sizes - 0.5
    data = value, (pixel.floor() + 0.05 + 0.9 * (pixel - pixel.floor()) + 0.5) / sizes, weights
    cotangent = torch.randn(2, 56 * 56, 16 * 12, generator=torch.Generator().manual_seed(1)).to(device)
    found = results(deformable_attention, data, shapes, cotangent)
    exact = results(reference, [x.double() for x in data], shapes, cotangent.double())
    for ours, theirs in zip(found, exact):
        assert float((ours - theirs).abs().max() / (1 + theirs.abs().max())) < 1e-4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offsets_beyond_32_bits_on_cuda():
    value, locations, weights = given(dtype=HALF, device="cuda", shapes=((3, 4),))
    far = torch.empty_strided(value.shape, (2**31 + 8, *value.stride()[1:]), dtype=HALF, device="cuda").copy_(value)
    near = deformable_attention(value, [(3, 4)], locations, weights)
    assert torch.equal(deformable_attention(far, [(3, 4)], locations, weights), near)
