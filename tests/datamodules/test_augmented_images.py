"""Augmented images: what is drawn follows from (seed, epoch, number) alone; evaluation changes nothing."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from penstock.datamodules.augmented_images import AugmentedImages, drawing
from penstock.datamodules.images import Images
from penstock.lightning_modules.errors import UserError


@pytest.fixture
def tree(tmp_path):
    """Folders of two classes, images of several sizes."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for k in range(count):
            file = tmp_path / split / "ab"[k % 2] / f"{k}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            cells = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
            Image.fromarray(cells).resize((60 + k, 48), Image.Resampling.BICUBIC).save(file)
    return tmp_path


def made(tree, **options) -> AugmentedImages:
    data = AugmentedImages(data_dir=str(tree), name="x", image_size=32, batch_size=4, seed=3, **options)
    data.setup("fit")
    return data


def images(data, epoch: int = 0) -> dict[int, Tensor]:
    loader = data.train_dataloader()
    loader.batch_sampler.sampler.set_epoch(epoch)
    return {int(n): image for batch in loader for n, image in zip(batch["index"], batch["image"])}


def test_draws_follow_from_epoch_and_number(tree):
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    first, again, next_ = images(made(tree)), images(made(tree, num_workers=1)), images(made(tree), 1)
    assert len(first) == 8
    for number, image in first.items():
        assert image.dtype == torch.uint8
        assert image.shape == (3, 32, 32)
        assert torch.equal(image, again[number])
        assert not torch.equal(image, next_[number])
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert np.array_equal(np.random.get_state()[1], state[2])


def test_whole_images_without_a_policy_are_resized_ones(tree):
    """The least part is the whole: where no crop of that area has a fitting aspect, timm takes the centre."""
    data = made(tree, smallest=1.0, policy=None)
    assert all(image.float().std() > 5 for image in images(data).values())
    assert not any(torch.equal(a, b) for a, b in zip(images(data).values(), images(made(tree)).values()))


def test_evaluation_is_that_of_images(tree):
    plain = Images(data_dir=str(tree), name="x", image_size=32, batch_size=4)
    plain.setup("fit")
    (a,), (b,) = (list(data.reference_dataloader("val")) for data in (made(tree), plain))
    assert torch.equal(a["image"], b["image"])
    assert torch.equal(a["label"], b["label"])


def test_errors(tree):
    with pytest.raises(UserError, match=r"data\.image_size: found none"):
        AugmentedImages(data_dir=str(tree), name="x")
    with pytest.raises(UserError, match=r"data\.smallest: found 0"):
        made(tree, smallest=0)
    with pytest.raises(UserError, match=r"data\.policy: timm does not know 'rend-m9'"):
        made(tree, policy="rend-m9")


def test_draws_end_with_their_block():
    with drawing(1, 2, 3):
        first = torch.rand(2), random.random(), np.random.rand()
    with drawing(1, 2, 3):
        again = torch.rand(2), random.random(), np.random.rand()
    assert torch.equal(first[0], again[0])
    assert first[1:] == again[1:]
