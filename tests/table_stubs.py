"""A small table of one's own, and a runner that runs nothing."""

import json

import yaml

from penstock.lightning_modules.cli.table import run_table

SMALL = """\
# a small table
title: Digits
metrics: [image_auroc, aupro]
tiers:
  smoke:
    note: Seconds.
    mean: true
    runs:
      - {row: file, column: ours, words: [experiment=fastflow_digits, "model.net.backbone.weights={weights}"]}
      - {column: ours, words: [experiment=fastflow_digits], each: {data.normal: [3, 4]}}
  paper:
    note: Days.
    mean: false
    runs:
      - {row: "3", column: ours, words: [experiment=fastflow_digits, data.normal=3, trainer.max_epochs=500]}
references:
  - name: others
    source: arXiv 0000.00000
    certainty: {default: recalled, mean: confirmed}
    values: {image_auroc: {"3": 0.75, mean: 0.7}}
  - name: elsewhere
    source: arXiv 0000.00001
    certainty: confirmed
    values: {aupro: {file: 0.25}}
"""


def own_table(tmp_path, monkeypatch):
    """A table of one's own, `small`; the function changes its text."""
    monkeypatch.setenv("PENSTOCK_CONF", str(tmp_path / "conf"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr("penstock.benchmarks.table_report.plot", lambda *_: None)
    path = tmp_path / "conf" / "table" / "small.yaml"
    path.parent.mkdir(parents=True)

    def write(old="", new=""):
        assert old in SMALL
        path.write_text(SMALL.replace(old, new, 1) if old else SMALL)

    write()
    (tmp_path / "net.safetensors").touch()
    return write


class Stub:
    """Runs nothing; leaves what a run would, and the words it was asked for."""

    def __init__(self, auroc=(0.9, 0.8, 0.7), stop_at=None, fail_at=None):
        self.auroc, self.stop_at, self.fail_at, self.asked = iter(auroc), stop_at, fail_at, []

    def __call__(self, words, environment, log):
        self.asked.append(words)
        folder = log.parent
        assert words[-1] == f"run_dir={folder}"
        self.environment = environment
        log.write_text("a line\n")
        if self.stop_at == len(self.asked):
            (folder / "checkpoints").mkdir()
            (folder / "checkpoints" / "last.ckpt").touch()
            raise KeyboardInterrupt
        if self.fail_at == len(self.asked):
            return 1
        data = {"class_path": "x.OneClass", "init_args": {"data": {"init_args": {"batch_size": 32}}}}
        config = {"seed_everything": 7, "data": data, "trainer": {"max_epochs": 20}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        (folder / "metrics.json").write_text(json.dumps({"image_auroc": next(self.auroc), "val/loss": 1.0}))
        return 0


def make(stub, *words, code=0):
    given = ["small", "out=out", "weights=net.safetensors", "seed=7", *words]
    assert run_table(given, stub) == code
    return stub


def report(folder, name="small_smoke"):
    text = (folder / "out" / f"{name}.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return text, rows, json.loads((folder / "out" / f"{name}.json").read_text())
