"""CLIP's image transformer (arXiv 2103.00020) as a branch of a pyramid: a norm before the blocks, none behind them."""

import re
from collections.abc import Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.piip.interaction import State
from penstock.lightning_modules.nets.piip.resizing import resized_table
from penstock.lightning_modules.nets.piip.timm_branch import created
from penstock.lightning_modules.nets.piip.vit import TransformerBranch

OF_TRANSFORMERS = [
    (r"^(vision_model|clip_model)\.", ""),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^embeddings\.patch_embedding\.", "patch_embed."),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^encoder\.layers\.", "blocks."),
    (r"\.layer_norm([12])\.", r".norm\1."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
]
PART = re.compile(r"\.self_attn\.[qkv]_proj\.")


def timm_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of transformers' `CLIPVisionModel` under timm's names; one that has these stays.

    Queries, keys and values become one layer, the class token and the table of positions get timm's shapes.
    """
    found = {}
    for name, value in state.items():
        for pattern, replacement in OF_TRANSFORMERS:
            name = re.sub(pattern, replacement, name)
        found[name] = value
    for name in [name for name in found if ".self_attn.q_proj." in name]:
        parts = [name.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if all(part in found for part in parts):
            found[PART.sub(".attn.qkv.", name)] = torch.cat([found.pop(part) for part in parts])
    if "cls_token" in found and found["cls_token"].ndim == 1:
        found["cls_token"] = found["cls_token"][None, None]
    if "pos_embed" in found and found["pos_embed"].ndim == 2:
        found["pos_embed"] = found["pos_embed"][None]
    return found


class ClipBranch(TransformerBranch):
    """All blocks of CLIP's image transformer, as PIIP-LLaVA uses it (arXiv 2501.07783).

    The class token has a position of its own and goes around the blocks only; patches have no bias, and a norm comes
    before the first block.

    Args:
        model: timm model name of such a transformer.
        size: See `VitBranch`, as of all others.
        groups: Likewise.
        weights: `hub`, a file of timm's or of transformers' state dict of the model, or `random`.
        patch: Likewise.
        in_chans: Likewise.
        embed_dim: Likewise.
        depth: Likewise.
        num_heads: Likewise.

    Raises:
        UserError: as `VitBranch`, or a model without a norm before its blocks.
    """

    def __init__(
        self,
        model: str,
        size: int,
        groups: int | Sequence[int] = 12,
        weights: str = "hub",
        patch: int = 16,
        in_chans: int = 3,
        embed_dim: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
    ):
        if embed_dim and num_heads and embed_dim % num_heads:
            raise UserError(f"num_heads: found {num_heads}, expected a divisor of embed_dim {embed_dim}")
        shape = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
        own = {name: value for name, value in shape.items() if value is not None}
        net = created(model, VisionTransformer, num_classes=0, in_chans=in_chans, **own)
        if isinstance(net.norm_pre, nn.Identity):
            raise UserError(
                f"model: {model} has no norm before its blocks, expected one of CLIP's, such as "
                "vit_base_patch16_clip_quickgelu_224.openai"
            )
        super().__init__(net, model, size, groups, weights, patch=patch)
        self.patch_embed = nn.Conv2d(in_chans, net.embed_dim, patch, patch, bias=False)
        self.cls_position = nn.Parameter(torch.empty_like(self.cls_token))
        nn.init.trunc_normal_(self.cls_position, std=0.02)

    def load_pretrained(self, state: dict[str, Tensor]) -> None:
        """Loads a state dict of the same model, of timm's or transformers' names, whatever its grid and patch.

        Raises:
            UserError: weights of another model.
        """
        super().load_pretrained(timm_state(state))

    def embed(self, image: Tensor) -> State:
        """Images `(B, C, h, w)` as normed tokens with positions, h and w multiples of the patch."""
        x = self.patch_embed(image)
        grid = tuple(x.shape[2:])
        x = x.flatten(2).transpose(1, 2) + resized_table(self.pos_embed, grid)
        cls = (self.cls_token + self.cls_position).expand(len(x), -1, -1)
        return self._state(self.norm_pre(torch.cat([cls, x], 1)), grid)

    def _positions(self, table: Tensor, cls_token: Tensor | None) -> dict[str, Tensor]:
        """The table of a checkpoint for this grid, and the class token's position apart."""
        return super()._positions(table, None) | {"cls_position": table[:, :1]}
