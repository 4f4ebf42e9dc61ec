"""Videos: layouts and captions, resampling, buckets of aspects, order and resume, and what bad data says."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image

from penstock.datamodules.sampling import BucketedBatchSampler, KeyedSampler
from penstock.datamodules.video import Video, aspect_size
from penstock.datamodules.video_clips import fitted
from penstock.datamodules.video_readers import GifReader, PictureReader, open_video
from penstock.lightning_modules.errors import UserError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "videos"
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
    frames = [frame(n, width, height).convert("L") for n in range(len(durations))]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return path


def ready(folder, **options):
    data = Video(**({"data_dir": str(folder), "size": 16, "frames": 4, "val_fraction": 0.0, "batch_size": 1} | options))
    data.prepare_data()
    data.setup()
    return data


def numbers(clip):
    """Which frames a clip `(T, 3, H, W)` of greys holds."""
    return [int(np.abs(GREYS - grey).argmin()) for grey in clip.float().mean((1, 2, 3)).tolist()]


def clips(data, split="train"):
    batches = list(data.loader(data.view(split), data.eval_batches(len(data.view(split)))))
    return [(text, numbers(clip)) for b in batches for text, clip in zip(b["text"], b["video"])]


@pytest.fixture
def folder(tmp_path):
    """Three videos: two folders of frames, one GIF; captions in a file."""
    pictures(tmp_path / "clip_a", 12)
    pictures(tmp_path / "deep" / "clip_b", 9)
    gif(tmp_path / "clip_c.gif", [100] * 5)
    lines = {"clip_a": "grey grows", "deep/clip_b": "short", "clip_c.gif": "moving"}
    rows = [json.dumps({"file": name, "text": text}) for name, text in lines.items()]
    (tmp_path / "captions.jsonl").write_text("\n".join(rows) + "\n")
    return tmp_path


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


def test_sizes_of_aspects():
    assert aspect_size("16:9", 640, 16) == (480, 848)
    assert aspect_size("9:16", 640, 16) == (848, 480)
    assert aspect_size("1:1", 64, 16) == (64, 64)
    assert aspect_size("21:9", 8, 16) == (16, 16)


def test_the_centre_is_cropped_and_resized():
    frames = torch.zeros(1, 3, 20, 60, dtype=torch.uint8)
    frames[..., 20:40] = 200
    assert torch.equal(fitted(frames, 20, 20), frames[..., 20:40])
    assert fitted(frames, 8, 8).unique().tolist() == [200]
    half = fitted(frames, 10, 30)
    assert half.shape == (1, 3, 10, 30)
    assert half[..., :8].max() == 0
    assert half[..., 12:18].min() == 200


@pytest.fixture
def mixed(tmp_path):
    """Wide, square and tall videos of 7, 6 and 1 clips of two frames."""
    for name, count, size in (("wide", 14, (32, 18)), ("square", 12, (16, 16)), ("tall", 2, (18, 32))):
        pictures(tmp_path / name, count, *size)
    return {"folder": tmp_path, "aspects": ["1:1", "16:9", "9:16"], "frames": 2, "batch_size": 2, "multiple": 4}


def test_a_batch_holds_one_aspect(mixed, attach):
    data = attach(ready(**mixed))
    with pytest.warns(match=r"data\.aspects: 9:16 1 clips are less than a batch of 2 and are not trained on"):
        loader = data.train_dataloader()
    assert data.shape == (2, 3, 16, 16)
    batches = list(loader)
    assert len(batches) == len(loader) == 3 + 3
    shapes = [tuple(b["video"].shape[1:]) for b in batches]
    assert {s: shapes.count(s) for s in shapes} == {(2, 3, 16, 16): 3, (2, 3, 12, 20): 3}
    assert len({n for b in batches for n in b["index"].tolist()}) == 12
    seen = [b["index"].tolist() for b in data.reference_dataloader("all")]
    assert sorted(n for b in seen for n in b) == list(range(14))
    assert all(len({int(data.buckets[n]) for n in b}) == 1 for b in seen)


@pytest.mark.filterwarnings("ignore:data.aspects")
def test_buckets_are_drawn_alike_on_all_ranks(mixed, attach):
    one = [b["index"].tolist() for b in attach(ready(**mixed, seed=4)).train_dataloader()]
    shares = [
        [b["index"].tolist() for b in attach(ready(**mixed, seed=4), rank=r, world=2).train_dataloader()]
        for r in (0, 1)
    ]
    assert one == [a + b for a, b in zip(*shares)]
    other = [b["index"].tolist() for b in attach(ready(**mixed, seed=4), epoch=1).train_dataloader()]
    assert other != one
    with pytest.raises(UserError, match=r"data\.aspects: found 9:16 1 clips to evaluate, .* each of the 2 ranks"):
        attach(ready(**mixed), world=2).reference_dataloader("all")
    with pytest.raises(
        UserError, match=r"data\.batch_size: found 8, but no aspect has so many .*1:1 6, 16:9 7, 9:16 1"
    ):
        ready(**mixed | {"batch_size": 8}).train_dataloader()


def test_every_row_once_in_buckets_of_any_size():
    buckets = np.array([0] * 9 + [1] * 5 + [2] * 3)
    for world in (1, 3):
        shares = [
            list(BucketedBatchSampler(KeyedSampler(17), 4, buckets=buckets, rank=r, world=world, drop_last=False))
            for r in range(world)
        ]
        assert len({len(s) for s in shares}) == 1
        assert all(len(batch) for share in shares for batch in share)
        assert sorted(int(n) for share in shares for batch in share for n in batch) == list(range(17))
    with pytest.raises(ValueError, match="a bucket of 3 samples cannot be shared by 4 ranks"):
        BucketedBatchSampler(KeyedSampler(17), 4, buckets=buckets, rank=0, world=4, drop_last=False)


class Watch(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, batch_idx):
        assert batch["video"].is_floating_point()
        self.seen.append((batch["index"].tolist(), batch["text"], batch["video"].double().sum().item()))
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Save(Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:data.aspects")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_the_bits_of_a_run_never_stopped(workers, mixed, tmp_path):
    options = dict(mixed)
    options |= {"data_dir": str(options.pop("folder")), "size": 16, "val_fraction": 0.0, "dequantise": True, "seed": 1}

    def fit(*callbacks, ckpt=None):
        module = Watch()
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        quiet |= {"enable_model_summary": False, "use_distributed_sampler": False, "accelerator": "cpu"}
        trainer = Trainer(max_epochs=2, limit_val_batches=0, callbacks=list(callbacks), **quiet)
        trainer.fit(module, Video(num_workers=workers, **options), ckpt_path=ckpt, weights_only=True)
        return module.seen

    whole = fit()
    assert len(whole) == 12
    for step in (2, 6, 9):
        path = tmp_path / f"{step}.ckpt"
        fit(Save(step, path))
        assert fit(ckpt=path) == whole[step:]


def test_the_fingerprint_counts_frames_captions_and_settings(folder):
    prints = [ready(folder).fingerprint, ready(folder, stride=2).fingerprint, ready(folder, size=32).fingerprint]
    text = (folder / "captions.jsonl").read_text()
    (folder / "captions.jsonl").write_text(text.replace("short", "brief"))
    prints.append(ready(folder).fingerprint)
    frame(3).save(folder / "clip_a" / "0.png")
    prints.append(ready(folder).fingerprint)
    assert len(set(prints)) == 5
    assert ready(folder, batch_size=2).fingerprint == prints[-1]


def says(pattern, folder, **options):
    with pytest.raises(UserError) as caught:
        clips(ready(folder, **options))
    assert re.search(pattern, str(caught.value)), str(caught.value)


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
