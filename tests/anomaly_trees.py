"""Small anomaly-detection sets in the three layouts."""

import csv

import numpy as np
from PIL import Image

SIZE = (12, 10)


def picture(seed, size=SIZE, mode="RGB"):
    """An image of noise, `size` (width, height)."""
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8))


def marked(seed, size=SIZE, level=255):
    """A mask of 0 and `level`, one pixel in five."""
    chosen = np.random.default_rng(1000 + seed).random((size[1], size[0])) < 0.2
    return Image.fromarray((chosen * level).astype(np.uint8))


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def mvtec(root, category="bolt", train=8, good=3, defects=(("crack", 4), ("dent", 3)), suffix=".png", size=SIZE):
    """MVTec AD's layout; images `000.png`, masks `000_mask.png`."""
    folder = root / category
    for i in range(train):
        save(picture(i, size), folder / "train" / "good" / f"{i:03d}{suffix}")
    for i in range(good):
        save(picture(100 + i, size), folder / "test" / "good" / f"{i:03d}{suffix}")
    for k, (defect, count) in enumerate(defects):
        for i in range(count):
            seed = 200 + 50 * k + i
            save(picture(seed, size), folder / "test" / defect / f"{i:03d}{suffix}")
            save(marked(seed, size), folder / "ground_truth" / defect / f"{i:03d}_mask.png")
    return root


def btad(root, category="01", train=4, good=2, spoiled=3):
    """BTAD's layout; bmp images, the masks of their names in png."""
    folder = root / category
    for i in range(train):
        save(picture(i), folder / "train" / "ok" / f"{i:04d}.bmp")
    for i in range(good):
        save(picture(100 + i), folder / "test" / "ok" / f"{i:04d}.bmp")
    for i in range(spoiled):
        save(picture(200 + i), folder / "test" / "ko" / f"{i:04d}.bmp")
        save(marked(200 + i), folder / "ground_truth" / "ko" / f"{i:04d}.png")
    return root


def visa(root, category="nut", train=4, good=2, spoiled=3, change=None):
    """VisA's layout, JPG images; `change` gets the rows of the split file before they are written."""
    rows = []
    for i in range(train + good):
        path = f"{category}/Data/Images/Normal/{i:04d}.JPG"
        save(picture(i), root / path)
        rows.append([category, "train" if i < train else "test", "normal", path, ""])
    for i in range(spoiled):
        image, mask = f"{category}/Data/Images/Anomaly/{i:03d}.JPG", f"{category}/Data/Masks/Anomaly/{i:03d}.png"
        save(picture(200 + i), root / image)
        save(marked(200 + i, level=3 + i), root / mask)
        rows.append([category, "test", "anomaly", image, mask])
    rows.append(["screw", "train", "normal", "screw/Data/Images/Normal/0000.JPG", ""])
    if change:
        change(rows)
    (root / "split_csv").mkdir(exist_ok=True)
    with (root / "split_csv" / "1cls.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["object", "split", "label", "image", "mask"], *rows])
    return root
