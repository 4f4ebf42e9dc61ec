"""One thread a process (tests run side by side), no network, no cache or environment left behind."""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("PENSTOCK_CACHE", os.path.join(tempfile.gettempdir(), "penstock-test-cache"))
OF_RUNS = ("RUN_DIR", "PL_GLOBAL_SEED", "PENSTOCK_CONF", "PENSTOCK_DATA")
for name in OF_RUNS:
    os.environ.pop(name, None)

sys.path.insert(0, str(Path(__file__).parent))

import pytest  # noqa: E402
import teachers  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def environment():
    """Each test leaves the environment as it found it; what a module's fixture ran before it left nothing either."""
    for name in OF_RUNS:
        os.environ.pop(name, None)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def make_teacher(tmp_path_factory):
    """Makes checkpoints of small flows with random weights."""
    return lambda *words, **options: teachers.make(tmp_path_factory.mktemp("teacher"), *words, **options)


@pytest.fixture(scope="session")
def teacher(make_teacher):
    """One of these, shared: nobody changes it."""
    return make_teacher()
