"""Frozen feature maps of timm's models: stages of a CNN, blocks of a vision transformer."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_exporting

from penstock.lightning_modules.errors import UserError, did_you_mean
from penstock.lightning_modules.nets.batch_norm_folding import folded
from penstock.lightning_modules.timm_weights import complaint, read_weights

KEY = "model.net.backbone.weights"
AT_ONCE = 4  # images on the CPU: maps of more leave the cache


class Backbone(nn.Module):
    """Maps images `(B, 3, H, W)` in [-1, 1] to feature maps `(B, C_l, H_l, W_l)`, shallow ones first.

    It is frozen and stays in evaluation mode, whatever mode it is put in. What lies behind its last map is not kept.
    It works on a copy whose batch norms are folded into the convolutions; that copy is no part of its state.
    Weights are random until `load`, so that a checkpoint that holds them needs neither file nor hub.

    Args:
        model: timm model name, or `hf-hub:<owner>/<name>`.
        layers: Numbers of the maps, as timm counts the stages of a CNN (the stem's is 0) or a transformer's blocks.
        weights: `hub` for timm's own, a file of the model's state dict (safetensors or .pth, half precision allowed),
            or `random`.
        norm: Whether maps of a transformer go through its last norm.
        image_size: Side or (height, width) of the images; a transformer's position embedding is made for it. None is
            the model's own.
        pad_type: `same` for models with TensorFlow's padding; None is the model's own.
        mean: Of RGB values in [0, 1]; None is what the model was trained with.
        std: Likewise.

    Attributes:
        channels: C_l of each map.

    Raises:
        UserError: an unknown model, one without feature maps, or a layer that it does not have; on a call, images of
            another size than a transformer is made for.
    """

    def __init__(
        self,
        model: str,
        layers: Sequence[int] = (1, 2, 3),
        weights: str = "hub",
        norm: bool = False,
        image_size: int | Sequence[int] | None = None,
        pad_type: Literal["same"] | None = None,
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
    ):
        super().__init__()
        if not model.startswith("hf-hub:") and not timm.is_model(model):
            raise UserError(f"backbone.model: timm has no '{model}'{did_you_mean(model, timm.list_models())}")
        self.model, self.layers, self.weights, self.norm = model, list(layers), weights, norm
        self.options: dict[str, Any] = {} if pad_type is None else {"pad_type": pad_type}
        if image_size is not None:
            self.options["img_size"] = image_size if isinstance(image_size, int) else tuple(image_size)
        net = self._create()
        if not hasattr(net, "forward_intermediates"):
            raise UserError(f"backbone.model: timm's {model} offers no feature maps")
        rows = _rows(net.feature_info)
        found = [info["num_chs"] for info in rows]
        if not layers or not set(self.layers) <= set(range(len(found))):
            raise UserError(f"backbone.layers: found {self.layers}, expected some of 0 to {len(found) - 1} of {model}")
        self.channels = [found[layer] for layer in self.layers]
        self.strides = [rows[layer]["reduction"] for layer in self.layers]
        config = timm.data.resolve_data_config({}, model=net)
        strict = any(getattr(module, "strict_img_size", False) for module in net.modules())
        self._only = _pair(self.options.get("img_size", config["input_size"][1:])) if strict else None
        for name, value in (("mean", mean or config["mean"]), ("std", std or config["std"])):
            self.register_buffer(name, torch.tensor(value).view(1, 3, 1, 1), persistent=False)
        self.net = self._pruned(net)
        self._modules_of_net = tuple(self.net.modules())
        self._quick: tuple[list[Any], nn.Module] | None = None  # weights' state, the copy
        self.register_load_state_dict_post_hook(_forget)

    def _create(self, **options: Any) -> nn.Module:
        try:
            return timm.create_model(self.model, **self.options, **options)
        except TypeError as error:
            raise UserError(f"backbone: timm's {self.model} takes no such argument ({error})") from error

    def _pruned(self, net: nn.Module) -> nn.Module:
        net.prune_intermediate_layers(self.layers, prune_norm=not self.norm, prune_head=True)
        return net.eval().requires_grad_(False)

    def load(self) -> None:
        """Loads what `weights` names.

        Raises:
            UserError: no file or no hub, or weights of another model.
        """
        if self.weights == "random":
            return
        overlay = {}
        if self.weights != "hub":
            overlay = {"pretrained_cfg_overlay": {"state_dict": read_weights(self.weights, KEY, self.model)}}
        try:
            full = self._create(pretrained=True, **overlay)
        except RuntimeError as error:
            if not overlay:
                raise self._no_hub(error) from error
            path = Path(self.weights).expanduser()
            raise UserError(f"{KEY}: {path} does not fit timm's {self.model}: {complaint(error)}") from error
        except (OSError, ValueError) as error:
            raise self._no_hub(error) from error
        self.net.load_state_dict(self._pruned(full).state_dict())
        self._quick = None

    def _no_hub(self, error: Exception) -> UserError:
        return UserError(
            f"{KEY}: found hub, from which timm's {self.model} cannot be downloaded ({type(error).__name__}); expected "
            f"{KEY}=FILE with its state dict, or {KEY}=random"
        )

    def _other_size(self, found: tuple[int, int]) -> UserError:
        value = found[0] if found[0] == found[1] else f"[{found[0]},{found[1]}]"
        return UserError(
            f"model.net.backbone.image_size: timm's {self.model} is made for images of {self._only[0]}x{self._only[1]} "
            f"pixels, found images of {found[0]}x{found[1]}; expected model.net.backbone.image_size={value}",
            everywhere=True,
        )

    def sizes(self, image_size: tuple[int, int]) -> list[tuple[int, int]]:
        """(H_l, W_l) of each map of images of (H, W)."""
        ghost = copy.deepcopy(self).to("meta")
        return [tuple(y.shape[2:]) for y in ghost(torch.empty(1, 3, *image_size, device="meta"))]

    def train(self, mode: bool = True) -> "Backbone":
        return super().train(False)

    def _apply(self, *args: Any, **kwargs: Any) -> "Backbone":
        self._quick = None
        return super()._apply(*args, **kwargs)

    @torch.no_grad()
    def forward(self, image: Tensor) -> list[Tensor]:
        self._check_size(image)
        x = torch.addcmul((0.5 - self.mean) / self.std, image, 0.5 / self.std)
        if is_compiling() or is_exporting() or x.device.type == "meta":
            return self._maps(self.net if self._quick is None else self._quick[1], x)
        net = self._folded(x[:1])
        if x.device.type != "cpu":
            return self._maps(net, x)
        parts = [self._maps(net, part) for part in x.to(memory_format=torch.channels_last).split(AT_ONCE)]
        return [torch.cat(maps).contiguous() for maps in zip(*parts)]

    def _check_size(self, image: Tensor) -> None:
        if self._only is not None and tuple(image.shape[-2:]) != self._only:
            raise self._other_size(tuple(image.shape[-2:]))

    def folded(self, image: Tensor) -> "Backbone":
        """A copy of images in [0, 1], with batch norms inside of convolutions, for inference and export alone.

        Args:
            image: One `(1, 3, H, W)` of the kind it is for.
        """
        self(image)
        result = copy.deepcopy(self)
        result.net, result._quick = result._quick[1], None
        result._modules_of_net = tuple(result.net.modules())
        result.mean, result.std = (1 + self.mean) / 2, self.std / 2
        return result

    def _folded(self, x: Tensor) -> nn.Module:
        state = [
            (t.data_ptr(), 0 if t.is_inference() else t._version)
            for module in self._modules_of_net
            for t in (*module._parameters.values(), *module._buffers.values())
            if t is not None
        ]
        if self._quick is None or self._quick[0] != state:
            with torch.inference_mode(False), torch.no_grad():
                self._quick = state, folded(self.net, lambda: self._maps(self.net, x))
        return self._quick[1]

    def _maps(self, net: nn.Module, x: Tensor) -> list[Tensor]:
        norm = {"norm": True} if self.norm else {}
        return net.forward_intermediates(
            x, indices=self.layers, stop_early=True, intermediates_only=True, output_fmt="NCHW", **norm
        )


def _forget(backbone: Backbone, _: Any) -> None:
    """Other weights came: a compiled program must not take the copy of those before."""
    backbone._quick = None


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _rows(info: Any) -> list[dict[str, Any]]:
    return info if isinstance(info, list) else info.get_dicts()
