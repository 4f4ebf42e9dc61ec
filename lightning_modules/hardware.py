"""GPUs as their makers state them, and how long a training step takes on many of them.

What is assumed, since no data sheet says it: `NETWORK_SHARE` of a link's rate is reached, each collective waits
`LATENCY` for every node that its ring passes, nodes have `NODE` GPUs with a network port each, and kernels reach a
share of the peak that the caller states. Communication hides behind computation but for its first and last piece.
"""

from dataclasses import dataclass
from typing import Literal

NODE = 8
NETWORK_SHARE = 0.8
LATENCY = 5e-6  # seconds
BUCKET = 25 * 2**20  # bytes that DDP sends at once, PyTorch's default


@dataclass(frozen=True)
class Gpu:
    """One GPU of a node of eight, dense rates without sparsity.

    Attributes:
        memory: Bytes.
        half: Operations a second of bfloat16 tensor cores.
        single: Of float32 without tensor cores, which PyTorch takes unless TF32 is asked for.
        memory_rate: Bytes a second.
        link: Bytes a second to the GPUs of its node, one way.
        network: Bytes a second to other nodes, one way.
        source: Of these numbers.
    """

    memory: float
    half: float
    single: float
    memory_rate: float
    link: float
    network: float
    source: str


GPUS = {
    "a100": Gpu(
        80e9, 312e12, 19.5e12, 2.039e12, 300e9, 25e9, "NVIDIA A100 data sheet (SXM, 80 GB); DGX A100, 200 Gb/s"
    ),
    "h100": Gpu(80e9, 989.4e12, 66.9e12, 3.35e12, 450e9, 50e9, "NVIDIA H100 data sheet (SXM); DGX H100, 400 Gb/s"),
    "h200": Gpu(141e9, 989.4e12, 66.9e12, 4.8e12, 450e9, 50e9, "NVIDIA H200 data sheet (SXM); DGX H200, 400 Gb/s"),
    "b200": Gpu(180e9, 2250e12, 75e12, 8e12, 900e9, 50e9, "NVIDIA DGX B200 and HGX B200 data sheets; 400 Gb/s"),
}


@dataclass(frozen=True)
class Work:
    """What one rank does in a step.

    Attributes:
        flops: Operations, with those that are computed again.
        model_flops: Without them: what MFU counts.
        half: Whether matrix products are in half precision.
        touched: Bytes that the optimiser reads and writes.
        sent: Bytes that the rank sends, as in a ring.
        collectives: Number of collectives.
        strategy: Who hides communication behind what.
    """

    flops: float
    model_flops: float
    half: bool
    touched: float
    sent: float
    collectives: int
    strategy: Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step: computing, communication as if alone, both together; and the share of the peak, `mfu`."""

    compute: float
    communication: float
    step: float
    mfu: float


def bus_rate(gpu: Gpu, ranks: int) -> float:
    """Bytes a second that each rank of a ring sends: inside a node by its links, else as many rings as ports."""
    return NETWORK_SHARE * (gpu.link if ranks <= NODE else min(gpu.link, NODE * gpu.network))


def step_time(work: Work, gpu: Gpu, ranks: int, efficiency: float) -> StepTime:
    """How long a step takes.

    Sharded, the longer of computing and communication counts, and computing waits for the first gathering and the last
    reduction. DDP reduces while the backward pass runs, two thirds of computing, and its last bucket is waited for.

    Args:
        work: Of a rank.
        gpu: Of every rank.
        ranks: How many.
        efficiency: Share of the peak that kernels reach where they wait for nothing, in (0, 1].
    """
    peak = gpu.half if work.half else gpu.single
    compute, update = work.flops / (peak * efficiency), work.touched / gpu.memory_rate
    if ranks == 1:
        sending = 0.0
    else:
        nodes = -(-ranks // NODE)
        sending = work.sent / bus_rate(gpu, ranks) + work.collectives * nodes * LATENCY
    if work.strategy == "fsdp":
        step = max(compute + 2 * sending / max(work.collectives, 1), sending)
    else:
        step = max(compute + sending / max(work.collectives, 1), compute / 3 + sending)
    step += update
    return StepTime(compute + update, sending, step, work.model_flops / (step * peak))
