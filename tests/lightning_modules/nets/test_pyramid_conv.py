"""Pyramid convolution against the official code's numbers, and its properties in closed form."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.pyramid_conv import (
    PyramidConv,
    PyramidConvNeck,
    ScaleEqualizingConv,
    activated,
    integrated,
)
from tests.golden_files import Record

COCO = [(100, 168), (50, 84), (25, 42), (13, 21), (7, 11)]  # P3 to P7 of 800 x 1344 pixels
SMALL = [(33, 39), (17, 20), (9, 10), (5, 5), (3, 3)]
PRESETS = {
    "04": {},
    "05": {"ibn": True},
    "06": {"ibn": True, "lcconv_deform": True},
    "07": {"ibn": True, "lcconv_deform": True, "pconv_deform": True},
    "08": {"ibn": True, "lcconv_deform": True, "pconv_deform": True, "lcconv_padding": 1},
}
PARAMETERS = {"04": 8_261_120, "05": 8_264_192, "06": 8_347_172, "07": 8_845_052}


def pyramid(channels: int, sizes=SMALL, batch: int = 1, dtype=torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, channels, *size, generator=generator, dtype=dtype) for size in sizes]


def shaken(module: nn.Module, std: float = 0.3) -> nn.Module:
    """With offsets and norms that do something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p += (0.05 if "offset" in name else std) * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for b in module.buffers():
            if b.is_floating_point():
                b += torch.rand(b.shape, generator=generator, dtype=b.dtype)
    return module


def inputs(record: Record) -> list[Tensor]:
    return [record[f"x{level}"].requires_grad_() for level in range(5)]


def grow(record: Record, loss: Tensor, net: nn.Module, xs: list[Tensor]) -> None:
    """Compares the loss and the gradients recorded, with an allowance for those that are 0 but for rounding."""
    loss.backward()
    record.same(loss, "loss")
    found = {f"grad_x{level}": x.grad for level, x in enumerate(xs)}
    found |= {f"grad/{name}": p.grad for name, p in net.named_parameters()}
    recorded = {key: value for key, value in found.items() if key in record.left}
    largest = max(float(record.out[key].abs().max()) for key in recorded)
    for key, value in recorded.items():
        error = (value.double() - record.out[key].double()).abs().max()
        assert error <= 1e-6 * largest, f"{key}: {error:.1e}"
        record.left.discard(key)


def test_golden_integrated_norm():
    record = Record("sepc", "01")
    norm = nn.BatchNorm2d(6).double()
    norm.load_state_dict({key.removeprefix("bn."): x for key, x in record.weights.items()}, strict=False)
    xs = inputs(record)
    norm.eval()
    for level, y in enumerate(integrated(norm, xs)):
        record.same(y, f"eval{level}")
    norm.train()
    found = integrated(norm, xs)
    for level, y in enumerate(found):
        record.same(y, f"train{level}")
    record.same(norm.running_mean, "running_mean_after")
    record.same(norm.running_var, "running_var_after")
    loss = sum(y.pow(3).sum() for y in found) / 3
    loss.backward()
    record.same(loss, "loss")
    for level, x in enumerate(xs):
        record.same(x.grad, f"grad_x{level}")
    record.same(norm.weight.grad, "grad_weight")
    record.same(norm.bias.grad, "grad_bias")
    assert not record.left


@pytest.mark.parametrize(("name", "options"), [("02", {}), ("03", {"deformable": True, "ibn": True})])
def test_golden_layer(name, options):
    record = Record("sepc", name)
    net = record.load(PyramidConv(4, **options).double())
    xs = inputs(record)
    coarse, own, fine = net.Pconv
    for level, x in enumerate(xs):
        record.same(term := own(x, level), f"term0_{level}")
        if level:
            record.same(fine(xs[level - 1], level), f"term_minus1_{level}")
            if "deformable" in options:
                record.same(own.conv_offset(x), f"offset0_{level}")
        if level < 4:
            up = F.interpolate(coarse(xs[level + 1], level), term.shape[-2:], mode="bilinear", align_corners=True)
            record.same(up, f"term_plus1_{level}")
    found = net(xs)
    for level, y in enumerate(found):
        record.same(y, f"y{level}")
    grow(record, sum(y.square().sum() for y in found) / 2, net, xs)
    assert not record.left


@pytest.mark.parametrize("name", PRESETS)
def test_golden_necks(name):
    record = Record("sepc", name)
    net = record.load(PyramidConvNeck(8, **{"lcconv_padding": 0, **PRESETS[name]}).double()).train(name != "07")
    xs = inputs(record)
    found = net(xs)
    for level, (cls, loc) in enumerate(found):
        record.same(cls, f"cls{level}")
        record.same(loc, f"loc{level}")
    for key, value in net.state_dict().items():
        if f"state_after/{key}" in record.left:
            record.same(value, f"state_after/{key}")
    grow(record, sum(y.square().sum() for pair in found for y in pair) / 2, net, xs)
    net.eval()
    if name == "05":
        with torch.no_grad():
            for level, pair in enumerate(net([x[:1] for x in xs])):
                for task, y in zip(("cls", "loc"), pair):
                    assert record.error(y, f"eval_{task}{level}") < 1e-6
                    record.left.discard(f"eval_{task}{level}")
    assert not record.left


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    net = PyramidConvNeck(256, **PRESETS[name])
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]


def test_a_layer_without_neighbours_is_a_convolution_per_level():
    net = shaken(PyramidConv(5).double())
    with torch.no_grad():
        for conv in (net.Pconv[0], net.Pconv[2]):
            conv.weight.zero_()
            conv.bias.zero_()
    xs, own = pyramid(5), net.Pconv[1]
    for x, y in zip(xs, net(xs)):
        torch.testing.assert_close(y, F.conv2d(x, own.weight, own.bias, padding=1).relu(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_offsets_of_zero_change_nothing(stride):
    conv = ScaleEqualizingConv(8, stride, deformable=True).double()
    nn.init.normal_(conv.weight)
    (x,) = pyramid(8, [(13, 9)])
    torch.testing.assert_close(conv(x, 1), conv(x, 0), rtol=0, atol=1e-12)


def test_an_offset_of_a_row_moves_by_a_row():
    conv = ScaleEqualizingConv(4, padding=0, deformable=True).double()
    with torch.no_grad():
        conv.conv_offset.bias[0::2] = 1
    (x,) = pyramid(4, [(12, 9)])
    torch.testing.assert_close(conv(x, 1)[:, :, :-1], conv(x, 0)[:, :, 1:], rtol=0, atol=1e-12)


def test_flops():
    """A layer is 1.5 convolutions, the head of four layers and two convolutions 8 of them."""

    def flops(module: nn.Module, call) -> int:
        with torch.device("meta"):
            xs = [torch.empty(1, 16, *size) for size in COCO]
        with FlopCounterMode(display=False) as counter:
            call(module.to("meta"), xs)
        return counter.get_total_flops()

    one = flops(nn.Conv2d(16, 16, 3, padding=1), lambda conv, xs: [conv(x) for x in xs])
    assert flops(PyramidConv(16), lambda layer, xs: layer(xs)) / one == pytest.approx(1.5, abs=1e-3)
    assert flops(PyramidConvNeck(16), lambda neck, xs: neck(xs)) / one == pytest.approx(8, abs=1e-2)


def test_integrated_norm_keeps_the_memory_format():
    """Channels-last maps give the same as others, gradients and statistics too, and stay channels-last."""
    norms = [nn.BatchNorm2d(6).double() for _ in range(2)]
    given = [x.requires_grad_() for x in pyramid(6, batch=2)]
    last = [x.detach().contiguous(memory_format=torch.channels_last).requires_grad_() for x in given]
    plain, found = (activated(xs, norm) for norm, xs in zip(norms, (given, last)))
    assert all(y.is_contiguous() for y in plain)
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in found)
    for ys in (plain, found):
        sum((y.sigmoid() * y).sum() for y in ys).backward()
    for a, b in zip(plain, found):
        assert (a - b).abs().max() < 1e-12
    for a, b in zip(given, last):
        assert (a.grad - b.grad).abs().max() < 1e-12
    for a, b in zip(norms[0].state_dict().values(), norms[1].state_dict().values()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_integrated_norm_of_constants():
    xs = [torch.full((1, 1, n, n), float(level), dtype=torch.float64) for level, n in enumerate((16, 8, 4, 2, 1))]
    norm = nn.BatchNorm2d(1).double()
    found = [float(y.detach()[0, 0, 0, 0]) for y in integrated(norm, xs)]
    assert found == pytest.approx([-0.506807, 1.036240, 2.579287, 4.122334, 5.665381], abs=1e-6)
    assert float(norm.running_mean) == pytest.approx(0.1 * 112 / 341)
    assert float(norm.running_var) == pytest.approx(0.9 + 0.1 * 0.419983 * 341 / 340, abs=1e-6)


def test_integrated_norm_is_of_the_whole_pyramid():
    xs = [x + level for level, x in enumerate(pyramid(3, batch=2))]
    found = integrated(nn.BatchNorm2d(3).double(), xs)
    pooled = torch.cat([y.transpose(0, 1).flatten(1) for y in found], 1)
    assert pooled.mean(1).abs().max() < 1e-12
    assert (pooled.var(1, correction=0) - 1).abs().max() < 1e-4
    assert min(y.mean().abs() for y in found) > 0.01


@pytest.mark.parametrize("name", ["05", "06", "07"])
def test_folded_norms(name):
    torch.manual_seed(0)
    net = shaken(PyramidConvNeck(6, layers=2, **PRESETS[name]).double()).eval()
    xs = pyramid(6)
    folded = net.requires_grad_(False).folded()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    for pair, other in zip(net(xs), folded(xs)):
        for a, b in zip(pair, other):
            assert float(a.abs().max()) > 0.1
            torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_levels_reached(layers):
    """Something on P5 is seen by all levels within as many steps as there are layers, and by no other."""
    xs = [torch.zeros(1, 2, *size) for size in SMALL]
    xs[2][0, 0, 4, 5] = 1
    for _ in range(layers):
        layer = PyramidConv(2)
        for conv in layer.Pconv:
            nn.init.constant_(conv.weight, 0.1)
        xs = layer(xs)
    assert [bool(x.any()) for x in xs] == [abs(level - 2) <= layers for level in range(5)]


def test_levels_are_made_of_the_levels_before():
    """Whatever the order of the levels: no level reads another's result (Jacobi, not Gauss-Seidel)."""
    net, xs = shaken(PyramidConv(3).double()), pyramid(3)
    whole, (coarse, own, fine) = net(xs), net.Pconv
    for level in (3, 0, 4, 2, 1):
        y = own(xs[level])
        if level:
            y = y + fine(xs[level - 1])
        if level < 4:
            y = y + F.interpolate(coarse(xs[level + 1]), y.shape[-2:], mode="bilinear", align_corners=True)
        torch.testing.assert_close(whole[level], y.relu(), rtol=0, atol=1e-12)


def test_offsets_learn_on_upper_levels_alone():
    net = shaken(PyramidConv(3, deformable=True).double())
    found = net(pyramid(3))
    offsets = [conv.conv_offset.weight for conv in net.Pconv]
    lowest = torch.autograd.grad(found[0].sum(), offsets, retain_graph=True, allow_unused=True)
    assert all(grad is None or not grad.any() for grad in lowest)
    others = torch.autograd.grad(sum(y.sum() for y in found[1:]), offsets)
    assert all(grad.any() for grad in others)


def test_padding_of_the_last_convolutions():
    xs = [torch.empty(1, 4, *size, device="meta") for size in COCO]
    for padding, expected in ((1, COCO), (0, [(98, 166), (48, 82), (23, 40), (11, 19), (5, 9)])):
        found = PyramidConvNeck(4, layers=1, lcconv_padding=padding).to("meta")(xs)
        assert [tuple(y.shape[-2:]) for pair in found for y in pair] == [size for size in expected for _ in range(2)]
    with pytest.raises(UserError, match="found 0 with a map of 2 cells a side"):
        PyramidConvNeck(4, layers=1, lcconv_padding=0)(pyramid(4, [(4, 6), (2, 3)], dtype=torch.float32))
    with pytest.raises(UserError, match="lcconv_padding: found 2"):
        PyramidConvNeck(4, lcconv_padding=2)


def test_levels_of_other_sizes_are_refused():
    with pytest.raises(UserError, match=r"level 1 is \(4, 4\) under \(9, 9\), expected \(5, 5\)"):
        PyramidConv(4)(pyramid(4, [(9, 9), (4, 4)], dtype=torch.float32))


def test_offsets_are_in_float32_under_autocast():
    net = shaken(PyramidConv(8, deformable=True))
    xs = pyramid(8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = net([x.bfloat16() for x in xs])
    expected = net([x.bfloat16().float() for x in xs])
    assert (found[2].float() - expected[2]).abs().max() < 0.02 * expected[2].abs().max()
