"""Every kernel in Triton's interpreter, and a flow that trains and samples on all of them: one process for all."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from penstock.kernels import dispatch
from penstock.lightning_modules.flow.affine import ScoreGuidance, nll
from penstock.lightning_modules.flow.inverse import Jacobi
from penstock.lightning_modules.nets.starflow import STARFlow

FILES = sorted(path.name for path in Path(__file__).parent.glob("test_*.py"))


def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, str(Path(__file__).resolve())],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == [name for name in FILES if name not in ("test_compile.py", "test_interpreter.py")]


def flow_on_kernels(device: str) -> None:
    """Loss, gradients and guided samples of a small flow, on kernels and on references."""
    torch.manual_seed(0)
    net = STARFlow((2, 3, 2, 2), dim=32, depths=(1, 1), head_dim=32, text_dim=4).to(device)
    net.null_text = torch.zeros(3, 4, device=device)
    for block in net.blocks:
        torch.nn.init.normal_(block.proj_out.weight, std=0.1)
    x, text = torch.randn(2, 2, 3, 2, 2).to(device), torch.randn(2, 3, 4).to(device)
    found = []
    for backend in ("triton", "reference"):
        net.zero_grad()
        with dispatch.backend(backend):
            flow = net(x, text)
            loss = nll(flow.z, flow.logdets).mean()
            loss.backward()
            samples, traces = net.decode(flow.z.detach(), Jacobi(3, tolerance=0), None, text, ScoreGuidance(1.0))
        gradients = torch.cat([w.grad.flatten() for w in net.parameters() if w.grad is not None])
        found.append((loss.detach(), gradients, samples, torch.tensor([t.residuals[-1] for t in traces])))
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_flow_on_kernels_on_cuda():
    flow_on_kernels("cuda")


if __name__ == "__main__":
    for name in FILES:
        check = runpy.run_path(str(Path(__file__).parent / name)).get("kernel_against_reference")
        if check is not None:
            check("cpu")
            print(name)
    flow_on_kernels("cpu")
