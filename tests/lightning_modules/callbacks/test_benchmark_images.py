"""Pictures of benchmarks: layouts, the same for any batch and number of ranks, resume, what is refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from lightning.pytorch import LightningModule
from PIL import Image

from penstock.datamodules.prompts import BenchmarkPrompts
from penstock.kernels.philox import Draws
from penstock.lightning_modules.build import model_from_checkpoint
from penstock.lightning_modules.callbacks.benchmark_images import BenchmarkImages
from penstock.lightning_modules.callbacks.benchmark_layouts import is_whole
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.seeds import run_seed

FORMS = ("lines", "dpg")
TEXTS = ["a bench", "two clocks", "a cow"]


class Painter(LightningModule):
    """An image whose levels depend on the noise of the sample, the length of the prompt and the steps."""

    takes_text, predict_steps = True, 3

    def __init__(self, size=(6, 6), channels=3, fails_after=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.5))
        self.shape, self.fails_after = (channels, *size), fails_after
        self.nfe, self.drawn = 0, []

    def predict_step(self, batch, batch_idx):
        if batch_idx == self.fails_after:
            raise RuntimeError("killed")
        self.nfe = self.predict_steps
        self.drawn += batch["index"].tolist()
        noise = Draws(run_seed(), 0, batch["index"]).normal("predict", self.shape)
        length = torch.tensor([len(text) for text in batch["text"]]).view(-1, 1, 1, 1)
        return {"index": batch["index"], "image": self.weight * noise + length / 20 - 0.4 + 0.01 * self.predict_steps}


def draw(fakes, run, module=None, form="lines", folder=None, steps=None, devices=1, **options):
    module = module or Painter()
    run.mkdir(exist_ok=True)
    path = run / "prompts.txt"
    path.write_text("\n".join(TEXTS))
    if form == "dpg":
        path = run / "prompts"
        path.mkdir(exist_ok=True)
        for name, text in zip(("7", "12", "COCO3"), TEXTS):
            (path / f"{name}.txt").write_text(text)
    data = BenchmarkPrompts(form, str(path), **{"batch_size": 5} | options)
    trainer = fakes.quiet_trainer(
        run, [BenchmarkImages(folder, steps)], devices=devices, strategy="ddp" if devices > 1 else "auto"
    )
    assert trainer.predict(module, datamodule=data) is None
    return module


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def levels(path):
    return np.asarray(Image.open(path))


def test_folders_of_geneval(fakes, tmp_path):
    draw(fakes, tmp_path / "run")
    folder = tmp_path / "run" / "lines"
    samples = [f"0000{p}/samples/000{s}.png" for p in range(3) for s in range(4)]
    assert set(files(folder)) == {*samples, *(f"0000{p}/metadata.jsonl" for p in range(3))}
    assert [json.loads(p.read_text()) for p in sorted(folder.rglob("*.jsonl"))] == [{"prompt": t} for t in TEXTS]
    noise = Draws(0, 0, torch.tensor([6])).normal("predict", (3, 6, 6))
    expected = ((0.5 * noise[0] + len(TEXTS[1]) / 20 - 0.37).clamp(-1, 1) + 1) * 127.5
    assert (levels(folder / samples[6]) == expected.round().byte().permute(1, 2, 0).numpy()).all()


def test_grids_of_dpg_hold_the_samples_rows_first(fakes, tmp_path):
    draw(fakes, tmp_path / "one", form="dpg", samples_per_prompt=1)
    draw(fakes, tmp_path / "four", form="dpg")
    assert set(files(tmp_path / "four" / "dpg")) == {"12.png", "7.png", "COCO3.png"}
    assert levels(tmp_path / "one" / "dpg" / "7.png").shape == (6, 6, 3)
    assert not list(tmp_path.rglob("dpg.samples"))
    noise = Draws(0, 0, torch.arange(4, 8)).normal("predict", (3, 6, 6))  # "7" stands after "12"
    expected = (((0.5 * noise + len(TEXTS[0]) / 20 - 0.37).clamp(-1, 1) + 1) * 127.5).round().byte()
    top, bottom = (torch.cat((expected[a], expected[a + 1]), 2) for a in (0, 2))
    grid = torch.cat((top, bottom), 1).permute(1, 2, 0).numpy()
    assert (levels(tmp_path / "four" / "dpg" / "7.png") == grid).all()


@pytest.mark.parametrize("form", FORMS)
def test_batches_change_nothing_and_a_killed_run_goes_on(form, fakes, tmp_path):
    draw(fakes, tmp_path / "whole", form=form, batch_size=12)
    whole = files(tmp_path / "whole" / form)
    with pytest.raises(RuntimeError, match="killed"):
        draw(fakes, tmp_path / "run", Painter(fails_after=1), form)
    folder = tmp_path / "run" / form
    folder.mkdir(exist_ok=True)
    (folder / ".7.png.1.part").write_bytes(b"half")
    again = draw(fakes, tmp_path / "run", form=form, batch_size=3)
    assert again.drawn == list(range(5, 12))
    assert files(folder) == whole
    cut = next(folder.rglob("*.png"))
    cut.write_bytes(cut.read_bytes()[:-3])
    assert not is_whole(cut)
    assert len(draw(fakes, tmp_path / "run", form=form).drawn) == (1 if form == "lines" else 4)
    assert files(folder) == whole
    assert draw(fakes, tmp_path / "run", form=form).drawn == [0]
    assert files(folder) == whole


def test_a_folder_of_another_run_is_refused(fakes, tmp_path, monkeypatch):
    run = tmp_path / "run"
    draw(fakes, run, steps=2)
    manifest = json.loads((run / "lines.json").read_text())
    assert manifest.keys() == {*("model", "weights", "seed", "prompts", "precision", "checkpoint", "network_calls")}
    assert (manifest["seed"], manifest["network_calls"]) == (0, 2)
    before = files(run)
    with pytest.raises(
        UserError, match=r"lines: holds pictures of network_calls=2, here 3; expected the same, or anot"
    ):
        draw(fakes, run)
    other = Painter()
    torch.nn.init.zeros_(other.weight)
    with pytest.raises(UserError, match="holds pictures of another checkpoint"):
        draw(fakes, run, other, steps=2)
    with pytest.raises(UserError, match="holds pictures of other prompts"):
        draw(fakes, run, steps=2, limit=2)
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    with pytest.raises(UserError, match="holds pictures of seed=0, here 5"):
        draw(fakes, run, steps=2)
    assert files(run) == before
    (run / "lines.json").write_text("{")
    with pytest.raises(UserError, match=r"lines\.json: cannot be read"):
        draw(fakes, run)
    (run / "lines.json").write_text("{}")
    with pytest.raises(UserError, match=r"lines\.json: no weights in it"):
        draw(fakes, run)
    (run / "lines.json").unlink()
    with pytest.raises(UserError, match=r"lines: pictures, but no lines\.json beside it"):
        draw(fakes, run)
    draw(fakes, run, folder=str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "00002" / "samples" / "0003.png").is_file()


def test_what_cannot_be_drawn_is_refused(fakes, tmp_path):
    nan = Painter()
    torch.nn.init.constant_(nan.weight, torch.nan)
    with pytest.raises(UserError, match="prompt '00000', sample 0: NaN or infinite numbers in the image"):
        draw(fakes, tmp_path / "nan", nan)
    with pytest.raises(UserError, match="cuts its grids into squares: found samples of 8 x 6 pixels"):
        draw(fakes, tmp_path / "wide", Painter((6, 8)), "dpg")
    with pytest.raises(UserError, match=r"data\.samples_per_prompt: found 3, expected 4 \(or 1\)"):
        draw(fakes, tmp_path / "three", form="dpg", samples_per_prompt=3)
    with pytest.raises(UserError, match="steps 0, expected at least 1"):
        draw(fakes, tmp_path / "steps", steps=0)
    plain = Painter()
    plain.takes_text = False
    with pytest.raises(UserError, match="Painter takes no prompts"):
        draw(fakes, tmp_path / "plain", plain)
    data = fakes.digits_module_and_data()[1]
    data.predict_dataloader = data.val_dataloader
    with pytest.raises(UserError, match="the data is FakeData, expected data=geneval"):
        fakes.quiet_trainer(tmp_path, [BenchmarkImages()]).predict(Painter(), datamodule=data)


def test_grey_images_become_rgb(fakes, tmp_path):
    draw(fakes, tmp_path / "run", Painter(channels=1))
    seen = levels(tmp_path / "run" / "lines" / "00000" / "samples" / "0000.png")
    assert seen.shape == (6, 6, 3)
    assert (seen == seen[..., :1]).all()


def test_a_text_conditional_flow_draws_for_its_prompts(fakes, tmp_path):
    import teachers

    words = ("model.net.width=8", "model.net.blocks=1")
    flow = model_from_checkpoint(teachers.shared("rectified_flow_digits_text", *words))
    draw(fakes, tmp_path / "run", flow, shape=[1, 8, 8], limit=2, samples_per_prompt=2)
    assert json.loads((tmp_path / "run" / "lines.json").read_text())["network_calls"] == flow.nfe
    x0 = Draws(0, 0, torch.tensor([3])).normal("predict", (1, 8, 8))
    with torch.no_grad():
        image = flow.integrate(x0, 25, cond=[TEXTS[1]]).x
    expected = ((image.clamp(-1, 1) + 1) * 127.5).round()[0, 0].numpy()
    seen = levels(tmp_path / "run" / "lines" / "00001" / "samples" / "0001.png")[..., 0]
    assert np.abs(seen - expected).max() <= 1
    with pytest.raises(UserError, match=r"model\.net\.shape: found \(1, 8, 8\), expected \(3, 8, 8\)"):
        draw(fakes, tmp_path / "other", flow, shape=[3, 8, 8])


@pytest.mark.slow
def test_two_ranks_write_the_files_of_one(fakes, tmp_path):
    """One process for each rank, which this file is too."""
    with ranks.running(__file__, tmp_path / "two"):
        for form in FORMS:
            draw(fakes, tmp_path / "one", form=form)
    for form in FORMS:
        assert files(tmp_path / "two" / form) == files(tmp_path / "one" / form)


if __name__ == "__main__":
    import fakes as own

    for each in FORMS:
        draw(own, Path(sys.argv[1]), form=each, batch_size=8, devices=2)
