"""Layouts of detection sets: COCO and Pascal VOC, and sets of your own like them.

- COCO: `annotations/instances_<split>.json` and the images in `<split>/` or `images/<split>/`, where a split is
  `train`, `val` or `test`, maybe with a year (`train2017`; of several years the latest whose images are there);
- VOC: `ImageSets/Main/<split>.txt` with the names of images, `JPEGImages/<name>.jpg`, `Annotations/<name>.xml`.

Which of them it is, is seen from the folders. A split without annotations is one that is not there.
"""

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image

from penstock.datamodules.annotations import Annotations, annotations, inside
from penstock.datamodules.image_sources import SPLIT_NAMES, named
from penstock.lightning_modules.errors import UserError, did_you_mean
from penstock.lightning_modules.instance_masks import Rle, run_lengths

INSTANCES = re.compile(r"instances_([a-z]+)(\d*)\.json")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".JPG", ".JPEG", ".PNG")
EXPECTED = (
    "annotations/instances_<split>.json beside <split>/ (COCO), or ImageSets/Main/<split>.txt, Annotations/ and "
    "JPEGImages/ (VOC)"
)
KINDS = {int: "an integer", str: "a text", list: "a list", float: "a number", dict: "a mapping"}


@dataclass(frozen=True)
class BoxedSplit:
    """Images of one split, their names in the annotations, their boxes; `made_of` are the files of annotations."""

    files: list[Path]
    names: list[str]
    table: Annotations
    made_of: list[Path]


@dataclass(frozen=True)
class BoxedSet:
    """Splits by name, and the names and ids of the classes that their tables number from 0."""

    splits: dict[str, BoxedSplit]
    class_names: list[str]
    category_ids: list[int]


def open_boxed(root: Path, masks: bool = False) -> BoxedSet:
    """A set in any of the layouts, with masks of the objects where they are asked for.

    Raises:
        UserError: no known layout, masks of one that has none, no training split, a split without images, or anything
            wrong with a file of annotations: it, the entry and what was expected are named.
    """
    if is_coco(root):
        return open_coco(root, masks)
    if is_voc(root):
        if masks:
            raise UserError(
                f"data.masks: found true, but {root} is laid out as VOC, without masks; expected COCO's layout"
            )
        return open_voc(root)
    below = (p for pattern in ("*", "*/*") for p in sorted(root.glob(pattern)) if p.is_dir())
    nested = next((p for p in below if is_coco(p) or is_voc(p)), None)
    place = root / "annotations" if (root / "annotations").is_dir() else root
    names = sorted(p.name for p in place.iterdir())
    near = did_you_mean("instances_train.json", [name for name in names if name.endswith(".json")])
    hint = f"; set data.data_dir={nested}" if nested else near
    raise UserError(
        f"{place}: not a detection set; found {', '.join(names[:8]) or 'nothing'}; expected {EXPECTED}{hint}"
    )


def is_coco(folder: Path) -> bool:
    """Whether the folder has files of annotations with COCO's names."""
    return any(INSTANCES.fullmatch(p.name) for p in folder.glob("annotations/instances_*.json"))


def is_voc(folder: Path) -> bool:
    """Whether the folder has VOC's folders."""
    return (folder / "ImageSets" / "Main").is_dir() and (folder / "Annotations").is_dir()


def open_coco(root: Path, masks: bool = False) -> BoxedSet:
    """COCO's layout, perhaps with masks. Classes are numbered by ascending id; all splits must have the same."""
    found: dict[str, tuple[BoxedSplit, dict[int, str]]] = {}
    for split, names in SPLIT_NAMES.items():
        matches = [m for p in (root / "annotations").iterdir() if (m := INSTANCES.fullmatch(p.name))]
        years = sorted((m for m in matches if m[1] in names), key=lambda m: (m[2], m[1]))
        if years:
            here = [m for m in years if _images_of(root, m)]
            if not here:
                raise UserError(f"{root / years[-1][0][10:-5]}: no folder; expected the images of {years[-1][0]} there")
            found[split] = _coco_split(root / "annotations" / here[-1][0], _images_of(root, here[-1]), masks)
    if "train" not in found:
        names = ", ".join(sorted(p.name for p in (root / "annotations").glob("instances_*.json")))
        raise UserError(f"{root / 'annotations'}: no training split; found {names}, expected instances_train.json")
    _warn_of_other_names(root, found)
    categories = found["train"][1]
    for part, own in found.values():
        if own != categories:
            odd = ", ".join(f"{k} {n}" for k, n in sorted(own.items() ^ categories.items())[:5])
            raise UserError(
                f"{part.made_of[0]}: its categories differ from those of {found['train'][0].made_of[0].name} in {odd}"
            )
    return BoxedSet({split: part for split, (part, _) in found.items()}, list(categories.values()), list(categories))


def _warn_of_other_names(root: Path, found: Collection[str]) -> None:
    """Names files that no split is read from, where a split is missing: it may be one of them, mistyped."""
    known = [name for names in SPLIT_NAMES.values() for name in names]
    wanted = [f"instances_{names[0]}.json" for split, names in SPLIT_NAMES.items() if split not in found]
    files = sorted(p.name for p in (root / "annotations").glob("instances_*.json"))
    for file in files if wanted else []:
        match = INSTANCES.fullmatch(file)
        if match is None or match[1] not in known:
            near = did_you_mean(file, wanted)
            rank_zero_warn(f"{root / 'annotations' / file}: of no split, and not read{near}; there is no {wanted[0]}")


def _images_of(root: Path, match: re.Match) -> Path | None:
    name = match[1] + match[2]
    return next((p for p in (root / name, root / "images" / name) if p.is_dir()), None)


def _coco_split(file: Path, folder: Path, masks: bool) -> tuple[BoxedSplit, dict[int, str]]:
    content = _load_json(file)
    categories = _categories(content["categories"], file)
    numbers, files, sizes = _coco_images(content["images"], file, folder)
    place_of, class_of = {key: row for row, key in enumerate(numbers)}, {key: k for k, key in enumerate(categories)}
    rows: list[tuple] = []
    shapes: list[Rle] = []
    for n, entry in enumerate(content["annotations"]):
        where = f"{file}: annotation {entry.get('id', n) if isinstance(entry, dict) else n}"
        image, category = _field(entry, "image_id", int, where), _field(entry, "category_id", int, where)
        if image not in place_of:
            raise UserError(f"{where} is of image {image}, which is not among the {len(files)} images of the file")
        if category not in class_of:
            known = ", ".join(f"{k} {name}" for k, name in list(categories.items())[:10])
            raise UserError(f"{where} is of category {category}; expected one of the file's categories, {known}")
        box = _field(entry, "bbox", list, where)
        if len(box) != 4 or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in box):
            raise UserError(f"{where}: found 'bbox' {box}, expected x, y, width and height in pixels")
        x, y, width, height = box
        area = _field(entry, "area", float, where) if "area" in entry else width * height
        rows.append(
            (place_of[image], (x, y, x + width, y + height), class_of[category], bool(entry.get("iscrowd", 0)), area)
        )
        if masks:
            shapes.append(run_lengths(entry.get("segmentation"), *sizes[place_of[image]], where))
    entries = content["annotations"]

    def where_of(row: int) -> str:
        return f"{file}: annotation {entries[row].get('id', row)}, a box in {files[rows[row][0]].name}"

    more = {"masks": shapes} if masks else {}
    table = _table(sizes, rows, image_ids=numbers, where=where_of, place=str(file), **more)
    return BoxedSplit(files, [entry["file_name"] for entry in content["images"]], table, [file]), categories


def _load_json(file: Path) -> dict[str, list]:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: cannot read it ({error}); expected a complete JSON file of COCO annotations"
        ) from error
    for key in ("images", "annotations", "categories"):
        found = sorted(content) if isinstance(content, dict) else [type(content).__name__]
        if key not in found:
            raise UserError(
                f"{file}: no key '{key}'; found {', '.join(found[:8]) or 'no keys'}; expected COCO annotations with "
                "images, annotations and categories"
            )
        _field(content, key, list, str(file))
    return content


def _categories(entries: list, file: Path) -> dict[int, str]:
    found: dict[int, str] = {}
    for n, entry in enumerate(entries):
        where = f"{file}: category {n}"
        key, name = _field(entry, "id", int, where), _field(entry, "name", str, where)
        if key in found or name in found.values():
            raise UserError(f"{where} is '{name}' with id {key}; expected names and ids that no other has")
        found[key] = name
    if not found:
        raise UserError(f"{file}: no categories; expected at least one")
    return dict(sorted(found.items()))


def _coco_images(entries: list, file: Path, folder: Path) -> tuple[list[int], list[Path], list[tuple[int, int]]]:
    sizes: dict[int, tuple[int, int]] = {}
    files: list[Path] = []
    for n, entry in enumerate(entries):
        where = f"{file}: image {n}"
        key = _field(entry, "id", int, where)
        where = f"{file}: image {key}"
        if key in sizes:
            raise UserError(f"{where} is there twice; expected an id of its own for each image")
        height, width = (_field(entry, side, int, where) for side in ("height", "width"))
        if min(height, width) < 1:
            raise UserError(f"{where}: found {width}x{height} pixels, expected sides of at least 1")
        files.append(_there(folder / inside(_field(entry, "file_name", str, where), where), where))
        sizes[key] = (height, width)
    if not files:
        raise UserError(f"{file}: no images; expected at least one, or no file for a split that is not there")
    return list(sizes), files, list(sizes.values())


def _there(image: Path, where: str) -> Path:
    if not image.is_file():
        raise UserError(f"{where}: no file {image}; expected every image that is listed")
    return image


def _field(entry: Any, key: str, kind: type, where: str) -> Any:
    """`entry[key]`, which is of a kind."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: found {type(entry).__name__}, expected a mapping with '{key}'")
    if key not in entry:
        raise UserError(f"{where}: no key '{key}'; found {', '.join(map(str, entry)) or 'no keys'}")
    value = entry[key]
    if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
        raise UserError(f"{where}: found '{key}' {str(value)[:40]!r}, expected {KINDS[kind]}")
    return value


def _table(
    sizes: list[tuple[int, int]],
    rows: list[tuple],
    *,
    image_ids: list[int],
    where: Callable[[int], str],
    place: str,
    masks: list[Rle] | None = None,
) -> Annotations:
    columns = list(zip(*rows)) or [()] * 5
    return annotations(sizes, *columns, image_ids=image_ids, where=where, place=place, masks=masks)


def open_voc(root: Path) -> BoxedSet:
    """VOC's layout. Pixels count from 1 there, and boxes end with their last pixel: x1 = xmin - 1, x2 = xmax.

    Classes are the names of all objects, in alphabetical order, with ids from 1. `difficult` objects are crowds: not
    trained on, ignored in evaluation. Images have ids from 1, in the order of their split.
    """
    names: dict[str, int] = {}
    raw = {}
    for split, choices in SPLIT_NAMES.items():
        lists = [root / "ImageSets" / "Main" / f"{name}.txt" for name in choices]
        if file := next((p for p in lists if p.is_file()), None):
            raw[split] = _voc_images(root, file)
    if not raw.get("train"):
        found = ", ".join(sorted(p.name for p in (root / "ImageSets" / "Main").iterdir())[:8]) or "no files"
        raise UserError(
            f"{root / 'ImageSets' / 'Main'}: no training images; found {found}, expected names in train.txt"
        )
    parsed = {split: [_voc_objects(xml, image) for xml, image in pairs] for split, pairs in raw.items() if pairs}
    everything = [name for part in parsed.values() for _, objects in part for name, *_ in objects]
    names = {name: k for k, name in enumerate(sorted(set(everything)))}
    splits = {split: _voc_split(root, split, raw[split], part, names) for split, part in parsed.items()}
    return BoxedSet(splits, list(names), list(range(1, len(names) + 1)))


def _voc_images(root: Path, file: Path) -> list[tuple[Path, Path]]:
    """Annotations and image of every name in a list; none where nothing in it has annotations.

    Raises:
        UserError: no name, one that is there twice, or an image or its annotations that are not there.
    """
    stems = [
        inside(line.split()[0], f"{file}: line {n}")
        for n, line in enumerate(file.read_text().splitlines(), 1)
        if line.strip()
    ]
    if not stems:
        raise UserError(f"{file}: no images; expected at least one, or no file for a split that is not there")
    if twice := next((stem for stem in stems if stems.count(stem) > 1), None) if len(set(stems)) < len(stems) else None:
        raise UserError(f"{file}: '{twice}' is there twice; expected each image once")
    xmls = [root / "Annotations" / f"{stem}.xml" for stem in stems]
    if not any(xml.is_file() for xml in xmls):
        return []
    pairs = []
    for stem, xml in zip(stems, xmls):
        images = [root / "JPEGImages" / f"{stem}{suffix}" for suffix in SUFFIXES]
        image = next((p for p in images if p.is_file()), images[0])
        pairs.append((_there(xml, str(file)), _there(image, str(file))))
    return pairs


def _voc_objects(xml: Path, image: Path) -> tuple[tuple[int, int], list[tuple]]:
    """(height, width) of an image and (class, box, difficult) of its objects."""
    try:
        tree = ElementTree.parse(xml).getroot()
        size = [int(float(tree.findtext(f"size/{side}") or 0)) for side in ("height", "width")]
        objects = [_voc_object(entry) for entry in tree.findall("object")]
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(f"{xml}: cannot read it ({error}); expected the annotations of an image as in VOC") from error
    if min(size) < 1:
        with named(str(image)), Image.open(image) as opened:
            size = [opened.height, opened.width]
    return (size[0], size[1]), objects


def _voc_object(entry: ElementTree.Element) -> tuple[str, tuple[float, ...], bool]:
    name, box = (entry.findtext("name") or "").strip(), entry.find("bndbox")
    if not name or box is None:
        raise LookupError(f"an object without {'bndbox' if name else 'name'}")
    edges = {}
    for key in ("xmin", "ymin", "xmax", "ymax"):
        if (text := box.findtext(key)) is None:
            raise LookupError(f"a bndbox without {key}")
        edges[key] = float(text)
    corners = (edges["xmin"] - 1, edges["ymin"] - 1, edges["xmax"], edges["ymax"])
    return name, corners, (entry.findtext("difficult") or "0").strip() == "1"


def _voc_split(
    root: Path, split: str, pairs: list[tuple[Path, Path]], parsed: list[tuple], names: dict[str, int]
) -> BoxedSplit:
    rows, xml_of = [], []
    for k, (_, objects) in enumerate(parsed):
        for name, box, difficult in objects:
            rows.append((k, box, names[name], difficult, (box[2] - box[0]) * (box[3] - box[1])))
            xml_of.append(pairs[k][0])
    table = _table(
        [size for size, _ in parsed],
        rows,
        image_ids=list(range(1, len(pairs) + 1)),
        where=lambda row: f"{xml_of[row]}: a box",
        place=f"{root / 'Annotations'} ({split})",
    )
    images = [image for _, image in pairs]
    return BoxedSplit(images, [image.name for image in images], table, [xml for xml, _ in pairs])
