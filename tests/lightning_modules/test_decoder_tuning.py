"""Tuning of a decoder: which weights a loss reaches, what a step changes, and that noisy digits become clean."""

import math

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from penstock.datamodules.digits import Digits
from penstock.datamodules.moving_digits import MovingDigits
from penstock.kernels.philox import Draws
from penstock.lightning_modules.decoder_tuning import DecoderTuning
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.premetrics import Distance
from penstock.lightning_modules.nets.autoencoder import Autoencoder, Identity
from penstock.lightning_modules.nets.patch_discriminator import PatchDiscriminator


class Folded(Autoencoder):
    """2x2 pixels as four channels, a deviation of 0.05, and a decoder that is nearly the inverse."""

    key = "latent"

    def __init__(self):
        torch.manual_seed(0)
        self.encoder = nn.Conv2d(1, 4, 2, 2)
        self.layers = nn.Sequential(nn.Conv2d(4, 32, 3, padding=1), nn.GELU(), nn.Conv2d(32, 4, 3, padding=1))
        self.layers[2].weight.data.zero_()

    def latent_shape(self, shape):
        return (*shape[:-3], 4, shape[-2] // 2, shape[-1] // 2)

    def _each(self, net, x):
        return net(x.reshape(-1, *x.shape[-3:])).unflatten(0, x.shape[:-3])

    @torch.no_grad()
    def encode(self, image, noise=None):
        code = self._each(lambda x: nn.functional.pixel_unshuffle(x, 2), image)
        return code if noise is None else code + 0.05 * noise

    def decode(self, latent):
        return self._each(lambda z: nn.functional.pixel_shuffle(z + self.layers(z), 2), latent)

    def decoder(self):
        return self.layers


class Scaled(Distance):
    """Twice the squared error."""

    def __call__(self, images, references):
        return 2 * (images - references).square().flatten(1).mean(1)


def adam(weights):
    return torch.optim.AdamW(weights, 1e-2, betas=(0.9, 0.999), weight_decay=1e-4)


def tuning(**options):
    options = {"perceptual": Scaled(), "classifier": Scaled(), "discriminator": discriminator(), **options}
    return DecoderTuning(Folded(), adam, **options)


def discriminator():
    torch.manual_seed(1)
    return PatchDiscriminator(1, 8, 1, groups=4)


def batch(module, video=False):
    shape = (6, 3, 1, 8, 8) if video else (6, 1, 8, 8)
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {"video" if video else "image": x, "index": torch.arange(6)}


def test_codes_have_the_encoders_noise_and_the_flows():
    module, data = tuning(noise=0.3), batch(None)
    draws = Draws(3, 1, data["index"])
    x, y = module.decoded(data, draws)
    own, noise = (draws.normal(name, (4, 4, 4)) for name in ("autoencoder", "noise"))
    assert x.equal(data["image"])
    torch.testing.assert_close(y, module.autoencoder.decode(module.autoencoder.encode(x) + 0.05 * own + 0.3 * noise))


def test_terms_of_images_and_of_clips():
    module = tuning()
    for video in (False, True):
        x, y = module.decoded(batch(module, video), Draws(0, 0, torch.arange(6)))
        terms = module.reconstruction(x, y)
        assert terms.keys() == ({"l2", "lpips", "logits", "wavelet"} if video else {"l2", "lpips", "logits"})
        assert terms["l2"].item() == pytest.approx(((x - y) / 2).square().mean().item(), rel=1e-5)
        frames = [part.reshape(-1, 1, 8, 8) / 2 for part in (x, y)]
        big = [nn.functional.interpolate(part, (32, 32), mode="bilinear") for part in frames]
        assert terms["lpips"].item() == pytest.approx(2 * (big[0] - big[1]).square().mean().item(), rel=1e-4)
    assert module.judged(y).item() == pytest.approx(
        -module.discriminator(y.reshape(-1, 1, 8, 8) / 2 + 0.5).mean().item()
    )


def test_each_loss_reaches_its_own_weights_only():
    module = tuning()
    x, y = module.decoded(batch(module), Draws(0, 0, torch.arange(6)))
    sum(module.reconstruction(x, y).values()).backward(retain_graph=True)
    module.judged(y).backward(retain_graph=True)
    assert all(weight.grad is None for weight in module.discriminator.parameters())
    assert any(weight.grad.abs().sum() > 0 for weight in module.decoder.parameters())
    before = [weight.grad.clone() for weight in module.decoder.parameters()]
    module.judging(x, y)[0].backward()
    assert all(a.equal(weight.grad) for a, weight in zip(before, module.decoder.parameters()))
    assert all(weight.grad.abs().sum() > 0 for weight in module.discriminator.parameters())
    assert all(weight.grad is None for weight in module.autoencoder.encoder.parameters())


def two_optimizers(steps, data):
    """The released order by hand: a step of the decoder, then one of the discriminator on the pictures of before."""
    module = tuning(adversarial=0.5, lecam=0.1)
    first, second = adam(module.decoder.parameters()), adam(module.discriminator.parameters())
    means = torch.zeros(2)
    for step in range(steps):
        x, y = module.decoded(data, Draws(0, step, data["index"]))
        terms = module.reconstruction(x, y)
        loss = terms["l2"] + terms["lpips"] + 0.1 * terms["logits"]
        fake = module.discriminator.requires_grad_(False)(y * 0.5 + 0.5)
        first.zero_grad()
        (loss - 0.5 * fake.mean()).backward()
        first.step()
        module.discriminator.requires_grad_(True)
        real, fake = module.discriminator(x * 0.5 + 0.5), module.discriminator(y.detach() * 0.5 + 0.5)
        judging = 0.5 * ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean())
        apart = (real.mean() - means[1]).clamp(min=0) ** 2 + (means[0] - fake.mean()).clamp(min=0) ** 2
        second.zero_grad()
        (judging + 0.1 * apart).backward()
        second.step()
        means = 0.999 * means + 0.001 * torch.stack([real.mean(), fake.mean()]).detach()
    return module.state_dict() | {"mean_logits": means}


class OneBatch(torch.utils.data.Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return 1

    def __getitem__(self, row):
        return self.data


class Stub:
    """A DataModule as far as the module asks."""

    shape = (1, 8, 8)


def test_one_optimizer_does_what_two_in_turn_do():
    data, module = batch(None), tuning(adversarial=0.5, lecam=0.1)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    loader = torch.utils.data.DataLoader(OneBatch(data), batch_size=None)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=3, enable_model_summary=False, **options)
    module.setup = lambda stage: None
    trainer.fit(module, loader)
    expected = two_optimizers(3, data)
    for key, value in module.state_dict().items():
        torch.testing.assert_close(value, expected[key], atol=1e-5, rtol=1e-4)
        assert not value.equal(before[key]), key
    assert trainer.global_step == 3


def run(tmp_path, monkeypatch, data, **options):
    monkeypatch.chdir(tmp_path)
    module = tuning(lpips=0.0, logits=0.0, **options)
    common = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_steps=60, enable_model_summary=False, **common)
    before = trainer.test(module, datamodule=data, verbose=False)[0]
    trainer.fit(module, datamodule=data)
    return before, trainer.test(module, datamodule=data, verbose=False)[0]


def test_noisy_digits_become_cleaner(tmp_path, monkeypatch):
    before, after = run(tmp_path, monkeypatch, Digits(batch_size=64, seed=0), noise=0.5, adversarial=0.01)
    unclipped = -10 * math.log10((0.5**2 + 0.05**2) / 4)
    assert unclipped < before["test/psnr"] < unclipped + 3
    assert after["test/psnr"] > before["test/psnr"] + 1.5
    assert after["test/loss"] < 0.7 * before["test/loss"]


def test_clips_are_tuned_by_wavelets_too(tmp_path, monkeypatch):
    data = MovingDigits(frames=3, height=16, width=16, n_train=64, n_val=8, n_test=8, batch_size=8)
    before, after = run(tmp_path, monkeypatch, data, noise=0.5, adversarial=0.0)
    assert after["test/loss"] < 0.8 * before["test/loss"]


def test_without_an_adversary_there_is_no_discriminator():
    module = tuning(adversarial=0.0)
    assert module.discriminator is None
    assert all(key.startswith(("decoder.", "mean_logits")) for key in module.state_dict())


def test_what_cannot_be_tuned_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"model\.l2: found -1, expected 0 or more"):
        tuning(l2=-1)
    with pytest.raises(UserError, match="Identity has no decoder to train"):
        DecoderTuning(Identity(), adam)
    with pytest.raises(UserError, match=r"batches have index, points; expected image or video"):
        tuning().decoded({"points": torch.zeros(2), "index": torch.arange(2)}, Draws(0, 0, torch.arange(2)))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def offline(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    module = DecoderTuning(Folded(), adam, discriminator=discriminator())
    with pytest.raises(UserError, match=r"LPIPS: vgg16-397923af.pth is missing and cannot be downloaded"):
        module.precheck(None)
    module = DecoderTuning(Folded(), adam, lpips=0, discriminator=discriminator())
    with pytest.raises(UserError, match=r"Logits: convnext_small-0c510722.pth is missing and cannot be downloaded"):
        module.precheck(None)
    DecoderTuning(Folded(), adam, lpips=0, logits=0, discriminator=discriminator()).precheck(None)
