"""Detection sets: the order of their batches, memory and workers, ranks, resuming."""

import pytest
import torch
from box_trees import coco, ready, same
from lightning.pytorch import Callback, LightningModule, Trainer


@pytest.fixture(autouse=True)
def _own_data(monkeypatch):
    monkeypatch.delenv("PENSTOCK_DATA", raising=False)


def test_the_order_is_of_seed_and_epoch(tmp_path, attach):
    coco(tmp_path, (("train", 40), ("val", 1)))
    options = {"flip": True, "min_size": [48, 64]}

    def order(seed, epoch):
        return [
            b["index"].tolist() for b in attach(ready(tmp_path, seed=seed, **options), epoch=epoch).train_dataloader()
        ]

    assert order(1, 0) == order(1, 0)
    assert len({str(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


@pytest.mark.parametrize(("memory_gb", "workers"), [(4.0, 2), (0.0, 0), (0.0, 2)])
@pytest.mark.parametrize("min_size", [48, [48, 64]])
def test_memory_and_workers_give_the_same_batches(tmp_path, memory_gb, workers, min_size):
    coco(tmp_path)
    expected = ready(tmp_path, min_size=min_size, flip=True)
    found = ready(tmp_path, min_size=min_size, flip=True, memory_gb=memory_gb, num_workers=workers)
    assert (expected.store.kept is None, found.store.kept is None) == (False, memory_gb == 0)
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader", "reference_dataloader"):
        for a, b in zip(getattr(expected, loader)(), getattr(found, loader)(), strict=True):
            assert same(a, b)


def test_memory_is_that_of_what_is_kept(tmp_path):
    coco(tmp_path, (("train", 10), ("val", 1)), sizes=((100, 200),))
    resized, whole = 11 * 3 * 32 * 64 / 1e9, 11 * 3 * 100 * 200 / 1e9
    kept = {
        (str(min_size), gb): ready(tmp_path, min_size=min_size, max_size=64, memory_gb=gb, keep_empty=True).store.kept
        for min_size in (32, [32, 48])
        for gb in (0.999 * resized, 1.001 * resized, 0.999 * whole, 1.001 * whole)
    }
    assert [pictures is not None for pictures in kept.values()] == [False, True, True, True, False, False, False, True]
    data = ready(tmp_path, min_size=32, max_size=64)
    data.train_dataloader()
    assert {tuple(image.shape) for image in data.store.kept.values()} == {(3, 32, 64)}


def test_ranks_share_the_batches(tmp_path, attach):
    coco(tmp_path, (("train", 40), ("val", 7)))
    options = {"flip": True, "min_size": [48, 64], "seed": 3}
    for loader in ("train_dataloader", "val_dataloader"):
        one = list(getattr(attach(ready(tmp_path, **options)), loader)())
        shares = [list(getattr(attach(ready(tmp_path, **options), rank=r, world=2), loader)()) for r in (0, 1)]
        for batch, *parts in zip(one, *shares, strict=True):
            for key in ("index", "size", "original_size"):
                assert torch.equal(batch[key], torch.cat([part[key] for part in parts]))
            for key in ("boxes", "label"):
                assert same(batch[key], [row for part in parts for row in part[key]])
            images = [image for part in parts for image in part["image"]]
            for image, own, (height, width) in zip(batch["image"], images, batch["size"].tolist()):
                assert torch.equal(image[:, :height, :width], own[:, :height, :width])
            assert not set(parts[0]["index"].tolist()) & set(parts[1]["index"].tolist())


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cut", [1, 4, 7])
def test_resumed_in_the_middle_of_an_epoch(tmp_path, attach, workers, cut):
    coco(tmp_path, (("train", 40), ("val", 1)))
    options = {"flip": True, "min_size": [48, 64], "num_workers": workers}
    loader = attach(ready(tmp_path, **options), epoch=1).train_dataloader()
    batches = iter(loader)
    for _ in range(cut):
        next(batches)
    state, rest = loader.state_dict(), list(batches)
    resumed = attach(ready(tmp_path, **options), epoch=1).train_dataloader()
    resumed.load_state_dict(state)
    found = list(resumed)
    assert len(rest) == len(found) == 8 - cut
    assert all(map(same, rest, found))


class Watch(LightningModule):
    """Records every training batch as it comes to a step."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.trainer.current_epoch, batch))
        return self.weight * 0

    def validation_step(self, batch, batch_idx):
        assert batch["image"].is_floating_point()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Save(Callback):
    def __init__(self, path):
        self.path = path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 13:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_is_resumed_sees_the_same_batches(tmp_path, workers):
    coco(tmp_path, (("train", 40), ("val", 3)))
    runs = []
    for ckpt in (None, tmp_path / "cut.ckpt"):
        module = Watch()
        trainer = Trainer(
            max_epochs=3,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[Save(tmp_path / "cut.ckpt")],
            default_root_dir=tmp_path,
        )
        data = ready(tmp_path, flip=True, min_size=[48, 64], num_workers=workers)
        trainer.fit(module, data, ckpt_path=ckpt, weights_only=True)
        runs.append(module.seen)
    whole, resumed = runs
    assert [epoch for epoch, _ in whole] == [0] * 8 + [1] * 8 + [2] * 8
    assert whole[0][1]["image"].is_floating_point()
    assert not any(same(whole[k][1], whole[k + 8][1]) for k in range(16))
    assert len(resumed) == 11
    assert all(a[0] == b[0] and same(a[1], b[1]) for a, b in zip(whole[13:], resumed))
