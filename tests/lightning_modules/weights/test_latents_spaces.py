"""Autoencoders as STARFlow and STARFlow-V use them: alone in a folder, later frames scaled, channels standardised."""

import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", minversion="0.37", reason="diffusers is not installed (extra text2image)")

from penstock.datamodules.image_text import ImageText
from penstock.datamodules.latents import CachedLatents
from penstock.lightning_modules.encoding import Encoder
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.weights.latents import Latents

FOLDERS = runpy.run_path(str(Path(__file__).parent / "starflow_folders.py"))


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return str(FOLDERS["wan"](tmp_path_factory.mktemp("wan")))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return str(FOLDERS["image_vae"](tmp_path_factory.mktemp("alone")))


@pytest.fixture(scope="module")
def cached(alone, tmp_path_factory):
    pictures = FOLDERS["pictures"](tmp_path_factory.mktemp("pictures"))
    folder = tmp_path_factory.mktemp("latents") / "new"
    data = ImageText(name="mine", data_dir=str(pictures), val_fraction=0.2)
    Encoder(data, Latents(alone), batch=2, shard=4, dtype="float32").write(folder)
    return folder


def test_wan_2_2_has_48_channels_a_16th_of_the_sides_and_a_quarter_of_the_later_frames(wan):
    autoencoder = Latents(wan)
    assert (autoencoder.factor, autoencoder.frame_factor, autoencoder.channels) == (16, 4, 48)
    assert autoencoder.latent_shape((81, 3, 480, 848)) == (21, 48, 30, 53)
    with torch.no_grad():
        video = torch.rand(1, 9, 3, 32, 48) * 2 - 1
        found = autoencoder.encode(video)
        assert found.shape == (1, *autoencoder.latent_shape((9, 3, 32, 48))) == (1, 3, 48, 2, 3)
        assert autoencoder.decode(found).shape == video.shape


def test_the_factor_is_that_of_the_network_whatever_its_configuration_forgets(wan, tmp_path):
    shutil.copytree(Path(wan) / "vae", tmp_path / "vae")
    config = json.loads((tmp_path / "vae" / "config.json").read_text())
    del config["scale_factor_spatial"]
    (tmp_path / "vae" / "config.json").write_text(json.dumps(config))
    assert Latents(str(tmp_path)).factor == 16


@torch.no_grad()
def test_noise_enters_with_the_deviation_over_that_of_the_channel(wan):
    autoencoder = Latents(wan)
    video, noise = torch.rand(1, 5, 3, 32, 32) * 2 - 1, torch.randn(1, 2, 48, 2, 2)
    law = autoencoder._net.encode(video.transpose(1, 2)).latent_dist
    config = autoencoder._net.config
    mean, std = (torch.tensor(config[name]).view(48, 1, 1) for name in ("latents_mean", "latents_std"))
    expected = (law.mean.transpose(1, 2) - mean) / std + law.std.transpose(1, 2) / std * noise
    torch.testing.assert_close(autoencoder.encode(video, noise), expected, atol=1e-5, rtol=1e-5)
    own_mean, own_std = autoencoder.law(video)
    torch.testing.assert_close(own_mean + own_std * noise, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_later_frames_are_scaled_on_the_way_in_and_back_on_the_way_out(wan):
    plain, scaled = Latents(wan), Latents(wan, later_frames=0.6)
    video, noise = torch.rand(1, 9, 3, 32, 32) * 2 - 1, torch.randn(1, 3, 48, 2, 2)
    first, found = plain.encode(video, noise), scaled.encode(video, noise)
    assert found[:, 0].equal(first[:, 0])
    torch.testing.assert_close(found[:, 1:], 0.6 * first[:, 1:])
    torch.testing.assert_close(scaled.decode(found), plain.decode(first), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scaled.law(video)[1][:, 1:], 0.6 * plain.law(video)[1][:, 1:])
    assert scaled.encode(video[:, 0]).equal(plain.encode(video[:, 0]))
    with pytest.raises(UserError, match=r"later_frames: found 0, expected a number above 0"):
        Latents(wan, later_frames=0)


@torch.no_grad()
def test_statistics_standardise_and_decoding_undoes_them(alone, cached):
    plain, standard = Latents(alone), Latents(alone, statistics=str(cached))
    data = CachedLatents(str(cached), standardise=True)
    data.setup()
    image, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 4, 8, 8)
    raw, found = plain.encode(image, noise), standard.encode(image, noise)
    mean, std = data.standard
    torch.testing.assert_close(found, (raw - mean) / std)
    torch.testing.assert_close(standard.decode(found), plain.decode(raw), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(standard.law(image)[1], plain.law(image)[1] / std)
    assert data.shape_for(standard) == (4, 8, 8)
    with pytest.raises(UserError, match=r"statistics is given, which are made of the latents; leave it out"):
        Encoder(ImageText(), standard)


def test_latents_of_other_weights_or_scale_are_refused(alone, cached, wan, tmp_path):
    data = CachedLatents(str(cached))
    data.setup()
    assert data.shape_for(Latents(alone)) == (4, 8, 8)
    assert data.shape_for(Latents(alone, posterior="mean")) == (4, 8, 8)
    with pytest.raises(
        UserError, match=r"made with class AutoencoderKL, expected AutoencoderKLWan, that of model.auto"
    ):
        data.shape_for(Latents(wan))
    shutil.copytree(alone, tmp_path / "scaled")
    config = json.loads((tmp_path / "scaled" / "config.json").read_text())
    (tmp_path / "scaled" / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.13025}))
    with pytest.raises(UserError, match=r"made with scale 1.5, expected 0.13025, that of model.autoencoder; give the"):
        data.shape_for(Latents(str(tmp_path / "scaled")))
    other = Latents(alone)
    with torch.no_grad():
        next(other._net.encoder.parameters()).add_(1)
    with pytest.raises(UserError, match=r"made with other weights, expected those of model.autoencoder; give the"):
        data.shape_for(other)
    with torch.no_grad():
        next((same := Latents(alone))._net.decoder.parameters()).add_(1)
    assert data.shape_for(same) == (4, 8, 8)
    with pytest.raises(UserError, match=r"statistics: '.*' has 4 channels, expected 48"):
        Latents(wan, statistics=str(cached))
