"""Image classification by a pyramid."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.piip.interaction import InteractionUnit
from penstock.lightning_modules.nets.piip.merging import MergedHead, Token, mean_of_heads
from penstock.lightning_modules.nets.piip.pyramid import Branch, Pyramid, Unit


class PiipClassifier(nn.Module):
    """Images `(B, C, H, W)` to logits `(B, K)`.

    Args:
        branches: See `Pyramid`; with classifiers of their own where `head` is `separate`.
        num_classes: K.
        unit: See `Pyramid`.
        head: `separate`, the mean of what the branches' classifiers give, or `merged`, one of their sum.
        token: See `mean_of_heads`; of separate heads.
        size: See `Pyramid`.

    Raises:
        UserError: as `Pyramid`, or branches without what the head needs.
    """

    def __init__(
        self,
        branches: Sequence[Branch],
        num_classes: int,
        unit: Unit | None = InteractionUnit,
        head: Literal["separate", "merged"] = "separate",
        token: Token = "class",
        size: int | None = None,
    ):
        super().__init__()
        self.pyramid, self.num_classes, self.token = Pyramid(branches, unit, size), num_classes, token
        if head == "separate":
            for i, branch in enumerate(branches):
                if branch.head is None or (token == "class" and branch.cls_token is None):
                    raise UserError(
                        f"branches[{i}]: expected num_classes={num_classes} and class_token=true of head=separate"
                    )
        self.merged = MergedHead([branch.dims[-1] for branch in branches], num_classes) if head == "merged" else None
        if head == "separate" and token == "class":
            self.pyramid.interactions[-1].requires_grad_(False)  # no class token sees it, DDP would wait for gradients

    def load(self) -> None:
        """Pretrained weights of the branches.

        Raises:
            UserError: as the branches.
        """
        self.pyramid.load()

    def forward(self, image: Tensor) -> Tensor:
        states = self.pyramid(image)[0]
        if self.merged is not None:
            return self.merged(states)
        return mean_of_heads(self.pyramid.branches, states, self.token)
