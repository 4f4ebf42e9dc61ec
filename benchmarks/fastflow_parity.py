"""FastFlow with the settings of public code against anomalib 2.7.0's own blocks and loss, trained on the same features.

`pip install anomalib==2.7.0` first, in an environment of its own with this project; then
`python -m penstock.benchmarks.fastflow_parity --data D --weights W --threads 1` on magnetic tiles: MobileNetV2's maps
of strides 4, 8 and 16 (computed once), batches of 32, Adam, 20 epochs, the last one. Each seed draws weights,
permutations and the order of batches; both sides see the same order, and draw their own weights.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import Any

import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn

from penstock.benchmarks.fastflow_ablation import measured
from penstock.benchmarks.report import parser, write
from penstock.datamodules.anomaly import Anomaly
from penstock.lightning_modules.flow.anomaly_map import anomaly_map
from penstock.lightning_modules.nets.backbone import Backbone
from penstock.lightning_modules.nets.fastflow import FastFlowNet, negative_log_likelihood

SIDE, BATCH = 256, 32
PEER = "anomalib 2.7.0"
Encode = Callable[[list[Tensor]], list[tuple[Tensor, Tensor]]]


def backbone_of(weights: str) -> Backbone:
    """MobileNetV2 as TensorFlow's weights need it."""
    half = [0.5, 0.5, 0.5]
    net = Backbone("mobilenetv2_100", layers=[1, 2, 3], pad_type="same", mean=half, std=half, weights=weights)
    net.load()
    return net.eval()


def ours(weights: str) -> tuple[nn.Module, Encode, Callable[..., Tensor]]:
    """Trained module, maps to `(z, logdet)`, and the loss of these."""
    net = FastFlowNet(backbone_of(weights), SIDE)
    return net, net.encode, lambda coded: negative_log_likelihood(coded).mean()


def theirs(weights: str) -> tuple[nn.Module, Encode, Callable[..., Tensor]]:
    """The same of anomalib."""
    from anomalib.models.image.fastflow.loss import FastflowLoss
    from anomalib.models.image.fastflow.torch_model import create_fast_flow_block

    maps = backbone_of(weights)(torch.zeros(1, 3, SIDE, SIDE))
    net = nn.ModuleDict(
        {
            "norms": nn.ModuleList(nn.LayerNorm(y.shape[1:]) for y in maps),
            "flows": nn.ModuleList(
                create_fast_flow_block(list(y.shape[1:]), conv3x3_only=False, hidden_ratio=1.0, flow_steps=8)
                for y in maps
            ),
        }
    )

    def encode(maps: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        return [flow(norm(y)) for flow, norm, y in zip(net["flows"], net["norms"], maps)]

    return net, encode, lambda coded: FastflowLoss()([z for z, _ in coded], [logdet for _, logdet in coded])


@torch.no_grad()
def features(data: Anomaly, split: str, weights: str) -> tuple[list[Tensor], Tensor, Tensor]:
    """Maps of all images of a split, labels and masks."""
    net, columns = backbone_of(weights), []
    for batch in data.reference_dataloader(split):
        columns.append((*net(batch["image"]), batch["label"], batch["mask"]))
    *maps, labels, masks = (torch.cat(column) for column in zip(*columns))
    return maps, labels, masks


def trained(make: Callable, seed: int, weights: str, train: list[Tensor], test: tuple, epochs: int) -> dict[str, float]:
    """Metrics of the last epoch."""
    seed_everything(seed, verbose=False)
    net, encode, loss_of = make(weights)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-3, weight_decay=1e-5)
    order = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        shuffled = torch.randperm(len(train[0]), generator=order)
        for rows in shuffled[: len(shuffled) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            loss_of(encode([y[rows] for y in train])).backward()
            optimizer.step()
    maps, labels, masks = test
    with torch.no_grad():
        parts = zip(*(y.split(BATCH) for y in maps))
        found = torch.cat([anomaly_map([z for z, _ in encode(list(part))], (SIDE, SIDE)) for part in parts])
    return measured(found, labels, masks, top=0)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes `fastflow_parity` in the results folder."""
    options = parser(__doc__)
    options.add_argument("--data", required=True, help="folder magnetic_tile, which holds the category tile")
    options.add_argument("--weights", required=True, help="MobileNetV2's weights, converted from TensorFlow")
    options.add_argument("--epochs", type=int, default=20)
    options.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = options.parse_args(argv)
    if importlib.util.find_spec("anomalib") is None:
        print(
            "anomalib is missing; install it in an environment of its own: pip install anomalib==2.7.0", file=sys.stderr
        )
        return 2
    if given.threads:
        torch.set_num_threads(given.threads)
    data = Anomaly("magnetic_tile", given.data, "tile", SIDE, seed=0)
    data.setup()
    train, _, _ = features(data, "train", given.weights)
    test = features(data, "test", given.weights)
    rows: list[dict[str, Any]] = []
    for seed in given.seeds:
        for side, make in (("penstock", ours), (PEER, theirs)):
            found = trained(make, seed, given.weights, train, test, given.epochs)
            rows.append({"side": side, "seed": seed, **found})
            print(rows[-1], file=sys.stderr, flush=True)
    for side in ("penstock", PEER):
        own = [row for row in rows if row["side"] == side]
        line: dict[str, Any] = {"side": side, "seed": "mean +- deviation"}
        for name in ("image_auroc", "pixel_auroc"):
            values = [row[name] for row in own]
            line[name] = f"{mean(values):.3f} +- {stdev(values) if len(values) > 1 else 0:.3f}"
        rows.append(line)
    title = f"FastFlow with public settings on magnetic tiles, {given.epochs} epochs, the same features"
    write("fastflow_parity", {"epochs": given.epochs}, rows, title=title, seed=given.seed, out=given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
