"""Noise kept as the state of the generator that drew it: the store of 2-rectified flow++ (arXiv 2405.20320).

A sample's noise is 32 bytes instead of 12 kB (CIFAR-10): state and increment of PCG64 *before* the draw, 16 bytes each,
the most significant first. The numbers are NumPy's double-precision normals, rounded to float32.
"""

import numpy as np
import torch
from torch import Tensor

from penstock.lightning_modules.errors import UserError

BYTES = 32


def state_bytes(generator: np.random.Generator) -> bytes:
    """The 32 bytes from which `regenerate` makes what `generator`, on PCG64, draws next.

    Raises:
        ValueError: another bit generator.
    """
    state = generator.bit_generator.state
    if state["bit_generator"] != "PCG64":
        raise ValueError(f"noise store: found {state['bit_generator']}, expected PCG64")
    return b"".join(state["state"][part].to_bytes(BYTES // 2, "big") for part in ("state", "inc"))


def regenerate(stored: bytes, shape: tuple[int, ...]) -> Tensor:
    """The noise of one sample, float32 of `shape`, bit for bit.

    Args:
        stored: state and increment.
        shape: of the sample, (C, H, W).

    Raises:
        UserError: not 32 bytes.
    """
    if len(stored) != BYTES:
        raise UserError(f"noise store: found {len(stored)} bytes, expected {BYTES} (state and increment of PCG64)")
    pcg = np.random.PCG64()
    state, inc = (int.from_bytes(part, "big") for part in (stored[: BYTES // 2], stored[BYTES // 2 :]))
    pcg.state = {"bit_generator": "PCG64", "state": {"state": state, "inc": inc}, "has_uint32": 0, "uinteger": 0}
    return torch.from_numpy(np.random.Generator(pcg).standard_normal(shape).astype(np.float32))
