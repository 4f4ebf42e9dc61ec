"""Moving digits: what a clip shows follows its caption, depends on seed and number alone, and is made fast."""

import time

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from penstock.datamodules.digits import Digits
from penstock.datamodules.image_text import NAMES
from penstock.datamodules.moving_digits import BouncingDigits, MovingDigits, describe
from penstock.lightning_modules.errors import UserError

PICTURES = {image.astype(np.uint8).tobytes() for image in load_digits().images}
WORDS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}


def ready(**options):
    data = MovingDigits(**options)
    data.prepare_data()
    data.setup()
    return data


def read(caption):
    """(class, direction) of each digit that a caption names, by its own reading of the words."""
    found = []
    for part in caption.replace(" and a ", ";a ").replace(" and an ", ";an ").split(";"):
        words = part.split()
        assert words[0] == ("an" if words[1] == "eight" else "a")
        step = sum((np.array(WORDS[w]) for w in words[2:] if w in WORDS), np.zeros(2, int))
        assert (words[2:] == ["stays", "still"]) == (not step.any())
        found.append((NAMES.index(words[1]), tuple(step.tolist())))
    return found


def test_attributes_and_batches():
    data = ready(n_train=300, n_val=20, n_test=30, batch_size=64)
    assert (data.shape, data.num_classes, data.levels) == ((16, 1, 16, 16), 10, 17)
    assert {s: len(data.view(s)) for s in ("train", "val", "test", "all")} == {
        "train": 300,
        "val": 20,
        "test": 30,
        "all": 350,
    }
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"video", "text", "label", "index"}
    assert batch["video"].shape == (64, 16, 1, 16, 16)
    assert batch["video"].dtype == torch.uint8
    assert batch["label"].tolist() == [read(text)[0][0] for text in batch["text"]]
    whole = torch.cat([b["video"] for b in data.reference_dataloader("test")])
    assert whole.shape == (30, 16, 1, 16, 16)
    assert (whole.min(), whole.max()) == (-1, 1)


def test_each_frame_is_one_picture_of_the_class_moved_by_whole_pixels():
    clips = BouncingDigits(16, 16, 18, 1, 1, 0)
    moves = clips.moves(np.arange(200))
    videos, places = clips.video(moves)[:, :, 0], clips.places(moves)[:, 0]
    for clip, caption, label, corners in zip(videos, clips.captions(moves), clips.labels[moves.digit[:, 0]], places):
        ((named, direction),) = read(caption)
        assert named == label
        steps = np.diff(corners, axis=0)
        assert (steps[:4] == direction).all(), "the caption's direction holds for the first steps"
        assert (np.abs(steps) == np.abs(direction)).all(), "never stops, never jumps"
        for frame, (row, column) in zip(clip, corners):
            assert frame[row : row + 8, column : column + 8].tobytes() in PICTURES
            frame[row : row + 8, column : column + 8] = 0
            assert not frame.any()


def test_walls_turn_digits_back():
    clips = BouncingDigits(60, 16, 20, 1, 3, 0)
    corners = clips.places(clips.moves(np.arange(500)))
    assert corners.min() == 0
    assert corners[..., 0].max() == 8
    assert corners[..., 1].max() == 12


def test_two_digits_are_combined_by_maximum():
    clips = BouncingDigits(8, 16, 16, 2, 1, 0)
    moves = clips.moves(np.arange(400))
    two = moves.digit[:, 1] >= 0
    assert 0.4 < two.mean() < 0.6
    assert [len(read(text)) == 2 for text in clips.captions(moves)] == two.tolist()
    alone = [
        type(moves)(moves.digit[two][:, [k, k]], moves.start[two][:, [k, k]], moves.step[two][:, [k, k]])
        for k in (0, 1)
    ]
    both = np.maximum(*(clips.video(one) for one in alone))
    assert np.array_equal(clips.video(moves)[two], both)
    first = clips.places(moves)[two, :, 0]
    overlap = np.clip(8 - np.abs(first[:, 0] - first[:, 1]), 0, 8).prod(-1) / 64
    assert overlap.mean() < 0.3


def test_directions_and_classes_are_even():
    clips = BouncingDigits(1, 16, 16, 2, 1, 0)
    moves = clips.moves(np.arange(20_000))
    turn = (moves.step[:, 0] + 1) @ [3, 1]
    assert np.abs(np.bincount(turn, minlength=9) / 20_000 - 1 / 9).max() < 0.01
    assert np.bincount(clips.labels[moves.digit[:, 0]], minlength=10).min() > 1700
    assert np.isin(moves.digit[:, 0], clips.kept).all()
    assert len(np.unique(moves.digit[:, 0])) == len(clips.kept)


def test_test_clips_show_digits_never_seen_in_training():
    data, digits = ready(), Digits()
    digits.setup()
    shown = {s: np.unique(data.store.moves(data.numbers[s]).digit) for s in ("train", "val", "test")}
    assert set(shown["train"]) - {-1} <= set(digits.numbers["train"])
    assert (set(shown["val"]) | set(shown["test"])) - {-1} <= set(digits.numbers["val"])
    assert not set(data.numbers["val"]) & set(data.numbers["test"])


def test_a_clip_depends_on_seed_and_number_alone(monkeypatch):
    one = ready(seed=3).store.fetch(np.arange(50))
    again = ready(seed=3, n_train=60, batch_size=5).store.fetch(np.arange(49, -1, -1))
    assert torch.equal(one["video"], again["video"].flip(0))
    assert one["text"] == again["text"][::-1]
    assert not torch.equal(one["video"], ready(seed=4).store.fetch(np.arange(50))["video"])
    base = ready().store.fetch(np.arange(50))["video"]
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert torch.equal(base, ready().store.fetch(np.arange(50))["video"])
    assert int(base.sum()) == 361964
    assert ready().store.fetch(np.array([0, 2**30, 2**31]))["text"] == [
        "a nine moves left and up",
        "a two moves right and down",
        "a seven moves up",
    ]


def test_ranks_and_workers_change_nothing(attach):
    one = list(ready(batch_size=8, n_train=80).train_dataloader())
    shares = [list(attach(ready(batch_size=8, n_train=80), rank=r, world=2).train_dataloader()) for r in range(2)]
    for whole, a, b in zip(one, *shares):
        assert torch.equal(whole["video"], torch.cat((a["video"], b["video"])))
        assert whole["text"] == a["text"] + b["text"]
    worked = list(ready(batch_size=8, n_train=80, num_workers=2).train_dataloader())
    assert all(torch.equal(a["video"], b["video"]) and a["text"] == b["text"] for a, b in zip(one, worked))


def test_dequantised_in_training_only(attach):
    data = attach(ready(dequantise=True, n_train=200))
    batch = next(iter(data.train_dataloader()))
    noise = (data.on_after_batch_transfer(batch, 0)["video"] + 1) * 17 / 2 - batch["video"].float()
    assert noise.min() > -1e-5
    assert noise.max() < 1 + 1e-5
    assert abs(noise.mean() - 0.5) < 0.01
    attach(data, training=False)
    assert torch.equal(data.on_after_batch_transfer(batch, 0)["video"], batch["video"].float() / 8 - 1)


def test_prompts_are_the_captions():
    data = ready(n_train=50, n_test=20)
    text, label = data.prompts(25, "test")
    batches = list(data.reference_dataloader("test"))
    assert text == [t for b in batches for t in b["text"]] + text[:5]
    assert label.tolist() == [read(t)[0][0] for t in text]
    assert data.texts(torch.tensor([3, 53])) == [data.store.captions(data.store.moves(np.array([3])))[0]] * 2
    assert describe(8, (2, 0)) == "an eight moves down"


def test_a_batch_takes_milliseconds():
    store, best = ready().store, np.inf
    for _ in range(5):
        start = time.perf_counter()
        store.fetch(np.arange(128))
        best = min(best, time.perf_counter() - start)
    assert best < 0.1


def test_the_fingerprint_counts_what_changes_the_clips():
    prints = {
        ready(**o).fingerprint for o in ({}, {"frames": 8}, {"speed": 2}, {"most_digits": 1}, {"dequantise": True})
    }
    assert len(prints) == 5
    assert ready().fingerprint == ready(batch_size=5, num_workers=1).fingerprint


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"frames": 0}, r"data\.frames: found 0, expected 1 to 2\^30"),
        ({"n_test": 0}, r"data\.n_test: found 0"),
        ({"width": 9}, r"data\.width: found 9, expected at least 10: digits of 8 pixels that move by 1"),
        ({"height": 16, "speed": 5}, r"data\.height: found 16, expected at least 18"),
        ({"most_digits": 3}, r"data\.most_digits: found 3, expected 1 or 2"),
    ],
)
def test_bad_settings_name_the_key(options, line):
    with pytest.raises(UserError, match=line):
        MovingDigits(**options)
