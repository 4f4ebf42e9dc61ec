"""InternViT-6B (arXiv 2312.14238) as a branch of a pyramid."""

from collections.abc import Sequence
from functools import partial

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.piip.vit import TransformerBranch
from penstock.lightning_modules.timm_weights import read_weights

HUB = "OpenGVLab/InternVL", "intern_vit_6b_224px.pth"


class HeadsNorm(nn.RMSNorm):
    """RMS norm of queries or keys over the channels of all heads together."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, heads, N, channels)`."""
        return super().forward(x.transpose(1, 2).flatten(2)).unflatten(2, (x.shape[1], -1)).transpose(1, 2)


class InternVitBranch(TransformerBranch):
    """A vision transformer with RMS norms, also of queries and keys, factors of layers, and no bias in projections.

    It was trained on patches of 14 in images of 224 pixels. 6B parameters: make it on the device or in the precision
    it is to have.

    Args:
        size: Side of its images, pixels, at the pyramid's nominal size.
        groups: Numbers of blocks in each group; a number is that many groups of equal length.
        weights: `hub`, the authors' file of it, or `random`.
        resize_table: Whether the table of positions is that of `size` from the start; else it stays that of
            pretraining, and each image resizes it.
        window: Side of windows of attention, cells; none without.
        global_blocks: Numbers of blocks that see the whole grid all the same.
        drop_path: Probability that an image skips a layer of the last block in training, linear from 0 at the first.
        layer_scale: Start of trained factors of each layer's channels.
        patch: Side of patches, pixels.
        in_chans: Channels of images.
        embed_dim: Of the tokens.
        depth: Number of blocks.
        num_heads: Of attention.
        mlp_ratio: Of hidden layers.

    Raises:
        UserError: as `TransformerBranch`, or heads that do not divide the tokens.
    """

    def __init__(
        self,
        size: int,
        groups: int | Sequence[int] = 12,
        weights: str = "hub",
        resize_table: bool = False,
        window: int | None = None,
        global_blocks: Sequence[int] = (),
        drop_path: float = 0.0,
        layer_scale: float = 0.1,
        patch: int = 16,
        in_chans: int = 3,
        embed_dim: int = 3200,
        depth: int = 48,
        num_heads: int = 25,
        mlp_ratio: float = 4.0,
    ):
        if embed_dim % num_heads:
            raise UserError(f"num_heads: found {num_heads}, expected a divisor of embed_dim {embed_dim}")
        norm = partial(nn.RMSNorm, eps=1e-6)
        net = VisionTransformer(
            img_size=224,
            patch_size=14,
            in_chans=in_chans,
            num_classes=0,
            global_pool="avg",
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=False,
            init_values=layer_scale,
            class_token=False,
            norm_layer=norm,
        )
        for block in net.blocks:
            block.attn.q_norm, block.attn.k_norm = (HeadsNorm(embed_dim, eps=1e-6) for _ in range(2))
        super().__init__(
            net,
            "InternViT-6B",
            size,
            groups,
            weights,
            resize_table,
            window=window,
            global_blocks=global_blocks,
            pad="inputs",
            drop_path=drop_path,
            drop_path_rule="linear",
            patch=patch,
        )

    def load(self) -> None:
        """Pretrained weights, positions and patches resized; random ones stay.

        Raises:
            UserError: no weights, or those of another model.
        """
        if self.weights == "hub":
            from huggingface_hub import hf_hub_download

            self.load_pretrained(read_weights(hf_hub_download(*HUB), "weights", self.model))
        else:
            super().load()
