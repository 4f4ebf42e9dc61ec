"""Mistakes that need no data are refused before pairs are made, and before a teacher is trained."""

import pytest

from penstock.lightning_modules.cli import main, verbs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experiment=boss_digits", "data.keep=bellman:3"], "model.k: found 4, expected 3, the segments of data.keep"),
        (["experiment=rectified_flow_pp_digits_lpips", "model.loss.distance.weights=nope.pth"], "nope.pth"),
        (["experiment=reflow_digits", "model.net.width=16"], "model.initial="),
    ],
)
def test_before_pairs(words, message, make_teacher, capsys):
    teacher = make_teacher()
    small = ["model.net.width=8"] if "model.net.width=16" not in words else []
    small += ["model.net.blocks=1", "logger=csv", f"teacher={teacher}", "trainer.accelerator=cpu"]
    assert main(["fit", *words, *small]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("penstock:")]
    assert message in line
    assert not (teacher.parents[1] / "pairs").exists()


def test_before_a_teacher(monkeypatch, capsys):
    monkeypatch.setattr(verbs, "find_or_train", lambda *_: pytest.fail("a teacher was looked for"))
    assert main(["fit", "experiment=reflow_digits", "initial=nope"]) == 2
    assert capsys.readouterr().err == "penstock: initial=nope: no such file, run folder or experiment\n"
