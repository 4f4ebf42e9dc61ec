"""Files of a prediction: pictures of the original size, names of their own, nothing of the prediction before."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomaly_trees import picture
from PIL import Image
from torch.nn.functional import interpolate

from penstock.lightning_modules.calibration import Calibration
from penstock.lightning_modules.callbacks.anomaly_pictures import heat
from penstock.lightning_modules.callbacks.anomaly_predictions import FOLDERS, SCORES, AnomalyPredictions
from penstock.lightning_modules.callbacks.prediction_files import clear, picture_name

SIZES = [(24, 60), (8, 8), (5, 3)]  # of originals; the model sees 8 x 8


@pytest.fixture
def written(tmp_path):
    """What is written of three pictures: folder, originals in [-1, 1], images and maps of the model."""
    originals = [torch.rand(3, *size) * 2 - 1 for size in SIZES]
    images, maps = torch.rand(3, 3, 8, 8) * 2 - 1, torch.rand(3, 1, 8, 8)
    calibration = Calibration()
    calibration.set(0.5, 0.5, (0.0, 1.0), (0.25, 0.75))
    data = SimpleNamespace(where=lambda number: f"{number}.png", original=lambda number: originals[number])
    trainer = SimpleNamespace(
        datamodule=data,
        default_root_dir=tmp_path,
        is_global_zero=True,
        predict_loop=SimpleNamespace(),
        strategy=SimpleNamespace(barrier=lambda: None),
    )
    module, callback = SimpleNamespace(calibration=calibration), AnomalyPredictions()
    callback.on_predict_start(trainer, module)
    batch = {"image": images, "original_size": torch.tensor(SIZES)}
    callback.on_predict_batch_start(trainer, module, batch, 0)
    prediction = {"index": torch.arange(3), "score": torch.rand(3), "map": maps}
    callback.write_on_batch_end(trainer, module, prediction, None, batch, 0, 0)
    callback.write_on_epoch_end(trainer, module, [], [])
    return tmp_path / "predictions", originals, images, maps


def test_pictures_have_the_size_of_the_originals(written):
    folder, originals, images, maps = written
    for number, size in enumerate(SIZES):
        found = interpolate(maps[number, None], size, mode="bilinear")
        mask = np.array(Image.open(folder / "masks" / f"{number}.png"))
        np.testing.assert_array_equal(mask, 255 * (found[0, 0] >= 0.5).numpy())
        seen = images[number] if size == (8, 8) else originals[number]
        expected = heat(seen[None], ((found - 0.25) / 0.5).clamp(0, 1))[0].permute(1, 2, 0).int().numpy()
        shown = np.array(Image.open(folder / "heat" / f"{number}.png")).astype(int)
        assert shown.shape == (*size, 3)
        assert np.abs(shown - expected).max() <= 1


def test_no_two_pictures_have_one_name():
    files = ["a.png", "a.jpg", "a.jpg.png", "a.JPG.png", "a.jpg.png.png", "a.PNG", "a.png.png", "a.v2.png", "b/a.jpg"]
    names = [picture_name(file) for file in files]
    assert len(set(names)) == len(files)
    assert names[:3] == ["a.png", "a.jpg.png", "a.jpg.png.png"]
    assert names[7] == "a.v2.png"
    assert all(name.endswith(".png") for name in names)


def test_what_others_wrote_stays(written):
    folder, *_ = written
    own = [folder / "notes.txt", folder / "heat" / "own" / "x.png", folder / "masks" / "broken.png"]
    own[1].parent.mkdir()
    picture(0).save(own[1])
    for file in (own[0], own[2]):
        file.write_bytes(b"mine")
    cut = folder / "masks" / "0.png"
    cut.write_bytes(cut.read_bytes()[:-20])  # as a run that was stopped leaves it
    clear(folder, SCORES, FOLDERS.values())
    assert sorted(path for path in folder.rglob("*") if path.is_file()) == sorted(own)


def test_folders_without_pictures_go(written):
    folder, *_ = written
    (folder / "heat" / "own").mkdir()
    clear(folder, SCORES, FOLDERS.values())
    assert sorted(folder.rglob("*")) == [folder / "heat", folder / "heat" / "own"]


def test_nothing_is_cleared_where_there_is_nothing(tmp_path):
    clear(tmp_path / "predictions", SCORES, FOLDERS.values())
    assert not list(tmp_path.iterdir())
