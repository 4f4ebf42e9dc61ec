"""Stable Diffusion and InstaFlow folders of diffusers: U-Net and prompt encoder, by hub name or path.

A folder holds `unet/`, `vae/`, `text_encoder/`, `tokenizer/` and `scheduler/`, each with its configuration and weights
(`diffusion_pytorch_model.safetensors`, `model.safetensors`). Those of InstaFlow (arXiv 2309.06380; on the hub
`XCLiu/2_rectified_flow_from_sd_1_5`, `XCLiu/instaflow_0_9B_from_sd_1_5`) have the keys of Stable Diffusion 1.5 and load
unchanged. diffusers and transformers (the extra `text2image`) are imported where they are used. The autoencoder in
`vae/` is read by `weights.latents`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.stable_diffusion import Reading, StableDiffusion
from penstock.lightning_modules.nets.text_encoder import TextEncoder, to_device
from penstock.lightning_modules.weights import folders

PLACES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "scheduler": ("diffusers", "DDPMScheduler"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
}


def part(path: str, name: Literal["unet", "scheduler", "text_encoder", "tokenizer"]) -> Any:
    """One part of the folder or hub repository `path`; errors as `folders.part`."""
    options = {"low_cpu_mem_usage": False} if name == "unet" else {}
    return folders.part(path, name, *PLACES[name], **options)


def pretrained(
    path: str,
    reading: Reading = "velocity",
    size: int | None = None,
    custom: str | None = None,
    base: str | None = None,
    alpha: float = 1.0,
) -> StableDiffusion:
    """The U-Net of a folder or hub repository as a velocity field.

    Args:
        path: Folder or hub name.
        reading: `velocity` for InstaFlow and to train one from Stable Diffusion; `noise` for Stable Diffusion itself.
        size: Height and width of the latents; None is what the U-Net was trained at (64 for 512 px).
        custom: Folder of a fine-tuned Stable Diffusion (DreamBooth, or a LoRA fused into the U-Net), whose change
            `alpha (W_custom - W_base)` is added to the weights (arXiv 2309.06380, appendix).
        base: Folder of the Stable Diffusion that `custom` was made from.
        alpha: Share of the change; 0 leaves every bit.

    Raises:
        UserError: as `part`; `custom` without `base`, or U-Nets that differ.
    """
    unet = part(path, "unet")
    if (custom is None) != (base is None):
        raise UserError(f"model.net: custom={custom} and base={base}, expected both or neither")
    if custom is not None and base is not None:
        add_change(unet, part(custom, "unet").state_dict(), part(base, "unet").state_dict(), alpha)
    levels = part(path, "scheduler").alphas_cumprod if reading == "noise" else None
    side = size or unet.config.sample_size
    null_text = ClipText(path)([""])[0]
    return StableDiffusion(unet, null_text, (unet.config.in_channels, side, side), reading, levels).train()


@torch.no_grad()
def add_change(net: nn.Module, custom: Mapping[str, Tensor], base: Mapping[str, Tensor], alpha: float = 1.0) -> None:
    """Adds `alpha (W_custom - W_base)` to the weights of `net`, in place; `alpha = 0` leaves every bit.

    Raises:
        UserError: a weight that one of the three does not have in the same shape.
    """
    own = net.state_dict()
    for name in sorted(own.keys() | custom.keys() | base.keys()):
        shapes = [tuple(state[name].shape) if name in state else None for state in (own, custom, base)]
        if len(set(shapes)) > 1:
            raise UserError(f"weight '{name}': shapes {shapes} in the network, custom and base, expected equal ones")
    if alpha:
        for name, weight in own.items():
            if weight.is_floating_point():
                weight.add_(custom[name].to(weight) - base[name].to(weight), alpha=alpha)


class ClipText(TextEncoder):
    """The prompt encoder: last hidden state of CLIP's text model, 77 tokens; a longer prompt is cut.

    Args:
        path: Folder or hub name with `tokenizer/` and `text_encoder/`.
    """

    def __init__(self, path: str):
        self._tokenizer = part(path, "tokenizer")
        self._net = part(path, "text_encoder").eval().requires_grad_(False)
        self.dim = self._net.config.hidden_size
        self.length = min(self._tokenizer.model_max_length, self._net.config.max_position_embeddings)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """`(B, 77, dim)` float32."""
        ids = self._tokenizer(
            list(texts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).input_ids
        with torch.autocast(torch.device(device).type, enabled=False):
            return _on(self._net, device)(to_device(ids, device)).last_hidden_state.float()


def _on(net: nn.Module, device: torch.device | str) -> nn.Module:
    """`net`, on `device`."""
    return net if next(net.parameters()).device == torch.device(device) else net.to(device)
