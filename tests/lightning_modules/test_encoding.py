"""Latents on disk: what is in the folder, resumed and refused, and read as a module would have encoded the pictures."""

import json
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from autoencoders import Halved
from lightning.pytorch import Trainer
from PIL import Image
from safetensors.torch import load_file, save_file

from penstock.datamodules.base import KindDataModule
from penstock.datamodules.image_text import ImageText
from penstock.datamodules.images import Images
from penstock.datamodules.latents import CachedLatents
from penstock.datamodules.video import Video
from penstock.kernels.philox import Draws
from penstock.lightning_modules import starflow as method
from penstock.lightning_modules.cli import main
from penstock.lightning_modules.encoding import Encoder
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.latent_shards import read_manifest, statistics
from penstock.lightning_modules.nets.starflow import STARFlow
from penstock.lightning_modules.nets.text_encoder import HashedText
from penstock.lightning_modules.shards import shard_file


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """24 pictures with one or two captions."""
    path, draws = tmp_path_factory.mktemp("captioned"), np.random.default_rng(0)
    lines = []
    for n in range(24):
        Image.fromarray(draws.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(path / f"{n:02d}.png")
        lines += [
            json.dumps({"file": f"{n:02d}.png", "text": f"{kind} {n}"}) for kind in ("first", "second")[: 1 + n % 2]
        ]
    (path / "captions.jsonl").write_text("\n".join(lines))
    return path


def pictures(captioned, **options):
    return ImageText(name="mine", data_dir=str(captioned), val_fraction=0.25, batch_size=6, **options)


@pytest.fixture(scope="module")
def folder(captioned, tmp_path_factory):
    path = tmp_path_factory.mktemp("latents") / "new"
    assert Encoder(pictures(captioned), Halved(), batch=2, shard=10).write(path) == 24
    return path


def opened(folder, **options):
    data = CachedLatents(str(folder), batch_size=6, **options)
    data.setup()
    return data


def test_a_folder_holds_the_law_of_every_picture_with_number_split_and_captions(folder, captioned):
    assert sorted(path.name for path in folder.iterdir()) == [
        "latents.json",
        *(f"shard_{n:06d}.{kind}" for n in range(3) for kind in ("json", "safetensors")),
    ]
    data = pictures(captioned)
    data.setup()
    for number, size in enumerate((10, 10, 4)):
        shard, side = (
            load_file(shard_file(folder, number)),
            json.loads(shard_file(folder, number).with_suffix(".json").read_text()),
        )
        assert shard["index"].tolist() == list(range(10 * number, 10 * number + size))
        assert side["text"] == [list(data.captions[n]) for n in shard["index"].tolist()]
        batch = data.finished(data.store.fetch(shard["index"].numpy()))
        mean, std = Halved().law(batch["image"])
        torch.testing.assert_close((shard["mean"], shard["std"]), (mean.half(), std.half()), atol=2e-3, rtol=0)
        for place, name in enumerate(("train", "val", "test")):
            assert (
                shard["index"][shard["split"] == place].tolist()
                == np.intersect1d(data.numbers[name], shard["index"]).tolist()
            )


def test_statistics_are_those_of_noisy_training_codes(folder):
    data = opened(folder)
    codes = data.store.fetch(data.numbers["train"])
    mean, std = codes["mean"].double(), codes["std"].double()
    noisy = torch.cat([mean + std, mean - std])
    found = statistics(folder)
    expected = noisy.mean((0, 2, 3)), noisy.std((0, 2, 3), correction=0)
    for own, theirs in zip(found, expected):
        torch.testing.assert_close(own.double(), theirs, atol=1e-4, rtol=0)
    assert (found[1][0] - found[1][1]).abs() > 0.1


def batches(data, training, epoch=0):
    """Batches as a trainer hands them to a module."""

    class Trainer:
        overfit_batches, distributed_sampler_kwargs = 0, None

    data.setup()
    data.trainer = Trainer()
    data.trainer.training, data.trainer.current_epoch = training, epoch
    for batch in data.train_dataloader() if training else data.val_dataloader():
        yield data.on_after_batch_transfer(data.on_before_batch_transfer(batch, 0), 0)


@pytest.mark.parametrize("training", [True, False])
def test_batches_are_what_a_module_would_encode_itself(folder, captioned, training):
    epoch = 3 if training else 0
    cached = list(batches(opened(folder, seed=0), training, epoch))
    direct = list(batches(pictures(captioned, seed=0), training, epoch)) if not training else None
    assert len(cached) == (3 if training else 1)
    data = pictures(captioned)
    data.setup()
    for n, batch in enumerate(cached):
        image = data.finished(data.store.fetch(batch["index"].numpy()))["image"]
        noise = Draws(0, epoch, batch["index"]).normal("autoencoder", (2, 4, 4))
        torch.testing.assert_close(batch["latent"], Halved().encode(image, noise), atol=5e-3, rtol=0)
        assert batch.keys() == {"latent", "text", "index"}
        assert all(text in data.captions[row] for text, row in zip(batch["text"], batch["index"].tolist()))
        if direct:
            assert batch["index"].equal(direct[n]["index"])
            assert batch["text"] == direct[n]["text"]
    if training:
        texts = [t for e in range(4) for b in batches(opened(folder, seed=0), True, e) for t in b["text"]]
        assert 0 < sum(text.startswith("second") for text in texts) < len(texts) / 2


def test_channels_are_standardised_on_demand_and_the_noise_can_be_left_out(folder):
    data = opened(folder, standardise=True)
    latent = torch.cat([batch["latent"] for epoch in range(20) for batch in batches(data, True, epoch)])
    assert latent.mean((0, 2, 3)).abs().max() < 0.05
    assert (latent.std((0, 2, 3)) - 1).abs().max() < 0.05
    first, second = (next(batches(opened(folder, posterior=p), False))["latent"] for p in ("mean", "sample"))
    data = opened(folder)
    assert first.equal(data.store.fetch(data.numbers["val"])["mean"].float())
    assert not first.equal(second)


def test_a_killed_run_goes_on_and_leaves_the_same_bytes(folder, captioned, tmp_path, monkeypatch):
    encoder, told = Encoder(pictures(captioned), Halved(), batch=2, shard=10), []

    def stop(count):
        told.append(count)
        if sum(told) > 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encoder.write(tmp_path / "b", tick=stop)
    with pytest.raises(UserError, match=r"2 of 3 shards are missing \(first shard_000001.safetensors\); finish them"):
        opened(tmp_path / "b")
    (tmp_path / "b" / ".shard_000001.safetensors.1.part").write_bytes(b"x")
    told.clear()
    assert Encoder(pictures(captioned), Halved(), batch=2, shard=10).write(tmp_path / "b", tick=told.append) == 14
    assert sum(told) == 24
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert len(list(folder.iterdir())) == len(list((tmp_path / "b").iterdir()))


def test_ranks_share_the_shards(folder, captioned, tmp_path):
    made = [
        Encoder(pictures(captioned), Halved(), batch=2, shard=10).write(tmp_path / "c", rank=r, world=2) for r in (1,)
    ]
    assert made == [10]
    assert shard_file(tmp_path / "c", 1).read_bytes() == shard_file(folder, 1).read_bytes()


def test_latents_of_another_space_are_refused(folder):
    data = opened(folder)
    assert data.shape_for(Halved()) == (2, 4, 4)
    with pytest.raises(UserError, match=r"made with channels 2, expected 1, that of model.autoencoder; give the auto"):
        data.shape_for(Halved(channels=1))
    with pytest.raises(UserError, match=r"made with scale 1.0, expected 2.0, that of model.autoencoder"):
        data.shape_for(Halved(2.0))
    other = Halved()
    other.standard = (torch.zeros(2, 1, 1), torch.ones(2, 1, 1))
    with pytest.raises(UserError, match=r"data.standardise=false: model.autoencoder has statistics, expected none"):
        data.shape_for(other)
    with pytest.raises(UserError, match=r"has statistics of another folder, expected model.autoencoder.statistics="):
        opened(folder, standardise=True).shape_for(other)
    with pytest.raises(UserError, match=r"has no statistics, expected model.autoencoder.statistics="):
        opened(folder, standardise=True).shape_for(Halved())
    other.standard = opened(folder, standardise=True).standard
    assert opened(folder, standardise=True).shape_for(other) == (2, 4, 4)


def test_other_latents_in_the_folder_are_not_written_over(folder, captioned, tmp_path):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for encoder, what in (
        (Encoder(pictures(captioned), Halved(2.0), batch=2, shard=10), "of another autoencoder"),
        (Encoder(pictures(captioned, limit=5), Halved(), batch=2, shard=10), "of other data"),
        (Encoder(pictures(captioned), Halved(), batch=2, shard=12), "with another shards"),
        (Encoder(pictures(captioned), Halved(), batch=2, shard=10, dtype="float32"), "with another dtype"),
    ):
        with pytest.raises(UserError, match=rf"holds latents made {what}; give another folder"):
            encoder.write(folder)
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not empty and without latents\.json"):
        Encoder(pictures(captioned), Halved(), batch=2, shard=10).write(tmp_path)


def test_damage_is_named(captioned, tmp_path):
    Encoder(pictures(captioned), Halved(), batch=2, shard=12).write(tmp_path)
    path = shard_file(tmp_path, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    with pytest.raises(UserError, match=r"shard_000001.safetensors': cannot be read .*; delete the shard's two files"):
        opened(tmp_path)
    save_file({key: value[:3] for key, value in load_file_bytes(whole).items()}, path)
    with pytest.raises(UserError, match=r"3 codes and 12 captions, expected 12; delete it"):
        opened(tmp_path)
    manifest = json.loads((tmp_path / "latents.json").read_text())
    for content, line in (
        ("[]", "found a list, expected an object"),
        ("{", "not JSON"),
        (json.dumps({**manifest, "shards": 3}), "'shards' is 3, expected a list"),
    ):
        (tmp_path / "latents.json").write_text(content)
        with pytest.raises(UserError, match=line):
            read_manifest(tmp_path)


def load_file_bytes(content):
    from safetensors.torch import load

    return load(content)


def test_codes_that_do_not_fit_are_refused(captioned, tmp_path):
    with pytest.raises(UserError, match=r"the code of sample \d+ has NaN, infinite or too large numbers for float16"):
        Encoder(pictures(captioned), Halved(1e5), batch=2, shard=10).write(tmp_path / "a")
    with pytest.raises(UserError, match="shard=3, expected a multiple of batch=2"):
        Encoder(pictures(captioned), Halved(), batch=2, shard=3)
    with pytest.raises(UserError, match="batch=0, expected 1 or more"):
        Encoder(pictures(captioned), Halved(), batch=0)
    latents = Encoder(pictures(captioned), Halved(), batch=2, shard=10)
    latents.write(tmp_path / "b")
    with pytest.raises(UserError, match=r"data is a CachedLatents, expected images or videos as they are"):
        Encoder(opened(tmp_path / "b"), Halved())


def test_classes_without_captions_are_told_by_number(tmp_path):
    for n in range(6):
        (tmp_path / "data" / "ab"[n % 2]).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), 40 * n, np.uint8)).save(tmp_path / "data" / "ab"[n % 2] / f"{n}.png")
    data = Images(name="mine", data_dir=str(tmp_path / "data"), val_fraction=0.3, batch_size=2)
    Encoder(data, Halved(), batch=2, shard=4).write(tmp_path / "out")
    found = opened(tmp_path / "out", real=data)
    assert (found.num_classes, found.class_names) == (2, ["a", "b"])
    texts, labels = found.prompts(9, "all")
    assert [str(label) for label in labels.tolist()] == texts
    assert found.store.fetch(np.arange(6))["label"].tolist() == [0, 0, 0, 1, 1, 1]
    assert next(iter(found.reference_dataloader("all")))["image"].shape == (6, 3, 4, 4)
    assert found.reference_fingerprint == data.fingerprint
    with pytest.raises(UserError, match=r"data\.real: found none"):
        opened(tmp_path / "out").reference_dataloader()


def test_clips_of_several_aspects_lie_apart_and_batches_have_one(tmp_path):
    draws = np.random.default_rng(0)
    for n in range(10):
        (tmp_path / "data" / f"{n}").mkdir(parents=True)
        for k in range(3):
            size = (16, 32, 3) if n % 2 else (32, 16, 3)
            Image.fromarray(draws.integers(256, size=size, dtype=np.uint8)).save(
                tmp_path / "data" / f"{n}" / f"{k}.png"
            )
    options = {
        "frames": 3,
        "size": 16,
        "multiple": 8,
        "aspects": ["16:9", "9:16"],
        "val_fraction": 0.2,
        "batch_size": 2,
    }
    Encoder(Video(data_dir=str(tmp_path / "data"), **options), Halved(), batch=2, shard=2).write(tmp_path / "out")
    data = CachedLatents(str(tmp_path / "out"), batch_size=2)
    data.setup()
    assert data.shapes == [(3, 2, 8, 12), (3, 2, 12, 8)]
    seen = list(batches(data, True))
    assert {tuple(batch["latent"].shape[1:]) for batch in seen} == set(data.shapes)
    assert all(len(batch["text"]) == 2 for batch in seen)


def trained(data, tmp_path):
    """Weights of a small flow after an epoch."""
    torch.manual_seed(0)
    net = STARFlow((2, 4, 4), 32, (1, 1), head_dim=32, text_dim=8)
    with torch.no_grad():
        for block in net.blocks:
            block.proj_out.weight.normal_(0, 0.05)
    optimizer = partial(torch.optim.AdamW, lr=1e-3)
    module = method.STARFlow(net, optimizer, noise=0.3, text=HashedText(dim=8, length=4), autoencoder=Halved())
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=1, enable_model_summary=False, default_root_dir=tmp_path, **options)
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 3
    return module, trainer.test(module, datamodule=data, verbose=False)[0]["test/loss"]


def test_a_flow_trains_alike_from_latents_and_from_pictures_and_decodes_its_samples(captioned, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "own", SimpleNamespace(Halved=Halved))
    words = [
        "data=image_text",
        "image_size=8",
        "data.name=mine",
        f"data.data_dir={captioned}",
        "data.val_fraction=0.25",
    ]
    words += [
        "model.autoencoder.class_path=own.Halved",
        f"out={tmp_path / 'out'}",
        "batch=2",
        "shard=10",
        "dtype=float32",
    ]
    assert main(["encode", *words]) == 0
    monkeypatch.setattr(ImageText, "train_dataloader", KindDataModule.train_dataloader)
    direct, expected = trained(pictures(captioned, seed=0), tmp_path)
    monkeypatch.setattr(CachedLatents, "on_before_batch_transfer", lambda self, batch, _: first_captions(batch))
    module, found = trained(CachedLatents(str(tmp_path / "out"), batch_size=6, seed=0), tmp_path)
    assert found == pytest.approx(expected, rel=1e-4)
    for a, b in zip(module.parameters(), direct.parameters()):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    assert module.sample(2, prompt="first 3").shape == (2, 3, 8, 8)


def first_captions(batch):
    """As pictures have them where captions are not drawn by row."""
    return {**batch, "text": [texts[0] for texts in batch["text"]]}


def test_the_verb_refuses_what_it_cannot_use(tmp_path, capsys):
    for words, line in (
        (["data=image_text", "autoencoder=x"], "encode: out=FOLDER is required"),
        (["data=image_text", f"out={tmp_path / 'a'}"], "the model has no autoencoder; expected autoencoder=PATH"),
        (
            ["data=image_text", "out=a", "dtype=float61"],
            "dtype=float61: expected one of float16, float32 (did you mean",
        ),
        (["data=imagetext", "out=a"], "did you mean 'image_text'?"),
        (["data=image_text", "out=a", "batch=x"], "batch=x: expected int"),
        (["data=image_text", "out=a", "bach=2"], "key 'bach' in 'bach=2': unknown"),
    ):
        assert main(["encode", *words]) == 2
        assert line in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
