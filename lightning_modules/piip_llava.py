"""PIIP-LLaVA, arXiv 2501.07783: a language model answers questions about what a pyramid of two branches sees."""

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn import functional as F

from penstock.lightning_modules.answers import RULES, Scored, accuracies
from penstock.lightning_modules.callbacks.ranks import broadcast, gather, shared_count
from penstock.lightning_modules.checkpoints import load_checkpoint, load_weights, raw_weights
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.conversation import IMAGE, Prompt, Template, tokenized, with_image, written
from penstock.lightning_modules.nets.piip.costs import Costs, costs
from penstock.lightning_modules.nets.piip.llava import LlavaNet, Read
from penstock.lightning_modules.nets.piip.llava_tower import PUBLISHED
from penstock.lightning_modules.training import log_mean, optimizers
from penstock.lightning_modules.weights.piip_llava import own_state, read_folder

PARTS = "pretrained parts"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class PiipLlava(LightningModule):
    """Trains the answers of conversations, token by token; questions are given.

    In the first stage the projector alone is trained, so that the gates stay zero and branches do not interact; in the
    second everything is.

    Args:
        net: Tower, projector and language model.
        optimizer: Of all that trains.
        scheduler: By steps.
        stage: 1 or 2.
        template: Of conversations, see `written`: `plain` for captions in the first stage.
        initial: Where weights come from: a checkpoint, such as the first stage's, or a folder of official weights;
            None are those of the parts.
        max_length: Tokens at which conversations are cut, those of the image included.
        new_tokens: At which answers are.
        question: What is asked of pictures that come without one.

    Raises:
        UserError: a number below 1.
    """

    def __init__(
        self,
        net: LlavaNet,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        stage: Literal[1, 2] = 2,
        template: Template = "vicuna_v1",
        initial: str | None = None,
        max_length: int = 2048,
        new_tokens: int = 128,
        question: str = "Describe the image.",
    ):
        super().__init__()
        for name, value in (("max_length", max_length), ("new_tokens", new_tokens)):
            if value < 1:
                raise UserError(f"model.{name}: found {value}, expected at least 1")
        self.net, self.optimizer, self.scheduler = net, optimizer, scheduler
        self.stage, self.template, self.question = stage, template, question
        self.max_length, self.new_tokens = max_length, new_tokens
        self.initial: str | None = initial or PARTS
        self.scored: list[Scored] = []
        self.cut = False
        if stage == 1:
            net.requires_grad_(False)
            net.projector.requires_grad_(True)
        for name, value in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(value).view(-1, 1, 1), persistent=False)

    def setup(self, stage: str) -> None:
        """Loads weights, unless a checkpoint brings all.

        Raises:
            UserError: no weights or those of another model, or images of another size.
        """
        if self.initial:
            self._start(self.initial)
            self.initial = None
        data, side = self.trainer.datamodule, self.net.tower.image_size
        if (size := tuple(data.shape[1:])) not in ((side, side), (0, 0)):
            found = "x".join(map(str, size))
            raise UserError(f"image_size: found images of {found} pixels, expected {side}x{side}, the finer branch's")

    def _start(self, initial: str) -> None:
        if initial == PARTS:
            self.net.load()
        elif Path(initial).expanduser().is_dir():
            weights = {"state_dict": own_state(read_folder(initial))}
            load_weights(self.net, weights, f"model.initial={initial}")
        else:
            weights = {"state_dict": raw_weights(load_checkpoint(initial))}
            load_weights(self, weights, f"model.initial={initial}")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        logits, following, read = self._read(batch)
        loss = F.cross_entropy(logits.float(), following, reduction="sum")
        loss = loss / shared_count(loss.new_full((), len(following)))
        self._say_if_cut(batch, read)
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:
            self.log("train/loss", loss.detach(), batch_size=len(batch["index"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._score(batch, "val/")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Logs as validation does, and keeps what answers are worth.

        Raises:
            UserError: questions without answers.
        """
        if not all(batch["answers"]):
            raise UserError("data: found questions without answers, which can be predicted but not scored")
        self._score(batch, "test/")
        rule = RULES[self.trainer.datamodule.rule]
        rows = zip(batch["index"].tolist(), batch["group"].tolist(), self._answers(batch), batch["answers"])
        self.scored += [Scored(index, group, rule(answer, given)) for index, group, answer, given in rows]

    def on_test_epoch_start(self) -> None:
        self.scored = []

    def on_test_epoch_end(self) -> None:
        """Logs `accuracy` of the answers as they are generated, and `accuracy_once`; see `accuracies`."""
        parts = gather(self.scored)
        values = broadcast(None if parts is None else accuracies(row for part in parts for row in part))
        for name, value in values.items():
            self.log(name, value, batch_size=1, sync_dist=True)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """`index` `(B,)`, and lists of `question` and `answer`; pictures alone are padded and asked `question`."""
        if "conversation" not in batch:
            asked = [(with_image(self.question),)] * len(batch["index"])
            batch = {**batch, "conversation": asked, "image": self._square(batch["image"])}
        questions = [_asked(turns)[-1].replace(IMAGE, "").strip() for turns in batch["conversation"]]
        return {"index": batch["index"], "question": questions, "answer": self._answers(batch)}

    def costs(self) -> Costs:
        """What `penstock flops` prints, of the tower; of a model on the meta device."""
        return costs(self.net.tower)._replace(closed_form=None, published=PUBLISHED.get(self.net.tower.name))

    def configure_optimizers(self) -> Any:
        """The optimiser of all that trains, with its scheduler by steps."""
        return optimizers(self)

    def _normed(self, image: Tensor) -> Tensor:
        return ((image + 1) / 2 - self.mean) / self.std

    def _prompts(self, conversations: list[tuple[str, ...]]) -> list[Prompt]:
        tokenizer = self.net.language.tokenizer
        return [tokenized(written(turns, self.template), tokenizer) for turns in conversations]

    def _read(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Read]:
        return self.net(self._normed(batch["image"]), self._prompts(batch["conversation"]), self.max_length)

    def _answers(self, batch: dict[str, Any]) -> list[str]:
        prompts = self._prompts([_asked(turns) for turns in batch["conversation"]])
        end = "\n" if self.template == "plain" else ""
        return self.net.generate(self._normed(batch["image"]), prompts, self.new_tokens, end)

    def _score(self, batch: dict[str, Any], split: str) -> None:
        """Logs loss and share of likeliest tokens that are right, given those before: means over the samples of each
        one's mean over its answers' tokens."""
        logits, following, read = self._read(batch)
        owner = torch.arange(len(read.labels), device=logits.device)
        owner = owner.repeat_interleave((read.labels[:, 1:] >= 0).sum(1))
        counts = owner.bincount(minlength=len(read.labels))
        values = {
            "loss": F.cross_entropy(logits.float(), following, reduction="none"),
            "token_accuracy": (logits.argmax(1) == following).float(),
        }
        for name, value in values.items():
            sums = value.new_zeros(len(counts)).index_add(0, owner, value)
            log_mean(self, f"{split}{name}", (sums / counts.clamp(min=1))[counts > 0])

    def _say_if_cut(self, batch: dict[str, Any], read: Read) -> None:
        longest = max(read.lengths)
        if longest > self.max_length and not self.cut:
            self.cut = True
            number = batch["index"][read.lengths.index(longest)].item()
            rank_zero_warn(
                f"model.max_length: conversation {number} has {longest} tokens with its image's; those after "
                f"{self.max_length} are left out, here and of any other as long"
            )

    def _square(self, image: Tensor) -> Tensor:
        """Pictures `(B, 3, H, W)` in [-1, 1], padded to squares with the mean colour, at the size of the tower's."""
        height, width = image.shape[2:]
        longest, side = max(height, width), self.net.tower.image_size
        square = (2 * self.mean - 1).to(image).expand(len(image), 3, longest, longest).clone()
        top, left = (longest - height) // 2, (longest - width) // 2
        square[:, :, top : top + height, left : left + width] = image
        options = {"mode": "bicubic", "align_corners": False, "antialias": True}
        return F.interpolate(square, size=(side, side), **options).clamp(-1, 1)


def _asked(turns: tuple[str, ...]) -> tuple[str, ...]:
    """A conversation up to its last question."""
    return turns if len(turns) % 2 else turns[:-1]
