"""Sweeps: all categories by one word, and the table that is left in the sweep's folder."""

import json

import pytest

from penstock.lightning_modules.cli import main, sweep_table
from penstock.lightning_modules.cli.compose import compose
from tests.anomaly_trees import btad, mvtec, visa
from tests.lightning_modules.test_fastflow import TINY as FEW

WORDS = ["-m", "experiment=fastflow_magnetic_tile"]
TINY = [word for word in FEW if not word.startswith("data.category")]
AUROC = {"bolt": 0.9, "nut": 0.7, "ring": 0.8}
TWO = {"image_auroc": 0.5, "val/image_auroc": 0.1, "lr-Adam": 1.0, "epoch": 1, "best_on_test/image_auroc": 0.6}


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """The words of the jobs that a sweep starts; `outcome` makes exit code and metrics of a job's words."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RUN_DIR", raising=False)

    def install(outcome):
        started = []

        def run_job(verb, words, run_dir):
            started.append(words)
            code, metrics = outcome(dict(word.lstrip("+").split("=", 1) for word in words))
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "metrics.json").write_text(json.dumps(metrics))
            return code

        monkeypatch.setattr("penstock.lightning_modules.cli.sweep.run_job", run_job)
        return started

    return install


def table(folder):
    (path,) = folder.glob("runs/sweeps/*/table.json")
    return json.loads(path.read_text()), path.with_suffix(".md").read_text()


def lines(text):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_all_is_every_category_of_the_folder(jobs, tmp_path):
    for name in ("nut", "bolt"):
        mvtec(tmp_path / "tree", name, train=1, good=1, defects=())
    (tmp_path / "tree" / "notes").mkdir()
    started = jobs(lambda words: (0, {"image_auroc": AUROC[words["data.category"].strip("'")], "aupro": 0.5}))
    assert main(["fit", *WORDS, "data.category=all", f"data.data_dir={tmp_path}/tree"]) == 0
    assert [job[1] for job in started] == ["++data.category='bolt'", "++data.category='nut'"]
    found, text = table(tmp_path)
    assert found["means"][0]["metrics"]["image_auroc"] == {"value": pytest.approx(0.8), "jobs": 2}
    assert lines(text)[0] == ["job", "data.category", "status", "image_auroc", "aupro"]
    assert lines(text)[2:] == [
        ["0", "bolt", "done", "0.9", "0.5"],
        ["1", "nut", "done", "0.7", "0.5"],
        ["", "mean of 2", "", "0.8", "0.5"],
    ]


@pytest.fixture
def left(tmp_path):
    """The table of jobs that are given as (words, exit code, metrics)."""

    def write(*jobs, objective=None):
        for number, (words, code, metrics) in enumerate(jobs):
            folder = tmp_path / str(number)
            sweep_table.record(folder, number, words.split(), code, objective)
            (folder / "metrics.json").write_text(json.dumps(metrics))
        return lines(sweep_table.write(tmp_path, complete=True)), json.loads((tmp_path / "table.json").read_text())

    return write


def test_a_failed_job_is_shown_and_counted_and_not_averaged(left):
    rows, found = left(
        *((f"a=1 ++data.category={name}", int(name == "nut"), {"auroc": v}) for name, v in AUROC.items())
    )
    assert rows[3] == ["1", "nut", "failed (1)", ""]
    assert rows[5] == ["", "mean of 2, 1 failed", "", "0.85"]
    assert found["means"][0]["metrics"]["auroc"] == {"value": pytest.approx(0.85), "jobs": 2}
    assert found["jobs"][1]["metrics"] == {}


def test_a_group_whose_jobs_all_failed_is_a_mean_of_none(left):
    rows, found = left(*((f"lr={a} seed={b}", int(a == 2), {"x": 0.5}) for a in (1, 2) for b in (3, 5)))
    assert rows[-2:] == [["", "1", "mean of 2", "", "0.5"], ["", "2", "mean of 0, 2 failed", "", ""]]
    assert found["means"][1] == {"words": {"lr": "2"}, "over": "seed", "jobs": 2, "failed": 2, "metrics": {}}


def test_the_best_epoch_is_shown_where_every_job_that_ran_has_it(left):
    found = {**TWO, "best_on_test/pixel_auroc": 0.7, "best_on_test/aupro": 0.2, "best_on_test/epoch": 3}
    rows, _ = left(("a=1", 0, found), ("a=2", 0, {**found, "best_on_test/image_auroc": 0.8}), ("a=3", 1, {}))
    assert rows[0] == ["job", "a", "status", "image_auroc", "best_on_test/image_auroc", "best_on_test/pixel_auroc"]
    boxes = {"ap": 0.4, "best_on_val/ap": 0.5, "best_on_val/ap50": 0.8, "val/ap": 0.3}
    assert left(("a=1", 0, boxes), ("a=2", 0, boxes))[0][0] == ["job", "a", "status", "ap", "best_on_val/ap"]
    assert rows[-1] == ["", "mean of 2, 1 failed", "", "0.5", "0.7", "0.7"]
    rows, _ = left(("a=1", 0, found), ("a=2", 0, TWO), ("a=3", 0, {"image_auroc": 0.5, "best_on_val/image_auroc": 1}))
    assert rows[0] == ["job", "a", "status", "image_auroc"]


def test_thresholds_are_shown_and_not_averaged(left):
    rows, found = left(*((f"a={a}", 0, {"image_threshold": a, "image_f1_max_threshold": a, "x": a}) for a in (1, 2)))
    assert rows[-2:] == [["1", "2", "done", "2", "2", "2"], ["", "mean of 2", "", "", "", "1.5"]]
    assert found["means"][0]["metrics"].keys() == {"x"}


def test_the_mean_is_over_the_last_word_for_every_choice_of_the_others(left):
    rows, _ = left(*((f"++lr={a} seed={b}", 0, {"x": float(f"{a}.{b}")}) for a in (1, 2) for b in (3, 5)))
    assert rows[0] == ["job", "lr", "seed", "status", "x"]
    assert rows[-2:] == [["", "1", "mean of 2", "", "1.4"], ["", "2", "mean of 2", "", "2.4"]]


def test_the_objective_comes_first_also_with_a_slash(left):
    rows, _ = left(("a=1", 0, TWO), ("a=2", 0, TWO), objective="best_on_test/image_auroc")
    assert rows[0] == ["job", "a", "status", "best_on_test/image_auroc", "image_auroc"]


def test_a_metric_that_some_jobs_lack_says_of_how_many_it_is(left):
    rows, _ = left(("a=1", 0, {"x": 0.5}), ("a=2", 0, {"x": 0.5, "aupro": 0.25}))
    assert rows[-1] == ["", "mean of 2", "", "0.5", "0.25 (of 1)"]


def test_a_stopped_sweep_leaves_the_table_of_what_ran(jobs, tmp_path):
    def outcome(words):
        if words["seed_everything"] == "2":
            raise KeyboardInterrupt
        return 0, {"image_auroc": 0.5}

    jobs(outcome)
    assert main(["fit", *WORDS, "seed_everything=1,2,3"]) == 130
    found, text = table(tmp_path)
    assert not found["complete"]
    assert len(found["jobs"]) == 1
    assert "was stopped" in text


def test_the_folder_of_a_sweep_can_be_compared_whole(jobs, tmp_path):
    jobs(lambda words: (0, {"image_auroc": 0.5}))
    assert main(["fit", *WORDS, "seed_everything=1,2"]) == 0
    (folder,) = tmp_path.glob("runs/sweeps/*")
    for number in "01":
        (folder / number / "metrics.csv").write_text("step,image_auroc\n1,0.5\n")
    assert main(["compare", *map(str, folder.iterdir())]) == 0


def test_names_that_look_like_numbers_stay_names(jobs, tmp_path):
    btad(tmp_path, "01")
    btad(tmp_path, "02")
    started = jobs(lambda words: (0, {"pixel_auroc": 0.5}))
    assert main(["fit", "-m", "experiment=fastflow_btad", f"data.data_dir={tmp_path}", "data.category=all"]) == 0
    assert [compose(job)[0]["data"]["init_args"]["category"] for job in started] == ["01", "02"]
    assert [job["words"]["data.category"] for job in table(tmp_path)[0]["jobs"]] == ["01", "02"]


def test_visa_has_categories_too(jobs, tmp_path, monkeypatch):
    (tmp_path / "visa").mkdir()
    visa(tmp_path / "visa", "nut")
    monkeypatch.setenv("PENSTOCK_DATA", str(tmp_path))
    started = jobs(lambda words: (0, {"pixel_auroc": 0.5}))
    assert main(["fit", "-m", "experiment=fastflow_visa", "data.category=all"]) == 0
    assert len(started) == 1
    assert lines(table(tmp_path)[1])[2][1:4] == ["fastflow_visa", "nut", "done"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["experiment=fastflow_visa"], ["data.category=all: no folder for 'visa'", "PENSTOCK_DATA"]),
        (["experiment=fastflow_digits"], ["SpoiledDigits has no categories", "data=mvtec"]),
        (["experiment=fastflow_visa", "data.data_dir=EMPTY"], ["no categories; found no folders", "train/good"]),
        (["experiment=fastflow_visa", "data.data_dir=EMPTY,ONE"], ["no categories"]),
        (["experiment=fastflow_visa", "data.data_dir=ONE,TWO"], ["has other categories than", "a sweep for each"]),
    ],
)
def test_mistakes(words, parts, jobs, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("PENSTOCK_DATA", raising=False)
    jobs(lambda words: (0, {}))
    (tmp_path / "EMPTY").mkdir()
    mvtec(tmp_path / "ONE", "bolt", train=1, good=1, defects=())
    mvtec(tmp_path / "TWO", "nut", train=1, good=1, defects=())
    words = [*words, *(["data=digits_spoiled"] if "SpoiledDigits" in parts[0] else [])]
    assert main(["fit", "-m", *words, "data.category=all"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


def test_all_without_a_sweep_says_how(tmp_path, capsys):
    mvtec(tmp_path, "bolt", train=1, good=1, defects=())
    words = ["experiment=fastflow_magnetic_tile", f"data.data_dir={tmp_path}", "data.category=all", "logger=csv"]
    small = ["model.net.backbone.weights=random", "image_size=64", f"run_dir={tmp_path}/run"]
    assert main(["fit", *words, *small]) == 2
    assert "penstock fit -m ... data.category=all" in capsys.readouterr().err


@pytest.mark.slow
def test_categories_are_trained_one_after_the_other(tmp_path, monkeypatch):
    """Real runs, as processes; the images of the third category cannot be read."""
    monkeypatch.chdir(tmp_path)
    for name in ("bolt", "nut", "torn"):
        mvtec(tmp_path / "tree", name, train=4, size=(70, 66))
    (tmp_path / "tree" / "torn" / "train" / "good" / "001.png").write_bytes(b"none")
    assert main(["fit", "-m", *TINY, "data.category=all", f"data.data_dir={tmp_path}/tree"]) == 1
    found, text = table(tmp_path)
    assert [job["exit_code"] for job in found["jobs"]] == [0, 0, 2]
    values = [job["metrics"]["pixel_auroc"] for job in found["jobs"][:2]]
    assert found["means"][0]["metrics"]["pixel_auroc"] == {"value": pytest.approx(sum(values) / 2), "jobs": 2}
    assert {"image_auroc", "pixel_auroc", "aupro"} <= {*lines(text)[0]}
