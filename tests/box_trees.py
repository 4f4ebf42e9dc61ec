"""Small sets of images with boxes, laid out as COCO and as Pascal VOC, and what tests of them share."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from penstock.datamodules.detection import Detection

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 2, "name": "cat"}, {"id": 90, "name": "toothbrush"}]
SIZES = ((48, 64), (64, 48), (50, 50), (40, 90), (90, 40))


def picture(seed: int, height: int, width: int) -> Image.Image:
    """Smooth RGB noise."""
    cells = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)


def write(content: object, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def instances(count: int, seed: int = 0, *, sizes=SIZES, empty: int = 5) -> dict:
    """COCO annotations of `count` images `000k.png`, each `empty`-th without boxes."""
    rng = np.random.default_rng(seed)
    images, entries = [], []
    for k in range(count):
        height, width = sizes[k % len(sizes)]
        images.append({"id": 100 + 3 * k, "file_name": f"{k:04d}.png", "height": height, "width": width})
        for _ in range(0 if k % empty == empty - 1 else int(rng.integers(1, 5))):
            w, h = rng.integers(4, width // 2), rng.integers(4, height // 2)
            x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
            box = [round(float(x), 2), round(float(y), 2), float(w), float(h)]
            entries.append(
                {
                    "id": 1000 + len(entries),
                    "image_id": images[-1]["id"],
                    "category_id": int(rng.choice([2, 7, 90])),
                    "bbox": box,
                    "area": float(w * h) * 0.75,
                    "iscrowd": 0,
                }
            )
    rng.shuffle(entries)
    return {"images": images, "annotations": entries, "categories": CATEGORIES}


def coco(root: Path, counts=(("train", 20), ("val", 5), ("test", 4)), *, sizes=SIZES, images: str = "") -> Path:
    """A set in COCO's layout."""
    for n, (split, count) in enumerate(counts):
        content = instances(count, n, sizes=sizes)
        write(content, root / "annotations" / f"instances_{split}.json")
        for k, entry in enumerate(content["images"]):
            file = root / images / split / entry["file_name"]
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(1000 * n + k, entry["height"], entry["width"]).save(file)
    return root


def with_masks(root: Path) -> Path:
    """A COCO set whose masks are the boxes, as polygons."""
    for file in (root / "annotations").iterdir():
        content = json.loads(file.read_text())
        for entry in content["annotations"]:
            x, y, w, h = entry["bbox"]
            entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        write(content, file)
    return root


def edit(root: Path, split: str = "train"):
    """Annotations of a split, and what writes them back."""
    file = root / "annotations" / f"instances_{split}.json"
    content = json.loads(file.read_text())
    return content, lambda: write(content, file)


def voc_object(name: str, box, difficult: int = 0) -> str:
    edges = "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{edges}</bndbox>{part}</object>"


def voc_xml(height: int, width: int, *objects: str) -> str:
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation>{size}{''.join(objects)}</annotation>"


def voc(root: Path, counts=(("train", 6), ("val", 3), ("test", 2))) -> Path:
    """A set in VOC's layout: in each image a cat of all pixels, in each second one also a difficult dog."""
    for n, (split, count) in enumerate(counts):
        names = [f"2007_{100 * n + k:06d}" for k in range(count)]
        write("".join(f"{name}\n" for name in names), root / "ImageSets" / "Main" / f"{split}.txt")
        for k, name in enumerate(names):
            height, width = SIZES[k % len(SIZES)]
            objects = [voc_object("cat", (1, 1, width, height))]
            objects += [voc_object("dog", (5, 6.0, 14.5, 25), 1)] * (k % 2)
            write(voc_xml(height, width, *objects), root / "Annotations" / f"{name}.xml")
            file = root / "JPEGImages" / f"{name}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            picture(1000 * n + k, height, width).save(file)
    return root


def ready(root: Path, **options: object) -> Detection:
    """Data of a folder, set up."""
    options = {"min_size": 64, "max_size": 128, "batch_size": 4, "flip": False, "seed": 3} | options
    data = Detection("mine", str(root), **options)
    data.setup()
    return data


def same(a: object, b: object) -> bool:
    """Whether two batches are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a.dtype == b.dtype and torch.equal(a, b)
