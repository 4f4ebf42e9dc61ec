"""`penstock compare`: quality against network calls, and folders of sweeps."""

import errno
import json
import os

import pytest
import wandb

from penstock.lightning_modules.cli import main
from penstock.lightning_modules.cli.compare import calls


def run(folder, **metrics):
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "metrics.csv").write_text("step,val/loss\n1,2.0\n2,1.0\n")
    return folder


def test_calls_are_sorted_and_searched_steps_stand_apart():
    metrics = {"fd_pixels/20": 0.2, "fd_pixels/1": 5.0, "fd_pixels/bellman-4": 0.5, "label_accuracy/real": 1.0}
    assert calls({"metrics": metrics}) == {"fd_pixels": [(1, 5.0), (20, 0.2)], "fd_pixels (bellman)": [(4, 0.5)]}


def test_calls_that_steps_do_not_tell_are_read_from_beside_them():
    metrics = {"fd_pixels/64": 0.2, "fd_pixels/8": 5.0, "network_calls/64": 347.0, "network_calls/8": 61.0}
    assert calls({"metrics": metrics}) == {"fd_pixels": [(61, 5.0), (347, 0.2)]}


def test_a_figure_of_all_runs(tmp_path, capsys):
    a = run(tmp_path / "a", **{"fd_pixels/1": 5.0, "fd_pixels/4": 0.6, "fd_pixels/bellman-4": 0.5})
    b = run(tmp_path / "b", **{"fd_pixels/1": 0.3, "fd_pixels/4": 0.2, "label_accuracy/1": 0.0})
    (tmp_path / "multirun.yaml").touch()
    assert main(["compare", str(a), str(b), str(tmp_path / "multirun.yaml"), f"out={tmp_path / 'out'}"]) == 0
    assert "calls.png" in capsys.readouterr().out
    assert (tmp_path / "out" / "calls.png").stat().st_size > 5000
    assert "![quality and calls](calls.png)" in (tmp_path / "out" / "compare.md").read_text()


def test_no_figure_without_two_numbers_of_calls(tmp_path, capsys):
    a = run(tmp_path / "a", **{"fd_pixels/1": 5.0, "image_auroc": 0.9})
    assert main(["compare", str(a), f"out={tmp_path / 'out'}"]) == 0
    assert "calls.png" not in capsys.readouterr().out
    assert not (tmp_path / "out" / "calls.png").exists()


def test_tables_and_pictures_go_to_one_run_of_wandb(tmp_path, capsys, monkeypatch):
    started, init = {}, wandb.init
    monkeypatch.setattr(wandb, "init", lambda **given: started.update(given) or init(**given))
    a = run(tmp_path / "flow" / "a", **{"fd_pixels/1": 5.0, "fd_pixels/4": 0.6})
    b = run(tmp_path / "flow" / "b", **{"fd_pixels/1": 0.3, "fd_pixels/4": 0.2})
    (a / "wandb" / "offline-run-20260101_120000-flow-a").mkdir(parents=True)
    logger = {"class_path": "penstock.lightning_modules.loggers.WandB", "init_args": {"project": "flows"}}
    (a / "config.yaml").write_text(json.dumps({"trainer": {"logger": [logger]}}))
    out = tmp_path / "out"
    assert main(["compare", str(a), str(b), f"out={out}", "logger=wandb"]) == 0
    assert f"W&B: offline; wandb sync {out}/wandb/offline-run-" in capsys.readouterr().out
    (made,) = (out / "wandb").glob("offline-run-*-compare-*")
    expected = {"project": "flows", "group": "flow", "job_type": "compare", "name": "compare flow/a, flow/b"}
    assert {key: started[key] for key in expected} == expected
    media = made / "files" / "media"
    assert len(list(media.rglob("*.png"))) == 2
    (links,) = (json.loads(p.read_text())["data"] for p in media.rglob("runs_*.table.json"))
    assert links == [["flow/a", "flow-a", ""], ["flow/b", "", ""]]
    (metrics,) = (json.loads(p.read_text()) for p in media.rglob("metrics_*.table.json"))
    assert metrics["columns"] == ["metric", "flow/a", "flow/b"]
    assert ["fd_pixels/1", "5", "0.3"] in metrics["data"]


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("logger=wandbb", "compare logger=wandbb: expected wandb (did you mean 'wandb'?)"),
        ("loger=wandb", "compare loger=wandb: expected run folders, out=, logger=, "),
        ("logger.wandb.mode=foo", "compare logger.wandb.mode=foo: expected one of auto, online, offline, disabled"),
        ("logger.wandb.mode=offlin", "online, offline, disabled (did you mean 'offline'?)"),
    ],
)
def test_a_wrong_word_is_one_line(tmp_path, capsys, word, named):
    a = run(tmp_path / "a", **{"fd_pixels/1": 5.0})
    extra = ["logger=wandb"] if word.startswith("logger.") else []
    assert main(["compare", str(a), f"out={tmp_path / 'out'}", *extra, word]) == 2
    said, error = capsys.readouterr()
    assert named in error
    assert "\n" not in error.strip()
    assert not said
    assert not (tmp_path / "out").exists()


DAMAGED = {
    "cut": ("metrics.json", b'{"fd": 0.', "found damaged or cut JSON"),
    "empty": ("metrics.json", b"", "found an empty file; expected name: number"),
    "no mapping": ("metrics.json", b"[1]", "found a list; expected name: number"),
    "no number": ("metrics.json", b'{"fd": "low"}', "fd: found 'low'; expected a number"),
    "broken": ("config.yaml", b"model: [1\ndata: 2\n", "line 2, "),
    "no configuration": ("config.yaml", b"model", "found a str; expected key: value"),
    "bytes": ("config.yaml", b"\xff\xfe\xff", "found bytes that are no UTF-8"),
    "a word": ("metrics.csv", b"step,loss\n1,2\n2,abc\n", "line 3, column 'loss': found 'abc'; expected a number"),
    "a word for a step": ("metrics.csv", b"step,loss\n1.5,2\n", "column 'step': found '1.5'; expected a whole number"),
    "no step": ("metrics.csv", b"epoch,loss\n1,2\n", "line 1: found 'epoch'; expected 'step' as the first column"),
    "a value too many": ("metrics.csv", b"step,loss\n1,2,3\n", "line 2: more values than columns"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_one_line(name, tmp_path, capsys):
    file, content, named = DAMAGED[name]
    a, b = run(tmp_path / "a", **{"fd_pixels/1": 5.0}), run(tmp_path / "b", **{"fd_pixels/1": 5.0})
    (b / file).write_bytes(content)
    assert main(["compare", str(a), str(b), f"out={tmp_path / 'out'}"]) == 2
    said, error = capsys.readouterr()
    assert error.startswith(f"penstock: compare {b / file}: ")
    assert named in error
    assert error.count("\n") == 1
    assert not said
    assert not (tmp_path / "out").exists()


def test_metrics_that_are_not_finite_are_shown_and_not_drawn(tmp_path, capsys):
    a = run(tmp_path / "a", **{"fd_pixels/1": "nan", "fd_pixels/2": 2.0, "fd_pixels/4": 1.0})
    assert main(["compare", str(a), f"out={tmp_path / 'out'}"]) == 0
    assert "nan" in capsys.readouterr().out


def test_an_out_that_is_a_file(tmp_path, capsys):
    a = run(tmp_path / "a", loss=1.0)
    (tmp_path / "out").write_text("mine")
    assert main(["compare", str(a), f"out={tmp_path / 'out'}"]) == 2
    assert f"compare out={tmp_path / 'out'}: a file; expected a folder" in capsys.readouterr().err
    assert main(["compare", str(a), f"out={tmp_path / 'out' / 'deeper'}"]) == 2
    assert "deeper: can't be written (Not a directory)" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("old", [False, True])
def test_a_full_disk(old, tmp_path, capsys, monkeypatch):
    a = run(tmp_path / "a", loss=1.0)
    out = tmp_path / "deep" / "out"
    if old:
        assert main(["compare", str(a), f"out={out}"]) == 0
        capsys.readouterr()
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    (a / "metrics.json").write_text('{"loss": 2.0}')
    before[a / "metrics.json"] = b'{"loss": 2.0}'

    def full(runs, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("penstock.lightning_modules.cli.compare.plot", full)
    assert main(["compare", str(a), f"out={out}"]) == 2
    said, error = capsys.readouterr()
    assert f"compare out={out}: can't be written (No space left on device)" in error
    assert error.count("\n") == 1
    assert not said
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert (tmp_path / "deep").exists() == old
