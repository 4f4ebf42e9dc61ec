"""Checkpoints under kill -9, full disks, damage, hostile files, other models; and inside Lightning's Trainer."""

import errno
import multiprocessing
import os
import pickle
import random
import resource
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from penstock.lightning_modules.checkpoints import AtomicCheckpointIO, load_checkpoint, load_weights, previous
from penstock.lightning_modules.errors import UserError

IO = AtomicCheckpointIO()


def save(path, step, size=1000):
    IO.save_checkpoint({"step": step, "state_dict": {"w": torch.full((size,), float(step))}}, path)


def one_line(error):
    return "\n" not in str(error.value)


def save_for_ever(path, first, acknowledge):
    if os.path.isdir("/dev/shm"):
        os.environ["TMPDIR"] = "/dev/shm"
    for step in range(first, 10**9):
        save(path, step, size=300_000)
        acknowledge.send(step)


def test_kill_9_at_any_moment_leaves_the_newest_or_previous_file(tmp_path):
    fork = multiprocessing.get_context("fork")
    rng, path, last = random.Random(0), tmp_path / "last.ckpt", -1
    for _ in range(20):
        inbox, outbox = fork.Pipe(duplex=False)
        worker = fork.Process(target=save_for_ever, args=(path, last + 1, outbox))
        worker.start()
        assert inbox.poll(20)
        time.sleep(rng.uniform(0, 0.04))
        worker.kill()
        worker.join()
        outbox.close()
        acknowledged = last
        while True:
            try:
                acknowledged = inbox.recv()
            except EOFError:
                break
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            checkpoint = load_checkpoint(path)
        last = checkpoint["step"]
        assert last in (acknowledged, acknowledged + 1)
        assert (checkpoint["state_dict"]["w"] == last).all()
    assert {p.name for p in tmp_path.iterdir()} <= {"last.ckpt", "last.ckpt.prev", ".last.ckpt.part"}


@pytest.mark.parametrize("interrupted", ["torch.save", "os.fsync", "os.link", "os.replace"])
def test_stop_between_any_two_steps_of_a_save(tmp_path, monkeypatch, interrupted):
    path = tmp_path / "last.ckpt"
    save(path, 1)
    save(path, 2)

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"penstock.lightning_modules.checkpoints.{interrupted}", stop)
    with pytest.raises(KeyboardInterrupt):
        save(path, 3)
    monkeypatch.undo()
    assert load_checkpoint(path)["step"] == 2
    save(path, 4)
    assert (load_checkpoint(path)["step"], load_checkpoint(previous(path))["step"]) == (4, 2)


def test_previous_file_is_kept_without_hard_links(tmp_path, monkeypatch):
    def no_links(*args):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    path = tmp_path / "last.ckpt"
    for step in range(3):
        save(path, step)
    assert (load_checkpoint(path)["step"], load_checkpoint(previous(path))["step"]) == (2, 1)


def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    save(path, 1)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UserError, match=r"last.ckpt': cannot be written \(No space left on device\); the file"
    ) as error:
        save(path, 2)
    assert one_line(error)
    assert load_checkpoint(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)$"):
        save(tmp_path / "first.ckpt", 2)


def save_with_little_room(path, answer):
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        save(path, 2, size=90_000)
    except Exception as error:
        answer.send((type(error).__name__, str(error)))


def test_disk_that_fills_up_inside_torch_save(tmp_path):
    path = tmp_path / "last.ckpt"
    save(path, 1, size=9_000)
    fork = multiprocessing.get_context("fork")
    inbox, outbox = fork.Pipe(duplex=False)
    worker = fork.Process(target=save_with_little_room, args=(path, outbox))
    worker.start()
    assert inbox.poll(20)
    message = f"checkpoint '{path}': cannot be written (File too large); the file written before it is intact"
    assert inbox.recv() == ("UserError", message)
    worker.join()
    assert load_checkpoint(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def cut(path):
    path.write_bytes(path.read_bytes()[:-700])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


DAMAGE = {
    "cut": (cut, r"cut short at \d+ bytes or damaged"),
    "flip": (flip, "does not match its checksum"),
    "empty": (lambda p: p.write_bytes(b""), "empty"),
    "text": (lambda p: p.write_text("not found"), "not a checkpoint"),
    "gone": (Path.unlink, "(?i)no such file"),
    "list": (lambda p: torch.save([1], p), "holds a list, not a dict"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_file_falls_back_to_the_one_before_it(tmp_path, kind):
    damage, message = DAMAGE[kind]
    path = tmp_path / "last.ckpt"
    save(path, 1)
    save(path, 2)
    damage(path)
    with pytest.warns(UserWarning, match=f"{message}.*; loaded '.*last.ckpt.prev', the one saved before it, instead"):
        assert load_checkpoint(path)["step"] == 1
    damage(previous(path))
    with pytest.raises(UserError, match=message) as error:
        load_checkpoint(path)
    assert one_line(error)


def test_damaged_and_nothing_before_it(tmp_path):
    path = tmp_path / "last.ckpt"
    save(path, 1)
    cut(path)
    with pytest.raises(UserError, match=r"last.ckpt': cut short at \d+ bytes or damaged; expected a whole checkpoint"):
        load_checkpoint(path)


def test_missing_file_remote_address_folder(tmp_path):
    save(tmp_path / "last.ckpt", 1)
    with pytest.raises(UserError, match=r"lost.ckpt': no such file \(did you mean 'last.ckpt'\?\)"):
        load_checkpoint(tmp_path / "lost.ckpt")
    with pytest.raises(UserError, match=r"no such file$"):
        load_checkpoint(tmp_path / "nowhere" / "last.ckpt")
    with pytest.raises(UserError, match="found a remote address"):
        load_checkpoint("s3://bucket/last.ckpt")
    with pytest.raises(UserError, match="Is a directory; expected a whole checkpoint file"):
        load_checkpoint(tmp_path)


class Hostile:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_hostile_file_is_refused_and_nothing_runs(tmp_path, form):
    path, target = tmp_path / "last.ckpt", tmp_path / "pwned"
    save(path, 1)
    save(path, 2)
    if form == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": Hostile(target)}, protocol=2))
    else:
        torch.save({"state_dict": Hostile(target)}, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match=r"refused, it holds 'posix.system', expected tensors and plain") as error:
        IO.load_checkpoint(path, weights_only=False)
    assert one_line(error)
    assert not target.exists()


def test_load_weights():
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    load_weights(target, {"state_dict": source.state_dict()})
    assert torch.equal(target.weight, source.weight)
    compiled = nn.Sequential(torch.compile(nn.Linear(3, 2)))
    assert "0._orig_mod.weight" in compiled.state_dict()
    load_weights(compiled, {"state_dict": {"0.weight": source.weight, "0.bias": source.bias}})
    assert torch.equal(compiled[0].weight, source.weight)
    load_weights(nn.Sequential(target), {"state_dict": compiled.state_dict()})
    assert torch.equal(target.weight, source.weight)


def test_weights_of_another_model(tmp_path):
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = module.state_dict()["0.weight"].clone()
    other = {"0.weight": torch.zeros(4, 3), "0.bias": torch.zeros(2), "1.weight": torch.zeros(2, 2), "tail": 1}
    path = tmp_path / "other.ckpt"
    IO.save_checkpoint({"state_dict": other}, path)
    expected = (
        f"checkpoint '{path}': weights of another model, not of Sequential: 1 of 4 expected keys missing (first "
        "'1.bias'); 1 unexpected (first 'tail'); 1 of another shape (first '0.weight': (4, 3), expected (2, 3))"
    )
    with pytest.raises(UserError) as error:
        load_weights(module, path)
    assert str(error.value) == expected
    assert torch.equal(module.state_dict()["0.weight"], before)
    with pytest.raises(UserError, match=r"found the keys \['model'\], expected 'state_dict' among them"):
        load_weights(module, {"model": {}})
    with pytest.raises(UserError, match=r"^ckpt_path=a.ckpt: weights of another model"):
        load_weights(module, {"state_dict": {}}, name="ckpt_path=a.ckpt")


class Tiny(pl.LightningModule):
    def __init__(self, width: int = 3):
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(width, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(12, 3), batch_size=3)


def trainer(folder, epochs, **checkpoint):
    keep = ModelCheckpoint(dirpath=folder, filename="{epoch}", auto_insert_metric_name=False, **checkpoint)
    return pl.Trainer(
        max_epochs=epochs, plugins=[AtomicCheckpointIO()], callbacks=[keep], logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def test_trainer_saves_resumes_and_removes(tmp_path):
    torch.manual_seed(0)
    whole = Tiny()
    start = {k: v.clone() for k, v in whole.state_dict().items()}
    trainer(tmp_path / "whole", 4).fit(whole)
    half = Tiny()
    half.load_state_dict(start)
    trainer(tmp_path / "half", 3, save_last=True).fit(half)
    assert {p.name for p in (tmp_path / "half").iterdir()} == {"2.ckpt", "last.ckpt", "last.ckpt.prev"}
    cut(tmp_path / "half" / "last.ckpt")
    resumed = Tiny()
    with pytest.warns(UserWarning, match="cut short"):
        trainer(tmp_path / "half", 4).fit(resumed, ckpt_path=tmp_path / "half" / "last.ckpt", weights_only=True)
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
    again = Tiny()
    trainer(tmp_path / "half", 4).fit(again, ckpt_path=tmp_path / "half" / "2.ckpt")
    assert torch.equal(again.layer.weight, whole.layer.weight)


def test_removal_takes_the_previous_file_along(tmp_path):
    path = tmp_path / "a.ckpt"
    save(path, 1)
    save(path, 2)
    (tmp_path / ".a.ckpt.part").touch()
    IO.remove_checkpoint(path)
    IO.remove_checkpoint(path)
    assert list(tmp_path.iterdir()) == []
