"""Kernels compile for an H100 where there is no GPU: Triton's interpreter forgives what its compiler does not."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.kernels import affine, cached_attention, coupling, deformable_attention, jacobi, rotary

SHARED_MEMORY = 101376  # bytes, of the smallest device since Ampere
FULL, HALF, DOUBLE = "*fp32", "*bf16", "*fp64"
TURN = {"cos": FULL, "sin": FULL}


def built(kernel, constants, pointers, stages=3):
    """Bytes of shared memory that a kernel takes; what is neither a constant nor a pointer is a 32-bit integer."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    names = inspect.signature(kernel.fn).parameters
    kinds = {name: "constexpr" if name in constants else pointers.get(name, "i32") for name in names}
    options = {"num_warps": 4, "num_stages": stages}
    source = ASTSource(kernel, kinds, constexprs=constants)
    return compile(source, target=GPUTarget("cuda", 90, 32), options=options).metadata.shared


def light():
    """Kernels that compile in a second or less, with the arguments of several calls."""
    for scale, back, kind in ((0, False, HALF), (0, True, FULL), (1, True, DOUBLE), (2, True, HALF)):
        sizes = {"SCALE": scale, "CLIP": 4.0 * (scale < 2), "AT_ZERO": affine.AT_ZERO, "DOUBLE": kind == DOUBLE}
        pointers = dict.fromkeys(("raw", "u", "in_z", "out_u"), kind) | {"in_logdet": FULL}
        yield (
            affine._kernel(),
            {**sizes, "BACKWARD": back, "SIZE": affine.SIZE},
            pointers | {"out_raw": kind if back else FULL},
        )
    for clamp, kind in ((0.0, HALF), (3.0, DOUBLE)):
        pointers = dict.fromkeys(("u", "mu", "sigma", "z"), kind) | {"sums": DOUBLE if kind == DOUBLE else FULL}
        yield jacobi._kernel(), {"CLAMP": clamp, "DOUBLE": kind == DOUBLE, "SIZE": jacobi.SIZE}, pointers
    for mode, last, kind in ((0, True, HALF), (0, False, FULL), (1, True, FULL), (2, True, HALF), (2, False, DOUBLE)):
        height, width = coupling.tile(64, 1024, last)
        sizes = {"CLAMP": 2.0, "SLOPE": 0.1, "SOFT": 0.1, "MODE": mode, "LAST": last, "DOUBLE": kind == DOUBLE}
        pointers = dict.fromkeys(("x", "a", "grad_out", "y", "grad_a"), kind) | {"index": "*i64"}
        wide = dict.fromkeys(("grad_logdet", "gain", "offset", "sums"), DOUBLE if kind == DOUBLE else FULL)
        yield coupling._kernel(), {**sizes, "HEIGHT": height, "WIDTH": width, "STEPS": 2}, pointers | wide
    head = {"SIZE": 24, "PADDED": 32, "HALVES": True}
    yield rotary._kernel(), {**head, "BACK": True, "ROWS": 8}, {"x": HALF, "out": HALF, **TURN}
    store, _, combine = cached_attention._kernels()
    pointers = {"key": HALF, "value": HALF, "keys": FULL, "values": FULL, **TURN}
    yield store, {**head, "ROTATED": True, "ROWS": 8}, pointers
    yield combine, {"SIZE": 24, "PADDED": 32}, {"found": FULL, "tops": FULL, "sums": FULL, "out": HALF}
    for size, back, kind in ((6, False, FULL), (24, False, HALF), (6, True, FULL), (24, True, HALF)):
        padded = 1 << (size - 1).bit_length()
        sizes = {"SIZE": size, "PADDED": padded, "POINTS": 4, "ROWS": deformable_attention.ELEMENTS // padded}
        pointers = dict.fromkeys(("value", "weights", "out", "grad_weights"), kind)
        wide = dict.fromkeys(("locations", "grad_value", "grad_locations"), FULL)
        yield deformable_attention._kernel(), {**sizes, "ADD": kind == HALF, "BACKWARD": back}, pointers | wide


def heavy():
    """Attention of new tokens: heads of two sizes, caches of two precisions."""
    _, attend, _ = cached_attention._kernels()
    for size, kind, kept in ((64, HALF, HALF), (64, FULL, FULL), (256, HALF, FULL), (256, FULL, FULL)):
        height, width, stages = cached_attention.tiles(256, size, *(4 if x == FULL else 2 for x in (kind, kept)))
        shape = {"SHARE": 2, "HEIGHT": height, "WIDTH": width, "SIZE": size, "PADDED": size}
        options = {"SCALE": 0.1, "SPLIT": kept == FULL, "HEATED": True, "HALVES": False, "ROTATED": True}
        pointers = {"query": kind, "keys": kept, "values": kept, "found": FULL, "tops": FULL, "sums": FULL}
        yield attend, {**shape, **options}, {**pointers, "temperature": FULL, **TURN}, stages


def compiled(which, tmp_path, monkeypatch):
    """Compiles in a process of its own, with an empty cache."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    run = subprocess.run([sys.executable, str(Path(__file__).resolve()), which], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    return [int(word) for word in run.stdout.split()]


@pytest.mark.slow
def test_light_kernels(tmp_path, monkeypatch):
    assert len(compiled("light", tmp_path, monkeypatch)) == 18


@pytest.mark.slow
def test_attention(tmp_path, monkeypatch):
    shared = compiled("heavy", tmp_path, monkeypatch)
    assert len(shared) == 4
    assert max(shared) <= SHARED_MEMORY


if __name__ == "__main__":
    for arguments in {"light": light, "heavy": heavy}[sys.argv[1]]():
        print(built(*arguments))
