"""LightningCLI with the project's habits: run folder, no silent hyper-parameters, errors in one line."""

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import jsonargparse
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden

from penstock.lightning_modules.checkpoints import AtomicCheckpointIO, check_weights, load_checkpoint
from penstock.lightning_modules.cli.explain import explain, first_complaint, with_whole_key
from penstock.lightning_modules.cli.run_facts import write_facts
from penstock.lightning_modules.cli.run_lock import claim, release
from penstock.lightning_modules.errors import UserError

NOISE = (
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*`broadcast_buffers` is deprecated.*",
    r".*smaller than the logging interval.*",
    r".*does not have many workers.*",
    r".*in eval mode at the start of training.*",  # frozen networks
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*Couldn't infer the batch indices.*",  # predictions carry their samples' numbers
)
BATCHES = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches")
for _name in (*BATCHES, "overfit_batches", "val_check_interval"):
    # `typing` may hand out the union with float first, which makes one batch, 1, of what is read: all of them, 1.0
    Trainer.__init__.__annotations__[_name] = int | float | None


OF_ONE_VERB = {"verbose", "return_predictions"}  # arguments of validate and test, of predict


class SaveConfig(SaveConfigCallback):
    """Writes the complete `config.yaml`, which every verb takes, into the run folder, the loggers and checkpoints."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.already_saved or trainer.fast_dev_run:
            return
        config = self.config.clone()
        if "ckpt_path" in config:
            config.ckpt_path = None
        for key in OF_ONE_VERB & set(config.keys()):
            del config[key]
        self.text = self.parser.dump(config, skip_none=False)
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "config.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            if stage == "fit":
                claim(path.parent)
            beside = path.with_suffix(".tmp")
            beside.write_text(self.text, encoding="utf-8")
            os.replace(beside, path)
            for logger in trainer.loggers:
                if hasattr(logger, "log_config"):
                    logger.log_config(self.config.as_dict())
        self.already_saved = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.text


class NoProfiler(PassThroughProfiler):
    """Measures nothing at no cost: Lightning's own enters a new generator at each of about 90 places in every step."""

    _nothing = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager[None]:
        return self._nothing


class Lab(LightningCLI):
    """The project's LightningCLI: any LightningModule, any LightningDataModule, chosen by `class_path`.

    What the user writes wins over hyper-parameters stored in a checkpoint (Lightning 2.6 would do the reverse, in
    `_parse_ckpt_path`). The run folder comes from `RUN_DIR`, not from the configuration, so that a saved
    `config.yaml` re-runs into a folder of its own. `fit` ends with a `test` of the averaged weights.
    """

    def __init__(self, args: Any, restore_argv: Callable[[], None]):
        self.restore_argv = restore_argv
        self.verb = args["subcommand"] if isinstance(args, dict) else args[0]
        kwargs = {"exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            args=args,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=SaveConfig,
            parser_kwargs={**kwargs, self.verb: kwargs},
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The verb alone: a parser for each of the four takes a third of a second."""
        return {self.verb: LightningCLI.subcommands()[self.verb]}

    def _parse_ckpt_path(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        self.restore_argv()

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
            raise UserError(with_whole_key(first_complaint(error), self.config[self.verb].as_dict())) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        plugins = self._get(self.config_init, "trainer").get("plugins") or []
        plugins = plugins if isinstance(plugins, list) else [plugins]
        trainer = super().instantiate_trainer(
            default_root_dir=os.environ["RUN_DIR"], plugins=[*plugins, AtomicCheckpointIO()], **kwargs
        )
        _clip_fused(trainer.precision_plugin)
        if type(trainer.profiler) is PassThroughProfiler:
            trainer.profiler = NoProfiler()
        return trainer

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        if subcommand == "predict" and not is_overridden("predict_step", self.model):
            name = type(self.model).__name__
            raise UserError(f"predict: {name} has no predict_step; expected one that returns a dict of tensors")
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if (path := kwargs.get("ckpt_path")) and Path(path).is_file():
            check_weights(self.model, load_checkpoint(path), f"ckpt_path={path}")
            if hasattr(self.model, "initial"):
                self.model.initial = None
        if subcommand == "fit" and hasattr(self.model, "precheck"):
            self.model.precheck(self.datamodule)
        kwargs["weights_only"] = True
        return kwargs

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except SystemExit:
            if not self.trainer.interrupted:
                raise

    def after_fit(self) -> None:
        stopped = self.trainer.interrupted or self.trainer.fast_dev_run
        tested = is_overridden("test_step", self.model) and holds_out(self.datamodule)
        if not stopped and tested and self.trainer.state.finished:
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)


def holds_out(data: Any) -> bool:
    """Whether there is anything to test on; says so where all is trained on, as in a trial that over-fits."""
    numbers = getattr(data, "numbers", None)
    if not numbers or any(len(numbers.get(split, ())) for split in ("test", "val")):
        return True
    rank_zero_warn(f"{type(data).__name__} holds nothing out of training (data.val_fraction=0): no test")
    return False


def _clip_fused(precision: Precision) -> None:
    """Lets fused optimisers have their gradients clipped under bf16.

    Lightning refuses it for every mixed precision, though only a scaler of float16 leaves gradients to be unscaled.
    """
    if isinstance(precision, MixedPrecision) and precision.scaler is None:
        precision.clip_gradients = partial(Precision.clip_gradients, precision)


def run_lab(args: Any, restore_argv: Callable[[], None]) -> int:
    """Parses, builds and runs; returns the exit code.

    Raises:
        UserError: bad input, in one line.
    """
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "Tip:" not in r.getMessage())
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    folder = Path(os.environ["RUN_DIR"])
    new = not folder.exists() and "LOCAL_RANK" not in os.environ
    try:
        lab = Lab(args, restore_argv)
    except UserError:
        if new and not any((folder / name).exists() for name in ("metrics.csv", "checkpoints", "predictions")):
            _forget(folder)
        raise
    except jsonargparse.ArgumentError as error:
        raise UserError(explain(error)) from error
    except MisconfigurationException as error:
        raise UserError(f"configuration: {error}") from error
    finally:
        release()
    if lab.trainer.is_global_zero and not lab.trainer.fast_dev_run:
        if not lab.trainer.interrupted and lab.verb != "predict":
            write_facts(lab.trainer, trained=lab.verb == "fit")
        print(_summary(lab.trainer))
    return 130 if lab.trainer.interrupted else 0


def _summary(trainer: Trainer) -> str:
    """The last metrics and where the run lies."""
    folder = Path(trainer.default_root_dir)
    shown = os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else str(folder)
    values = {k: v for k, v in sorted(trainer.callback_metrics.items()) if not k.startswith(("throughput", "lr-"))}
    width = max(map(len, values), default=0)
    lines = [f"{name:<{width}}  {float(value):.5g}" for name, value in values.items()]
    last = "checkpoints/last.ckpt"
    if trainer.interrupted and (folder / last).is_file():
        return "\n".join([*lines, f"interrupted; go on with: penstock fit ckpt_path={shown}/{last}"])
    return "\n".join([*lines, f"run folder: {shown}"])


def _forget(folder: Path) -> None:
    """Removes the folder of a run refused before it trained: config.yaml and W&B start before the data loads."""
    if "wandb" in sys.modules:
        with redirect_stderr(StringIO()):
            sys.modules["wandb"].finish(exit_code=2)
    shutil.rmtree(folder, ignore_errors=True)
