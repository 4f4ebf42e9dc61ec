"""What is wrong with a detection set is said in one line that names it."""

import shutil

import pytest
from box_trees import coco, edit, picture, voc, voc_object, voc_xml, write

from penstock.datamodules.detection import Detection
from penstock.datamodules.digit_scenes import DigitScenes
from penstock.lightning_modules.cli import main
from penstock.lightning_modules.errors import UserError


@pytest.fixture(autouse=True)
def _own_data(monkeypatch):
    monkeypatch.delenv("PENSTOCK_DATA", raising=False)


def ready(root, **options):
    data = Detection("mine", str(root), **{"min_size": 64, "max_size": 128, "batch_size": 2} | options)
    data.setup()
    return data


def refused(line, root, **options):
    with pytest.raises(UserError, match=line) as error:
        list(ready(root, **options).train_dataloader())
    assert "\n" not in str(error.value)


def changed(root, change, split="train"):
    """The set with something changed in its annotations."""
    content, rewrite = edit(coco(root), split)
    change(content)
    rewrite()
    return root


def test_missing_folders(tmp_path):
    refused(r"^data\.data_dir: no folder at .*/nowhere; expected the data of 'mine' there$", tmp_path / "nowhere")
    line = (
        r"^data\.data_dir: no folder for 'mine' \(looked for \$PENSTOCK_DATA/mine\); set data\.data_dir=FOLDER or "
        r"PENSTOCK_DATA to one with annotations/instances_<split>\.json .*; it can be had at https://a\.b/c$"
    )
    with pytest.raises(UserError, match=line):
        Detection("mine", homepage="https://a.b/c").setup()


def test_unknown_layouts(tmp_path):
    refused(r": not a detection set; found nothing; expected annotations/instances_<split>\.json", tmp_path)
    coco(tmp_path / "a" / "b")
    refused(r": not a detection set; found a; expected .*\(VOC\); set data\.data_dir=.*/a/b$", tmp_path)
    folder = tmp_path / "a" / "b" / "annotations"
    for file in folder.iterdir():
        file.rename(folder / file.name.replace("instances_", "instance-"))
    refused(
        r"/annotations: not a detection set; found instance-test\.json, .*did you mean 'instance-train\.json'",
        tmp_path / "a" / "b",
    )


def test_missing_parts(tmp_path):
    (coco(tmp_path) / "annotations" / "instances_train.json").unlink()
    refused(
        r"/annotations: no training split; found instances_test\.json, instances_val\.json, expected instances_train",
        tmp_path,
    )
    shutil.rmtree(coco(tmp_path) / "val")
    refused(r"/val: no folder; expected the images of instances_val\.json there$", tmp_path)
    (coco(tmp_path) / "train" / "0002.png").unlink()
    refused(
        r"/instances_train\.json: image 106: no file .*/train/0002\.png; expected every image that is listed$", tmp_path
    )


def test_files_that_are_no_annotations(tmp_path):
    file = coco(tmp_path) / "annotations" / "instances_train.json"
    text = file.read_text()
    for bad in (text[: len(text) // 2], "", "\ud800".encode("utf-16", "surrogatepass")):
        file.write_bytes(bad if isinstance(bad, bytes) else bad.encode())
        refused(r"/instances_train\.json: cannot read it \(.*\); expected a complete JSON file of COCO", tmp_path)
    write({"images": [], "boxes": []}, file)
    refused(r"/instances_train\.json: no key 'annotations'; found boxes, images; expected COCO annotations", tmp_path)
    write([1, 2], file)
    refused(r"/instances_train\.json: no key 'images'; found list; expected COCO annotations", tmp_path)
    write({"images": {}, "annotations": [], "categories": []}, file)
    refused(r"/instances_train\.json: found 'images' '\{\}', expected a list$", tmp_path)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda c: c["images"][1].update(id=100),
            r"image 100 is there twice; expected an id of its own for each image$",
        ),
        (lambda c: c["images"][1].pop("width"), r"image 103: no key 'width'; found id, file_name, height$"),
        (lambda c: c["images"][1].update(id="7"), r"image 1: found 'id' '7', expected an integer$"),
        (lambda c: c["images"][1].update(height=0), r"image 103: found 48x0 pixels, expected sides of at least 1$"),
        (lambda c: c["images"][1].update(height=True), r"image 103: found 'height' 'True', expected an integer$"),
        (lambda c: c.update(images=[]), r"instances_train\.json: no images; expected at least one"),
        (lambda c: c.update(categories=[]), r"instances_train\.json: no categories; expected at least one$"),
        (
            lambda c: c["categories"].append({"id": 2, "name": "x"}),
            r"category 3 is 'x' with id 2; expected names and ids",
        ),
        (
            lambda c: c["categories"].append({"id": 3, "name": "cat"}),
            r"category 3 is 'cat' with id 3; expected names and",
        ),
        (lambda c: c["images"].insert(0, 4), r"image 0: found int, expected a mapping with 'id'$"),
        (lambda c: c["annotations"].insert(0, 4), r"annotation 0: found int, expected a mapping with 'image_id'$"),
    ],
)
def test_wrong_entries(tmp_path, change, line):
    refused(line, changed(tmp_path, change))


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        (
            {"category_id": 3},
            r"annotation 55 is of category 3; expected one of the file's categories, 2 cat, 7 dog, 90 ",
        ),
        ({"image_id": 4}, r"annotation 55 is of image 4, which is not among the 20 images of the file$"),
        ({"bbox": [1, 2, 3]}, r"annotation 55: found 'bbox' \[1, 2, 3\], expected x, y, width and height in pixels$"),
        ({"bbox": [1, 2, "3", 4]}, r"annotation 55: found 'bbox' \[1, 2, '3', 4\], expected x, y, width and height"),
        ({"bbox": None}, r"annotation 55: found 'bbox' 'None', expected a list$"),
        ({"area": "big"}, r"annotation 55: found 'area' 'big', expected a number$"),
        (
            {"bbox": [1, 2, -3, 4]},
            r"annotation 55, a box in 0000\.png of -3x4 at \[1\.0, 2\.0\] \(64x48 image\) has a neg",
        ),
        (
            {"bbox": [64, 2, 3, 4]},
            r"55, a box in 0000\.png of 3x4 at \[64\.0, 2\.0\] \(64x48 image\) lies outside of its im",
        ),
        (
            {"bbox": [1, -4, 3, 4]},
            r"55, a box in 0000\.png of 3x4 at \[1\.0, -4\.0\] \(64x48 image\) lies outside of its",
        ),
        (
            {"bbox": [float("nan"), 2, 3, 4]},
            r"annotation 55, a box in 0000\.png of .* is not finite; expected numbers$",
        ),
    ],
)
def test_wrong_boxes(tmp_path, entry, line):
    good = {"id": 55, "image_id": 100, "category_id": 2, "bbox": [1, 2, 3, 4]}
    refused(line, changed(tmp_path, lambda c: c["annotations"].append(good | entry)))


@pytest.mark.parametrize("name", ["../val/0000.png", "/etc/passwd", "a/../../x.png", "", "C:\\x.png", "..\\x.png"])
def test_files_that_leave_the_folder(tmp_path, name):
    changed(tmp_path, lambda c: c["images"][1].update(file_name=name))
    refused(r"image 103: the file '.*' leaves the folder of the images; expected a name in it$", tmp_path)


def test_other_categories_in_a_split(tmp_path):
    changed(tmp_path, lambda c: c["categories"].append({"id": 91, "name": "cow"}), "val")
    refused(r"/instances_val\.json: its categories differ from those of instances_train\.json in 91 cow$", tmp_path)


def test_classes(tmp_path):
    coco(tmp_path)
    near = r"^data\.classes: no class 'tothbrush'; found cat, dog, toothbrush \(did you mean 'toothbrush'\?\)$"
    refused(near, tmp_path, classes=["cat", "tothbrush"])
    refused(near, tmp_path, classes={"thing": ["tothbrush"]})
    refused(r"^data\.classes: 'cat' is there twice; expected each class once$", tmp_path, classes=["cat", "cat"])
    refused(r"'cat' is there twice; expected", tmp_path, classes={"a": ["cat"], "b": ["dog", "cat"]})
    for nothing in ([], {}, {"a": []}):
        refused(
            r"^data\.classes: found .*, expected names of classes, some of cat, dog, toothbrush$",
            tmp_path,
            classes=nothing,
        )


def test_no_boxes_at_all(tmp_path):
    changed(tmp_path, lambda c: c.update(annotations=[]))
    line = r"^Detection: no training image has a box of cat, dog, toothbrush; expected some, or data\.keep_empty=true$"
    refused(line, tmp_path)
    assert len(ready(tmp_path, keep_empty=True).train_dataloader()) == 10


@pytest.mark.parametrize("memory_gb", [0, 4])
@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images(tmp_path, memory_gb, workers):
    file = coco(tmp_path) / "train" / "0003.png"
    whole = file.read_bytes()
    for bad in (whole[: len(whole) // 2], b"", b"hello"):
        file.write_bytes(bad)
        refused(
            r"/train/0003\.png: cannot read the image \(.*\); expected a complete image$",
            tmp_path,
            memory_gb=memory_gb,
            num_workers=workers,
        )
    picture(0, 50, 77).save(file)
    refused(r"/0003\.png: found 77x50 pixels, but its annotations are of 90x40; expected the image that was", tmp_path)
    picture(0, 40, 90).convert("F").save(file.with_suffix(".tiff"))
    file.with_suffix(".tiff").rename(file)
    refused(r"/train/0003\.png: found F pixels, expected 8 bits a channel$", tmp_path)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"min_size": 31}, r"^data\.min_size: found \[31\], expected one or more sides of at least 32$"),
        ({"min_size": [64, 8]}, r"^data\.min_size: found \[64, 8\], expected one or more sides of at least 32$"),
        ({"min_size": []}, r"^data\.min_size: found \[\], expected one or more sides of at least 32$"),
        ({"min_size": [64, 200]}, r"^data\.max_size: found 128, expected at least data\.min_size=200$"),
        ({"pad_multiple": 0}, r"^data\.pad_multiple: found 0, expected at least 1$"),
        ({"val_fraction": 0.5}, r"^data\.val_fraction: 'mine' has validation images of its own; expected 0$"),
        (
            {"batch_size": 17},
            r"^data\.batch_size: found 17, but the training split holds 16 samples; expected at most 16$",
        ),
    ],
)
def test_wrong_settings(tmp_path, options, line):
    refused(line, coco(tmp_path), **options)


def test_trainval_needs_all_splits(tmp_path):
    refused(
        r"^data\.trainval: 'mine' has no test images; expected all three splits$",
        coco(tmp_path / "a", (("train", 10), ("val", 4))),
        trainval=True,
    )
    refused(
        r"^data\.trainval: 'mine' has no val images; expected all three splits$",
        coco(tmp_path / "b", (("train", 10), ("test", 4))),
        trainval=True,
    )


def test_wrong_scenes():
    for options, line in (
        ({"scenes": 3}, r"^data\.scenes: found 3, expected at least 4$"),
        ({"image_size": 40}, r"^data\.image_size: found 40, expected at least 64$"),
    ):
        with pytest.raises(UserError, match=line):
            DigitScenes(**options)


def test_voc_trees(tmp_path):
    lists = voc(tmp_path) / "ImageSets" / "Main"
    first = tmp_path / "Annotations" / "2007_000000.xml"
    cases = [
        (
            "<annotation><size>",
            r"/2007_000000\.xml: cannot read it \(.*\); expected the annotations of an image as in VOC$",
        ),
        (voc_xml(9, 9, "<object/>"), r"/2007_000000\.xml: cannot read it \('?an object without name'?\); expected"),
        (voc_xml(9, 9, "<object><name>a</name></object>"), r"cannot read it \(an object without bndbox\)"),
        (voc_xml(48, 64, voc_object("a", (1, 2, 3))), r"cannot read it \(a bndbox without ymax\); expected"),
        (
            voc_xml(48, 64, voc_object("a", ("x", 2, 3, 4))),
            r"cannot read it \(could not convert string to float: 'x'\)",
        ),
        (
            voc_xml(48, 64, voc_object("a", (9, 2, 3, 4))),
            r"/2007_000000\.xml: a box of -5x3 at \[8\.0, 1\.0\] .* negative side",
        ),
    ]
    for text, line in cases:
        write(text, first)
        refused(line, tmp_path)
    voc(tmp_path)
    for name, line in (
        ("2007_000001", r"/train\.txt: '2007_000001' is there twice; expected each image once$"),
        ("2007_009999", r"/train\.txt: no file .*/Annotations/2007_009999\.xml; expected every image that is listed$"),
        ("../x", r"/train\.txt: line 7: the file '\.\./x' leaves the folder of the images"),
    ):
        write((lists / "train.txt").read_text() + name, lists / "train.txt")
        refused(line, tmp_path)
        voc(tmp_path)
    (tmp_path / "JPEGImages" / "2007_000002.jpg").unlink()
    refused(r"/train\.txt: no file .*/JPEGImages/2007_000002\.jpg; expected every image", tmp_path)
    voc(tmp_path)
    for split in ("val", "train"):
        write("\n", lists / f"{split}.txt")
        refused(
            rf"/{split}\.txt: no images; expected at least one, or no file for a split that is not there$", tmp_path
        )
    voc(tmp_path)
    (lists / "train.txt").unlink()
    refused(r"/ImageSets/Main: no training images; found test\.txt, val\.txt, expected names in train\.txt$", tmp_path)


def test_splits_without_boxes(tmp_path, recwarn):
    """Crowds are none. Said once for each split, and not of a split that is not there."""
    coco(tmp_path, (("train", 6), ("val", 3), ("test", 2)))
    for split in ("val", "test"):
        content, write_back = edit(tmp_path, split)
        content["annotations"] = [{**row, "iscrowd": 1} for row in content["annotations"]] if split == "val" else []
        write_back()
    Detection("mine", str(tmp_path), batch_size=2).setup()
    said = [str(one.message) for one in recwarn if "average precision" in str(one.message)]
    assert said == [
        f"Detection: none of the {n} {split} images has a box of cat, dog, toothbrush; their average precision, ap, is "
        "not defined and will not be logged"
        for n, split in ((3, "val"), (2, "test"))
    ]
    recwarn.clear()
    Detection("mine", str(coco(tmp_path / "b", (("train", 6),))), batch_size=2).setup()
    assert not any("average precision" in str(one.message) for one in recwarn)


def test_the_command_line_says_it_and_ends_with_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "data=bccd", f"data.data_dir={tmp_path / 'nowhere'}", "logger=csv"]) == 2
    assert "data.data_dir: no folder at" in capsys.readouterr().err


def test_a_mistyped_split_is_named(tmp_path, recwarn):
    coco(tmp_path)
    annotations = tmp_path / "annotations"
    (annotations / "instances_val.json").rename(annotations / "instances_vall.json")
    data = Detection("mine", str(tmp_path), batch_size=2)
    data.setup()
    assert not len(data.numbers["val"])
    said = [str(one.message) for one in recwarn if "instances_vall" in str(one.message)]
    assert len(said) == 1
    assert "of no split, and not read (did you mean 'instances_val.json'?); there is no instances_val.json" in said[0]
