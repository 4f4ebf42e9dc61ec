"""Prediction outlasts samples that cannot be read, and names them."""

import numpy as np
import pytest
import torch

from penstock.datamodules.base import KindDataModule
from penstock.datamodules.readable import PredictionLoader, Readable, refusal
from penstock.lightning_modules.errors import UserError


class Broken:
    """`n` samples of which some cannot be read."""

    def __init__(self, n, bad):
        self.n, self.bad = n, bad

    def __len__(self):
        return self.n

    def fetch(self, rows):
        for row in rows.tolist():
            if row in self.bad:
                raise UserError(f"{row}.png: cannot be read")
        return {"x": torch.from_numpy(rows) * 10, "text": [str(row) for row in rows.tolist()]}


def test_what_can_be_read_is_left():
    rows = Readable(Broken(6, {1, 4}))
    assert len(rows) == 6
    assert rows.fetch(np.array([2, 3])).keys() == {"x", "text"}
    found = rows.fetch(np.array([3, 4, 5, 1]))
    assert (found["x"].tolist(), found["text"]) == ([30, 50], ["3", "5"])
    assert found["unreadable"] == {4: "4.png: cannot be read", 1: "1.png: cannot be read"}


class Uneven(Broken):
    """Samples of several sizes, padded to the largest of a batch, and lists of several lengths."""

    def fetch(self, rows):
        super().fetch(rows)
        return {"x": torch.ones(len(rows), int(rows.max())), "boxes": [torch.ones(row) for row in rows.tolist()]}


def test_samples_of_several_sizes_are_left_as_one_batch():
    found = Readable(Uneven(6, {1, 5})).fetch(np.array([2, 1, 4, 5]))
    assert (found["x"].shape, [len(boxes) for boxes in found["boxes"]]) == ((2, 4), [2, 4])
    assert found["unreadable"].keys() == {1, 5}


def test_no_batch_is_empty():
    found = Readable(Broken(6, {0, 1, 4})).fetch(np.array([4, 1]))
    assert (found["x"].tolist(), set(found["unreadable"])) == ([20], {1, 4})
    with pytest.raises(UserError, match=r"^4\.png: cannot be read$"):
        Readable(Broken(6, set(range(6)))).fetch(np.array([4, 1]))


def test_the_loader_keeps_what_was_wrong():
    rows = Readable(Broken(5, {0, 3}))
    loader = PredictionLoader([rows.fetch(np.array(b)) for b in ([0, 1], [2], [3, 4])])
    assert [batch["x"].tolist() for batch in loader] == [[10], [20], [40]]
    assert set(loader.unreadable) == {0, 3}


def test_one_line_names_all():
    error = refusal({3: "/a/d.png: cannot be read (x: y)"})
    assert str(error) == "/a/d.png: cannot be read (x: y); all others were predicted"
    assert error.everywhere
    lines = {3: "/a/d.png: cannot be read", 1: "/a/b.png: cut (x: y)", 7: "/a/h.png: small"}
    assert str(refusal(lines)) == "/a/b.png: cut (x: y); nor can be read: /a/d.png, /a/h.png; all others were predicted"


@pytest.mark.parametrize("workers", [0, 2])
def test_data_name_it_after_the_prediction(workers):
    class Data(KindDataModule):
        def build(self):
            rows = np.arange(5)
            return Store(), {"train": rows[:0], "val": rows[:0], "test": rows}

    class Store:
        def warm(self, numbers):
            pass

        def fetch(self, numbers):
            return Broken(5, {2}).fetch(numbers)

    data = Data(batch_size=2, eval_batch_size=None, num_workers=workers, seed=None)
    data.setup()
    data.teardown("predict")
    batches = list(data.predict_dataloader())
    assert [batch["index"].tolist() for batch in batches] == [[0, 1], [3], [4]]
    data.teardown("fit")
    with pytest.raises(UserError, match=r"^2\.png: cannot be read; all others were predicted$"):
        data.teardown("predict")
