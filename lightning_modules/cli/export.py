"""`penstock export ckpt_path=... format=onnx`: a model as one file that needs none of this project."""

import json
import re
from inspect import signature
from pathlib import Path

from penstock.lightning_modules.cli.given import check_keys, split, typed
from penstock.lightning_modules.cli.out import check_no_file, made, together
from penstock.lightning_modules.cli.verbs import run_of_checkpoint
from penstock.lightning_modules.errors import UserError, did_you_mean

OWN = {"ckpt_path": str, "format": str, "out": str, "batch": int, "image_size": str}
FORMATS = {"onnx": "model.onnx", "torch": "model.pt2", "ncnn": "model.ncnn.param"}
LEAST = 32  # pixels of a side
FACTS = {"onnx": "model.json", "torch": "model.json", "ncnn": "model.ncnn.json"}


def run_export(words: list[str]) -> int:
    """Writes the model of a checkpoint, with its averaged weights: ONNX, a program of `torch.export`, or ncnn's files.

    Raises:
        UserError: an unknown word or format, a bad checkpoint, a model that offers nothing to export, a package that is
            absent, a folder that can't be written.
    """
    given = split("export", words, OWN)
    check_keys("export", given, OWN)
    kind = given.get("format", "onnx")
    if kind not in FORMATS:
        raise UserError(f"format={kind}: expected one of {', '.join(FORMATS)}{did_you_mean(kind, FORMATS)}")
    if (batch := typed("batch", given.get("batch", "0"), int)) < 0:
        raise UserError(f"batch={batch}: expected a whole number, or 0 for any number of images")
    if kind == "ncnn" and batch > 1:
        raise UserError(f"batch={batch}: ncnn takes one image at a time, expected 1 or nothing")
    size = {"image_size": _size(given["image_size"])} if "image_size" in given else {}
    path = Path(given["ckpt_path"])
    out = Path(given.get("out") or (run_of_checkpoint(str(path)) or Path(".")) / "export")
    check_no_file("export", out)

    from penstock.lightning_modules.build import model_from_checkpoint
    from penstock.lightning_modules.exporting import exported, needs
    from penstock.lightning_modules.exporting_ncnn import exported_ncnn

    needs(kind)
    model = model_from_checkpoint(path)
    if not hasattr(model, "exportable"):
        raise UserError(f"ckpt_path={path}: {type(model).__name__} can't be exported; expected a model with exportable")
    if size and "image_size" not in signature(model.exportable).parameters:
        raise UserError(f"image_size: {type(model).__name__} has one of its own; expected no such word")
    module, example, outputs, facts = model.exportable(**size)
    example = example if isinstance(example, dict) else {"image": example}
    if kind == "ncnn" and len(example) > 1:
        raise UserError(f"format=ncnn: {type(model).__name__} chooses boxes, which ncnn has no operator for; take onnx")
    batch = batch or int(not getattr(module, "any_batch", True))
    with made("export", out), together("export", out) as folder:
        file = folder / FORMATS[kind]
        if kind == "ncnn":
            batch, outputs = 1, exported_ncnn(module, example["image"], outputs, file.with_suffix(""))
        else:
            exported(module, example, outputs, kind, file, batch)
        inputs = {name: [batch or "batch", *x.shape[1:]] for name, x in example.items()}
        several = {"inputs": inputs} if len(inputs) > 1 else {}
        facts = {"input": inputs["image"], **several, "outputs": outputs, **facts}
        (folder / FACTS[kind]).write_text(json.dumps({**facts, "checkpoint": str(path)}, indent=1) + "\n")
    print(f"written: {out / FORMATS[kind]}")
    return 0


def _size(words: str) -> tuple[int, int]:
    found = re.fullmatch(r"\[?\s*(\d+)\s*,\s*(\d+)\s*\]?", words)
    if not found or min(sides := (int(found[1]), int(found[2]))) < LEAST:
        raise UserError(f"image_size={words}: expected [height,width], each at least {LEAST}")
    return sides
