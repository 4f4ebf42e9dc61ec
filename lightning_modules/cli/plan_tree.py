"""From a composed run to what planning needs: the model on the meta device, batches for it, strategy and precision."""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from penstock.lightning_modules.build import build
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.hardware import Gpu, StepTime, Work, step_time
from penstock.lightning_modules.planning import (
    HALF,
    SINGLE,
    Footprint,
    Resident,
    Strategy,
    Traffic,
    footprint,
    resident,
    states_of,
    traffic,
)
from penstock.lightning_modules.step_costs import alone

ANY_TEXT = "penstock.lightning_modules.planning.AnyText"
ANY_LENGTH = 128  # tokens of a prompt, where the encoder's configuration does not say


@dataclass(frozen=True)
class Row:
    """A number of GPUs: samples of a step and of the rank with most, its bytes, what it sends, the time of a step."""

    gpus: int
    batch: int
    own: int
    resident: Resident
    activations: float
    traffic: Traffic
    time: StepTime

    @property
    def memory(self) -> float:
        """Bytes of the rank that has most."""
        return self.resident.all + self.activations


class PlannedRun:
    """What `penstock fit` would train, without data, weights or a GPU.

    Frozen encoders of text and pictures are left out: features and latents are taken as made before.

    Args:
        tree: Of the run.
        checkpointing: Instead of what the run says.

    Raises:
        UserError: a model that can't be built or whose step can't be run so, or checkpointing without blocks.
    """

    def __init__(self, tree: dict[str, Any], checkpointing: bool | None = None):
        self.tree, trainer = _without_encoders(tree), tree["trainer"]
        strategy = trainer.get("strategy")
        sharding = (strategy.get("init_args") or {}) if isinstance(strategy, dict) else {}
        path = strategy["class_path"] if isinstance(strategy, dict) else str(strategy)
        self.strategy: Strategy = "fsdp" if path.endswith("FullyShard") or path.startswith("fsdp") else "ddp"
        self.free = sharding.get("free_after_forward", True)
        self.half = str(trainer.get("precision", "32-true")).startswith(("bf16", "16"))
        self.gather = HALF if sharding.get("gather") == "bfloat16" else SINGLE
        callbacks = trainer.get("callbacks") or []
        self.ema = any(one["class_path"].endswith(".EMA") for one in callbacks)
        asked = any((one.get("init_args") or {}).get("activation_checkpointing") for one in callbacks)
        self.checkpointing = asked if checkpointing is None else checkpointing
        if self.checkpointing and self.cost.checkpointed is None:
            raise UserError(f"checkpointing: {type(self.module).__name__}'s network names no checkpoint_blocks")

    def make(self) -> LightningModule:
        """The model on the meta device."""
        with torch.device("meta"):
            (module,) = build(self.tree, "model")
        alone(module)
        return module.to("meta").train()

    @cached_property
    def module(self) -> LightningModule:
        return self.make()

    @cached_property
    def states(self) -> list[tuple[Tensor, Tensor]]:
        """Of the optimisers."""
        return states_of(self.module)

    @cached_property
    def cost(self) -> Footprint:
        """Of a training step."""
        return footprint(
            self.make,
            partial(_batch, tree=self.tree),
            torch.bfloat16 if self.half else None,
            torch.bfloat16 if self.gather == HALF else None,
        )

    def row(self, gpu: Gpu, gpus: int, batch: int, efficiency: float) -> Row:
        """For a number of GPUs; a batch smaller than that grows to one sample each."""
        batch = max(batch, gpus)
        own, cost = -(-batch // gpus), self.cost
        held = resident(self.module, self.states, self.strategy, gpus, self.gather, self.ema)
        sent = traffic(self.module, self.strategy, gpus, cost.calls, self.gather, self.free)
        touched = 2 * held.weights + held.gradients + 2 * held.optimizer + 2 * held.ema
        flops = cost.flops(own)
        again = cost.again(own) if self.checkpointing else 0.0
        work = Work(flops + again, flops, self.half, touched, sent.sent, sent.collectives, self.strategy)
        kept = (cost.checkpointed if self.checkpointing else cost.activations)(own)
        return Row(gpus, batch, own, held, kept, sent, step_time(work, gpu, gpus, efficiency))


def _without_encoders(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree without an autoencoder, and with any text's features in the place of a text encoder's."""
    model = dict(tree["model"])
    arguments = dict(model.get("init_args") or {})
    if text := arguments.get("text"):
        net = (arguments.get("net") or {}).get("init_args") or {}
        dim = net.get("text_dim") or _found(text, "dim") or 1
        arguments["text"] = {
            "class_path": ANY_TEXT,
            "init_args": {"dim": dim, "length": _found(text, "length") or ANY_LENGTH},
        }
        arguments.pop("autoencoder", None)
    return {**tree, "model": {**model, "init_args": arguments}}


def _found(node: Any, key: str) -> Any:
    if not isinstance(node, dict):
        return None
    return node[key] if key in node else next((v for v in (_found(n, key) for n in node.values()) if v), None)


def _batch(module: LightningModule, n: int, tree: dict[str, Any]) -> dict[str, Any]:
    net = getattr(module, "net", module)
    size = _found(tree["data"], "image_size")
    shape = getattr(net, "shape", None) or (3, *((size, size) if isinstance(size, int) else size or (224, 224)))
    x = torch.zeros(n, *shape)
    batch = {"index": torch.arange(n), "label": torch.zeros(n, dtype=torch.long)}
    batch |= {"image": x, "video": x, "latent": x}
    text = getattr(getattr(module, "prompted", None), "text", None)
    if text is not None:
        batch["text"] = torch.zeros(n, text.length, text.dim)
        if getattr(net, "null_text", text) is None:
            net.null_text = torch.zeros(text.length, text.dim)
    if "Pairs" in str(tree["data"]["class_path"]):
        batch["source"] = torch.zeros(n, *shape)
    return batch
