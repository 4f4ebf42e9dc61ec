"""Videos: layouts, captions, manifests, resampling and the fingerprint."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from video_files import clips, frame, gif, pictures, ready, three_videos

from penstock.datamodules.video_readers import GifReader
from penstock.lightning_modules.errors import UserError


@pytest.fixture
def folder(tmp_path):
    return three_videos(tmp_path)


def test_clips_lie_side_by_side_with_captions(folder):
    data = ready(folder)
    assert (data.shape, data.num_classes, data.levels) == ((4, 3, 16, 16), 0, 256)
    assert clips(data) == [
        ("grey grows", [0, 1, 2, 3]),
        ("grey grows", [4, 5, 6, 7]),
        ("grey grows", [8, 9, 10, 11]),
        ("moving", [0, 1, 2, 3]),
        ("short", [0, 1, 2, 3]),
        ("short", [4, 5, 6, 7]),
    ]
    batch = next(iter(data.train_dataloader()))
    assert (batch["video"].dtype, set(batch)) == (torch.uint8, {"video", "text", "index"})
    video = torch.cat([b["video"] for b in data.reference_dataloader("all")])
    assert video.min() == -1
    torch.testing.assert_close(video[0, 3].mean(), torch.tensor(30 / 127.5 - 1))
    assert data.prompts(2, "train") == (["grey grows", "grey grows"], None)
    assert data.texts(np.array([3, 9])) == ["moving", "moving"]


def test_stride_first_only_and_single_frames(folder):
    assert [c for text, c in clips(ready(folder, stride=3)) if text == "short"] == [[0, 1, 2, 3], [3, 4, 5, 6]]
    assert clips(ready(folder, first_only=True)) == [(t, [0, 1, 2, 3]) for t in ("grey grows", "moving", "short")]
    data = ready(folder, frames=1, first_only=True)
    assert data.shape == (1, 3, 16, 16)
    assert clips(data) == [(t, [0]) for t in ("grey grows", "moving", "short")]


def test_stills_are_videos_of_one_frame(tmp_path):
    for n in range(3):
        frame(n).save(tmp_path / f"still {n}.png")
    assert clips(ready(tmp_path, frames=1)) == [(f"still {n}", [n]) for n in range(3)]
    with pytest.raises(UserError, match=r"still 0\.png: found 1 frames, expected at least 2 \(data\.frames\)"):
        ready(tmp_path, frames=2)


def test_captions_beside_the_videos_or_their_names(folder):
    (folder / "captions.jsonl").unlink()
    assert {t for t, _ in clips(ready(folder))} == {"clip_a", "clip_b", "clip_c"}
    for name in ("clip_a", "deep/clip_b", "clip_c"):
        (folder / f"{name}.txt").write_text(f"about {name}\n")
    assert {t for t, _ in clips(ready(folder))} == {"about clip_a", "about deep/clip_b", "about clip_c"}


def test_splits_are_subfolders(tmp_path):
    for k, split in enumerate(("train", "val")):
        pictures(tmp_path / split / f"clip {k}", 4)
    data = ready(tmp_path, val_fraction=0.5)
    assert [clips(data, s)[0][0] for s in ("train", "val", "test")] == ["clip 0", "clip 1", "clip 1"]


def test_nearest_frames_at_another_rate(tmp_path):
    pictures(tmp_path / "a", 12)
    assert clips(ready(tmp_path, fps=5, frames_fps=10))[0][1] == [0, 2, 4, 6]
    assert clips(ready(tmp_path, fps=20, frames_fps=10, frames=6))[0][1] == [0, 0, 1, 1, 2, 2]
    assert clips(ready(tmp_path, fps=7, frames_fps=10, frames=8))[0][1] == [0, 1, 3, 4, 6, 7, 9, 10]
    assert len(clips(ready(tmp_path, fps=7, frames_fps=10, frames=9))) == 1
    with pytest.raises(UserError, match=r"a: found 9 frames at 7 fps, expected at least 10"):
        ready(tmp_path, fps=7, frames_fps=10, frames=10)


def test_uneven_time_stamps_of_a_gif(tmp_path):
    """Frames begin at 0, 0.05, 0.25, 0.3, 0.9 s and the last lasts 0.1 s."""
    gif(tmp_path / "a.gif", [50, 200, 50, 600, 0])
    video = GifReader(tmp_path / "a.gif")
    np.testing.assert_allclose(video.times, [0, 0.05, 0.25, 0.3, 0.9])
    assert (video.count, round(video.seconds, 6)) == (5, 1.0)
    data = ready(tmp_path, fps=10, frames=10)
    assert clips(data)[0][1] == [0, 1, 2, 3, 3, 3, 3, 4, 4, 4]
    assert video.first_from(0.25) == 2
    assert video.first_from(0.26) == 3


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_manifest_names_parts_of_videos(folder, kind):
    rows = [
        {"file": "clip_a", "text": "head", "start": 0.0, "end": 0.5},
        {"file": "clip_a", "text": "tail", "start": 0.6, "end": None},
        {"file": "clip_c.gif", "text": "whole", "start": None, "end": None},
    ]
    path = folder / f"list.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    expected = [("head", [0, 1, 2, 3]), ("tail", [6, 7, 8, 9]), ("whole", [0, 1, 2, 3])]
    assert clips(ready(folder, manifest=str(path), fps=10)) == expected
    assert clips(ready(folder, manifest=str(path), data_dir=None, frames_fps=10)) == expected
    data = ready(folder, manifest=str(path), fps=10, val_fraction=0.5)
    held = {t for t, _ in clips(data, "val")}
    assert held in ({"head", "tail"}, {"whole"})
    assert held.isdisjoint(t for t, _ in clips(data))


def test_the_fingerprint_counts_frames_captions_and_settings(folder):
    prints = [ready(folder).fingerprint, ready(folder, stride=2).fingerprint, ready(folder, size=32).fingerprint]
    text = (folder / "captions.jsonl").read_text()
    (folder / "captions.jsonl").write_text(text.replace("short", "brief"))
    prints.append(ready(folder).fingerprint)
    frame(3).save(folder / "clip_a" / "0.png")
    prints.append(ready(folder).fingerprint)
    assert len(set(prints)) == 5
    assert ready(folder, batch_size=2).fingerprint == prints[-1]
