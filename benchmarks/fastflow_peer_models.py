"""anomalib's FastFlow and ours with the same weights; their files in the runtimes that these are for."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from penstock.lightning_modules.exporting import exported
from penstock.lightning_modules.exporting_ncnn import exported_ncnn
from penstock.lightning_modules.fastflow import FastFlow
from penstock.lightning_modules.ncnn_runtime import loaded
from penstock.lightning_modules.nets.backbone import Backbone
from penstock.lightning_modules.nets.fastflow import FastFlowNet
from penstock.lightning_modules.weights.fastflow import converted

if TYPE_CHECKING:
    from anomalib.models.image.fastflow.torch_model import FastflowModel

PEER = "anomalib 2.7.0"


class Pair(NamedTuple):
    """Both models, in evaluation mode on one device."""

    name: str
    ours: FastFlow
    theirs: "FastflowModel"
    size: tuple[int, int]


def missing() -> str | None:
    """One line if a package of the benchmark is absent."""
    runtimes = "onnxruntime onnx onnxscript openvino ncnn pnnx"
    for package, words in (("anomalib", "anomalib==2.7.0"), *((name, runtimes) for name in runtimes.split())):
        if importlib.util.find_spec(package) is None:
            return f"{package} is missing; install it in an environment of its own: pip install {words}"
    return None


def pair(backbone: str, side: int, device: torch.device, seed: int, weights: str | None = None) -> Pair:
    """Models of images of `side` pixels; random weights, but norms and flows that do something.

    Args:
        backbone: timm's model.
        side: Of the images.
        device: Of both.
        seed: Of the weights.
        weights: File of the backbone's.
    """
    from anomalib.models.image.fastflow import torch_model

    torch.manual_seed(seed)
    size, create = (side, side), torch_model.timm.create_model
    with mock.patch.object(torch_model.timm, "create_model", lambda name, **given: create(backbone, **given)):
        theirs = torch_model.FastflowModel(size, "resnet18", pre_trained=False)
    for module in theirs.feature_extractor.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    net = FastFlowNet(Backbone(backbone, weights=weights or "random"), side)
    own = net.state_dict()
    net.load_state_dict({key: value for key, value in converted(theirs.state_dict()).items() if key in own})
    if weights:
        net.backbone.load()
        theirs.feature_extractor.load_state_dict(net.backbone.net.state_dict(), strict=False)
    ours = FastFlow(net, torch.optim.Adam)
    return Pair(backbone, ours.to(device).eval(), theirs.to(device).eval(), size)


def onnx(module: nn.Module, x: Tensor, file: Path, ours: bool) -> Path:
    """A file of a model for any number of images."""
    if not file.exists():
        if ours:
            exported(module, x, ["score", "map"], "onnx", file)
        else:
            _theirs(module, x, file)
    return file


def onnxruntime(file: Path, shape: torch.Size, threads: int) -> Callable[[Tensor], Tensor]:
    """Maps by an ONNX file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    (given,), found = session.get_inputs(), session.get_outputs()[-1].name
    return lambda x: torch.from_numpy(session.run([found], {given.name: x.numpy()})[0])


def openvino(file: Path, shape: torch.Size, threads: int, precision: str = "f32") -> Callable[[Tensor], Tensor]:
    """Maps by an ONNX file of images of one shape; without a word OpenVINO takes bf16 where the processor has it."""
    import openvino

    core = openvino.Core()
    model = core.read_model(str(file))
    model.reshape(list(shape))
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": precision}
    compiled = core.compile_model(model, "CPU", options)
    return lambda x: torch.from_numpy(compiled(x.numpy())[compiled.outputs[-1]].copy())


def ncnn(module: nn.Module, x: Tensor, file: Path, threads: int) -> Callable[[Tensor], Tensor]:
    """Maps of our model by files of ncnn, an image at a time."""
    param = file.with_name(f"{file.name}.param")
    if not param.exists():
        exported_ncnn(module, x[:1], ["score", "map"], file)
    run = loaded(param, file.with_name(f"{file.name}.bin"), 1, threads)
    return lambda x: torch.stack([torch.from_numpy(run(image)[0]) for image in x.numpy()])


def _theirs(module: nn.Module, x: Tensor, file: Path) -> None:
    with torch.no_grad():
        torch.onnx.export(
            module,
            (x[:1].repeat(2, 1, 1, 1),),
            str(file),
            opset_version=14,
            input_names=["input"],
            output_names=["pred_score", "anomaly_map"],
            dynamic_shapes=({0: torch.export.Dim("batch_size")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
