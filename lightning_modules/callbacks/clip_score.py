"""Do images show what their prompts say? CLIP score (arXiv 2104.08718) on open_clip, imported where it is used."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize

from penstock.lightning_modules.callbacks.generation import Generated
from penstock.lightning_modules.callbacks.ranks import gather_rows
from penstock.lightning_modules.errors import UserError, did_you_mean


class ClipScore:
    """A metric of `GenerationMetrics`: `max(100 mean(cos), 0)`, the cosine between CLIP's features of image and prompt.

    Logs `clip_score/<nfe>`, the value of torchmetrics' `CLIPScore` for the same network; papers often print it divided
    by 100. The prompts are the captions of the data. With an architecture of one's own (a JSON file of open_clip) the
    name is `clip_score_<file's name>`, since such values compare with no paper's.
    """

    def __init__(self, model: str = "ViT-L-14", weights: str = "openai", chunk: int = 64):
        """Names the network; nothing is loaded yet.

        Args:
            model: architecture, a name of open_clip or the path of a JSON file; OpenAI's own files need a name that
                ends in `-quickgelu`.
            weights: a tag of open_clip (downloaded at first use) or the path of a file.
            chunk: images that are looked at at once.
        """
        self.model, self.weights, self.chunk = model, weights, chunk
        self.name = f"clip_score_{Path(model).stem}" if model.endswith(".json") else "clip_score"
        self._net: nn.Module | None = None
        self._rows: list[tuple[Tensor, Tensor]] = []

    def check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Loads the network and looks for prompts.

        Raises:
            UserError: a module or data without prompts; open_clip, the architecture or the weights are not to be had.
        """
        if not getattr(pl_module, "takes_text", False):
            raise UserError(
                f"{self.name}: {type(pl_module).__name__} takes no prompts, expected a text-conditional model"
            )
        if not hasattr(trainer.datamodule, "prompts"):
            raise UserError(
                f"{self.name}: {type(trainer.datamodule).__name__} has no captions, expected data=image_text"
            )
        if self._net is None:
            self._net = self._load().eval().requires_grad_(False)

    def reset(self, device: torch.device) -> None:
        """Forgets the samples."""
        self._net.to(device)
        self._rows = []

    def update(self, samples: Generated) -> None:
        """Adds the cosines of a chunk."""
        parts = zip(samples.data.split(self.chunk), _split(samples.text, self.chunk))
        cosines = torch.cat([self.cosines(images, texts) for images, texts in parts])
        self._rows.append((samples.index.cpu(), cosines.cpu()))

    def compute(self, trainer: pl.Trainer) -> dict[str, float]:
        """The score on rank 0."""
        own = tuple(torch.cat(column) for column in zip(*self._rows)) or (torch.empty(0, dtype=torch.int64), None)
        rows = gather_rows(*own)
        return {} if rows is None else {self.name: max(100 * float(rows[1].double().mean()), 0.0)}

    def constants(self, trainer: pl.Trainer) -> dict[str, float]:
        """None."""
        return {}

    @torch.no_grad()
    def cosines(self, images: Tensor, texts: list[str]) -> Tensor:
        """`(b,)` float32 of images `(b, 1 or 3, H, W)` in [-1, 1] and their prompts."""
        pixels = (images.float().expand(-1, 3, -1, -1) / 2 + 0.5).clamp(0, 1)
        pixels = resize(pixels, [min(self._size)], InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
        pixels = center_crop(pixels, list(self._size))
        mean, std = (pixels.new_tensor(value).view(1, 3, 1, 1) for value in (self._mean, self._std))
        with torch.autocast(pixels.device.type, enabled=False):
            seen = self._net.encode_image((pixels - mean) / std, normalize=True)
            said = self._net.encode_text(self._tokenizer(texts).to(pixels.device), normalize=True)
        return (seen * said).sum(1).float()

    def _load(self) -> nn.Module:
        try:
            import open_clip
        except ImportError as error:
            raise UserError(
                f"{self.name}: open_clip is not installed; expected it from pip install 'penstock[clip]'"
            ) from error
        name = self.model
        if name.endswith(".json"):
            if not Path(name).is_file():
                raise UserError(f"{self.name}: no file {name}; expected an architecture of open_clip as JSON")
            open_clip.add_model_config(Path(name))
            name = Path(name).stem
        elif name not in open_clip.list_models():
            raise UserError(
                f"{self.name}: open_clip has no model '{name}'{did_you_mean(name, open_clip.list_models())}"
            )
        tags = open_clip.list_pretrained_tags_by_model(name)
        path = Path(self.weights).expanduser()
        if self.weights not in tags and not path.is_file():
            expected = (
                f"a file of {self.model}'s weights there, or a tag of open_clip: {', '.join(tags) or 'none known'}"
            )
            raise UserError(f"{self.name}: no weights {path}{did_you_mean(self.weights, tags)}; expected {expected}")
        try:
            net = open_clip.create_model(name, pretrained=self.weights if self.weights in tags else str(path))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:160]
            if self.weights in tags:
                raise UserError(
                    f"{self.name}: the weights '{self.weights}' of {name} cannot be downloaded ({reason}); put the "
                    "file anywhere and give its path as `weights`"
                ) from error
            raise UserError(f"{self.name}: {path} does not fit {self.model} ({reason})") from error
        config: dict[str, Any] = net.visual.preprocess_cfg
        size = config["size"]
        self._size = (size, size) if isinstance(size, int) else tuple(size)[-2:]
        self._mean, self._std = config["mean"], config["std"]
        self._tokenizer = open_clip.get_tokenizer(name)
        return net


def _split(texts: list[str], size: int) -> list[list[str]]:
    return [texts[first : first + size] for first in range(0, len(texts), size)]
