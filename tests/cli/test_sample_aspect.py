"""`penstock sample aspect=W:H`: samples of another shape, whose prompts say so."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from penstock.lightning_modules.build import config_of_checkpoint, model_from_checkpoint
from penstock.lightning_modules.cli import main
from penstock.lightning_modules.cli.sample import at_aspect
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.text_encoder import HashedText

TEMPLATE = "penstock.lightning_modules.nets.prompt_template.Template"


class Heard(HashedText):
    """Keeps what it is given."""

    texts: list[str] = []  # noqa: RUF012

    def __call__(self, texts, device="cpu"):
        self.texts.extend(texts)
        return super().__call__(texts, device)


@pytest.fixture
def checkpoint(make_teacher, monkeypatch):
    """Of clips of 16x16 in patches of 4x4."""
    monkeypatch.setitem(sys.modules, "own", SimpleNamespace(Heard=Heard))
    monkeypatch.setattr(Heard, "texts", [])
    words = ["frames=2", "data.short.frames=1", "model.net.dim=32", "model.net.depths=[1,1]", "model.net.patch=4"]
    words += ["model.denoiser.channels=16", "model.denoiser.dim=32", "model.denoiser.head_dim=32"]
    words += ["model.denoiser.depth=1", "~model.text.length", f"model.text.class_path={TEMPLATE}"]
    words += ["model.text.text={class_path: own.Heard, dim: 32}", "model.text.fps=8", "model.text.aspect=own"]
    return make_teacher(*words, experiment="starflow_v_moving_digits")


def test_samples_have_the_aspect_and_prompts_say_so(checkpoint, tmp_path):
    words = [f"ckpt_path={checkpoint}", "n=2", "steps=4", "seed=3", "prompt=a seven", "guidance=1", f"out={tmp_path}/o"]
    assert main(["sample", *words, "aspect=16:9"]) == 0
    template = "A video with 8 fps:\n{}\n\n in a 16:9 aspect ratio.\n"
    assert set(Heard.texts) == {template.format("a seven"), template.format("")}
    found = load_file(tmp_path / "o" / "samples.safetensors")["samples"]
    assert found.shape == (2, 2, 1, 12, 20)
    assert json.loads((tmp_path / "o" / "report.json").read_text())["aspect"] == "16:9"
    net = config_of_checkpoint(checkpoint)["model"]["init_args"]["net"]
    net["init_args"]["shape"] = [2, 1, 12, 20]
    model = model_from_checkpoint(checkpoint, net=net)
    with torch.inference_mode():
        drawn = model.sample(2, steps=4, prompt="a seven", guidance=1.0, generator=torch.Generator().manual_seed(3))
    assert torch.equal(found, drawn)


def test_the_folder_tells_the_aspect_and_a_prompt_of_one_aspect_gets_the_asked_one(checkpoint):
    assert main(["sample", f"ckpt_path={checkpoint}", "n=1", "steps=1", "aspect=9:16"]) == 0
    assert (checkpoint.parents[1] / "samples" / "sample_1_steps_aspect_9_16" / "grid.gif").is_file()
    args = {"net": {"class_path": "x"}, "text": {"class_path": TEMPLATE, "init_args": {"fps": 8, "aspect": "4:3"}}}
    changed = at_aspect("9:16", args)
    assert changed["text"] == {"class_path": TEMPLATE, "init_args": {"fps": 8, "aspect": "9:16"}}
    assert args["text"]["init_args"]["aspect"] == "4:3"
    args["text"]["init_args"]["aspect"] = None
    assert at_aspect("9:16", args)["text"] == args["text"]


def test_what_cannot_be_ends_in_one_line(checkpoint, teacher, capsys):
    for path, aspect, line in (
        (checkpoint, "16/9", "aspect=16/9: expected one of 21:9, "),
        (checkpoint, "5:4", "aspect=5:4: 16x16 becomes 16x16 in patches of 4x4, which is nearer to 1:1; expected one"),
        (teacher, "16:9", "aspect=16:9: UNet has samples of its own shape only, expected a STARFlow"),
    ):
        assert main(["sample", f"ckpt_path={path}", f"aspect={aspect}"]) == 2
        assert capsys.readouterr().err.startswith(f"penstock: {line}")
    with pytest.raises(UserError, match="the model has no network whose samples could have another shape"):
        at_aspect("16:9", {})
