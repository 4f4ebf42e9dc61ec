"""Tables: the files of `conf/table`, and what runs, keeps and reports them, with a stub that runs nothing."""

import json
import shlex
import shutil
from statistics import fmean

import pytest
import yaml
from PIL import Image

from penstock.benchmarks import tables
from penstock.benchmarks.table_report import plot
from penstock.benchmarks.table_rows import fit, key_of
from penstock.benchmarks.table_spec import MEAN, read
from penstock.lightning_modules.cli import main as penstock
from penstock.lightning_modules.cli.compose import compose
from penstock.lightning_modules.cli.conf import groups, options
from penstock.lightning_modules.errors import UserError

TABLES = list(options("table"))
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


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A table of one's own, `small`; the function changes its text."""
    monkeypatch.setenv("PENSTOCK_CONF", str(tmp_path / "conf"))
    monkeypatch.chdir(tmp_path)
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
    given = ["small", "--out", "out", "--weights", "net.safetensors", "--seed", "7", *words]
    assert tables.main(given, stub) == code
    return stub


def report(folder, name="small_smoke"):
    text = (folder / "out" / f"{name}.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return text, rows, json.loads((folder / "out" / f"{name}.json").read_text())


def test_our_numbers_stand_beside_those_of_others(own, tmp_path):
    make(Stub())
    text, rows, record = report(tmp_path)
    assert rows[:2] == [["row", "ours (ours, smoke)", "others"], ["---"] * 3]
    assert rows[2:6] == [
        ["file", "0.900", ""],
        ["3", "0.800", "0.750*"],
        ["4", "0.700", ""],
        ["mean", "0.800", "0.700"],
    ]
    assert "3 of 3 runs finished" in text
    assert "others: arXiv 0000.00000 (recalled, mean: confirmed)" in text
    first = record["rows"][0]
    assert "model.net.backbone.weights=net.safetensors" in first["words"]
    assert str(tmp_path) not in json.dumps(record["rows"])
    assert (first["tier"], first["seed"], first["batch"], first["epochs"]) == ("smoke", 7, 32, 20)
    assert first["machine"].keys() >= {"cpu", "cores", "torch", "lightning", "commit"}
    assert first["seconds"] >= 0
    head = next(row for row in rows if "status" in row)
    assert {"tier", "seed", "batch", "epochs", "wall time, s", "machine", "versions", "commit"} <= {*head}


def test_the_plot_is_a_picture_also_of_unfinished_rows(tmp_path):
    table = read("fastflow_mvtec")
    tier = table.tier("small")
    plot(table, tier, {tier.cell("carpet", "ResNet-18")[0]: {"metrics": {"pixel_auroc": 0.9}}}, tmp_path / "a.png")
    width, height = Image.open(tmp_path / "a.png").size
    assert width > height > 500


def test_seeds_of_a_tier_make_a_mean_and_a_deviation(own, tmp_path, capsys):
    own("note: Days.\n    mean: false", "note: Days.\n    mean: false\n    seeds: [3, 5, 9]")
    given = ["small", "--out", "out", "--tier", "paper"]
    stub = Stub([0.7, 0.8, 0.9], stop_at=3)
    assert tables.main(given, stub) == 130
    assert [word for words in stub.asked for word in words if word.startswith("seed_everything")] == [
        f"seed_everything={seed}" for seed in (3, 5, 9)
    ]
    assert report(tmp_path, "small_paper")[1][2] == ["3", "0.750 +- 0.071 (2 of 3)", "0.750*"]
    assert tables.main(given, Stub([0.9])) == 0
    text, rows, record = report(tmp_path, "small_paper")
    assert rows[2] == ["3", "0.800 +- 0.100", "0.750*"]
    assert "3 of 3 runs finished" in text
    assert [row["metrics"]["image_auroc"] for row in record["rows"]] == [0.7, 0.8, 0.9]
    capsys.readouterr()
    assert tables.main([*given, "--seed", "1"], Stub()) == 2
    assert "--seed 1: tier paper of small has seeds of its own" in capsys.readouterr().err


def test_a_run_may_have_seeds_of_its_own(own, tmp_path):
    own(
        'note: Days.\n    mean: false\n    runs:\n      - {row: "3",',
        "note: Days.\n    mean: false\n    seeds: [3, 5]\n    "
        'runs:\n      - {row: "4", column: ours, words: [experiment=fastflow_digits]}\n      - {row: "3", seeds: [8],',
    )
    assert [(run.row, run.seed) for run in read("small").tier("paper").runs] == [("4", 3), ("4", 5), ("3", 8)]


def test_runs_of_the_report_already_there_count_as_finished(own, tmp_path):
    make(Stub(fail_at=3), code=1)
    shutil.rmtree(tmp_path / "out" / "rows")
    assert len(make(Stub(auroc=[0.5])).asked) == 1
    assert [row[1] for row in report(tmp_path)[1][2:5]] == ["0.900", "0.800", "0.500"]


def test_finished_rows_are_kept_by_their_configuration(own, tmp_path):
    assert len(make(Stub()).asked) == 3
    assert make(Stub()).asked == []
    assert report(tmp_path)[2]["rows"][1]["metrics"]["image_auroc"] == 0.8
    assert len(make(Stub(), "--word", "trainer.max_epochs=3").asked) == 3
    own("data.normal: [3, 4]", "data.normal: [4, 5]")
    (words,) = make(Stub(auroc=[0.6])).asked
    assert "data.normal=5" in words


def test_the_hash_is_of_the_configuration(own, tmp_path):
    words = ["experiment=fastflow_digits"]
    assert key_of([*words, "data.normal=0"], None) == key_of(words, None)  # what the experiment says anyway
    assert key_of([*words, "data.normal=1"], None) != key_of(words, None)
    moved = [tmp_path / folder / "net.safetensors" for folder in ("a", "b")]
    same = {key_of([*words, f"model.net.backbone.weights={path}"], path) for path in moved}
    assert len(same) == 1
    assert same != {key_of(words, None)}


def test_a_stopped_table_reports_and_goes_on(own, tmp_path, capsys):
    make(Stub(stop_at=2), code=130)
    assert "the same command goes on" in capsys.readouterr().err
    text, rows, _ = report(tmp_path)
    assert "1 of 3 runs finished" in text
    assert rows[5] == ["mean", "0.900 (1 of 3)", "0.700"]
    assert [row[3] for row in rows if row[0] in ("file", "3", "4") and row[2] == "smoke"] == [
        "done",
        "not run",
        "not run",
    ]
    on, new = make(Stub(auroc=[0.8, 0.7])).asked
    assert on[1].startswith("ckpt_path=")
    assert on[1].endswith("checkpoints/last.ckpt")
    assert new[1] == "experiment=fastflow_digits"
    record = report(tmp_path)[2]
    assert [row["attempts"] for row in record["rows"]] == [1, 2, 1]


def test_a_failed_row_is_shown_and_tried_again(own, tmp_path, capsys):
    make(Stub(fail_at=2), code=1)
    assert "failed with exit code 1" in capsys.readouterr().err
    _, rows, _ = report(tmp_path)
    assert rows[3] == ["3", "", "0.750*"]
    assert rows[5][1] == "0.850 (2 of 3)"
    assert [row[3] for row in rows if row[0] == "3" and row[2] == "smoke"] == ["failed"]
    assert len(make(Stub(auroc=[0.7])).asked) == 1


def test_tiers_have_reports_of_their_own(own, tmp_path):
    make(Stub(auroc=[0.5]), "--tier", "paper")
    _, rows, record = report(tmp_path, "small_paper")
    assert rows[2] == ["3", "0.500", "0.750*"]
    assert MEAN not in [row[0] for row in rows]
    assert {row["tier"] for row in record["rows"]} == {"paper"}
    assert [ref["name"] for ref in record["references"]] == ["others"]
    assert not (tmp_path / "out" / "small_smoke.md").exists()


def test_dry_run_prints_commands_that_compose(own, tmp_path, capsys):
    stub = make(Stub(), "--dry-run", "--data", ".", "--only", "3")
    assert stub.asked == []
    variable, program, verb, *words = shlex.split(capsys.readouterr().out)
    assert (variable, program, verb) == (f"PENSTOCK_DATA={tmp_path}", "penstock", "fit")
    assert words[-1] == f"run_dir={tmp_path}/out/rows/{key_of(words[:-2], None)}"
    assert compose(words[:-1])[0]["data"]["init_args"]["normal"] == 3
    assert not (tmp_path / "out").exists()


def test_rows_can_be_run_one_by_one(own, tmp_path):
    make(Stub(auroc=[0.8]), "--only", "3")
    assert len(make(Stub(auroc=[0.7]), "--only", "4").asked) == 1
    rows = report(tmp_path)[1]
    assert rows[2:6] == [
        ["file", "", ""],
        ["3", "0.800", "0.750*"],
        ["4", "0.700", ""],
        ["mean", "0.750 (2 of 3)", "0.700"],
    ]
    assert tables.main(["small", "--out", "out", "--seed", "7", "--only", "4"], Stub()) == 0  # needs no weights


def test_a_run_that_is_stopped_ends_before_its_table(own, tmp_path, monkeypatch):
    """The run hears of Ctrl-C once, and is waited for."""
    heard = []

    class Child:
        def __init__(self, *_, **options):
            assert options["start_new_session"]

        def wait(self):
            if not heard:
                raise KeyboardInterrupt
            return 130

        def send_signal(self, number):
            heard.append(number)

    monkeypatch.setattr("penstock.benchmarks.table_rows.subprocess.Popen", Child)
    with pytest.raises(KeyboardInterrupt):
        fit([], {}, tmp_path / "log")
    assert len(heard) == 1


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["smal"], ["table 'smal'", "did you mean 'small'?"]),
        (["small", "--only", "5"], ["--only 5: no such row", "file, 3, 4"]),
        (["small", "--tier", "small"], ["no tier 'small'", "smoke, paper"]),
        (["small"], ["row 'file'", "--weights FILE"]),
        (["small", "--weights", "none.pth"], ["none.pth: no such file"]),
        (["small", "--data", "none"], ["none: no such folder"]),
    ],
)
def test_mistakes(words, parts, own, capsys):
    assert tables.main(words, Stub()) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("title: Digits", "titel: Digits", ["unknown key 'titel' (did you mean 'title'?)"]),
        ("certainty: confirmed\n", "certainty: sure\n", ["elsewhere", "certainty 'sure'", "confirmed or recalled"]),
        ('"3": 0.75', '"33": 0.75', ["others: image_auroc", "unknown key '33'"]),
        ("{aupro: {file", "{aupor: {file", ["unknown key 'aupor' (did you mean 'aupro'?)"]),
        ("note: Days.\n    ", "", ["tiers.paper: no note"]),
        ("[3, 4]", "[3, 3]", ["two of row '3' in column 'ours'"]),
        ("row: file, ", "", ["expected one of row, each"]),
        ("metrics: [", "metrics: [[", ["can't be read as YAML"]),
    ],
)
def test_a_damaged_file_is_named(old, new, parts, own):
    own(old, new)
    with pytest.raises(UserError) as error:
        read("small")
    assert "small.yaml" in str(error.value)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("name", TABLES)
def test_shipped_tables_are_read_and_their_runs_compose(name, tmp_path):
    table = read(name)
    for tier in table.tiers.values():
        first = {run.column: run for run in reversed(tier.runs)}
        for run in first.values():
            words = [word.replace("{weights}", "w.safetensors") for word in run.words]
            assert words[0].startswith(f"experiment={name.partition('_')[0]}_")
            assert compose(words)[0]["model"]["class_path"].startswith("penstock.lightning_modules.")
    for ref in table.references:
        for metric, values in ref.values.items():
            assert all(0 < value <= (1e5 if metric in ("gflops", "parameters_m") else 1) for value in values.values())
            if len(values) > 10 and MEAN in values:
                assert fmean(v for row, v in values.items() if row != MEAN) == pytest.approx(values[MEAN], abs=6e-4)


def test_mvtec_has_all_categories_and_the_means_of_the_paper():
    table = read("fastflow_mvtec")
    assert len(table.tier("paper").runs) == 60
    assert len(table.tier("small").rows) == 15
    paper = next(ref for ref in table.references if ref.name == "paper, CaiT")
    assert (paper.values["image_auroc"][MEAN], paper.values["pixel_auroc"][MEAN]) == (0.994, 0.985)
    assert paper.recalled("carpet")
    assert not paper.recalled(MEAN)


def test_best_pixel_auroc_beside_others_best_is_of_the_epoch_that_is_best_in_it():
    table = read("fastflow_mvtec")
    assert any("best_on_test/pixel_auroc" in ref.values for ref in table.references)
    for run in (run for tier in ("small", "paper") for run in table.tier(tier).runs):
        tree = compose(list(run.words))[0]["trainer"]["callbacks"]
        (metrics,) = (callback for callback in tree if callback["class_path"].endswith(".AnomalyMetrics"))
        assert metrics["init_args"]["monitor"] == "pixel_auroc"
    assert "best image_auroc" in table.tier("smoke").note
    for tier in ("small", "paper"):
        assert read("fastflow_mvtec_f1").tier(tier).runs == table.tier(tier).runs, "made once for both tables"


def test_tables_are_listed_and_are_no_group(capsys):
    assert penstock(["list", "tables"]) == 0
    out = capsys.readouterr().out
    assert {line.split()[0] for line in out.splitlines()} == {*TABLES}
    assert "MVTec AD by category" in out
    assert "table" not in groups()
    assert penstock(["fit", "--print", "table=fastflow_mvtec"]) == 2
