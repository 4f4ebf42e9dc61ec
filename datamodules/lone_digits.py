"""Pictures of one digit each, at three octaves of scale, for classification."""

import numpy as np
import torch
from sklearn.datasets import load_digits

from penstock.datamodules.base import KindDataModule, TensorStore, fingerprint
from penstock.datamodules.digit_scenes import enlarged_ink, shares
from penstock.datamodules.pixels import Pixels
from penstock.lightning_modules.errors import UserError

HEIGHTS = ((14, 18), (28, 36), (52, 60))
SHIFT = 2
GROUND = 0.2


def draw_lone(rng: np.random.Generator, digit: np.ndarray, side: int) -> np.ndarray:
    """uint8 `(side, side, 3)`: a bright digit on dark ground near the middle, at one of three octaves of height.

    Nothing else differs from picture to picture, so that transformers of random weights learn them in minutes; with
    textures, digits darker than the ground and places all over the picture they learn nothing in as long.

    Args:
        rng: what is drawn from.
        digit: of ink, `(8, 8)` in [0, 1].
        side: of the picture in pixels, at least 64.
    """
    canvas = np.full((side, side, 3), GROUND)
    lowest, highest = HEIGHTS[rng.integers(len(HEIGHTS))]
    ink = enlarged_ink(digit, int(rng.integers(lowest, highest + 1)), rng, longest=highest)
    colour = GROUND + rng.uniform(0.25, 0.6) + rng.uniform(-0.1, 0.1, 3)
    shifts = rng.integers(-SHIFT, SHIFT + 1, 2)
    y, x = (int(np.clip((side - length) // 2 + shift, 0, side - length)) for length, shift in zip(ink.shape, shifts))
    place = canvas[y : y + ink.shape[0], x : x + ink.shape[1]]
    place += ink[..., None] * (colour - place)
    return (canvas * 255).round().astype(np.uint8)


class LoneDigits(KindDataModule):
    """RGB images `(3, S, S)` with one hand-written digit each, labelled by it; `draw_lone` says how they are drawn.

    The pictures are the same for every seed of a run. Those of training, validation and test show different digits: 60,
    15 and 25 of a hundred of scikit-learn's 1,797.

    Args:
        pictures: for training; validation and test have a quarter of so many each.
        image_size: side of the pictures, at least 64.
        batch_size: global training batch.
        eval_batch_size: global batch of evaluation; `None` = `batch_size`.
        num_workers: worker processes a rank; the set lies in memory, 0 is fastest.
        seed: key of the order; `None` = the seed of the run.

    Raises:
        UserError: a number of pictures or a size out of range.
    """

    def __init__(
        self,
        pictures: int = 8000,
        image_size: int = 64,
        batch_size: int = 64,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        for key, value, least in (("pictures", pictures, 4), ("image_size", image_size, 64)):
            if value < least:
                raise UserError(f"data.{key}: found {value}, expected at least {least}")
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            pixels=Pixels(),
        )
        self.counts, self.side = (pictures, pictures // 4, pictures // 4), image_size

    def build(self) -> tuple[TensorStore, dict[str, np.ndarray]]:
        inks, labels = load_digits(return_X_y=True)
        inks = inks.reshape(-1, 8, 8) / 16
        drawn, shown = [], []
        for stream, (choices, count) in enumerate(zip(shares(len(inks)), self.counts)):
            for n in range(count):
                rng = np.random.default_rng((stream, n))
                shown.append(int(rng.choice(choices)))
                drawn.append(draw_lone(rng, inks[shown[-1]], self.side))
        images, labels = np.stack(drawn).transpose(0, 3, 1, 2), labels[shown].astype(np.int64)
        self.shape, self.num_classes, self.class_names = images.shape[1:], 10, [str(n) for n in range(10)]
        self.fingerprint = fingerprint("lone digits", images, labels, self.pixels)
        bounds = np.cumsum([0, *self.counts])
        numbers = {name: np.arange(bounds[k], bounds[k + 1]) for k, name in enumerate(("train", "val", "test"))}
        return TensorStore(image=torch.from_numpy(images.copy()), label=torch.from_numpy(labels)), numbers
