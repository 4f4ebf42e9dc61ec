"""Prompts without images: what benchmarks of text-to-image and text-to-video models ask for."""

import os
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from penstock.datamodules.base import KindDataModule, Split, Store, View, fingerprint
from penstock.datamodules.prompt_files import OFFICIAL, Prompt, PromptFormat, read_prompts
from penstock.datamodules.readable import PredictionLoader
from penstock.lightning_modules.errors import UserError


class BenchmarkPrompts(KindDataModule):
    """Several samples of each prompt of a benchmark, for `predict`: batches have `text` and `index`.

    Sample s of prompt p has the index `p * samples_per_prompt + s`, whatever the batches and ranks are, so that what is
    drawn for it does not depend on them.

    Args:
        format: of the prompts: `geneval`, `dpg` (DPG-Bench), `vbench` or `lines`; see `read_prompts`.
        path: file or folder; None is `$PENSTOCK_DATA/<format>/` and the official name in it.
        hub: data set of the Hugging Face hub, `owner/set`, in which `path` lies.
        samples_per_prompt: samples of each prompt; GenEval and DPG-Bench want 4, VBench 5.
        limit: the first so many prompts; None is all.
        shape: `(C, H, W)` of the images that the model makes, `(T, C, H, W)` of clips.
        batch_size: samples of all ranks together that are drawn at once.
        num_workers: worker processes a rank.
        seed: as in other data; nothing here depends on it.

    Attributes:
        items: the prompts; after `setup`.
        layout: how scorers want the samples: `grid` (one picture a prompt), `folders` or `videos`.

    Raises:
        UserError: a number out of range, `hub` without `path`, or anything wrong with the file.
    """

    items: list[Prompt]

    def __init__(
        self,
        format: PromptFormat = "geneval",
        path: str | None = None,
        hub: str | None = None,
        samples_per_prompt: int = 4,
        limit: int | None = None,
        shape: list[int] | None = None,
        batch_size: int = 16,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=None, num_workers=num_workers, seed=seed)
        for key, value in (("samples_per_prompt", samples_per_prompt), ("limit", limit)):
            if value is not None and value < 1:
                raise UserError(f"data.{key}: found {value}, expected at least 1")
        if hub and not path:
            raise UserError(f"data.path: found none; expected the file or folder of the prompts in data.hub={hub}")
        self.format, self.path, self.hub = format, path, hub
        self.samples_per_prompt, self.limit = samples_per_prompt, limit
        self.layout = {"dpg": "grid", "vbench": "videos"}.get(format, "folders")
        self.class_names: list[str] = []
        if shape is not None:
            self.shape = tuple(shape)
        self._left_out: set[int] = set()

    def prepare_data(self) -> None:
        if self.hub:
            _download(self.hub, self.path)

    def build(self) -> tuple[Store, dict[str, np.ndarray]]:
        self.items = read_prompts(self.place(), self.format)[: self.limit]
        content = [(item.name, item.text, item.metadata) for item in self.items]
        self.fingerprint = fingerprint("prompts", self.format, content, self.samples_per_prompt)
        none = np.arange(0)
        samples = np.arange(len(self.items) * self.samples_per_prompt)
        return _Asked(self.items, self.samples_per_prompt), {"train": none, "val": none, "test": samples}

    def place(self) -> Path:
        """Where the prompts lie.

        Raises:
            UserError: no `path`, and none of the format in `$PENSTOCK_DATA`; a hub that can't be reached.
        """
        if self.hub:
            return _download(self.hub, self.path)
        if self.path:
            return Path(self.path).expanduser()
        root = os.environ.get("PENSTOCK_DATA")
        if root and self.format in OFFICIAL:
            return Path(root).expanduser() / self.format / OFFICIAL[self.format][1]
        official = f", from {OFFICIAL[self.format][0]}" if self.format in OFFICIAL else ""
        raise UserError(f"data.path: found none; expected the prompts of the format '{self.format}'{official}")

    def prompts(self, n: int, split: Split = "test") -> tuple[list[str], None]:
        """`n` prompts, from the first on, over and over; there are no classes."""
        return [self.items[i % len(self.items)].text for i in range(n)], None

    def leave_out(self, samples: set[int]) -> None:
        """Draws these samples no more: their pictures exist. So many are drawn anyway that each rank has one."""
        self._left_out = samples

    def predict_dataloader(self) -> PredictionLoader:
        samples = self.numbers["test"]
        left_out = np.isin(samples, list(self._left_out))
        ordered = np.concatenate((samples[~left_out], samples[left_out]))
        kept = np.sort(ordered[: max((~left_out).sum(), self.ranks[1])])
        return PredictionLoader(self.loader(View(self.store, kept), self.eval_batches(len(kept))))

    def train_dataloader(self) -> NoReturn:
        raise UserError("data: BenchmarkPrompts has no images to train or score on; expected penstock predict")

    val_dataloader = test_dataloader = train_dataloader

    def reference_dataloader(self, split: Split = "train") -> NoReturn:
        self.train_dataloader()


class _Asked:
    """The prompt of every sample."""

    def __init__(self, items: list[Prompt], samples: int) -> None:
        self.items, self.samples = items, samples

    def fetch(self, numbers: np.ndarray) -> dict[str, Any]:
        return {"text": [self.items[number].text for number in (numbers // self.samples).tolist()]}

    def warm(self, numbers: np.ndarray) -> None:
        """Nothing to read ahead."""


def _download(hub: str, path: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(
            f"data.hub={hub}: huggingface_hub is not installed; expected it from pip install huggingface_hub, or "
            "data.hub=null with data.path on this machine"
        ) from error
    try:
        root = snapshot_download(hub, repo_type="dataset", allow_patterns=[path, f"{path.rstrip('/')}/*"])
    except Exception as error:
        raise UserError(
            f"data.hub={hub}: cannot be had ({type(error).__name__}); expected a data set of the hub and a network, or "
            f"data.hub=null with data.path={path} on this machine"
        ) from error
    return Path(root, path)
