"""Clips of VBench: names that its scorer looks for, whole files, resume, ranks, what is refused; a real MP4."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import ranks
import torch
from lightning.pytorch import LightningModule

from penstock.datamodules.prompts import BenchmarkPrompts
from penstock.kernels.philox import Draws
from penstock.lightning_modules.callbacks.benchmark_images import BenchmarkImages
from penstock.lightning_modules.callbacks.benchmark_mp4 import is_whole_mp4
from penstock.lightning_modules.callbacks.benchmark_videos import BenchmarkVideos
from penstock.lightning_modules.errors import UserError

TEXTS = ["a cow, still", "The bund Shanghai, oil painting", "in a jar: bees"]
ROWS = [{"prompt_en": text, "dimension": ["scene"], "auxiliary_info": {}} for text in TEXTS]


def box(kind, content=b""):
    return (8 + len(content)).to_bytes(4, "big") + kind + content


class VideoEncoder:
    """Stands for torchcodec's: boxes of an MP4 around the raw frames."""

    def __init__(self, frames, *, frame_rate):
        assert frames.dtype == torch.uint8
        assert frames.shape[1] == 3
        assert not any(side % 2 for side in frames.shape[2:])
        self.content = bytes([int(frame_rate), *frames.shape[2:]]) + frames.numpy().tobytes()

    def to_file(self, dest, pixel_format):
        assert pixel_format == "yuv420p"
        Path(dest).write_bytes(box(b"ftyp", b"isom") + box(b"moov") + box(b"mdat", self.content))


def install(modules):
    modules["torchcodec"], modules["torchcodec.encoders"] = ModuleType("torchcodec"), ModuleType("torchcodec.encoders")
    modules["torchcodec.encoders"].VideoEncoder = VideoEncoder


@pytest.fixture
def encoder(monkeypatch):
    made = {}
    install(made)
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)


class Filmer(LightningModule):
    """Clips whose levels depend on the noise of the sample and the length of the prompt; calls that vary."""

    takes_text = True

    def __init__(self, size=(4, 6), channels=3, fails_after=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5))
        self.shape, self.fails_after = (2, channels, *size), fails_after
        self.nfe, self.drawn = 0, []

    def predict_step(self, batch, batch_idx):
        if batch_idx == self.fails_after:
            raise RuntimeError("killed")
        self.nfe = int(batch["index"].sum())
        self.drawn += batch["index"].tolist()
        noise = Draws(0, 0, batch["index"]).normal("predict", self.shape)
        length = torch.tensor([len(text) for text in batch["text"]]).view(-1, 1, 1, 1, 1)
        return {"index": batch["index"], "video": self.weight * noise + length / 50 - 0.4}


def draw(fakes, run, module=None, folder=None, devices=1, callback=None, **options):
    module = module or Filmer()
    run.mkdir(parents=True, exist_ok=True)
    path = run / "VBench_full_info.json"
    path.write_text(json.dumps(ROWS))
    data = BenchmarkPrompts("vbench", str(path), **{"batch_size": 4, "samples_per_prompt": 5} | options)
    callback = callback or BenchmarkVideos(folder)
    strategy = "ddp" if devices > 1 else "auto"
    trainer = fakes.quiet_trainer(run, [callback], devices=devices, strategy=strategy)
    assert trainer.predict(module, datamodule=data) is None
    return module


def files(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.mark.usefixtures("encoder")
def test_the_folder_of_vbench(fakes, tmp_path):
    draw(fakes, tmp_path / "run")
    made = files(tmp_path / "run" / "vbench")
    assert list(made) == sorted(f"{text}-{k}.mp4" for text in TEXTS for k in range(5))
    assert not (tmp_path / "run" / "vbench.parts").exists()
    noise = Draws(0, 0, torch.tensor([7])).normal("predict", (2, 3, 4, 6))[0]
    levels = ((0.5 * noise + len(TEXTS[1]) / 50 - 0.4).clamp(-1, 1) + 1) * 127.5
    assert made[f"{TEXTS[1]}-2.mp4"].endswith(bytes([8, 4, 6]) + levels.round().byte().numpy().tobytes())
    manifest = json.loads((tmp_path / "run" / "vbench.json").read_text())
    assert manifest["fps"] == 8
    assert "network_calls" not in manifest


@pytest.mark.usefixtures("encoder")
def test_a_killed_run_goes_on(fakes, tmp_path):
    draw(fakes, tmp_path / "whole", batch_size=15)
    whole = files(tmp_path / "whole" / "vbench")
    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match="killed"):
        draw(fakes, run, Filmer(fails_after=2))
    (run / "vbench.parts").mkdir(exist_ok=True)
    (run / "vbench.parts" / "3.1.mp4").write_bytes(b"half")
    assert draw(fakes, run, batch_size=3).drawn == list(range(8, 15))
    assert files(run / "vbench") == whole
    assert not (run / "vbench.parts").exists()
    cut = run / "vbench" / f"{TEXTS[2]}-4.mp4"
    cut.write_bytes(cut.read_bytes()[:-3])
    assert draw(fakes, run).drawn == [14]
    assert files(run / "vbench") == whole
    with pytest.raises(UserError, match=r"vbench: holds videos of fps=8\.0, here 4\.0; .*callbacks\.videos\.folder="):
        draw(fakes, run, callback=BenchmarkVideos(fps=4.0))


@pytest.mark.usefixtures("encoder")
def test_grey_clips_of_odd_sides(fakes, tmp_path):
    draw(fakes, tmp_path, Filmer((3, 5), 1), limit=1, samples_per_prompt=1)
    content = files(tmp_path / "vbench")[f"{TEXTS[0]}-0.mp4"]
    frames = torch.frombuffer(bytearray(content[-2 * 3 * 4 * 6 :]), dtype=torch.uint8).view(2, 3, 4, 6)
    assert (frames == frames[:, :1]).all()
    assert frames[:, :, 3].max() == 0
    assert frames[:, :, :, 5].max() == 0
    assert frames[:, :, :3, :5].float().std() > 10


def test_whole_files(tmp_path):
    whole = box(b"ftyp", b"isom") + box(b"free") + box(b"mdat", b"x" * 9) + box(b"moov", b"y")
    long = box(b"ftyp") + box(b"moov") + (1).to_bytes(4, "big") + b"mdat" + (20).to_bytes(8, "big") + b"data"
    last = box(b"ftyp") + box(b"moov") + (0).to_bytes(4, "big") + b"mdat" + b"to the end"
    for content, good in (
        (whole, True), (long, True), (last, True), (whole[:-1], False), (whole + b"\0", False), (b"", False),
        (box(b"ftyp") + box(b"mdat"), False), (box(b"moov"), False), (long[:-5], False),
    ):  # fmt: skip
        (tmp_path / "a.mp4").write_bytes(content)
        assert is_whole_mp4(tmp_path / "a.mp4") is good, content
    assert not is_whole_mp4(tmp_path / "none.mp4")


@pytest.mark.usefixtures("encoder")
def test_what_cannot_be_filmed_is_refused(fakes, tmp_path, monkeypatch):
    nan = Filmer()
    torch.nn.init.constant_(nan.weight, torch.nan)
    with pytest.raises(UserError, match="prompt 'a cow, still', sample 0: NaN or infinite numbers in the video"):
        draw(fakes, tmp_path / "nan", nan)
    with pytest.raises(UserError, match="fps: 0 given, expected frames per second above 0"):
        BenchmarkVideos(fps=0)
    with pytest.raises(UserError, match="BenchmarkImages: the data is vbench, expected data=geneval or data=dpg"):
        draw(fakes, tmp_path / "pictures", callback=BenchmarkImages())
    with pytest.raises(UserError, match=r"samples of shape \(2, 2, 4, 6\), expected \(T, 1 or 3, H, W\)"):
        draw(fakes, tmp_path / "two", Filmer(channels=2))
    monkeypatch.setattr(VideoEncoder, "to_file", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no codec")))
    with pytest.raises(UserError, match=r"a cow, still-0\.mp4: cannot be written \(no codec\); the videos that are"):
        draw(fakes, tmp_path / "codec")
    monkeypatch.setitem(sys.modules, "torchcodec.encoders", None)
    with pytest.raises(
        UserError, match=r"torchcodec, which is not installed; expected pip install 'penstock\[video\]'"
    ):
        draw(fakes, tmp_path / "none")


def test_a_real_mp4_is_read_back(fakes, tmp_path):
    decoders = pytest.importorskip("torchcodec.decoders")
    try:
        draw(fakes, tmp_path, Filmer((32, 32)), limit=1, samples_per_prompt=1)
    except UserError:
        pytest.skip("torchcodec is installed, but cannot load FFmpeg")
    path = tmp_path / "vbench" / f"{TEXTS[0]}-0.mp4"
    assert is_whole_mp4(path)
    decoder = decoders.VideoDecoder(str(path))
    assert (len(decoder), decoder.metadata.average_fps, decoder.metadata.width) == (2, 8, 32)
    assert draw(fakes, tmp_path, Filmer((32, 32)), limit=1, samples_per_prompt=1).drawn == [0]


@pytest.mark.slow
@pytest.mark.usefixtures("encoder")
def test_two_ranks_write_the_files_of_one(fakes, tmp_path):
    """One process for each rank, which this file is too."""
    with ranks.running(__file__, tmp_path / "two"):
        draw(fakes, tmp_path / "one")
    assert files(tmp_path / "two" / "vbench") == files(tmp_path / "one" / "vbench")


if __name__ == "__main__":
    import fakes as own

    install(sys.modules)
    draw(own, Path(sys.argv[1]), batch_size=6, devices=2)
