"""The DataModule of a teacher's pairs: what batches hold, splits, reference, workers, online, refusals."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from penstock.datamodules.digits import Digits
from penstock.datamodules.pair import Pair
from penstock.datamodules.pairs import Pairs
from penstock.datamodules.points import Points
from penstock.datamodules.real_pairs import RealPairs, SourcePairs
from penstock.kernels.philox import Draws
from penstock.lightning_modules.build import model_from_checkpoint
from penstock.lightning_modules.cli import main
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.solvers import Heun

SMALL = {"n": 60, "steps": 2, "pairs_batch": 10, "shard": 20, "batch_size": 8, "val_fraction": 0.2}


def ready(teacher, folder=None, **options):
    options = SMALL | options
    data = Pairs(Digits(), None if teacher is None else str(teacher), folder=folder and str(folder), **options)
    data.prepare_data()
    data.setup()
    return data


@pytest.fixture(scope="module")
def data(teacher):
    return ready(teacher)


def test_batches_hold_pairs(data, teacher):
    model = model_from_checkpoint(teacher)
    batch = next(iter(data.train_dataloader()))
    assert {k: tuple(v.shape) for k, v in batch.items()} == {
        "source": (8, 1, 8, 8),
        "image": (8, 1, 8, 8),
        "label": (8,),
        "index": (8,),
    }
    assert torch.equal(batch["source"], Draws(0, 0, batch["index"]).normal("pairs", (1, 8, 8)))
    with torch.no_grad():
        expected = model.decode(batch["source"], steps=2, cond=batch["label"])
    torch.testing.assert_close(batch["image"], expected)


def test_every_pair_is_in_one_split(data):
    train, val = (set(data.numbers[split].tolist()) for split in ("train", "val"))
    assert len(train) == 48
    assert train | val == set(range(60))
    assert not train & val
    seen = torch.cat([batch["index"] for batch in data.val_dataloader()])
    assert set(seen.tolist()) == val
    assert len(data.test_dataloader()) == len(data.val_dataloader())


def test_metrics_see_real_images(data):
    real = Digits()
    real.setup()
    for split in ("train", "all"):
        ours = torch.cat([b["image"] for b in data.reference_dataloader(split)])
        theirs = torch.cat([b["image"] for b in real.reference_dataloader(split)])
        assert torch.equal(ours, theirs)
    assert (data.shape, data.num_classes, data.levels) == (real.shape, real.num_classes, real.levels)
    assert data.fingerprint != real.fingerprint == data.reference_fingerprint


def test_workers_read_the_same(data, teacher):
    one, two = data.train_dataloader(), ready(teacher, num_workers=2).train_dataloader()
    for a, b in zip(one, two, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_folder_without_its_teacher(teacher, tmp_path):
    made = ready(teacher, tmp_path / "p")
    read = ready(None, tmp_path / "p", n=40)
    assert torch.equal(
        read.store.fetch(made.numbers["train"][:3])["image"], made.store.fetch(made.numbers["train"][:3])["image"]
    )
    assert sum(map(len, read.numbers.values())) == 40
    assert sum(map(len, ready(None, tmp_path / "p", n=None).numbers.values())) == 60
    with pytest.raises(UserError, match=r"p': 60 pairs, expected data.n=61; give data.n=60, or data.n=null"):
        ready(None, tmp_path / "p", n=61)
    (tmp_path / "p" / "shard_000001.safetensors").unlink()
    with pytest.raises(UserError, match=r"shard_000001.safetensors is missing; finish them with penstock pairs"):
        ready(None, tmp_path / "p")


def test_a_shard_cut_short_is_named(teacher, tmp_path):
    ready(teacher, tmp_path / "p")
    path = tmp_path / "p" / "shard_000002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"shard_000002.safetensors': \d+ bytes, expected \d+"):
        ready(teacher, tmp_path / "p")
    path.write_bytes(b"none")
    with pytest.raises(UserError, match=r"shard_000002.safetensors': not a shard"):
        ready(None, tmp_path / "p")


def test_no_folder_and_no_teacher(tmp_path):
    with pytest.raises(UserError, match=r"data.teacher: found none"):
        Pairs(Digits())
    with pytest.raises(UserError, match=r"no pairs.json there"):
        ready(None, tmp_path)


def test_a_teacher_of_another_shape(make_teacher):
    with pytest.raises(UserError, match=r"makes samples \(1, 16, 16\), expected \(1, 8, 8\)"):
        ready(make_teacher("shape=[1,16,16]"))


def online(teacher, *, training=True, epoch=0):
    data = Pairs(Digits(), str(teacher), online=True, **SMALL)
    data.trainer = SimpleNamespace(
        training=training,
        current_epoch=epoch,
        overfit_batches=0,
        distributed_sampler_kwargs=None,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    data.setup()
    return data


def test_online_pairs_are_new_in_every_epoch_and_store_nothing(make_teacher):
    teacher = make_teacher(seed=2)
    model, seen = model_from_checkpoint(teacher), []
    for epoch in (0, 1, 1):
        data = online(teacher, epoch=epoch)
        batch = data.on_after_batch_transfer({"index": torch.arange(7)}, 0)
        assert torch.equal(batch["source"], Draws(0, epoch, batch["index"]).normal("pairs", (1, 8, 8)))
        with torch.no_grad():
            torch.testing.assert_close(batch["image"], model.decode(batch["source"], steps=2, cond=batch["label"]))
        seen.append(batch["source"])
    assert torch.equal(seen[1], seen[2])
    assert not torch.equal(seen[0], seen[1])
    fixed = [
        online(teacher, training=False, epoch=e).on_after_batch_transfer({"index": torch.arange(7)}, 0) for e in (0, 5)
    ]
    assert torch.equal(fixed[0]["image"], fixed[1]["image"])
    assert not (teacher.parents[1] / "pairs").exists()
    assert next(iter(online(teacher).train_dataloader()))["index"].shape == (8,)


def test_real_pairs_are_training_images_and_their_codes(teacher, tmp_path):
    real = Digits()
    real.setup()
    data = RealPairs(Digits(), str(teacher), folder=str(tmp_path), solver=Heun(), **{**SMALL, "n": 45})
    data.setup()
    rows = np.array([0, 7, 44])
    batch = data.store.fetch(rows)
    expected = real.finished(real.view("train").fetch(rows))
    assert torch.equal(batch["image"], expected["image"])
    assert torch.equal(batch["label"], expected["label"])
    model = model_from_checkpoint(teacher)
    with torch.no_grad():
        code = model.integrate(batch["image"], 2, cond=batch["label"], solver=Heun(), reverse=True).x
    torch.testing.assert_close(batch["source"], code, rtol=1e-4, atol=1e-4)
    everything = RealPairs(Digits(), str(teacher), **{**SMALL, "n": 10**6, "pairs_batch": 500, "shard": 1000})
    everything.setup()
    assert sum(map(len, everything.numbers.values())) == len(real.numbers["train"])
    with pytest.raises(UserError, match=r"data.keep: pairs of real data keep both ends"):
        RealPairs(Digits(), str(teacher), keep=[0, 2], **SMALL).setup()
    with pytest.raises(UserError, match=r"data.online"):
        RealPairs(Digits(), str(teacher), online=True, **SMALL).setup()


def modes(size=80):
    return Pair(Points("three_modes_source", size=size), Points("three_modes", size=size))


def test_pairs_from_a_source_data_set(make_teacher, tmp_path):
    teacher = make_teacher(experiment="rectified_flow_three_modes")
    data = SourcePairs(modes(), str(teacher), folder=str(tmp_path), **{**SMALL, "n": 70})
    data.setup()
    source = Points("three_modes_source", size=80)
    source.setup()
    rows = np.array([0, 9, 69])
    batch = data.store.fetch(rows)
    assert torch.equal(batch["source"], source.view("train").fetch(rows)["points"])
    with torch.no_grad():
        expected = model_from_checkpoint(teacher).decode(batch["source"], steps=2)
    torch.testing.assert_close(batch["points"], expected)
    assert torch.equal(data.starts(5), source.view("test").fetch(np.arange(5))["points"])
    assert len(data.starts(100)) == 8
    everything = SourcePairs(modes(), str(teacher), **{**SMALL, "n": 10**6})
    everything.setup()
    assert sum(map(len, everything.numbers.values())) == 80
    states = SourcePairs(modes(), str(teacher), keep=[0, 1, 2], **SMALL)
    states.setup()
    assert states.store.fetch(rows[:2])["states"].shape == (2, 3, 2)
    with pytest.raises(UserError, match=r"data.online"):
        SourcePairs(modes(), str(teacher), online=True, **SMALL).setup()
    with pytest.raises(UserError, match=r"data.real: found Digits, expected Pair"):
        SourcePairs(Digits(), str(teacher), **SMALL).setup()


def test_noise_and_a_source_are_not_mixed_up(make_teacher, tmp_path, capsys):
    flows = {name: make_teacher(experiment=f"rectified_flow_{name}") for name in ("points", "three_modes")}
    with pytest.raises(UserError, match=r"a flow from data, expected one from noise; its pairs .* SourcePairs"):
        Pairs(Points(size=80), str(flows["three_modes"]), **SMALL).setup()
    with pytest.raises(UserError, match=r"a flow from noise, expected one from data; its pairs .* Pairs"):
        SourcePairs(modes(), str(flows["points"]), **SMALL).setup()
    assert main(["pairs", f"ckpt_path={flows['three_modes']}", f"out={tmp_path / 'p'}"]) == 2
    assert "a flow from data, expected one from noise" in capsys.readouterr().err
    assert not (tmp_path / "p").exists()
