"""Images to the space that a flow lives in, and back."""

from abc import ABC, abstractmethod
from typing import Any, Literal

from torch import Tensor, nn

from penstock.lightning_modules.errors import UserError


class Autoencoder(ABC):
    """A frozen pair of maps. Not a module, so it stays out of checkpoints and averages.

    Attributes:
        key: what batches and predictions call the flow's data.
        frame_factor: frames of a video to one of the flow, after the first, which stands for itself.
    """

    key: Literal["image", "latent"]
    frame_factor: int = 1

    @abstractmethod
    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the flow's samples for images of `shape` (C, H, W)."""

    @abstractmethod
    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        """Flow data `(B, ...)` of images `(B, C, H, W)` in [-1, 1]; no gradient.

        Args:
            image: the images.
            noise: unit noise of the result's shape for an encoder that is a distribution; None takes its mean.
        """

    @abstractmethod
    def decode(self, latent: Tensor) -> Tensor:
        """Images `(B, C, H, W)` of flow data `(B, ...)`; differentiable."""

    def law(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Mean and deviation `(B, ...)` of the flow data of images; no deviation where there is one code only."""
        return self.encode(image), None

    def identity(self) -> dict[str, Any]:
        """What the flow data of an image depend on, in plain values."""
        return {"class": type(self).__name__}

    def decoder(self) -> nn.Module:
        """The weights behind `decode`, for those who train them.

        Raises:
            UserError: there are none.
        """
        raise UserError(f"model.autoencoder: {type(self).__name__} has no decoder to train, expected one of weights")


class Identity(Autoencoder):
    """The flow lives in pixel space."""

    key = "image"

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(shape)

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        return image

    def decode(self, latent: Tensor) -> Tensor:
        return latent
