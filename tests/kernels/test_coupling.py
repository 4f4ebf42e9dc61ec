"""The coupling of FastFlow against its formula, public code, autograd; the Triton kernel in the interpreter."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from penstock.kernels import _coupling_cpu, coupling, dispatch
from penstock.kernels.coupling import couple, decouple, inverse_reference, passive, reference

FORMS = ("tanh", "tanh_over_clamp")
SHAPES = ((3, 8, 5, 7), (2, 7, 4, 6), (2, 2, 1, 1), (1, 5, 1, 3))
FORMATS = (torch.contiguous_format, torch.channels_last)


def given(*shape, dtype=torch.float64, device="cpu", format=torch.contiguous_format):
    """`u`, `a`, `g`, the offset and a permutation."""
    random = torch.Generator().manual_seed(0)
    b, c, h, w = shape
    u, a = (torch.randn(b, n, h, w, generator=random, dtype=torch.float64) for n in (c, c // 2 * 2))
    g, offset = (torch.randn(c, generator=random, dtype=torch.float64) for _ in range(2))
    u, a = (x.to(device, dtype, memory_format=format) for x in (u, 8 * a))
    perm = torch.randperm(c, generator=random)
    return u, a, *(x.to(device, dtype) for x in (g.exp(), offset)), perm.to(device)


def cotangents(u, found):
    random = torch.Generator().manual_seed(1)
    return [torch.randn(x.shape, generator=random, dtype=torch.float64).to(x.device, x.dtype) for x in found]


def formula(u, a, g, offset, perm, clamp, form):
    """In NumPy, channel by channel."""
    u, a, g, offset = (x.detach().double().numpy() for x in (u, a, g, offset))
    c = u.shape[1]
    first, half = c - c // 2, c // 2
    v, logdet = u.copy(), np.zeros(len(u))
    for k in range(half):
        r = 0.1 * a[:, k]
        s = clamp * np.tanh(r if form == "tanh" else r / clamp)
        v[:, first + k] = u[:, first + k] * np.exp(s) + 0.1 * a[:, half + k]
        logdet += s.sum((1, 2))
    for k in range(c):
        v[:, k] = v[:, k] * g[k] + offset[k]
        logdet += u.shape[2] * u.shape[3] * np.log(g[k])
    return torch.from_numpy(np.stack([v[:, k] for k in perm], 1)), torch.from_numpy(logdet)


@pytest.mark.parametrize("work", [reference, coupling._couple, couple])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_formula(shape, form, work):
    for format in FORMATS:
        data = given(*shape, format=format)
        for found, expected in zip(work(*data, 1.5, form), formula(*data, 1.5, form)):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_forms_are_those_of_the_two_versions():
    u, a = torch.ones(1, 2, 1, 1), torch.tensor([40.0, 0.0]).view(1, 2, 1, 1)
    one, zero, perm = torch.ones(2), torch.zeros(2), torch.arange(2)
    s = [float(couple(u, a, one, zero, perm, 2.0, form)[1]) for form in FORMS]
    assert s == pytest.approx([1.99866, 1.92806], abs=1e-5)


@pytest.mark.parametrize("work", [decouple, coupling._decouple])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_inverse(shape, form, work):
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        u, a, g, offset, perm = given(*shape, dtype=dtype)
        out, logdet = couple(u, a, g, offset, perm, 1.5, form)
        back, negative = work(out, a, g, offset, perm, 1.5, form)
        torch.testing.assert_close(back, u, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(negative, -logdet, rtol=tolerance, atol=tolerance)
        u1 = passive(out, g, offset, perm)
        torch.testing.assert_close(u1, u[:, : shape[1] - shape[1] // 2], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form):
    *data, perm = given(2, 5, 2, 2)
    data = [x.requires_grad_() for x in data]
    for work in (coupling._couple, decouple, reference):
        assert torch.autograd.gradcheck(lambda *x, work=work: work(*x, perm, 1.5, form), data)
    assert torch.autograd.gradgradcheck(lambda *x: reference(*x, perm, 1.5, form), data)


def test_log_determinant_is_that_of_the_jacobian():
    u, _, g, offset, perm = given(1, 5, 2, 3)
    mix = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def step(x):
        return couple(x, torch.einsum("bchw,nc->bnhw", x[:, :3], mix).sin() * 9, g, offset, perm, 2.0)

    jacobian = torch.autograd.functional.jacobian(lambda x: step(x)[0], u).reshape(30, 30)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], step(u)[1][0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("work", [coupling._couple, couple])
@pytest.mark.parametrize(
    ("name", "clamp", "form"),
    [("01", 2.0, FORMS[0]), ("02", 1.5, FORMS[0]), ("04", 2.0, FORMS[1]), ("05", 1.5, FORMS[1])],
)
def test_public_code(name, clamp, form, work):
    from golden_files import Record  # the process of the interpreter does without

    record = Record("fastflow", name)
    scale, offset = (record.weights[f"global_{key}"].requires_grad_() for key in ("scale", "offset"))
    perm = record.weights["w_perm"]
    perm = perm.flatten(1).argmax(1) if perm.ndim == 4 else perm
    kernel = record.weights["subnet.0.weight"]
    layers = [
        nn.Conv2d(*w.shape[1::-1], w.shape[2], padding="same", dtype=torch.float64)
        for w in (kernel, record.weights["subnet.2.weight"])
    ]
    subnet = record.load(nn.Sequential(layers[0], nn.ReLU(), layers[1]), "subnet.")
    g = 0.1 * F.softplus(scale.flatten(), beta=0.5)
    x = record["x"].requires_grad_()
    out, logdet = work(x, subnet(x[:, : kernel.shape[1]]), g, offset.flatten(), perm, clamp, form)
    objective = (out * record["cot_y"]).sum() + (logdet * record["cot_logdet"]).sum()
    objective.backward()
    named = {f"grad_subnet_{key.replace('.', '_')}": w.grad for key, w in subnet.named_parameters()}
    named |= {"grad_global_scale": scale.grad, "grad_global_offset": offset.grad, "grad_x": x.grad}
    for key, found in {**named, "y": out, "logdet": logdet, "objective": objective}.items():
        record.same(found, key)
    y, fixed = record["y_for_inverse"], (g, offset.flatten(), perm)
    back, negative = decouple(y, subnet(passive(y, *fixed)), *fixed, clamp, form)
    record.same(back, "x_from_inverse")
    record.same(negative, "logdet_inverse")
    assert not record.left


def results(work, data, form="tanh"):
    """What comes out and the gradients of a weighted sum of it."""
    *data, perm = data
    data = [x.detach().requires_grad_() for x in data]
    found = work(*data, perm, 1.5, form)
    grads = torch.autograd.grad(found, data, cotangents(data[0], found))
    return *(x.detach() for x in found), *grads


@pytest.mark.parametrize("format", FORMATS)
def test_parts(monkeypatch, format):
    data = given(5, 7, 3, 4, format=format)
    whole = results(reference, data)
    for part in (1, 2 * 84, 3 * 84, 10**6):
        monkeypatch.setattr(_coupling_cpu, "PART", part)
        for found, expected in zip(results(coupling._couple, data), whole):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 8, 4, 4), (2, 7, 3, 5)])
def test_formats_are_kept(shape):
    data = given(*shape, format=torch.channels_last)
    found = {
        "couple": results(coupling._couple, data),
        "reference": results(reference, data),
        "decouple": [decouple(*data, 2.0)[0], None, *results(inverse_reference, data)[2:4]],
    }
    for name, (out, _, grad_u, *_) in found.items():
        for x in (out, grad_u):
            assert x.is_contiguous(memory_format=torch.channels_last), name
    assert found["couple"][3].is_contiguous(memory_format=torch.channels_last)
    for x in results(coupling._couple, given(*shape))[:3:2]:
        assert x.is_contiguous()


def strided(x):
    """The same numbers, neighbours nowhere."""
    wide = torch.full((x.shape[0] * 2, x.shape[1] + 2, x.shape[3], x.shape[2] * 3), torch.nan, dtype=x.dtype)
    view = wide.to(x.device)[::2, 1:-1, :, 1::3].transpose(2, 3)
    return view.copy_(x)


@pytest.mark.parametrize("work", [coupling._couple, reference])
def test_strides(work):
    u, a, *rest = given(3, 7, 4, 5)
    expected = results(reference, (u, a, *rest))
    last = torch.channels_last
    for pair in (
        (strided(u), strided(a)),
        (u, a.contiguous(memory_format=last)),
        (u.contiguous(memory_format=last), a),
    ):
        for x, y in zip(results(work, (*pair, *rest)), expected):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)
    scattered = torch.stack([rest[0], rest[0]], 1)[:, 0]
    torch.testing.assert_close(work(u, a, scattered, *rest[1:], 1.5, "tanh")[0], expected[0])


@pytest.mark.parametrize("work", [coupling._couple, couple, reference])
def test_empty_batches(work):
    found = results(work, given(0, 6, 3, 3, dtype=torch.float32))
    assert [tuple(x.shape) for x in found] == [(0, 6, 3, 3), (0,), (0, 6, 3, 3), (0, 6, 3, 3), (6,), (6,)]
    assert not any(x.any() for x in found[4:])
    *data, perm = given(0, 6, 3, 3)
    assert decouple(*data, perm, 2.0)[0].shape == (0, 6, 3, 3)
    assert passive(data[0], *data[2:], perm).shape == (0, 3, 3, 3)


@pytest.mark.parametrize("work", [coupling._couple, reference])
def test_types(work):
    """Arithmetic in float32 at least: what is computed from rounded inputs is rounded once."""
    exact = given(2, 8, 9, 9)
    for kinds in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)):
        u, a, g, offset, perm = (
            x.to(kind) for x, kind in zip(exact, (*kinds, torch.float32, torch.float32, torch.long))
        )
        found = results(work, (u, a, g, offset, perm))
        assert [x.dtype for x in found] == [kinds[0], torch.float32, *kinds, torch.float32, torch.float32]
        *wide, _ = (x.double() for x in (u, a, g, offset, perm))
        weights = [w.double() for w in cotangents(u, found[:2])]
        wide = [x.requires_grad_() for x in wide]
        expected = reference(*wide, perm, 1.5)
        for x, y in zip(found, (*expected, *torch.autograd.grad(expected, wide, weights))):
            tolerance = max(torch.finfo(x.dtype).eps, 2e-6)
            torch.testing.assert_close(
                x.double(), y, rtol=tolerance, atol=tolerance * float(y.detach().abs().max()) / 8
            )


def test_autocast_of_the_subnet():
    u, _, g, offset, perm = given(2, 6, 8, 8, dtype=torch.float32)
    subnet = nn.Conv2d(3, 6, 3, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        a = subnet(u[:, :3])
        found = [work(u, a, g, offset, perm, 2.0, "tanh") for work in (coupling._couple, couple, reference)]
    assert a.dtype == torch.bfloat16
    for out, logdet in found:
        assert (out.dtype, logdet.dtype) == (torch.float32, torch.float32)
        torch.testing.assert_close(out, reference(u, a.float(), g, offset, perm, 2.0)[0], rtol=1e-5, atol=1e-5)


def kept(work, data) -> int:
    """Bytes that wait for backward."""
    *data, perm = data
    data, seen = [x.detach().requires_grad_() for x in data], {}

    def pack(x):
        seen[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        work(*data, perm, 2.0, "tanh")
    return sum(x.untyped_storage().nbytes() for x in seen.values())


def test_memory_that_waits_for_backward():
    """Beside `u`, which convolutions keep anyway."""
    u, a, *rest = given(4, 8, 16, 16, dtype=torch.float32)
    assert kept(coupling._couple, (u, a, *rest)) - u.nbytes < 1.01 * a.nbytes
    assert kept(reference, (u, a, *rest)) - u.nbytes >= 2 * a.nbytes


def test_operators_are_registered():
    u, a, g, offset, perm = given(2, 5, 3, 4, dtype=torch.float32)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for form, format in product(FORMS, FORMATS):
        maps = [x.to(memory_format=format).requires_grad_() for x in (u, a)]
        torch.library.opcheck(coupling._couple, (*maps, g, offset, perm, 2.0, form), test_utils=checks)
        plain = [x.detach() for x in maps]
        torch.library.opcheck(coupling._decouple, (*plain, g, offset, perm, 2.0, form), test_utils=checks)
        arguments = (*plain, g, perm, u, u[:, 0, 0, 0], 2.0, form)
        torch.library.opcheck(coupling._couple_backward, arguments, test_utils=checks)
    out, logdet = couple(u.bfloat16().to("meta"), *(x.to("meta") for x in (a, g, offset, perm)), 2.0)
    assert (out.shape, out.dtype, logdet.shape, logdet.dtype) == (u.shape, torch.bfloat16, (2,), torch.float32)
    assert decouple(*(x.to("meta") for x in (u, a, g, offset, perm)), 2.0)[0].shape == u.shape


def through(data, form):
    """A step and its inverse, with gradients of what they need."""
    out, logdet = couple(*data, 2.0, form)
    back, _ = decouple(out, *data[1:], 2.0, form)
    return out, logdet, back


@pytest.mark.parametrize("small", [0, 2**16])
def test_compiled(monkeypatch, small):
    """The operator where a GPU would run Triton, plain operators on the CPU: one graph with its gradients in both."""
    monkeypatch.setattr(coupling, "SMALL", small)
    monkeypatch.setattr(coupling, "is_compiling", lambda: small > 0)
    *data, perm = given(2, 5, 3, 4, dtype=torch.float32)
    data = [x.requires_grad_() for x in data]
    found = []
    for work in (through, torch.compile(through, fullgraph=True, backend="aot_eager")):
        outputs = work((*data, perm), "tanh")
        found.append((*outputs, *torch.autograd.grad(outputs, data, cotangents(data[0], outputs))))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


class Step(nn.Module):
    def __init__(self, work):
        super().__init__()
        self.work, self.subnet = work, nn.Conv2d(3, 4, 3, padding=1)
        _, _, g, offset, perm = given(1, 5, 1, 1, dtype=torch.float32)
        for name, value in {"g": g, "offset": offset, "perm": perm}.items():
            self.register_buffer(name, value)

    def forward(self, u):
        return self.work(u, self.subnet(u[:, :3]), self.g, self.offset, self.perm, 2.0)


@pytest.mark.parametrize("work", [couple, reference])
def test_exported_programs_hold_plain_operators(work):
    step, u = Step(work).eval(), given(2, 5, 4, 6, dtype=torch.float32)[0]
    batch = {0: torch.export.Dim("batch")}
    with torch.no_grad(), dispatch.backend("triton"):
        program = torch.export.export(step, (u,), dynamic_shapes=(batch,))
    assert not any("penstock" in str(node.target) for node in program.graph.nodes)
    many = torch.cat([u, u, u])
    with torch.no_grad():
        for found, expected in zip(program.module()(many), step(many)):
            torch.testing.assert_close(found, expected)


def test_onnx(tmp_path):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    step, u = Step(couple).eval(), given(2, 5, 4, 6, dtype=torch.float32)[0]
    with torch.no_grad():
        torch.onnx.export(step, (u,), str(tmp_path / "step.onnx"), dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(tmp_path / "step.onnx"))
    found = session.run(None, {session.get_inputs()[0].name: u.numpy()})
    with torch.no_grad():
        for x, y in zip(found, step(u)):
            torch.testing.assert_close(torch.from_numpy(x), y, rtol=1e-5, atol=1e-5)


def test_inputs_that_do_not_fit():
    u, a, g, offset, perm = given(2, 5, 3, 4)
    with pytest.raises(ValueError, match=r"a \(2, 4, 4, 3\) for maps \(2, 5, 3, 4\)"):
        couple(u, a.mT, g, offset, perm, 2.0)
    with pytest.raises(ValueError, match=r"\(5,\), \(1, 5\), \(5,\) for 5 channels"):
        decouple(u, a, g, offset[None], perm, 2.0)
    with pytest.raises(ValueError, match="form 'tan', expected one of tanh, tanh_over_clamp"):
        couple(u, a, g, offset, perm, 2.0, "tan")


def test_tiles():
    assert coupling.tile(64, 4096, False) == (1, 1024)
    assert coupling.tile(256, 256, False) == (4, 256)
    assert coupling.tile(3, 2, False) == (4, 2)
    assert coupling.tile(64, 4096, True) == (64, 16)
    assert coupling.tile(768, 576, True) == (1024, 1)
    assert coupling.tile(5, 0, False) == (8, 1)


def kernel_against_reference(device: str) -> None:
    """To the precision of the dtype; several programs and steps, formats, strides, no rows, no places."""
    single, others = (torch.float32, 4e-6), [(torch.float64, 1e-12), (torch.bfloat16, 2**-7)]
    shapes = [(1, 40, 6, 7), (1, 3, 33, 35), (2, 2, 1, 1), (0, 4, 2, 2), (2, 4, 0, 3)]
    for shape, (dtype, tolerance) in [((2, 7, 9, 5), kind) for kind in others] + [(shape, single) for shape in shapes]:
        for format, form in zip(FORMATS, FORMS):
            data = given(*shape, dtype=dtype, device=device, format=format)
            agree(data, form, tolerance)
    u, a, *rest = given(2, 7, 3, 5, dtype=torch.float32, device=device)
    agree((strided(u), strided(a), *rest), "tanh", single[1])
    agree((u, a.contiguous(memory_format=torch.channels_last), *rest), "tanh", single[1])
    u, a, g, offset, perm = given(2, 6, 4, 4, dtype=torch.float32, device=device)
    agree((u, a.bfloat16(), g, offset, perm), "tanh", 2**-7)
    with dispatch.backend("triton"):
        graded = results(decouple, (u, a, g, offset, perm))
    for ours, theirs in zip(graded, results(inverse_reference, (u, a, g, offset, perm))):
        torch.testing.assert_close(ours, theirs)
    far = torch.tensor([1e4, -1e4, 0.0, 1.0], device=device).view(1, 4, 1, 1).expand(2, 4, 4, 4)
    with dispatch.backend("triton"):
        out, logdet = coupling._couple(u[:, :4], far, g[:4], offset[:4], torch.arange(4, device=device), 2.0, "tanh")
    assert out.isfinite().all()
    torch.testing.assert_close(logdet, 16 * g[:4].log().sum().expand(2), rtol=1e-5, atol=1e-4)


def agree(data, form, tolerance):
    """The kernel, its inverse, its gradients and those of one output alone."""
    expected = results(reference, data, form)
    with dispatch.backend("triton"):
        found = results(coupling._couple, data, form)
        inverse = coupling._decouple(expected[0], *data[1:], 1.5, form)
        u = data[0].detach().requires_grad_()
        (alone,) = torch.autograd.grad(coupling._couple(u, *data[1:], 1.5, form)[0].sum(), u)
        assert not torch.autograd.grad(coupling._couple(u, *data[1:], 1.5, form)[1].sum(), u)[0].any()
    first = torch.autograd.grad(reference(u, *data[1:], 1.5, form)[0].sum(), u)
    pairs = [
        *zip(found, expected),
        *zip(inverse, inverse_reference(expected[0], *data[1:], 1.5, form)),
        (alone, *first),
    ]
    for a, b in pairs:
        assert a.dtype == b.dtype
        size = float(b.abs().max()) if b.numel() else 0
        torch.testing.assert_close(a, b, atol=tolerance * (1 + size), rtol=4 * tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernel_on_cuda():
    kernel_against_reference("cuda")
