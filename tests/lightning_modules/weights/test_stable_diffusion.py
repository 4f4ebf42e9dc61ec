"""Folders of diffusers, with random weights: loading, the official sampler, and the recipe of the paper end to end."""

import json
import re
import runpy
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.models import squeezenet1_1

pytest.importorskip("diffusers", reason="diffusers is not installed (extra text2image)")
pytest.importorskip("transformers", reason="transformers is not installed (extra text2image)")

from penstock.lightning_modules.checkpoints import load_checkpoint
from penstock.lightning_modules.cli import _run
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.instaflow import InstaFlow
from penstock.lightning_modules.weights import stable_diffusion
from penstock.lightning_modules.weights.latents import Latents
from penstock.lightning_modules.weights.stable_diffusion import ClipText, add_change, pretrained

WRITE = runpy.run_path(str(Path(__file__).with_name("diffusers_folder.py")))["write"]
ADAM = partial(torch.optim.Adam, lr=1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return WRITE(tmp_path_factory.mktemp("stable_diffusion"))


def instaflow(folder, **options):
    parts = {"text": ClipText(str(folder)), "autoencoder": Latents(str(folder))}
    return InstaFlow(pretrained(str(folder)), ADAM, **parts, **options)


def test_official_keys_load_unchanged_and_nothing_frozen_is_stored(folder):
    model = instaflow(folder)
    stored = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    state = model.state_dict()
    assert {"net.unet." + key for key in stored} == set(state)
    assert all(torch.equal(state["net.unet." + key], value) for key, value in stored.items())
    assert (model.net.shape, model.net.num_classes, model.key) == ((4, 8, 8), 0, "latent")
    assert {kind.__name__ for kind in model.net.checkpoint_blocks} == {"ResnetBlock2D", "Transformer2DModel"}
    assert pretrained(str(folder), size=16).shape == (4, 16, 16)


@pytest.mark.parametrize(("steps", "guidance"), [(1, 0.0), (3, 1.5)])
def test_samples_are_those_of_the_official_loop_on_the_same_parts(folder, steps, guidance):
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    kinds |= {"tokenizer": CLIPTokenizer}
    unet, vae, encoder, tokenizer = (kind.from_pretrained(folder, subfolder=name) for name, kind in kinds.items())
    prompts = ["a cat", "two dogs"]

    def features(texts):
        tokens = tokenizer(texts, padding="max_length", max_length=20, truncation=True, return_tensors="pt")
        return encoder(tokens.input_ids).last_hidden_state

    with torch.no_grad():
        text, null = features(prompts), features(["", ""])
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for i in range(steps):
            time = torch.full((2,), (1 - i / steps) * 1000)
            v = unet(latents, time, encoder_hidden_states=text).sample
            if guidance > 1:
                v_null = unet(latents, time, encoder_hidden_states=null).sample
                v = v_null + guidance * (v - v_null)
            latents = latents + v / steps
        expected = vae.decode(latents / vae.config.scaling_factor).sample
        model = instaflow(folder, guidance=guidance)
        made = model.sample(2, steps=steps, cond=prompts, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(made, expected, atol=1e-4, rtol=1e-4)
    assert model.nfe == (2 * steps if guidance > 1 else steps)


def test_latents_are_scaled_and_their_noise_is_given(folder):
    vae = Latents(str(folder), chunk=2)
    image = torch.rand(3, 3, 16, 16) * 2 - 1
    assert vae.latent_shape((3, 16, 16)) == (4, 8, 8)
    law = vae._net.encode(image).latent_dist
    torch.testing.assert_close(vae.encode(image), 0.18215 * law.mean)
    noise = torch.randn(3, 4, 8, 8)
    torch.testing.assert_close(vae.encode(image, noise), 0.18215 * (law.mean + law.std * noise))
    whole = Latents(str(folder), chunk=3)
    assert torch.equal(whole.encode(image, noise), 0.18215 * (law.mean + law.std * noise))
    assert torch.equal(whole.decode(noise), vae._net.decode(noise / 0.18215).sample)
    latent = torch.randn(3, 4, 8, 8, requires_grad=True)
    vae.decode(latent).sum().backward()
    assert latent.grad.abs().sum() > 0
    assert all(p.grad is None for p in vae._net.parameters())


def test_the_noise_reading_starts_from_the_folders_scheduler(folder):
    net = pretrained(str(folder), reading="noise")
    assert net.t_min == pytest.approx(0.0640, abs=1e-4)
    x = torch.randn(3, 4, 8, 8)
    assert net(x, torch.tensor([0.0, 0.5, 1.0])).isfinite().all()


def test_a_fine_tuned_model_is_added(folder, tmp_path):
    custom = WRITE(tmp_path / "custom", seed=1)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.0, 0.5])
    with torch.no_grad():
        plain, other = pretrained(str(folder))(x, t), pretrained(str(custom))(x, t)
        none, full = (
            pretrained(str(folder), custom=str(custom), base=str(folder), alpha=alpha)(x, t) for alpha in (0.0, 1.0)
        )
        text = pretrained(str(custom)).null_text
    assert torch.equal(none, plain)
    assert not torch.allclose(full, plain)
    swapped = pretrained(str(folder), custom=str(custom), base=str(folder))
    with torch.no_grad():
        torch.testing.assert_close(swapped(x, t, text.expand(2, -1, -1)), other, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="expected both or neither"):
        pretrained(str(folder), custom=str(custom))
    net = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"weight 'bias': shapes \[\(2,\), None, \(2,\)\]"):
        add_change(net, {"weight": net.weight}, net.state_dict())


def test_what_is_absent_is_named(folder, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    shutil.rmtree(broken / "vae")
    with pytest.raises(UserError, match=r"broken: no 'vae' in it; found .*text_encoder.*, expected a diffusers folder"):
        Latents(str(broken))
    file = broken / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(UserError, match=r"broken: unet cannot be read"):
        pretrained(str(broken))
    with pytest.raises(UserError, match=r"/nowhere: no such folder; expected a diffusers folder or a hub name"):
        pretrained("/nowhere")
    monkeypatch.setitem(stable_diffusion.PLACES, "unet", ("no_such_library", "UNet"))
    with pytest.raises(UserError, match=re.escape("needs no_such_library, which is not installed: pip install")):
        pretrained(str(folder))


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    path, draws = tmp_path_factory.mktemp("captioned"), np.random.default_rng(0)
    lines = []
    for n in range(16):
        Image.fromarray(draws.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(path / f"{n:02d}.png")
        lines.append(json.dumps({"file": f"{n:02d}.png", "text": f"picture {'abcdefghijklmnop'[n]}"}))
    (path / "captions.jsonl").write_text("\n".join(lines))
    return path


def test_the_recipe_of_the_paper_end_to_end(folder, captioned, tmp_path, monkeypatch):
    def fit(name, *words):
        run = tmp_path / name
        monkeypatch.setenv("RUN_DIR", str(run))
        common = [f"experiment={name}", f"model.net.path={folder}", "callbacks.metrics=null", "logger=csv"]
        common += ["trainer.accelerator=cpu", "image_size=16", "callbacks.samples.rows=1", "callbacks.samples.cols=2"]
        common += ["trainer.enable_model_summary=false", "callbacks.samples.steps=2", "trainer.limit_val_batches=1"]
        assert _run(["fit", *common, *words]) == 0
        assert (run / "samples" / "test.png").is_file()
        return run / "checkpoints" / "last.ckpt"

    teacher = fit("stable_diffusion_15", f"data.data_dir={captioned}", "data.num_workers=0", "data.val_fraction=0.2")
    stored = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    state = load_checkpoint(teacher)["state_dict"]
    assert all(torch.equal(state["net.unet." + key], value) for key, value in stored.items())
    pairs = [f"data.real.data_dir={captioned}", "data.real.val_fraction=0.2", "data.n=8", "data.pairs_batch=4"]
    pairs += [
        "data.num_workers=0",
        "data.shard=4",
        "data.batch_size=4",
        "trainer.max_steps=2",
        "data.val_fraction=0.25",
    ]
    second = fit("reflow_sd15", f"teacher={teacher}", *pairs)
    student = fit("instaflow_sd15", f"teacher={second}", *pairs)
    torch.save(squeezenet1_1().state_dict(), tmp_path / "squeezenet.pth")
    loss = ["model.loss.distance.net=squeeze", f"model.loss.distance.weights={tmp_path / 'squeezenet.pth'}"]
    last = fit("instaflow_sd15_lpips", f"teacher={second}", f"model.initial={student}", *loss, *pairs)
    assert set(load_checkpoint(last)["state_dict"]) == set(load_checkpoint(student)["state_dict"]) == set(state)
    manifest = next((tmp_path / "stable_diffusion_15" / "pairs").glob("*/pairs.json"))
    assert json.loads(manifest.read_text())["key"] == "latent"
    out = tmp_path / "out"
    words = [f"ckpt_path={student}", "n=2", "steps=1", "device=cpu", "prompt=a cat", f"out={out}"]
    assert _run(["sample", *words]) == 0
    assert load_file(out / "samples.safetensors")["samples"].shape == (2, 3, 16, 16)
