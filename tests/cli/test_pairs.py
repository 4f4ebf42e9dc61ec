"""`penstock pairs` on two ranks under torchrun: one rank is killed, the same command goes on."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from penstock.lightning_modules.cli import main

N, SHARD = 400, 10
WORDS = [f"n={N}", "steps=10", "batch=10", f"shard={SHARD}", "solver=heun"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def start(teacher, out):
    command = [*TORCHRUN, "-m", "penstock.lightning_modules", "pairs", f"ckpt_path={teacher}", *WORDS, f"out={out}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ranks(process):
    """Process number of each rank: torchrun's children know theirs from their environment."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = {}
    for child in children:
        with suppress(OSError):
            variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            found |= {int(v[5:]): int(child) for v in variables if v.startswith(b"RANK=")}
    return found


def shards(folder):
    return sorted(folder.glob("shard_*.safetensors"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the ranks in /proc")
def test_a_rank_is_killed_and_the_command_goes_on(teacher, tmp_path):
    out = tmp_path / "two"
    for killed in (1, 0):
        process = start(teacher, out)
        before, numbers = len(shards(out)), {}
        while len(shards(out)) < before + 5 or len(numbers) < 2:
            assert process.poll() is None, process.stdout.read()[-3000:]
            numbers = ranks(process)
            time.sleep(0.01)
        os.kill(numbers[killed], signal.SIGKILL)
        output = process.communicate(timeout=120)[0]
        assert process.returncode != 0
        assert "SIGKILL" in output or "-9" in output
        assert len(shards(out)) < N // SHARD, "it was done before it was killed"
    stamps = {path: path.stat().st_mtime_ns for path in shards(out)}
    last = start(teacher, out)
    output = last.communicate(timeout=300)[0]
    assert last.returncode == 0, output[-3000:]
    assert f"{N} pairs: {out}" in output
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    one = tmp_path / "one"
    assert main(["pairs", f"ckpt_path={teacher}", *WORDS, f"out={one}"]) == 0
    assert [p.name for p in sorted(out.iterdir())] == [p.name for p in sorted(one.iterdir())]
    for a, b in zip(shards(out), shards(one), strict=True):
        found, expected = load_file(a), load_file(b)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)


def test_words_that_are_refused(teacher, tmp_path, capsys):
    run = teacher.parents[1]
    words = {
        "device=foo": "device=foo: ",
        "device=meta": "expected cpu or an available cuda",
        "steps=bellman:8": "steps=bellman:8: pairs take a whole number of equal steps",
        f"ckpt_path={run}": f"ckpt_path={run}: a folder, expected a checkpoint (did you mean '{teacher}'?)",
    }
    if not torch.cuda.is_available():
        words["device=cuda"] = "device=cuda: "
    for word, named in words.items():
        assert main(["pairs", f"ckpt_path={teacher}", f"out={tmp_path / 'p'}", word]) == 2
        error = capsys.readouterr().err.strip()
        assert named in error
        assert "\n" not in error
    assert not list(tmp_path.iterdir())
