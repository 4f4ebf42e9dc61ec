import gc
import itertools

import numpy as np
import pytest
import torch

from penstock.datamodules.base import TensorStore, View
from penstock.datamodules.sampling import KeyedBatchSampler, KeyedLoader, KeyedSampler, PartneredBatchSampler, guarded
from penstock.lightning_modules.errors import UserError


def make(size, batch, *, rank=0, world=1, train=True, seed=0, epoch=0):
    sampler = KeyedSampler(size, seed=seed, shuffle=train)
    sampler.set_epoch(epoch)
    return KeyedBatchSampler(sampler, batch, rank=rank, world=world, drop_last=train)


class Echo:
    """Rows that return themselves; row 5 is broken when asked for."""

    def __init__(self, size, broken=False):
        self.size, self.broken = size, broken

    def __len__(self):
        return self.size

    def fetch(self, rows):
        if self.broken and 5 in rows:
            raise UserError("pictures/five.jpg: found a hole, expected an image")
        return {"index": torch.from_numpy(np.array(rows))}


def loader(size=40, batch=4, workers=0, seed=0, broken=False, train=True):
    return KeyedLoader(
        guarded(Echo(size, broken)),
        batch_sampler=make(size, batch, seed=seed, train=train),
        collate_fn=lambda b: b,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def seen(batches):
    return [b["index"].tolist() for b in batches]


def test_order_depends_on_seed_and_epoch_alone():
    orders = {
        (s, e): tuple(np.concatenate(list(make(50, 5, seed=s, epoch=e)))) for s, e in itertools.product((0, 1), (0, 1))
    }
    assert len(set(orders.values())) == 4
    assert all(sorted(o) == list(range(50)) for o in orders.values())
    assert orders[1, 1] == tuple(np.concatenate(list(make(50, 5, seed=1, epoch=1))))


@pytest.mark.parametrize("world", [2, 3, 4, 12])
def test_ranks_share_the_batches_of_one_process(world):
    whole = list(make(100, 12, seed=3, epoch=2))
    shares = [list(make(100, 12, rank=r, world=world, seed=3, epoch=2)) for r in range(world)]
    assert len(whole) == 8
    for k, batch in enumerate(whole):
        assert {len(s[k]) for s in shares} == {12 // world}
        assert np.array_equal(np.concatenate([s[k] for s in shares]), batch)


def test_evaluation_shows_every_sample_once_in_equally_many_batches():
    checked = 0
    for n, batch, world in itertools.product(range(1, 40), range(1, 12), range(1, 6)):
        if min(n, batch) < world:
            with pytest.raises(ValueError, match="cannot be shared"):
                make(n, batch, world=world, train=False)
            continue
        shares = [list(make(n, batch, rank=r, world=world, train=False)) for r in range(world)]
        assert len({len(s) for s in shares}) == 1
        assert len(shares[0]) == len(make(n, batch, world=world, train=False))
        assert min(len(part) for s in shares for part in s) >= 1
        together = [np.concatenate(parts) for parts in zip(*shares)]
        assert np.array_equal(np.concatenate(together), np.arange(n))
        assert max(map(len, together)) < batch + world
        checked += 1
    assert checked > 1000


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cut", [0, 1, 7, 10])
def test_loader_continues_where_its_state_was_taken(cut, workers):
    whole = loader(workers=workers)
    whole.batch_sampler.sampler.set_epoch(3)
    expected = seen(whole)
    assert len(expected) == 10

    stopped = loader(workers=workers)
    stopped.batch_sampler.sampler.set_epoch(3)
    batches = iter(stopped)
    head = seen(itertools.islice(batches, cut))
    state = stopped.state_dict() if cut else {"epoch": 3, "batches": 0, "length": 10}
    assert state == {"epoch": 3, "batches": cut, "length": 10}

    resumed = loader(workers=workers)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert head + seen(resumed) == expected
    assert seen(resumed) == expected, "the next pass starts from the beginning"


def test_state_of_another_epoch_starts_from_the_beginning():
    resumed = loader()
    resumed.load_state_dict({"epoch": 3, "batches": 10, "length": 10})
    resumed.batch_sampler.sampler.set_epoch(4)
    fresh = loader()
    fresh.batch_sampler.sampler.set_epoch(4)
    assert seen(resumed) == seen(fresh)


def test_epoch_set_after_iter_counts():
    late, early = loader(), loader()
    batches = iter(late)
    late.batch_sampler.sampler.set_epoch(6)
    early.batch_sampler.sampler.set_epoch(6)
    assert seen(batches) == seen(early)


def test_resume_with_another_batch_size_is_refused():
    resumed = loader(batch=8)
    resumed.load_state_dict({"epoch": 0, "batches": 3, "length": 10})
    with pytest.raises(UserError, match=r"stopped after 3 of 10 batches of epoch 0, but this run has 5 an epoch"):
        next(iter(resumed))


@pytest.mark.parametrize("workers", [0, 2])
def test_user_error_keeps_its_line_through_a_worker(workers):
    with pytest.raises(UserError, match=r"^pictures/five.jpg: found a hole, expected an image$"):
        list(loader(workers=workers, broken=True))


def test_workers_stop_at_once_after_an_error():
    broken = loader(workers=2, broken=True)
    with pytest.raises(UserError):
        list(broken)
    gc.disable()
    try:
        workers = broken._iterator._workers
        del broken
        assert not any(w.is_alive() for w in workers), "the loader is part of a reference cycle"
    finally:
        gc.enable()


def test_loader_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    quiet = KeyedLoader(guarded(Echo(8)), batch_sampler=make(8, 4), collate_fn=lambda b: b, generator=torch.Generator())
    list(quiet)
    assert torch.equal(before, torch.get_rng_state())


def test_partners_depend_on_seed_epoch_and_row_not_on_ranks():
    def pairs(world, epoch=0, seed=0):
        out = {}
        for rank in range(world):
            sampler = KeyedSampler(60, seed=seed, shuffle=True)
            sampler.set_epoch(epoch)
            batches = PartneredBatchSampler(sampler, 12, others=7, rank=rank, world=world, drop_last=True)
            out.update({int(a): int(b) for rows in batches for a, b in rows.T})
        return out

    one = pairs(1)
    assert one == pairs(3)
    assert set(one.values()) == set(range(7))
    assert one != pairs(1, epoch=1)
    assert one != pairs(1, seed=1)


def test_view_reports_numbers_of_the_whole_set():
    view = View(TensorStore(image=torch.arange(10) * 10), np.array([2, 5, 9]))
    batch = view.fetch(np.array([2, 0]))
    assert batch["index"].tolist() == [9, 2]
    assert batch["image"].tolist() == [90, 20]
    assert guarded(view)[1]["image"].item() == 50
