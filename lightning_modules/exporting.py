"""Modules as files of ONNX or of `torch.export`, and what every format needs."""

import importlib.util
import logging
import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from penstock.lightning_modules.errors import UserError

Kind = Literal["onnx", "torch", "ncnn"]
EXTRAS = {"onnx": "export", "ncnn": "ncnn"}
ONNX_LIMIT = 2**31  # bytes of a file
PACKAGES = {"onnx": ("onnx", "onnxscript"), "torch": (), "ncnn": ("onnx", "onnxscript", "pnnx", "ncnn")}


def needs(kind: Kind) -> None:
    """Looks for the packages that a format needs.

    Raises:
        UserError: one is absent.
    """
    for package in PACKAGES[kind]:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"format={kind}: {package} is missing; install it: pip install 'penstock[{EXTRAS[kind]}]'")


def exported(
    module: nn.Module,
    example: Tensor | dict[str, Tensor],
    outputs: list[str],
    kind: Literal["onnx", "torch"],
    file: Path,
    batch: int = 0,
) -> None:
    """Writes a module.

    Args:
        module: In evaluation mode.
        example: The image that it takes, `(b, ...)`, or several inputs by name, in its order.
        outputs: Names of what it gives.
        kind: `onnx`, or `torch`, which `torch.export.load(file).module()` reads.
        file: Where to.
        batch: Number of samples that the file is for; 0 is any.

    Raises:
        UserError: more weights than a file of ONNX can hold.
    """
    size = sum(x.numel() * x.element_size() for x in module.state_dict().values())
    if kind == "onnx" and size >= ONNX_LIMIT:
        raise UserError(f"format=onnx: found {size / 1e9:.1f} GB of weights, expected less than 2; take format=torch")
    example = example if isinstance(example, dict) else {"image": example}
    inputs = tuple(x[:1].repeat(batch or 2, *[1] * (x.ndim - 1)) for x in example.values())
    dynamic = None if batch else ({0: torch.export.Dim("batch")},) * len(inputs)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(module, inputs, dynamic_shapes=dynamic)
        if kind == "torch":
            torch.export.save(program, str(file))
            return
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            program, (), str(file), input_names=list(example), output_names=outputs, external_data=False, verbose=False
        )
