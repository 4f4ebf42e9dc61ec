"""Batches of clips or of single frames: shares, ranks, resuming, numbers that never meet."""

import pytest
import torch

from penstock.datamodules.digits import Digits
from penstock.datamodules.mixed import APART, Mixed
from penstock.datamodules.moving_digits import MovingDigits
from penstock.lightning_modules.errors import UserError


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
