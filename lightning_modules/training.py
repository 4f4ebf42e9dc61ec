"""What methods of all families do alike: fit the data, start from weights, make an optimiser, score a split."""

from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from penstock.lightning_modules.checkpoints import load_checkpoint, load_weights, raw_weights
from penstock.lightning_modules.errors import UserError


def check_data(net: nn.Module, num_classes: int, data: Any) -> None:
    """Refuses a DataModule of another shape than the network's, or of other classes.

    Raises:
        UserError: the key of the model, what was found and what is expected.
    """
    shape, classes = tuple(getattr(data, "shape", net.shape)), getattr(data, "num_classes", 0)
    if shape != tuple(net.shape):
        raise UserError(f"model.net.shape: found {tuple(net.shape)}, expected {shape}, the data's shape")
    if num_classes not in (0, classes):
        raise UserError(f"model.net.num_classes: found {num_classes}, expected 0 or {classes}, the data's classes")


def start_from_initial(module: LightningModule) -> None:
    """Loads `module.net` with the raw weights of the checkpoint `module.initial`, where there is one."""
    if module.initial:
        own = module.initial_weights(raw_weights(load_checkpoint(module.initial)))
        load_weights(module.net, {"state_dict": own}, f"model.initial={module.initial}")


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
