import numpy as np
import pytest
import torch

from penstock.datamodules.digits import Digits
from penstock.datamodules.pair import Pair
from penstock.datamodules.points import Points
from penstock.lightning_modules.errors import UserError


def ready(source=None, target=None, **options):
    target = target or Points("three_modes", 200, batch_size=20, **options)
    data = Pair(source or Points("three_modes_source", 50, batch_size=7), target)
    data.prepare_data()
    data.setup()
    return data


def pairs(data, epoch=0):
    loader = data.train_dataloader()
    loader.batch_sampler.sampler.set_epoch(epoch)
    return {int(i): tuple(s.tolist()) for b in loader for i, s in zip(b["index"], b["source"])}


def test_batches_hold_both_sets():
    data = ready()
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"points", "label", "index", "source"}
    assert batch["source"].shape == batch["points"].shape == (20, 2)
    assert (data.shape, data.num_classes) == ((2,), 3)
    numbers = data.target.view("train").fetch(batch["index"].numpy())
    assert torch.equal(numbers["points"], batch["points"])
    pool = {tuple(p.tolist()) for p in data.source.store.tensors["points"][:50]}
    assert set(pairs(data).values()) <= pool
    assert len(set(pairs(data).values())) > 40


def test_pairs_depend_on_seed_epoch_and_index():
    assert pairs(ready()) == pairs(ready())
    assert pairs(ready(), 1) == pairs(ready(), 1)
    assert pairs(ready()) != pairs(ready(), 1)


def test_one_rank_equals_two(attach):
    one = list(ready().train_dataloader())
    shares = [list(attach(ready(), rank=r, world=2).train_dataloader()) for r in range(2)]
    for whole, a, b in zip(one, *shares, strict=True):
        assert all(torch.equal(whole[key], torch.cat((a[key], b[key]))) for key in whole)


def test_references_of_both_directions():
    data = ready()
    assert sum(len(b["points"]) for b in data.reference_dataloader("train")) == 200
    back = list(data.reference_dataloader("train", of="source"))
    assert [len(b["points"]) for b in back] == [20, 20, 10]
    assert torch.equal(torch.cat([b["points"] for b in back]), data.source.store.tensors["points"][:50])


def test_evaluation_covers_the_target_with_fixed_pairs():
    data = ready()
    first, second = (list(data.val_dataloader()) for _ in range(2))
    assert torch.cat([b["index"] for b in first]).tolist() == list(range(200, 220))
    assert all(torch.equal(a["source"], b["source"]) for a, b in zip(first, second))


def test_images_are_scaled_and_dequantised_on_both_sides(attach):
    data = attach(ready(Digits(dequantise=True), Digits(batch_size=64)), epoch=1)
    batch = next(iter(data.train_dataloader()))
    assert batch["source"].dtype == batch["image"].dtype == torch.uint8
    trained = data.on_after_batch_transfer(batch, 0)
    assert torch.equal(trained["image"], batch["image"].float() / 8 - 1)
    noise = (trained["source"] + 1) * 17 / 2 - batch["source"]
    assert noise.std() > 0
    assert noise.min() > -1e-5
    assert noise.max() < 1 + 1e-5
    attach(data, training=False)
    assert torch.equal(data.on_after_batch_transfer(batch, 0)["source"], batch["source"].float() / 8 - 1)


def test_sets_of_different_shape_are_refused():
    with pytest.raises(UserError, match=r"data.source: found Points samples of shape \(2,\), expected .*\(1, 8, 8\)"):
        ready(Points(), Digits())


def test_fingerprint_depends_on_both():
    base = ready().fingerprint
    assert ready(Points("gaussian", 50)).fingerprint != base
    assert ready(target=Points("three_modes", 300, batch_size=20)).fingerprint != base
    assert np.unique([ready().fingerprint, base]).size == 1
