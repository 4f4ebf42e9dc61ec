"""What methods of all families do alike: fit the data, start from weights, make an optimiser, score a split."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from penstock.lightning_modules.checkpoints import load_checkpoint, load_weights, raw_weights
from penstock.lightning_modules.errors import UserError


def check_data(net: nn.Module, num_classes: int, data: Any, in_sequence: bool = False) -> None:
    """Refuses a DataModule of another shape than the network's, or of other classes.

    Args:
        net: has `shape`.
        num_classes: of the model.
        data: has `shape` and `num_classes`.
        in_sequence: whether the network sees a clip with a source after that source, in one.

    Raises:
        UserError: the key of the model, what was found and what is expected.
    """
    shape, classes = tuple(getattr(data, "shape", net.shape)), getattr(data, "num_classes", 0)
    if (expected := after_sources(data, shape) if in_sequence else shape) != tuple(net.shape):
        more = twice(data) if in_sequence else ""
        raise UserError(f"model.net.shape: found {tuple(net.shape)}, expected {expected}, the data's shape{more}")
    if num_classes not in (0, classes):
        raise UserError(f"model.net.num_classes: found {num_classes}, expected 0 or {classes}, the data's classes")


def after_sources(data: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of what a model sees of clips of `shape`: those with sources come after as many frames of these."""
    return (2 * shape[0], *shape[1:]) if getattr(data, "sourced", False) else tuple(shape)


def twice(data: Any) -> str:
    """What to say of frames that are doubled by `after_sources`; nothing where they are not."""
    return " with twice the frames: a source and the clip made of it" if getattr(data, "sourced", False) else ""


def start_from_initial(module: LightningModule) -> None:
    """Loads `module.net` with the raw weights of the checkpoint `module.initial`, where there is one."""
    if module.initial:
        own = module.initial_weights(raw_weights(load_checkpoint(module.initial)))
        load_weights(module.net, {"state_dict": own}, f"model.initial={module.initial}")


def keep_converted(module: LightningModule) -> None:
    """At the end of `validate`, leaves a model with weights of another program in `checkpoints/converted.ckpt`."""
    trainer = module.trainer
    if trainer.state.fn != TrainerFn.VALIDATING or trainer.ckpt_path or trainer.fast_dev_run:
        return
    path = Path(trainer.default_root_dir, "checkpoints", "converted.ckpt")
    trainer.save_checkpoint(path)
    rank_zero_info(f"converted: {path}")


def net_weights(state: dict[str, Any]) -> dict[str, Any]:
    """The entries of `net` in a module's state, under the network's names."""
    return {key.removeprefix("net."): value for key, value in state.items() if key.startswith("net.")}


def optimizers(module: LightningModule) -> Any:
    """The module's optimiser of all that trains, with its scheduler by steps: what Lightning asks for."""
    optimizer = module.optimizer([p for p in module.parameters() if p.requires_grad])
    if module.scheduler is None:
        return optimizer
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": module.scheduler(optimizer), "interval": "step"}}


def log_mean(module: LightningModule, name: str, values: Tensor) -> None:
    """Logs the mean over samples. Lightning averages the ranks' sizes as integers, which the factor keeps exact."""
    weight = len(values) * module.trainer.world_size
    module.log(name, values.mean(), batch_size=weight, on_epoch=True, sync_dist=True)
