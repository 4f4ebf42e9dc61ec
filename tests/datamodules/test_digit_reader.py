"""Digits that move are read back: real clips right, noise by chance, captions word for word."""

import pytest
import torch

from penstock.datamodules.digit_reader import PHRASES, DigitReader, understood
from penstock.datamodules.moving_digits import MovingDigits
from penstock.lightning_modules.errors import UserError


@pytest.fixture(scope="module")
def reader():
    return DigitReader()


def held_out(n, **options):
    data = MovingDigits(n_train=1, n_val=1, n_test=n, batch_size=n, **options)
    data.prepare_data()
    data.setup()
    return next(iter(data.reference_dataloader("test")))


def means(shares):
    return {kind: float(share.mean()) for kind, share in shares.items()}


def test_real_clips_show_what_their_captions_say(reader):
    one = held_out(60, most_digits=1, frames=10)
    found = means(reader(one["video"], one["text"]))
    assert found["direction"] == 1.0
    assert found["digit"] >= 0.96
    assert found[""] == found["digit"]
    two = held_out(40)
    found = means(reader(two["video"], two["text"]))
    assert found["direction"] >= 0.98
    assert found["digit"] >= 0.93
    assert [len(items) for items in reader.read(two["video"][:8], [1, 2] * 4)] == [1, 2] * 4


def test_others_captions_and_noise_are_right_by_chance(reader):
    batch = held_out(80, most_digits=1, frames=8, height=12, width=12)
    texts = [batch["text"][(k + 1) % 80] for k in range(80)]
    for video in (batch["video"], torch.rand(batch["video"].shape, generator=torch.Generator().manual_seed(0)) * 2 - 1):
        found = means(reader(video, texts))
        assert found[""] < 0.08
        assert found["digit"] < 0.25
        assert found["direction"] < 0.25


def test_a_clip_run_backwards_moves_the_other_way(reader):
    batch = held_out(60, most_digits=1, frames=4, height=20, width=20)
    found = reader(batch["video"].flip(1), batch["text"])
    still = torch.tensor(["still" in text for text in batch["text"]])
    assert found["direction"][still].min() == 1
    assert found["direction"][~still].max() == 0
    assert found["digit"].mean() > 0.95


def test_shares_count_each_digit_once(reader):
    batch = held_out(30, most_digits=1, frames=6)
    named = [f"{text} and {text}" for text in batch["text"]]
    found = reader(batch["video"], named)
    assert float(found["digit"].mean()) < 0.75, "one digit can't be two"
    assert float(found[""].mean()) >= 0.45


def test_captions_are_understood():
    assert len(PHRASES) == 90
    assert understood("a three moves left and down") == [(3, (1, -1))]
    assert understood("an eight moves up and a one stays still") == [(8, (-1, 0)), (1, (0, 0))]
    both = understood("a two moves right and up and a two moves left and down")
    assert both == [(2, (-1, 1)), (2, (1, -1))]
    for text in ("a cat", "a three moves", "a three moves left and", ""):
        with pytest.raises(UserError, match="expected one or two like 'a three moves left and down'"):
            understood(text)


def test_frames_that_are_too_small_are_refused(reader):
    with pytest.raises(UserError, match="frames of 9x12, expected sides of 10 or more"):
        reader(torch.zeros(1, 2, 1, 9, 12), ["a one stays still"])
