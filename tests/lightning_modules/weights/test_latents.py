"""Autoencoders of diffusers as the space of a flow: their pipelines' own formulas, with random weights."""

import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", minversion="0.37", reason="diffusers is not installed (extra text2image)")
pytest.importorskip("transformers", reason="transformers is not installed (extra text2image)")

import diffusers

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.weights import latents
from penstock.lightning_modules.weights.latents import KINDS, Latents

HERE = Path(__file__).parent
HOSTS = runpy.run_path(str(HERE / "diffusers_hosts.py"))
PIPELINES = runpy.run_path(str(HERE / "diffusers_pipelines.py"))
VIDEO = [name for name, kind in KINDS.items() if kind.frames]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders with `vae/`, by its class."""
    path = tmp_path_factory.mktemp("autoencoders")
    for name in KINDS:
        PIPELINES["vae"](name).save_pretrained(path / name / "vae")
    return path


def law(autoencoder, image):
    """Mean and deviation of the code as the network itself says."""
    net = autoencoder._net
    if not autoencoder.kind.frames:
        found = net.encode(image)
        return (found.latent, 0) if hasattr(found, "latent") else (found.latent_dist.mean, found.latent_dist.std)
    found = net.encode(image[:, :, None]).latent_dist
    return found.mean[:, :, 0], found.std[:, :, 0]


def expected(autoencoder, code):
    """What diffusers' image-to-image pipelines make of a code `(B, 4, H, W)`."""
    config = autoencoder._net.config
    if autoencoder.kind.frames:
        mean, std = (torch.tensor(config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
        return (code - mean) * (1.0 / std)
    return (code - (config.get("shift_factor") or 0)) * config.scaling_factor


@pytest.mark.parametrize("name", KINDS)
@torch.no_grad()
def test_codes_are_shifted_and_scaled_and_noise_enters_with_the_deviation(folder, name):
    autoencoder = Latents(str(folder / name), chunk=2)
    shape = autoencoder.latent_shape((3, 16, 16))
    assert shape == ((4, 4, 4) if name == "AutoencoderKLWan" else (4, 8, 8))
    image, noise = torch.rand(3, 3, 16, 16) * 2 - 1, torch.randn(3, *shape)
    mean, std = law(autoencoder, image)
    found = autoencoder.encode(image)
    assert (autoencoder.key, tuple(found.shape)) == ("latent", (3, *shape))
    torch.testing.assert_close(found, expected(autoencoder, mean))
    assert torch.equal(found, autoencoder.encode(image))
    assert not torch.allclose(found, mean)
    torch.testing.assert_close(autoencoder.encode(image, noise), expected(autoencoder, mean + std * noise))
    fixed = Latents(str(folder / name), posterior="mean")
    torch.testing.assert_close(fixed.encode(image, noise), found)


@pytest.mark.parametrize("name", KINDS)
def test_decoding_undoes_shift_and_scale_in_float32_and_is_differentiable(folder, name):
    autoencoder = Latents(str(folder / name), chunk=2)
    code = torch.randn(3, *autoencoder.latent_shape((3, 16, 16)))
    own = code[:, :, None] if autoencoder.kind.frames else code
    images = autoencoder._net.decode(own).sample
    images = images[:, :, 0] if autoencoder.kind.frames else images
    latent = expected(autoencoder, code).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = autoencoder.decode(latent)
        encoded = autoencoder.encode(found)
    assert (found.dtype, encoded.dtype, found.shape) == (torch.float32, torch.float32, (3, 3, 16, 16))
    torch.testing.assert_close(found, images, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoded, autoencoder.encode(found))
    assert not encoded.requires_grad
    found.sum().backward()
    assert latent.grad.abs().sum() > 0
    assert all(weight.grad is None for weight in autoencoder._net.parameters())


@pytest.mark.parametrize("host", ["StableDiffusion3", "Sana", "QwenImage"])
@torch.no_grad()
def test_a_pipelines_images_are_its_latents_decoded(host, tmp_path):
    kind = {"StableDiffusion3": "AutoencoderKL", "Sana": "AutoencoderDC", "QwenImage": "AutoencoderKLQwenImage"}[host]
    PIPELINES["vae"](kind).save_pretrained(tmp_path / "vae")
    transformer = HOSTS["transformer"](host)
    tokens, other = HOSTS["features"](host, 1)
    given = {"prompt_embeds": tokens, "guidance_scale": 1.0, "num_inference_steps": 1, "height": 32, "width": 32}
    scheduler, more = diffusers.FlowMatchEulerDiscreteScheduler(), {}
    encoders = dict.fromkeys(["text_encoder", "tokenizer"])
    if host == "StableDiffusion3":
        given |= {"pooled_prompt_embeds": other}
        encoders |= dict.fromkeys([f"{part}_{n}" for part in ("text_encoder", "tokenizer") for n in (2, 3)])
    elif host == "Sana":
        scheduler, more = diffusers.DPMSolverMultistepScheduler(), {"use_resolution_binning": False}
        given |= {"prompt_attention_mask": other}
    else:
        given |= {"prompt_embeds_mask": other, "true_cfg_scale": 1.0}
    parts = {"transformer": transformer, "scheduler": scheduler, "vae": PIPELINES["vae"](kind), **encoders}
    pipeline = getattr(diffusers, f"{host}Pipeline")(**parts)
    pipeline.set_progress_bar_config(disable=True)
    autoencoder = Latents(str(tmp_path))

    def made(output):
        return pipeline(**given, **more, output_type=output, generator=torch.Generator().manual_seed(0)).images

    latent, image = made("latent"), made("pt")
    if host == "QwenImage":
        latent = pipeline._unpack_latents(latent, 32, 32, pipeline.vae_scale_factor)[:, :, 0]
    torch.testing.assert_close(autoencoder.decode(latent).clamp(-1, 1), image * 2 - 1, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", VIDEO)
@torch.no_grad()
def test_frames_keep_their_place_and_the_first_is_an_image(folder, name):
    autoencoder = Latents(str(folder / name))
    assert autoencoder.latent_shape((5, 3, 16, 16))[0] == 3
    video = torch.rand(2, 5, 3, 16, 16) * 2 - 1
    found = autoencoder.encode(video)
    assert (2, *autoencoder.latent_shape((5, 3, 16, 16))) == found.shape
    torch.testing.assert_close(found[:, 0], autoencoder.encode(video[:, 0]))
    again = autoencoder.decode(found)
    assert again.shape == video.shape
    torch.testing.assert_close(again[:, 0], autoencoder.decode(found[:, 0]), atol=1e-5, rtol=1e-4)


def test_weights_may_be_bfloat16(folder):
    half, full = (Latents(str(folder / "AutoencoderKL"), dtype=dtype) for dtype in ("bfloat16", "float32"))
    image = torch.rand(2, 3, 16, 16)
    assert half.encode(image).dtype == torch.float32
    torch.testing.assert_close(half.encode(image), full.encode(image), atol=0.1, rtol=0.1)


def test_statistics_and_a_scaling_factor_come_together():
    shift, scale = latents.shift_and_scale({"scaling_factor": 0.5, "latents_mean": [1.0], "latents_std": [2.0]})
    assert (shift.item(), scale.item()) == (1.0, 0.25)
    assert latents.shift_and_scale({"scaling_factor": 0.2, "shift_factor": None, "latents_mean": None}) == (0.0, 0.2)


def test_what_does_not_fit_is_one_line(folder, tmp_path, monkeypatch):
    image = Latents(str(folder / "AutoencoderKL"))
    with pytest.raises(UserError, match="images of 1 channels and 16x16 pixels, expected 3 and multiples of 2"):
        image.latent_shape((1, 16, 16))
    with pytest.raises(UserError, match="images of 3 channels and 16x15 pixels, expected 3 and multiples of 2"):
        image.latent_shape((3, 16, 15))
    with pytest.raises(UserError, match="videos of 5 frames, expected images"):
        image.latent_shape((5, 3, 16, 16))
    with pytest.raises(UserError, match="videos of 4 frames, expected 1 more than a multiple of 2"):
        Latents(str(folder / VIDEO[0])).latent_shape((4, 3, 16, 16))
    with pytest.raises(UserError, match=r"no 'vae' in it; found .*AutoencoderDC.*, expected a diffusers folder"):
        Latents(str(folder))
    shutil.copytree(folder / "AutoencoderKL" / "vae", tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderKLMagvit"}))
    with pytest.raises(UserError, match=r"vae is a 'AutoencoderKLMagvit'.* expected one of AutoencoderKL, "):
        Latents(str(tmp_path))
    (tmp_path / "vae" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"vae cannot be read \(.*\); expected a diffusers folder with vae/"):
        Latents(str(tmp_path))
    monkeypatch.setitem(latents.KINDS, "AutoencoderOfTomorrow", latents.Kind("9.1", "z_dim"))
    (tmp_path / "vae" / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderOfTomorrow"}))
    with pytest.raises(UserError, match=re.escape("AutoencoderOfTomorrow needs diffusers 9.1 or later: pip install")):
        Latents(str(tmp_path))
