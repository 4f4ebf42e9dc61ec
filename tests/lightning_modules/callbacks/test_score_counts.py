"""Areas under curves of counts: scikit-learn's, recorded ones, brute force over thresholds, two ranks."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from golden_files import golden
from ranks import running
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from penstock.lightning_modules.callbacks import score_counts
from penstock.lightning_modules.callbacks.score_counts import ScoreCounts
from penstock.lightning_modules.callbacks.score_curve import key_of, keys_of, score_of
from penstock.lightning_modules.errors import UserError

SIZE = (4, 40, 50)


def measured(scores, masks, **options):
    counts = ScoreCounts()
    for image, mask in zip(scores, masks):
        counts.update_map(image, mask)
    return counts.measure(**options)


def blobs(seed=0, share=0.06):
    field = np.random.default_rng(seed).normal(size=SIZE)
    smooth = np.stack([ndimage.gaussian_filter(image, 2.5) for image in field])
    return smooth > np.quantile(smooth, 1 - share)


def maps(kind, masks, seed=1):
    noise = np.random.default_rng(seed).normal(size=masks.shape)
    anomalous = {
        "binades": np.sign(noise + masks) * np.exp(12 * np.random.default_rng(seed).normal(size=masks.shape)),
        "negative": -np.exp(-np.abs(noise + 1.5 * masks)),
        "ties": np.round(2 * (noise + masks)) / 2,
        "constant": np.full(masks.shape, -0.25),
        "perfect": masks - 0.5 + 0.1 * np.tanh(noise),
        "worst": -1.0 * masks,
        "random": noise,
    }
    return anomalous[kind].astype(np.float32)


def aupro_by_thresholds(scores, masks, limit):
    """The definition, threshold by threshold."""
    regions = []
    for place, mask in enumerate(masks):
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        regions += [scores[place][labels == k] for k in range(1, count + 1)]
    background = scores[~masks]
    points = [(0.0, 0.0)]
    for threshold in np.unique(scores)[::-1]:
        overlap = np.mean([(region >= threshold).mean() for region in regions])
        points.append(((background >= threshold).mean(), overlap))
    area = 0.0
    for (x, y), (x_next, y_next) in pairwise(points):
        end = min(x_next, limit)
        if x < end:
            y_end = y + (y_next - y) * (end - x) / (x_next - x)
            area += (end - x) * (y + y_end) / 2
    return area / limit


@pytest.mark.parametrize("kind", ["binades", "negative", "ties", "constant", "perfect", "worst", "random"])
def test_are_those_of_scikit_learn(kind):
    masks = blobs()
    scores = maps(kind, masks)
    found = measured(scores, masks)
    truth, flat = masks.ravel(), scores.ravel()
    assert found.auroc == pytest.approx(roc_auc_score(truth, flat), abs=1e-12)
    assert found.ap == pytest.approx(average_precision_score(truth, flat), abs=1e-12)
    precision, recall, thresholds = precision_recall_curve(truth, flat)
    f1 = (2 * precision * recall / np.maximum(precision + recall, 1e-30))[:-1]
    assert found.f1_max == pytest.approx(f1.max(), abs=1e-12)
    assert found.threshold == thresholds[f1 >= f1.max() - 1e-12].max()
    assert (found.lowest, found.highest) == (flat.min(), flat.max())


@pytest.mark.parametrize("kind", ["binades", "ties", "constant", "perfect", "worst", "random"])
def test_overlap_by_thresholds(kind):
    masks = blobs()
    scores = np.round(maps(kind, masks), 1)
    for limit in (0.05, 0.3, 1.0):
        expected = aupro_by_thresholds(scores, masks, limit)
        assert measured(scores, masks, limit=limit).aupro == pytest.approx(expected, abs=1e-12)


def test_overlap_that_is_known():
    masks = blobs()
    assert measured(maps("perfect", masks), masks).aupro == pytest.approx(1, abs=1e-12)
    assert measured(maps("perfect", masks), masks).aupro <= 1
    assert measured(maps("constant", masks), masks).aupro == pytest.approx(0.15, abs=1e-12)
    assert measured(maps("random", masks), masks).aupro == pytest.approx(0.15, abs=0.04)
    corners = np.zeros((1, 6, 6), bool)
    corners[0, :2, :2] = corners[0, 2:4, 2:4] = True
    counts = ScoreCounts()
    counts.update_map(corners[0].astype(np.float32), corners[0])
    assert counts.regions == 1


@pytest.mark.parametrize(("limit", "shift"), [(0.05, 0), (0.3, 0), (1.0, 0), (0.3, -1)])
def test_recorded_overlap(limit, shift):
    _, given, out = golden("fastflow", "11")
    masks = given["masks"].numpy() > 0
    for prefix, key in (("", "scores"), ("perfect_", "scores_perfect")):
        found = measured(given[key].numpy() + np.float32(shift), masks, limit=limit)
        exact, theirs = out[f"{prefix}aupro_exact_{limit}"], out[f"{prefix}aupro_{limit}"]
        assert found.aupro == pytest.approx(float(exact), abs=1e-9)
        assert found.aupro == pytest.approx(float(theirs), rel=1e-6)
        assert found.auroc == pytest.approx(float(out[f"{prefix}pixel_auroc"]), abs=1e-6)


def test_recorded_regions():
    _, given, out = golden("fastflow", "11")
    counts = ScoreCounts()
    for scores, mask in zip(given["scores"].numpy(), given["masks"].numpy() > 0):
        counts.update_map(scores, mask)
    assert counts.regions == int(out["components"].max())


def test_pages_of_arrays_are_those_of_lists(monkeypatch):
    masks = blobs()
    scores = maps("negative", masks)
    expected = measured(scores, masks)
    monkeypatch.setattr(score_counts, "PIECE", 1 << 14)
    assert tuple(measured(scores, masks)[:8]) == pytest.approx(expected[:8], abs=1e-12)
    monkeypatch.undo()
    monkeypatch.setattr(score_counts, "FEW", 300)
    assert tuple(measured(scores, masks)[:8]) == expected[:8]
    monkeypatch.setattr(score_counts, "FEW", 100)
    monkeypatch.setattr(score_counts, "COUNT", np.uint8)
    monkeypatch.setattr(score_counts, "CARRY", 128)
    scores = np.round(scores, 1)
    found = measured(scores, masks)
    monkeypatch.undo()
    assert found[:9] == measured(scores, masks)[:9]
    assert found.aupro == pytest.approx(measured(scores, masks).aupro, abs=1e-12)
    assert np.unique(scores, return_counts=True)[1].max() > 255


def test_memory_is_of_binades_and_not_of_pixels(monkeypatch):
    monkeypatch.setattr(score_counts, "FEW", 300)
    masks, counts, held = blobs(), ScoreCounts(), []
    scores = maps("perfect", masks)
    for _ in range(4):
        for image, mask in zip(scores, masks):
            counts.update_map(image, mask)
        columns = [column for page in counts.pages.values() for column in page]
        held.append(sum(array.nbytes for c in columns for array in (*c.list, c.counts, c.weights) if array is not None))
    assert held[2] == held[3] < 135e6 * len(counts.pages)
    assert counts.normal + counts.anomalous == 4 * scores.size


def test_f1_at_a_threshold():
    masks = blobs()
    scores = maps("ties", masks)
    truth = masks.ravel()
    for at in (-9.0, 0.5, 0.50001, 1.7, scores.max(), 9.0):
        called = scores.ravel() >= at
        expected = 2 * (called & truth).sum() / (called.sum() + truth.sum())
        assert measured(scores, masks, at=at).f1 == pytest.approx(expected, abs=1e-12)
    found = measured(scores, masks)
    assert measured(scores, masks, at=found.threshold).f1 == found.f1_max


def test_order_of_the_integers():
    values = np.array([-3e38, -1.5, -1e-3, -1e-45, 0.0, 1e-45, 1e-3, 1.5, 3e38], np.float32)
    keys = keys_of(values)
    assert (np.diff(keys.astype(np.int64)) > 0).all()
    assert keys_of(np.array([-0.0], np.float32))[0] == keys_of(np.array([0.0], np.float32))[0]
    assert [score_of(int(key)) for key in keys] == values.tolist()
    assert score_of(key_of(0.1)) >= 0.1 > score_of(key_of(0.1) - 1)


def test_few_samples_and_none():
    assert ScoreCounts().measure() is None
    one = ScoreCounts()
    one.update(np.array([0.1, 0.4, 0.3], np.float32), np.array([False, True, False]))
    assert one.measure() == pytest.approx(
        (2, 1, np.float32(0.1), np.float32(0.4), 1, 1, 1, np.float32(0.4), None, None)
    )
    normal = ScoreCounts()
    normal.update_map(np.array([[-0.5, -0.25]], np.float32), np.zeros((1, 2), bool))
    assert normal.measure() == (2, 0, -0.5, -0.25, *[None] * 6)
    anomalous = ScoreCounts()
    anomalous.update_map(np.array([[-0.5, -0.25]], np.float32), np.ones((1, 2), bool))
    assert anomalous.measure() == (0, 2, -0.5, -0.25, *[None] * 6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_none(bad):
    with pytest.raises(UserError, match=f"score: {bad} found, expected finite scores"):
        ScoreCounts().update(np.array([1, bad], np.float32), np.array([True, False]))


def test_two_ranks_are_one(tmp_path):
    masks, script = blobs(), tmp_path / "script.py"
    scores = maps("negative", masks)
    np.savez(tmp_path / "maps.npz", masks=masks, scores=scores)
    script.write_text(
        "import json, os, sys\nfrom pathlib import Path\nimport numpy as np\nimport torch.distributed as dist\n"
        "from penstock.lightning_modules.callbacks.score_counts import ScoreCounts\n"
        "dist.init_process_group('gloo')\nrank = dist.get_rank()\n"
        f"held = np.load({str(tmp_path / 'maps.npz')!r})\ncounts = ScoreCounts()\n"
        "for place in ([0], [1, 2, 3])[rank]:\n"
        "    counts.update_map(held['scores'][place], held['masks'][place])\n"
        "found = [counts.measure(at=-0.5), ScoreCounts().measure()]\n"
        f"Path({str(tmp_path)!r}, f'{{rank}}.json').write_text(json.dumps(found))\n"
        "dist.barrier()\ndist.destroy_process_group()\n"
    )
    with running(script):
        expected = measured(scores, masks, at=-0.5)
    for rank in range(2):
        found, nothing = json.loads(Path(tmp_path, f"{rank}.json").read_text())
        assert nothing is None
        assert found[:9] == list(expected[:9])
        assert found[9] == pytest.approx(expected.aupro, abs=1e-14)
