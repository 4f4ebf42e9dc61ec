"""Pictures to predict on: their way up, their depth, their sizes, and one alone."""

import numpy as np
import pytest
import torch
from anomaly_trees import picture, save
from PIL import ExifTags, Image

from penstock.datamodules.picture_folder import PictureFolder
from penstock.lightning_modules.errors import UserError


def ready(path, **options):
    data = PictureFolder(str(path), **options)
    data.setup()
    return data


def batch(data):
    (found,) = data.reference_dataloader("test")
    return found


def raw(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(tmp_path, orientation):
    exif, image = Image.Exif(), picture(0, (9, 6))
    exif[ExifTags.Base.Orientation] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    x = raw(image)
    x = x.mT if orientation >= 5 else x  # first row becomes first column
    x = x.flip(-1) if orientation in (2, 3, 6, 7) else x
    x = x.flip(-2) if orientation in (3, 4, 7, 8) else x
    data = ready(tmp_path, batch_size=1)
    found = batch(data)
    torch.testing.assert_close(found["image"][0], x / 127.5 - 1)
    torch.testing.assert_close(data.original(0), x / 127.5 - 1)
    assert found["original_size"].tolist() == [list(x.shape[1:])]


def test_exif_data_that_cannot_be_read_say_nothing(tmp_path):
    picture(0, (9, 6)).save(tmp_path / "a.png", exif=b"junkjunk")
    torch.testing.assert_close(batch(ready(tmp_path, batch_size=1))["image"][0], raw(picture(0, (9, 6))) / 127.5 - 1)


def test_sizes_are_those_of_the_pictures(tmp_path):
    for name, size in (("a.png", (9, 6)), ("b.png", (5, 5)), ("c.png", (30, 40))):
        save(picture(0, size), tmp_path / name)
    data = ready(tmp_path, image_size=8)
    found = batch(data)
    assert found["image"].shape == (3, 3, 8, 8)
    assert found["original_size"].tolist() == [[6, 9], [5, 5], [40, 30]]
    assert found["original_size"].dtype == torch.int64
    torch.testing.assert_close(data.original(2), raw(picture(0, (30, 40))) / 127.5 - 1)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_pictures_are_refused(tmp_path, mode):
    Image.new(mode, (9, 6)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=rf"^{tmp_path}/a\.tif: found {mode} pixels, expected 8 bits a channel$"):
        batch(ready(tmp_path, image_size=8))


def test_one_picture_of_a_folder(tmp_path):
    for name in ("a.png", "b.png"):
        save(picture(0, (9, 6)), tmp_path / name)
    data = ready(tmp_path / "b.png", image_size=8)
    assert len(batch(data)["image"]) == 1
    assert data.where(0) == "b.png"
    with pytest.raises(UserError, match=r"/c\.png: no such folder or file; expected pictures in a folder"):
        ready(tmp_path / "c.png")
