"""`penstock plan`: words, and what it prints."""

import subprocess
import sys

import pytest

from penstock.lightning_modules.cli import main
from penstock.lightning_modules.cli.plan import CARDS
from penstock.lightning_modules.hardware import GPUS

DIGITS = "experiment=starflow_v_moving_digits"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "experiment=NAME"),
        (["gpus=8"], "experiment=NAME"),
        ([DIGITS, "batc=8"], "did you mean 'batch'"),
        ([DIGITS, "gpu=h10"], "did you mean 'h100'"),
        ([DIGITS, "gpus=0"], "gpus=0: expected a whole number"),
        ([DIGITS, "gpus=8,x"], "gpus=x: expected a whole number"),
        ([DIGITS, "batch=-1"], "batch=-1"),
        ([DIGITS, "efficiency=2"], "efficiency=2"),
        ([DIGITS, "checkpointing=yes"], "expected one of true, false"),
        ([DIGITS, "gpus"], "plan gpus: unknown"),
        (["experiment=starflow_v_480"], "did you mean 'starflow_v_480p'"),
        (["experiment=boss_digits"], "expected batch=N"),
        (["experiment=boss_digits", "batch=8"], "BOSS wants batches with 'states'"),
    ],
)
def test_mistakes_take_one_line(words, said, capsys):
    assert main(["plan", *words]) == 2
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1


def test_mistakes_import_nothing_heavy():
    script = (
        "import sys; from penstock.lightning_modules.cli import main; "
        "code = main(['plan', 'experiment=starflow_v_480p', 'gpu=h1']); sys.exit(3 if 'torch' in sys.modules else code)"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == 2


def test_cards_are_those_of_the_data():
    assert set(CARDS) == GPUS.keys()


def test_a_run_on_eight_gpus_and_on_many(capsys):
    words = ["plan", DIGITS, "model.net.depths=[1,1]", "batch=64", "strategy=fsdp", "perf=bf16"]
    assert main([*words, "gpus=8,1024", "checkpointing=true"]) == 0
    text = capsys.readouterr().out
    assert "fsdp, matrix products in bfloat16" in text
    assert "(here on)" in text
    eight, many = (line.split() for line in text.splitlines() if line.split()[-1:] and line.endswith("%"))
    assert (eight[:3], many[:3]) == (["8", "64", "8"], ["1024", "1024", "1"])
    assert "one sample a GPU" in text
