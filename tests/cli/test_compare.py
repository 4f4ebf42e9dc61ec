"""`penstock compare`: quality against network calls, and folders of sweeps."""

import json

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
        ("logger.wandb.mode=of", "compare logger.wandb.mode=of: expected one of auto, online, offline, disabled"),
    ],
)
def test_a_wrong_word_is_one_line(tmp_path, capsys, word, named):
    a = run(tmp_path / "a", **{"fd_pixels/1": 5.0})
    extra = ["logger=wandb"] if word.startswith("logger.") else []
    assert main(["compare", str(a), f"out={tmp_path / 'out'}", *extra, word]) == 2
    error = capsys.readouterr().err.strip()
    assert named in error
    assert "\n" not in error
