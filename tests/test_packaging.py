"""A wheel in an environment of its own: no bare names installed, nothing shadowed, runs from any folder."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("lightning_modules", "datamodules", "kernels", "conf", "benchmarks")
TINY = ["experiment=rectified_flow_digits", "logger=csv", "model.net.width=8", "model.net.blocks=1"]
TINY += ["trainer.max_steps=2", "callbacks.metrics.n=20", "callbacks.metrics.steps=[1]"]
TINY += ["callbacks.samples.rows=1", "callbacks.samples.steps=1"]


def call(*words, cwd, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PENSTOCK_", "PYTHON", "RUN_DIR", "PL_"))}
    env |= {"OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([*map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "penstock"
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    call(sys.executable, "-m", "pip", "wheel", *flags, "-w", out, source, cwd=out)
    (path,) = out.glob("penstock-*.whl")
    return path


def decoys(folder: Path, body: str) -> None:
    """Packages under the names of our rooms, as a user's environment or project may hold them."""
    for room in ROOMS:
        (folder / room).mkdir(parents=True, exist_ok=True)
        (folder / room / "__init__.py").write_text(body)


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    """Interpreter of an environment with the wheel, decoys, and the libraries (not the editable penstock) of this one.

    A path file inside a folder that a path file adds is not read, so the editable finder stays out.
    """
    env = tmp_path_factory.mktemp("env")
    call(sys.executable, "-m", "venv", env, cwd=env)
    scripts = "Scripts" if os.name == "nt" else "bin"
    python = env / scripts / "python"
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=env).strip())
    call(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=env)
    libraries = dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))
    (site / "libraries.pth").write_text("\n".join(libraries) + "\n")
    decoys(site, "WHOSE = 'environment'\n")
    return python


@pytest.fixture
def elsewhere(tmp_path):
    """A working folder whose own `kernels`, `conf` ... must never be imported or read."""
    decoys(tmp_path, "raise SystemExit('imported by mistake')\n")
    (tmp_path / "conf" / "config.yaml").write_text("wrong: true\n")
    return tmp_path


def test_wheel_holds_one_name_and_every_file(wheel):
    files = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].removesuffix(".dist-info").split("-")[0] for name in files} == {"penstock"}
    assert {name.split("/")[0] for name in files if "/" not in name} == set()
    suffixes = {".py", ".yaml"}
    here = {p for room in ROOMS for p in (ROOT / room).rglob("*") if p.suffix in suffixes}
    assert {f"penstock/{p.relative_to(ROOT).as_posix()}" for p in here} <= files


def test_wheel_names_its_command_and_lists_no_tests(wheel):
    archive = zipfile.ZipFile(wheel)
    (entry,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
    assert "penstock = penstock.lightning_modules.cli:main" in archive.read(entry).decode()
    assert not [n for n in archive.namelist() if "/tests/" in n or n.startswith(("tests/", "docs/"))]


def test_source_distribution_holds_what_a_wheel_is_built_from(source, tmp_path):
    call(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, source, cwd=tmp_path)
    (path,) = tmp_path.glob("penstock-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    rooms = {
        p.relative_to(source).as_posix()
        for room in ROOMS
        for p in (source / room).rglob("*")
        if p.suffix in (".py", ".yaml")
    }
    assert names >= {"setup.py", "pyproject.toml", "README.md", "LICENSE", *rooms}


def test_imports_come_from_the_wheel_and_decoys_stay_reachable(python, elsewhere):
    code = (
        "import kernels, conf, benchmarks, datamodules, lightning_modules;"
        "import penstock.lightning_modules.cli as ours, penstock.kernels.philox;"
        "from penstock.lightning_modules.cli.conf import conf_dirs;"
        "assert {m.WHOSE for m in (kernels, conf, benchmarks, datamodules, lightning_modules)} == {'environment'};"
        "print(ours.__file__, penstock.kernels.philox.__file__, *conf_dirs(), sep='\\n')"
    )
    site = python.parents[1]
    for line in call(python, "-P", "-c", code, cwd=elsewhere).split():
        assert Path(line).is_relative_to(site)


def test_list_and_fit_from_a_folder_with_the_same_names(python, elsewhere):
    command = python.with_name("penstock")
    assert "rectified_flow_digits" in call(command, "list", cwd=elsewhere)
    call(command, "fit", *TINY, cwd=elsewhere, PENSTOCK_CACHE=str(elsewhere / "cache"))
    (config,) = elsewhere.glob("runs/rectified_flow_digits/*/config.yaml")
    assert yaml.safe_load(config.read_text())["trainer"]["max_steps"] == 2
    assert (config.parent / "checkpoints" / "last.ckpt").is_file()
    assert list((config.parent / "samples").glob("*.png"))


@pytest.mark.parametrize("how", ["penstock", "module"])
def test_a_folder_called_penstock_is_not_mixed_in(how, python, tmp_path, source):
    program = [python.with_name("penstock")] if how == "penstock" else [python, "-m", "penstock.lightning_modules"]
    own = tmp_path / "penstock" / "conf" / "experiment"
    own.mkdir(parents=True)
    (own / "wrong.yaml").write_text("# @package _global_\n")
    found = call(*program, "list", "experiments", cwd=tmp_path)
    assert "rectified_flow_digits" in found
    assert "wrong" not in found
    assert "rectified_flow_digits" in call(*program, "list", "experiments", cwd=source.parent)


@pytest.mark.parametrize("module", ["penstock.lightning_modules", "lightning_modules"])
def test_both_modules_are_the_program_in_a_checkout_and_shadow_nothing(module, python, source, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, importlib\n\n"
        "atexit.register(lambda: print(*(importlib.import_module(n).WHOSE for n in ('kernels', 'benchmarks'))))\n"
    )
    wanted = call(python.with_name("penstock"), "list", cwd=source)
    found = call(python, "-m", module, "list", cwd=source, PYTHONPATH=str(tmp_path))
    assert found == wanted + "environment environment\n"
