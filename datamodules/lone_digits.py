"""Pictures of one digit each, for classification: what detection's scenes are made of, alone."""

import numpy as np
import torch
from sklearn.datasets import load_digits

from penstock.datamodules.base import KindDataModule, TensorStore, fingerprint
from penstock.datamodules.digit_scenes import OCTAVES, background, enlarged_ink, lay, shares
from penstock.datamodules.pixels import Pixels
from penstock.lightning_modules.errors import UserError


def draw_lone(rng: np.random.Generator, digit: np.ndarray, side: int) -> np.ndarray:
    """uint8 `(side, side, 3)`: a digit `(8, 8)` in [0, 1] somewhere, at one of three octaves of height.

    Args:
        rng: what is drawn from.
        digit: of ink.
        side: of the picture in pixels, at least that of the largest octave.
    """
    canvas = background(rng, side)
    lowest, highest = OCTAVES[rng.integers(len(OCTAVES))]
    ink = enlarged_ink(digit, int(rng.integers(lowest, highest + 1)), rng)
    x, y = (int(rng.integers(0, side - length + 1)) for length in (ink.shape[1], ink.shape[0]))
    lay(canvas[y : y + ink.shape[0], x : x + ink.shape[1]], ink, rng)
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
        pictures: int = 4000,
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
