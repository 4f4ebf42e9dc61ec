"""Small videos whose frames tell their numbers by their grey, and what `Video` makes of them."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from penstock.datamodules.video import Video
from penstock.lightning_modules.errors import UserError

GREYS = np.arange(0, 250, 10)


def frame(number, width=16, height=16):
    """A frame that tells its number by its grey."""
    return Image.new("RGB", (width, height), (int(GREYS[number]),) * 3)


def pictures(folder, count, width=16, height=16):
    folder.mkdir(parents=True)
    for n in range(count):
        frame(n, width, height).save(folder / f"{n}.png")
    return folder


def gif(path, durations, width=16, height=16):
    """Frames 0, 1, ..., each for so many ms."""
    frames = [frame(n, width, height).convert("L") for n in range(len(durations))]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return path


def ready(folder, **options):
    """`Video` of a folder, set up."""
    data = Video(**({"data_dir": str(folder), "size": 16, "frames": 4, "val_fraction": 0.0, "batch_size": 1} | options))
    data.prepare_data()
    data.setup()
    return data


def numbers(clip):
    """Which frames a clip `(T, 3, H, W)` of greys holds."""
    return [int(np.abs(GREYS - grey).argmin()) for grey in clip.float().mean((1, 2, 3)).tolist()]


def clips(data, split="train", key="video"):
    """Each clip of a split: its caption and its frames."""
    batches = list(data.loader(data.view(split), data.eval_batches(len(data.view(split)))))
    return [(text, numbers(clip)) for b in batches for text, clip in zip(b["text"], b[key])]


def three_videos(folder):
    """Three videos: two folders of frames, one GIF; captions in a file."""
    pictures(folder / "clip_a", 12)
    pictures(folder / "deep" / "clip_b", 9)
    gif(folder / "clip_c.gif", [100] * 5)
    lines = {"clip_a": "grey grows", "deep/clip_b": "short", "clip_c.gif": "moving"}
    rows = [json.dumps({"file": name, "text": text}) for name, text in lines.items()]
    (folder / "captions.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def says(pattern, folder, **options):
    """Asserts that reading all clips ends in a line like `pattern`."""
    with pytest.raises(UserError) as caught:
        clips(ready(folder, **options))
    assert re.search(pattern, str(caught.value)), str(caught.value)
