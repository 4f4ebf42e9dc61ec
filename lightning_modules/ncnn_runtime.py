"""ncnn's files run; apart from all that takes long to import."""

from collections.abc import Callable
from pathlib import Path

import numpy as np


def loaded(param: Path, weights: Path, outputs: int, threads: int = 1) -> Callable[[np.ndarray], list[np.ndarray]]:
    """What makes the outputs `(C, H, W)` of an image `(3, H, W)`, in float32 throughout.

    Args:
        param: The graph, with the blobs `in0` and `out0`, `out1`, ...
        weights: Of it.
        outputs: How many blobs are read.
        threads: Of the processor.

    Raises:
        ValueError: an operator that ncnn does not offer.
    """
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = threads
    for option in ("packed", "storage", "arithmetic"):
        setattr(net.opt, f"use_fp16_{option}", False)
    if net.load_param(str(param)) or net.load_model(str(weights)):
        raise ValueError(f"{param}: an operator that ncnn does not offer")

    def call(image: np.ndarray) -> list[np.ndarray]:
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(image))
        return [np.array(extractor.extract(f"out{k}")[1]) for k in range(outputs)]

    return call


def outputs_of(files: list[tuple[Path, Path]], image: np.ndarray, outputs: int) -> list[list[np.ndarray]]:
    """Outputs of several graphs, each `(param, weights)`, for one image."""
    return [loaded(param, weights, outputs)(image) for param, weights in files]
