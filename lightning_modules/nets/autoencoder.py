"""Images to the space that a flow lives in, and back."""

from abc import ABC, abstractmethod
from typing import Literal

from torch import Tensor


class Autoencoder(ABC):
    """A frozen pair of maps. Not a module, so it stays out of checkpoints and averages.

    Attributes:
        key: what batches and predictions call the flow's data.
    """

    key: Literal["image", "latent"]

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


class Identity(Autoencoder):
    """The flow lives in pixel space."""

    key = "image"

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(shape)

    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        return image

    def decode(self, latent: Tensor) -> Tensor:
        return latent
