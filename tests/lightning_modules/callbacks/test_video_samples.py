"""Sample clips as GIF and MP4: the same pixels as the samples, in the run folder, in W&B, from `penstock sample`."""

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import wandb
from PIL import Image
from safetensors.torch import load_file

from penstock.lightning_modules.callbacks.predictions import Predictions
from penstock.lightning_modules.callbacks.samples import SampleGrid
from penstock.lightning_modules.callbacks.video_samples import reason, save_clips
from penstock.lightning_modules.cli import main
from penstock.lightning_modules.errors import UserError

NET = '''
import torch
from torch import nn


class ClipNet(nn.Module):
    """The least network of clips: a scale for each frame."""

    def __init__(self, shape: list[int] = (2,), num_classes: int = 0):
        super().__init__()
        self.shape, self.num_classes = tuple(shape), num_classes
        self.scale = nn.Parameter(torch.zeros(shape[0], 1, 1, 1))

    def forward(self, x, t, cond=None):
        return x * self.scale
'''


@pytest.fixture
def no_torchcodec(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.encoders", None)


def read(path):
    """Frames and durations of a GIF."""
    with Image.open(path) as image:
        frames, lasting = [], []
        for k in range(image.n_frames):
            image.seek(k)
            frames.append(np.asarray(image.convert("RGB")))
            lasting.append(image.info["duration"])
    return np.stack(frames), lasting


def moving(n, frames=4, channels=1, side=8):
    """Clips `(n, T, C, side, side)` of a bright column that moves; clip k starts at column k."""
    clips = torch.full((n, frames, channels, side, side), -1.0)
    for k in range(n):
        for t in range(frames):
            clips[k, t, :, :, (k + t) % side] = 1
    return clips


@pytest.mark.usefixtures("no_torchcodec")
def test_a_gif_holds_the_clips_side_by_side(tmp_path):
    clips = moving(3)
    assert save_clips(clips, 2, tmp_path / "step_8", fps=10) == tmp_path / "step_8.gif"
    frames, lasting = read(tmp_path / "step_8.gif")
    assert frames.shape == (4, 2 * 66 + 2, 2 * 66 + 2, 3)
    assert lasting == [100] * 4
    for t, frame in enumerate(frames):
        for k, (top, left) in enumerate(((2, 2), (2, 68), (68, 2))):
            tile = frame[top : top + 64 : 8, left : left + 64 : 8, 0]
            assert np.array_equal(tile, (clips[k, t, 0].numpy() + 1) * 127.5)
    assert [path.name for path in tmp_path.iterdir()] == ["step_8.gif"]


@pytest.mark.usefixtures("no_torchcodec")
def test_odd_sizes_become_even_and_colours_stay(tmp_path):
    clips = torch.full((1, 2, 3, 65, 67), -1.0)
    clips[:, 1, 2] = 1
    frames, _ = read(save_clips(clips, 1, tmp_path / "a"))
    assert frames.shape == (2, 66, 68, 3)
    assert frames[1, 30, 30].tolist() == [0, 0, 255]


def test_an_mp4_where_torchcodec_can_write_one(tmp_path, monkeypatch):
    module, seen = ModuleType("torchcodec.encoders"), []

    class VideoEncoder:
        def __init__(self, frames, *, frame_rate):
            seen.append((tuple(frames.shape), frames.dtype, frame_rate))

        def to_file(self, dest, pixel_format):
            if len(seen) > 1:
                raise RuntimeError("no encoder")
            Path(dest).write_bytes(b"mp4")

    module.VideoEncoder = VideoEncoder
    monkeypatch.setitem(sys.modules, "torchcodec", ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.encoders", module)
    assert save_clips(moving(2), 2, tmp_path / "a", fps=5) == tmp_path / "a.mp4"
    assert seen == [((4, 3, 68, 134), torch.uint8, 5)]
    with pytest.warns(match=r"b\.mp4 is not written, the GIF beside it is: .*no encoder"):
        assert save_clips(moving(2), 2, tmp_path / "b") == tmp_path / "b.gif"


def test_what_torchcodec_says_is_told_in_one_sentence():
    long = RuntimeError("Could not load libtorchcodec. Likely causes:\n 1. FFmpeg is not properly installed")
    assert reason(long) == "Could not load libtorchcodec"
    assert (
        reason(RuntimeError("/a/b.so: cannot open shared object file: No such file"))
        == "cannot open shared object file"
    )
    assert reason(RuntimeError("")) == "RuntimeError"


def test_a_real_mp4_is_read_back(tmp_path):
    decoders = pytest.importorskip("torchcodec.decoders")
    clips = moving(4, frames=6)
    try:
        path = save_clips(clips, 2, tmp_path / "a", fps=10)
        assert path.suffix == ".mp4"
        decoder = decoders.VideoDecoder(str(path))
    except RuntimeError:
        pytest.skip("torchcodec is installed, but cannot load FFmpeg")
    frames, _ = read(tmp_path / "a.gif")
    assert (len(decoder), decoder.metadata.average_fps) == (6, 10)
    found = decoder.get_frames_in_range(0, 6).data.permute(0, 2, 3, 1).numpy()
    assert np.abs(found.astype(float) - frames).mean() < 8


@pytest.fixture
def module_and_data(fakes):
    clips, label = moving(64), torch.arange(64) % 8
    return fakes.FakeModule(clips, label, scale=0.0), fakes.FakeData({"video": clips, "label": label}, 8, "clips")


@pytest.mark.usefixtures("no_torchcodec")
def test_a_fit_leaves_a_gif_a_picture_and_tells_the_loggers(fakes, module_and_data, tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    class Recorder(CSVLogger):
        videos = ()

        def log_video(self, key, videos, step=None):
            self.videos = [(key, videos, step)]

    module, data = module_and_data
    logger = Recorder(tmp_path, name="a")
    trainer = fakes.quiet_trainer(tmp_path, [SampleGrid(rows=2, cols=8, fps=20)], logger=[logger])
    trainer.fit(module, datamodule=data)
    folder = tmp_path / "samples"
    assert sorted(p.name for p in folder.iterdir()) == ["step_000008.gif", "step_000008.png"]
    assert logger.videos == [("samples_video", [str(folder / "step_000008.gif")], 8)]
    frames, lasting = read(folder / "step_000008.gif")
    assert lasting == [50] * 4
    tile = frames[1, 2:66:8, 2 + 3 * 66 : 66 + 3 * 66 : 8, 0]
    assert tile[0].argmax() == 4, "column 3 holds class 3, whose bar is one further in frame 1"
    assert Image.open(folder / "step_000008.png").size == (4 * 66 + 2, 16 * 66 + 2)


@pytest.mark.usefixtures("no_torchcodec")
def test_captions_of_the_data_are_asked_for_where_the_module_takes_text(fakes, tmp_path):
    module = fakes.FakeModule(moving(64), None, scale=0.0)
    data = fakes.FakeData({"video": moving(64)}, 0, "clips")
    asked = []

    def sample(n, *, steps, cond=None, generator=None):
        asked.append(cond)
        return module.memory[:n]

    module.sample, module.takes_text = sample, True
    data.prompts = lambda n, split: ([f"{split} {k}" for k in range(n)], None)
    fakes.quiet_trainer(tmp_path, [SampleGrid(rows=1, cols=3)]).validate(module, datamodule=data, verbose=False)
    assert asked == [["all 0", "all 1", "all 2"]]
    assert (tmp_path / "samples" / "validate.gif").is_file()


@pytest.mark.usefixtures("no_torchcodec")
def test_predictions_of_clips_are_drawn(fakes, tmp_path):
    trainer = fakes.quiet_trainer(tmp_path, [])
    prediction = {"index": torch.arange(3), "video": moving(3)}
    Predictions().write_on_batch_end(trainer, None, prediction, None, {}, 0, 0)
    assert sorted(p.suffix for p in (tmp_path / "predictions").iterdir()) == [".gif", ".png", ".safetensors"]


def test_other_rates_are_refused():
    with pytest.raises(UserError, match="fps: 0 given, expected frames per second above 0"):
        SampleGrid(fps=0)


@pytest.fixture
def no_wandb_run():
    """No run of W&B is open in this process, before and after."""
    wandb.finish()
    yield
    wandb.finish()


@pytest.mark.usefixtures("no_torchcodec", "no_wandb_run")
def test_the_command_line_makes_clips(tmp_path, monkeypatch):
    (tmp_path / "clip_net.py").write_text(NET)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "run"))
    words = [
        "model=rectified_flow",
        "model.net={class_path: clip_net.ClipNet, shape: [3, 1, 12, 12]}",
        "model.key=video",
    ]
    words += ["data=moving_digits", "frames=3", "image_size=12", "data.n_train=16", "data.batch_size=8", "data.n_val=8"]
    words += ["callbacks=video", "callbacks.samples.steps=1", "trainer.max_epochs=1", "trainer.accelerator=cpu"]
    assert main(["fit", *words, "data.n_test=8"]) == 0
    run = tmp_path / "run"
    for name in ("step_000002", "test"):
        assert read(run / "samples" / f"{name}.gif")[0].shape == (3, 4 * 62 + 2, 4 * 62 + 2, 3)
        assert (run / "samples" / f"{name}.png").is_file()
    kept = [p.name for p in run.glob("wandb/offline-run-*/files/media/videos/*.gif")]
    assert len(kept) == 2
    assert all(name.startswith("samples_video") for name in kept)
    assert np.isfinite(json.loads((run / "metrics.json").read_text())["test/loss"])
    monkeypatch.delenv("RUN_DIR")
    assert main(["sample", f"ckpt_path={run}/checkpoints/last.ckpt", "n=9", "steps=2", f"out={tmp_path}/out"]) == 0
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert files == {"grid.gif", "grid.png", "report.json", "samples.safetensors"}
    samples = load_file(tmp_path / "out" / "samples.safetensors")["samples"]
    assert samples.shape == (9, 3, 1, 12, 12)
    assert read(tmp_path / "out" / "grid.gif")[0].shape == (3, 3 * 62 + 2, 3 * 62 + 2, 3)
