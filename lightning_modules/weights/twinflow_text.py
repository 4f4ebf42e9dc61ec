"""Prompt encoders of the pipelines that TwinFlow starts from, packed as `nets.any_step_hosts` wants its conditions.

Tokenizers, templates and encoders are those of the folder, run by diffusers' own pipelines without their transformer
and autoencoder (the extra `text2image`).
"""

import importlib
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.prompt_features import with_mask, with_pooled
from penstock.lightning_modules.nets.text_encoder import TextEncoder

Encode = Callable[[Any, list[str], int, torch.device], Tensor]


class PipelineText(TextEncoder):
    """Features of prompts from a pipeline's folder: of Stable Diffusion 3, SANA, Qwen-Image or Z-Image.

    A folder is read once, whoever asks. Texts that are longer than `length` are cut, shorter ones padded.

    Args:
        path: Folder or hub name of the pipeline.
        length: L, or for Stable Diffusion 3 the tokens of T5, beside which the condition has those of CLIP and a pooled
            one; None is what the recipes take: 256, 300 (SANA), 1024 (Qwen-Image), 512 (Z-Image).
        dtype: Of the encoders' weights.

    Raises:
        UserError: diffusers is absent, or no known pipeline is at `path`.
    """

    def __init__(self, path: str, length: int | None = None, dtype: Literal["float32", "bfloat16"] = "bfloat16"):
        self._pipeline = _pipeline(path, getattr(torch, dtype))
        kind = type(self._pipeline).__name__
        if kind not in PIPELINES:
            raise UserError(f"{path}: a {kind}, expected one of {', '.join(PIPELINES)}")
        encode, self.length = PIPELINES[kind]
        self.length = length or self.length
        self._encode: Encode = encode

    @cached_property
    def dim(self) -> int:
        """E, found with the empty prompt."""
        return self([""]).shape[-1]

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """`(B, L, E)` float32."""
        device = torch.device(device)
        with torch.autocast(device.type, enabled=False):
            return self._encode(self._pipeline.to(device), list(texts), self.length, device).float()


def _stable_diffusion_3(pipeline: Any, texts: list[str], length: int, device: torch.device) -> Tensor:
    options = {"do_classifier_free_guidance": False, "max_sequence_length": length, "device": device}
    tokens, _, pooled, _ = pipeline.encode_prompt(texts, None, None, **options)
    return with_pooled(tokens, pooled)


def _sana(pipeline: Any, texts: list[str], length: int, device: torch.device) -> Tensor:
    options = {"do_classifier_free_guidance": False, "max_sequence_length": length, "device": device}
    tokens, mask, _, _ = pipeline.encode_prompt(texts, **options)
    return with_mask(tokens, mask)


def _qwen_image(pipeline: Any, texts: list[str], length: int, device: torch.device) -> Tensor:
    tokens, mask = pipeline.encode_prompt(texts, device=device, max_sequence_length=length)
    mask = tokens.new_ones(tokens.shape[:2]) if mask is None else mask
    return _padded(with_mask(tokens, mask), length)


def _z_image(pipeline: Any, texts: list[str], length: int, device: torch.device) -> Tensor:
    options = {"do_classifier_free_guidance": False, "max_sequence_length": length, "device": device}
    rows, _ = pipeline.encode_prompt(texts, **options)
    return torch.stack([_padded(with_mask(row, row.new_ones(len(row))), length) for row in rows])


def _padded(cond: Tensor, length: int) -> Tensor:
    return F.pad(cond, (0, 0, 0, length - cond.shape[-2]))


PIPELINES: dict[str, tuple[Encode, int]] = {
    "StableDiffusion3Pipeline": (_stable_diffusion_3, 256),
    "SanaPipeline": (_sana, 300),
    "QwenImagePipeline": (_qwen_image, 1024),
    "ZImagePipeline": (_z_image, 512),
}


@lru_cache(maxsize=1)
def _pipeline(path: str, dtype: torch.dtype) -> Any:
    try:
        loader = importlib.import_module("diffusers").DiffusionPipeline
    except ImportError as error:
        raise UserError(
            "text encoders need diffusers, which is not installed: pip install 'penstock[text2image]'"
        ) from error
    folder = Path(path).expanduser()
    if not folder.is_dir() and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        raise UserError(f"{path}: no such folder; expected a pipeline's folder or a hub name like owner/model")
    try:
        return loader.from_pretrained(
            str(folder) if folder.is_dir() else path, transformer=None, vae=None, torch_dtype=dtype
        )
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
        raise UserError(f"{path}: no pipeline can be read from it ({reason}); expected model_index.json") from error
