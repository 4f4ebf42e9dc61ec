"""Pairs made for prompts: what batches hold, whose prompts, what the folder remembers, refusals."""

import json

import pytest
import torch

from penstock.datamodules.digits import Digits
from penstock.datamodules.image_text import ImageText
from penstock.datamodules.prompted_pairs import PromptedPairs
from penstock.lightning_modules.build import model_from_checkpoint
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.solvers import DPMSolverPP2M

SMALL = {"n": 60, "steps": 3, "pairs_batch": 10, "shard": 20, "batch_size": 8, "val_fraction": 0.2, "guidance": 2.0}


def ready(teacher, real=None, **options):
    data = PromptedPairs(real or ImageText(), str(teacher), solver=DPMSolverPP2M(), **(SMALL | options))
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture(scope="module")
def prompted(make_teacher):
    return make_teacher("model.net.width=8", experiment="rectified_flow_digits_text")


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_hold_pairs_and_the_prompts_they_were_made_for(prompted, workers):
    data = ready(prompted, num_workers=workers)
    batch = next(iter(data.train_dataloader()))
    assert {k: len(v) for k, v in batch.items()} == dict.fromkeys(("source", "image", "index", "text"), 8)
    assert batch["text"] == data.real.texts(batch["index"])
    model = model_from_checkpoint(prompted)
    with torch.no_grad():
        options = {"cond": batch["text"], "guidance": 2.0, "solver": DPMSolverPP2M()}
        expected = model.integrate(batch["source"], 3, **options).x
    torch.testing.assert_close(batch["image"], expected)
    other = model.integrate(batch["source"], 3, **(options | {"cond": ["something else"] * 8})).x
    assert not torch.allclose(batch["image"], other)
    assert data.shape == (1, 8, 8)
    assert data.prompts(3)[0] == data.real.prompts(3)[0]


def test_pairs_made_online_have_prompts(prompted, attach):
    data = attach(ready(prompted, online=True))
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    assert batch["text"] == data.real.texts(batch["index"])
    assert set(batch) == {"source", "image", "index", "text"}
    assert "text" in next(iter(data.reference_dataloader("train")))


def test_a_folder_remembers_its_prompts(prompted, tmp_path):
    folder = tmp_path / "pairs"
    fingerprint = ready(prompted, folder=str(folder)).fingerprint
    assert ready(prompted, folder=str(folder)).fingerprint == fingerprint
    assert "prompts" in json.loads((folder / "pairs.json").read_text())
    with pytest.raises(UserError, match=r"pairs .*: made with prompts=\w+, expected prompts=\w+"):
        ready(prompted, real=ImageText(val_fraction=0.2), folder=str(folder))


def test_data_and_teachers_without_prompts_are_refused(prompted, teacher):
    with pytest.raises(UserError, match=r"data\.real: found Digits, expected ImageText"):
        ready(prompted, real=Digits())
    with pytest.raises(UserError, match=r"RectifiedFlow takes no prompts, expected an InstaFlow"):
        ready(teacher)
