"""One CUDA device: the numbers of the CPU, all speed options, nothing that waits, bit-exact resume, FSDP2, NaN."""

import subprocess

import harness
import pytest
import torch
from methods import METHODS, without_dropout, words

from penstock.lightning_modules.checkpoints import load_checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = ["trainer.accelerator=gpu", "trainer.devices=1"]
NO_BLOCKS = ("rectified_flow_points", "rectified_flow_ot", "fastflow_digits", "sepc_digits")
ON_THE_HOST = ("rectified_flow_ot", "sepc_digits", "piip_digit_objects", "piip_llava_digits_stage2")
DIGITS = "rectified_flow_digits"
NO_CHECKPOINT = ["callbacks.checkpoint.every_n_train_steps=null", "callbacks.checkpoint.every_n_epochs=1"]


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """float32 products in full precision, and the workspace that deterministic cuBLAS asks for."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
        monkeypatch.setattr(backend, "allow_tf32", False)


def fitted(run, method, *more):
    done = harness.penstock("fit", *words(method), *CUDA, *more, run=run)
    assert done.code == 0, done.err[-3000:]
    return run


def losses(run):
    return [float(row["train/loss"]) for row in harness.metrics(run).values() if "train/loss" in row]


@pytest.mark.parametrize("method", METHODS)
def test_trains_as_on_the_cpu(method, tmp_path):
    """The same draws, so the same losses, as long as dropout (whose masks are the device's own) is off."""
    more = ["trainer.max_epochs=1", *without_dropout(method)]
    cpu = tmp_path / "cpu"
    assert harness.penstock("fit", *words(method), *more, run=cpu).code == 0
    found, expected = losses(fitted(tmp_path / "cuda", method, *more)), losses(cpu)
    assert len(expected) == 4
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("perf", ["fast", "activation_checkpointing"])
@pytest.mark.parametrize("method", METHODS)
def test_speed_options(method, perf, tmp_path):
    """Two epochs, bfloat16 and compiled or recomputing activations, near the losses of plain float32."""
    if perf == "activation_checkpointing" and method in NO_BLOCKS:
        pytest.skip("the network names no blocks to recompute")
    plain, other = fitted(tmp_path / "plain", method), fitted(tmp_path / "perf", method, f"perf={perf}")
    assert losses(other) == pytest.approx(losses(plain), rel=0.05)


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ON_THE_HOST])
def test_no_step_waits_for_the_device(method, tmp_path):
    """All but optimal transport, the matching of boxes and the layout of texts, which are the host's."""
    watch = "+callbacks.zz={class_path: faults.NoWaiting, allowed: []}"
    quiet = ["trainer.log_every_n_steps=100", "trainer.max_epochs=2", *NO_CHECKPOINT, "callbacks.lr=null"]
    run = fitted(tmp_path / "run", method, *quiet, watch)
    assert int((run / "watched").read_text()) >= 4


@pytest.mark.parametrize("method", METHODS)
def test_killed_and_resumed(method, tmp_path):
    cuts = f"+callbacks.cuts={{class_path: faults.Cuts, out: '{tmp_path / 'cuts'}'}}"
    run = fitted(tmp_path / "run", method, "trainer.deterministic=true", cuts)
    stopped = tmp_path / "cuts" / "step3"
    assert harness.penstock("fit", harness.last_checkpoint(stopped)).code == 0
    harness.same_state(stopped, run)
    assert harness.metrics(stopped) == harness.metrics(run)


def test_a_loss_that_is_not_finite(tmp_path):
    """Seen one batch later at most; what was saved is still finite."""
    bad = "+callbacks.bad={class_path: faults.BadLoss, step: 5, rank: 0}"
    done = harness.penstock("fit", *words(DIGITS), *CUDA, bad, run=tmp_path)
    assert done.code == 2
    assert "loss is not finite at step 5" in done.err
    saved = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == 5
    assert all(value.isfinite().all() for value in saved["current_model_state"].values())


@pytest.mark.parametrize("more", [[], ["trainer.strategy.gather=bfloat16", "trainer.precision=bf16-mixed"]])
def test_sharded_on_one_device(more, tmp_path):
    plain = fitted(tmp_path / "plain", DIGITS)
    sharded = tmp_path / "sharded"
    command = harness.command("fit", *words(DIGITS), *CUDA, "strategy=fsdp", *more)
    done = subprocess.run(command, env=harness.variables(RUN_DIR=str(sharded)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(sharded) == pytest.approx(losses(plain), rel=0.05 if more else 1e-3)


def test_a_checkpoint_of_the_gpu_loads_on_the_cpu(tmp_path):
    run = fitted(tmp_path / "run", DIGITS, "perf=fast")
    out = tmp_path / "out"
    done = harness.penstock("sample", harness.last_checkpoint(run), "n=4", "steps=2", "device=cpu", f"out={out}")
    assert done.code == 0, done.err[-2000:]
    assert list(out.glob("*.png"))
