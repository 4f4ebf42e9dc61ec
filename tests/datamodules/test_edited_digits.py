"""Moving digits and what instructions make of them: edits pixel by pixel, numbers, ranks, sources."""

import numpy as np
import pytest
import torch

from penstock.datamodules.edited_digits import CAPTIONS, EDITS, EditedDigits, edited
from penstock.datamodules.moving_digits import MovingDigits
from penstock.lightning_modules.errors import UserError


def ready(edits=None, **options):
    data = EditedDigits(MovingDigits(**({"frames": 4, "n_train": 120, "n_val": 10, "n_test": 20} | options)), edits)
    data.prepare_data()
    data.setup()
    return data


def by_hand(clip, edit):
    """An edit of one clip `(T, H, W)`, pixel by pixel."""
    frames, height, width = clip.shape
    out = np.zeros_like(clip)
    for t in range(frames):
        for row in range(height):
            for column in range(width):
                near = clip[t, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2].max()
                out[t, row, column] = {
                    "mirror": clip[t, row, width - 1 - column],
                    "flip": clip[t, height - 1 - row, column],
                    "invert": 16 - clip[t, row, column],
                    "thicken": near,
                    "outline": near - clip[t, row, column],
                    "reverse": clip[frames - 1 - t, row, column],
                }[edit]
    return out


@pytest.mark.parametrize("edit", EDITS)
def test_edits_pixel_by_pixel(edit):
    clips = MovingDigits(frames=3, width=14).build()[0].fetch(np.arange(3))["video"].numpy()
    for clip, made in zip(clips, edited(clips, edit)):
        assert made.dtype == np.uint8
        assert np.array_equal(made[:, 0], by_hand(clip[:, 0], edit))
        assert not np.array_equal(made, clip)


def test_batches_hold_source_edit_and_instruction():
    data = ready(batch_size=60)
    plain = MovingDigits(frames=4, n_train=120)
    plain.setup()
    assert (data.shape, data.levels, data.sourced) == ((4, 1, 16, 16), 17, True)
    (first, *_) = data.train_dataloader()
    assert set(first) == {"video", "source", "text", "label", "index"}
    assert torch.equal(first["source"], plain.store.fetch(first["index"].numpy())["video"])
    named = {caption: edit for edit, caption in CAPTIONS.items()}
    assert set(first["text"]) == set(named), "all edits come"
    for source, video, text in zip(first["source"], first["video"], first["text"]):
        assert np.array_equal(video, edited(source[None].numpy(), named[text])[0])


def test_edits_are_even_and_do_not_depend_on_the_digits():
    data = ready()
    kinds = data.store.kinds(np.arange(6000))
    assert np.abs(np.bincount(kinds, minlength=6) / 6000 - 1 / 6).max() < 0.02
    labels = data.store.clips.labels[data.store.clips.moves(np.arange(6000)).digit[:, 0]]
    assert abs(np.corrcoef(kinds, labels)[0, 1]) < 0.05
    assert set(ready(["flip", "invert"]).store.captions(np.arange(50))) == {CAPTIONS["flip"], CAPTIONS["invert"]}


def test_a_pair_depends_on_seed_and_number_alone(attach):
    one, again = ready(seed=3).store.fetch(np.arange(30)), ready(seed=3, n_train=60).store.fetch(np.arange(29, -1, -1))
    for key in ("video", "source"):
        assert torch.equal(one[key], again[key].flip(0))
    assert one["text"] == again["text"][::-1] != ready(seed=4).store.fetch(np.arange(30))["text"]
    whole = list(ready(batch_size=8).train_dataloader())
    shares = [
        list(attach(ready(batch_size=8, num_workers=rank), rank=rank, world=2).train_dataloader()) for rank in (0, 1)
    ]
    for batch, a, b in zip(whole, *shares, strict=True):
        assert all(torch.equal(batch[key], torch.cat((a[key], b[key]))) for key in ("video", "source", "index"))


def test_sources_go_with_prompts():
    data = ready()
    batch = next(iter(data.reference_dataloader("test")))
    rows = torch.arange(23)
    assert torch.equal(data.sources(rows, "test"), batch["source"][rows % 20])
    assert data.prompts(23)[0] == [batch["text"][row % 20] for row in rows.tolist()]
    assert data.prompts(3)[1].tolist() == batch["label"][:3].tolist()
    assert data.texts(torch.tensor([1, 121])) == [data.store.captions(data.numbers["train"][1:2])[0]] * 2
    assert (batch["source"].min(), batch["source"].max()) == (-1, 1)


def test_batches_are_those_of_the_digits_or_its_own():
    digits = MovingDigits(batch_size=9, eval_batch_size=7)
    for own, sizes in (({}, (9, 7)), ({"batch_size": 4}, (4, 4)), ({"batch_size": 4, "eval_batch_size": 5}, (4, 5))):
        data = EditedDigits(digits, **own)
        assert (data.batch_size, data.eval_batch_size) == sizes
    with pytest.raises(UserError, match=r"data\.batch_size: found 0"):
        EditedDigits(digits, batch_size=0)


def test_settings_count_and_bad_ones_are_named():
    prints = {ready(**options).fingerprint for options in ({}, {"edits": ["flip"]}, {"width": 18})}
    assert len(prints) == 3
    with pytest.raises(UserError, match=r"data\.edits: found 'mirorr', expected some of mirror.*did you mean 'mirror'"):
        EditedDigits(MovingDigits(), ["mirorr"])
    with pytest.raises(UserError, match=r"data\.edits: found ''"):
        EditedDigits(MovingDigits(), [])
