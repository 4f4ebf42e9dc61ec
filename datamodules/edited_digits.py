"""Embedded pairs of clips for video-to-video: moving digits, and what an instruction makes of them."""

from typing import Any, Literal, get_args

import numpy as np
import torch
from scipy.ndimage import grey_dilation
from torch import Tensor

from penstock.datamodules.base import KindDataModule, Split, fingerprint
from penstock.datamodules.moving_digits import BouncingDigits, MovingDigits
from penstock.kernels.philox import Draws
from penstock.lightning_modules.errors import UserError, did_you_mean

Edit = Literal["mirror", "flip", "invert", "thicken", "outline", "reverse"]
EDITS: tuple[Edit, ...] = get_args(Edit)
CAPTIONS: dict[Edit, str] = {
    "mirror": "mirror it left to right",
    "flip": "turn it upside down",
    "invert": "swap black and white",
    "thicken": "thicken the strokes",
    "outline": "show the outlines only",
    "reverse": "play it backwards",
}
WHITE = 16


def edited(clips: np.ndarray, edit: Edit) -> np.ndarray:
    """Clips after an edit.

    `thicken` gives every pixel the largest level of the 3x3 around it; `outline` what that adds to the clip.

    Args:
        clips: grey levels 0..16, uint8 `(B, T, 1, H, W)`.
        edit: one of `EDITS`.

    Returns:
        uint8 of the same shape.
    """
    if edit in ("mirror", "flip", "reverse"):
        return np.flip(clips, {"mirror": 4, "flip": 3, "reverse": 1}[edit])
    if edit == "invert":
        return WHITE - clips
    thick = grey_dilation(clips, (1, 1, 1, 3, 3), mode="constant")
    return thick if edit == "thicken" else thick - clips


class EditedClips:
    """Pairs by number: the clip of that number is the source, and which edit it gets is drawn from (seed, number).

    Args:
        clips: the sources.
        edits: that may be drawn, with equal chance.
    """

    def __init__(self, clips: BouncingDigits, edits: tuple[Edit, ...]) -> None:
        self.clips, self.edits = clips, edits

    def kinds(self, numbers: np.ndarray) -> np.ndarray:
        """Which of `edits` each clip gets, int64 `(B,)`."""
        index = torch.from_numpy(np.asarray(numbers, dtype=np.int64))
        return (Draws(self.clips.seed, 0, index).uniform("edit").double().numpy() * len(self.edits)).astype(np.int64)

    def captions(self, numbers: np.ndarray) -> list[str]:
        """What is done to each clip."""
        return [CAPTIONS[self.edits[kind]] for kind in self.kinds(numbers)]

    def fetch(self, numbers: np.ndarray) -> dict[str, Any]:
        """`video`, the edited clips; `source`, the clips; `text`, the edits; `label`, class of the first digit."""
        found, kinds = self.clips.fetch(numbers), self.kinds(numbers)
        source, video = found["video"].numpy(), np.empty_like(found["video"].numpy())
        for kind, edit in enumerate(self.edits):
            video[kinds == kind] = edited(source[kinds == kind], edit)
        return found | {"video": torch.from_numpy(video), "source": found["video"], "text": self.captions(numbers)}

    def sources(self, numbers: np.ndarray) -> Tensor:
        """The clips without edits."""
        return self.clips.fetch(numbers)["video"]

    def warm(self, numbers: np.ndarray) -> None:
        """Nothing to read ahead."""


class EditedDigits(KindDataModule):
    """Clips made of clips: `source` shows moving digits, `video` the same after the edit that `text` asks for.

    The edits: `mirror` (left to right), `flip` (upside down), `invert` (the greys), `thicken` and `outline` (the
    strokes), `reverse` (in time). Pairs are made when asked for and depend on the seed of `digits` and their number
    alone; the digits of validation and test are none of training's. A network sees `source` and `video` in one
    sequence of twice the frames.

    Args:
        digits: the sources; sizes, workers and seed are those of the whole.
        edits: that are drawn, with equal chance; None = all.
        batch_size: global training batch; None = that of `digits`.
        eval_batch_size: global batch of evaluation; None = `batch_size`, or that of `digits`.

    Raises:
        UserError: no edit, or an unknown one.
    """

    sourced = True

    def __init__(
        self,
        digits: MovingDigits,
        edits: list[Edit] | None = None,
        batch_size: int | None = None,
        eval_batch_size: int | None = None,
    ) -> None:
        super().__init__(
            batch_size=digits.batch_size if batch_size is None else batch_size,
            eval_batch_size=eval_batch_size or batch_size or digits.eval_batch_size,
            num_workers=digits.num_workers,
            seed=digits.seed,
            pixels=digits.pixels,
        )
        self.digits, self.edits = digits, EDITS if edits is None else tuple(edits)
        for edit in self.edits or ("",):
            if edit not in EDITS:
                near = did_you_mean(edit, EDITS)
                raise UserError(f"data.edits: found '{edit}', expected some of {', '.join(EDITS)}{near}")

    def build(self) -> tuple[EditedClips, dict[str, np.ndarray]]:
        clips, numbers = self.digits.build()
        digits = self.digits
        self.shape, self.num_classes, self.class_names = digits.shape, digits.num_classes, digits.class_names
        self.fingerprint = fingerprint("edited_digits", digits.fingerprint, self.edits)
        return EditedClips(clips, self.edits), numbers

    def texts(self, rows: Tensor | np.ndarray) -> list[str]:
        """Prompts of any numbers >= 0, one for each of `rows` `(b,)`: the training captions, over and over."""
        numbers = self.numbers["train"]
        return self.store.captions(numbers[torch.as_tensor(rows).cpu().numpy() % len(numbers)])

    def prompts(self, n: int, split: Split = "test") -> tuple[list[str], Tensor]:
        """Captions, and classes of the first digit int64 `(n,)`, of the first `n` pairs of a split, over and over."""
        numbers = np.resize(self.view(split).numbers, n)
        clips = self.store.clips
        return self.store.captions(numbers), torch.from_numpy(clips.labels[clips.moves(numbers).digit[:, 0]])
