"""One thread a process (tests run side by side), no network, no cache or environment left behind."""

import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("PENSTOCK_CACHE", os.path.join(tempfile.gettempdir(), "penstock-test-cache"))
for name in ("RUN_DIR", "PL_GLOBAL_SEED", "PENSTOCK_CONF", "PENSTOCK_DATA"):
    os.environ.pop(name, None)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def environment():
    """Each test leaves the environment as it found it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def make_teacher(tmp_path_factory):
    """Makes checkpoints of small flows with random weights, as a run would have written them."""
    import yaml

    from penstock.lightning_modules.build import build
    from penstock.lightning_modules.cli.compose import compose

    small = {"rectified_flow_digits": ["model.net.width=8", "model.net.blocks=1"]}

    def make(*words, experiment="rectified_flow_digits", seed=0):
        run = tmp_path_factory.mktemp("teacher")
        tree = compose([f"experiment={experiment}", *small.get(experiment, []), *words])[0]
        (model,) = build(tree, "model")
        generator = torch.Generator().manual_seed(seed)
        state = {k: 0.1 * torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()}
        config = yaml.safe_dump({"model": tree["model"], "data": tree["data"]})
        raw = {k: v + 1 for k, v in state.items()}
        checkpoint = {"state_dict": state, "current_model_state": raw, "config": config}
        (run / "checkpoints").mkdir()
        torch.save(checkpoint, run / "checkpoints" / "last.ckpt")
        (run / "config.yaml").write_text(config)
        return run / "checkpoints" / "last.ckpt"

    return make


@pytest.fixture(scope="session")
def teacher(make_teacher):
    """One of these, shared: nobody writes into its folder."""
    return make_teacher()
