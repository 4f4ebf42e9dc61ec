"""COCO's metrics against pycocotools and over two ranks, and the file of results."""

import contextlib
import importlib
import io
import json
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from ranks import running
from torch import Tensor

from penstock.lightning_modules.callbacks.checkpoint import Checkpoint
from penstock.lightning_modules.callbacks.detection_metrics import DetectionMetrics, average_precision, write_results
from penstock.lightning_modules.checkpoints import load_checkpoint
from penstock.lightning_modules.instance_masks import decoded, encoded
from tests.box_trees import coco

CLASSES = ["cat", "dog", "bird", "fish"]


def boxes(n: int, generator: torch.Generator) -> Tensor:
    low = torch.rand(n, 2, generator=generator) * 200
    return torch.cat([low, low + 4 + torch.rand(n, 2, generator=generator) * 150], 1).round()


@pytest.fixture
def scenes() -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Detections near objects and elsewhere, crowds, images without either; nothing is a fish."""
    generator = torch.Generator().manual_seed(0)
    found, targets = [], []
    for image in range(12):
        n = image % 4
        own, labels = boxes(n, generator), torch.randint(0, 3, (n,), generator=generator)
        near = own + torch.randn(own.shape, generator=generator).mul(6).round()
        guesses = boxes(image % 3, generator)
        other = torch.randint(0, 3, (len(guesses),), generator=generator)
        found.append(
            {
                "boxes": torch.cat([near, guesses]),
                "scores": torch.randperm(n + len(guesses), generator=generator) / 16 + image / 256,
                "labels": torch.cat([labels, other]),
            }
        )
        targets.append(
            {
                "boxes": own,
                "labels": labels,
                "iscrowd": (torch.arange(n) == 2).long(),
                "area": (own[:, 2:] - own[:, :2]).prod(1),
                "image_id": torch.tensor(100 + image),
            }
        )
    return found, targets


def pycocotools(file, targets: list[dict[str, Tensor]], ids: list[int], kind: str = "bbox"):
    coco, evaluation = (pytest.importorskip(f"pycocotools.{name}") for name in ("coco", "cocoeval"))
    annotations = []
    for target in targets:
        for row, (x1, y1, x2, y2) in enumerate(target["boxes"].tolist()):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": int(target["image_id"]),
                    "category_id": ids[int(target["labels"][row])],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": float(target["area"][row]),
                    "iscrowd": int(target["iscrowd"][row]),
                    **({"segmentation": target["masks"][row]} if "masks" in target else {}),
                }
            )
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        truth.dataset = {
            "images": [{"id": int(one["image_id"]), "height": 360, "width": 360} for one in targets],
            "annotations": annotations,
            "categories": [{"id": ids[k], "name": name} for k, name in enumerate(CLASSES)],
        }
        truth.createIndex()
        result = evaluation.COCOeval(truth, truth.loadRes(str(file)), kind)
        result.evaluate()
        result.accumulate()
        result.summarize()
    return result


def test_against_pycocotools(tmp_path, scenes):
    found, targets = scenes
    ids = [17, 18, 16, 3]
    write_results(tmp_path / "detections" / "test.json", found, [int(one["image_id"]) for one in targets], ids)
    expected = pycocotools(tmp_path / "detections" / "test.json", targets, ids)
    values = average_precision(found, targets, CLASSES)
    names = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar_1", "ar_10", "ar_100"]
    names += ["ar_small", "ar_medium", "ar_large"]
    for name, value in zip(names, expected.stats):
        if value < 0:
            assert name not in values
        else:
            assert values[name] == pytest.approx(value, abs=1e-6), name
    assert 0.1 < values["ap50"] < 0.95
    precision = expected.eval["precision"]  # overlap, recall, class, area, number
    for k, name in enumerate(CLASSES):
        own = precision[:, :, expected.params.catIds.index(ids[k]), 0, -1]
        if (own > -1).any():
            assert values[f"ap_of/{name}"] == pytest.approx(own[own > -1].mean(), abs=1e-6)
        else:
            assert f"ap_of/{name}" not in values


def test_masks_against_pycocotools(tmp_path, scenes):
    """Ellipses in the boxes: overlaps other than those of boxes."""
    found, targets = scenes
    for one in (*found, *targets):
        one["masks"] = encoded(torch.stack([ellipse(box) for box in one["boxes"]])) if len(one["boxes"]) else []
    for target in targets:
        target["area"] = decoded(target["masks"], (360, 360)).sum((1, 2)).float()
    ids = [17, 18, 16, 3]
    write_results(tmp_path / "test.json", found, [int(one["image_id"]) for one in targets], ids)
    expected = pycocotools(tmp_path / "test.json", targets, ids, "segm").stats
    values = average_precision(found, targets, CLASSES)
    names = ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar_1", "ar_10", "ar_100"]
    for name, value in zip(names, expected):
        assert values.get(f"mask_{name}", -1) == pytest.approx(value, abs=1e-6), name
    boxes_alone = pycocotools(tmp_path / "test.json", targets, ids).stats[0]
    assert values["ap"] == pytest.approx(boxes_alone, abs=1e-6) != values["mask_ap"]


def ellipse(box: Tensor) -> Tensor:
    """bool `(360, 360)`."""
    rows, columns = torch.arange(360)[:, None] + 0.5, torch.arange(360) + 0.5
    (x, y), (a, b) = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2
    return ((columns - x) / a) ** 2 + ((rows - y) / b) ** 2 <= 1


def test_perfect_detections_and_none(scenes):
    _, targets = scenes
    perfect = [{"boxes": t["boxes"], "labels": t["labels"], "scores": torch.ones(len(t["boxes"]))} for t in targets]
    values = average_precision(perfect, targets, CLASSES)
    assert values["ap"] == values["ap50"] == values["ar_100"] == pytest.approx(1)
    none = [
        {"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64), "scores": torch.empty(0)}
        for _ in targets
    ]
    assert average_precision(none, targets, CLASSES)["ap"] == 0


def test_results_file(tmp_path):
    one = {"boxes": torch.tensor([[1.0, 2, 4, 8]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.5])}
    write_results(tmp_path / "r.json", [one], [7], [3, 9])
    rows = json.loads((tmp_path / "r.json").read_text())
    assert rows == [{"image_id": 7, "category_id": 9, "bbox": [1, 2, 3, 6], "score": 0.5}]


@pytest.fixture
def made(fakes, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setitem(importlib.sys.modules, "fakes", fakes)
    return importlib.import_module("detection_model")


@pytest.mark.parametrize(("test", "where"), [(5, "val"), (0, "test")])
def test_the_best_epoch_is_kept(made, tmp_path, test, where):
    """Where there are no test images the validation images are the test, and the best is one on these."""
    tree = coco(tmp_path / "tree", tuple((name, n) for name, n in (("train", 20), ("val", 7), ("test", test)) if n))
    last, best = (tmp_path / "checkpoints" / f"{name}.ckpt" for name in ("last", "best"))
    for epochs, resumed in ((2, None), (4, last)):
        callbacks = [Checkpoint(), DetectionMetrics("ap50")]
        trainer = pl.Trainer(
            accelerator="cpu",
            default_root_dir=tmp_path,
            callbacks=callbacks,
            max_epochs=epochs,
            log_every_n_steps=4,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = made.Detection("mine", str(tree), min_size=64, max_size=128, batch_size=2)
        trainer.fit(made.Mover((3.0, 0.5, 2.0, 3.0)), datamodule=data, ckpt_path=resumed, weights_only=True)
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        assert found[f"best_on_{where}/epoch"] == 1
        assert load_checkpoint(best)["epoch"] == 1
    assert load_checkpoint(last)["epoch"] == 3
    assert found[f"best_on_{where}/ap50"] > found["val/ap50"] > 0
    kept = {name for name in found if name.startswith("best")}
    assert kept == {f"best_on_{where}/epoch"} | {
        f"best_on_{where}/{name[4:]}" for name in found if name.startswith("val/") and "ap_of" not in name
    }


def test_two_ranks_are_one(made, tmp_path):
    """An odd number of images, some without boxes, and images that come twice where a sampler pads."""
    tree = coco(tmp_path / "tree", (("train", 20), ("val", 7), ("test", 5)))
    with running(Path(made.__file__), tree, tmp_path), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = made.run(1, tree, tmp_path / "one")
    two = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert (one["world"], two[0]["world"]) == (1, 2)
    assert sorted(len(found["val_seen"]) for found in two) == [3, 4]
    assert sorted(two[0]["val_seen"] + two[1]["val_seen"]) == one["val_seen"] == list(range(20, 27))
    assert sorted(two[0]["test_seen"] + two[1]["test_seen"]) == [27, 27, 28, 29, 30, 31]
    assert two[0]["fit"] == two[1]["fit"] == one["fit"]
    assert two[0]["test"] == two[1]["test"]
    for clock in ("latency_ms", "memory_mb"):
        assert one["test"].pop(clock) >= 0
        assert two[0]["test"].pop(clock) >= 0
    assert two[0]["test"] == one["test"]
    assert 0.2 < one["fit"]["val/ap50"] < 0.99
    assert 0.2 < one["test"]["ap50"] < 0.99
    file = Path("detections", "test.json")
    assert (tmp_path / "two" / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
