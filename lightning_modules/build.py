"""Builds what a configuration names, outside a training run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule

from penstock.lightning_modules.checkpoints import load_checkpoint, load_weights
from penstock.lightning_modules.cli.explain import explain, first_complaint
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.solvers import Solver


def build(config: dict[str, Any], *parts: str) -> list[Any]:
    """Builds `model` and/or `data` of a run's configuration.

    Raises:
        UserError: the configuration does not fit the classes of this version.
    """
    kinds = {"model": LightningModule, "data": LightningDataModule}
    parser = ArgumentParser(exit_on_error=False)
    for part in parts:
        parser.add_subclass_arguments(kinds[part], part, fail_untyped=False)
    try:
        built = parser.instantiate_classes(parser.parse_object({part: config[part] for part in parts}))
    except ArgumentError as error:
        raise UserError(explain(error)) from error
    except ValueError as error:
        raise _refusal(error) from error
    return [built[part] for part in parts]


def _refusal(error: ValueError) -> UserError:
    """What a class said when it refused to be built, out of what jsonargparse wraps around it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, UserError):
            return UserError(str(cause))
        cause = cause.__cause__
    return UserError(f"configuration: {first_complaint(error)}")


def build_solver(config: dict[str, Any]) -> Solver:
    """Builds what a file of `conf/solver/` says."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Solver, "solver")
    return parser.instantiate_classes(parser.parse_object({"solver": config}))["solver"]


def config_of_checkpoint(path: Path) -> dict[str, Any]:
    """The complete configuration that a checkpoint carries.

    Raises:
        UserError: the file can't be read, or was not written by this program.
    """
    return _config(load_checkpoint(path), path)


def _config(checkpoint: dict[str, Any], path: Path) -> dict[str, Any]:
    if "config" not in checkpoint:
        raise UserError(f"{path}: no configuration in this checkpoint; expected one written by penstock fit")
    return yaml.safe_load(checkpoint["config"])


def model_from_checkpoint(
    path: Path, change: Callable[[dict[str, Any]], dict[str, Any]] = dict, **init_args: Any
) -> LightningModule:
    """The model of a run with its (averaged, where EMA was on) weights, in eval mode.

    Args:
        path: A checkpoint written by this program.
        change: Makes other arguments of the model of those it was trained with.
        init_args: Arguments of the model to change, as a configuration would have them.

    Raises:
        UserError: a file that can't be read, that another program wrote, or that holds another model's weights.
    """
    checkpoint = load_checkpoint(path)
    config = _config(checkpoint, path)
    config["model"]["init_args"] = change(config["model"]["init_args"]) | init_args
    (model,) = build(config, "model")
    load_weights(model, checkpoint, f"checkpoint '{path}'")
    model.on_load_checkpoint(checkpoint)
    return model.eval()
