"""The smallest module and datamodule that keep the contracts callbacks rely on."""

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Dataset


class Rows(Dataset):
    def __init__(self, columns: dict[str, torch.Tensor], rows: list[int]):
        self.columns, self.rows = columns, rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {key: value[self.rows[i]] for key, value in self.columns.items()}


class FakeData(pl.LightningDataModule):
    """Arrays held in memory; ranks take rows `rank, rank + world, ...` and the last batch is uneven."""

    def __init__(self, columns: dict[str, torch.Tensor], num_classes: int, fingerprint: str, batch_size: int = 100):
        super().__init__()
        n = len(next(iter(columns.values())))
        self.columns = columns | {"index": torch.arange(n)}
        self.num_classes, self.fingerprint, self.batch_size = num_classes, fingerprint, batch_size
        self.shape = tuple(next(iter(columns.values())).shape[1:])
        self.asked: list[str] = []

    def reference_dataloader(self, split):
        self.asked.append(split)
        n = len(self.columns["index"])
        rows = {"all": range(n), "train": range(0, n, 2), "test": range(1, n, 2), "val": range(0)}[split]
        trainer = self.trainer
        mine = list(rows)[trainer.global_rank :: trainer.world_size]
        return DataLoader(Rows(self.columns, mine), batch_size=self.batch_size)

    def train_dataloader(self):
        return DataLoader(Rows(self.columns, list(range(64))), batch_size=8)

    def val_dataloader(self):
        return DataLoader(Rows(self.columns, list(range(16))), batch_size=8)

    test_dataloader = val_dataloader


class FakeModule(pl.LightningModule):
    """`sample` returns memorised data of the class asked for plus noise that shrinks with the steps."""

    def __init__(self, data: torch.Tensor, labels: torch.Tensor | None, scale: float = 0.5):
        super().__init__()
        self.register_buffer("memory", data)
        self.labels, self.scale = labels, scale
        self.num_classes = 0 if labels is None else int(labels.max()) + 1
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.dropout = torch.nn.Dropout()
        self.calls: list[tuple[int, int, bool]] = []
        self.nfe = 0

    def sample(self, n, *, steps, cond=None, generator=None):
        self.calls.append((n, steps, self.training))
        self.nfe = steps
        if cond is None:
            rows = torch.randint(len(self.memory), (n,), generator=generator, device=self.device)
        else:
            order = torch.argsort(self.labels, stable=True)
            counts = torch.bincount(self.labels)
            starts = counts.cumsum(0) - counts
            uniform = torch.rand(n, generator=generator, device=self.device)
            rows = order[starts[cond] + (uniform * counts[cond]).long()]
        x = self.memory[rows]
        noise = torch.randn(x.shape, generator=generator, device=self.device)
        torch.rand(3)
        return x + self.scale / steps * noise + self.weight

    def training_step(self, batch, batch_idx):
        return (self.weight - 1) ** 2

    def validation_step(self, batch, batch_idx):
        pass

    test_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD([self.weight], lr=0.01)


def digits():
    """`(1797, 1, 8, 8)` in [-1, 1] and labels."""
    data, labels = load_digits(return_X_y=True)
    return torch.from_numpy(data).float().view(-1, 1, 8, 8) / 8 - 1, torch.from_numpy(labels).long()


def digits_module_and_data(scale: float = 0.5):
    images, labels = digits()
    return FakeModule(images, labels, scale), FakeData({"image": images, "label": labels}, 10, "digits")


def quiet_trainer(folder, callbacks, **settings):
    """A CPU trainer that writes nothing but what the callbacks write."""
    defaults = {"logger": False, "max_epochs": 1, "num_sanity_val_steps": 2, "log_every_n_steps": 4}
    return pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **(defaults | settings),
    )
