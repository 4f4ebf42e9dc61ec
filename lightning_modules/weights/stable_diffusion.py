"""Stable Diffusion and InstaFlow folders of diffusers: U-Net, autoencoder and prompt encoder, by hub name or path.

A folder holds `unet/`, `vae/`, `text_encoder/`, `tokenizer/` and `scheduler/`, each with its configuration and weights
(`diffusion_pytorch_model.safetensors`, `model.safetensors`). Those of InstaFlow (arXiv 2309.06380; on the hub
`XCLiu/2_rectified_flow_from_sd_1_5`, `XCLiu/instaflow_0_9B_from_sd_1_5`) have the keys of Stable Diffusion 1.5 and load
unchanged. diffusers and transformers (the extra `text2image`) are imported where they are used.
"""

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.autoencoder import Autoencoder
from penstock.lightning_modules.nets.stable_diffusion import Reading, StableDiffusion
from penstock.lightning_modules.nets.text_encoder import TextEncoder, to_device

PLACES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "scheduler": ("diffusers", "DDPMScheduler"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
}


def part(path: str, name: Literal["unet", "vae", "scheduler", "text_encoder", "tokenizer"]) -> Any:
    """One part of the folder or hub repository `path`, made by its own library.

    Raises:
        UserError: a library that is not installed, a folder without that part, or one that can't be read or fetched.
    """
    library, kind = PLACES[name]
    try:
        loader = getattr(importlib.import_module(library), kind)
    except ImportError as error:
        raise UserError(
            f"Stable Diffusion needs {library}, which is not installed: pip install 'penstock[text2image]'"
        ) from error
    folder = Path(path).expanduser()
    if folder.is_dir() and not (folder / name).is_dir():
        found = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_dir())) or "no folders"
        raise UserError(f"{folder}: no '{name}' in it; found {found}, expected a diffusers folder with {name}/")
    if not folder.is_dir() and (path.count("/") != 1 or path.startswith((".", "/", "~"))):
        raise UserError(f"{path}: no such folder; expected a diffusers folder or a hub name like owner/model")
    options = {"low_cpu_mem_usage": False} if name in ("unet", "vae") else {}
    try:
        return loader.from_pretrained(str(folder) if folder.is_dir() else path, subfolder=name, **options)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:200]
        where = "cannot be read" if folder.is_dir() else "is no local folder and cannot be fetched from the hub"
        raise UserError(f"{path}: {name} {where} ({reason}); expected a diffusers folder with {name}/") from error


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


class KLAutoencoder(Autoencoder):
    """The autoencoder: latents are `scaling_factor` times the encoder's (0.18215 in Stable Diffusion 1.5).

    Args:
        path: Folder or hub name with `vae/`.
        chunk: Images that are encoded or decoded at once.
    """

    key = "latent"

    def __init__(self, path: str, chunk: int = 8):
        self._net = part(path, "vae").eval().requires_grad_(False)
        self.scale, self.chunk = float(self._net.config.scaling_factor), chunk
        self.factor = 2 ** (len(self._net.config.block_out_channels) - 1)

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """`(4, H / 8, W / 8)` of `(3, H, W)`."""
        return self._net.config.latent_channels, shape[1] // self.factor, shape[2] // self.factor

    @torch.no_grad()
    def encode(self, image: Tensor, noise: Tensor | None = None) -> Tensor:
        net = _on(self._net, image.device)
        with torch.autocast(image.device.type, enabled=False):
            laws = [net.encode(images.float()).latent_dist for images in image.split(self.chunk)]
        mean = torch.cat([law.mean for law in laws])
        return self.scale * (mean if noise is None else mean + torch.cat([law.std for law in laws]) * noise)

    def decode(self, latent: Tensor) -> Tensor:
        net = _on(self._net, latent.device)
        with torch.autocast(latent.device.type, enabled=False):
            return torch.cat([net.decode(z.float() / self.scale).sample for z in latent.split(self.chunk)])


def _on(net: nn.Module, device: torch.device | str) -> nn.Module:
    """`net`, on `device`."""
    return net if next(net.parameters()).device == torch.device(device) else net.to(device)
