"""Every choice of every model group builds what its file names."""

import pytest
import torch

from penstock.kernels.philox import Draws
from penstock.lightning_modules.build import build
from penstock.lightning_modules.cli.compose import compose
from penstock.lightning_modules.cli.conf import options
from penstock.lightning_modules.errors import UserError

CHOICES = [(group, name) for group in ("path", "times", "coupling", "solver") for name in options(group)]


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_choice_builds_and_trains(group, name):
    tree, _ = compose(["data=points", "net=mlp", f"{group}={name}"])
    (model,) = build(tree, "model")
    wanted = tree["model"]["init_args"][group]["class_path"]
    part = getattr(model, group)
    assert f"{type(part).__module__}.{type(part).__qualname__}" == wanted
    batch = {"points": torch.randn(8, 2), "index": torch.arange(8)}
    assert model.losses(batch, Draws(0, 0, batch["index"])).isfinite().all()
    samples = model.eval().sample(8, steps=4, generator=torch.Generator().manual_seed(0))
    assert samples.isfinite().all()


def test_bad_configuration_is_one_line():
    tree, _ = compose(["data=points", "net=mlp", "model.net.widht=3"])
    with pytest.raises(UserError, match="did you mean 'width'"):
        build(tree, "model")
