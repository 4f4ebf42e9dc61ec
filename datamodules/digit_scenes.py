"""The embedded detection set: scikit-learn's digits in scenes, at three octaves of scale."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits

from penstock.datamodules.annotations import annotations
from penstock.datamodules.base import fingerprint, held_out
from penstock.datamodules.boxed import BoxedData, BoxedStore
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.instance_masks import Rle, encoded

OCTAVES = ((8, 11), (16, 22), (32, 44))
MOST, EMPTY, TRIES = 8, 0.05, 40
OVERLAP = 0.1
INK = 0.25
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Scene:
    """A picture uint8 `(S, S, 3)` with boxes `[(x1, y1, x2, y2)]` and `digits`, their numbers.

    `mask`, uint8 `(S, S)`, is 0 where there is no ink, else the place of its digit in `digits`, from 1.
    """

    picture: np.ndarray
    boxes: list[tuple[int, int, int, int]]
    digits: list[int]
    mask: np.ndarray


def draw_scene(rng: np.random.Generator, images: np.ndarray, choices: np.ndarray, side: int) -> Scene:
    """A scene of up to 8 digits, one in twenty of none.

    Each is cut to its ink, enlarged to one of three octaves of height and to 0.7 .. 1.4 times its own aspect, and laid
    over the background in a colour that differs from it. Its box is tight around its ink. No more than a tenth of the
    smaller of two boxes lies in the other.

    Args:
        rng: what is drawn from.
        images: float `(n, 8, 8)` in [0, 1].
        choices: numbers of the digits to choose from.
        side: of the scene in pixels.
    """
    canvas, boxes, digits = background(rng, side), [], []
    mask = np.zeros((side, side), dtype=np.uint8)
    count = 0 if rng.random() < EMPTY else int(rng.integers(1, MOST + 1))
    for octave in np.sort(rng.integers(len(OCTAVES), size=count))[::-1]:
        digit = int(rng.choice(choices))
        ink = enlarged_ink(images[digit], int(rng.integers(OCTAVES[octave][0], OCTAVES[octave][1] + 1)), rng)
        height, width = ink.shape
        for _ in range(TRIES):
            x, y = (int(rng.integers(0, side - length + 1)) for length in (width, height))
            box = (x, y, x + width, y + height)
            if all(_shared(box, other) <= OVERLAP for other in boxes):
                lay(canvas[y : y + height, x : x + width], ink, rng)
                boxes.append(box)
                digits.append(digit)
                mask[y : y + height, x : x + width][ink > 0] = len(digits)
                break
    return Scene((canvas * 255).round().astype(np.uint8), boxes, digits, mask)


def background(rng: np.random.Generator, side: int) -> np.ndarray:
    """float32 `(side, side, 3)` in [0, 1]: clouds or stripes around a colour, with noise."""
    colour = rng.uniform(0.2, 0.8, 3).astype(np.float32)
    if rng.random() < 0.5:
        cells = int(rng.integers(2, 9))
        texture = _zoomed(rng.random((cells, cells)), (side, side)) - 0.5
    else:
        angle, along = rng.uniform(0, np.pi), np.arange(side) * (2 * np.pi / rng.uniform(12, 48))
        phase = along[:, None] * np.cos(angle) + along * np.sin(angle) + rng.uniform(0, 2 * np.pi)
        texture = 0.5 * np.sin(phase.astype(np.float32))
    canvas = rng.standard_normal((side, side, 3), dtype=np.float32)
    canvas *= rng.uniform(0, 0.06)
    canvas += colour + np.float32(rng.uniform(0.05, 0.3)) * texture[..., None]
    return canvas.clip(0, 1)


def enlarged_ink(digit: np.ndarray, height: int, rng: np.random.Generator, longest: int = OCTAVES[-1][1]) -> np.ndarray:
    """Opacity `(h, w)`, 0 or in [0.25, 1], of a digit `(8, 8)`, no wider than `longest`.

    No outer row or column is without ink.
    """
    ink = tight(digit)
    width = round(height * ink.shape[1] / ink.shape[0] * rng.uniform(0.7, 1.4))
    opacity = _zoomed(ink, (height, min(max(width, 4), longest)))
    opacity = opacity / opacity.max()
    return tight(np.where(opacity < INK, 0, opacity))


def lay(place: np.ndarray, ink: np.ndarray, rng: np.random.Generator) -> None:
    """Lays ink `(h, w)` over a part `(h, w, 3)` of a scene, in a colour lighter or darker than it."""
    level = place.mean((0, 1))
    darker = rng.random() < level.mean()
    strength = rng.uniform(0.25, 0.6)
    colour = (level - strength if darker else level + strength) + rng.uniform(-0.1, 0.1, 3)
    place += ink[..., None] * (colour.clip(0, 1) - place)


def tight(image: np.ndarray) -> np.ndarray:
    """The part `(h, w)` of an image between its outermost pixels above the threshold of ink."""
    rows, columns = (np.flatnonzero((image >= INK).any(axis)) for axis in (1, 0))
    return image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _zoomed(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    zoomed = Image.fromarray(image.astype(np.float32)).resize(size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(zoomed).clip(0, 1)


def _shared(box: Sequence[int], other: Sequence[int]) -> float:
    """Intersection over the smaller area."""
    sides = [max(min(box[k + 2], other[k + 2]) - max(box[k], other[k]), 0) for k in (0, 1)]
    return sides[0] * sides[1] / min((b[2] - b[0]) * (b[3] - b[1]) for b in (box, other))


class DrawnSource:
    """Pictures that lie in memory, uint8 `(n, S, S, 3)`."""

    labels, class_names = None, ()

    def __init__(self, pictures: np.ndarray) -> None:
        self.pictures = pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def where(self, row: int) -> str:
        return f"scene {row}"

    def open(self, row: int) -> Image.Image:
        return Image.fromarray(self.pictures[row])

    def content(self) -> str:
        return fingerprint(self.pictures)


class DigitScenes(BoxedData):
    """Scenes of hand-written digits, ten classes, with boxes; `BoxedData` says what is in a batch, `draw_scene` how.

    The scenes are the same for every seed of a run. Those of training, validation and test show different digits: 60,
    15 and 25 of a hundred of scikit-learn's 1,797.

    Args:
        scenes: for training; validation and test have a quarter of so many each.
        image_size: side of the scenes, at least 64.
        keep_empty: train on scenes without digits, too.
        masks: the ink of every digit as its mask, too.
        batch_size: global training batch.
        eval_batch_size: global batch of evaluation; `None` = `batch_size`.
        num_workers: worker processes a rank; the set lies in memory, 0 is fastest.
        seed: key of the order; `None` = the seed of the run.

    Raises:
        UserError: a number of scenes or a size out of range.
    """

    def __init__(
        self,
        scenes: int = 800,
        image_size: int = 128,
        keep_empty: bool = False,
        masks: bool = False,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        for key, value, least in (("scenes", scenes, 4), ("image_size", image_size, 64)):
            if value < least:
                raise UserError(f"data.{key}: found {value}, expected at least {least}")
        super().__init__(
            min_size=image_size,
            max_size=image_size,
            pad_multiple=32,
            flip=False,
            group_aspects=False,
            keep_empty=keep_empty,
            memory_gb=1.0,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.counts, self.side, self.masks = (scenes, scenes // 4, scenes // 4), image_size, masks

    def build(self) -> tuple[BoxedStore, dict[str, np.ndarray]]:
        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8) / 16
        scenes = [
            draw_scene(np.random.default_rng((stream, n)), images, choices, self.side)
            for stream, (choices, count) in enumerate(zip(shares(len(images)), self.counts))
            for n in range(count)
        ]
        boxes = [box for scene in scenes for box in scene.boxes]
        table = annotations(
            [(self.side, self.side)] * len(scenes),
            np.repeat(np.arange(len(scenes)), [len(scene.boxes) for scene in scenes]),
            boxes,
            labels[[digit for scene in scenes for digit in scene.digits]],
            np.zeros(len(boxes)),
            [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in boxes],
            image_ids=np.concatenate([np.arange(1, count + 1) for count in self.counts]),
            where=str,
            place="digit scenes",
            masks=[rle for scene in scenes for rle in _inks(scene)] if self.masks else None,
        )
        self.class_names, self.category_ids = [str(n) for n in range(10)], list(range(10))
        edges = np.cumsum([0, *self.counts])
        numbers = {split: np.arange(a, b) for split, a, b in zip(SPLITS, edges, edges[1:])}
        source = DrawnSource(np.stack([scene.picture for scene in scenes]))
        kept = (source.content(), table.boxes, self.counts, self.keep_empty)
        self.fingerprint = fingerprint("digit_scenes", *kept, *(["masks"] * self.masks))
        return self.furnish(table, source, numbers)

    def where(self, number: int) -> str:
        """Split and number of a scene, `test/00012`."""
        split = int(np.searchsorted(np.cumsum(self.counts), number, side="right"))
        return f"{SPLITS[split]}/{number - sum(self.counts[:split]) + 1:05d}"


def _inks(scene: Scene) -> list[Rle]:
    """Of every digit what is seen of its ink."""
    return encoded(torch.from_numpy(scene.mask == np.arange(1, len(scene.digits) + 1)[:, None, None]))


def shares(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of the digits of train, val and test, disjoint, the same for every seed of a run."""
    train, held = held_out(size, 0.4)
    test, val = held_out(len(held), 0.375)
    return train, held[val], held[test]
