"""Anomalies by likelihood: spoiled clips, other data, areas under curves by another library, the table of scores."""

import csv
import math

import pytest
import torch
from lightning.pytorch import LightningModule
from torchmetrics.functional.classification import binary_auroc

from penstock.datamodules.digits import Digits
from penstock.datamodules.moving_digits import MovingDigits
from penstock.lightning_modules.callbacks.anomalies import ANOMALIES, spoiled
from penstock.lightning_modules.callbacks.density import dequantised
from penstock.lightning_modules.callbacks.likelihood_anomaly import LikelihoodAnomaly
from penstock.lightning_modules.callbacks.likelihood_scores import LikelihoodScores
from penstock.lightning_modules.errors import UserError


class Walk(LightningModule):
    """Frames that differ from the ones before by noise of one size; images that are near black."""

    num_classes = 0

    def condition(self, batch):
        return None

    def log_prob(self, x, *, cond=None, generator=None):
        return self.frame_log_prob(x).sum(1) if x.ndim == 5 else -(x + 1).square().flatten(1).sum(1)

    def frame_log_prob(self, x, *, cond=None):
        return -torch.cat([x[:, :1], x.diff(dim=1)], 1).square().flatten(2).sum(2)

    def validation_step(self, batch, batch_idx):
        pass

    test_step = validation_step


def moving(**options):
    defaults = {"frames": 6, "height": 12, "width": 12, "n_train": 4, "n_val": 4, "n_test": 50, "batch_size": 16}
    return MovingDigits(**defaults | options)


def score(fakes, folder, callback, data):
    return fakes.quiet_trainer(folder, [callback]).test(Walk(), datamodule=data, verbose=False)[0]


def test_what_is_wrong_with_the_clips():
    clips = torch.randn(9, 5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    index = torch.arange(10, 19)
    made = {anomaly: spoiled(clips, index, anomaly) for anomaly in ANOMALIES}
    assert torch.equal(made["reversed"][0], clips[:, [4, 3, 2, 1, 0]])
    assert torch.equal(made["frozen"][0], clips[:, [0] * 5])
    shuffled = made["shuffled"][0]
    assert torch.equal(shuffled.sort(1).values, clips.sort(1).values)
    assert not torch.equal(shuffled, clips)
    again, _ = spoiled(clips[3:6], index[3:6], "shuffled")
    assert torch.equal(again, shuffled[3:6]), "what is drawn does not depend on the batch"
    replaced, strange = made["replaced"]
    assert (strange.sum(1) == 1).all()
    assert not strange[:, 0].any()
    assert len(strange.nonzero()[:, 1].unique()) > 1
    assert torch.equal(replaced[strange], clips.roll(1, 0)[strange])
    assert torch.equal(replaced[~strange], clips[~strange])
    assert not any(made[anomaly][1].any() for anomaly in ("shuffled", "reversed", "frozen"))
    assert len(spoiled(clips[:1], index[:1], "replaced")[0]) == 0


def test_areas_are_torchmetrics(fakes, tmp_path):
    data = moving()
    found = score(fakes, tmp_path, LikelihoodAnomaly(n=49), data)
    scores, worst, frames = *({kind: [] for kind in ("whole", *ANOMALIES)} for _ in range(2)), []
    rest = 49
    for batch in data.reference_dataloader("test"):
        video, index = batch["video"][:rest], batch["index"][:rest]
        rest -= len(index)
        clips = {"whole": (video, None)} | {kind: spoiled(video, index, kind) for kind in ANOMALIES}
        for kind, (clip, strange) in clips.items():
            bits = -Walk().frame_log_prob(dequantised(clip, index, 17)) if len(clip) else torch.empty(0, 6)
            scores[kind].append(bits.sum(1))
            worst[kind].append(bits.amax(1))
            if kind == "replaced":
                frames.append((bits[:, 1:].flatten(), strange[:, 1:].flatten()))
    assert [len(torch.cat(scores[kind])) for kind in ("whole", "shuffled", "replaced")] == [49, 49, 48]
    for name, by_kind in (("anomaly_auroc", scores), ("anomaly_worst_frame_auroc", worst)):
        whole = torch.cat(by_kind["whole"])
        for kind in ANOMALIES:
            both = torch.cat([whole, *by_kind[kind]])
            area = binary_auroc(both / both.max(), (torch.arange(len(both)) >= 49).long())
            assert found.pop(f"{name}/{kind}") == pytest.approx(float(area), abs=1e-3)
            if (name, kind) == ("anomaly_auroc", "shuffled"):
                assert area > 0.65
            if (name, kind) == ("anomaly_auroc", "frozen"):
                assert area < 0.2
    bits, strange = (torch.cat(column) for column in zip(*frames))
    area = float(binary_auroc(bits / bits.max(), strange.long()))
    assert found.pop("anomaly_frame_auroc/replaced") == pytest.approx(area, abs=1e-3)
    assert not found
    assert area > 0.8


def test_other_data_are_told_from_the_own(fakes, tmp_path):
    other = Digits(batch_size=64)
    loader = other.reference_dataloader
    other.reference_dataloader = lambda split: ({**b, "image": -b["image"]} for b in loader(split))
    found = score(fakes, tmp_path, LikelihoodAnomaly(other=other, n=70), Digits(batch_size=64))
    assert found == {"anomaly_auroc/other": 1.0}
    found = score(fakes, tmp_path, LikelihoodAnomaly(other=Digits(batch_size=64), n=70), Digits(batch_size=32))
    assert found == {"anomaly_auroc/other": 0.5}


def test_a_table_of_scores(fakes, tmp_path):
    data = moving()
    score(fakes, tmp_path, LikelihoodScores(n=20), data)
    with open(tmp_path / "likelihood.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["index", "log_prob", "bits_per_dim", *(f"frame_{k}" for k in range(6))]
    batch = next(iter(data.reference_dataloader("test")))
    assert [int(row["index"]) for row in rows[:16]] == batch["index"].tolist()
    assert len(rows) == 20
    log_prob = Walk().log_prob(dequantised(batch["video"], batch["index"], 17))
    assert [float(row["log_prob"]) for row in rows[:16]] == pytest.approx(log_prob.tolist(), rel=1e-5)
    bits = -log_prob / 864 / math.log(2) + math.log2(8.5)
    assert [float(row["bits_per_dim"]) for row in rows[:16]] == pytest.approx(bits.tolist(), rel=1e-5)
    mean = sum(float(rows[0][f"frame_{k}"]) for k in range(6)) / 6
    assert mean == pytest.approx(float(rows[0]["bits_per_dim"]))
    score(fakes, tmp_path, LikelihoodScores(n=3), Digits(batch_size=64))
    assert (tmp_path / "likelihood.csv").read_text().splitlines()[0] == "index,log_prob,bits_per_dim"


def test_refusals(fakes, tmp_path):
    with pytest.raises(UserError, match=r"anomalies: no 'shufled' \(did you mean 'shuffled'\?\); shuffled, reversed"):
        LikelihoodAnomaly(["shufled"])
    for kind in (LikelihoodAnomaly, LikelihoodScores):
        with pytest.raises(UserError, match="n: 0 samples given"):
            kind(n=0)
    with pytest.raises(UserError, match=r"anomalies: frozen of data of shape \(1, 8, 8\); expected videos"):
        score(fakes, tmp_path, LikelihoodAnomaly(["frozen"]), Digits())
    with pytest.raises(UserError, match="no anomalies to tell from the data"):
        score(fakes, tmp_path, LikelihoodAnomaly(), Digits())
    with pytest.raises(UserError, match=r"other: data of shape \(1, 8, 8\), expected \(6, 1, 12, 12\)"):
        score(fakes, tmp_path, LikelihoodAnomaly(other=Digits()), moving())
    module, _ = fakes.digits_module_and_data()
    with pytest.raises(UserError, match="anomaly_auroc: FakeModule has no log_prob"):
        fakes.quiet_trainer(tmp_path, [LikelihoodAnomaly()]).test(module, datamodule=moving())
