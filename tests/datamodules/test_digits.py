import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from penstock.datamodules.digits import Digits
from penstock.kernels.philox import Draws
from penstock.lightning_modules.errors import UserError


def ready(**options):
    data = Digits(**options)
    data.prepare_data()
    data.setup()
    return data


def all_of(loader, key):
    return torch.cat([batch[key] for batch in loader])


def test_attributes_and_split_sizes():
    data = ready()
    assert (data.shape, data.num_classes, data.class_names) == ((1, 8, 8), 10, list("0123456789"))
    assert {s: len(data.view(s)) for s in ("train", "val", "test", "all")} == {
        "train": 1617,
        "val": 180,
        "test": 180,
        "all": 1797,
    }
    assert not set(data.numbers["train"]) & set(data.numbers["val"])


def test_reference_is_scikit_learns_digits_in_order():
    images, labels = load_digits(return_X_y=True)
    reference = list(ready(eval_batch_size=500).reference_dataloader("all"))
    assert [len(b["index"]) for b in reference] == [500, 500, 500, 297]
    image = torch.cat([b["image"] for b in reference])
    assert np.array_equal(image.numpy().reshape(-1, 64), (images / 8 - 1).astype(np.float32))
    assert torch.cat([b["label"] for b in reference]).tolist() == labels.tolist()
    assert torch.cat([b["index"] for b in reference]).tolist() == list(range(1797))


def test_no_validation_when_the_fraction_is_zero():
    data = ready(val_fraction=0.0)
    assert data.val_dataloader() == []
    assert len(data.view("train")) == 1797
    with pytest.raises(UserError, match=r"Digits: the 'test' split is empty; set data.val_fraction above 0"):
        data.test_dataloader()


def test_the_held_out_images_do_not_depend_on_the_seed():
    assert np.array_equal(ready(seed=1).numbers["val"], ready(seed=2).numbers["val"])


def test_order_follows_the_seed_of_the_run(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    run = all_of(ready().train_dataloader(), "index")
    assert torch.equal(run, all_of(ready(seed=7).train_dataloader(), "index"))
    assert not torch.equal(run, all_of(ready(seed=8).train_dataloader(), "index"))
    monkeypatch.delenv("PL_GLOBAL_SEED")
    assert torch.equal(all_of(ready().train_dataloader(), "index"), all_of(ready(seed=0).train_dataloader(), "index"))


def test_one_rank_equals_two(attach):
    one = list(ready(batch_size=8).train_dataloader())
    first, second = (list(attach(ready(batch_size=8), rank=r, world=2).train_dataloader()) for r in range(2))
    assert len(one) == len(first) == len(second) == 1617 // 8
    for whole, a, b in zip(one, first, second):
        for key in ("image", "label", "index"):
            assert torch.equal(whole[key], torch.cat((a[key], b[key])))


def test_evaluation_covers_every_sample_once_over_three_ranks(attach):
    shares = [list(attach(ready(batch_size=30), rank=r, world=3).val_dataloader()) for r in range(3)]
    assert {len(s) for s in shares} == {6}
    index = torch.cat([b["index"] for s in shares for b in s])
    assert sorted(index.tolist()) == ready().numbers["val"].tolist()


def test_overfitting_repeats_the_same_batches(attach):
    first, second = (
        next(iter(attach(ready(), overfit_batches=1, epoch=epoch).train_dataloader()))["index"] for epoch in (0, 1)
    )
    assert torch.equal(first, second)
    shuffled = next(iter(attach(ready(), epoch=1).train_dataloader()))["index"]
    assert not torch.equal(first, shuffled)


def test_dequantisation_only_in_training_and_keyed(attach):
    data = attach(ready(dequantise=True, seed=5), epoch=2)
    batch = next(iter(data.train_dataloader()))
    levels = batch["image"].float()
    image = data.on_after_batch_transfer(batch, 0)["image"]
    noise = (image + 1) * 17 / 2 - levels
    assert image.min() >= -1
    assert image.max() <= 1
    assert noise.min() > -1e-5
    assert noise.max() < 1 + 1e-5
    assert abs(noise.mean() - 0.5) < 4 / math.sqrt(12 * noise.numel())
    expected = Draws(5, 2, batch["index"]).uniform("dequantise", (1, 8, 8))
    torch.testing.assert_close(noise, expected, atol=1e-5, rtol=0)

    attach(data, training=False)
    assert torch.equal(data.on_after_batch_transfer(batch, 0)["image"], levels / 8 - 1)
    data.trainer = None
    assert torch.equal(data.on_after_batch_transfer(batch, 0)["image"], levels / 8 - 1)


def test_reference_batches_are_final_even_in_training(attach):
    data = attach(ready(dequantise=True))
    batch = next(iter(data.reference_dataloader("train")))
    assert data.on_after_batch_transfer(batch, 0)["image"] is batch["image"]
    assert torch.equal((batch["image"] + 1) * 8, ((batch["image"] + 1) * 8).round())


def test_fingerprint_changes_with_what_changes_the_data():
    base = ready().fingerprint
    assert ready(seed=3, batch_size=16).fingerprint == base
    assert len({base, ready(val_fraction=0.2).fingerprint, ready(dequantise=True).fingerprint}) == 3


def test_bad_settings_name_the_key(attach):
    data = ready()
    with pytest.raises(UserError, match=r"split: found 'trian', expected one of .*did you mean 'train'"):
        data.view("trian")
    with pytest.raises(UserError, match=r"data.val_fraction: found 1.5, expected a number in \[0, 1\)"):
        ready(val_fraction=1.5)
    with pytest.raises(UserError, match=r"data.batch_size: found 0, expected at least 1"):
        Digits(batch_size=0)
    with pytest.raises(UserError, match=r"data.batch_size: found 5000, .* holds 1617 samples; expected at most 1617"):
        ready(batch_size=5000).train_dataloader()
    with pytest.raises(
        UserError, match=r"data.batch_size: found 10, which 4 ranks cannot share evenly; nearest: 8 or 12"
    ):
        attach(Digits(batch_size=10), world=4).setup()
    with pytest.raises(UserError, match=r"which 4 ranks cannot share evenly; nearest: 4$"):
        attach(Digits(batch_size=3), world=4).setup()
    with pytest.raises(UserError, match=r"data.eval_batch_size: found 2, .* each of the 4 ranks"):
        attach(Digits(batch_size=8, eval_batch_size=2), world=4).setup()
    data = attach(ready(batch_size=200, val_fraction=0.02), world=50)
    with pytest.raises(UserError, match=r"a split of 36 samples cannot be shared by 50 ranks"):
        data.val_dataloader()
