"""Heat maps, masks above a threshold, and the rows of the gallery."""

from types import SimpleNamespace

import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib import colormaps

from penstock.lightning_modules.calibration import Calibration
from penstock.lightning_modules.callbacks import anomaly_pictures
from penstock.lightning_modules.callbacks.anomaly_pictures import AnomalyGallery, above, drawn, heat

IMAGES = torch.rand(3, 3, 5, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
MAPS = torch.rand(3, 1, 5, 6, generator=torch.Generator().manual_seed(1))


def test_heat_mixes_images_and_colours():
    seen = ((IMAGES + 1) * 127.5).round()
    assert (heat(IMAGES, MAPS, 0.0).float() - seen).abs().max() <= 1
    colours = np.round(255 * colormaps["turbo"](MAPS[1, 0].double().numpy())[..., :3]).transpose(2, 0, 1)
    np.testing.assert_allclose(heat(IMAGES, MAPS, 1.0)[1].numpy(), colours, atol=1)
    grey = heat(IMAGES[:, :1], MAPS)
    assert grey.shape == (3, 3, 5, 6)
    assert grey.dtype == torch.uint8


def test_masks_reach_the_threshold():
    threshold = MAPS[0, 0, 2, 3].double()
    found = above(MAPS, threshold)
    assert torch.equal(found[:, :1] == 255, MAPS[0, 0, 2, 3] <= MAPS)
    assert set(found.unique().tolist()) == {0, 255}


def test_rows_show_image_mask_map_and_what_is_found():
    masks, calibration = (MAPS > 0.9).to(torch.uint8), Calibration()
    without = np.asarray(drawn(IMAGES, masks, MAPS, calibration))
    assert without.shape == (3 * 7 + 2, 3 * 8 + 2, 3)  # two pixels between panels: image, mask, map
    calibration.set(0.5, 0.5, (0.0, 1.0), (0.0, 1.0))
    picture = np.asarray(drawn(IMAGES, masks, MAPS, calibration))
    assert picture.shape == (3 * 7 + 2, 4 * 8 + 2, 3)
    np.testing.assert_array_equal(picture[2:7, 10:16, 0], 255 * masks[0, 0].numpy())
    np.testing.assert_array_equal(picture[9:14, 26:32, 1], 255 * (MAPS[1, 0] >= 0.5).numpy())


def test_heat_of_all_galleries_has_the_colours_of_the_calibration():
    calibration = Calibration()
    shown = np.asarray(drawn(IMAGES, MAPS > 0.9, MAPS, calibration))
    calibration.set(0.5, None, None, (float(MAPS.min()), float(MAPS.max())))
    np.testing.assert_array_equal(np.asarray(drawn(IMAGES, MAPS > 0.9, MAPS, calibration)), shown)
    calibration.set(0.5, None, None, (-1.0, 2.0))
    found = np.asarray(drawn(IMAGES, MAPS > 0.9, MAPS, calibration))[2:7, 18:24]
    np.testing.assert_array_equal(found, heat(IMAGES, (MAPS + 1) / 3)[0].permute(1, 2, 0).numpy())


def test_rows_are_normal_first_and_then_of_every_kind(monkeypatch):
    """Numbers 10 .. 17 whose kinds are mixed, without masks: white where the image is anomalous."""
    kinds = np.full(20, 9)
    kinds[10:18] = [1, -1, 0, -1, 1, 0, -1, 0]
    data = SimpleNamespace(view=lambda split: SimpleNamespace(numbers=np.arange(10, 18)), defect_of=kinds)
    trainer = SimpleNamespace(
        datamodule=data, state=SimpleNamespace(fn=TrainerFn.TESTING), sanity_checking=False, global_step=1
    )
    model, gallery, kept = SimpleNamespace(device="cpu", calibration=Calibration()), AnomalyGallery(4), []
    monkeypatch.setattr(anomaly_pictures, "keep_picture", lambda _, picture, *__: kept.append(np.asarray(picture)))
    gallery.on_test_epoch_start(trainer, model)
    for first in (10, 14):
        index = torch.arange(first, first + 4)
        images = torch.linspace(-1, 1, 20)[index].view(-1, 1, 1, 1).expand(-1, 3, 5, 6)
        batch = {"index": index, "image": images, "label": torch.as_tensor(kinds[index] >= 0).long()}
        gallery.on_test_batch_end(trainer, model, {"map": images[:, :1]}, batch)
    gallery.on_test_epoch_end(trainer, model)
    rows = [kept[0][2 + 7 * i, 2:12:8, 0].tolist() for i in range(4)]  # of image and mask, the first pixel
    numbers = [11, 16, 17, 14]  # of 11 13 16, 12 15 17, 10 14 those at 0, 2, 5, 7
    grey = {number: round((number / 19) * 255) for number in range(20)}
    assert rows == [[grey[n], 255 * (kinds[n] >= 0)] for n in numbers]
