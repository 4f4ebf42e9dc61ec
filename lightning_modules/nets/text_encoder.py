"""Prompts to token features, for networks that attend to a text."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

WORD = re.compile(r"\w+")


class TextEncoder(ABC):
    """A frozen map from prompts to features. Not a module, so it stays out of checkpoints and averages.

    Attributes:
        dim: size of a token's features.
    """

    dim: int

    @abstractmethod
    def __call__(self, texts: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """Features `(len(texts), L, dim)`, float, of prompts."""

    def of_images(self) -> "TextEncoder":
        """The same encoder for captions of images, where it tells a model of videos which of the two they are of."""
        return self

    def of_size(self, height: int, width: int) -> "TextEncoder":
        """The same encoder for captions of frames of this size, where it tells a model the shape of frames."""
        return self


class HashedText(TextEncoder):
    """A fixed random vector for every word, and half as much of one for its place: no weights, no vocabulary, no files.

    Components are uniform with mean 0 and variance 1, read from SHAKE-256 of `(seed, word)`, hence the same everywhere.
    Case and punctuation do not count; places without a word are 0; words after `length` are left out.

    Args:
        dim: size of a token's features.
        length: number L of tokens.
        seed: key of the vectors.
    """

    def __init__(self, dim: int = 32, length: int = 8, seed: int = 0):
        if min(dim, length) < 1:
            raise ValueError(f"HashedText: dim={dim} and length={length}, expected at least 1")
        self.dim, self.length, self.seed = dim, length, seed
        self._places = np.stack([0.5 * _vector(f"{seed} place {place}", dim) for place in range(length)])

    def __call__(self, texts: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """`(B, length, dim)` float32."""
        features = np.zeros((len(texts), self.length, self.dim), dtype=np.float32)
        for row, text in zip(features, texts):
            for place, word in enumerate(WORD.findall(text.lower())[: self.length]):
                row[place] = _vector(f"{self.seed} word {word}", self.dim) + self._places[place]
        return to_device(torch.from_numpy(features), device)


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """`x` from the host without waiting for a GPU: through pinned memory, in the order of the stream."""
    if torch.device(device).type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


@lru_cache(maxsize=2**16)
def _vector(key: str, dim: int) -> np.ndarray:
    raw = np.frombuffer(hashlib.shake_256(key.encode()).digest(2 * dim), dtype="<u2")
    return ((raw + 0.5) / 2**15 - 1) * 3**0.5
