"""Captions without images: what batches hold, what is held out, what is refused."""

import pytest

from penstock.datamodules.captions import Captions
from penstock.lightning_modules.errors import UserError


def test_batches_have_a_caption_for_each_number(tmp_path):
    lines = [f"caption {n}" for n in range(20)]
    (tmp_path / "c.txt").write_text("\n\n".join(lines) + "\n")
    data = Captions(str(tmp_path / "c.txt"), batch_size=4, val_fraction=0.2)
    data.setup()
    seen = {}
    for batch in data.train_dataloader():
        assert len(batch["text"]) == 4
        seen |= dict(zip(batch["index"].tolist(), batch["text"]))
    held = {n: text for batch in data.test_dataloader() for n, text in zip(batch["index"].tolist(), batch["text"])}
    assert (len(seen), len(held)) == (16, 4)
    assert seen | held == dict(enumerate(lines))
    texts, labels = data.prompts(6)
    assert texts == [*held.values(), *held.values()][:6]
    assert labels is None


def test_refusals(tmp_path):
    with pytest.raises(UserError, match="found none; expected a text file"):
        Captions().setup()
    with pytest.raises(UserError, match="no file or folder"):
        Captions(str(tmp_path / "absent.txt")).setup()
