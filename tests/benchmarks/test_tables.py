"""Tables: the files of `conf/table`, and what runs, keeps and reports them, with a stub that runs nothing."""

import json
import shlex
import shutil
from statistics import fmean

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from penstock.benchmarks.table_report import plot
from penstock.benchmarks.table_rows import fit, key_of
from penstock.benchmarks.table_spec import MEAN, read
from penstock.lightning_modules.cli import main as penstock
from penstock.lightning_modules.cli.compose import compose, hydra_words
from penstock.lightning_modules.cli.conf import groups, options
from penstock.lightning_modules.cli.table import run_table
from penstock.lightning_modules.errors import UserError
from tests.table_stubs import Stub, make, own_table, report

TABLES = list(options("table"))
own = pytest.fixture(own_table)


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
    assert {"tier", "seed", "global batch", "ranks", "NFE", "EMA", "split", "features", "length"} <= {*head}
    assert {"wall time, s", "machine", "versions", "commit"} <= {*head}


def test_the_plot_is_a_picture_also_of_unfinished_rows(tmp_path):
    table = read("fastflow_mvtec")
    tier = table.tier("small")
    plot(table, tier, {tier.cell("carpet", "ResNet-18")[0]: {"metrics": {"pixel_auroc": 0.9}}}, tmp_path / "a.png")
    width, height = Image.open(tmp_path / "a.png").size
    assert width > height > 500


def test_seeds_of_a_tier_make_a_mean_and_a_deviation(own, tmp_path):
    own("note: Days.\n    mean: false", "note: Days.\n    mean: false\n    seeds: [3, 5, 9]")
    given = ["small", "out=out", "tier=paper"]
    stub = Stub([0.7, 0.8, 0.9], stop_at=3)
    assert run_table(given, stub) == 130
    assert [word for words in stub.asked for word in words if word.startswith("seed_everything")] == [
        f"seed_everything={seed}" for seed in (3, 5, 9)
    ]
    assert report(tmp_path, "small_paper")[1][2] == ["3", "0.750 +- 0.071 (2 of 3)", "0.750*"]
    assert run_table(given, Stub([0.9])) == 0
    text, rows, record = report(tmp_path, "small_paper")
    assert rows[2] == ["3", "0.800 +- 0.100", "0.750*"]
    assert "3 of 3 runs finished" in text
    assert [row["metrics"]["image_auroc"] for row in record["rows"]] == [0.7, 0.8, 0.9]
    with pytest.raises(UserError, match="seed=1: tier paper of small has seeds of its own"):
        run_table([*given, "seed=1"], Stub())


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
    assert len(make(Stub(), "trainer.max_epochs=3").asked) == 3
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
    make(Stub(auroc=[0.5]), "tier=paper")
    _, rows, record = report(tmp_path, "small_paper")
    assert rows[2] == ["3", "0.500", "0.750*"]
    assert MEAN not in [row[0] for row in rows]
    assert {row["tier"] for row in record["rows"]} == {"paper"}
    assert [ref["name"] for ref in record["references"]] == ["others"]
    assert not (tmp_path / "out" / "small_smoke.md").exists()


def test_dry_run_prints_commands_that_compose(own, tmp_path, capsys):
    stub = make(Stub(), "--dry-run", "data=.", "only=3")
    assert stub.asked == []
    variable, program, verb, *words = shlex.split(capsys.readouterr().out)
    assert (variable, program, verb) == (f"PENSTOCK_DATA={tmp_path}", "penstock", "fit")
    assert words[-1] == f"run_dir={tmp_path}/out/rows/{key_of(words[:-2], None)}"
    assert compose(words[:-1])[0]["data"]["init_args"]["normal"] == 3
    assert not (tmp_path / "out").exists()


TEST = """\
      - {row: "3", column: scored, verb: test, checkpoint: net.safetensors, words: [experiment=fastflow_digits]}
      - {row: "4", column: scored, verb: test, checkpoint: fastflow_digits, words: [experiment=fastflow_digits]}
"""


def test_a_test_row_scores_a_checkpoint_and_names_the_training_before_it(own, tmp_path, capsys, monkeypatch):
    own(
        "  paper:\n    note: Days.\n    mean: false\n    runs:\n",
        f"  paper:\n    note: Days.\n    mean: false\n    runs:\n{TEST}",
    )
    given = ["small", "out=out", "tier=paper"]
    assert run_table([*given, "--dry-run"]) == 0
    scored, first, second, fitted = [shlex.split(line)[1:] for line in capsys.readouterr().out.splitlines()]
    assert scored[:-1] == [
        "test",
        "experiment=fastflow_digits",
        "seed_everything=0",
        "ckpt_path=net.safetensors",
        "logger=csv",
    ]
    assert first == ["fit", "experiment=fastflow_digits", "run_dir=runs/fastflow_digits/table"]
    assert "ckpt_path=runs/fastflow_digits/table/checkpoints/last.ckpt" in second
    assert fitted[0] == "fit"
    assert len({words[-1] for words in (scored, second, fitted)}) == 3, "a folder each"
    looked_for = []

    def find(checkpoint, key):
        looked_for.append(checkpoint)
        if len(looked_for) == 2:
            raise UserError("its training ended with exit code 1")
        return f"/found/{checkpoint}"

    monkeypatch.setattr("penstock.benchmarks.table_rows.find_or_train", find)
    stub = Stub()
    assert run_table(given, stub) == 1, "the second has no checkpoint"
    assert looked_for == ["net.safetensors", "fastflow_digits"]
    assert [words[0] for words in stub.asked] == ["test", "fit"]
    assert "ckpt_path=/found/net.safetensors" in stub.asked[0]
    record = report(tmp_path, "small_paper")[2]
    assert [row["exit_code"] for row in record["rows"]] == [0, 2, 0]
    assert "ckpt_path=net.safetensors" in record["rows"][0]["words"]
    assert "its training ended" in (tmp_path / "out" / "rows" / record["rows"][1]["key"] / "fit.log").read_text()


def test_a_folder_of_weights_counts_by_what_is_named_in_it(own, tmp_path):
    words = ["experiment=fastflow_digits"]
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    same = {key_of([*words, f"model.net.backbone.weights={folder}/one"], folder) for folder in folders}
    assert len(same) == 1
    assert key_of([*words, f"model.net.backbone.weights={folders[0]}/two"], folders[0]) not in same


def test_a_row_that_finished_before_there_were_facts_gets_what_its_files_say(own, tmp_path):
    make(Stub())
    (folder, *_) = sorted((tmp_path / "out" / "rows").iterdir())
    old = json.loads((folder / "result.json").read_text())
    for key in ("ranks", "accumulation", "global_batch", "split", "features", "ema"):
        old.pop(key)
    (folder / "result.json").write_text(json.dumps(old))
    assert make(Stub()).asked == []
    (row,) = (row for row in report(tmp_path)[2]["rows"] if row["key"] == folder.name)
    assert (row["global_batch"], row["ranks"], row["ema"]) == (32, None, "none")


def test_scores_of_other_programs_are_metrics_of_their_row(own, tmp_path):
    make(Stub())
    (folder, *_) = sorted((tmp_path / "out" / "rows").iterdir())
    (folder / "scores" / "2").mkdir(parents=True)
    (folder / "scores" / "other.json").write_text('{"aupro": 0.25, "made_by": "a program"}')
    (folder / "scores" / "2" / "geneval.json").write_text('{"geneval": 0.5, "geneval/colors": 0.75}')
    make(Stub())
    metrics = [row["metrics"] for row in report(tmp_path)[2]["rows"] if row["key"] == folder.name]
    of_others = {"aupro": 0.25, "geneval/2": 0.5, "geneval/colors/2": 0.75}
    assert metrics == [{"image_auroc": metrics[0]["image_auroc"], "val/loss": 1.0, **of_others}]


def test_rows_can_be_run_one_by_one(own, tmp_path):
    make(Stub(auroc=[0.8]), "only=3")
    assert len(make(Stub(auroc=[0.7]), "only=4").asked) == 1
    rows = report(tmp_path)[1]
    assert rows[2:6] == [
        ["file", "", ""],
        ["3", "0.800", "0.750*"],
        ["4", "0.700", ""],
        ["mean", "0.750 (2 of 3)", "0.700"],
    ]
    assert run_table(["small", "out=out", "seed=7", "only=4"], Stub()) == 0  # needs no weights


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
        (["small", "only=5"], ["only=5: no such row", "file, 3, 4"]),
        (["small", "tier=small"], ["no tier 'small'", "smoke, paper"]),
        (["small"], ["row 'file'", "weights=FILE"]),
        (["small", "weights=none.pth"], ["none.pth: no such file"]),
        (["small", "data=none"], ["none: no such folder"]),
        (["small", "weights=net.safetensors", "run=4"], ["run=4: no such run; expected 1 to 3"]),
    ],
)
def test_mistakes(words, parts, own, capsys):
    assert penstock(["table", *words]) == 2
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
        ("row: file, ", "row: file, verb: tset, ", ["verb 'tset' (did you mean 'test'?)"]),
        ("row: file, ", "row: file, checkpoint: a, ", ["checkpoint 'a' beside verb 'fit'"]),
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


NO_SHARES = ("gflops", "parameters_m", "fid/", "rfid", "clip_score/", "psnr", "dpg/", "vbench")


@pytest.mark.parametrize("name", TABLES)
def test_shipped_tables_are_read_and_their_runs_compose(name):
    table, parser, first = read(name), OverridesParser.create(), {}
    for run in (run for tier in table.tiers.values() for run in tier.runs):
        words = [word.replace("{weights}", "w.safetensors") for word in run.words]
        assert words[0].startswith("experiment=")
        assert run.checkpoint is None or run.checkpoint in options("experiment")
        parser.parse_overrides(hydra_words(words))
        keys = {word.partition("=")[0] for word in words if word.startswith("~")}
        chosen = keys | {word for word in words if word.partition("=")[0] in groups()}
        first.setdefault(frozenset(chosen), words)
    for words in first.values():
        assert compose(words)[0]["model"]["class_path"].startswith("penstock.lightning_modules.")
    for ref in table.references:
        for metric, values in ref.values.items():
            assert all(0 < value <= (1e5 if metric.startswith(NO_SHARES) else 1) for value in values.values())
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
    columns = {(tier, run.column): run for tier in ("small", "paper") for run in table.tier(tier).runs}
    for run in columns.values():
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
