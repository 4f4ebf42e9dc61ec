"""`penstock compare`: quality against network calls, and folders of sweeps."""

import json

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
