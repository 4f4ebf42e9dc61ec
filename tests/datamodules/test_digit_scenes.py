"""Scenes of digits: tight boxes, three octaves, disjoint digits, the same scenes always."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from penstock.datamodules import digit_scenes
from penstock.datamodules.digit_scenes import OCTAVES, DigitScenes, draw_scene, shares


def ready(**options):
    data = DigitScenes(**{"scenes": 80, "batch_size": 8} | options)
    data.setup()
    return data


@pytest.fixture(scope="module")
def images():
    return load_digits().images / 16


def test_batches():
    data = ready(image_size=96)
    assert (data.shape, data.num_classes, data.class_names) == ((3, 96, 96), 10, list("0123456789"))
    assert {s: len(n) for s, n in data.numbers.items()} == {
        "train": int(data.store.table.filled()[:80].sum()),
        "val": 20,
        "test": 20,
    }
    assert [data.where(n) for n in (0, 79, 80, 100, 119)] == [
        f"{split}/{n:05d}" for split, n in (("train", 1), ("train", 80), ("val", 1), ("test", 1), ("test", 20))
    ]
    assert [t["image_id"].item() for t in data.targets(np.array([0, 79, 80, 119]))] == [1, 80, 1, 20]
    for batch in data.reference_dataloader("test"):
        assert (batch["image"].shape[1:], batch["image"].dtype) == ((3, 96, 96), torch.float32)
        assert batch["size"].tolist() == batch["original_size"].tolist() == [[96, 96]] * len(batch["index"])
        for image, boxes, target in zip(batch["image"], batch["boxes"], data.targets(batch["index"])):
            assert torch.equal(boxes, target["boxes"])
            assert -1 <= image.min() < image.max() <= 1
            assert len(boxes) <= 8
            assert (boxes >= 0).all()
            assert (boxes <= 96).all()


def test_boxes_are_tight_around_ink(images, monkeypatch):
    """On a flat ground, without a second digit near, what differs from the ground is what is in the box."""
    monkeypatch.setattr(digit_scenes, "background", lambda rng, side: np.full((side, side, 3), 0.5, dtype=np.float32))
    found = 0
    for seed in range(60):
        scene = draw_scene(np.random.default_rng(seed), images, np.arange(100), 128)
        ink = (scene.picture != 128).any(2)
        inside = np.zeros_like(ink)
        for x1, y1, x2, y2 in scene.boxes:
            inside[y1:y2, x1:x2] = True
        assert not (ink & ~inside).any()
        for k, (x1, y1, x2, y2) in enumerate(scene.boxes):
            others = np.zeros_like(ink)
            for a, b, c, d in scene.boxes[:k] + scene.boxes[k + 1 :]:
                others[b:d, a:c] = True
            if not others[y1:y2, x1:x2].any():
                own = ink[y1:y2, x1:x2]
                assert all(edge.any() for edge in (own[0], own[-1], own[:, 0], own[:, -1]))
                found += 1
    assert found > 150


def test_backgrounds_have_texture():
    for seed in range(20):
        ground = digit_scenes.background(np.random.default_rng(seed), 64)
        assert 0 <= ground.min() < ground.max() <= 1
        assert ground.std((0, 1)).min() > 0.005


def test_ink_differs_from_what_it_lies_on(images):
    """The middle of the ink, by its own pixels, against the same place of the bare background."""
    weak = total = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        ground = digit_scenes.background(np.random.default_rng(seed), 128)
        scene = draw_scene(rng, images, np.arange(100), 128)
        for x1, y1, x2, y2 in scene.boxes:
            change = np.abs(scene.picture[y1:y2, x1:x2] / 255 - ground[y1:y2, x1:x2]).mean(2)
            weak += np.quantile(change, 0.9) < 0.1
            total += 1
    assert total > 100
    assert weak < 0.03 * total


def test_three_octaves_classes_and_few_overlaps():
    table = ready(scenes=400).store.table
    sides = table.boxes[:, 2:] - table.boxes[:, :2]
    heights = sides[:, 1]
    counts = [((heights >= low) & (heights <= high)).sum() for low, high in OCTAVES]
    assert sum(counts) == len(heights)
    assert min(counts) > 0.28 * len(heights)
    assert np.bincount(table.classes, minlength=10).min() > 0.07 * len(heights)
    assert (sides[:, 0] / heights).std() > 0.15, "of many aspects"
    assert sides.max() <= 44
    numbers = [len(table.boxes[table.rows(k)]) for k in range(len(table))]
    assert (min(numbers), max(numbers)) == (0, 8)
    assert 0.02 < np.mean(np.array(numbers) == 0) < 0.1
    for k in range(len(table)):
        boxes = table.boxes[table.rows(k)]
        for n, a in enumerate(boxes):
            for b in boxes[:n]:
                shared = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
                assert shared <= 0.1 * min((a[2:] - a[:2]).prod(), (b[2:] - b[:2]).prod()) + 1e-9


def test_splits_show_different_digits(monkeypatch):
    parts = shares(1797)
    assert sorted(np.concatenate(parts)) == list(range(1797))
    assert [round(len(part) / 1797, 2) for part in parts] == [0.6, 0.15, 0.25]
    seen = []
    whole = draw_scene
    monkeypatch.setattr(digit_scenes, "draw_scene", lambda *options: seen.append(whole(*options)) or seen[-1])
    data = ready()
    assert len(seen) == 120
    for part, scenes in zip(parts, (seen[:80], seen[80:100], seen[100:])):
        digits = [digit for scene in scenes for digit in scene.digits]
        assert set(digits) <= set(part.tolist())
    labels = load_digits().target
    assert data.store.table.classes.tolist() == [labels[digit] for scene in seen for digit in scene.digits]


def test_scenes_are_the_same_always_and_no_two_are_alike():
    one, other, more = ready(seed=1), ready(seed=2), ready(scenes=100)
    assert np.array_equal(one.store.source.pictures, other.store.source.pictures)
    assert one.fingerprint == other.fingerprint != more.fingerprint
    assert np.array_equal(one.store.source.pictures[:80], more.store.source.pictures[:80])
    assert len({picture.tobytes() for picture in one.store.source.pictures}) == 120
    first, second = (next(iter(data.train_dataloader()))["index"].tolist() for data in (one, other))
    assert first != second


def test_empty_scenes_are_for_evaluation():
    data, whole = ready(scenes=200), ready(scenes=200, keep_empty=True)
    empty = ~data.store.table.filled()
    assert empty[data.numbers["test"]].any()
    assert not empty[data.numbers["train"]].any()
    assert len(whole.numbers["train"]) == 200 > len(data.numbers["train"])


def test_ranks_and_workers(attach):
    one = [batch["index"].tolist() for batch in attach(ready(), epoch=4).train_dataloader()]
    shares = [
        [batch["index"].tolist() for batch in attach(ready(num_workers=r), rank=r, world=2, epoch=4).train_dataloader()]
        for r in (0, 1)
    ]
    assert one == [a + b for a, b in zip(*shares)]
