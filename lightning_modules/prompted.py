"""What a text-to-image flow has beside its network, frozen and in no checkpoint: a prompt encoder, an autoencoder."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from penstock.kernels.philox import Draws
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.autoencoder import Autoencoder
from penstock.lightning_modules.nets.text_encoder import TextEncoder
from penstock.lightning_modules.training import after_sources, twice

Condition = Tensor | Sequence[str]


class Prompted:
    """Prompts to features and images to the flow's space.

    Args:
        text: Prompts to features `(B, L, E)`.
        autoencoder: Images to the flow's space and back.
        prompts: Prompts by number, for samples that ask for a class.
    """

    def __init__(self, text: TextEncoder, autoencoder: Autoencoder, prompts: list[str]):
        self.text, self.autoencoder, self.prompts = text, autoencoder, prompts
        self._numbered: Tensor | None = None
        self._null: Tensor | None = None

    def fits_text(self, net: nn.Module) -> None:
        """Refuses a network for features of another size, where it tells the size.

        Raises:
            UserError: the key of the model, what was found and what is expected.
        """
        if (found := getattr(net, "text_dim", self.text.dim)) != self.text.dim:
            raise UserError(f"model.net.text_dim: found {found}, expected {self.text.dim}, that of model.text")

    def fits(self, net: nn.Module, data: Any) -> None:
        """Refuses data that the autoencoder does not bring to the network's shape, and features of another size.

        Data that are latents already say themselves whether they are the autoencoder's (`shape_for`).

        Raises:
            UserError: the key of the model, what was found and what is expected.
        """
        shape = tuple(getattr(data, "shape", ()))
        if hasattr(data, "shape_for"):
            latent = data.shape_for(self.autoencoder)
        else:
            latent = self.autoencoder.latent_shape(shape) if len(shape) in (3, 4) else shape
        if (expected := after_sources(data, latent)) != tuple(net.shape):
            made = f"what model.autoencoder makes of the data's {shape}" if latent != shape else "the data's shape"
            raise UserError(f"model.net.shape: found {tuple(net.shape)}, expected {expected}, {made}{twice(data)}")
        try:
            net.drop_condition(self.text([""]), torch.tensor([False]))
        except ValueError as error:
            raise UserError(f"model.text: features of {self.text.dim} numbers do not fit model.net: {error}") from error

    def null(self, device: torch.device) -> Tensor:
        """Features `(1, L, E)` of the empty prompt."""
        if self._null is None or self._null.device != device:
            self._null = self.text([""], device)
        return self._null

    def features(self, condition: Condition | None, device: torch.device) -> Tensor | None:
        """Features `(B, L, E)` of prompts, of int64 numbers `(B,)` of `prompts`, or those given; None stays None.

        Raises:
            UserError: numbers without `prompts`.
        """
        if condition is None or (isinstance(condition, Tensor) and condition.is_floating_point()):
            return condition
        if not isinstance(condition, Tensor):
            return self.text(list(condition), device)
        if not self.prompts:
            raise UserError("model.prompts: found none; expected the prompts that the data's labels stand for")
        if self._numbered is None or self._numbered.device != device:
            self._numbered = self.text(self.prompts, device)
        return self._numbered[condition]

    def condition(self, batch: dict[str, Any], device: torch.device) -> Tensor | None:
        """Features `(B, L, E)` of the batch's prompts.

        Raises:
            UserError: a batch without `text` and without `label`.
        """
        found = batch["text"] if "text" in batch else batch.get("label")
        if found is None:
            raise UserError(f"data: batches have {', '.join(sorted(batch))}; expected text, as in data=image_text")
        return self.features(found, device)

    def data(self, batch: dict[str, Any], draws: Draws) -> Tensor:
        """The batch in the flow's space `(B, ...)`: its `latent`, or its pictures encoded with noise from `draws`.

        Raises:
            UserError: a batch without `latent`, `image` and `video`.
        """
        if "latent" in batch:
            return batch["latent"]
        pictures = batch.get("video", batch.get("image"))
        if pictures is None:
            raise UserError(f"data: batches have {', '.join(sorted(batch))}; expected image, video or latent")
        return self.autoencoder.encode(pictures, self.noise(pictures, draws))

    def noise(self, pictures: Tensor, draws: Draws) -> Tensor | None:
        """The encoder's noise for pictures `(B, ...)`, or None for pixel space."""
        if self.autoencoder.key != "latent":
            return None
        return draws.normal("autoencoder", self.autoencoder.latent_shape(tuple(pictures.shape[1:])))
