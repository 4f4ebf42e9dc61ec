"""TwinFlow's released recipes from the command line, on pipelines of diffusers' own classes with random weights."""

import json
import os
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("diffusers", minversion="0.37", reason="diffusers is not installed (extra text2image)")
pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed (extra text2image)")

from penstock.lightning_modules.checkpoints import load_checkpoint
from penstock.lightning_modules.cli import _run

HERE = Path(__file__).parent
HOSTS = runpy.run_path(str(HERE / "diffusers_hosts.py"))
PIPELINES = runpy.run_path(str(HERE / "diffusers_pipelines.py"))
RECIPES = {
    "twinflow_sd35": "StableDiffusion3",
    "twinflow_sd35_image_free": "StableDiffusion3",
    "twinflow_sd35_lora": "StableDiffusion3",
    "twinflow_sana": "Sana",
    "twinflow_qwen_image": "QwenImage",
    "twinflow_qwen_image_lora": "QwenImage",
}
LENGTHS = {"StableDiffusion3": 8, "Sana": 8, "QwenImage": 260}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pipelines' folders by host."""
    path = tmp_path_factory.mktemp("pipelines")
    for host in LENGTHS:
        PIPELINES["write"](path / host, host, HOSTS["transformer"](host))
    return path


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    path, draws = tmp_path_factory.mktemp("captioned"), np.random.default_rng(0)
    lines = []
    for n in range(10):
        Image.fromarray(draws.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(path / f"{n:02d}.png")
        lines.append(json.dumps({"file": f"{n:02d}.png", "text": f"picture {'abcdefghij'[n]}"}))
    (path / "captions.jsonl").write_text("\n".join(lines))
    return path


def words(name, folder, captioned):
    host = RECIPES[name]
    found = [f"experiment={name}", f"model.net.path={folder / host}", f"model.net.text.length={LENGTHS[host]}"]
    found += ["model.net.size=8", "image_size=16", f"data.data_dir={captioned}", "data.num_workers=0"]
    found += ["data.batch_size=4", "data.val_fraction=0.2", "trainer.max_steps=2", "trainer.max_epochs=-1"]
    found += ["trainer.accelerator=cpu", "trainer.devices=1", "trainer.enable_model_summary=false", "logger=csv"]
    return [*found, "callbacks.metrics=null", "callbacks.samples.rows=1", "callbacks.samples.cols=2"]


@pytest.fixture(autouse=True)
def alone():
    """Recipes with a strategy leave a group of one process, and the port that it met on."""
    before = set(os.environ)
    yield
    for name in os.environ.keys() - before:
        del os.environ[name]
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def held(state, key):
    """The weight `key` of the transformer in the state of a module, with or without a low-rank part."""
    layer = key.removesuffix(".weight")
    names = (f"net.net.transformer.{key}", f"net.net.transformer.{layer}.parametrizations.weight.original")
    return next((state[name] for name in names if name in state), None)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_and_its_checkpoint_draws(name, folder, captioned, tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "run"))
    low_rank = ["model.lora_rank=2"] if name.endswith("lora") else []
    given = words(name, folder, captioned)
    if name.endswith("image_free"):
        (tmp_path / "captions.txt").write_text("\n".join(f"a picture of {n} cats" for n in range(12)))
        left_out = ("data.data_dir", "data.path", "data.val_fraction")
        given = [word for word in given if not word.startswith(left_out)]
        given += [f"data.path={tmp_path / 'captions.txt'}", "data.val_fraction=0.3"]
    assert _run(["fit", *given, *low_rank]) == 0
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    checkpoint = load_checkpoint(last)
    assert checkpoint["global_step"] == 2
    state = checkpoint["state_dict"]
    assert not any(key.startswith(("text", "autoencoder", "prompted")) for key in state)
    assert all(value.isfinite().all() for value in state.values())
    stored = load_file(folder / RECIPES[name] / "transformer" / "diffusion_pytorch_model.safetensors")
    found = {key: held(state, key) for key in stored}
    still = [key for key, value in found.items() if value is not None and value.equal(stored[key].to(value.dtype))]
    assert bool(low_rank) == any(key.endswith("lora_B") and value.any() for key, value in state.items())
    assert len(still) == len(stored) if low_rank else len(still) < len(stored) / 2
    assert (tmp_path / "run" / "samples" / "test.png").is_file()
    options = [f"ckpt_path={last}", "n=2", "steps=1", "device=cpu", "prompt=a cat", f"out={tmp_path / 'out'}"]
    assert _run(["sample", *options]) == 0
    samples = load_file(tmp_path / "out" / "samples.safetensors")["samples"]
    assert samples.shape == (2, 3, 16, 16)
    assert samples.isfinite().all()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["network_calls"] == 1


def test_a_recipe_draws_what_geneval_asks_for(folder, captioned, tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "run"))
    given = words("twinflow_sd35", folder, captioned)
    assert _run(["fit", *given]) == 0
    prompts = tmp_path / "evaluation_metadata.jsonl"
    prompts.write_text(json.dumps({"tag": "single_object", "include": [], "prompt": "a photo of a bench"}) + "\n")
    ours = [word for word in given if not word.startswith("data.")]
    ours += ["data=geneval", "data.num_workers=0", f"data.path={prompts}", "callbacks.predictions=null"]
    ours += [f"callbacks.pictures.folder={tmp_path / 'pictures'}"]
    assert _run(["predict", *ours, f"ckpt_path={tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}"]) == 0
    assert len(list((tmp_path / "pictures").glob("**/samples/*.png"))) == 4
