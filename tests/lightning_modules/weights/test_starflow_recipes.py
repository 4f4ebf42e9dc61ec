"""STARFlow's and STARFlow-V's recipes from the command line, on models of the same classes with random weights."""

import json
import os
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("diffusers", minversion="0.37", reason="diffusers is not installed (extra text2image)")
pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed (extra text2image)")

from penstock.lightning_modules.checkpoints import load_checkpoint
from penstock.lightning_modules.cli import _run

FOLDERS = runpy.run_path(str(Path(__file__).parent / "starflow_folders.py"))
COMMON = [
    "trainer.max_steps=2", "trainer.max_epochs=-1", "trainer.accelerator=cpu", "trainer.devices=1", "logger=csv",
    "trainer.enable_model_summary=false", "data.num_workers=0", "callbacks.samples.rows=1", "callbacks.samples.cols=2",
    "callbacks.samples.steps=2", "trainer.log_every_n_steps=1",
]  # fmt: skip
IMAGES = ["model.net.shape=[4,8,8]", "model.net.dim=32", "model.net.depths=[1,1,2]", "model.net.head_dim=32"]
CLIPS = ["model.net.shape=[3,48,2,3]", "model.net.dim=32", "model.net.deep_dim=64", "model.net.depths=[1,1,2]"]
CLIPS += ["model.net.head_dim=32", "model.denoiser.dim=32", "model.denoiser.depth=2", "model.denoiser.head_dim=32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All that recipes stand on."""
    path = tmp_path_factory.mktemp("starflow")
    FOLDERS["t5"](path / "t5")
    FOLDERS["image_vae"](path / "image_vae")
    FOLDERS["wan"](path / "wan")
    FOLDERS["pictures"](path / "pictures")
    FOLDERS["clips"](path / "clips")
    FOLDERS["classes"](path / "classes")
    return path


def text_to_image(folder):
    found = [word for word in COMMON if "strategy" not in word]
    found += ["experiment=starflow_t2i_256", "trainer.strategy=auto", *IMAGES, "model.net.text_dim=12"]
    found += [
        f"model.text.path={folder / 't5'}",
        "model.text.length=8",
        f"model.autoencoder.path={folder / 'image_vae'}",
    ]
    return [*found, "image_size=16", "callbacks.metrics=null", "data.batch_size=4"]


def text_to_video(folder, data="video_480p"):
    found = [word for word in COMMON if "strategy" not in word]
    found += ["experiment=starflow_v_480p", "trainer.strategy=auto", *CLIPS, "model.net.text_dim=12", "frames=9"]
    found += ["model.denoiser.text_dim=12", f"model.text.text.path={folder / 't5'}", "model.text.text.length=24"]
    found += [f"model.autoencoder.path={folder / 'wan'}", "image_size=32", "model.window=3", "model.context=2"]
    return [
        *found,
        f"data={data}",
        "data.batch_size=2",
        "callbacks.metrics.n=4",
        "model.inverse.chunk=4",
        "model.inverse.later=null",
    ]


@pytest.fixture(autouse=True)
def alone():
    before = set(os.environ)
    yield
    for name in os.environ.keys() - before:
        del os.environ[name]


def trained(run):
    """The state of a run, after a look at what it left."""
    checkpoint = load_checkpoint(run / "checkpoints" / "last.ckpt")
    assert checkpoint["global_step"] == 2
    state = checkpoint["state_dict"]
    assert not any(key.startswith(("text", "autoencoder", "prompted")) for key in state)
    assert all(value.isfinite().all() for value in state.values())
    return state


def drawn(run, out, *words):
    last = run / "checkpoints" / "last.ckpt"
    assert _run(["sample", f"ckpt_path={last}", "n=2", "steps=2", "device=cpu", f"out={out}", *words]) == 0
    samples = load_file(out / "samples.safetensors")["samples"]
    assert samples.isfinite().all()
    return samples


def losses(run):
    metrics = json.loads((run / "metrics.json").read_text())
    return {name: value for name, value in metrics.items() if "loss" in name or "denoiser" in name}


def test_text_to_image_trains_alike_from_pictures_and_from_latents(folder, tmp_path, monkeypatch):
    words = [*text_to_image(folder), f"data.data_dir={folder / 'pictures'}", "data.val_fraction=0.2"]
    assert _run(["encode", *words, f"out={tmp_path / 'latents'}", "batch=2", "shard=4", "dtype=float32"]) == 0
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "direct"))
    assert _run(["fit", *words]) == 0
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "cached"))
    own = [word for word in text_to_image(folder) if not word.startswith("data.")]
    own += ["data=latents", f"data.folder={tmp_path / 'latents'}", "data.batch_size=4", "data.num_workers=0"]
    assert _run(["fit", *own]) == 0
    direct, cached = (trained(tmp_path / name) for name in ("direct", "cached"))
    for key, value in direct.items():
        torch.testing.assert_close(cached[key], value, atol=1e-5, rtol=1e-3)
    assert losses(tmp_path / "direct") == pytest.approx(losses(tmp_path / "cached"), rel=1e-3)
    samples = drawn(tmp_path / "cached", tmp_path / "out", "prompt=a cat", "guidance=2")
    assert samples.shape == (2, 3, 16, 16)
    assert not samples.equal(drawn(tmp_path / "cached", tmp_path / "out2", "prompt=a dog", "guidance=2"))


def test_classes_to_image_trains_from_latents(folder, tmp_path, monkeypatch):
    words = ["data=images", "data.name=mine", f"data.data_dir={folder / 'classes'}", "image_size=16"]
    words += [f"autoencoder={folder / 'image_vae'}", "data.val_fraction=0.25"]
    assert _run(["encode", *words, f"out={tmp_path / 'latents'}", "batch=2", "shard=4"]) == 0
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "run"))
    found = [word for word in COMMON if "strategy" not in word]
    found += ["experiment=starflow_imagenet256", "trainer.strategy=auto", *IMAGES, "model.net.text_dim=4"]
    found += ["model.text.num_classes=3", f"model.autoencoder.path={folder / 'image_vae'}", "callbacks.metrics=null"]
    found += [f"data.real.data_dir={folder / 'classes'}", "data.real.image_size=16", "data.batch_size=4"]
    assert _run(["fit", *found, f"data.folder={tmp_path / 'latents'}"]) == 0
    trained(tmp_path / "run")
    assert drawn(tmp_path / "run", tmp_path / "out", "prompt=2").shape == (2, 3, 16, 16)


def test_text_to_video_trains_and_continues_a_picture(folder, tmp_path, monkeypatch):
    words = [*text_to_video(folder), f"data.data_dir={folder / 'clips'}", "data.val_fraction=0.4"]
    assert _run(["encode", *words, f"out={tmp_path / 'latents'}", "batch=1", "shard=2", "dtype=float32"]) == 0
    assert json.loads((tmp_path / "latents" / "latents.json").read_text())["shapes"] == [[3, 48, 2, 3]]
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "direct"))
    assert _run(["fit", *words]) == 0
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "cached"))
    own = [word for word in text_to_video(folder, "latents") if not word.startswith(("data.", "frames="))]
    own += [f"data.folder={tmp_path / 'latents'}", "data.batch_size=2", "data.num_workers=0", "callbacks.metrics=null"]
    assert _run(["fit", *own]) == 0
    trained(tmp_path / "direct")
    trained(tmp_path / "cached")
    assert losses(tmp_path / "direct") == pytest.approx(losses(tmp_path / "cached"), rel=1e-2)
    assert drawn(tmp_path / "cached", tmp_path / "a", "prompt=a cat").shape == (2, 9, 3, 32, 48)
    picture = folder / "clips" / "clip a" / "0.png"
    first, second = (
        drawn(tmp_path / "cached", tmp_path / f"b{seed}", "prompt=a cat", f"image={picture}", f"seed={seed}")
        for seed in (0, 1)
    )
    assert first.shape == (2, 9, 3, 32, 48)
    apart = (first - second).square().flatten(2).mean((0, 2))
    assert apart[1:].min() > 0
    assert drawn(tmp_path / "cached", tmp_path / "c", "prompt=a cat", "frames=4").shape == (2, 13, 3, 32, 48)


def test_text_to_video_trains_on_images_too(folder, tmp_path, monkeypatch):
    stills = ["size=32", "aspects=[1:1,2:3]", "batch_size=1", f"data_dir={folder / 'pictures'}"]
    videos = [f"data.video.data_dir={folder / 'clips'}", "data.video.val_fraction=0.4"]
    words = [*text_to_video(folder, "video_480p_mixed"), *videos, *(f"data.image.{word}" for word in stills)]
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "direct"))
    assert _run(["fit", *words, "data.share=0.5"]) == 0
    trained(tmp_path / "direct")
    for name, own in (("video", videos), ("image", [f"data.{word}" for word in stills])):
        frames = ["frames=1"] if name == "image" else []
        own = [word.replace("data.video.", "data.") for word in own]
        out = ["batch=1", "shard=2", f"out={tmp_path / name}"]
        assert _run(["encode", *text_to_video(folder), *own, *frames, *out]) == 0
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "cached"))
    words = [word for word in text_to_video(folder, "latents_mixed") if not word.startswith("frames=")]
    words += [f"data.{name}.folder={tmp_path / name}" for name in ("video", "image")] + ["callbacks.metrics=null"]
    assert _run(["fit", *words, "data.image.batch_size=1", "data.share=0.5"]) == 0
    trained(tmp_path / "cached")


def test_pixels_of_imagenet(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "run"))
    found = [word for word in COMMON if "strategy" not in word]
    found += [
        "experiment=tarflow_imagenet64",
        "image_size=16",
        "num_classes=3",
        "model.net.dim=64",
        "model.net.blocks=2",
    ]
    found += ["model.net.depth=1", "model.net.patch=4", f"data.data_dir={folder / 'classes'}", "data.batch_size=4"]
    assert _run(["fit", *found, "data.val_fraction=0.25", "callbacks.metrics=null", "callbacks.samples.steps=1"]) == 0
    trained(tmp_path / "run")
    assert drawn(tmp_path / "run", tmp_path / "out", "labels=2").shape == (2, 3, 16, 16)


def test_latents_of_another_shape_are_refused(folder, tmp_path, monkeypatch, capsys):
    from penstock.lightning_modules.cli import main

    words = [*text_to_image(folder), f"data.data_dir={folder / 'pictures'}"]
    assert _run(["encode", *words, f"out={tmp_path / 'latents'}", "batch=2", "shard=4"]) == 0
    capsys.readouterr()
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "run"))
    own = [word for word in text_to_image(folder) if not word.startswith(("data.", "model.net.shape"))]
    own += ["data=latents", f"data.folder={tmp_path / 'latents'}", "data.batch_size=4", "model.net.shape=[16,8,8]"]
    assert main(["fit", *own]) == 2
    assert "model.net.shape: found (16, 8, 8), expected (4, 8, 8)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def tuned(folder, *words):
    found = [word for word in COMMON if "strategy" not in word and "samples" not in word]
    return [*found, "model.lpips=0", "model.logits=0", "data.batch_size=2", "data.val_fraction=0.4", *words]


def test_a_tuned_decoder_takes_the_place_of_the_folders(folder, tmp_path, monkeypatch):
    from penstock.lightning_modules.errors import UserError
    from penstock.lightning_modules.weights.latents import Latents

    monkeypatch.setenv("RUN_DIR", str(tmp_path / "run"))
    narrow = "penstock.lightning_modules.nets.patch_discriminator.PatchDiscriminator"
    words = ["experiment=decoder_tuning_sd", f"model.autoencoder.path={folder / 'image_vae'}", "image_size=16"]
    words += [
        f"data.data_dir={folder / 'pictures'}",
        f"model.discriminator.class_path={narrow}",
        "model.discriminator.width=32",
    ]
    assert _run(["fit", *tuned(folder, *words)]) == 0
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    state = load_checkpoint(last)["state_dict"]
    assert not any(key.startswith("autoencoder") or ".encoder." in key for key in state)
    old, new = Latents(str(folder / "image_vae")), Latents(str(folder / "image_vae"), tuned=str(last))
    image, latent = torch.rand(1, 3, 16, 16), torch.randn(1, 4, 8, 8)
    assert new.encode(image).equal(old.encode(image))
    assert not new.decode(latent).equal(old.decode(latent))
    assert new.decoder().state_dict().keys() == {k.removeprefix("decoder.") for k in state if k.startswith("decoder.")}
    assert all(value.equal(state[f"decoder.{key}"]) for key, value in new.decoder().state_dict().items())
    with pytest.raises(UserError, match=r"tuned=.*: weights of another model"):
        Latents(str(folder / "wan"), tuned=str(last))
    assert _run(["predict", f"ckpt_path={last}"]) == 0
    assert list(tmp_path.glob("run/**/predictions/*.png"))


def test_a_decoder_of_clips_is_tuned_in_bfloat16(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "run"))
    words = ["experiment=decoder_tuning_sd", "perf=bf16", "data=video", f"model.autoencoder.path={folder / 'wan'}"]
    words += [
        f"data.data_dir={folder / 'clips'}",
        "image_size=32",
        "frames=5",
        "model.adversarial=0",
        "model.noise=0.5",
    ]
    words = [word for word in tuned(folder, *words) if not word.startswith("data.val_fraction")]
    assert _run(["fit", *words, "data.val_fraction=0.4", "~data.name", "~data.flip"]) == 0
    state = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(value.dtype == torch.float32 for value in state.values())
    old = FOLDERS["wan"](tmp_path / "again")
    from penstock.lightning_modules.weights.latents import Latents

    before = Latents(str(old)).decoder().state_dict()
    moved = [key for key, value in before.items() if not value.equal(state[f"decoder.{key}"])]
    assert len(moved) > len(before) / 2
