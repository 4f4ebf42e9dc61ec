import numpy as np
import pytest
import torch
from PIL import Image

from penstock.lightning_modules.callbacks.samples import SampleGrid, draw
from penstock.lightning_modules.errors import UserError


def test_pictures_of_a_fit_show_the_same_noise(fakes, tmp_path):
    module, data = fakes.digits_module_and_data()
    module.configure_optimizers = lambda: torch.optim.SGD([module.weight], lr=0.0)
    trainer = fakes.quiet_trainer(tmp_path, [SampleGrid(rows=3, steps=9)], max_epochs=2)
    trainer.fit(module, datamodule=data)
    first, second = (tmp_path / "samples" / f"step_{step:06d}.png" for step in (8, 16))
    assert sorted((tmp_path / "samples").iterdir()) == [first, second]
    assert first.read_bytes() == second.read_bytes()
    assert Image.open(first).size == (10 * 66 + 2, 3 * 66 + 2)
    trainer.test(module, datamodule=data, verbose=False)
    assert (tmp_path / "samples" / "test.png").is_file()


def test_one_class_in_each_column(fakes, tmp_path):
    module, data = fakes.digits_module_and_data(scale=0.0)
    means = torch.stack([module.memory[module.labels == c].mean(0)[0] for c in range(10)])
    trainer = fakes.quiet_trainer(tmp_path, [SampleGrid(rows=6, cols=10)])
    trainer.validate(module, datamodule=data, verbose=False)
    grid = np.asarray(Image.open(tmp_path / "samples" / "validate.png").convert("L")) / 127.5 - 1
    right = 0
    for column in range(10):
        tiles = [grid[2 + r * 66 :, 2 + column * 66 :][:64:8, :64:8] for r in range(6)]
        nearest = torch.cdist(torch.tensor(np.stack(tiles)).flatten(1).float(), means.flatten(1)).argmin(1)
        right += int((nearest == column).sum())
    assert right >= 50


def test_pixels_are_enlarged_without_smoothing():
    image = torch.tensor([[-1.0, 1.0], [0.0, -1.0]]).view(1, 1, 2, 2)
    pixels = np.asarray(draw(image.repeat(2, 1, 1, 1), 2, None))[2:66, 2:66, 0]
    assert pixels.shape == (64, 64)
    assert np.array_equal(pixels, np.array([[0, 255], [128, 0]]).repeat(32, 0).repeat(32, 1))


def test_a_video_is_a_row_and_large_images_keep_their_size():
    video = torch.zeros(3, 5, 3, 64, 64)
    assert draw(video, 10, None).size == (5 * 66 + 2, 3 * 66 + 2)
    assert draw(torch.zeros(2, 3, 100, 80), 2, None).size == (2 * 82 + 2, 100 + 4)


def test_points_are_scattered_in_the_colours_of_their_classes():
    points = torch.tensor([[-1.0, -1.0]] * 20 + [[1.0, 1.0]] * 20)
    plain = np.asarray(draw(points, 1, None)).reshape(-1, 3)
    coloured = np.asarray(draw(points, 1, torch.arange(40) // 20)).reshape(-1, 3)
    assert plain.shape == (500 * 500, 3)

    def hues(pixels):
        return {tuple(p) for p in pixels if int(p.max()) - int(p.min()) > 100}

    assert len(hues(coloured)) > len(hues(plain)) > 0


def test_other_shapes_are_refused():
    with pytest.raises(UserError, match=r"samples of shape \(7,\)"):
        draw(torch.zeros(2, 7), 1, None)
    with pytest.raises(UserError, match="rows: 0 given"):
        SampleGrid(rows=0)


def test_loggers_that_take_pictures_get_them(fakes, tmp_path):
    pytest.importorskip("tensorboard")
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Recorder(CSVLogger):
        pictures = ()

        def log_image(self, key, images, step=None):
            self.pictures = [(key, images[0].size, step)]

    module, data = fakes.digits_module_and_data()
    loggers = [TensorBoardLogger(tmp_path, name="tb"), Recorder(tmp_path, name="a"), CSVLogger(tmp_path, name="b")]
    fakes.quiet_trainer(tmp_path, [SampleGrid(rows=1)], logger=loggers).fit(module, datamodule=data)
    events = EventAccumulator(loggers[0].log_dir)
    events.Reload()
    assert [event.step for event in events.Images("samples")] == [8]
    assert loggers[1].pictures == [("samples", (662, 68), 8)]
