"""Videos in tar shards and videos with sources: what is read, in which order, and what bad shards say."""

import io
import json
import tarfile
from functools import partial
from pathlib import Path

import pytest
import torch
import video_files
from PIL import Image
from tars import shard
from video_files import GREYS, clips

from penstock.datamodules import video_readers
from penstock.datamodules.tar_shards import groups
from penstock.lightning_modules.errors import UserError

ready, says = (partial(of_any, frames=2, batch_size=2) for of_any in (video_files.ready, video_files.says))


def gif(numbers):
    """A GIF of 16x16 pixels whose frames tell their numbers by their grey."""
    frames = [Image.new("L", (16, 16), int(GREYS[n])) for n in numbers]
    frames[0].save(out := io.BytesIO(), "GIF", save_all=True, append_images=frames[1:], duration=100)
    return out.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Two shards: three videos, captions in text and in JSON, a folder, two endings, something hidden."""
    shard(
        tmp_path / "0000.tar",
        ("a.gif", gif(range(5))),
        ("a.txt", b"grey grows\n"),
        ("._a.gif", b"a resource fork"),
        ("deep/b.json", json.dumps({"caption": "deep", "fps": 10}).encode()),
        ("deep/b.GIF", gif([7, 6, 5])),
    )
    shard(tmp_path / "0001.tar", ("a.gif", gif([9, 8])), ("a.txt", b"same name, another shard"))
    return tmp_path


def test_members_are_read_in_place(folder, monkeypatch):
    before = sorted(folder.rglob("*"))
    data = ready(folder)
    assert data.shape == (2, 3, 16, 16)
    expected = [("grey grows", [0, 1]), ("grey grows", [2, 3]), ("deep", [7, 6]), ("same name, another shard", [9, 8])]
    assert clips(data) == expected
    assert clips(ready(folder, num_workers=1)) == expected
    monkeypatch.setattr(tarfile, "open", None)
    assert clips(data) == expected, "shards are indexed once"
    assert sorted(folder.rglob("*")) == before


def test_files_of_torchcodec_get_the_bytes_of_the_member(folder, monkeypatch):
    shard(folder / "0000.tar", ("a.mp4", b"content of a"), ("a.txt", b"a"))
    (folder / "0001.tar").unlink()
    seen = []

    class Reader(video_readers.PictureReader):
        def __init__(self, file, seek):
            seen.append(file.read())
            self.count, self.seconds, self.height, self.width = 2, 1.0, 16, 16

        def first_from(self, seconds):
            return 0

    monkeypatch.setattr(video_readers, "FileReader", Reader)
    ready(folder)
    assert seen == [b"content of a"]


def test_splits_and_single_frames(tmp_path):
    still = io.BytesIO()
    Image.new("RGB", (16, 16), (70,) * 3).save(still, "PNG")
    for split, name in (("train", "a"), ("val", "b")):
        shard(tmp_path / split / "0.tar", (f"{name}.png", still.getvalue()), (f"{name}.txt", name.encode()))
    data = ready(tmp_path, frames=1, batch_size=1)
    assert clips(data) == [("a", [7])]
    assert data.prompts(1, "val") == (["b"], None)


def test_a_resumed_epoch_goes_on_exactly(folder):
    loader = ready(folder, seed=3, batch_size=1, stride=1).train_dataloader()
    whole = [batch["index"].tolist() for batch in loader]
    assert len(whole) == 7
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    again = ready(folder, seed=3, batch_size=1, stride=1).train_dataloader()
    again.load_state_dict(loader.state_dict())
    assert [batch["index"].tolist() for batch in again] == whole[3:]


def test_the_fingerprint_counts_the_shards(folder):
    first = ready(folder).fingerprint
    assert ready(folder).fingerprint == first
    shard(folder / "0001.tar", ("a.gif", gif([9, 7])), ("a.txt", b"same name, another shard"))
    assert ready(folder).fingerprint != first


@pytest.fixture
def sourced(tmp_path):
    """Two pairs on disk with a manifest, and the same in a shard."""
    files = {
        "a.gif": gif(range(4)),
        "b.gif": gif([9, 8, 7]),
        "from/a.gif": gif([4, 5, 6, 7, 8]),
        "from/b.gif": gif([1, 2]),
    }
    (tmp_path / "disk" / "from").mkdir(parents=True)
    for name, content in files.items():
        (tmp_path / "disk" / name).write_bytes(content)
    rows = [{"file": f"{name}.gif", "text": name, "source": f"from/{name}.gif"} for name in "ab"]
    (tmp_path / "disk" / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    members = [
        (f"{name}{end}", files[f"{where}{name}.gif"])
        for name in "ab"
        for end, where in ((".gif", ""), (".source.gif", "from/"))
    ]
    shard(tmp_path / "tar" / "0.tar", *members, ("a.txt", b"a"), ("b.txt", b"b"))
    return tmp_path


@pytest.mark.parametrize("kind", ["disk", "tar"])
def test_sources_go_with_their_videos(sourced, kind, attach):
    options = {"manifest": str(sourced / "disk" / "list.jsonl")} if kind == "disk" else {}
    data = attach(ready(sourced / kind, dequantise=True, **options))
    assert data.sourced
    assert clips(data) == [("a", [0, 1]), ("a", [2, 3]), ("b", [9, 8])]
    assert clips(data, key="source") == [("a", [4, 5]), ("a", [6, 7]), ("b", [1, 2])]
    batch = next(iter(data.train_dataloader()))
    assert batch["source"].dtype == torch.uint8
    done = data.on_after_batch_transfer(batch, 0)
    for key in ("source", "video"):
        noise = (done[key] + 1) * 128 - batch[key]
        assert 0 <= noise.min() < noise.max() <= 1
        assert noise.std() > 0.2
    assert not torch.equal(done["source"] - batch["source"] / 128, done["video"] - batch["video"] / 128)
    attach(data, training=False)
    for made in (data.on_after_batch_transfer(batch, 0), data.finished(batch)):
        torch.testing.assert_close(made["source"], batch["source"] / 127.5 - 1)
    whole = next(iter(data.reference_dataloader("train")))
    assert whole["source"].min() >= -1
    assert whole["source"].is_floating_point()


def test_sources_at_fault_are_named(sourced):
    file = sourced / "disk" / "list.jsonl"
    good = {"file": "a.gif", "text": "a", "source": "from/a.gif"}
    for row, pattern in (
        (good | {"source": "../tar/0.tar"}, r"line 2: path '\.\./tar/0\.tar' leaves the data folder"),
        (good | {"source": "from/x.gif"}, r"line 2: no video 'from/x\.gif'"),
        (good | {"source": None}, r"a\.gif: no source; expected one of every video, or of none"),
        (good | {"source": "from/b.gif", "start": 0.1}, r"from/b\.gif: found 1 frames, expected at least 2"),
    ):
        file.write_text(f"{json.dumps(good)}\n{json.dumps(row)}")
        says(pattern, sourced / "disk", manifest=str(file))


def test_a_broken_shard_is_named(folder):
    path = folder / "0001.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        text = tar.getmember("a.txt").offset
    for content, pattern in (
        (b"", r"0001\.tar: cannot be read \(empty file\); expected a whole, uncompressed tar file"),
        (b"no tar" * 200, r"0001\.tar: cannot be read \(.*\); expected a whole"),
        (whole[: text + 200], r"0001\.tar: cut short at byte \d+; expected a whole"),
        (whole[:text], r"0001\.tar: cut short at byte \d+; expected a whole"),
        (whole[:300], r"0001\.tar: cannot be read"),
        (whole[:text] + b"\1" * 512 + whole[text:], r"0001\.tar: broken at byte \d+; expected a whole"),
    ):
        path.write_bytes(content)
        says(pattern, folder)


@pytest.mark.parametrize(
    ("members", "pattern"),
    [
        ([("../up.gif", b"x")], r"1\.tar: member '\.\./up\.gif' leaves the shard; expected names within it"),
        ([("/etc/up.gif", b"x")], r"1\.tar: member '/etc/up\.gif' leaves the shard"),
        ([("a.gif", b"x"), ("a.gif", b"x")], r"1\.tar: member 'a\.gif' comes twice; expected each name once"),
        ([("a.gif", b"x")], r"1\.tar:a: video without a caption; found \.gif, expected \.txt or \.json"),
        ([("a.gif", b"x"), ("a.json", b"[1]")], r"1\.tar:a\.json: found a list, expected an object"),
        ([("a.gif", b"x"), ("a.json", b'{"text": ["a", "b"]}')], r"1\.tar:a: found 2 captions, expected one"),
        ([("a.avi", b"x"), ("a.txt", b"a")], r"1\.tar:a: no video; found \.avi, \.txt, expected one of \.mp4"),
        ([("a.gif", b"GIF89a no"), ("a.txt", b"a")], r"1\.tar:a\.gif: cannot read the video"),
        ([], r"the \.tar shards hold no samples"),
    ],
)
def test_a_shard_at_fault_is_named(tmp_path, members, pattern):
    shard(tmp_path / "1.tar", *members)
    says(pattern, tmp_path)


def test_a_folder_has_shards_or_videos(folder):
    says(r"found data\.captions=c\.jsonl beside '0000\.tar'", folder, captions="c.jsonl")
    (folder / "loose.gif").write_bytes(gif([1, 2]))
    says(r"found 'loose\.gif' beside '0000\.tar'; expected tar shards or videos, not both", folder)


def test_a_shard_that_shrinks_is_named(folder):
    data = ready(folder)
    content = (folder / "0001.tar").read_bytes()
    (folder / "0001.tar").write_bytes(content[:600])
    with pytest.raises(UserError, match=r"0001\.tar:a\.gif: cannot read the video \(OSError: found \d+ of \d+ bytes"):
        clips(data)


def test_links_are_no_members(tmp_path):
    with tarfile.open(tmp_path / "1.tar", "w") as tar:
        link = tarfile.TarInfo("a.gif")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    assert groups(Path(tmp_path / "1.tar")) == {}
