"""Distance of translated clips from what the data make of the same sources; pictures and metrics get the sources."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from PIL import Image

from penstock.datamodules.edited_digits import EditedDigits
from penstock.datamodules.moving_digits import MovingDigits
from penstock.datamodules.video import Video
from penstock.lightning_modules.callbacks.generation import GenerationMetrics
from penstock.lightning_modules.callbacks.samples import SampleGrid
from penstock.lightning_modules.callbacks.translation import TranslationError
from penstock.lightning_modules.errors import UserError


class Mirrors(LightningModule):
    """Whatever it is asked for, it mirrors the source, and adds something."""

    num_classes, takes_text, nfe = 0, True, 3

    def __init__(self, more=0.0):
        super().__init__()
        self.more, self.seen = more, []

    def sample(self, n, *, steps=None, cond=None, generator=None, source=None):
        self.seen.append((cond, source))
        return source.flip(-1) + self.more

    def test_step(self, batch, batch_idx):
        pass


def digits(edits):
    return EditedDigits(MovingDigits(frames=3, n_train=40, n_val=5, n_test=10, batch_size=5, seed=1), edits)


def scored(fakes, folder, module, data, *more):
    metrics = GenerationMetrics([TranslationError()], steps=[2], n=14, chunk=6)
    return fakes.quiet_trainer(folder, [metrics, *more]).test(module, datamodule=data, verbose=False)[0]


def test_nothing_is_wrong_with_what_the_data_make_themselves(fakes, tmp_path):
    data = digits(["mirror"])
    found = scored(fakes, tmp_path, Mirrors(), data)
    assert found["translation_mse/3"] == 0
    source, video = (data.finished(data.store.fetch(data.numbers["test"]))[key] for key in ("source", "video"))
    apart = (source - video).square().flatten(1).mean(1)
    expected = (apart.sum() + apart[:4].sum()) / 14
    assert found["translation_mse/source"] == pytest.approx(float(expected), rel=1e-5)


def test_what_is_off_counts_squared(fakes, tmp_path):
    assert scored(fakes, tmp_path, Mirrors(), digits(["reverse"]))["translation_mse/3"] > 0.05
    data = digits(["mirror"])
    found = scored(fakes, tmp_path, Mirrors(0.5), data)
    video = data.finished(data.store.fetch(data.numbers["test"][np.arange(14) % 10]))["video"]
    expected = (1 - video).clamp(max=0.5).square().mean()
    assert found["translation_mse/3"] == pytest.approx(float(expected), rel=1e-5)


def test_pictures_are_of_the_first_sources(fakes, tmp_path):
    module, data = Mirrors(), digits(None)
    scored(fakes, tmp_path, module, data, SampleGrid(rows=1, cols=2))
    captions, sources = module.seen[-1]
    assert captions == data.prompts(2, "all")[0]
    assert torch.equal(sources.cpu(), data.sources(torch.arange(2), "all"))


def test_sources_of_files_have_the_shape_of_the_first_aspect(tmp_path):
    for name, size in (("wide", (32, 16)), ("square", (16, 16)), ("from", (32, 16))):
        frames = [Image.new("L", size, 60 * k) for k in range(2)]
        frames[0].save(tmp_path / f"{name}.gif", save_all=True, append_images=frames[1:])
    rows = [{"file": f"{name}.gif", "text": name, "source": "from.gif"} for name in ("wide", "square")]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {"frames": 2, "size": 16, "multiple": 4, "aspects": ["1:1", "16:9"], "val_fraction": 0.0}
    data = Video(manifest=str(tmp_path / "list.jsonl"), **options)
    data.setup()
    assert data.sources(torch.arange(3), "train").shape == (3, 2, 3, 16, 16)


def test_data_without_sources_are_refused():
    with pytest.raises(UserError, match="translation_mse: MovingDigits has no sources, expected data of pairs"):
        TranslationError().check(SimpleNamespace(datamodule=MovingDigits()), None)
