"""The pictures that a text-to-image benchmark is scored on, in the folders that its official scorer reads."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor

from penstock.lightning_modules.callbacks.benchmark_layouts import LAYOUTS, Layout
from penstock.lightning_modules.callbacks.ranks import broadcast, rank_and_world
from penstock.lightning_modules.checkpoints import fingerprint
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.loggers import write_atomically
from penstock.lightning_modules.seeds import run_seed

SETTINGS = ("guidance", "solver", "sampler", "inverse", "shallow", "window", "context")


class BenchmarkImages(Callback):
    """Writes what `predict_step` returns under `image` for `BenchmarkPrompts`, one picture a sample.

    GenEval and plain lines get `<folder>/00000/metadata.jsonl` and `<folder>/00000/samples/0000.png`, DPG-Bench
    `<folder>/<name>.png` with four samples as 2x2. Beside the folder `<folder>.json` says what made the pictures. A run
    that was stopped goes on: whole pictures are kept and not drawn again, and a folder of another checkpoint, seed or
    list of prompts is refused. A picture depends on weights, seed, prompt and sample only, where `predict_step` draws
    its noise by `index`.

    Args:
        folder: for the pictures; None is `<format>` in the run folder.
        steps: of the module's `predict_step` (its `predict_steps`); None leaves them.

    Attributes:
        entry: of what `predict_step` returns.
        data: that the prompts may come from.
        noun: what the samples are called.
        layouts: of files, by what the data wants.

    Raises:
        UserError: `steps` below 1.
    """

    entry, data, noun, layouts = "image", "data=geneval or data=dpg", "pictures", LAYOUTS

    def __init__(self, folder: str | None = None, steps: int | None = None):
        if steps is not None and steps < 1:
            raise UserError(f"{type(self).__name__}: steps {steps}, expected at least 1")
        self.folder, self.steps = folder, steps
        self.layout: Layout | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Finds out which samples exist already, and lets the data leave them out.

        Raises:
            UserError: other data than `BenchmarkPrompts`, a module that takes no prompts, or `steps` for one without.
        """
        if stage != "predict":
            return
        name, data = type(self).__name__, trainer.datamodule
        found = getattr(data, "format", type(data).__name__)
        if not hasattr(data, "leave_out") or data.layout not in self.layouts:
            raise UserError(f"{name}: the data is {found}, expected {self.data}")
        if not getattr(pl_module, "takes_text", False):
            raise UserError(f"{name}: {type(pl_module).__name__} takes no prompts, expected a text-conditional model")
        if self.steps is not None:
            if not hasattr(pl_module, "predict_steps"):
                raise UserError(f"{name}: {type(pl_module).__name__} has no predict_steps, expected steps=null")
            pl_module.predict_steps = self.steps
        folder = Path(self.folder).expanduser() if self.folder else Path(trainer.default_root_dir, data.format)
        self.layout = self.layouts[data.layout](folder, data.items, data.samples_per_prompt)
        data.leave_out(broadcast(self.layout.finished()))
        trainer.predict_loop.return_predictions = False

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compares the manifest with this run, or writes it; removes what a killed run did not complete.

        Raises:
            UserError: the folder holds pictures of another run, or pictures without a manifest.
        """
        if trainer.is_global_zero:
            self.layout.clean()
        self._agree(trainer, self.identity(trainer, pl_module), {"checkpoint": str(trainer.ckpt_path)})

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: dict[str, Tensor],
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes the pictures of a batch.

        Raises:
            UserError: no images, or numbers in them that are not finite.
        """
        if batch_idx == 0 and hasattr(pl_module, "predict_steps"):
            self._agree(trainer, {"network_calls": pl_module.nfe})
        samples = outputs.get(self.entry)
        if samples is None:
            name, found = type(self).__name__, ", ".join(sorted(outputs))
            raise UserError(f"{name}: {type(pl_module).__name__}.predict_step gave {found}; expected {self.entry}")
        finite = samples.flatten(1).isfinite().all(1).cpu()
        for number, drawn, good in zip(batch["index"].tolist(), self.drawn(samples), finite.tolist()):
            item, sample = divmod(number, self.layout.samples)
            item = self.layout.items[item]
            if not good:
                raise UserError(f"prompt '{item.name}', sample {sample}: NaN or infinite numbers in the {self.entry}")
            self.layout.write(item, sample, drawn)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Completes the prompts, shared among the ranks, once all samples are written."""
        trainer.strategy.barrier()
        rank, world = rank_and_world()
        for item in self.layout.items[rank::world]:
            self.layout.finish(item)

    def drawn(self, samples: Tensor) -> list[Any]:
        """What the layout writes of samples `(B, ...)` in [-1, 1]."""
        return pictures(samples)

    def identity(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """What the samples depend on; network calls are added where the module takes a number of steps."""
        settings = {name: repr(getattr(pl_module, name)) for name in SETTINGS if hasattr(pl_module, name)}
        own = {"model": type(pl_module).__name__, "weights": fingerprint(pl_module), "seed": run_seed()}
        return own | {"prompts": trainer.datamodule.fingerprint, "precision": str(trainer.precision), **settings}

    @property
    def manifest(self) -> Path:
        """The file that says what made the pictures."""
        return self.layout.folder.with_name(f"{self.layout.folder.name}.json")

    def _agree(self, trainer: pl.Trainer, own: dict[str, Any], also: dict[str, Any] | None = None) -> None:
        """Called by all ranks: what the manifest says must be `own`; what it does not say yet is added, and `also`."""
        complaint = None
        if trainer.is_global_zero:
            found = self._manifest()
            complaint = found if isinstance(found, str) else self._difference(found, own)
            if complaint is None and not found.keys() >= own.keys():
                write_atomically(self.manifest, json.dumps(found | own | (also or {}), indent=1) + "\n")
        if complaint := broadcast(complaint):
            raise UserError(complaint, everywhere=True)

    def _manifest(self) -> dict[str, Any] | str:
        """What the file says, nothing where there is neither a file nor a picture, or what is wrong."""
        try:
            found = json.loads(self.manifest.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if not self.layout.finished():
                return {}
            return f"{self.layout.folder}: {self.noun}, but no {self.manifest.name} beside it; {self._other}"
        except (ValueError, OSError) as error:
            return f"{self.manifest}: cannot be read ({error}); expected what was written beside the {self.noun}"
        if not isinstance(found, dict) or "weights" not in found:
            return f"{self.manifest}: no weights in it; expected what was written beside the {self.noun}"
        return found

    def _difference(self, found: dict[str, Any], own: dict[str, Any]) -> str | None:
        for key, value in own.items():
            if found.get(key, value) != value:
                words = {"weights": "another checkpoint", "prompts": "other prompts"}
                what = words.get(key, f"{key}={found[key]}, here {value}")
                return f"{self.layout.folder}: holds {self.noun} of {what}; {self._other}"
        return None

    @property
    def _other(self) -> str:
        return f"expected the same, or another folder (callbacks.{self.noun}.folder=...)"


def pictures(images: Tensor) -> list[Image.Image]:
    """RGB pictures of images `(B, 1 or 3, H, W)` in [-1, 1]; what is outside is cut off."""
    pixels = ((images.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
    return [Image.fromarray(p.numpy()) for p in pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()]
