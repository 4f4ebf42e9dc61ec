"""A run that trains on all there is ends without a test, and says so."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from penstock.lightning_modules.cli import main
from penstock.lightning_modules.cli.lab import holds_out


def test_a_test_or_a_validation_split_will_do():
    some, none = np.arange(2), np.arange(0)
    for numbers in ({"train": some, "test": some}, {"train": some, "val": some, "test": none}, {}):
        assert holds_out(SimpleNamespace(numbers=numbers))
    assert holds_out(SimpleNamespace())
    assert holds_out(None)
    with pytest.warns(UserWarning, match=r"holds nothing out of training \(data\.val_fraction=0\): no test"):
        assert not holds_out(SimpleNamespace(numbers={"train": some, "val": none, "test": none}))


@pytest.mark.slow
def test_a_video_model_overfits_clips_of_a_folder(tmp_path, monkeypatch):
    frames = [Image.new("L", (8, 8), 60 * k) for k in range(2)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "run"))
    words = ["model=starflow_v", "net=starflow", "data=video", f"data.data_dir={tmp_path}", "data.val_fraction=0"]
    words += ["frames=2", "image_size=8", "data.multiple=8", "data.batch_size=1", "callbacks=base", "logger=csv"]
    words += ["model.net.dim=32", "model.net.depths=[1,1]", "model.net.patch=4", "model.net.head_dim=32"]
    with pytest.warns(UserWarning, match="no test"):
        assert main(["fit", *words, "trainer.max_steps=2", "trainer.max_epochs=-1", "trainer.accelerator=cpu"]) == 0
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    assert "test/loss" not in json.loads((tmp_path / "run" / "metrics.json").read_text())
