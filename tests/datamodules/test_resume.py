"""Lightning stops and resumes at any batch, and sees the same batches as a run that never stopped."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from penstock.datamodules.digits import Digits
from penstock.datamodules.pair import Pair

BATCHES = 5


class Watch(LightningModule):
    """Records epoch, samples and augmented pixels of every training batch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        pixels = batch["image"].double().sum().item() + batch.get("source", torch.zeros(1)).double().sum().item()
        self.seen.append((self.trainer.current_epoch, batch_idx, batch["index"].tolist(), pixels))
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        assert batch["image"].min() == -1

    def predict_step(self, batch, batch_idx):
        return batch["index"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Save(Callback):
    def __init__(self, hook, step, path):
        self.path, self.step = path, step
        setattr(self, hook, self.save)

    def save(self, trainer, *_):
        if trainer.global_step == self.step and not self.path.exists() and not trainer.sanity_checking:
            trainer.save_checkpoint(self.path)


def digits(workers, paired=False):
    target = Digits(batch_size=300, num_workers=workers, dequantise=True, seed=11)
    return Pair(Digits(), target) if paired else target


def fit(tmp_path, data, *, callbacks=(), ckpt=None, epochs=3, **options):
    module = Watch()
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        **options,
    )
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=True)
    return module.seen, trainer


CUTS = [
    ("on_train_batch_end", 1),
    ("on_train_batch_end", 3),
    ("on_train_batch_end", 5),
    ("on_train_batch_end", 8),
    ("on_train_batch_end", 10),
    ("on_validation_end", 5),
    ("on_train_epoch_end", 5),
    ("on_train_epoch_end", 10),
]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "options", [{}, {"limit_train_batches": 4}, {"max_steps": 14, "epochs": -1}], ids=["all", "limit", "steps"]
)
def test_resumed_run_sees_the_batches_of_a_run_never_stopped(tmp_path, workers, options):
    whole, _ = fit(tmp_path, digits(workers), **options)
    assert len({tuple(s[2]) for s in whole}) == len(whole)
    per_epoch = options.get("limit_train_batches", BATCHES)
    assert [s[:2] for s in whole] == [(k // per_epoch, k % per_epoch) for k in range(len(whole))]
    for n, (hook, step) in enumerate(CUTS if workers == 0 else CUTS[1::3]):
        step = step * per_epoch // BATCHES if step % BATCHES == 0 else step
        path = tmp_path / f"{n}.ckpt"
        fit(tmp_path, digits(workers), callbacks=[Save(hook, step, path)], **options)
        assert path.exists()
        resumed, _ = fit(tmp_path, digits(workers), ckpt=path, **options)
        assert resumed == whole[step:], (hook, step)


def test_resumed_pairs_are_those_of_a_run_never_stopped(tmp_path):
    whole, _ = fit(tmp_path, digits(0, paired=True))
    path = tmp_path / "cut.ckpt"
    fit(tmp_path, digits(0, paired=True), callbacks=[Save("on_train_batch_end", 7, path)])
    assert fit(tmp_path, digits(0, paired=True), ckpt=path)[0] == whole[7:]


def test_overfitting_and_prediction(tmp_path):
    seen, trainer = fit(tmp_path, digits(0), overfit_batches=2)
    assert seen[0][2:3] == seen[2][2:3] == seen[4][2:3]
    data = Digits(batch_size=50)
    data.setup()
    found = trainer.predict(Watch(), datamodule=data)
    assert torch.cat(found).tolist() == data.numbers["val"].tolist()
