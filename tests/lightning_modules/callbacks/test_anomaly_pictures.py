"""Heat maps, masks above a threshold, and the rows of the gallery."""

import numpy as np
import torch
from matplotlib import colormaps

from penstock.lightning_modules.calibration import Calibration
from penstock.lightning_modules.callbacks.anomaly_pictures import above, drawn, heat

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
