"""STARFlow (arXiv 2506.06276), STARFlow-V (arXiv 2511.20462): shallow blocks, then a deep one that reads the text."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.kernels.affine import Scale
from penstock.lightning_modules.errors import UserError, did_you_mean
from penstock.lightning_modules.nets.aspects import ASPECTS, aspect_size, nearest_aspect
from penstock.lightning_modules.nets.autoregressive import AutoregressiveBlock
from penstock.lightning_modules.nets.autoregressive_flow import AutoregressiveFlow, Order, check_shape
from penstock.lightning_modules.nets.causal_transformer import Layer, gemma_layer, plain_layer
from penstock.lightning_modules.nets.rotary import Rotary


class STARFlow(AutoregressiveFlow):
    """The flow of both papers: an image `(C, H, W)` or a clip `(T, C, H, W)`, whose shallow blocks see one frame only.

    Args:
        shape: Of a sample.
        dim: Width of the shallow blocks.
        depths: Layers of each block, data side first; the last is the deep one.
        deep_dim: Width of the deep block; None is `dim`.
        head_dim: Features of a head.
        text_dim: Numbers of a text token; 0 is none.
        num_classes: Classes, each a vector of one 1 that is the only text token; 0 is none.
        text_everywhere: Whether shallow blocks read the text, too.
        patch: Side of a patch.
        order: See `AutoregressiveFlow`.
        frame_local: See there.
        side: Rows and columns of tokens in training, see `Rotary`; None is the root of their number in `shape`.
        scale: See `kernels.affine.moments`.
        soft_clip: See there.
        deep: `gemma2_2b`, `gemma3_1b`, `gemma3_4b`: the deep block is that language model, whose embeddings are the
            text; its depth is `depths[-1]` and its width `deep_dim`.

    Attributes:
        null_text: Text `(L, text_dim)` of the empty prompt, which stands for no condition; None until it is set.

    Raises:
        ValueError: a shape that does not fit the patch, no block, or text and classes.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dim: int = 2048,
        depths: Sequence[int] = (2, 2, 2, 2, 2, 18),
        deep_dim: int | None = None,
        head_dim: int = 64,
        text_dim: int = 0,
        num_classes: int = 0,
        text_everywhere: bool = False,
        patch: int = 1,
        order: Order = "L2R",
        frame_local: bool = True,
        side: float | None = None,
        scale: Scale = "softplus",
        soft_clip: float = 4.0,
        deep: Literal["plain", "gemma2_2b", "gemma3_1b", "gemma3_4b"] = "plain",
    ):
        shape = check_shape(shape, patch)
        if text_dim and num_classes:
            raise ValueError(f"a condition is a class or a text, got num_classes={num_classes} and text_dim={text_dim}")
        text_dim = text_dim or (num_classes + 1 if num_classes else 0)
        if not depths or min(depths) < 1:
            raise ValueError(f"depths {tuple(depths)}: expected a number of layers, at least 1, for every block")
        channels, deep_dim = shape[-3] * patch**2, deep_dim or dim
        side = side or ((shape[-2] // patch) * (shape[-1] // patch)) ** 0.5
        axes: Literal[2, 3] = 3 if text_dim or len(shape) == 4 else 2
        options: dict[str, Any] = {"scale": scale, "soft_clip": soft_clip}
        rotary, text = Rotary(head_dim, axes, side), text_dim if text_everywhere else 0
        shallow = plain(head_dim)
        blocks = [
            AutoregressiveBlock(channels, dim, depth, rotary, text, layer=shallow, **options) for depth in depths[:-1]
        ]
        layer, project = shallow, True
        if deep != "plain":
            sizes = GEMMA[deep]
            layer, project, rotary = _gemma(**sizes), False, Rotary(sizes["head_dim"], 1, side)
        options |= {"project_text": project, "layer": layer}
        blocks.append(AutoregressiveBlock(channels, deep_dim, depths[-1], rotary, text_dim, **options))
        super().__init__(blocks, shape, patch, order, frame_local)
        self.text_dim, self.num_classes = text_dim, num_classes
        self.register_buffer("null_text", None, persistent=False)

    def condition(self, cond: Tensor | None, batch: int) -> Tensor | None:
        """Classes `(B,)` or text `(B, L, text_dim)` as text; None is no class or the empty prompt.

        Raises:
            ValueError: a condition of another kind, or no text of the empty prompt.
        """
        if not self.text_dim:
            if cond is not None:
                raise ValueError("this flow is unconditional: set num_classes or text_dim to give it a condition")
            return None
        weights = self.blocks[-1].proj_in.weight
        if self.num_classes and (cond is None or not cond.is_floating_point()):
            labels = torch.full((batch,), self.num_classes, device=weights.device) if cond is None else cond
            return F.one_hot(labels, self.text_dim).to(weights.dtype)[:, None]
        if cond is not None:
            if cond.ndim != 3 or cond.shape[-1] != self.text_dim or not cond.is_floating_point():
                raise ValueError(f"expected text (B, L, {self.text_dim}), got {cond.dtype} {tuple(cond.shape)}")
            return cond
        if self.null_text is None:
            raise ValueError("no text of the empty prompt: give a condition, or set null_text")
        return self.null_text.expand(batch, -1, -1)

    def drop_condition(self, cond: Tensor, mask: Tensor) -> Tensor:
        """`cond` with no class, or the empty prompt, where `mask` `(B,)` is true."""
        if self.num_classes:
            return torch.where(mask, self.num_classes, cond)
        return torch.where(mask[:, None, None], self.condition(None, len(cond)).to(cond), cond)


GEMMA: dict[str, dict[str, Any]] = {
    "gemma2_2b": {"head_dim": 256, "heads": 8, "kv_heads": 4},
    "gemma3_1b": {"head_dim": 256, "heads": 4, "kv_heads": 1, "qk_norm": True, "ratio": 6.0},
    "gemma3_4b": {"head_dim": 256, "heads": 8, "kv_heads": 4, "qk_norm": True},
}


def plain(head_dim: int) -> Callable[[int], Layer]:
    """Makes layers of STARFlow with heads of a size."""
    return lambda dim: plain_layer(dim, head_dim)


def _gemma(**sizes: Any) -> Callable[[int], Layer]:
    return lambda dim: gemma_layer(dim, **sizes)


def at_aspect(net: nn.Module, aspect: str) -> STARFlow:
    """A flow whose samples have another aspect and about as many tokens; its places cover the same range, see `Rotary`.

    Args:
        net: The flow, which is changed.
        aspect: One of `ASPECTS`, width:height.

    Raises:
        UserError: another network, another aspect, or one that whole patches do not come near.
    """
    if not isinstance(net, STARFlow):
        raise UserError(f"aspect={aspect}: {type(net).__name__} has samples of its own shape only, expected a STARFlow")
    if aspect not in ASPECTS:
        raise UserError(f"aspect={aspect}: expected one of {', '.join(ASPECTS)}{did_you_mean(aspect, ASPECTS)}")
    *front, height, width = net.shape
    sizes = {each: aspect_size(each, (height * width) ** 0.5, net.patch) for each in ASPECTS}
    if nearest_aspect(*sizes[aspect]) != aspect:
        found, known = "x".join(map(str, sizes[aspect])), [a for a in ASPECTS if nearest_aspect(*sizes[a]) == a]
        raise UserError(
            f"aspect={aspect}: {height}x{width} becomes {found} in patches of {net.patch}x{net.patch}, which is nearer "
            f"to {nearest_aspect(*sizes[aspect])}; expected one of {', '.join(known)}"
        )
    net.shape = (*front, *sizes[aspect])
    return net


def starflow_xl(shape: Sequence[int] = (4, 32, 32), num_classes: int = 1000) -> STARFlow:
    """STARFlow XL for ImageNet (arXiv 2506.06276): 1,412,255,816 parameters with 1000 classes."""
    return STARFlow(shape, 2048, (2, 2, 2, 2, 2, 18), num_classes=num_classes, side=32)


def starflow_xxl(shape: Sequence[int] = (4, 32, 32), text_dim: int = 2048) -> STARFlow:
    """STARFlow XXL, text to image, the released "3B" (arXiv 2506.06276): 3,858,281,544 parameters."""
    return STARFlow(shape, 3072, (2, 2, 2, 2, 2, 24), text_dim=text_dim, side=32)


def starflow_v_7b(shape: Sequence[int] = (21, 48, 30, 53), text_dim: int = 2048) -> STARFlow:
    """STARFlow-V, the released "7B" without its denoiser (arXiv 2511.20462): 5,977,211,744 parameters."""
    return STARFlow(shape, 3072, (2, 2, 2, 2, 2, 24), 4096, text_dim=text_dim, side=32)
