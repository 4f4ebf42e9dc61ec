"""PIIP-LLaVA (arXiv 2501.07783): what a pyramid sees in an image, read by a language model in place of a token."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from timm.models.convnext import ConvNeXtBlock
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.conversation import IGNORED, IMAGE_ID, Prompt
from penstock.lightning_modules.nets.language_model import LanguageModel
from penstock.lightning_modules.nets.piip.llava_tower import AddedMlps, LlavaTower


class Read(NamedTuple):
    """What the language model reads: `embedded` `(B, T, D)`, `mask` bool `(B, T)`, `labels` int64 `(B, T)`, and the
    lengths of the whole conversations, which may be longer than T."""

    embedded: Tensor
    mask: Tensor
    labels: Tensor
    lengths: list[int]


def spliced(
    prompts: Sequence[Prompt], visual: Tensor, embed: Any, most: int | None = None, at_end: bool = False
) -> Read:
    """Embedded conversations with the image's tokens where their images stand, padded to the longest.

    Args:
        prompts: Of a batch; a text without an image leaves its own unread.
        visual: `(B, N, D)`.
        embed: Makes vectors `(n, D)` of tokens `(n,)`.
        most: Length at which conversations are cut.
        at_end: Whether texts end together and padding comes before them, as for generation.
    """
    rows, labels = [], []
    for prompt, image in zip(prompts, visual):
        place = (prompt.ids == IMAGE_ID).nonzero().flatten().tolist()
        words = embed(prompt.ids[prompt.ids != IMAGE_ID].to(image.device)).to(image)
        label = prompt.labels.to(image.device)
        if place:
            (k,) = place
            words = torch.cat([words[:k], image, words[k:]])
            label = torch.cat([label[:k], label.new_full((len(image),), IGNORED), label[k + 1 :]])
        rows.append(words[:most])
        labels.append(label[:most])
        if not place:
            rows[-1] = rows[-1] + 0 * image.sum()  # as much to differentiate on every rank
    lengths = [len(prompt.ids) + (len(visual[0]) - 1) * int((prompt.ids == IMAGE_ID).sum()) for prompt in prompts]
    longest = max(map(len, rows))
    embedded, padded = visual.new_zeros(len(rows), longest, visual.shape[2]), labels[0].new_full((1,), IGNORED)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool, device=visual.device)
    wanted = padded.repeat(len(rows), longest)
    for k, (row, label) in enumerate(zip(rows, labels)):
        own = slice(longest - len(row), longest) if at_end else slice(0, len(row))
        embedded[k, own], wanted[k, own], mask[k, own] = row, label, True
    return Read(embedded, mask, wanted, lengths)


class LlavaNet(nn.Module):
    """Images and conversations to logits of the answers' tokens.

    Args:
        tower: Eyes.
        language: Model.

    Attributes:
        checkpoint_blocks: Classes of the blocks of both.
        forward_methods: What can be called beside `forward`.
    """

    forward_methods = ("generate",)

    def __init__(self, tower: LlavaTower, language: LanguageModel):
        super().__init__()
        self.tower, self.language = tower, language
        self.projector = AddedMlps(tower.dims, language.dim)
        self.checkpoint_blocks = (Block, ConvNeXtBlock, *language.checkpoint_blocks)

    def load(self) -> None:
        """Pretrained weights of tower and language model.

        Raises:
            UserError: as these.
        """
        self.tower.load()
        self.language.load()

    def visual(self, image: Tensor) -> Tensor:
        """Tokens `(B, N, D)` of images `(B, C, H, W)`, normalised as ImageNet's."""
        return self.projector(self.tower(image))

    def forward(self, image: Tensor, prompts: Sequence[Prompt], most: int) -> tuple[Tensor, Tensor, Read]:
        """Logits `(n, V)` of the n tokens of answers of all conversations, these tokens `(n,)`, and what was read.

        Args:
            image: `(B, C, H, W)`.
            prompts: B conversations.
            most: Length at which they are cut, the image's tokens included.

        Raises:
            UserError: an image that fills it all.
        """
        if self.tower.tokens >= most:
            raise UserError(
                f"model.max_length: found {most}, expected more than the {self.tower.tokens} tokens of an image"
            )
        read = spliced(prompts, self.visual(image), self.language.embed, most)
        following = torch.cat([read.labels[:, 1:], torch.full_like(read.labels[:, :1], IGNORED)], 1)
        wanted = following != IGNORED
        return self.language(read.embedded, read.mask, wanted), following[wanted], read

    def generate(self, image: Tensor, prompts: Sequence[Prompt], most: int, end: str = "") -> list[str]:
        """Answers to conversations that end with a question; see `LanguageModel.generate`."""
        read = spliced(prompts, self.visual(image), self.language.embed, at_end=True)
        return self.language.generate(read.embedded, read.mask, most, end)
