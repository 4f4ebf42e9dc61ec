"""Pictures of one digit each."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from penstock.datamodules.digit_scenes import INK, OCTAVES, shares, tight
from penstock.datamodules.lone_digits import LoneDigits, draw_lone
from penstock.lightning_modules.errors import UserError


def test_splits_and_labels():
    data = LoneDigits(pictures=80)
    data.setup()
    assert data.shape == (3, 64, 64)
    assert data.class_names == [str(k) for k in range(10)]
    images, labels = data.store.tensors["image"].numpy(), data.store.tensors["label"].numpy()
    assert {name: len(numbers) for name, numbers in data.numbers.items()} == {"train": 80, "val": 20, "test": 20}
    inks, digits = load_digits(return_X_y=True)
    for stream, (name, choices) in enumerate(zip(("train", "val", "test"), shares(len(inks)))):
        for n, number in enumerate(data.numbers[name]):
            rng = np.random.default_rng((stream, n))
            digit = int(rng.choice(choices))
            assert labels[number] == digits[digit]
            drawn = draw_lone(rng, inks[digit].reshape(8, 8) / 16, 64)
            assert np.array_equal(images[number], drawn.transpose(2, 0, 1))
    other = LoneDigits(pictures=80, seed=7)
    other.setup()
    assert other.fingerprint == data.fingerprint


def test_digits_are_of_three_octaves(monkeypatch):
    heights = []

    def place(canvas: np.ndarray, ink: np.ndarray, rng: np.random.Generator) -> None:
        assert canvas.shape[:2] == ink.shape
        assert np.array_equal(tight(ink), ink)
        heights.append(ink.shape[0])

    monkeypatch.setattr("penstock.datamodules.lone_digits.lay", place)
    digit = load_digits().images[0] / 16
    for n in range(60):
        draw_lone(np.random.default_rng(n), digit, 64)
    assert all(any(low - 2 <= height <= high for low, high in OCTAVES) for height in heights)
    assert all(any(low - 2 <= height <= high for height in heights) for low, high in OCTAVES)
    assert digit.max() > INK


@pytest.mark.parametrize(("key", "value", "least"), [("pictures", 3, 4), ("image_size", 63, 64)])
def test_out_of_range(key, value, least):
    with pytest.raises(UserError, match=rf"data\.{key}: found {value}, expected at least {least}"):
        LoneDigits(**{key: value})
