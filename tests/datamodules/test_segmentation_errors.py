"""What is wrong with images and masks is said in a line that names it."""

import numpy as np
import pytest
from PIL import Image

from penstock.datamodules.digit_masks import DigitMasks
from penstock.datamodules.segmentation import Segmentation
from penstock.lightning_modules.cli import main
from penstock.lightning_modules.errors import UserError
from tests.mask_trees import mask_tree, save

SMALL = {"min_size": 32, "max_size": 64, "crop_size": 32, "batch_size": 2, "reduce_zero_label": True}


def read(root, **options):
    data = Segmentation(**{"classes": list("abcd"), "name": "mine", "data_dir": str(root), **SMALL, **options})
    data.setup()
    for loader in (data.train_dataloader(), data.reference_dataloader("val")):
        list(loader)


def refused(line, root, **options):
    with pytest.raises(UserError, match=line):
        read(root, **options)


def rewrite(file, change):
    values = np.asarray(Image.open(file)).copy()
    save(change(values), file)


@pytest.mark.parametrize("memory_gb", [0, 1])
def test_values_beyond_the_classes(tmp_path, memory_gb):
    mask_tree(tmp_path)
    file = tmp_path / "annotations" / "training" / "training_0003.png"

    def spoil(values):
        values[5, 7] = 5
        return values

    rewrite(file, spoil)
    where = r"/training_0003\.png: found the value 5 at row 5, column 7"
    refused(rf"{where}; expected 1 to 4, or 0 and 255 for what is no class$", tmp_path, memory_gb=memory_gb)
    refused(
        r"found the value 4 at row \d+, column \d+; expected 0 to 3, or 255 for what is no class, or data\."
        r"reduce_zero_label=true where classes are numbered from 1$",
        mask_tree(tmp_path / "other"),
        reduce_zero_label=False,
        memory_gb=memory_gb,
    )
    rewrite(file, lambda values: values.astype(np.uint16) + 300)
    refused(r"/training_0003\.png: found the value 300 at row 0, column 0; expected 1 to 4", tmp_path)


def test_masks_of_another_kind_or_size(tmp_path):
    mask_tree(tmp_path)
    file = tmp_path / "annotations" / "validation" / "validation_0001.png"
    whole = file.read_bytes()
    for bad in (whole[: len(whole) // 2], b"", b"hello"):
        file.write_bytes(bad)
        refused(r"/validation_0001\.png: cannot read the image \(.*\); expected a complete image$", tmp_path)
    save(np.zeros((56, 40, 3), dtype=np.uint8), file)
    refused(r"/validation_0001\.png: found RGB pixels, expected one channel with the number of each pixel's", tmp_path)
    save(np.zeros((50, 40), dtype=np.uint8), file)
    refused(r"/validation_0001\.png: found 40x50 pixels, expected 40x56 as .*/validation_0001\.jpg$", tmp_path)


def test_images_that_their_camera_turned_are_those_of_their_masks(tmp_path):
    mask_tree(tmp_path)
    file = tmp_path / "images" / "training" / "training_0000.jpg"
    turned, exif = Image.open(file).transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6
    turned.save(file, exif=exif)
    data = Segmentation(classes=list("abcd"), data_dir=str(tmp_path), **SMALL)
    data.setup()
    assert data.store.fetch(np.array([0]))["original_size"].tolist() == [[40, 64]]


def test_files_without_partners(tmp_path):
    mask_tree(tmp_path)
    masks, images = tmp_path / "annotations" / "training", tmp_path / "images" / "training"
    moved = (masks / "training_0002.png").rename(masks / "training_002.png")
    refused(
        r"/images/training/training_0002\.jpg: no mask; expected .*/annotations/training/training_0002\.png "
        r"\(did you mean 'training_002'\?\)$",
        tmp_path,
    )
    moved.rename(masks / "training_0002.png")
    (images / "training_0004.jpg").unlink()
    (images / "training_0005.jpg").unlink()
    refused(
        r"/annotations/training/training_0004\.png: no image; expected .*/training_0004\.jpg; 2 masks have none$",
        tmp_path,
    )
    save(np.zeros((4, 4, 3), dtype=np.uint8), images / "training_0001.png")
    refused(r"/images/training: several images are called 'training_0001'; expected one for each mask$", tmp_path)


def test_folders(tmp_path):
    refused(r"^data\.data_dir: no folder at .*/nowhere; expected the data of 'mine' there$", tmp_path / "nowhere")
    refused(
        r"^data\.data_dir: no folder for 'mine' \(looked for .*\); set data\.data_dir=FOLDER or", None, data_dir=None
    )
    root = mask_tree(tmp_path / "a")
    refused(
        r"^data\.images: no folder 'image' in .*; found annotations, images \(did you mean 'images'\?\)$",
        root,
        images="image",
    )
    refused(
        r"^data\.masks: no folder .*/masks/training; expected the masks of .*/images/training$", root, masks="masks"
    )
    (root / "images" / "training").rename(root / "images" / "trainig")
    refused(r"/images: no training images; found trainig, validation, expected .* \(did you mean 'trainig'\?\)$", root)
    (root / "images" / "validation").rename(root / "images" / "valid_one")
    refused(r"/images: no training images; found trainig, valid_one, expected train or training, or images", root)
    (root / "images" / "training").mkdir()
    refused(r"/images/training: no images; expected files \.jpg", root)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"classes": ["a"]}, r"^data\.classes: found 1 names, expected 2 to 255$"),
        ({"crop_size": 8}, r"^data\.crop_size: found 8, expected at least 32$"),
        ({"ratio": (2.0, 0.5)}, r"^data\.ratio: found \[2\.0, 0\.5\], expected two rising numbers above 0$"),
        ({"cat_max_ratio": 0}, r"^data\.cat_max_ratio: found 0, expected a number in \(0, 1\]$"),
        (
            {"ignore_index": 3},
            r"^data\.ignore_index: found 3, expected a number that is no class, 5 to 255, such as 255$",
        ),
        ({"val_fraction": 0.5}, r"^data\.val_fraction: 'mine' has validation images of its own; expected 0$"),
        ({"batch_size": 9}, r"^data\.batch_size: found 9, but the training split holds 8 samples"),
    ],
)
def test_wrong_settings(tmp_path, options, line):
    refused(line, mask_tree(tmp_path), **options)


def test_nothing_held_out(tmp_path):
    mask_tree(tmp_path, (("train", 8),))
    refused(r"^Segmentation: the 'val' split is empty; set data\.val_fraction above 0$", tmp_path)


@pytest.mark.parametrize(("key", "value", "least"), [("scenes", 3, 4), ("image_size", 63, 64)])
def test_wrong_scenes(key, value, least):
    with pytest.raises(UserError, match=rf"data\.{key}: found {value}, expected at least {least}"):
        DigitMasks(**{key: value})


def test_the_command_line_says_it_and_ends_with_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "data=ade20k", f"data.data_dir={tmp_path / 'nowhere'}", "logger=csv"]) == 2
    assert "data.data_dir: no folder at" in capsys.readouterr().err
