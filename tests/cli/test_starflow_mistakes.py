"""Mistakes with autoregressive flows: one line that names the key or the file, exit code 2; what is warned of."""

import os
import subprocess
import sys

import pytest
from PIL import Image

from penstock.lightning_modules.build import model_from_checkpoint
from penstock.lightning_modules.checkpoints import load_checkpoint
from penstock.lightning_modules.cli import main
from penstock.lightning_modules.cli.compose import compose

CLIPS = ["experiment=starflow_v_moving_digits", "logger=csv", "trainer.max_steps=1"]
FOLDER = ["model=starflow_v", "net=starflow", "data=video", "callbacks=video", "logger=csv", "trainer.max_steps=1"]
HASHED = "model.text={class_path: penstock.lightning_modules.nets.text_encoder.HashedText}"
INVERSE = "penstock.lightning_modules.flow.inverse."

FIT = {
    "mistyped key of the inverse": (
        [*CLIPS, "model.inverse.tolerence=1"],
        "config error at model.inverse: option 'tolerence' is not accepted (did you mean 'tolerance'?); Jacobi takes ",
    ),
    "value refused by the inverse": (
        [*CLIPS, "model.inverse.chunk=0"],
        "configuration: Jacobi: chunk=0, expected at least 1",
    ),
    "no class": (
        [*CLIPS, "model.shallow.tolerance=1e-6"],
        f"config error at model.shallow: no class_path, found only {{'tolerance': 1e-06}}; expected "
        f"model.shallow.class_path={INVERSE}Sequential or {INVERSE}Jacobi and its arguments beside it",
    ),
    "value refused by the guidance": (
        [*CLIPS, "model.guidance.weight=-1"],
        "configuration: guidance: weight=-1.0, expected 0 or more",
    ),
    "text of another width": (
        [*CLIPS, "model.net.text_dim=16"],
        "model.net.text_dim: found 16, expected 32, that of model.text",
    ),
    "text of another width, own videos": (
        [*FOLDER, HASHED, "model.net.text_dim=16", "data.data_dir=/nowhere"],
        "model.net.text_dim: found 16, expected 32, that of model.text",
    ),
    "text of another width in the denoiser": (
        [*CLIPS, "model.denoiser.text_dim=16"],
        "model.denoiser.text_dim: found 16, expected 0 or 32, that of model.net",
    ),
    "another shape without an autoencoder": (
        [*CLIPS, "data.video.frames=8"],
        "model.net.shape: found (16, 1, 16, 16), expected (8, 1, 16, 16), the data's shape",
    ),
}


@pytest.mark.parametrize("name", FIT)
def test_fit_in_one_line_and_nothing_is_left(name, capsys, tmp_path, monkeypatch):
    words, expected = FIT[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RUN_DIR", raising=False)
    assert main(["fit", *words]) == 2
    (err,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("penstock: ")]
    assert err.removeprefix("penstock: ").startswith(expected)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_keys_of_the_inverse_work_and_so_does_another_class():
    for name in ("starflow_t2i_256", "starflow_v_moving_digits"):
        found = compose([f"experiment={name}", "model.inverse.tolerance=1e-6"])[0]["model"]["init_args"]["inverse"]
        assert found["class_path"] == f"{INVERSE}Jacobi"
        assert found["init_args"]["tolerance"] == 1e-6
    words = ["model=starflow", "net=starflow", f"model.inverse.class_path={INVERSE}Sequential"]
    assert compose(words)[0]["model"]["init_args"]["inverse"] == {"class_path": f"{INVERSE}Sequential"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one step on clips of four frames of 16x16."""
    folder = tmp_path_factory.mktemp("run")
    words = [*CLIPS, "callbacks=base", "frames=4", "data.short.frames=2", "model.net.dim=32", "model.net.depths=[1,1]"]
    words += ["model.net.patch=4", "model.denoiser.channels=16", "model.denoiser.dim=32", "model.denoiser.head_dim=32"]
    words += ["model.denoiser.depth=1", "data.video.n_val=2", "data.video.n_test=2", "trainer.limit_test_batches=1"]
    words += ["callbacks.samples=null", "callbacks.metrics=null", "callbacks.bits=null", "callbacks.curve=null"]
    words += ["callbacks.ema=null", "trainer.limit_val_batches=0", "trainer.num_sanity_val_steps=0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("RUN_DIR", str(folder / "runs" / "x" / "1"))
        assert main(["fit", *words]) == 0
    return folder / "runs" / "x" / "1"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "empty").mkdir()
    (folder / "text.txt").write_text("no video")
    (folder / "junk.gif").write_bytes(b"no gif")
    (folder / "clip").mkdir()
    for n in range(4):
        Image.new("L", (16, 16), 60 * n).save(folder / "clip" / f"{n}.png")
    return folder


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["guidance=-1"], "guidance=-1: expected 0 or more"),
        (["frames=-3"], "frames=-3: expected a whole number of 1 or more"),
        (["frames=0"], "frames=0: expected a whole number of 1 or more"),
        (["image={}/clip/0.png", "frames=1"], "frames=1: image={}/clip/0.png leaves none to make; expected 2 or more"),
        (["video={}/empty"], "{}/empty: no pictures in it; expected frames, .png .jpg .jpeg .webp .bmp"),
        (["video={}/text.txt"], "{}/text.txt: found '.txt', expected one of .png "),
        (["image={}/junk.gif"], "{}/junk.gif: cannot read the picture (UnidentifiedImageError: "),
    ],
)
def test_samples_are_refused_in_one_line(words, line, run, files, capsys):
    words = [word.format(files) for word in words]
    assert main(["sample", f"ckpt_path={run}/checkpoints/last.ckpt", "n=1", "steps=1", *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(f"penstock: {line.format(files)}")
    assert not (run / "samples").exists()


def test_beginnings_that_were_not_trained_are_told_once_and_after_the_bar(run, files, capsys, tmp_path):
    words = [f"ckpt_path={run}/checkpoints/last.ckpt", "batch=1", "steps=1", f"out={tmp_path}/o"]
    assert main(["sample", *words, "n=2", f"last={files}/clip/0.png"]) == 0
    found = capsys.readouterr()
    last, *_ = told = [line for line in found.err.splitlines() if line.startswith("penstock: warning: ")]
    assert last.endswith(
        f"last={files}/clip/0.png: the model has model.last_frame=0, so it never learnt to end with a picture"
    )
    assert len(told) == len(set(told)) == 2
    assert told[1].startswith("penstock: warning: samples: ")
    assert "autoregressive_module.py" not in found.err
    assert found.out.startswith("2 samples, ")
    assert main(["sample", *words, "n=1", f"source={files}/clip"]) == 0
    found = capsys.readouterr()
    assert (
        f"source={files}/clip: its data had no sources, so the model never learnt to follow another clip" in found.err
    )
    assert found.out.startswith("1 sample, ")


def test_checkpoints_tell_whether_there_were_sources(run, tmp_path):
    path = run / "checkpoints" / "last.ckpt"
    assert load_checkpoint(path)["sourced"] is False
    assert model_from_checkpoint(path).sourced is False


def test_a_reader_that_has_seen_enough():
    done = subprocess.Popen(
        [sys.executable, "-m", "penstock.lightning_modules", "list"],
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    done.stdout.close()
    assert done.stderr.read() == b""
    assert done.wait(60) == 0
