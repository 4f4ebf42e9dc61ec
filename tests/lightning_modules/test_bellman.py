"""Schedules of trained flows: the search, what it keeps, and steps as words."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from penstock.kernels.philox import Draws
from penstock.lightning_modules import bellman, bellman_plots
from penstock.lightning_modules.bellman import folder_of, sampling_grid, schedule, schedules_of, search
from penstock.lightning_modules.bellman_plots import draw_costs, draw_step_sizes
from penstock.lightning_modules.cli import main
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.bellman import cost_matrix, schedules
from penstock.lightning_modules.flow.grids import compressed, uniform
from penstock.lightning_modules.flow.paths import EDM, VP
from penstock.lightning_modules.flow.solvers import RK45, Heun
from penstock.lightning_modules.nets.unet import UNet
from penstock.lightning_modules.rectified_flow import RectifiedFlow
from penstock.lightning_modules.steps import Bellman, parse_steps

ADAM = partial(torch.optim.Adam, lr=1e-3)


def flow_of(num_classes=0, **options):
    torch.manual_seed(0)
    net = UNet((1, 4, 4), width=8, mult=(1,), blocks=1, num_classes=num_classes, dropout=0.5)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.1)
    return RectifiedFlow(net, ADAM, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few steps on digits."""
    folder = tmp_path_factory.mktemp("run")
    patch = pytest.MonkeyPatch()
    patch.setenv("RUN_DIR", str(folder))
    words = ["experiment=rectified_flow_digits", "logger=csv", "model.net.width=8", "trainer.max_epochs=1"]
    words += ["trainer.limit_train_batches=2", "callbacks.metrics=null", "callbacks.samples=null", "callbacks.ema=null"]
    assert main(["fit", *words]) == 0
    patch.undo()
    return folder


@pytest.fixture
def checkpoint(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run" / "checkpoints" / "last.ckpt"


def kept(checkpoint):
    return sorted(folder_of(checkpoint).glob("*"))


# ---------------------------------------------------------------------- steps as words


@pytest.mark.parametrize(
    ("value", "expected"),
    [(8, 8), ("8", 8), ("bellman:8", Bellman(8)), ("bellman:8/50", Bellman(8, 50)), ("bellman:100", Bellman(100))],
)
def test_words(value, expected):
    assert parse_steps(value) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("belman:4", r"steps=belman:4: expected .* \(did you mean 'bellman:4'\?\)"),
        ("bellman:x", "steps=bellman:x: expected a whole number, bellman:K or bellman:K/K_max"),
        ("bellman", r"did you mean 'bellman:4'"),
        ("bellman:0", "found K=0, expected 1 to 100"),
        ("bellman:101", "found K=101, expected 1 to 100"),
        ("bellman:9/8", "found K=9, expected 1 to 8"),
        ("bellman:8/0", r"found K_max=0, expected a grid of K or more \(did you mean 'bellman:8'\?\)"),
        ("bellman:8/-5", "found K_max=-5, expected a grid of K or more"),
        ("many", "steps=many: expected a whole number"),
        (0, "steps=0: expected a whole number of 1 or more"),
        (-2, "steps=-2: expected a whole number of 1 or more"),
    ],
)
def test_other_words_are_refused(value, message):
    with pytest.raises(UserError, match=message):
        parse_steps(value)


# ---------------------------------------------------------------------- the search


@pytest.mark.parametrize("num_classes", [0, 3])
def test_search_follows_the_sampler(num_classes, monkeypatch):
    """Its costs are those of the velocity that `sample` uses, in eval mode, on Philox noise and balanced classes."""
    flow = flow_of(num_classes)
    index = torch.arange(10)
    x = Draws(5, 0, index).normal("bellman", (1, 4, 4))
    cond = index % num_classes if num_classes else None
    flow.eval()
    expected = cost_matrix(compressed(lambda x, t: flow.net(x, t, cond), 1e-3), x, uniform(12))
    flow.train()
    monkeypatch.setitem(bellman.MEMORY, "cpu", 4 * 12 * 16 // 2)
    found = schedules_of(flow, k_max=12, n=10, seed=5)
    torch.testing.assert_close(found.costs, expected, rtol=1e-3, atol=1e-8)
    assert found.path(3) == schedules(expected).path(3)
    assert all(module.training for module in flow.modules())


def test_one_search_serves_all_k_until_the_weights_change(monkeypatch):
    flow, searches, measure = flow_of(), [], bellman.measure
    monkeypatch.setattr(bellman, "measure", lambda *a: searches.append(a[1:]) or measure(*a))
    for k in (1, 3, 8):
        grid = sampling_grid(flow, Bellman(k, 8))
        assert grid[0] == 0
        assert grid[-1] == 1
        assert len(grid) == k + 1
    assert len(searches) == 1
    sampling_grid(flow, Bellman(3, 9))
    assert len(searches) == 2
    with torch.no_grad():
        flow.net.stem.weight += 1e-3
    sampling_grid(flow, Bellman(3, 8))
    assert len(searches) == 3


def test_sample_takes_the_steps_of_the_search():
    flow = flow_of().eval()
    draw = partial(flow.sample, 3)
    with torch.no_grad():
        x = draw(steps="bellman:3/8", generator=torch.Generator().manual_seed(0))
        assert flow.nfe == 3
        grid = sampling_grid(flow, Bellman(3, 8))
        assert torch.equal(x, draw(grid=grid, generator=torch.Generator().manual_seed(0)))
        fine = draw(steps="bellman:8/8", generator=torch.Generator().manual_seed(0))
        assert torch.equal(fine, draw(steps=8, generator=torch.Generator().manual_seed(0)))
    flow.solver = Heun()
    flow.sample(2, steps="bellman:3/8")
    assert flow.nfe == 6


def test_guidance_has_costs_of_its_own():
    flow = flow_of(3)
    plain, guided = (schedules_of(flow, k_max=8, n=6, guidance=g).costs for g in (1.0, 4.0))
    assert not torch.allclose(plain, guided, rtol=0.1)


@pytest.mark.parametrize("path", [VP(), EDM()], ids=["VP", "EDM"])
def test_other_paths(path):
    flow = flow_of(path=path).eval()
    grid = sampling_grid(flow, Bellman(3, 10))
    assert bool((grid.diff() > 0).all())
    assert flow.sample(2, steps="bellman:3/10").isfinite().all()


def test_what_cannot_be_searched():
    with pytest.raises(UserError, match="RK45 chooses its own steps"):
        flow_of(solver=RK45()).sample(1, steps="bellman:3")
    with pytest.raises(UserError, match="Linear has no velocity to search"):
        sampling_grid(nn.Linear(2, 2), Bellman(3))
    flow = flow_of()
    nn.init.constant_(flow.net.head.bias, float("nan"))
    with pytest.raises(UserError, match="not finite"):
        sampling_grid(flow, Bellman(3, 5))


# ---------------------------------------------------------------------- what is kept


def test_schedule_of_a_checkpoint_is_kept_beside_its_run(checkpoint):
    first = schedule(checkpoint, 4, k_max=12, n=6)
    (file,) = kept(checkpoint)
    assert file.parent == checkpoint.parents[1] / "bellman"
    assert len(load_file(file)["costs"]) == 13
    stamp = file.stat().st_mtime_ns
    assert schedule(checkpoint, 4, k_max=12, n=6) == first
    assert len(schedule(str(checkpoint), 7, k_max=12, n=6)) == 8
    assert (kept(checkpoint), file.stat().st_mtime_ns) == ([file], stamp)
    schedule(checkpoint, 4, k_max=12, n=6, seed=1)
    schedule(checkpoint, 4, k_max=12, n=7)
    assert len(kept(checkpoint)) == 3
    assert schedule(checkpoint, 4, k_max=12, uniform=True) == [0, 3, 6, 9, 12]
    assert first[0] == 0
    assert first[-1] == 12
    with pytest.raises(UserError, match="found K=13, expected 1 to 12"):
        schedule(checkpoint, 13, k_max=12)


def test_the_averaged_weights_are_searched(checkpoint):
    state = torch.load(checkpoint, weights_only=True)
    before = search(checkpoint, k_max=6, n=4).costs
    state["current_model_state"] = {k: v + 0.1 for k, v in state["state_dict"].items()}
    torch.save(state, checkpoint)
    assert torch.equal(search(checkpoint, k_max=6, n=4).costs, before)
    assert len(kept(checkpoint)) == 1


def changed(file, **metadata):
    with safe_open(file, "pt") as opened:
        found = opened.metadata() | metadata
    save_file(load_file(file), file, found)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"k_max": "50"}, "costs of another k_max: found 50, expected 12; remove the file to search again"),
        ({"weights": "0"}, "costs of another checkpoint: found 0, expected [0-9a-f]{32}; remove"),
        ({"guidance": "2.0"}, "costs of another guidance: found 2.0, expected 1.0"),
        ({"checksum": "0"}, "damaged, the costs found are not those written"),
    ],
)
def test_a_file_that_belongs_elsewhere(checkpoint, metadata, message):
    schedule(checkpoint, 4, k_max=12, n=6)
    (file,) = kept(checkpoint)
    changed(file, **metadata)
    with pytest.raises(UserError, match=message):
        schedule(checkpoint, 4, k_max=12, n=6)


@pytest.mark.parametrize("size", [0, 5, 300])
def test_a_file_cut_short(checkpoint, size):
    schedule(checkpoint, 4, k_max=12, n=6)
    (file,) = kept(checkpoint)
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match="damaged or no cost matrix") as caught:
        schedule(checkpoint, 4, k_max=12, n=6)
    assert str(file) in str(caught.value)


def test_a_folder_that_cannot_be_written(checkpoint):
    folder_of(checkpoint).write_text("in the way")
    with pytest.warns(UserWarning, match="the search will be repeated"):
        assert len(schedule(checkpoint, 4, k_max=12, n=6)) == 5


# ---------------------------------------------------------------------- the command line


def test_sample_verb(checkpoint, tmp_path, capsys):
    words = [f"ckpt_path={checkpoint}", "n=4", "steps=bellman:3/10"]
    assert main(["sample", *words]) == 0
    assert "3 network calls each" in capsys.readouterr().out
    assert (checkpoint.parents[1] / "samples/sample_bellman_3_10_steps/grid.png").is_file()
    assert len(kept(checkpoint)) == 1


@pytest.mark.parametrize("steps", ["bellman:x", "bellman:0", "bellman:101", "belman:4"])
def test_sample_verb_refuses_in_one_line(checkpoint, steps, capsys):
    assert main(["sample", f"ckpt_path={checkpoint}", f"steps={steps}"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert f"steps={steps}" in line


def test_metrics_and_pictures(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "validated"))
    words = ["experiment=rectified_flow_digits", "logger=csv", "model.net.width=8", f"ckpt_path={checkpoint}"]
    words += ["callbacks.metrics.steps=[2,bellman:2/8,bellman:3/8]", "callbacks.metrics.n=20", "callbacks.ema=null"]
    words += [
        "callbacks.samples.steps=bellman:2/8",
        "callbacks.samples.rows=1",
        "callbacks.metrics.every_n_validations=1",
    ]
    assert main(["validate", *words]) == 0
    found = json.loads((tmp_path / "validated/metrics.json").read_text())
    assert {"fd_pixels/2", "fd_pixels/bellman-2", "fd_pixels/bellman-3", "label_accuracy/bellman-3"} <= found.keys()
    assert (tmp_path / "validated/samples/validate.png").is_file()


@pytest.mark.parametrize("word", ["callbacks.metrics.steps=[4,belman:4]", "callbacks.samples.steps=bellman:x"])
def test_metrics_and_pictures_refuse_in_one_line(word, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "run"))
    assert main(["fit", "experiment=rectified_flow_digits", "logger=csv", word]) == 2
    assert "did you mean 'bellman:4'" in capsys.readouterr().err
    assert not Path(tmp_path / "run").exists()


def test_pictures_of_a_search():
    found = schedules_of(flow_of(), k_max=12, n=4)
    assert draw_costs(found, 4).size == (600, 500)
    assert draw_step_sizes(found).size == (600, 400)
    straight = schedules(torch.zeros(9, 9))
    assert draw_costs(straight, 3).size == (600, 500)
    assert draw_step_sizes(straight, (20,)).size == (600, 400)


@pytest.mark.parametrize("k_max", [1, 4, 10, 17])
def test_indices_of_the_cost_matrix_are_whole_numbers(k_max, monkeypatch):
    figures = []
    monkeypatch.setattr(bellman_plots, "rendered", figures.append)
    draw_costs(schedules(torch.rand(k_max + 1, k_max + 1).triu(2)), 1)
    axes = figures[0].axes[0]
    ticks = [*axes.get_xticks(), *axes.get_yticks()]
    assert ticks == [round(tick) for tick in ticks]
