"""Pictures of one digit each."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

from penstock.datamodules.digit_scenes import shares
from penstock.datamodules.lone_digits import GROUND, HEIGHTS, SHIFT, LoneDigits, draw_lone
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


def test_digits_are_bright_and_near_the_middle_at_three_octaves():
    digit, heights = load_digits().images[0] / 16, []
    for n in range(90):
        picture = draw_lone(np.random.default_rng(n), digit, 64).astype(float) / 255
        ground = round(GROUND * 255) / 255
        assert (picture >= ground).all()
        rows, columns = (np.flatnonzero((picture > ground).any((axis, 2))) for axis in (1, 0))
        heights.append(len(np.arange(rows[0], rows[-1] + 1)))
        for first, last in ((rows[0], rows[-1]), (columns[0], columns[-1])):
            assert abs((first + last) / 2 - 31.5) <= SHIFT + 0.5
        assert 0.1 < picture.max() - ground <= 0.7 + 1 / 255
    assert all(any(low - 2 <= height <= high for low, high in HEIGHTS) for height in heights)
    assert all(any(low - 2 <= height <= high for height in heights) for low, high in HEIGHTS)


@pytest.mark.parametrize(("key", "value", "least"), [("pictures", 3, 4), ("image_size", 63, 64)])
def test_out_of_range(key, value, least):
    with pytest.raises(UserError, match=rf"data\.{key}: found {value}, expected at least {least}"):
        LoneDigits(**{key: value})
