"""Two-dimensional toys."""

from typing import Literal

import numpy as np
import torch
from sklearn.datasets import make_moons

from penstock.datamodules.base import KindDataModule, TensorStore, fingerprint
from penstock.lightning_modules.errors import UserError, did_you_mean

Toy = Literal[
    "three_modes", "three_modes_source", "eight_gaussians", "moons", "checkerboard", "two_spirals", "gaussian"
]

THREE_MODES = 10 * np.array([[3**0.5 / 2, -0.5], [-(3**0.5) / 2, -0.5], [0, 3**0.5 / 2]])
DEFAULT_NOISE = {"three_modes": 0.3**0.5, "three_modes_source": 0.3**0.5, "eight_gaussians": 0.1, "moons": 0.05}
DEFAULT_NOISE |= {"checkerboard": 0.0, "two_spirals": 0.1, "gaussian": 1.0}


def _modes(means: np.ndarray, size: int, noise: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    label = rng.integers(len(means), size=size)
    return means[label] + noise * rng.standard_normal((size, 2)), label


def _eight(size: int, noise: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    angle = np.arange(8) * np.pi / 4
    return _modes(2 * np.stack((np.cos(angle), np.sin(angle)), 1), size, noise, rng)


def _moons(size: int, noise: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return make_moons(size, noise=noise, random_state=int(rng.integers(2**31)))


def _checkerboard(size: int, noise: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    label = rng.integers(8, size=size)
    row, pair = np.divmod(label, 2)
    corner = np.stack((2 * pair + row % 2, row), 1) - 2.0
    return corner + rng.random((size, 2)) + noise * rng.standard_normal((size, 2)), label


def _spirals(size: int, noise: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    label = rng.integers(2, size=size)
    angle = 3 * np.pi * np.sqrt(rng.random(size))
    arm = np.stack((np.cos(angle), np.sin(angle)), 1) * (angle * (1 - 2 * label) / np.pi)[:, None]
    return arm + noise * rng.standard_normal((size, 2)), label


class Points(KindDataModule):
    """Points `(2,)` under the key `points`, drawn once; labels are the modes where a toy has modes.

    - `three_modes`, `three_modes_source`: target and source of the rectified-flow toy (arXiv 2209.03003, notebook):
      equal weights, radius 10, means (+-10 sqrt(3)/2, -+5) and (0, +-10 sqrt(3)/2), variance 0.3. Use both with `Pair`.
    - `eight_gaussians`: on a circle of radius 2. `moons`: scikit-learn's. `two_spirals`: 1.5 turns, radius up to 3.
    - `checkerboard`: the 8 dark unit squares of [-2, 2]^2.
    - `gaussian`: N(`mean`, `noise`^2) in each dimension, without labels (closed form of every flow).

    Validation and test sets of a tenth of `size` are independent draws.

    Args:
        name: which toy.
        size: training points, at least 10.
        noise: standard deviation; `None` = the toy's own.
        mean: centre of `gaussian`; 0 for the others.
        batch_size: global training batch.
        eval_batch_size: global batch of evaluation; `None` = `batch_size`.
        num_workers: worker processes a rank; 0 is fastest.
        seed: key of the order; `None` = the seed of the run. The points themselves depend on it only when it is given.

    Raises:
        UserError: unknown toy, fewer than 10 points, negative noise, `mean` with a toy that has none.
    """

    def __init__(
        self,
        name: Toy = "three_modes",
        size: int = 10_000,
        noise: float | None = None,
        mean: float = 0.0,
        batch_size: int = 2048,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, seed=seed)
        if name not in DEFAULT_NOISE:
            near = did_you_mean(name, DEFAULT_NOISE)
            raise UserError(f"data.name: found '{name}', expected one of {', '.join(DEFAULT_NOISE)}{near}")
        if size < 10:
            raise UserError(f"data.size: found {size}, expected at least 10")
        if noise is not None and noise < 0:
            raise UserError(f"data.noise: found {noise}, expected at least 0")
        if mean and name != "gaussian":
            raise UserError(f"data.mean: found {mean}, but only the toy 'gaussian' has a mean, not '{name}'")
        self.name, self.size, self.mean = name, size, mean
        self.noise = DEFAULT_NOISE[name] if noise is None else noise

    def build(self) -> tuple[TensorStore, dict[str, np.ndarray]]:
        held = self.size // 10
        parts = [self._draw(n, split) for split, n in enumerate((self.size, held, held))]
        points = np.concatenate([p for p, _ in parts]).astype(np.float32)
        labels = np.concatenate([k for _, k in parts])
        modes = 0 if self.name == "gaussian" else int(labels.max()) + 1
        self.shape, self.num_classes, self.class_names = (2,), modes, [str(k) for k in range(modes)]
        self.fingerprint = fingerprint("points", points, labels)
        tensors = {"points": torch.from_numpy(points)}
        if modes:
            tensors["label"] = torch.from_numpy(labels.astype(np.int64))
        train, val, test = np.split(np.arange(len(points)), (self.size, self.size + held))
        return TensorStore(**tensors), {"train": train, "val": val, "test": test}

    def _draw(self, size: int, split: int) -> tuple[np.ndarray, np.ndarray]:
        """`size` points `(size, 2)` and their modes `(size,)`."""
        rng = np.random.default_rng((self.seed or 0, split, *self.name.encode()))
        match self.name:
            case "three_modes":
                return _modes(THREE_MODES, size, self.noise, rng)
            case "three_modes_source":
                return _modes(-THREE_MODES, size, self.noise, rng)
            case "eight_gaussians":
                return _eight(size, self.noise, rng)
            case "moons":
                return _moons(size, self.noise, rng)
            case "checkerboard":
                return _checkerboard(size, self.noise, rng)
            case "two_spirals":
                return _spirals(size, self.noise, rng)
            case _:
                return self.mean + self.noise * rng.standard_normal((size, 2)), np.zeros(size, np.int64)
