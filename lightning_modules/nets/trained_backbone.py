"""Feature maps of timm's models that go on training, but for their first stages and the statistics of their norms."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.backbone import Backbone
from penstock.lightning_modules.nets.map_backbone import MapBackbone


class TrainedBackbone(Backbone, MapBackbone):
    """`Backbone` that trains from a stage on.

    With `norm_eval` it stays in evaluation mode, so that running statistics do not move; else what trains takes the
    statistics of its batches, as it must from random weights.

    Args:
        model: timm model name, or `hf-hub:<owner>/<name>`.
        layers: Numbers of the maps, as timm counts them.
        frozen: Number of the last map whose layers are frozen, with all before it; -1 freezes none.
        norm_eval: See above.
        weights: `hub`, a file of the model's state dict, or `random`.
        pad_type: `same` for models with TensorFlow's padding; None is the model's own.
        mean: Of RGB values in [0, 1]; None is what the model was trained with.
        std: Likewise.

    Raises:
        UserError: as `Backbone`, or a number that is no map's.
    """

    def __init__(
        self,
        model: str,
        layers: Sequence[int] = (2, 3, 4),
        frozen: int = 1,
        norm_eval: bool = True,
        weights: str = "hub",
        pad_type: Literal["same"] | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
    ):
        super().__init__(model, layers, weights, pad_type=pad_type, mean=mean, std=std)
        stages = [info["module"] for info in self.net.feature_info]
        if not -1 <= frozen < len(stages):
            raise UserError(f"backbone.frozen: found {frozen}, expected -1 to {len(stages) - 1} of {model}")
        modules = dict(self.net.named_modules())
        last = max((k for k, name in enumerate(modules) if _of(name, stages[: frozen + 1])), default=-1)
        self.norm_eval, trained = norm_eval, list(modules.values())[last + 1 :]
        self.trained_norms = [] if norm_eval else [module for module in trained if isinstance(module, nn.BatchNorm2d)]
        for module in trained:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)

    @property
    def about(self) -> str:
        return f"maps {list(self.layers)} of {self.model}"

    def train(self, mode: bool = True) -> "TrainedBackbone":
        super().train(mode)
        for norm in self.trained_norms:
            norm.train(mode)
        return self

    def forward(self, image: Tensor) -> list[Tensor]:
        """Maps `(B, C_l, H_l, W_l)` of images `(B, 3, H, W)` in [-1, 1]."""
        self._check_size(image)
        return self._maps(self.net, torch.addcmul((0.5 - self.mean) / self.std, image, 0.5 / self.std))


def _of(name: str, stages: Sequence[str]) -> bool:
    return any(name == stage or name.startswith(f"{stage}.") for stage in stages)
