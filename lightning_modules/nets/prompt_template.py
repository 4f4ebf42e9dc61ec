"""Prompts as STARFlow-V was trained with: the caption within what is known of its clip (arXiv 2511.20462)."""

import re
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from penstock.lightning_modules.errors import UserError, did_you_mean
from penstock.lightning_modules.nets.aspects import nearest_aspect
from penstock.lightning_modules.nets.text_encoder import TextEncoder

Tag = Literal["extend", "last", "v2v"]


def assemble(caption: str, fps: int | None = None, noise: float | None = None, aspect: str | None = None) -> str:
    """The prompt of a caption, character for character as the released model takes it.

    Args:
        caption: May be empty: the null prompt keeps all the rest.
        fps: Frames a second; 0 is an image, None says nothing.
        noise: Standard deviation of the training noise, told in thousandths; None says nothing.
        aspect: `width:height`; None says nothing.
    """
    prompt = caption
    if fps is not None:
        prompt = f"{f'A video with {fps} fps' if fps else 'An image'}:\n{prompt}\n"
    if noise is not None:
        prompt = f"Noise Level {int(1000 * noise)}:\n{prompt}"
    return prompt if aspect is None else f"{prompt}\n in a {aspect} aspect ratio.\n"


def tagged(captions: Sequence[str], tag: Tag) -> list[str]:
    """Captions of a task, for any text encoder; a `Template` puts them where the released model has them.

    Args:
        captions: As they are, without template.
        tag: `extend`, clips without their first frame; `last`, clips that follow their last frame; `v2v`, clips that
            follow another clip.

    Raises:
        ValueError: another tag.
    """
    if tag not in get_args(Tag):
        raise ValueError(f"tag '{tag}'{did_you_mean(tag, get_args(Tag))}: expected one of {', '.join(get_args(Tag))}")
    return [f"({tag}) {caption}" for caption in captions]


class Template(TextEncoder):
    """A text encoder that is given captions within `assemble`; the empty caption is the null prompt of the same clips.

    Args:
        text: The encoder.
        fps: Frames a second of the clips; 0 for images, None to leave it out.
        noise: Standard deviation of the training noise; None to leave it out.
        aspect: `own`, the nearest of `ASPECTS` to the frames that a caption is of (which `of_size` tells); or always
            the same `width:height`; None to leave it out.

    Raises:
        UserError: a number below 0, or an aspect that is none.
    """

    def __init__(
        self, text: TextEncoder, fps: int | None = None, noise: float | None = None, aspect: str | None = None
    ):
        for key, value in (("fps", fps), ("noise", noise)):
            if value is not None and not 0 <= value < float("inf"):
                raise UserError(f"model.text.{key}: found {value}, expected 0 or more")
        if aspect is not None and not re.fullmatch(r"own|[1-9]\d*:[1-9]\d*", aspect):
            raise UserError(f"model.text.aspect: found '{aspect}', expected own, or width:height, such as 16:9")
        self.text, self.fps, self.noise, self.aspect = text, fps, noise, aspect

    @property
    def dim(self) -> int:
        """Size of a token's features."""
        return self.text.dim

    def of_images(self) -> "Template":
        """The same for captions of images: 0 fps, where an fps is told at all."""
        return Template(self.text, self.fps and 0, self.noise, self.aspect)

    def of_size(self, height: int, width: int) -> "Template":
        """The same for frames of this size, in pixels or in any other unit."""
        if self.aspect != "own":
            return self
        return Template(self.text, self.fps, self.noise, nearest_aspect(height, width))

    def prompts(self, captions: Sequence[str]) -> list[str]:
        """What the encoder is given for captions.

        Raises:
            ValueError: the aspect is that of frames whose size is not told.
        """
        if self.aspect == "own":
            raise ValueError("the aspect of the frames is not known: take of_size(height, width) first")
        return [assemble(caption, self.fps, self.noise, self.aspect) for caption in captions]

    def __call__(self, texts: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """`(B, L, dim)`."""
        return self.text(self.prompts(texts), device)
