"""Videos of several aspects: sizes, cropping, buckets of batches, their order and resume."""

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from saving import Save
from video_files import pictures, ready

from penstock.datamodules.sampling import BucketedBatchSampler, KeyedSampler
from penstock.datamodules.video import Video, aspect_size
from penstock.datamodules.video_clips import fitted
from penstock.lightning_modules.errors import UserError


def test_sizes_of_aspects():
    assert aspect_size("16:9", 640, 16) == (480, 848)
    assert aspect_size("9:16", 640, 16) == (848, 480)
    assert aspect_size("1:1", 64, 16) == (64, 64)
    assert aspect_size("21:9", 8, 16) == (16, 16)


def test_the_centre_is_cropped_and_resized():
    frames = torch.zeros(1, 3, 20, 60, dtype=torch.uint8)
    frames[..., 20:40] = 200
    assert torch.equal(fitted(frames, 20, 20), frames[..., 20:40])
    assert fitted(frames, 8, 8).unique().tolist() == [200]
    half = fitted(frames, 10, 30)
    assert half.shape == (1, 3, 10, 30)
    assert half[..., :8].max() == 0
    assert half[..., 12:18].min() == 200


@pytest.fixture
def mixed(tmp_path):
    """Wide, square and tall videos of 7, 6 and 1 clips of two frames."""
    for name, count, size in (("wide", 14, (32, 18)), ("square", 12, (16, 16)), ("tall", 2, (18, 32))):
        pictures(tmp_path / name, count, *size)
    return {"folder": tmp_path, "aspects": ["1:1", "16:9", "9:16"], "frames": 2, "batch_size": 2, "multiple": 4}


def test_a_batch_holds_one_aspect(mixed, attach):
    data = attach(ready(**mixed))
    with pytest.warns(match=r"data\.aspects: 9:16 1 clips are less than a batch of 2 and are not trained on"):
        loader = data.train_dataloader()
    assert data.shape == (2, 3, 16, 16)
    batches = list(loader)
    assert len(batches) == len(loader) == 3 + 3
    shapes = [tuple(b["video"].shape[1:]) for b in batches]
    assert {s: shapes.count(s) for s in shapes} == {(2, 3, 16, 16): 3, (2, 3, 12, 20): 3}
    assert len({n for b in batches for n in b["index"].tolist()}) == 12
    seen = [b["index"].tolist() for b in data.reference_dataloader("all")]
    assert sorted(n for b in seen for n in b) == list(range(14))
    assert all(len({int(data.buckets[n]) for n in b}) == 1 for b in seen)


@pytest.mark.filterwarnings("ignore:data.aspects")
def test_buckets_are_drawn_alike_on_all_ranks(mixed, attach):
    one = [b["index"].tolist() for b in attach(ready(**mixed, seed=4)).train_dataloader()]
    shares = [
        [b["index"].tolist() for b in attach(ready(**mixed, seed=4), rank=r, world=2).train_dataloader()]
        for r in (0, 1)
    ]
    assert one == [a + b for a, b in zip(*shares)]
    other = [b["index"].tolist() for b in attach(ready(**mixed, seed=4), epoch=1).train_dataloader()]
    assert other != one
    with pytest.raises(UserError, match=r"data\.aspects: found 9:16 1 clips to evaluate, .* each of the 2 ranks"):
        attach(ready(**mixed), world=2).reference_dataloader("all")
    with pytest.raises(
        UserError, match=r"data\.batch_size: found 8, but no aspect has so many .*1:1 6, 16:9 7, 9:16 1"
    ):
        ready(**mixed | {"batch_size": 8}).train_dataloader()


def test_every_row_once_in_buckets_of_any_size():
    buckets = np.array([0] * 9 + [1] * 5 + [2] * 3)
    for world in (1, 3):
        shares = [
            list(BucketedBatchSampler(KeyedSampler(17), 4, buckets=buckets, rank=r, world=world, drop_last=False))
            for r in range(world)
        ]
        assert len({len(s) for s in shares}) == 1
        assert all(len(batch) for share in shares for batch in share)
        assert sorted(int(n) for share in shares for batch in share for n in batch) == list(range(17))
    with pytest.raises(ValueError, match="a bucket of 3 samples cannot be shared by 4 ranks"):
        BucketedBatchSampler(KeyedSampler(17), 4, buckets=buckets, rank=0, world=4, drop_last=False)


class Watch(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, batch_idx):
        assert batch["video"].is_floating_point()
        self.seen.append((batch["index"].tolist(), batch["text"], batch["video"].double().sum().item()))
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:data.aspects")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_sees_the_bits_of_a_run_never_stopped(workers, mixed, tmp_path):
    options = dict(mixed)
    options |= {"data_dir": str(options.pop("folder")), "size": 16, "val_fraction": 0.0, "dequantise": True, "seed": 1}

    def fit(*callbacks, ckpt=None):
        module = Watch()
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        quiet |= {"enable_model_summary": False, "use_distributed_sampler": False, "accelerator": "cpu"}
        trainer = Trainer(max_epochs=2, limit_val_batches=0, callbacks=list(callbacks), **quiet)
        trainer.fit(module, Video(num_workers=workers, **options), ckpt_path=ckpt, weights_only=True)
        return module.seen

    whole = fit()
    assert len(whole) == 12
    for step in (2, 6, 9):
        path = tmp_path / f"{step}.ckpt"
        fit(Save(step, path))
        assert fit(ckpt=path) == whole[step:]
