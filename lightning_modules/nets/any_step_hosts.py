"""Large text-to-image transformers of diffusers as velocity fields of one time (t = 0 noise, t = 1 data).

`AnyStep` gives them a target time, `HalfTime` the one number of the low-rank recipes (arXiv 2512.05150, official code).
Three of them count the other way, `s = 1 - t` here, and give noise minus data, which is minus our velocity.

| host | `E1` is asked at | `E2` at | `E2` weighs | `E2` begins | condition `(B, L, E)` |
|---|---|---|---|---|---|
| `StableDiffusion3` | 1000 (1 - t) | 1000 (1 - r) | r - t | normal, 0.02 | pooled features as a token in front |
| `Sana` | the same, times `timestep_scale` | | r - t | normal, 0.02 | mask as a last feature |
| `QwenImage` | 1 - t, times 1000 inside | 1 - r | r - t | copy | mask as a last feature |
| `ZImage` | t, times 1000 inside | 1000 (r - t) | r - t | copy | mask as a last feature |

The packing of conditions is that of `nets.prompt_features`. diffusers isn't imported here: its modules are given.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from penstock.lightning_modules.nets.any_step import Start
from penstock.lightning_modules.nets.condition import check_image_shape, check_input
from penstock.lightning_modules.nets.prompt_features import split_mask, split_pooled


class Host(nn.Module, ABC):
    """`net(x, t, cond)` around a transformer of diffusers, computed in the transformer's dtype.

    Args:
        transformer: the transformer, a `ModelMixin` with its `config`.
        shape: (C, H, W) of the latents; None is the size that the transformer was made for.
        null_text: condition `(L, E)` of the empty prompt; None: conditions have to be given, and can't be dropped.

    Attributes:
        twin: whether times in (1, 2], the twin's, differ from those in [0, 1).
        time_module: name of the time embedding, for `AnyStep`; `time_start`: how the second one begins.

    Raises:
        ValueError: a shape that doesn't fit the transformer, a variant of it that needs other inputs, or null features
            of another width.
    """

    num_classes = 0
    twin: ClassVar[bool] = True
    embedding: ClassVar[str] = "time_text_embed"
    time_start: ClassVar[Start] = "copy"
    blocks: ClassVar[str] = "transformer_blocks"
    unsupported: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, transformer: nn.Module, shape: tuple[int, int, int] | None = None, null_text: Tensor | None = None
    ):
        super().__init__()
        self.transformer, config = transformer, transformer.config
        found = [name for name in self.unsupported if config.get(name)]
        if found:
            raise self._error(f"a transformer with {found[0]} needs inputs that flows don't have, expected one without")
        channels, patch = self.latents(config)
        if shape is None:
            if config.get("sample_size") is None:
                raise self._error("its transformer has no size of its own, expected a shape")
            shape = (channels, config["sample_size"], config["sample_size"])
        check_image_shape(shape, patch, f"patches of {type(self).__name__}")
        if shape[0] != channels:
            raise self._error(f"latents of {shape[0]} channels, expected {channels}")
        self.shape, self.time_module = tuple(shape), f"transformer.{self.embedding}"
        self.checkpoint_blocks = (type(getattr(transformer, self.blocks)[0]),)
        if null_text is not None:
            self._check(null_text[None])
            null_text = self.trimmed(null_text)
        self.register_buffer("null_text", null_text, persistent=False)

    @staticmethod
    def latents(config: Mapping[str, Any]) -> tuple[int, int]:
        """Channels of the latents, and the side of a patch."""
        return config["in_channels"], config["patch_size"]

    @property
    @abstractmethod
    def width(self) -> int:
        """E of the condition."""

    @abstractmethod
    def clock(self, t: Tensor) -> Tensor:
        """The time `(B,)` that the transformer is given for our `t` `(B,)`."""

    @abstractmethod
    def velocity(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        """Velocity of `x` `(B, C, H, W)` at `t` `(B,)` for the condition `(B, L, E)`."""

    def second_time(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        """What the second embedding is asked at, and its weight, `(B,)` each, for steps from `t` to `r` `(B,)`."""
        return self.clock(r), r - t

    def drop_condition(self, cond: Tensor, mask: Tensor) -> Tensor:
        """`cond` `(B, L, E)` with the empty prompt where `mask` `(B,)` is true.

        Raises:
            ValueError: the empty prompt isn't known, or doesn't fit into `(L, E)`.
        """
        self._check(cond)
        return torch.where(mask[:, None, None], self.null(cond.shape[1]).to(cond), cond)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        """Velocity `(B, C, H, W)` at `x` and times `t` `(B,)` in [0, 2]; `cond` None is the empty prompt."""
        check_input(x, t, self.shape)
        cond = self.null().expand(len(x), -1, -1) if cond is None else cond
        self._check(cond)
        dtype = self.transformer.dtype
        return self.velocity(x.to(dtype), t, cond.to(dtype)).to(x.dtype)

    def null(self, length: int | None = None) -> Tensor:
        """Condition `(length, E)` of the empty prompt."""
        if self.null_text is None:
            raise self._error("no features of the empty prompt, expected null_text")
        found = self.null_text if length is None else self.fitted(self.null_text, length)
        if length not in (None, len(found)):
            raise self._error(f"features of {length} tokens, expected {len(found)}, those of the empty prompt")
        return found

    def trimmed(self, null_text: Tensor) -> Tensor:
        """Features of the empty prompt without what is padding."""
        return null_text

    def fitted(self, null_text: Tensor, length: int) -> Tensor:
        """Features of the empty prompt with padding up to `length`, where there is any."""
        return null_text

    def _check(self, cond: Tensor) -> None:
        if cond.ndim != 3 or cond.shape[-1] != self.width or not cond.is_floating_point():
            found = f"{str(cond.dtype).removeprefix('torch.')} {tuple(cond.shape)}"
            raise self._error(f"expected float prompt features (B, L, {self.width}), got {found}")

    def _error(self, message: str) -> ValueError:
        return ValueError(f"{type(self).__name__}: {message}")


class StableDiffusion3(Host):
    """Stable Diffusion 3 and 3.5, an `SD3Transformer2DModel` (arXiv 2403.03206).

    The condition is `(B, 1 + L, max(J, P))`: pooled features of P numbers, then tokens of J, all attended to, as the
    official pipeline and TwinFlow's code do. Both embeddings of time see the pooled features.
    """

    time_start = "normal"

    @property
    def width(self) -> int:
        return max(self.transformer.config.joint_attention_dim, self.transformer.config.pooled_projection_dim)

    def clock(self, t: Tensor) -> Tensor:
        return 1000 * (1 - t)

    def velocity(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        config = self.transformer.config
        tokens, pooled = split_pooled(cond, config.joint_attention_dim, config.pooled_projection_dim)
        named = {"encoder_hidden_states": tokens, "pooled_projections": pooled, "timestep": self.clock(t)}
        return -self.transformer(x, **named, return_dict=False)[0]


class Masked(Host):
    """A host whose condition `(B, L, E)` has the tokens' mask as a last feature; padding comes last."""

    def trimmed(self, null_text: Tensor) -> Tensor:
        return null_text[: int(split_mask(null_text)[1].sum())]

    def fitted(self, null_text: Tensor, length: int) -> Tensor:
        return F.pad(null_text, (0, 0, 0, max(0, length - len(null_text))))


class Sana(Masked):
    """SANA and the image half of OpenUni, a `SanaTransformer2DModel` (arXiv 2410.10629)."""

    embedding = "time_embed"
    time_start = "normal"
    unsupported = ("guidance_embeds",)

    @property
    def width(self) -> int:
        return self.transformer.config.caption_channels + 1

    def clock(self, t: Tensor) -> Tensor:
        return 1000 * self.transformer.config.timestep_scale * (1 - t)

    def velocity(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        tokens, mask = split_mask(cond)
        named = {"encoder_hidden_states": tokens, "encoder_attention_mask": mask, "timestep": self.clock(t)}
        return -self.transformer(x, **named, return_dict=False)[0]


class QwenImage(Masked):
    """Qwen-Image, a `QwenImageTransformer2DModel` (arXiv 2508.02324), which gets its 2x2 patches here.

    What the last block does to the tokens after its attention reaches no output; those weights don't train.
    """

    unsupported = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")

    def __init__(
        self, transformer: nn.Module, shape: tuple[int, int, int] | None = None, null_text: Tensor | None = None
    ):
        super().__init__(transformer, shape, null_text)
        last = transformer.transformer_blocks[-1]
        for part in (last.attn.to_add_out, last.txt_mlp):
            part.requires_grad_(False)

    @staticmethod
    def latents(config: Mapping[str, Any]) -> tuple[int, int]:
        return config["in_channels"] // config["patch_size"] ** 2, config["patch_size"]

    @property
    def width(self) -> int:
        return self.transformer.config.joint_attention_dim + 1

    def clock(self, t: Tensor) -> Tensor:
        return 1 - t

    def velocity(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        side = self.transformer.config.patch_size
        patches = F.pixel_unshuffle(x, side)
        size = tuple(patches.shape[-2:])
        tokens, mask = split_mask(cond)
        named = {"encoder_hidden_states": tokens, "encoder_hidden_states_mask": mask, "timestep": self.clock(t)}
        shapes = [[(1, *size)]] * len(x)
        found = self.transformer(patches.flatten(2).mT, **named, img_shapes=shapes, return_dict=False)[0]
        return -F.pixel_shuffle(found.mT.unflatten(2, size), side)


class ZImage(Masked):
    """Z-Image and its Turbo, a `ZImageTransformer2DModel` (arXiv 2511.22699); for inference.

    Its clock runs as ours does, and so does its velocity. The released wrapper takes sign and size of its times apart,
    so that the twin's times reach the embedding as those of the data (t and 2 - t are the same): no twin can be
    trained. Tokens go in as one list entry a sample, whose lengths are read on the host.

    Args:
        released_end: What a target r = 1 is, from any t < 1: r = 0 for the second embedding, whose part
            `t E2(-1000 t)` vanishes at t = 0, as in the released wrapper, where `sign(0) = 0` makes it so and whose
            weights know nothing else; or, if false, 1.
    """

    twin = False
    embedding = "t_embedder"
    blocks = "layers"

    def __init__(
        self,
        transformer: nn.Module,
        shape: tuple[int, int, int] | None = None,
        null_text: Tensor | None = None,
        released_end: bool = True,
    ):
        super().__init__(transformer, shape, null_text)
        self.released_end = released_end

    @staticmethod
    def latents(config: Mapping[str, Any]) -> tuple[int, int]:
        return config["in_channels"], config["all_patch_size"][0]

    @property
    def width(self) -> int:
        return self.transformer.config.cap_feat_dim + 1

    def clock(self, t: Tensor) -> Tensor:
        return torch.where(t > 1, 2 - t, t).double()

    def second_time(self, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        t, r = self.clock(t), self.clock(r)
        if self.released_end:
            r = torch.where((r == 1) & (t < 1), 0, r)
        return self.transformer.config.t_scale * (r - t), (r - t).abs()

    def velocity(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        tokens, mask = split_mask(cond)
        lengths = mask.sum(1).tolist()
        if 0 in lengths:
            raise self._error(f"no token in the prompt of row {lengths.index(0)}, expected at least one in each")
        texts = [row[:length] for row, length in zip(tokens, lengths)]
        patch = self.transformer.config.all_patch_size[0]
        found = self.transformer(list(x[:, :, None]), self.clock(t), texts, patch_size=patch, return_dict=False)[0]
        return torch.stack(found).squeeze(2)
