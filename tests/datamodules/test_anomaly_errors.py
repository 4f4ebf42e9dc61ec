"""What is wrong with an anomaly-detection set is said in one line that names it."""

import shutil

import pytest
from anomaly_trees import btad, marked, mvtec, picture, save, visa
from PIL import Image

from penstock.datamodules.anomaly import Anomaly
from penstock.lightning_modules.cli import main
from penstock.lightning_modules.errors import UserError


@pytest.fixture(autouse=True)
def _own_data(monkeypatch):
    monkeypatch.delenv("PENSTOCK_DATA", raising=False)


def ready(root, category="bolt", **options):
    data = Anomaly("mine", str(root), category, **({"image_size": 8, "batch_size": 2} | options))
    data.setup()
    return data


def refused(line, root, category="bolt", **options):
    with pytest.raises(UserError, match=line) as error:
        ready(root, category, **options)
    assert "\n" not in str(error.value)


def test_missing_folders(tmp_path):
    refused(r"^data\.data_dir: no folder at .*/nowhere; expected the data of 'mine' there$", tmp_path / "nowhere")
    with pytest.raises(
        UserError, match=r"no folder for 'mine' \(looked for \$PENSTOCK_DATA/mine\); set data\.data_dir"
    ):
        Anomaly("mine").setup()
    mvtec(mvtec(tmp_path), "screw")
    refused(r"^data\.category: no folder 'scrw' in .*; found bolt, screw \(did you mean 'screw'\?\)$", tmp_path, "scrw")
    for category in ("..", "../x", "", str(tmp_path / "screw")):
        refused(r"^data\.category: no folder '.*' in .*; found bolt, screw", tmp_path, category)
    refused(
        r"no folder 'bolt' in .*/screw; found ground_truth, test, train; set data\.category=null, it is a category",
        tmp_path / "screw",
    )


def test_unknown_layouts(tmp_path):
    (tmp_path / "bolt" / "pictures").mkdir(parents=True)
    refused(r"/bolt: no training folder; found pictures; expected train/good \(MVTec AD\), train/ok", tmp_path)
    (tmp_path / "bolt" / "train").mkdir()
    refused(r"/bolt/train: found no folders; expected one of good, ok$", tmp_path)
    (tmp_path / "bolt" / "train" / "normal").mkdir()
    refused(r"/bolt/train: found normal; expected one of good, ok$", tmp_path)
    (tmp_path / "bolt" / "train" / "good").mkdir()
    refused(r"/bolt/train/good: no images; expected image files", tmp_path)
    save(picture(0), tmp_path / "bolt" / "train" / "good" / "0.png")
    refused(r"/bolt: no test images; expected test/good and test/<defect>, or data\.val=good$", tmp_path)
    (tmp_path / "bolt" / "train" / "ok").mkdir()
    refused(r"/bolt/train: found good, normal, ok; expected one of good, ok$", tmp_path)


def test_training_without_test_images(tmp_path):
    shutil.rmtree(mvtec(tmp_path) / "bolt" / "test")
    data = ready(tmp_path, val="good", val_fraction=0.25)
    assert (len(data.view("train")), len(data.view("test"))) == (6, 2)


def test_empty_test_folder(tmp_path):
    (mvtec(tmp_path) / "bolt" / "test" / "eel").mkdir()
    refused(r"/bolt/test/eel: no images; expected image files", tmp_path)


def test_defects_without_masks(tmp_path):
    truth = mvtec(tmp_path) / "bolt" / "ground_truth"
    (truth / "crack" / "002_mask.png").unlink()
    line = r"/test/crack/002\.png: no mask in .*/ground_truth/crack; expected one, 002_mask\.png or 002\.png$"
    refused(line, tmp_path)
    (truth / "crack" / "0022_mask.png").write_bytes((truth / "crack" / "001_mask.png").read_bytes())
    save(marked(0), truth / "crack" / "x002.png")
    refused(r"/crack/002\.png: several masks, 0022_mask\.png, x002\.png in", tmp_path)
    shutil.rmtree(truth)
    refused(r"/test/crack/000\.png: no mask in .*/ground_truth/crack; expected one, 000_mask\.png", tmp_path)


def test_a_mask_of_another_size(tmp_path):
    mvtec(tmp_path)
    marked(0, size=(10, 12)).save(tmp_path / "bolt" / "ground_truth" / "dent" / "001_mask.png")
    refused(r"/dent/001_mask\.png: found 10x12 pixels, expected 12x10 as .*/test/dent/001\.png$", tmp_path)


@pytest.mark.parametrize(("memory_gb", "workers"), [(4.0, 0), (0.0, 0), (0.0, 2)])
@pytest.mark.parametrize("path", ["train/good/002.png", "ground_truth/dent/001_mask.png"])
def test_truncated_files_are_named(tmp_path, memory_gb, workers, path):
    file = mvtec(tmp_path, size=(60, 50)) / "bolt" / path
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    data = ready(tmp_path, memory_gb=memory_gb, num_workers=workers)
    with pytest.raises(UserError, match=rf"^{file}: cannot read the image \(.*\); expected a complete image$"):
        list(data.reference_dataloader("train" if "train" in path else "test"))


@pytest.mark.parametrize("path", ["test/dent/001.png", "ground_truth/dent/001_mask.png"])
def test_files_that_are_no_images_are_named_at_once(tmp_path, path):
    (mvtec(tmp_path) / "bolt" / path).write_text("hello")
    refused(rf"/bolt/{path}: cannot read the image \(UnidentifiedImageError", tmp_path)


def test_deep_images_are_refused(tmp_path):
    mvtec(tmp_path)
    Image.new("I;16", (12, 10)).save(tmp_path / "bolt" / "train" / "good" / "000.png")
    with pytest.raises(UserError, match=r"good/000\.png: found I;16 pixels, expected 8 bits a channel"):
        ready(tmp_path).train_dataloader()


def test_visa_without_its_table(tmp_path):
    table = visa(tmp_path) / "split_csv" / "1cls.csv"
    table.unlink()
    refused(r"/split_csv/1cls\.csv: no such file; expected VisA's split file beside its categories$", tmp_path, "nut")
    table.write_text("object,split,image\nnut,train,x\n")
    refused(r"1cls\.csv: no column label, mask; found object, split, image$", tmp_path, "nut")
    table.write_bytes(b"object,split,label,image,mask\nnut,train,normal,\xff,\n")
    refused(r"1cls\.csv: cannot be read as a table \(", tmp_path, "nut")
    table.write_text("")
    refused(r"1cls\.csv: no column object, split, label, image, mask; found none$", tmp_path, "nut")
    table.write_text("object,split,label,image,mask\nnuts,train,normal,x,\n")
    refused(r"1cls\.csv: no rows of object 'nut'; found nuts \(did you mean 'nuts'\?\)$", tmp_path, "nut")
    table.write_text("object,split,label,image,mask\nnut,train,normal\n")
    refused(r"1cls\.csv line 2, image: no path; expected a file in .*/nut$", tmp_path, "nut")


ROW = {"object": 0, "split": 1, "label": 2, "image": 3, "mask": 4}


@pytest.mark.parametrize(
    ("row", "cells", "line"),
    [
        (0, {"split": "val"}, r"line 2: found split 'val', label 'normal'; expected train or test, normal or anomaly$"),
        (7, {"label": "bad"}, r"line 9: found split 'test', label 'bad'; expected train or test"),
        (7, {"split": "train"}, r"line 9: an anomaly in the training split; expected normal images only$"),
        (
            1,
            {"image": "nut/Data/Images/Normal/99.JPG"},
            r"line 3, image: no file at .*/nut/Data/Images/Normal/99\.JPG$",
        ),
        (1, {"image": "nut/Data/../../secret.png"}, r"line 3, image: path '.*' leaves the folder .*/nut$"),
        (1, {"image": "/etc/hostname"}, r"line 3, image: path '/etc/hostname' leaves the folder"),
        (1, {"image": "secret.png"}, r"line 3, image: path 'secret.png' leaves the folder"),
        (7, {"mask": ""}, r"line 9, mask of nut/Data/Images/Anomaly/001\.JPG: no path; expected a file in"),
        (
            7,
            {"mask": "../secret.png"},
            r"line 9, mask of .*001\.JPG: path '\.\./secret\.png' leaves the folder .*/nut$",
        ),
    ],
)
def test_rows_of_visa(tmp_path, row, cells, line):
    save(picture(0), tmp_path / "secret.png")

    def change(rows):
        for key, value in cells.items():
            rows[row][ROW[key]] = value

    refused(line, visa(tmp_path, change=change), "nut")


def test_visa_without_training_images(tmp_path):
    refused(r"1cls\.csv: no normal training images of 'nut'$", visa(tmp_path, train=0), "nut")


def test_bad_settings_name_the_key(tmp_path):
    btad(tmp_path)
    refused(r"^data\.shots: found 5, expected at most the 4 training images$", tmp_path, "01", shots=5)
    refused(r"^data\.shots: found 0, expected at least 1$", tmp_path, shots=0)
    refused(
        r"^data\.val: found 'hlaf', expected one of test, half, good \(did you mean 'half'\?\)$", tmp_path, val="hlaf"
    )
    refused(r"^data\.val_fraction: found 0, expected a number in \(0, 1\)", tmp_path, val="good", val_fraction=0)
    refused(
        r"^data\.rotate: found true with images of 8x9; expected square ones$", tmp_path, rotate=True, image_size=(8, 9)
    )
    for size in (0, (8, 0), (8,), (8, 8, 8)):
        refused(r"^data\.image_size: found .*, expected a side or \[height, width\]", tmp_path, image_size=size)
    refused(r"^data\.batch_size: found 0", tmp_path, batch_size=0)
    with pytest.raises(UserError, match=r"^data\.batch_size: found 4, but the training split holds 2 samples"):
        ready(tmp_path, "01", shots=2, batch_size=4).train_dataloader()


def test_the_command_line_says_it_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["fit", "data=mvtec", f"data.data_dir={mvtec(tmp_path / 'sets')}", "logger=null", "image_size=16"]
    assert main([*words, "data.category=blt"]) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].endswith("found bolt (did you mean 'bolt'?)")
