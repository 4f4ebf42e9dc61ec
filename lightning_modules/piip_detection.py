"""PIIP as backbone of a detector, arXiv 2406.04330 section 4.2: learning rates that fall towards the first layers."""

from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.layer_decay import layer_optimizers
from penstock.lightning_modules.nets.detector import BoxNetwork
from penstock.lightning_modules.nets.piip.costs import Costs, costs
from penstock.lightning_modules.nets.piip.dense import MergedPyramid
from penstock.lightning_modules.sepc import Sepc
from penstock.lightning_modules.weights.piip import load_released


class PiipDetector(Sepc):
    """Trains a detector on a pyramid; biases and other vectors have no weight decay.

    Args:
        net: Its backbone is a pyramid.
        optimizer: Of all that trains.
        scheduler: By steps.
        layer_decay: Factor of the learning rate from each layer of the branches to the one before.
        initial: Checkpoint whose raw weights it starts from, or the authors' file of Mask R-CNN, see `load_released`;
            None are the pretrained branches.

    Raises:
        UserError: a network on another backbone, or a factor out of range.
    """

    def __init__(
        self,
        net: BoxNetwork,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        layer_decay: float = 1.0,
        initial: str | None = None,
    ):
        super().__init__(net, optimizer, scheduler)
        if not 0 < layer_decay <= 1:
            raise UserError(f"model.layer_decay: found {layer_decay}, expected above 0 and at most 1")
        if not isinstance(net.backbone, MergedPyramid):
            found = type(net.backbone).__name__
            raise UserError(
                f"model.net.backbone: found {found}, expected a pyramid; model=sepc trains detectors on others"
            )
        self.layer_decay, self.file = layer_decay, initial

    def setup(self, stage: str) -> None:
        """As `Sepc`.

        Raises:
            UserError: as `Sepc` and `load_released`, or a file of the authors for another network than Mask R-CNN.
        """
        if self.initial and self.file:
            self.released = load_released(self.net, self.file, "detector")
            self.initial = None
        super().setup(stage)

    def costs(self) -> Costs:
        """What `penstock flops` prints of the backbone; of a model on the meta device."""
        return costs(self.net.backbone)

    def configure_optimizers(self) -> Any:
        return layer_optimizers(self, self._pyramid(), self.layer_decay, decay_vectors=False)

    def _pyramid(self) -> str:
        """Name of the pyramid in this module."""
        return next(name for name, module in self.named_modules() if module is self.net.backbone.pyramid)
