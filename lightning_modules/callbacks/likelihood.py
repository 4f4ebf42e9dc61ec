"""Bits per dimension of a density model on held-out images or videos."""

import math

import lightning.pytorch as pl
import torch

from penstock.kernels.philox import Draws
from penstock.lightning_modules.callbacks.generation import EvaluationCallback
from penstock.lightning_modules.callbacks.ranks import rank_and_world
from penstock.lightning_modules.callbacks.reference import data_of
from penstock.lightning_modules.errors import UserError


class BitsPerDim(EvaluationCallback):
    """Logs `bits_per_dim`: mean of `-log2 p(x) / D` in the units of the grey levels, by `log_prob` of the module.

    Images are dequantised uniformly with fixed noise, `x = 2 (level + u) / levels - 1`, so that the density of x bounds
    the probability of the levels (arXiv 1511.01844 section 3.1); the scale adds `log2(levels / 2)`. It only means
    something for a model trained on dequantised images (`data.dequantise=true`).

    Args:
        n: Images or videos, the first ones of the split.
        split: Split they come from.
        every_n_validations: 0 = only after training, in `validate` and `test`.

    Raises:
        UserError: a module without `log_prob`, or data without grey levels.
    """

    def __init__(self, n: int = 256, split: str = "test", every_n_validations: int = 0):
        super().__init__(every_n_validations)
        if n < 1:
            raise UserError(f"n: {n} images given, expected at least 1")
        self.n, self.split = n, split

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if not hasattr(pl_module, "log_prob"):
            raise UserError(f"bits_per_dim: {type(pl_module).__name__} has no log_prob, expected a density model")
        if not getattr(trainer.datamodule, "levels", 0):
            raise UserError(f"bits_per_dim: {type(trainer.datamodule).__name__} has no grey levels, expected images")

    def evaluate(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Each rank scores its share of the images."""
        levels = trainer.datamodule.levels
        _, world = rank_and_world()
        quota = math.ceil(self.n / world)
        total = torch.zeros(2, dtype=torch.float64, device=pl_module.device)
        conditional = bool(getattr(pl_module, "num_classes", 0))
        for batch in trainer.datamodule.reference_dataloader(self.split):
            rest = quota - int(total[1])
            if rest <= 0:
                break
            image, index = data_of(batch)[:rest].to(pl_module.device), batch["index"][:rest].to(pl_module.device)
            level = ((image + 1) / 2 * (levels - 1)).round()
            x = 2 * (level + Draws(0, 0, index).uniform("dequantise", image.shape[1:])) / levels - 1
            cond = {"cond": batch["label"][:rest].to(pl_module.device)} if conditional else {}
            generator = torch.Generator(pl_module.device).manual_seed(0)
            with torch.inference_mode(False), torch.no_grad():
                log_prob = pl_module.log_prob(x.clone(), generator=generator, **{k: v.clone() for k, v in cond.items()})
            bits = -log_prob.double() / (x[0].numel() * math.log(2)) + math.log2(levels / 2)
            total += torch.stack([bits.sum(), bits.new_tensor(len(x))])
        total = trainer.strategy.reduce(total, reduce_op="sum")
        pl_module.log("bits_per_dim", (total[0] / total[1]).float(), batch_size=1, sync_dist=True)
