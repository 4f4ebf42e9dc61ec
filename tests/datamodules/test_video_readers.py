"""Readers of videos: torchcodec, real files against FFmpeg's frames, GIFs without it, folders of frames."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from video_files import GREYS, clips, numbers, pictures, ready, says

from penstock.datamodules.video_readers import PictureReader, open_video

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "videos"


class Decoder:
    """What `FileReader` uses of torchcodec: 24 frames at 10 per second whose stream begins at 2 s."""

    metadata = SimpleNamespace(
        num_frames=24, average_fps=10.0, begin_stream_seconds=2.0, end_stream_seconds=4.4, width=16, height=16
    )

    def __init__(self, source, seek_mode):
        assert seek_mode == "approximate"
        self.first_was_read = False

    def get_frame_at(self, row):
        self.first_was_read = row == 0

    def get_frames_at(self, rows):
        assert self.first_was_read
        data = torch.stack([torch.full((3, 16, 16), int(GREYS[row]), dtype=torch.uint8) for row in rows])
        return SimpleNamespace(data=data)

    def get_frames_played_at(self, seconds):
        assert all(2.0 <= s < 4.4 for s in seconds)
        return self.get_frames_at([int((s - 2) * 10 + 1e-9) for s in seconds])


def test_files_go_through_torchcodec(tmp_path, monkeypatch):
    (tmp_path / "a.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    says(r"a\.mp4: \.mp4 files are read by torchcodec, which is not installed; expected pip install 'pen", tmp_path)
    module = ModuleType("torchcodec.decoders")
    monkeypatch.setitem(sys.modules, "torchcodec", ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)
    module.VideoDecoder = Decoder
    quick = {"seek": "approximate"}
    assert clips(ready(tmp_path, frames=12, **quick)) == [("a", [*range(12)]), ("a", [*range(12, 24)])]
    assert clips(ready(tmp_path, fps=5, **quick))[0][1] == [0, 2, 4, 6]
    assert clips(ready(tmp_path, fps=4, frames=9, **quick))[0][1] == [0, 2, 5, 7, 10, 12, 15, 17, 20]
    assert clips(ready(tmp_path, fps=30, frames=72, **quick))[0][1][-5:] == [22, 23, 23, 23, 23]
    (tmp_path / "list.jsonl").write_text('{"file": "a.mp4", "text": "part", "start": 0.5, "end": 0.9}')
    assert clips(ready(tmp_path, manifest=str(tmp_path / "list.jsonl"), **quick)) == [("part", [5, 6, 7, 8])]

    def without_ffmpeg(source, seek_mode):
        raise RuntimeError("Could not load libtorchcodec. Likely causes: FFmpeg is not properly installed")

    module.VideoDecoder = without_ffmpeg
    says(r"a\.mp4: torchcodec cannot load FFmpeg; expected FFmpeg's shared libraries", tmp_path)


def real_decoder():
    if not REAL.is_dir():
        pytest.skip(f"no real videos at {REAL}")
    decoders = pytest.importorskip("torchcodec.decoders")
    try:
        return decoders.VideoDecoder(str(REAL / "realshort.mp4")) and decoders.VideoDecoder
    except RuntimeError:
        pytest.skip("torchcodec is installed, but cannot load FFmpeg")


def test_real_files_after_a_jump_are_as_read_in_order():
    decoder = real_decoder()
    for name, count, size in (("cockatoo.mp4", 280, (720, 1280)), ("realshort.mp4", 36, (240, 320))):
        inside = decoder(str(REAL / name))
        whole = inside.get_frames_in_range(0, min(count, 170)).data
        last = len(whole) - 1
        video = open_video(REAL / name)
        assert (video.count, video.height, video.width) == (count, *size)
        assert torch.equal(video.frames(np.array([last, last])), whole[[last, last]])
        near = open_video(REAL / name).near(np.array([0.0, (last - 10.4) / inside.metadata.average_fps]))
        assert torch.equal(near, whole[[0, last - 10]])


@pytest.mark.parametrize("ending", ["mp4", "webm", "mov"])
def test_files_of_every_ending(ending, tmp_path):
    real_decoder()
    encoders = pytest.importorskip("torchcodec.encoders")
    ramp = torch.stack([torch.full((3, 64, 64), int(grey), dtype=torch.uint8) for grey in GREYS[::2]])
    encoders.VideoEncoder(ramp, frame_rate=10).to_file(str(tmp_path / f"a.{ending}"))
    found = clips(ready(tmp_path, size=64, frames=6, fps=5))
    assert [(text, [n // 2 for n in clip]) for text, clip in found] == [("a", [0, 2, 4, 6, 8, 10])]
    (tmp_path / f"a.{ending}").write_bytes((tmp_path / f"a.{ending}").read_bytes()[:200])
    says(rf"a\.{ending}: cannot read the video \(RuntimeError: .*\); expected a complete file", tmp_path)


def test_a_real_gif_is_what_ffmpeg_reads():
    decoder = real_decoder()
    ours, theirs = open_video(REAL / "newtonscradle.gif"), decoder(str(REAL / "newtonscradle.gif"))
    found = theirs.get_frames_at(list(range(36)))
    assert ours.count == 36
    np.testing.assert_allclose(ours.times, found.pts_seconds, atol=1e-6)
    assert torch.equal(ours.frames(np.arange(36)), found.data)


def test_real_videos_in_their_aspects():
    real_decoder()
    data = ready(REAL, frames=8, fps=10, size=96, aspects=["16:9", "5:4"], stride=60)
    assert data.sizes == [(64, 128), (80, 112)]
    batches = list(data.reference_dataloader("all"))
    assert {tuple(b["video"].shape[-2:]) for b in batches} == {(64, 128), (80, 112)}
    assert {b["text"][0].split()[1] for b in batches} == {"white", "potted", "newton's"}
    assert all(b["video"].flatten(1).std() > 0.2 for b in batches)


def test_a_real_gif_without_torchcodec():
    if not REAL.is_dir():
        pytest.skip(f"no real videos at {REAL}")
    video = open_video(REAL / "newtonscradle.gif")
    assert (video.count, video.height, video.width, round(video.seconds, 3)) == (36, 150, 200, 0.82)
    assert video.near(np.array([0.0, 0.8])).shape == (2, 3, 150, 200)


def test_frames_are_ordered_by_their_numbers(tmp_path):
    assert [p.name for p in PictureReader([*sorted(pictures(tmp_path / "a", 12).iterdir())], 1.0).files][1] == "1.png"
    assert numbers(open_video(tmp_path / "a").frames(np.arange(12))) == list(range(12))
