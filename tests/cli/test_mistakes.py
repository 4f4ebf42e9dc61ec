"""What the user sees on a mistake: one line, the place, the nearest valid choice, exit code 2, nothing left behind."""

import errno
import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from penstock.lightning_modules.cli import main

QUICK = ["experiment=rectified_flow_digits", "logger=csv", "trainer.max_steps=1"]
BARE = ["callbacks.metrics=null", "callbacks.samples=null"]
CLASS = "penstock.lightning_modules.rectified_flow.RectifiedFlow"

MISTAKES = {
    "mistyped key": (["model.lrr=1e-3"], ["at model:", "'lrr' is not accepted", "did you mean 'lr'?"]),
    "mistyped key, written out": (["model.init_args.lrr=1e-3"], ["at model:", "'lrr' is not accepted"]),
    "plus does not help": (["+model.lrr=1e-3"], ["at model:", "'lrr' is not accepted"]),
    "wrong type": (["model.lr=abc"], ["at model.optimizer.lr:", "expected float", "found abc"]),
    "wrong class": ([f"model.class_path={CLASS}s"], ["has no 'RectifiedFlows'", "did you mean 'RectifiedFlow'?"]),
    "wrong module": (["model.class_path=penstoc.Flow"], ["no module named 'penstoc'"]),
    "nested literal": (["model.key=imag"], ["at model.key", "'points'", "did you mean 'image'?"]),
    "nested typo": (["model.net.widht=3"], ["at model.net:", "'widht'", "did you mean 'width'?"]),
    "optimiser typo": (["model.optimizer.betaz=3"], ["at model.optimizer:", "did you mean 'betas'?"]),
    "trainer typo": (["trainer.max_epoch=3"], ["'trainer.max_epoch'", "did you mean 'max_epochs'?"]),
    "callback typo": (["callbacks.samples.row=3"], ["at trainer.callbacks", "did you mean 'rows'?"]),
    "data typo": (["data.batch_sise=3"], ["at data:", "did you mean 'batch_size'?"]),
    "wrong type of data": (["data.batch_size=x"], ["at data.batch_size:", "expected int", "found x"]),
    "unknown strategy": (["trainer.strategy=dpp"], ["strategy", "dpp"]),
    "value refused by the class": (["model.net.width=3"], ["width must be a positive multiple of 4, got 3"]),
    "eps out of range": (["model.eps=2"], ["eps=2", "[0, 1)"]),
    "no samples": (["callbacks.metrics.n=0"], ["configuration: n: 0 samples given, expected at least 2"]),
    "no steps": (["callbacks.metrics.steps=[0]"], ["configuration: steps=0: expected a whole number of 1 or more"]),
    "another shape": (["shape=[1,16,16]"], ["model.net.shape", "(1, 16, 16)", "(1, 8, 8)"]),
    "other classes": (["num_classes=7", "callbacks.metrics=null"], ["model.net.num_classes", "found 7", "10"]),
    "half a callback": (["callbacks=base"], ["callbacks.metrics: no class_path", "callbacks.metrics=null"]),
    "missing folder": (["data=cifar10", "data.data_dir=/nowhere"], ["/nowhere"]),
    "missing checkpoint": (["ckpt_path=nowhere.ckpt"], ["nowhere.ckpt", "no such file"]),
    "empty batch": (["data.batch_size=0"], ["data.batch_size", "found 0", "at least 1"]),
    "batch larger than the data": (["data.batch_size=100000"], ["data.batch_size"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_one_line_and_exit_code_2(name, capsys, tmp_path, monkeypatch):
    words, parts = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *QUICK, *words]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("penstock: ")]
    assert len(err) == 1
    for part in parts:
        assert part in err[0]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_bad_data_leaves_no_folder_behind_with_wandb(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "experiment=rectified_flow_digits", "data=cifar10", "data.data_dir=/nowhere"]) == 2
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("flag", ["--model.lrr=1", "--trainer.max_epoch=1"])
def test_flag_dialect_explains_too(flag, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [f"--model={CLASS}", "--model.net=penstock.lightning_modules.nets.unet.UNet"]
    words += ["--model.optimizer=torch.optim.Adam", "--data=penstock.datamodules.digits.Digits", flag]
    assert main(["fit", *words]) == 2
    err = capsys.readouterr().err
    assert flag.split("=")[0].rpartition(".")[2] in err
    assert "Traceback" not in err


def image(path, size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (*size[::-1], 3) if mode == "RGB" else size[::-1]
    Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8), mode).save(path, quality=95)


def folder_truncated(root):
    for i in range(20):
        image(root / "a" / f"{i}.jpg", (32, 32))
    path = root / "a" / "7.jpg"
    path.write_bytes(path.read_bytes()[:300])
    return ["7.jpg"]


def folder_empty_class(root):
    image(root / "a" / "0.png")
    (root / "b").mkdir()
    return ["b"]


def folder_channels(root):
    for i in range(20):
        image(root / "a" / f"{i}.png", mode="L")
    return ["found 1 channel (L), expected 3", ".png"]


def folder_column(root):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"x": [1, 2], "label": [0, 1]}), root / "train-00000-of-00001.parquet")
    return ["image", "x"]


@pytest.mark.parametrize("make", [folder_truncated, folder_empty_class, folder_channels, folder_column])
@pytest.mark.parametrize("workers", [0, 2])
def test_bad_data_is_named(make, workers, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    parts = make(data)
    size = 32 if make is folder_truncated else 8
    words = ["data=images", f"data.data_dir={data}", f"image_size={size}", "data.batch_size=4", "net.width=8"]
    words = [w.replace("net.", "model.net.") if w.startswith("net.") else w for w in words]
    words += [f"data.num_workers={workers}", "data.memory_gb=0", "callbacks=base", "trainer.max_epochs=1", "logger=csv"]
    assert main(["fit", *words]) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("penstock: ")]
    assert len(err) == 1
    for part in parts:
        assert part in err[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("RUN_DIR", str(folder / "runs" / "x" / "1"))
        assert main(["fit", *QUICK, *BARE, "model.net.width=8"]) == 0
    return folder / "runs" / "x" / "1"


def test_checkpoint_of_another_model(run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ckpt = run / "checkpoints" / "last.ckpt"
    assert main(["fit", *QUICK, *BARE, "model.net.width=16", f"ckpt_path={ckpt}"]) == 2
    assert "weights of another model" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["fit", "sample"])
def test_truncated_checkpoint(verb, run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = (run / "checkpoints" / "last.ckpt").read_bytes()
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(whole[: len(whole) // 2])
    words = [*QUICK, *BARE, "model.net.width=8"] if verb == "fit" else []
    assert main([verb, *words, f"ckpt_path={cut}"]) == 2
    (err,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("penstock: ")]
    assert "cut.ckpt" in err


def test_hostile_checkpoint_runs_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    class Hostile:
        def __reduce__(self):
            import os

            return os.system, (f"touch {tmp_path}/owned",)

    torch.save({"state_dict": Hostile()}, tmp_path / "bad.ckpt")
    assert main(["sample", "ckpt_path=bad.ckpt"]) == 2
    assert "bad.ckpt" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["n=0"], ["n=0", "1 or more"]),
        (["steps=0"], ["steps=0", "1 or more"]),
        (["steps=x"], ["steps=x", "expected a whole number"]),
        (["step=4"], ["step", "did you mean 'steps'?"]),
        (["solver=null"], ["solver=null", "choices: anchored_euler, anchored_heun, ddim"]),
        (["device=foo"], ["device=foo", "expected cpu"]),
        (["solver=huen"], ["solver=huen", "did you mean 'heun'?"]),
        (["labels=12"], ["labels=12", "0 to 9"]),
        (["guidance=x"], ["guidance=x", "expected float"]),
        (["guidance=nan"], ["guidance=nan: expected a finite number"]),
        (["guidance=-inf"], ["guidance=-inf: expected a finite number"]),
        ([f"seed={2**64}"], [f"seed={2**64}: out of range", f"to {2**64 - 1}"]),
        (["steps=bellman:8/0"], ["steps=bellman:8/0", "K_max=0", "did you mean 'bellman:8'?"]),
        (["out=/proc/x"], ["sample out=/proc/x: can't be written"]),
        (["out=/dev/null"], ["sample out=/dev/null: "]),
        (["nonsense"], ["nonsense", "key=value"]),
    ],
)
def test_sample_mistakes(words, parts, run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", f"ckpt_path={run}/checkpoints/last.ckpt", *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


@pytest.mark.parametrize(("folder", "near"), [(".", "checkpoints/last.ckpt"), ("checkpoints", "last.ckpt"), ("..", "")])
def test_sample_from_a_folder(folder, near, run, capsys):
    assert main(["sample", f"ckpt_path={run / folder}"]) == 2
    hint = f" (did you mean '{run / folder / near}'?)" if near else ""
    assert capsys.readouterr().err == f"penstock: ckpt_path={run / folder}: a folder, expected a checkpoint{hint}\n"


def test_sample_tries_the_folder_first(run, capsys, monkeypatch):
    monkeypatch.setattr("penstock.lightning_modules.flow_module.FlowModule.sample", lambda *_, **__: 1 / 0)
    assert main(["sample", f"ckpt_path={run}/checkpoints/last.ckpt", "steps=1", "out=/proc/x"]) == 2
    assert "sample out=/proc/x: can't be written" in capsys.readouterr().err


@pytest.mark.parametrize("old", [False, True])
def test_sample_on_a_full_disk(old, run, capsys, tmp_path, monkeypatch):
    words = [f"ckpt_path={run}/checkpoints/last.ckpt", "n=2", "steps=1", f"out={tmp_path}/a/b"]
    if old:
        assert main(["sample", *words]) == 0
        capsys.readouterr()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(picture, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", full)
    assert main(["sample", *words, "seed=1"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert f"sample out={tmp_path}/a/b: can't be written (No space left on device)" in err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert (tmp_path / "a").exists() == old


def test_samples_of_other_options_have_their_own_folder(run):
    words = [f"ckpt_path={run}/checkpoints/last.ckpt", "n=2", "steps=bellman:1/2"]
    assert main(["sample", *words]) == 0
    assert main(["sample", *words, "solver=heun"]) == 0
    plain, heun = (run / "samples" / f"sample_bellman_1_2_steps{suffix}" for suffix in ("", "_heun"))
    assert json.loads((heun / "report.json").read_text())["solver"] == "heun"
    assert "solver" not in json.loads((plain / "report.json").read_text())
    assert main(["sample", *words[:2], "steps=1", "guidance=1.5", "labels=3,1", "seed=7"]) == 0
    chosen = json.loads((run / "samples" / "sample_1_steps_guidance_1.5_labels_3_1_seed_7" / "report.json").read_text())
    assert (chosen["guidance"], chosen["labels"], chosen["seed"]) == (1.5, "3,1", 7)


def test_sample_writes_pictures(run, capsys, tmp_path):
    words = [
        f"ckpt_path={run}/checkpoints/last.ckpt",
        "n=6",
        "steps=2",
        "labels=3,1",
        "guidance=2",
        f"out={tmp_path}/o",
    ]
    assert main(["sample", *words]) == 0
    assert "4 network calls each" in capsys.readouterr().out
    assert main(["sample", f"ckpt_path={run}/checkpoints/last.ckpt", *words[:3], "solver=heun", words[-1]]) == 0
    assert "4 network calls each" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "o").iterdir()} == {"grid.png", "samples.safetensors", "report.json"}
