"""Classes as texts, for flows in latent space whose condition is a prompt (arXiv 2506.06276)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.text_encoder import TextEncoder, to_device


class ClassText(TextEncoder):
    """One token, a vector with a single 1 at the class; a text is the number of a class, the empty one no class.

    Args:
        num_classes: Classes K; features have K + 1 numbers, the last for no class.

    Raises:
        UserError: fewer than 1 class.
    """

    def __init__(self, num_classes: int):
        if num_classes < 1:
            raise UserError(f"model.text.num_classes: found {num_classes}, expected at least 1")
        self.num_classes, self.dim = num_classes, num_classes + 1

    def __call__(self, texts: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """`(B, 1, K + 1)` float32.

        Raises:
            UserError: a text that is no class.
        """
        numbers = torch.tensor([self._number(text.strip()) for text in texts])
        return to_device(F.one_hot(numbers, self.dim).float()[:, None], device)

    def _number(self, text: str) -> int:
        if not text:
            return self.num_classes
        if not text.isdecimal() or int(text) >= self.num_classes:
            raise UserError(f"prompt '{text}': expected a class, 0 to {self.num_classes - 1}, or nothing")
        return int(text)
