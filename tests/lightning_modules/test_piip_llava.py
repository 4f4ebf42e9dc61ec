"""PIIP-LLaVA by words: two stages, scores, answers about pictures; what trains in each; refusals."""

import csv
import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers", reason="transformers is not installed (extra llava)")

from safetensors.torch import save_file

from penstock.datamodules.digit_questions import DigitQuestions
from penstock.lightning_modules.answers import exact
from penstock.lightning_modules.build import build, model_from_checkpoint
from penstock.lightning_modules.checkpoints import load_checkpoint
from penstock.lightning_modules.cli import main
from penstock.lightning_modules.cli.compose import compose
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.conversation import IGNORED, with_image
from penstock.lightning_modules.nets.language_model import WordLlama
from penstock.lightning_modules.nets.piip.llava import LlavaNet
from penstock.lightning_modules.nets.piip.llava_tower import llava_tower
from penstock.lightning_modules.piip_llava import PiipLlava
from penstock.lightning_modules.weights.piip_llava import official_state

SMALL = ["data.pictures=32", "data.batch_size=8", "trainer.max_epochs=1", "trainer.check_val_every_n_epoch=1"]
SMALL += ["trainer.log_every_n_steps=1", "logger=csv", "trainer.accelerator=cpu", "model.net.language.depth=1"]
SMALL += ["model.scheduler.total=4", "model.scheduler.warmup=0"]
FIRST, SECOND = "experiment=piip_llava_digits_stage1", "experiment=piip_llava_digits_stage2"


@pytest.fixture(autouse=True)
def no_run_dir(monkeypatch):
    monkeypatch.delenv("RUN_DIR", raising=False)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The run of a first stage."""
    run = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RUN_DIR", raising=False)
        assert main(["fit", FIRST, *SMALL, f"run_dir={run}"]) == 0
        patch.delenv("RUN_DIR", raising=False)
    return run


def made(*words) -> PiipLlava:
    torch.manual_seed(0)
    (model,) = build(compose([SECOND, *SMALL, "teacher=null", *words])[0], "model")
    return model.eval()


def weights(run):
    return load_checkpoint(run / "checkpoints" / "last.ckpt")["state_dict"]


def test_two_stages(first, tmp_path, monkeypatch):
    second = tmp_path / "second"
    assert main(["fit", SECOND, *SMALL, f"teacher={first}", f"run_dir={second}"]) == 0
    own = weights(first)
    torch.manual_seed(0)
    (before,) = build(compose([FIRST, *SMALL, "teacher=null"])[0], "model")
    names = set(before.state_dict())
    gates = {name for name in names if name.endswith("_gate")}
    frozen = {name for name in names if not name.startswith("net.projector.")}
    assert len(gates) == 8
    assert not any(own[name].any() for name in gates)
    then = weights(second)
    assert all(then[name].any() for name in gates)
    moved = {name for name in names if not then[name].equal(own[name])}
    unmoved = {name for name in frozen - moved if "language" in name or "branches" in name}
    assert {name for name in unmoved if not name.endswith("norm_pre.bias")} == set()  # what never learns: nothing
    assert moved > {name for name in names if name.startswith("net.projector.")}

    metrics = json.loads((second / "metrics.json").read_text())
    model = model_from_checkpoint(second / "checkpoints" / "last.ckpt").eval()
    data = DigitQuestions(pictures=32)
    data.setup()
    view = data.view("test")
    batch = data.finished(view.fetch(np.arange(8)))
    with torch.no_grad():
        answers = model.predict_step(batch, 0)["answer"]
        logits, following, _ = model._read(batch)
    assert metrics["accuracy"] == pytest.approx(np.mean([exact(a, b) for a, b in zip(answers, batch["answers"])]))
    assert metrics["test/loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, following)), abs=1e-4)
    right = (logits.argmax(1) == following).float().mean()  # two tokens an answer
    assert metrics["test/token_accuracy"] == pytest.approx(float(right), abs=1e-6)

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    picture = batch["image"][0].permute(1, 2, 0)
    Image.fromarray(((picture + 1) * 127.5).round().byte().numpy()).save(pictures / "a.png")
    Image.new("RGB", (40, 90)).save(pictures / "b.png")
    monkeypatch.delenv("RUN_DIR")
    words = [f"ckpt_path={second}/checkpoints/last.ckpt", f"images={pictures}", f"run_dir={tmp_path / 'p'}"]
    assert main(["predict", *words, "model.question=How many digits are there?"]) == 0
    rows = json.loads((tmp_path / "p" / "predictions" / "answers.json").read_text())
    table = list(csv.DictReader((tmp_path / "p" / "predictions" / "answers.csv").open()))
    assert [row["name"] for row in rows] == [row["name"] for row in table] == ["a.png", "b.png"]
    assert {row["question"] for row in rows} == {"How many digits are there?"}
    asked = batch | {"conversation": [(with_image("How many digits are there?"),)] * 8}
    assert rows[0]["answer"] == table[0]["answer"] == model._answers(asked)[0]


def test_only_the_projector_trains_in_the_first_stage(first):
    torch.manual_seed(0)
    (model,) = build(compose([FIRST, *SMALL])[0], "model")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"net.projector.{name}" for name, _ in model.net.projector.named_parameters()}
    state = load_checkpoint(first / "checkpoints" / "last.ckpt")
    assert len(state["optimizer_states"][0]["state"]) == len(trained) == 12
    assert made().stage == 2
    assert all(parameter.requires_grad for parameter in made().parameters())


def test_official_folders_are_a_start(tmp_path):
    model, other = made(), made()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    state = official_state(other.net.state_dict())
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "model.safetensors")
    model._start(str(tmp_path))
    assert all(a.equal(b) for a, b in zip(model.parameters(), other.parameters()))
    (name, *_) = state
    save_file({name: state[name].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.initial=.*: weights of another model, not of LlavaNet"):
        model._start(str(tmp_path))


def test_what_is_cut_is_said(monkeypatch):
    model = made("model.max_length=50")
    model.trainer = SimpleNamespace(log_every_n_steps=99, global_step=0)
    monkeypatch.setattr(PiipLlava, "global_step", 0)
    talk = (with_image("How many digits are there?"), "one", "What digit is shown?", "two")
    batch = {"image": torch.zeros(2, 3, 64, 64), "index": torch.tensor([7, 9]), "conversation": [talk[:2], talk]}
    with pytest.warns(UserWarning, match=r"max_length: conversation 9 has 58 tokens .* after 50 are left out"):
        loss = model.training_step(batch, 0)
    _, following, read = model._read(batch)
    assert read.embedded.shape[1] == 50
    assert len(following) == (read.labels != IGNORED).sum() == 4
    assert torch.isfinite(loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.training_step(batch, 0)


def test_pictures_of_any_shape_become_squares():
    model = made()
    image = torch.full((1, 3, 30, 60), 0.9)
    square = model._square(image)
    assert square.shape == (1, 3, 64, 64)
    torch.testing.assert_close(square[:, :, 20:44], torch.full((1, 3, 24, 64), 0.9), rtol=0, atol=2e-2)
    grey = (2 * model.mean - 1)[None].expand(1, 3, 12, 64)
    torch.testing.assert_close(square[:, :, :12], grey, rtol=0, atol=1e-5)
    torch.testing.assert_close(model._normed(grey), torch.zeros(1, 3, 12, 64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.max_length=0"], "model.max_length: found 0, expected at least 1"),
        (["model.max_length=3"], "model.max_length: found 3, expected more than the 4 tokens of an image"),
        (["image_size=96"], "image_size: found images of 96x96 pixels, expected 64x64"),
        (["model.net.language.words=what"], "model.net.language: its vocabulary has no 'Wh"),
        (["model.initial=nowhere.ckpt"], "no such file"),
    ],
)
def test_refusals(words, message, tmp_path, capsys):
    code = main(["fit", SECOND, *SMALL, "teacher=null", *words, f"run_dir={tmp_path / 'run'}"])
    err = capsys.readouterr().err.strip().splitlines()
    assert code == 2
    assert message in err[-1]


def test_costs_are_those_of_the_tower():
    with torch.device("meta"):
        net = LlavaNet(llava_tower("clip_bl_512_256", ["random"] * 2), WordLlama("a", dim=64, depth=1, heads=2))
        found = PiipLlava(net, torch.optim.AdamW).eval().costs()
    assert found.published == 193
    assert sum(part.operations for part in found.parts.values()) / 193e9 == pytest.approx(1, abs=0.005)
    assert sum(part.parameters for part in found.parts.values()) == sum(p.numel() for p in net.tower.parameters())


def test_questions_without_answers_are_not_scored():
    batch = {"answers": [("one",), ()]}
    with pytest.raises(UserError, match="found questions without answers, which can be predicted but not scored"):
        made().test_step(batch, 0)
