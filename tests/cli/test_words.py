"""Words -> tree: groups, flat keys, sugar, named callbacks and loggers; no torch import, instant."""

import subprocess
import sys

import pytest
import yaml
from lightning.pytorch import Trainer

from penstock.lightning_modules.cli import main
from penstock.lightning_modules.cli.compose import compose, nest_init_args, new_run_dir, quoted
from penstock.lightning_modules.cli.conf import groups, options
from penstock.lightning_modules.errors import UserError


def test_every_group_choice_composes():
    for group in groups():
        for name in options(group):
            if group not in ("experiment", "table"):
                compose([f"{group}={name}"])


@pytest.mark.parametrize("name", list(options("experiment")))
def test_every_experiment_composes_and_is_short(name):
    tree, run = compose([f"experiment={name}"])
    assert run == name
    assert {"model", "data", "trainer"} <= tree.keys()
    assert isinstance(tree["seed_everything"], int)
    text = options("experiment")[name].read_text()
    assert len(text.splitlines()) <= 40
    assert f"penstock fit experiment={name}" in text


def test_flat_keys_move_into_init_args_and_written_out_ones_win():
    node = {"class_path": "a.B", "x": 1, "net": {"class_path": "c.D", "w": 2}, "init_args": {"x": 3}}
    assert nest_init_args(node) == {
        "class_path": "a.B",
        "init_args": {"x": 3, "net": {"class_path": "c.D", "init_args": {"w": 2}}},
    }


@pytest.mark.parametrize("word", ["model.lr=0.5", "model.optimizer.lr=0.5", "++model.optimizer.init_args.lr=0.5"])
def test_three_ways_to_say_the_learning_rate(word):
    tree, _ = compose([word])
    assert tree["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.5


def test_key_absent_from_the_files_needs_no_plus():
    tree, _ = compose(["trainer.accumulate_grad_batches=3", "model.net.width=24"])
    assert tree["trainer"]["accumulate_grad_batches"] == 3
    assert tree["model"]["init_args"]["net"]["init_args"]["width"] == 24


def test_callbacks_are_named_and_can_be_switched_off():
    tree, _ = compose(["callbacks.progress=null", "callbacks.ema.decay=0.5", "logger=csv"])
    classes = [c["class_path"].rpartition(".")[2] for c in tree["trainer"]["callbacks"]]
    assert "RunProgress" not in classes
    assert "EMA" in classes
    assert [x["class_path"].rpartition(".")[2] for x in tree["trainer"]["logger"]] == ["RunLogger"]


def test_several_perf_choices_at_once():
    tree, _ = compose(["perf=[bf16,channels_last,compile]"])
    perf = next(c for c in tree["trainer"]["callbacks"] if c["class_path"].endswith("Perf"))
    assert perf["init_args"] == {"channels_last": True, "compile": True}
    assert tree["trainer"]["precision"] == "bf16-mixed"


@pytest.mark.parametrize("value", ["runs/a/epoch=2-step=10.ckpt", "a b", "x:y", "it's"])
def test_values_with_signs_of_the_grammar(value):
    assert compose([f"ckpt_path={value}"])[0]["ckpt_path"] == value
    assert quoted("3e-4") == "3e-4"


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        (
            "experiment=rectified_flow_digit",
            ["experiment=rectified_flow_digit", "did you mean 'rectified_flow_digits'?"],
        ),
        ("data=digitz", ["no conf/data/digitz.yaml", "did you mean 'digits'?"]),
        ("perf=[bf61,compile]", ["perf=bf61", "did you mean 'bf16'?"]),
        ("experimnt=x", ["'experimnt'", "did you mean 'experiment'?"]),
        ("bogus=3", ["'bogus'", "unknown", "trainer"]),
        ("+bogus=3", ["'bogus'", "unknown", "trainer"]),
        ("experiment", ["'experiment'", "expected key=value"]),
        ("data.batch_size=[1", ["word 'data.batch_size=[1': can't be read", "brackets and quotes in pairs"]),
        ("model.lr={a", ["word 'model.lr={a': can't be read (no viable alternative at input '{a')"]),
        ("model.lr='a", ["word 'model.lr='a': can't be read; expected key=value"]),
        ("model.lr=${a}", ["word 'model.lr=${a}': Interpolation key 'a' not found"]),
        ("model.lr=1,2", ["configuration: Ambiguous value for argument 'model.lr=1,2'"]),
        ("~model.nothing", ["configuration: Could not delete from config. 'model.nothing' does not exist."]),
    ],
)
def test_mistakes_name_the_place_and_the_nearest_choice(word, parts, capsys):
    assert main(["fit", word]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


def test_nothing_to_run(capsys):
    assert main(["fit"]) == 2
    assert "expected experiment=NAME" in capsys.readouterr().err


def test_unknown_verb(capsys):
    assert main(["fitt"]) == 2
    assert "verb 'fitt': expected one of fit," in capsys.readouterr().err


def test_own_configuration_folder(tmp_path, monkeypatch, capsys):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ntrainer:\n  max_epochs: 7\n")
    monkeypatch.setenv("PENSTOCK_CONF", str(tmp_path))
    tree, name = compose(["experiment=mine"])
    assert (tree["trainer"]["max_epochs"], name) == (7, "mine")
    monkeypatch.setenv("PENSTOCK_CONF", str(tmp_path / "no"))
    with pytest.raises(UserError, match="no such folder"):
        compose([])


def test_print_shows_the_tree_and_runs_nothing(capsys):
    assert main(["fit", "trainer.max_epochs=3", "--print"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["trainer"]["max_epochs"] == 3


QUICK = (["--help"], ["list"], ["fit", "experiment=nothing"], ["fitt"], ["fit", "bogus=1"], ["compare", "nowhere"])


@pytest.mark.parametrize("words", QUICK, ids=" ".join)
def test_quick_answers_import_no_torch(words):
    code = (
        "import sys; from penstock.lightning_modules.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'lightning', 'wandb', 'hydra'} & set(sys.modules); assert not heavy, heavy; sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == (0 if words[0] in ("--help", "list") else 2), done.stderr


def test_composing_needs_no_torch():
    code = (
        "import sys; from penstock.lightning_modules.cli.compose import compose; compose(['model.lr=1']);"
        "assert not {'torch', 'lightning'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_list_answers_each_kind(capsys):
    for kind in ("experiments", "methods", "data", "kernels", "options", "tables"):
        assert main(["list", kind]) == 0
    out = capsys.readouterr().out
    assert "rectified_flow" in out
    assert "digits" in out
    assert "philox" in out
    assert main(["list", "methodz"]) == 2
    assert "did you mean 'methods'?" in capsys.readouterr().err


def test_a_group_can_be_switched_off():
    tree, _ = compose(["logger=null"])
    assert tree["trainer"]["logger"] == []


def test_ranks_of_one_launch_agree_on_the_folder(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    assert new_run_dir("x") == new_run_dir("x") == "runs/x/torchrun-abc"
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert new_run_dir("x") == "runs/x/slurm-12"


def test_own_file_must_not_take_a_name_of_the_project(tmp_path, monkeypatch, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "digits.yaml").write_text("batch_size: 3\n")
    monkeypatch.setenv("PENSTOCK_CONF", str(tmp_path))
    assert main(["fit", "data=digits"]) == 2
    assert "the name is taken" in capsys.readouterr().err


def test_a_sweep_names_the_word_that_cannot_be_read(capsys):
    assert main(["fit", "-m", "seed_everything=1,2", "model.lr={a"]) == 2
    assert capsys.readouterr().err.startswith("penstock: word 'model.lr={a': can't be read")


@pytest.mark.parametrize(
    ("words", "held", "code", "jobs", "parts"),
    [
        (["objective=fd_pixel/2"], True, 2, 1, ["(did you mean 'fd_pixels/2'?); it holds fd_pixels/2, val/loss"]),
        (["objective=zzz"], True, 2, 1, ["objective=zzz: not in ", "/0/metrics.json; it holds fd_pixels/2, val/loss"]),
        (["objective=zzz"], False, 2, 1, ["/0/metrics.json; it holds nothing"]),
        (["objective=val/loss"], True, 0, 2, []),
        (["objective=null"], False, 0, 2, []),
        ([], True, 0, 2, ["objective=fd_pixels/20: not in ", "/1/metrics.json (did you mean 'fd_pixels/2'?)"]),
    ],
)
def test_a_sweep_stops_at_an_unknown_objective(words, held, code, jobs, parts, capsys, tmp_path, monkeypatch):
    started = []

    def run_job(verb, words, run_dir):
        started.append(run_dir)
        if held:
            (run_dir / "metrics.json").write_text('{"val/loss": 1.0, "fd_pixels/2": 2.0}')
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("penstock.lightning_modules.cli.sweep.run_job", run_job)
    assert main(["fit", "-m", "experiment=rectified_flow_digits", "seed_everything=1,2", *words]) == code
    out, err = capsys.readouterr()
    assert [path.name for path in started] == ["0", "1"][:jobs]
    assert sorted(tmp_path.glob("runs/sweeps/*/[01]")) == started
    assert ("stopped after job 0" in out) == (code == 2)
    assert err.count("\n") == (jobs if parts else 0)
    for part in parts:
        assert part in err


def test_missing_hydra_plugin_is_one_line(capsys):
    assert main(["fit", "-m", "seed_everything=1,2", "hydra/launcher=nothing"]) == 2
    err = capsys.readouterr().err
    assert "nothing" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("limit_train_batches=1", 1),
        ("limit_val_batches=1.0", 1.0),
        ("limit_test_batches=0.5", 0.5),
        ("limit_predict_batches=1", 1),
        ("overfit_batches=1", 1),
        ("val_check_interval=1", 1),
    ],
)
def test_one_batch_is_not_all_batches(word, value, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(Trainer, "fit", lambda self, *_, **__: seen.append(getattr(self, word.partition("=")[0])))
    assert main(["fit", "experiment=rectified_flow_digits", "logger=csv", f"trainer.{word}"]) == 0
    assert (seen, type(seen[0])) == ([value], type(value))


def test_a_file_that_is_not_yaml_is_named_with_its_line(monkeypatch, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "broken.yaml").write_text("# @package _global_\ndefaults:\n  - a\n  b: 1\n")
    monkeypatch.setenv("PENSTOCK_CONF", str(tmp_path))
    with pytest.raises(UserError, match=r"broken\.yaml, line 4: can't be read as YAML"):
        compose(["experiment=broken"])
