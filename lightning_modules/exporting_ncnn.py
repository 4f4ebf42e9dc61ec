"""Modules as files of ncnn, a runtime that runs convolutions of 3x3 with fewer multiplications (Winograd's way).

The way is ONNX, then `pnnx`. Operators that ncnn lacks are written as others before, and as pnnx lets some pass that
come out wrong, the files are run and compared with the module before they are kept.
"""

import math
import shutil
import subprocess
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.exporting import exported
from penstock.lightning_modules.ncnn_runtime import outputs_of

if TYPE_CHECKING:
    import onnx

LIMIT = 1e-4  # largest difference of an output


class Maps(nn.Module):
    """Those outputs of a module that are maps `(1, C, H, W)`."""

    def __init__(self, module: nn.Module, kept: list[int]):
        super().__init__()
        self.module, self.kept = module, kept

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        found = self.module(image)
        return tuple(found[k] for k in self.kept)


@torch.no_grad()
def exported_ncnn(module: nn.Module, example: Tensor, outputs: list[str], file: Path) -> list[str]:
    """Writes `<file>.param` and `<file>.bin` of those outputs that are maps, for one image at a time.

    Args:
        module: In evaluation mode, of one tensor to several.
        example: What it takes, `(1, ...)`. A module whose outputs on it may be all alike offers `probe(example)`, a
            copy of the same operators whose outputs tell more; both are compared.
        outputs: Names of what it gives.
        file: Where to, without the ending. The blobs are `in0`, and `out0`, `out1`, ... in the order returned.

    Returns:
        Names of the outputs written.

    Raises:
        UserError: none of the outputs is a map, the module holds an operator that can't be written, or the files give
            something else than it does.
    """
    given = module(example)
    kept = [k for k, found in enumerate(given if isinstance(given, tuple) else (given,)) if found.ndim == 4]
    if not kept:
        raise UserError(f"format=ncnn: found {', '.join(outputs)}, expected maps among them; take format=onnx or torch")
    both = [Maps(module, kept), Maps(getattr(module, "probe", lambda _: module)(example), kept)]
    with TemporaryDirectory() as folder:
        files = [_converted(maps, example, Path(folder) / str(k)) for k, maps in enumerate(both)]
        _compare(files, example, [maps(example) for maps in both])
        for own in files[0]:
            shutil.copyfile(own, file.with_name(file.name + own.suffix))
    return [outputs[k] for k in kept]


def _converted(maps: Maps, example: Tensor, folder: Path) -> tuple[Path, Path]:
    import onnx
    import pnnx

    folder.mkdir()
    source = folder / "model.onnx"
    exported(maps, example, [f"out{k}" for k in range(len(maps.kept))], "onnx", source, batch=1)
    onnx.save(rewritten(onnx.load(source)), source)
    shape = ",".join(str(n) for n in example.shape)
    command = [pnnx.EXEC_PATH, source.name, f"inputshape=[{shape}]", "fp16=0"]
    told = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    param, weights = source.with_suffix(".ncnn.param"), source.with_suffix(".ncnn.bin")
    if told.returncode or not param.exists():
        raise UserError(f"format=ncnn: pnnx failed: {' '.join((told.stderr or told.stdout).split()[-20:])}")
    return param, weights


def rewritten(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """The same graph without picks of channels, which become 1x1 convolutions, and layer norms over several axes."""
    import onnx

    graph = model.graph
    inferred = onnx.shape_inference.infer_shapes(model).graph
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*inferred.value_info, *graph.input)}
    constants = {t.name: t for t in graph.initializer}
    nodes = []

    def constant(name: str, value: np.ndarray) -> str:
        graph.initializer.append(onnx.numpy_helper.from_array(value, name))
        return name

    for node in graph.node:
        given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        shape, (out, *_) = shapes.get(node.input[0] if node.input else "", []), node.output
        if node.op_type == "Gather" and len(shape) == 4 and given.get("axis") == 1 and node.input[1] in constants:
            index = onnx.numpy_helper.to_array(constants[node.input[1]])
            pick = np.eye(shape[1], dtype=np.float32)[index][..., None, None]
            nodes.append(onnx.helper.make_node("Conv", [node.input[0], constant(f"{out}_pick", pick)], [out]))
        elif node.op_type == "LayerNormalization" and given["axis"] % len(shape) < len(shape) - 1:
            if given["axis"] % len(shape) != 1:
                raise UserError(f"format=ncnn: a layer norm from axis {given['axis']}, expected of whole samples")
            rows = constant(f"{out}_rows", np.array([shape[0], np.prod(shape[1:])]))
            affine = [
                constant(f"{out}_{name}", onnx.numpy_helper.to_array(constants[name]).reshape(-1))
                for name in node.input[1:]
            ]
            nodes += [
                onnx.helper.make_node("Reshape", [node.input[0], rows], [f"{out}_flat"]),
                onnx.helper.make_node(
                    "LayerNormalization", [f"{out}_flat", *affine], [f"{out}_normed"], axis=1, epsilon=given["epsilon"]
                ),
                onnx.helper.make_node("Reshape", [f"{out}_normed", constant(f"{out}_shape", np.array(shape))], [out]),
            ]
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def _compare(files: list[tuple[Path, Path]], example: Tensor, expected: list[tuple[Tensor, ...]]) -> None:
    """In a process of its own, for a graph that ncnn does not understand can end it."""
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            found = pool.submit(outputs_of, files, example[0].numpy(), len(expected[0])).result()
        pairs = [(x[0], torch.from_numpy(y)) for xs, ys in zip(expected, found) for x, y in zip(xs, ys)]
        worst = max((x - y).abs().max().item() if x.shape == y.shape else math.inf for x, y in pairs)
    except (BrokenProcessPool, ValueError) as error:
        raise UserError("format=ncnn: an operator of the model is none of ncnn's; take format=onnx or torch") from error
    if not worst <= LIMIT:
        by = "shape" if math.isinf(worst) else f"value by {worst:.2g}, expected at most {LIMIT:g}"
        raise UserError(
            f"format=ncnn: outputs differ from the model's in {by}; an operator has no equal in ncnn, "
            "take format=onnx or torch"
        )
