"""One seed, one run: equal with the same seed, different with another, and known from the saved configuration."""

import harness
import pytest
import torch
import yaml
from methods import mostly_slow, words


@pytest.fixture(scope="module", params=mostly_slow("rectified_flow_digits", "rectified_flow_ot"))
def runs(request, tmp_path_factory):
    """Runs of one epoch: twice the seed 3, once the seed 4."""
    folder = tmp_path_factory.mktemp("seeds")
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        short = ["trainer.max_epochs=1", f"seed_everything={seed}"]
        assert harness.penstock("fit", *words(request.param), *short, run=folder / name).code == 0
    return folder


def test_the_same_seed_gives_the_same_bits(runs):
    harness.same_state(runs / "a", runs / "b")
    assert harness.metrics(runs / "a") == harness.metrics(runs / "b")


def test_another_seed_gives_another_run(runs):
    one, other = harness.state(runs / "a"), harness.state(runs / "c")
    trained = len(
        {tuple(key.split("/")[2:5]) for key in one if key.startswith("/optimizer_states/") and "/state/" in key}
    )
    assert trained > 5
    for part in {"state_dict", "current_model_state"} & {key.split("/")[1] for key in one}:
        weights = [key for key, value in one.items() if key.startswith(f"/{part}/") and value.is_floating_point()]
        weights = [key for key in weights if "lora_" in key] or weights
        changed = [key for key in weights if one[key].any() and not torch.equal(one[key], other[key])]
        assert len(changed) > trained / 2
    assert harness.metrics(runs / "a")[0]["train/loss"] != harness.metrics(runs / "c")[0]["train/loss"]


def test_the_saved_seed_is_a_number(runs):
    config = yaml.safe_load((runs / "c" / "config.yaml").read_text())
    assert type(config["seed_everything"]) is int
    assert config["seed_everything"] == 4


def test_dropout_follows_the_seed(tmp_path):
    masks = []
    for seed in (3, 4):
        out = tmp_path / f"masks{seed}"
        fault = f"+callbacks.masks={{class_path: faults.DropoutMasks, out: '{out}'}}"
        more = [fault, f"seed_everything={seed}", "trainer.max_epochs=1"]
        assert harness.penstock("fit", *words("rectified_flow_digits"), *more, run=tmp_path / str(seed)).code == 0
        masks.append((out / "0.json").read_text())
    assert masks[0] != masks[1]
