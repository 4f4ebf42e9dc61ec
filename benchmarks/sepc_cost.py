"""What pyramid convolutions cost: RetinaNet with five necks, and torchvision's RetinaNet, side by side.

`python -m penstock.benchmarks.sepc_cost --threads 1`, or `... --device cuda`. All take turns in one process, with
random weights: predictions (boxes and their selection) of one image, and steps of training (losses, gradients, SGD). By
default ResNet-50 with 256 channels and 80 classes at 800x1344, as the paper measures, and a step of training as
`experiment=sepc_bccd` has it. Operations count a multiplication and an addition as two; a unit of the necks is a 3x3
convolution of all levels. `--forms` compares forms of SEPC-lite instead: as it is, with norms folded into convolutions,
in memory order NHWC, and compiled.
"""

import copy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from penstock.benchmarks.report import parser, write
from penstock.benchmarks.timing import alternate, ratio
from penstock.lightning_modules.callbacks.inference_cost import operations, peak_bytes
from penstock.lightning_modules.detection.anchors import Anchors
from penstock.lightning_modules.detection.coding import Deltas
from penstock.lightning_modules.detection.host import Objects
from penstock.lightning_modules.detection.retina import Retina
from penstock.lightning_modules.nets.detector import BoxNetwork, Detector, Towers
from penstock.lightning_modules.nets.pyramid_conv import PyramidConvNeck
from penstock.lightning_modules.nets.torchvision_retinanet import TorchvisionRetinaNet
from penstock.lightning_modules.nets.trained_backbone import TrainedBackbone

NECKS: dict[str, Callable[[int], nn.Module]] = {
    "baseline": Towers,
    "Pconv": PyramidConvNeck,
    "Pconv+iBN": partial(PyramidConvNeck, ibn=True),
    "SEPC-lite": partial(PyramidConvNeck, ibn=True, lcconv_deform=True),
    "SEPC": partial(PyramidConvNeck, ibn=True, lcconv_deform=True, pconv_deform=True),
}
PEER = "torchvision"


def detectors(backbone: str, channels: int, num_classes: int) -> dict[str, BoxNetwork]:
    """The rivals by name; offsets are not zero, as they are not after training."""
    make = partial(TrainedBackbone, backbone, weights="random")
    found: dict[str, BoxNetwork] = {}
    for name, neck in NECKS.items():
        found[name] = Detector(make(), neck, Retina(num_classes, Anchors(), Deltas()), channels)
        for module in found[name].modules():
            if (offset := getattr(module, "conv_offset", None)) is not None:
                nn.init.uniform_(offset.bias, -1, 1)
    found[PEER] = TorchvisionRetinaNet(make(), num_classes, Anchors(), channels)
    return found


def predictions(size: tuple[int, int], device: torch.device, rounds: int, backbone: str, channels: int, classes: int):
    """A line for each detector: what a prediction of an image takes."""
    image, scale = torch.rand(1, 3, *size, device=device) * 2 - 1, torch.ones(1, 4, device=device)
    nets = {name: net.to(device).eval() for name, net in detectors(backbone, channels, classes).items()}

    def predict(net: BoxNetwork) -> object:
        with torch.inference_mode():
            return net.detections(image, [size], scale)

    works = {name: partial(predict, net) for name, net in nets.items()}
    taken = alternate(works, rounds, device)
    unit = 2 * 9 * channels**2 * sum(h * w for h, w in sizes_of(size))
    plain = operations(works["baseline"]) - 8 * unit
    return [
        {
            "detector": name,
            "ms": 1e3 * median(taken[name]),
            "over the baseline, %": 100 * (ratio(taken[name], taken["baseline"]) - 1),
            "GFLOP": operations(works[name]) / 1e9,
            "neck, units": (operations(works[name]) - plain) / unit if name != PEER else None,
            "parameters, M": sum(p.numel() for p in net.parameters()) / 1e6,
            "activations, MiB": peak_bytes(works[name], device) / 2**20,
        }
        for name, net in nets.items()
    ]


def forms(size: tuple[int, int], device: torch.device, rounds: int, backbone: str, channels: int, classes: int):
    """A line for each way to run SEPC-lite, with the largest difference of its maps to those of the first."""
    plain = detectors(backbone, channels, classes)["SEPC-lite"].to(device).eval()
    image = torch.rand(1, 3, *size, device=device) * 2 - 1
    with torch.no_grad():
        pyramid = plain.pyramid(plain.backbone(image))
        plain.neck.train()(pyramid)  # norms see what they are given, or they would be the identity
        plain.eval()
    folded = copy.deepcopy(plain)
    folded.neck = folded.neck.folded()
    last = copy.deepcopy(folded).to(memory_format=torch.channels_last)
    compiled = copy.deepcopy(folded)
    compiled.compile(dynamic=False)
    nets = {"as it is": plain, "folded": folded, "folded, channels_last": last, "folded, compiled": compiled}

    def run(net: Detector) -> list[Tensor]:
        with torch.inference_mode():
            return [*(found := net(image)).logits, *found.codes]

    works = {name: partial(run, net) for name, net in nets.items()}
    taken = alternate(works, rounds, device)
    expected = run(plain)
    return [
        {
            "form": name,
            "ms": 1e3 * median(taken[name]),
            "of the first": ratio(taken[name], taken["as it is"]),
            "largest difference": max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(work(), expected)),
        }
        for name, work in works.items()
    ]


def sizes_of(size: tuple[int, int]) -> list[tuple[int, int]]:
    """(H_l, W_l) of the five levels of an image."""
    return [tuple(-(-side // stride) for side in size) for stride in (8, 16, 32, 64, 128)]


def steps(size: tuple[int, int], batch: int, device: torch.device, rounds: int, backbone: str, channels: int):
    """A line for each detector: what a step of training takes."""
    generator = torch.Generator().manual_seed(0)
    image = (torch.rand(batch, 3, *size, generator=generator) * 2 - 1).to(device)
    corners = torch.rand(batch, 12, 2, generator=generator) * torch.tensor([size[1] - 80.0, size[0] - 80.0])
    boxes = torch.cat([corners, corners + 16 + 64 * torch.rand(batch, 12, 2, generator=generator)], 2).to(device)
    labels = torch.randint(3, (batch, 12), generator=generator).to(device)
    objects = [Objects(*pair) for pair in zip(boxes, labels)]
    nets = {name: net.to(device).train() for name, net in detectors(backbone, channels, 3).items()}

    def step(net: BoxNetwork, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad()
        loss = sum(net.losses(image, objects, [size] * batch).values())
        loss.backward()
        optimizer.step()
        return loss.detach()

    works = {}
    for name, net in nets.items():
        trained = [p for p in net.parameters() if p.requires_grad]
        works[name] = partial(step, net, torch.optim.SGD(trained, lr=1e-3, momentum=0.9))
    taken = alternate(works, rounds, device)
    return [
        {
            "detector": name,
            "ms": 1e3 * median(taken[name]),
            "images/s": batch / median(taken[name]),
            "over the baseline, %": 100 * (ratio(taken[name], taken["baseline"]) - 1),
            "faster than torchvision's": ratio(taken[PEER], taken[name]),
        }
        for name in nets
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Writes `sepc_cost_<device>` and `sepc_steps_<device>`, or `sepc_forms_<device>`, in the results folder."""
    options = parser(__doc__)
    options.add_argument("--device", default="cpu", type=torch.device)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--size", type=int, nargs=2, default=(800, 1344), help="height and width of predictions")
    options.add_argument("--train-size", type=int, nargs=2, default=(240, 320), help="height and width of training")
    options.add_argument("--forms", action="store_true", help="forms of SEPC-lite in place of detectors")
    options.add_argument("--batch", type=int, default=4, help="images of a step of training")
    given = options.parse_args(argv)
    if given.threads:
        torch.set_num_threads(given.threads)
    torch.manual_seed(given.seed)
    device, (height, width) = given.device, given.size
    common: dict[str, Any] = {"seed": given.seed, "out": given.out}
    if given.forms:
        rows = forms((height, width), device, given.rounds, "resnet50", 256, 80)
        title = f"Forms of SEPC-lite, maps of an image at {height}x{width}, ResNet-50, 256 channels, 80 classes"
        write(f"sepc_forms_{device.type}", {"rounds": given.rounds}, rows, title=title, **common)
        return 0
    rows = predictions((height, width), device, given.rounds, "resnet50", 256, 80)
    title = f"Predictions of an image at {height}x{width}, ResNet-50, 256 channels, 80 classes"
    write(f"sepc_cost_{device.type}", {"rounds": given.rounds}, rows, title=title, **common)
    height, width = given.train_size
    rows = steps((height, width), given.batch, device, given.rounds, "mobilenetv2_100", 128)
    title = f"Training at {height}x{width}, {given.batch} images a step, MobileNetV2, 128 channels"
    write(f"sepc_steps_{device.type}", {"rounds": given.rounds}, rows, title=title, **common)
    return 0


if __name__ == "__main__":
    sys.exit(main())
