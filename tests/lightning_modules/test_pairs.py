"""Pairs of a teacher: against its own sampler, resumed, on two ranks, and what may be wrong with a folder."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

from penstock.kernels.philox import Draws
from penstock.lightning_modules import pairs
from penstock.lightning_modules.build import model_from_checkpoint
from penstock.lightning_modules.cli import main
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.grids import uniform
from penstock.lightning_modules.flow.solvers import RK45, Heun
from penstock.lightning_modules.pairs import PairMaker, Recipe, default_folder, write_pairs


def recipe(**changes):
    return Recipe(**{"n": 25, "steps": 3, "batch": 5, "shard": 10} | changes)


def content(folder):
    return {p.name: load_file(p) for p in sorted(folder.glob("shard_*"))}


def whole(folder):
    shards = list(content(folder).values())
    return {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n][k], b[n][k]) for n in a for k in a[n])


@pytest.mark.parametrize("solver", [None, Heun(), RK45()])
def test_pairs_are_what_the_teacher_samples(teacher, tmp_path, solver):
    maker = PairMaker(teacher, recipe(solver=solver, guidance=2.0))
    write_pairs(maker, tmp_path)
    found, model, index = whole(tmp_path), model_from_checkpoint(teacher), torch.arange(25)
    assert {k: tuple(v.shape) for k, v in found.items()} == {
        "source": (25, 1, 8, 8),
        "image": (25, 1, 8, 8),
        "label": (25,),
    }
    assert torch.equal(found["source"], Draws(0, 0, index).normal("pairs", (1, 8, 8)))
    assert torch.equal(found["label"], index % 10)
    if solver is not None:
        model.solver = solver
    rows = slice(5, 10)
    with torch.no_grad():
        expected = model.decode(found["source"][rows], steps=3, cond=found["label"][rows], guidance=2.0)
    assert torch.equal(found["image"][rows], expected)


def test_average_weights_make_them(teacher):
    maker = PairMaker(teacher, recipe())
    saved = torch.load(teacher, weights_only=True)["state_dict"]
    assert all(torch.equal(saved[k], v) for k, v in maker.model.state_dict().items())


def test_kept_states_lie_on_the_trajectory(teacher, tmp_path):
    maker = PairMaker(teacher, recipe(n=5, steps=6, keep=(0, 2, 3, 6)))
    write_pairs(maker, tmp_path)
    found, grid = whole(tmp_path), uniform(6)
    assert found["states"].shape == (5, 4, 1, 8, 8)
    with torch.no_grad():
        path = maker.model.integrate(found["states"][:, 0], 6, cond=found["label"], trajectory=True).trajectory
    torch.testing.assert_close(found["states"], path[[0, 2, 3, 6]].transpose(0, 1))
    assert json.loads((tmp_path / "pairs.json").read_text())["times"] == grid[[0, 2, 3, 6]].tolist()


def test_rows_do_not_depend_on_how_many_or_on_the_files(teacher, tmp_path):
    write_pairs(PairMaker(teacher, recipe()), tmp_path / "a")
    write_pairs(PairMaker(teacher, recipe(n=17, shard=5)), tmp_path / "b")
    a, b = whole(tmp_path / "a"), whole(tmp_path / "b")
    assert all(torch.equal(a[key][:17], b[key]) for key in a)


def test_two_ranks_make_the_same_files(teacher, tmp_path):
    write_pairs(PairMaker(teacher, recipe()), tmp_path / "one")
    meet = threading.Barrier(2)

    def rank(number):
        maker = PairMaker(teacher, recipe())
        return write_pairs(maker, tmp_path / "two", rank=number, world=2, barrier=meet.wait)

    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(rank, (0, 1)))
    assert same(content(tmp_path / "one"), content(tmp_path / "two"))
    assert made == [15, 10]


def test_two_runs_at_once_make_each_pair_once(teacher, tmp_path):
    with ThreadPoolExecutor(2) as pool:
        makers = [PairMaker(teacher, recipe()) for _ in range(2)]
        made = list(pool.map(lambda maker: write_pairs(maker, tmp_path / "both"), makers))
    assert sorted(made) == [0, 25]
    write_pairs(makers[0], tmp_path / "one")
    assert same(content(tmp_path / "both"), content(tmp_path / "one"))


def test_only_what_is_missing_is_made(teacher, tmp_path):
    maker = PairMaker(teacher, recipe())
    assert write_pairs(maker, tmp_path) == 25
    before = content(tmp_path)
    assert write_pairs(maker, tmp_path) == 0
    (tmp_path / "shard_000001.safetensors").unlink()
    ticks = []
    assert write_pairs(maker, tmp_path, tick=ticks.append) == 10
    assert sum(ticks) == 25
    assert same(content(tmp_path), before)
    assert write_pairs(PairMaker(teacher, recipe(n=34)), tmp_path) == 14
    grown = whole(tmp_path)
    assert len(grown["source"]) == 34
    assert torch.equal(grown["image"][:20], torch.cat([before[n]["image"] for n in list(before)[:2]]))


KILLED = """
import os, signal, sys, time
from pathlib import Path
from penstock.lightning_modules.pairs import PairMaker, Recipe, write_pairs
maker, folder = PairMaker(sys.argv[1], Recipe(n=400, steps=3, batch=5, shard=10)), Path(sys.argv[2])
made = lambda: len(list(folder.glob("shard_*.safetensors")))
for attempt in range(3):
    before, child = made(), os.fork()
    if not child:
        write_pairs(maker, folder)
        os._exit(0)
    while made() == before:
        time.sleep(0.002)
    time.sleep(0.013 * attempt)
    os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), made())
"""


def test_killed_again_and_again_without_gaps_or_duplicates(teacher, tmp_path):
    """Each killed maker is a fork of one process, which spares the imports."""
    command = [sys.executable, "-c", KILLED, str(teacher), str(tmp_path / "killed")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout
    codes, shards = zip(*(map(int, line.split()) for line in said.splitlines()), strict=True)
    assert codes == (-signal.SIGKILL,) * 3
    assert 2 < shards[-1] < 40
    maker = PairMaker(teacher, recipe(n=400))
    write_pairs(maker, tmp_path / "killed")
    write_pairs(maker, tmp_path / "never")
    assert same(content(tmp_path / "killed"), content(tmp_path / "never"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed=0, expected seed=1"),
        ({"steps": 4}, "steps=3, expected steps=4"),
        ({"guidance": 3.0}, "guidance=1.0, expected guidance=3.0"),
        ({"solver": Heun()}, "expected solver=Heun"),
        ({"keep": (0, 3)}, "keep=None"),
        ({"shard": 5}, "shards of 10, expected 5"),
    ],
)
def test_a_folder_of_another_recipe_is_refused(teacher, tmp_path, change, named):
    write_pairs(PairMaker(teacher, recipe(n=5)), tmp_path)
    with pytest.raises(UserError, match=named):
        write_pairs(PairMaker(teacher, recipe(n=5, **change)), tmp_path)


def test_a_folder_of_another_checkpoint_is_refused(teacher, make_teacher, tmp_path):
    write_pairs(PairMaker(teacher, recipe(n=5)), tmp_path)
    with pytest.raises(UserError, match="the weights of another checkpoint"):
        write_pairs(PairMaker(make_teacher(seed=1), recipe(n=5)), tmp_path)


def test_a_folder_of_something_else_is_left_alone(teacher, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not empty and without pairs\.json"):
        write_pairs(PairMaker(teacher, recipe(n=5)), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_killed_before_the_manifest_was_whole(teacher, tmp_path):
    (tmp_path / ".pairs.json.part").write_text("{")
    assert write_pairs(PairMaker(teacher, recipe(n=5)), tmp_path) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pairs.json", "shard_000000.safetensors"]


def test_a_full_disk_leaves_nothing_half_written(teacher, tmp_path, monkeypatch):
    maker, calls = PairMaker(teacher, recipe()), []
    fsync = os.fsync

    def full(handle):
        calls.append(handle)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(pairs.os, "fsync", full)
    with pytest.raises(UserError, match=r"shard_000001.*cannot be written \(No space left on device\)"):
        write_pairs(maker, tmp_path / "full")
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == ["pairs.json", "shard_000000.safetensors"]
    monkeypatch.setattr(pairs.os, "fsync", fsync)
    assert write_pairs(maker, tmp_path / "full") == 15


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"n": 0}, "n=0"),
        ({"steps": 0}, "steps=0"),
        ({"seed": -1}, "seed=-1"),
        ({"shard": 7}, "shard=7, expected a multiple of batch=5"),
        ({"keep": (0, 2)}, "from 0 to steps=3"),
        ({"keep": (0, 2, 1, 3)}, "ascending"),
    ],
)
def test_a_recipe_out_of_range(change, named):
    with pytest.raises(ValueError, match=named):
        recipe(**change)


def test_the_default_folder_is_beside_the_teacher_and_differs_by_recipe(teacher):
    folders = {default_folder(PairMaker(teacher, recipe(**c))) for c in ({}, {"seed": 1}, {"steps": 4}, {"n": 99})}
    assert len(folders) == 3
    assert {f.parent for f in folders} == {teacher.parents[1] / "pairs"}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["seed=99999999999999999999999"], "seed=99999999999999999999999, expected at most 18446744073709551615"),
        (["guidance=nan"], "guidance=nan, expected a finite number"),
        (["guidance=-inf"], "guidance=-inf, expected a finite number"),
    ],
)
def test_words_out_of_range_leave_nothing_behind(teacher, tmp_path, capsys, words, named):
    assert main(["pairs", f"ckpt_path={teacher}", "n=5", f"out={tmp_path / 'p'}", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert named in error
    assert "\n" not in error
    assert not list(tmp_path.iterdir())


def test_a_teacher_whose_samples_are_not_finite(teacher, tmp_path):
    class Late(PairMaker):
        def make(self, index, draws, label=None):
            made = super().make(index, draws, label)
            made["image"][index >= 12] = torch.nan
            return made

    with pytest.raises(UserError, match=r"last\.ckpt': NaN or infinite numbers in 'image' of the pairs 10 to 14"):
        write_pairs(Late(teacher, recipe()), tmp_path / "late")
    assert sorted(p.name for p in (tmp_path / "late").iterdir()) == ["pairs.json", "shard_000000.safetensors"]
    with pytest.raises(UserError, match="of the pairs 10 to 14"):
        write_pairs(Late(teacher, recipe(shard=25)), tmp_path / "first")
    assert not (tmp_path / "first").exists()
    assert write_pairs(PairMaker(teacher, recipe()), tmp_path / "late") == 15


def test_a_manifest_that_is_none(teacher, tmp_path):
    maker, path = PairMaker(teacher, recipe(n=5)), tmp_path / "p" / "pairs.json"
    write_pairs(maker, tmp_path / "p")
    assert [p.name for p in tmp_path.iterdir()] == ["p"]
    good = json.loads(path.read_text())
    for content, named in (
        ([1], "found a list, expected an object"),
        ({key: value for key, value in good.items() if key != "shard"}, "no 'shard', expected a whole number of 1"),
        (good | {"n": "5"}, "n=5, expected a whole number"),
        (good | {"shape": None}, "shape=None, expected a list of whole numbers"),
        (good | {"real": "abc"}, "holds pairs of real data and its noise, expected pairs that a teacher made of noise"),
        (good | {"official": "abc"}, "holds pairs that a teacher made of noise, expected"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(UserError, match=named):
            write_pairs(maker, tmp_path / "p")
