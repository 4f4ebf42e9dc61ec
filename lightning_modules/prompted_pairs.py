"""Pairs of noise and the samples that a flow makes of it for a prompt (arXiv 2309.06380 section 2)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.solvers import Solution
from penstock.lightning_modules.pairs import PairMaker, Recipe


class PromptedMaker(PairMaker):
    """A teacher that makes pair i for prompt i; the pairs' `label` is i, the number of the prompt.

    Args:
        teacher: Checkpoint of a flow that takes prompts.
        recipe: How.
        device: Where the teacher runs.
        texts: Prompts of numbers `(b,)`.
        prompts: What identifies `texts`.

    Raises:
        UserError: as `PairMaker`; a teacher that takes no prompts.
    """

    def __init__(
        self,
        teacher: str | Path,
        recipe: Recipe,
        device: torch.device | str,
        texts: Callable[[Tensor], list[str]],
        prompts: str,
    ):
        super().__init__(teacher, recipe, device)
        if not getattr(self.model, "takes_text", False):
            raise UserError(f"teacher '{teacher}': {type(self.model).__name__} takes no prompts, expected an InstaFlow")
        self.model, self.prompts = _Prompted(self.model, texts), prompts

    def identity(self) -> dict[str, Any]:
        """What the pairs depend on, the prompts among it."""
        return super().identity() | {"prompts": self.prompts}

    def labels(self, index: Tensor) -> Tensor:
        """The number of the prompt is the number of the pair."""
        return index


class _Prompted:
    """A flow whose conditions are numbers of prompts."""

    def __init__(self, model: Any, texts: Callable[[Tensor], list[str]]):
        self.model, self.texts = model, texts

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def integrate(self, x: Tensor, *args: Any, cond: Tensor, **options: Any) -> Solution:
        return self.model.integrate(x, *args, cond=self.texts(cond), **options)
