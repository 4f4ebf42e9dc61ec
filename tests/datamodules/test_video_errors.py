"""What bad videos, captions, manifests and settings say."""

import json

import pytest
from video_files import frame, pictures, ready, says, three_videos

from penstock.datamodules.video import Video
from penstock.lightning_modules.errors import UserError


@pytest.fixture
def folder(tmp_path):
    return three_videos(tmp_path)


def test_a_folder_at_fault_is_named(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    says(r"no videos; expected files \.mp4 \.webm \.mov \.gif, folders of frames, stills, or tar shards$", empty)
    says(
        r"the training split is empty; set data\.val_fraction=0",
        pictures(empty / "x" / "y", 4).parent,
        val_fraction=0.5,
    )
    file = folder / "captions.jsonl"
    good = file.read_text()
    says(r"no captions file other\.jsonl", folder, captions="other.jsonl")
    for more, pattern in (
        ('{"file": "clip_x", "text": "a"}', r"line 4: no video 'clip_x' in .* \(did you mean 'clip_a'\?\)"),
        ('{"file": "clip_a", "text": "again"}', r"found 2 captions of 'clip_a', expected one for each video"),
        ('{"file": "captions.jsonl", "text": "a"}', r"'captions\.jsonl' is no video"),
        ('{"file": "../up.gif", "text": "a"}', r"line 4: path '\.\./up\.gif' leaves the data folder"),
    ):
        file.write_text(f"{good}{more}\n")
        says(pattern, folder)
    file.write_text(good.splitlines()[0])
    says(r"clip_c\.gif: video without a caption in captions\.jsonl \(and 1 more\)", folder)
    file.unlink()
    (folder / "clip_a.txt").write_text("a")
    says(r"clip_c\.gif: video without a caption \(and 1 more\); expected clip_c\.txt beside it", folder)
    (folder / "clip_q.txt").write_text("a")
    says(r"clip_q\.txt: no video of this name beside it", folder)
    with pytest.raises(UserError, match=r"data\.data_dir: no folder for 'video' .*PENSTOCK_DATA"):
        ready(None, data_dir=None)


def test_an_unreadable_video_is_named(folder):
    content = (folder / "clip_c.gif").read_bytes()
    (folder / "clip_c.gif").write_bytes(content[:20])
    says(r"clip_c\.gif: cannot read the video \(.*\); expected a complete file", folder)
    (folder / "clip_c.gif").write_bytes(content)
    (folder / "clip_a" / "5.png").write_bytes((folder / "clip_a" / "5.png").read_bytes()[:40])
    says(r"clip_a/5\.png: cannot read the frame", folder)
    frame(5, 20, 16).save(folder / "clip_a" / "5.png")
    says(r"5\.png: found 20x16 pixels, expected 16x16 as in 0\.png", folder)
    loader = ready(folder, num_workers=1).train_dataloader()
    with pytest.raises(UserError, match=r"5\.png: found 20x16 pixels"):
        list(loader)


def test_a_manifest_at_fault_is_named(folder):
    file = folder / "list.jsonl"
    says(r"data\.manifest: no file .*list\.jsonl", folder, manifest=str(file))
    for row, pattern in (
        ({"file": "clip_z", "text": "a"}, r"list\.jsonl line 1: no video 'clip_z'"),
        ({"file": "../z", "text": "a"}, r"line 1: path '\.\./z' leaves the data folder"),
        ({"file": "clip_a"}, r"line 1: no 'text'; found file"),
        ({"file": "clip_a", "text": ["a", "b"]}, r"line 1: found 2 captions of 'clip_a', expected one"),
        ({"file": "clip_a", "text": "a", "start": -1}, r"line 1: start is -1, expected seconds of 0 or more"),
        ({"file": "clip_a", "text": "a", "start": 2, "end": 1}, r"line 1: found start 2 and end 1"),
        ({"file": "clip_a", "text": "a", "start": 90}, r"clip_a: found 0 frames, expected at least 4"),
    ):
        file.write_text(json.dumps(row))
        says(pattern, folder, manifest=str(file))
    file.write_text("")
    says(r"list\.jsonl: empty", folder, manifest=str(file))
    (folder / "list.parquet").write_bytes(b"no")
    says(r"list\.parquet: cannot be read \(", folder, manifest=str(folder / "list.parquet"))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"frames": 0}, r"data\.frames: found 0, expected at least 1"),
        ({"stride": 0}, r"data\.stride: found 0"),
        ({"fps": 0}, r"data\.fps: found 0, expected frames per second above 0"),
        ({"aspects": ["16:8"]}, r"data\.aspects: found '16:8', expected some of 21:9, .* \(did you mean '16:9'\?\)"),
        ({"aspects": []}, r"data\.aspects: found ''"),
    ],
)
def test_bad_settings_name_the_key(options, line):
    with pytest.raises(UserError, match=line):
        Video(**options)
