"""Batches of clips or of single frames: shares, ranks, resuming, numbers that never meet."""

import json

import pytest
import torch
from PIL import Image

from penstock.datamodules.digits import Digits
from penstock.datamodules.edited_digits import EditedDigits
from penstock.datamodules.image_text import ImageText
from penstock.datamodules.latents import CachedLatents
from penstock.datamodules.mixed import APART, Mixed
from penstock.datamodules.moving_digits import MovingDigits
from penstock.datamodules.video import Video
from penstock.lightning_modules.encoding import Encoder
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.autoencoder import Autoencoder


def mixed(attach, share=0.5, **where):
    video = MovingDigits(frames=4, n_train=400, n_val=20, n_test=20, batch_size=10, seed=3)
    image = MovingDigits(frames=1, n_train=90, n_val=20, n_test=20, batch_size=30, dequantise=True, seed=3)
    data = attach(Mixed(video, image, share), **where)
    data.prepare_data()
    data.setup()
    return data


def batches(data):
    return [data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()]


def test_batches_are_of_one_kind_each_in_their_share(attach):
    data = mixed(attach)
    found = batches(data)
    images = [batch for batch in found if "image" in batch]
    assert len(found) == 40
    assert 10 <= len(images) <= 30
    for batch in found:
        if "image" in batch:
            assert batch["image"].shape == (30, 1, 16, 16)
            assert batch["index"].min() >= APART
            assert "video" not in batch
        else:
            assert batch["video"].shape == (10, 4, 1, 16, 16)
            assert batch["index"].max() < APART
        assert len(batch["text"]) == len(batch["index"])
    assert not torch.equal(images[0]["index"], images[1]["index"])
    assert torch.equal(images[0]["index"], images[3]["index"])
    levels = (images[0]["image"] + 1) * 17 / 2
    assert (levels % 1).abs().max() > 0.1, "images keep their own dequantisation"
    assert (data.shape, data.levels) == ((4, 1, 16, 16), 17)


def test_what_comes_when_depends_on_the_epoch_alone(attach):
    kinds = [["image" in batch for batch in batches(mixed(attach, epoch=epoch))] for epoch in (0, 0, 1)]
    assert kinds[0] == kinds[1] != kinds[2]


def test_ranks_take_turns_together_and_share_every_batch(attach):
    whole = batches(mixed(attach))
    parts = [batches(mixed(attach, rank=rank, world=2)) for rank in range(2)]
    for one, left, right in zip(whole, *parts, strict=True):
        assert set(one) == set(left) == set(right)
        assert torch.equal(one["index"], torch.cat([left["index"], right["index"]]))


@pytest.mark.parametrize("stop", [1, 7, 23])
def test_resumes_in_the_middle_of_an_epoch(attach, stop):
    whole, loader = [batch["index"] for batch in mixed(attach).train_dataloader()], mixed(attach).train_dataloader()
    iterator = iter(loader)
    for _ in range(stop):
        next(iterator)
    again = mixed(attach).train_dataloader()
    again.load_state_dict(loader.state_dict())
    rest = [batch["index"] for batch in again]
    assert len(rest) == len(whole) - stop
    assert all(torch.equal(one, other) for one, other in zip(rest, whole[stop:], strict=True))


@pytest.mark.parametrize(("share", "kind"), [(0.0, "video"), (1.0, "image")])
def test_shares_of_none_and_all(attach, share, kind):
    assert all(kind in batch for batch in batches(mixed(attach, share)))


def test_evaluation_is_of_the_videos(attach):
    data = mixed(attach, training=False)
    assert [len(batch["video"]) for batch in data.val_dataloader()] == [10, 10]
    assert sum(len(batch["video"]) for batch in data.reference_dataloader("test")) == 20
    assert len(data.prompts(3)[0]) == 3


def test_refuses_what_does_not_go_together(attach):
    with pytest.raises(UserError, match=r"data\.share: found 1\.5"):
        Mixed(MovingDigits(), MovingDigits(), 1.5)
    with pytest.raises(UserError, match=r"data\.image: found samples of shape"):
        attach(Mixed(Digits(), MovingDigits())).setup()


def with_short(attach, **where):
    clips = {"n_val": 20, "n_test": 20, "seed": 3}
    video = MovingDigits(frames=4, n_train=800, batch_size=10, **clips)
    image = MovingDigits(frames=1, n_train=90, batch_size=30, dequantise=True, **clips)
    short = MovingDigits(frames=2, n_train=120, batch_size=15, **clips)
    data = attach(Mixed(video, image, 0.3, short, 0.4), **where)
    data.prepare_data()
    data.setup()
    return data


def test_short_clips_take_a_share_of_their_own(attach):
    data = with_short(attach)
    found = batches(data)
    kinds = [batch["image"].shape if "image" in batch else batch["video"].shape for batch in found]
    counts = [kinds.count(shape) for shape in ((10, 4, 1, 16, 16), (30, 1, 16, 16), (15, 2, 1, 16, 16))]
    assert sum(counts) == len(found) == 80
    assert all(abs(n - 80 * share) < 14 for n, share in zip(counts, (0.3, 0.3, 0.4), strict=True))
    short = [batch for batch in found if "video" in batch and batch["video"].shape[1] == 2]
    assert torch.equal(short[0]["index"], short[8]["index"]), "over and over"
    alone = attach(data.short)
    alone.setup()
    own = next(iter(alone.train_dataloader()))
    assert torch.equal(short[0]["index"], own["index"] + 2 * APART)
    assert torch.equal(short[0]["video"], alone.on_after_batch_transfer(own, 0)["video"])
    assert short[0]["text"] == own["text"]


@pytest.mark.parametrize("stop", [1, 29])
def test_resumes_among_three_kinds(attach, stop):
    whole, loader = (
        [batch["index"] for batch in with_short(attach).train_dataloader()],
        with_short(attach).train_dataloader(),
    )
    iterator = iter(loader)
    for _ in range(stop):
        next(iterator)
    again = with_short(attach).train_dataloader()
    again.load_state_dict(loader.state_dict())
    assert all(torch.equal(one["index"], other) for one, other in zip(again, whole[stop:], strict=True))


def test_refuses_short_clips_that_do_not_fit(attach):
    clips = [MovingDigits(frames=frames, n_train=20, batch_size=10) for frames in (4, 1, 2, 4)]
    with pytest.raises(UserError, match=r"data\.short_share: found 0\.8, expected a number in \[0, 0\.7\]"):
        Mixed(*clips[:2], 0.3, clips[2], 0.8)
    with pytest.raises(UserError, match=r"data\.short_share: found 0\.2 without data\.short"):
        Mixed(*clips[:2], 0.3, short_share=0.2)
    with pytest.raises(UserError, match=r"data\.short: found samples of shape \(4, 1, 16, 16\) .* fewer frames"):
        attach(Mixed(*clips[:2], 0.3, clips[3], 0.2)).setup()


def stills(folder, *sizes):
    """Pictures of the given sizes, each with two captions in a file."""
    folder.mkdir()
    lines = []
    for n, size in enumerate(sizes):
        Image.new("RGB", size, (n, 0, 0)).save(folder / f"{n:02d}.png")
        lines += [json.dumps({"file": f"{n:02d}.png", "text": f"{word} {n}"}) for word in ("first", "second")]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return str(folder)


def of_folders(tmp_path, image, **options):
    """Sixteen clips of two frames beside some images."""
    clips = tmp_path / "clips"
    clips.mkdir(exist_ok=True)
    for n in range(4):
        frames = [Image.new("L", (16, 16), 40 * k) for k in range(8)]
        frames[0].save(clips / f"{n}.gif", save_all=True, append_images=frames[1:])
    video = Video(data_dir=str(clips), frames=2, size=16, val_fraction=0.0, batch_size=1, seed=5)
    return Mixed(video, image, 0.6, **options)


@pytest.mark.parametrize("world", [1, 2])
def test_images_come_in_their_own_aspects(attach, tmp_path, world):
    folder = stills(tmp_path / "stills", *[(32, 18)] * 4, *[(16, 16)] * 6)
    (tmp_path / "stills" / "captions.jsonl").unlink()
    options = {"frames": 1, "size": 16, "aspects": ["1:1", "16:9"], "multiple": 4, "val_fraction": 0.0, "batch_size": 2}
    found = []
    for rank in range(world):
        data = of_folders(tmp_path, Video(data_dir=folder, seed=5, **options), batch_size=2)
        data = attach(data, rank=rank, world=world)
        data.setup()
        assert (data.batch_size, data.video.batch_size, data.image.batch_size) == (2, 2, 2)
        found.append(batches(data))
    images = [[batch["image"] for batch in own if "image" in batch] for own in found]
    assert {tuple(one.shape[1:]) for one in images[0]} == {(3, 16, 16), (3, 12, 20)}
    assert all(len({tuple(own.shape[1:]) for own in batch}) == 1 for batch in zip(*images, strict=True))
    assert {len(batch["text"]) for batch in found[0]} == {2 // world}


def test_images_with_captions_in_several_wordings(attach, tmp_path):
    folder = stills(tmp_path / "stills", *[(16, 16)] * 8)
    image = ImageText(name="mine", data_dir=folder, val_fraction=0.0, batch_size=4, seed=5)
    data = attach(of_folders(tmp_path, image))
    data.setup()
    found = [batch for batch in batches(data) if "image" in batch]
    assert {batch["image"].shape for batch in found} == {(4, 3, 16, 16)}
    assert {text.split()[0] for batch in found for text in batch["text"]} == {"first", "second"}
    for batch in found:
        levels = ((batch["image"][:, 0, 0, 0] + 1) * 127.5).round().long().tolist()
        assert [text.split()[1] for text in batch["text"]] == [str(level) for level in levels]


class Halved(Autoencoder):
    """Every second pixel of three channels."""

    key = "latent"

    def latent_shape(self, shape):
        return (*shape[:-2], shape[-2] // 2, shape[-1] // 2)

    def encode(self, image, noise=None):
        return image[..., ::2, ::2]

    def decode(self, latent):
        raise NotImplementedError


def test_latents_of_both_kinds_and_one_autoencoder(attach, tmp_path):
    plain = of_folders(tmp_path, Video(data_dir=stills(tmp_path / "stills", *[(16, 16)] * 4), frames=1, size=16))
    (tmp_path / "stills" / "captions.jsonl").unlink()
    plain.image.val_fraction = 0.0
    for name, data in (("video", plain.video), ("image", plain.image)):
        Encoder(data, Halved(), batch=1, shard=2, dtype="float32").write(tmp_path / name)
    with pytest.raises(UserError, match="encode: data is a Mixed, expected videos or images"):
        Encoder(plain, Halved())
    sides = [CachedLatents(str(tmp_path / name), batch_size=2, seed=5) for name in ("video", "image")]
    data = attach(Mixed(*sides, 0.5))
    data.setup()
    assert data.shape_for(Halved()) == (2, 3, 8, 8)
    found = [data.on_after_batch_transfer(data.on_before_batch_transfer(b, 0), 0) for b in data.train_dataloader()]
    assert {batch["latent"].shape[1:] for batch in found} == {(2, 3, 8, 8), (3, 8, 8)}
    for batch in found:
        assert set(batch) == {"latent", "text", "index"}
        assert all(isinstance(text, str) for text in batch["text"])
        assert (batch["latent"].ndim == 4) == (batch["index"].min() >= APART)
    other = Halved()
    other.identity = lambda: {"class": "Other"}
    with pytest.raises(UserError, match="made with class Halved, expected Other"):
        data.shape_for(other)
    with pytest.raises(UserError, match=r"data\.image: found latents beside pictures"):
        attach(Mixed(sides[0], plain.image)).setup()


def test_a_mix_of_pairs_has_their_sources(attach):
    pairs = EditedDigits(MovingDigits(frames=4, n_train=60, n_val=5, n_test=5, batch_size=10))
    data = attach(Mixed(pairs, MovingDigits(frames=1, n_train=60, batch_size=10), 0.5))
    data.setup()
    assert data.sourced
    for batch in batches(data):
        assert ("source" in batch) == ("video" in batch)
        assert all(batch[key].is_floating_point() for key in ("source", "video", "image") if key in batch)
    assert data.sources(torch.arange(3)).shape == (3, 4, 1, 16, 16)
