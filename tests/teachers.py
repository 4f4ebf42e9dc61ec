"""Checkpoints of small flows with random weights, as a run would have written them: teachers that cost nothing."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

SMALL = {"rectified_flow_digits": ["model.net.width=8", "model.net.blocks=1"]}


def make(run: Path, *words: str, experiment: str = "rectified_flow_digits", seed: int = 0) -> Path:
    """Writes `config.yaml` and `checkpoints/last.ckpt` into `run`; the raw weights are the averaged ones plus 1."""
    import torch
    import yaml

    from penstock.lightning_modules.build import build
    from penstock.lightning_modules.cli.compose import compose

    tree = compose([f"experiment={experiment}", *SMALL.get(experiment, []), *words])[0]
    (model,) = build(tree, "model")
    generator = torch.Generator().manual_seed(seed)
    state = {k: 0.1 * torch.randn(v.shape, generator=generator) for k, v in model.state_dict().items()}
    config = yaml.safe_dump({"model": tree["model"], "data": tree["data"]})
    raw = {k: v + 1 for k, v in state.items()}
    path = run / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    torch.save({"state_dict": state, "current_model_state": raw, "config": config}, path)
    (run / "config.yaml").write_text(config)
    return path


@cache
def shared(experiment: str, *words: str) -> Path:
    """One of these, kept for the life of this process."""
    folder = Path(tempfile.mkdtemp(prefix="teacher-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return make(folder / "run", *words, experiment=experiment)
