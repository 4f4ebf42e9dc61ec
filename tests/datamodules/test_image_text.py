"""Images with captions: digits, tar shards, parquet, folders; captions by (seed, epoch, row); what bad data says."""

import csv
import io
import json
import re
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from saving import Save
from tars import shard

from penstock.datamodules.image_text import NAMES, TEMPLATES, ImageText
from penstock.lightning_modules.errors import UserError

PICTURES = np.random.default_rng(0).integers(256, size=(12, 8, 8, 3), dtype=np.uint8)


def png(n):
    stream = io.BytesIO()
    Image.fromarray(PICTURES[n]).save(stream, "png")
    return stream.getvalue()


def ready(**options):
    data = ImageText(**options)
    data.prepare_data()
    data.setup()
    return data


def folder(path, captions=range(12), images=range(12)):
    for n in images:
        (path / f"{n:02d}.png").write_bytes(png(n))
    lines = [json.dumps({"file": f"{n:02d}.png", "text": f"picture {n}"}) for n in captions]
    (path / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return path


def shards(path, sizes=(7, 5), json_captions=False):
    rows = iter(range(sum(sizes)))
    for k, size in enumerate(sizes):
        members = []
        for n in islice(rows, size):
            caption = json.dumps({"caption": f"picture {n}"}) if json_captions else f"picture {n}\n"
            members += [(f"{n:02d}.png", png(n)), (f"{n:02d}.cls", str(n % 3).encode())]
            members += [(f"{n:02d}.{'json' if json_captions else 'txt'}", caption.encode())]
        shard(path / f"{k:04d}.tar", *members)
    return path


def parquet(path):
    (path / "data").mkdir()
    rows = {
        "image": [{"bytes": png(n), "path": None} for n in range(12)],
        "caption": [f"picture {n}" for n in range(12)],
    }
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.to_parquet(path / "data" / "train-00000-of-00001.parquet")
    return path


def whole(data, split="all"):
    batches = list(data.reference_dataloader(split))
    return torch.cat([b["image"] for b in batches]), [text for b in batches for text in b["text"]]


@pytest.mark.parametrize("make", [folder, shards, parquet])
def test_every_layout_gives_the_same_pictures_and_captions(make, tmp_path):
    data = ready(name="mine", data_dir=str(make(tmp_path)), batch_size=4, eval_batch_size=5)
    assert data.shape == (3, 8, 8)
    image, text = whole(data)
    assert torch.equal(((image + 1) * 127.5).round().byte(), torch.from_numpy(PICTURES).permute(0, 3, 1, 2))
    assert text == [f"picture {n}" for n in range(12)]
    assert data.num_classes == (3 if make is shards else 0)


def test_captions_in_json_and_in_csv_and_several_of_one_image(tmp_path):
    (tmp_path / "tar").mkdir()
    assert whole(ready(name="mine", data_dir=str(shards(tmp_path / "tar", json_captions=True)), batch_size=4))[1][
        3
    ] == ("picture 3")
    (tmp_path / "csv").mkdir()
    folder(tmp_path / "csv")
    (tmp_path / "csv" / "captions.jsonl").unlink()
    with open(tmp_path / "csv" / "captions.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "caption"])
        writer.writerows([f"{n:02d}.png", f"picture {n}, {word}"] for n in range(12) for word in ("one", "two"))
    data = ready(name="mine", data_dir=str(tmp_path / "csv"), batch_size=4)
    assert whole(data)[1][3] == "picture 3, one"
    assert data.captions[3] == ("picture 3, one", "picture 3, two")


def test_splits_are_subfolders(tmp_path):
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
    folder(tmp_path / "train", range(8), range(8))
    folder(tmp_path / "val", range(8, 12), range(8, 12))
    data = ready(name="mine", data_dir=str(tmp_path), batch_size=4, val_fraction=0.0)
    assert whole(data, "val")[1] == [f"picture {n}" for n in range(8, 12)]
    assert data.prompts(3, "val") == ([f"picture {n}" for n in (8, 9, 10)], None)


def test_digits_are_captioned_from_their_class():
    data = ready()
    assert (data.shape, data.num_classes) == ((1, 8, 8), 10)
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"image", "label", "index", "text"}
    wordings = {t.format(name): k for k, name in enumerate(NAMES) for t in TEMPLATES}
    assert [wordings[text] for text in batch["text"]] == batch["label"].tolist()
    used = [[t.format(NAMES[k]) for t in TEMPLATES].index(text) for text, k in zip(batch["text"], batch["label"])]
    assert set(used) == set(range(6))
    text, label = data.prompts(200)
    assert text == [f"a handwritten {NAMES[k]}" for k in label.tolist()]
    assert text[180:] == text[:20]
    rows = torch.arange(4000)
    assert [wordings[t] for t in data.texts(rows)][1617:3234] == [wordings[t] for t in data.texts(rows)][:1617]


def test_wordings_follow_seed_and_epoch_and_not_the_ranks(attach):
    def texts(**options):
        seed = options.pop("seed", 3)
        loader = attach(ready(batch_size=16, seed=seed), **options).train_dataloader()
        return [dict(zip(b["index"].tolist(), b["text"])) for b in loader]

    first = texts()
    assert first == texts()
    other = {k: v for b in texts(epoch=1) for k, v in b.items()}
    assert 0.6 < np.mean([other.get(k) != v for b in first for k, v in b.items()]) < 0.95
    shares = [texts(rank=r, world=2) for r in range(2)]
    assert first == [{**a, **b} for a, b in zip(*shares)]


class Watch(LightningModule):
    """Records samples and captions of every training batch, after workers, collation and the device transfer."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, batch_idx):
        assert type(batch["text"]) is list
        assert batch["image"].is_floating_point()
        self.seen.append((batch["index"].tolist(), batch["text"]))
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_reads_the_captions_of_a_run_never_stopped(workers, tmp_path):
    def fit(*callbacks, ckpt=None):
        module = Watch()
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        quiet |= {"enable_model_summary": False, "use_distributed_sampler": False, "accelerator": "cpu"}
        trainer = Trainer(max_epochs=2, limit_val_batches=0, callbacks=list(callbacks), **quiet)
        trainer.fit(module, ImageText(batch_size=400, num_workers=workers, seed=1), ckpt_path=ckpt, weights_only=True)
        return module.seen

    whole = fit()
    assert len(whole) == 8
    for step in (3, 6):
        path = tmp_path / f"{step}.ckpt"
        fit(Save(step, path))
        assert fit(ckpt=path) == whole[step:]


def test_the_fingerprint_counts_captions(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        folder(tmp_path / name)
    (tmp_path / "b" / "captions.jsonl").write_text((tmp_path / "a" / "captions.jsonl").read_text().replace("3", "4", 1))
    folder(tmp_path / "b", captions=[*range(11), 11])
    same = ready(name="x", data_dir=str(tmp_path / "a"), batch_size=4).fingerprint
    assert same == ready(name="x", data_dir=str(tmp_path / "b"), batch_size=4).fingerprint
    text = (tmp_path / "b" / "captions.jsonl").read_text().replace("picture 11", "picture eleven")
    (tmp_path / "b" / "captions.jsonl").write_text(text)
    assert same != ready(name="x", data_dir=str(tmp_path / "b"), batch_size=4).fingerprint


def says(pattern, path, **options):
    with pytest.raises(UserError) as caught:
        whole(ready(name="mine", data_dir=str(path), batch_size=2, **options))
    assert re.search(pattern, str(caught.value)), str(caught.value)


def test_a_folder_at_fault_is_named(tmp_path):
    folder(tmp_path)
    file = tmp_path / "captions.jsonl"
    good = file.read_text()
    says(r"no captions file; expected other\.csv there", tmp_path, captions="other.csv")
    file.unlink()
    says(r"no captions file; expected captions\.jsonl or captions\.csv there", tmp_path)
    file.write_text("\n".join(good.splitlines()[:-2]))
    says(r"10\.png: image without a caption in captions\.jsonl \(and 1 more\)", tmp_path)
    for line, pattern in (
        ('{"file": "../up.png", "text": "a"}', r"captions\.jsonl line 13: path '\.\./up\.png' leaves the data folder"),
        ('{"file": "no.png", "text": "a"}', r"line 13: no image 'no\.png' in"),
        ('{"file": "00.png", "txt": "a"}', r"line 13: no 'text'; found file, txt, expected one of text, caption"),
        ('{"file": "00.png", "text": " "}', r"line 13: found ' ', expected a caption"),
        ('{"file": "00.png"', r"line 13: not JSON"),
    ):
        file.write_text(f"{good}{line}\n")
        says(pattern, tmp_path)
    file.write_text(good)
    (tmp_path / "03.png").write_bytes(png(3)[:90])
    says(r"03\.png: cannot read the image .* expected a complete image", tmp_path)
    with pytest.raises(UserError, match=r"data\.data_dir: no folder for 'mine' .*PENSTOCK_DATA"):
        ready(name="mine")


def test_a_shard_at_fault_is_named(tmp_path):
    shards(tmp_path)
    path = tmp_path / "0001.tar"
    content = path.read_bytes()
    path.write_bytes(content[:1000])
    says(r"0001\.tar: (cut short|cannot be read)", tmp_path)
    shard(path, ("20.png", png(0)))
    says(r"0001\.tar:20: image without a caption; found \.png, expected \.txt or \.json", tmp_path)
    shard(path, ("20.txt", b"a"))
    says(r"0001\.tar:20: no image; found \.txt", tmp_path)


def test_a_table_without_captions_is_named(tmp_path):
    parquet(tmp_path)
    says(
        r"no caption column; found image, caption, expected 'captoin' \(did you mean 'caption'",
        tmp_path,
        caption_column="captoin",
    )
