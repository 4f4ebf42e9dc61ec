"""Videos with captions through one DataModule."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from penstock.datamodules.base import KindDataModule, Split, View, find_folder, fingerprint, held_out
from penstock.datamodules.image_sources import digest_files
from penstock.datamodules.image_text import Prompts
from penstock.datamodules.pixels import Pixels
from penstock.datamodules.sampling import BucketedBatchSampler, KeyedBatchSampler, KeyedLoader
from penstock.datamodules.video_clips import ClipStore, Sampling
from penstock.datamodules.video_readers import Seek
from penstock.datamodules.video_sources import Scene, on_disk, open_folder, open_manifest
from penstock.lightning_modules.errors import UserError, did_you_mean
from penstock.lightning_modules.nets.aspects import ASPECTS, Aspect, aspect_size, ratio


class Video(KindDataModule):
    """Clips `(T, 3, H, W)`, 8 bits, scaled to [-1, 1], with `text`, a caption of each.

    `data_dir`, else `$PENSTOCK_DATA/<name>`, holds

    - video files (mp4, webm, mov by torchcodec, extra `video`; gif by Pillow) at any depth;
    - or folders of frames, `clip_a/0001.png` ...;
    - or stills directly in it, which are videos of one frame (`frames=1`);

    optionally under `train/`, `val/`, `test/`. Captions are those of `captions.jsonl` (`{"file": "a.mp4", "text": "a
    cat"}` a line), else of `a.txt` beside `a.mp4`, else the videos' names. A `manifest` names files, captions and parts
    of videos instead, and maybe sources: other videos that they are made of, frame by frame (batches then have
    `source`, a clip of the same size and times). Tar shards hold `key.mp4` with `key.txt` or `key.json`, and maybe
    `key.source.mp4`; they are read in place.

    Clips begin every `stride` frames. Each is cropped in the centre to the nearest of `aspects` and resized to about
    `size`^2 pixels; a batch holds clips of one aspect, in an order that depends on (seed, epoch) alone and is the same
    on all ranks. Training leaves out the incomplete last batch of each aspect. No clip of a held-out video is trained
    on.

    Args:
        name: a plain name for messages and `$PENSTOCK_DATA`.
        data_dir: folder of the data.
        manifest: parquet, JSON lines or CSV with columns `file` (from `data_dir`, else from the manifest's folder) and
            `text`, maybe `start` and `end` in seconds, maybe `source`, a file like `file`.
        captions: name of the captions file; `None` = `captions.jsonl`, `captions.csv`, `metadata.jsonl` or `.csv`.
        frames: of a clip; 1 = images `(1, 3, H, W)`.
        fps: of a clip, by the nearest time stamps; `None` = the video's own frames.
        frames_fps: rate of folders of frames; `None` = `fps`.
        size: square root of the pixels of a frame.
        aspects: width:height; `shape` is that of the first.
        multiple: heights and widths are multiples of it.
        stride: frames (at `fps`) from the start of a clip to the next; `None` = `frames`, clips side by side.
        first_only: only the first clip of each video; with `frames=1` its first frame.
        seek: `exact` reads each file once to find its frames; `approximate` trusts its header, for long files.
        val_fraction: part of the videos held out, in [0, 1), where there is no `val/`.
        dequantise: add uniform noise of one level to training clips.
        batch_size: global training batch.
        eval_batch_size: global batch of evaluation; `None` = `batch_size`.
        num_workers: worker processes a rank.
        seed: key of order and dequantisation; `None` = the seed of the run.

    Attributes:
        texts: prompts by number, made of the training captions; after `setup`.

    Raises:
        UserError: anything wrong with the data; the file, row or key is named.
    """

    texts: Prompts

    def __init__(
        self,
        name: str = "video",
        data_dir: str | None = None,
        manifest: str | None = None,
        captions: str | None = None,
        frames: int = 16,
        fps: float | None = None,
        frames_fps: float | None = None,
        size: int = 64,
        aspects: list[Aspect] | None = None,
        multiple: int = 16,
        stride: int | None = None,
        first_only: bool = False,
        seek: Seek = "exact",
        val_fraction: float = 0.02,
        dequantise: bool = False,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
            pixels=Pixels(dequantise=dequantise),
        )
        for key, value in {"frames": frames, "size": size, "multiple": multiple, "stride": stride}.items():
            if value is not None and value < 1:
                raise UserError(f"data.{key}: found {value}, expected at least 1")
        for key, value in {"fps": fps, "frames_fps": frames_fps}.items():
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"data.{key}: found {value}, expected frames per second above 0")
        self.aspects = ["1:1"] if aspects is None else list(aspects)
        for aspect in self.aspects or [""]:
            if aspect not in ASPECTS:
                near = did_you_mean(aspect, ASPECTS)
                raise UserError(f"data.aspects: found '{aspect}', expected some of {', '.join(ASPECTS)}{near}")
        self.name, self.data_dir, self.manifest, self.captions_file = name, data_dir, manifest, captions
        self.sampling = Sampling(frames, fps, frames_fps or fps or 1.0, stride or frames, first_only, seek)
        self.sizes = [aspect_size(aspect, size, multiple) for aspect in self.aspects]
        self.val_fraction = val_fraction
        self.buckets = np.empty(0, dtype=np.int64)
        self.captions: list[tuple[str, ...]] = []

    def build(self) -> tuple[ClipStore, dict[str, np.ndarray]]:
        root, splits = self._open()
        scenes = [scene for part in splits.values() for scene in part]
        self.sourced = any(scene.source is not None for scene in scenes)
        if self.sourced and (other := next((s for s in scenes if s.source is None), None)):
            raise UserError(f"{other.path}: no source; expected one of every video, or of none")
        with ThreadPoolExecutor() as pool:
            spots = list(pool.map(self.sampling.spot, scenes))
        clips = [(k, first) for k, (_, count, _) in enumerate(spots) for first in self.sampling.starts(count)]
        scene, first = np.array(clips, dtype=np.int64).T
        self.buckets = self._nearest(np.array([ratio for *_, ratio in spots]))[scene]
        self.captions = [(scenes[k].text,) for k in scene]
        self.shape, self.num_classes, self.class_names = (self.sampling.frames, 3, *self.sizes[0]), 0, []
        numbers = self._numbers(splits, scene)
        self.texts = Prompts(self.captions, numbers["train"])
        made_of = digest_files(root, on_disk(scenes)), scenes, self.sampling, self.sizes
        self.fingerprint = fingerprint("video", *made_of, *numbers.values(), self.pixels)
        origins = [origin for origin, *_ in spots]
        return ClipStore(scenes, origins, scene, first, self.sizes, self.buckets, self.sampling), numbers

    def _open(self) -> tuple[Path, dict[str, list[Scene]]]:
        folder = find_folder(self.name, self.data_dir)
        if self.manifest is not None:
            file = Path(self.manifest).expanduser()
            root = folder if self.data_dir else file.parent
            return root, open_manifest(file, root)
        if folder is None:
            raise UserError(
                f"data.data_dir: no folder for '{self.name}' (looked for $PENSTOCK_DATA/{self.name}); set "
                "data.data_dir=FOLDER, data.manifest=FILE or PENSTOCK_DATA"
            )
        return folder, open_folder(folder, self.captions_file)

    def _nearest(self, ratios: np.ndarray) -> np.ndarray:
        own = np.array([ratio(aspect) for aspect in self.aspects])
        return np.abs(np.log(ratios)[:, None] - np.log(own)).argmin(1)

    def _numbers(self, splits: dict[str, list[Scene]], scene: np.ndarray) -> dict[str, np.ndarray]:
        """Clip numbers of each split; all parts of a file fall on the same side."""
        edges = np.cumsum([0, *map(len, splits.values())])
        owner = {split: np.arange(a, b) for split, a, b in zip(splits, edges, edges[1:])}
        if "val" not in owner and self.val_fraction:
            files, own = np.unique([str(s.path) for s in splits["train"]], return_inverse=True)
            kept, held = held_out(len(files), self.val_fraction)
            owner = {
                "train": np.flatnonzero(np.isin(own, kept)),
                "val": np.flatnonzero(np.isin(own, held)),
                **{split: part for split, part in owner.items() if split != "train"},
            }
        if not len(owner["train"]):
            raise UserError(f"{self.name}: the training split is empty; set data.val_fraction=0 or add videos")
        return {s: np.flatnonzero(np.isin(scene, owner.get(s, []))) for s in ("train", "val", "test")}

    def prompts(self, n: int, split: Split = "test") -> tuple[list[str], Tensor | None]:
        """Captions of the first `n` clips of a split, over and over; there are no classes."""
        return [self.captions[number][0] for number in np.resize(self.view(split).numbers, n)], None

    def loader(self, rows: View, batches: KeyedBatchSampler, collate: Any = None) -> KeyedLoader:
        """A loader of whole batches, each of one aspect."""
        if len(self.aspects) > 1:
            batches = self._bucketed(self.buckets[rows.numbers], batches)
        return super().loader(rows, batches, collate)

    def _bucketed(self, buckets: np.ndarray, batches: KeyedBatchSampler) -> BucketedBatchSampler:
        least = self.batch_size if batches.drop_last else batches.world
        counts = {self.aspects[b]: int(n) for b, n in zip(*np.unique(buckets, return_counts=True))}
        few = {aspect: n for aspect, n in counts.items() if n < least}
        found = ", ".join(f"{aspect} {n}" for aspect, n in few.items())
        if few and not batches.drop_last:
            raise UserError(
                f"data.aspects: found {found} clips to evaluate, expected at least one for each of the {least} ranks; "
                "list fewer aspects"
            )
        if len(few) == len(counts):
            raise UserError(f"data.batch_size: found {least}, but no aspect has so many training clips ({found})")
        if few:
            rank_zero_warn(f"data.aspects: {found} clips are less than a batch of {least} and are not trained on")
        options = {"rank": batches.rank, "world": batches.world, "drop_last": batches.drop_last}
        return BucketedBatchSampler(batches.sampler, batches.batch_size, buckets=buckets, **options)
