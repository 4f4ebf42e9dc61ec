"""Attention against a cache: a softmax by hand, what is written where, the Triton kernel in the interpreter."""

from unittest.mock import patch

import pytest
import torch

from penstock.kernels import cached_attention as kernel
from penstock.kernels import dispatch
from penstock.kernels.cached_attention import cached_attention

PLACES, SIZE = 23, 8


def normal(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(**options)


def table(places, size, **options):
    angles = 3 * normal(places, size // 2, seed=9)
    return angles.cos().to(**options), angles.sin().to(**options)


def given(n, heads=2, groups=2, size=SIZE, batch=2, dtype=torch.float64, kept=None, device="cpu", places=PLACES):
    """Queries, keys and values as a fused projection gives them, and a cache that is a layer of several."""
    new = normal(batch, n, (heads + 2 * groups) * size, device=device, dtype=dtype)
    parts = new.split([heads * size, groups * size, groups * size], -1)
    query, key, value = (part.unflatten(-1, (-1, size)).transpose(1, 2) for part in parts)
    stores = normal(2, 3, batch, groups, places, size, seed=1, device=device, dtype=kept or dtype)
    return query, key, value, stores[0, 1], stores[1, 1]


def complex_turn(x, cos, sin):
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(cos, sin)
    return torch.view_as_real(pairs).flatten(-2)


@pytest.mark.parametrize(("start", "n"), [(0, 5), (6, 4), (6, 1), (19, 4)])
def test_softmax_by_hand_and_what_is_written(start, n):
    query, key, value, keys, values = given(n, heads=4)
    (cos, sin), heat, before = table(PLACES, SIZE), torch.tensor([1.0, 1.7])[:, None, None, None], keys.clone()
    end = start + n
    q, k = (complex_turn(x, cos[start:end], sin[start:end]) for x in (query, key))
    all_keys, all_values = (torch.cat([a[:, :, :start], b], 2) for a, b in ((keys, k), (values, value)))
    logits = q @ all_keys.repeat_interleave(2, 1).mT / SIZE**0.5 / heat
    place = torch.arange(start, end)[:, None]
    logits = logits.masked_fill(torch.arange(end) > place, -torch.inf)
    expected = logits.softmax(-1) @ all_values.repeat_interleave(2, 1)
    found = cached_attention(query, key, value, keys, values, start, cos, sin, temperature=heat)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(keys[:, :, :end], all_keys)
    torch.testing.assert_close(values[:, :, :end], all_values)
    assert torch.equal(keys[:, :, end:], before[:, :, end:])


def test_operator_is_registered():
    arguments = (*given(4, dtype=torch.float32), 6, *table(PLACES, SIZE, dtype=torch.float32), False, None)
    torch.library.opcheck(kernel._cached_attention, arguments, test_utils=("test_schema", "test_faketensor"))


def test_gradients_are_for_the_reference():
    query, key, value, keys, values = given(4, dtype=torch.float32)
    query = query.detach().requires_grad_()
    with dispatch.backend("triton"), pytest.raises(RuntimeError, match=r"no gradient: decode under torch.no_grad\(\)"):
        cached_attention(query, key, value, keys, values, 6)
    cached_attention(query, key, value, keys, values, 6).sum().backward()
    assert query.grad.abs().sum() > 0


def test_double_precision_and_wide_heads_are_for_the_reference(monkeypatch):
    monkeypatch.setattr(kernel, "_cached_attention", None)
    with dispatch.backend("triton"):
        cached_attention(*given(4), 6)
        cached_attention(*given(4, size=258, dtype=torch.float32), 6)


CASES = {
    "first tokens": {"start": 0, "n": 5},
    "chunk": {"start": 6, "n": 5},
    "one token": {"start": 22, "n": 1},
    "grouped": {"start": 6, "n": 5, "heads": 6},
    "one group": {"start": 6, "n": 7, "heads": 4, "groups": 1},
    "several blocks of rows": {"start": 4, "n": 66, "places": 80, "batch": 1},
    "several blocks of keys": {"start": 133, "n": 3, "places": 140, "batch": 1},
    "odd heads": {"start": 6, "n": 5, "size": 20},
    "no samples": {"start": 6, "n": 5, "batch": 0},
}


def kernel_against_reference(device: str) -> None:
    """Results and caches, with and without parts, rotation of either kind, temperature, half precision.

    The interpreter multiplies the bits of bfloat16 matrices, so that there products are in float16.
    """
    full, half = torch.float32, torch.bfloat16 if device == "cuda" else torch.float16
    settings = [(name, (full, full), 1, "pairs", True) for name in CASES]
    settings += [(name, (full, full), 3, "pairs", True) for name in ("one token", "several blocks of keys")]
    kinds = [(full, torch.bfloat16), (half, full), (half, half), (half, torch.bfloat16)]
    settings += [("grouped", kind, 1, "pairs", True) for kind in kinds]
    settings += [("grouped", (full, full), 1, turn, heated) for turn, heated in (("none", False), ("halves", True))]
    for name, (dtype, kept), parts, turn, heated in settings:
        case = dict(CASES[name])
        start = case.pop("start")
        batch, places, size = case.get("batch", 2), case.get("places", PLACES), case.get("size", SIZE)
        heat = torch.linspace(1, 2, batch, device=device)[:, None, None, None] if heated else None
        angles = (None, None) if turn == "none" else table(places, size, device=device, dtype=torch.float32)
        found = []
        for backend in ("triton", "reference"):
            query, key, value, *cache = given(dtype=dtype, kept=kept, device=device, **case)
            with dispatch.backend(backend), patch.object(kernel, "_parts", lambda *_, parts=parts: parts):
                own = cached_attention(query, key, value, *cache, start, *angles, turn == "halves", heat)
            found.append((own, *cache))
        for ours, theirs in zip(*found):
            assert ours.dtype == theirs.dtype
            exact = dtype == kept == full
            torch.testing.assert_close(ours, theirs, atol=2e-6 if exact else 2e-2, rtol=1e-5 if exact else 1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernel_on_cuda():
    kernel_against_reference("cuda")
