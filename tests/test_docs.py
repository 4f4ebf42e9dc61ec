"""README and docs: every `penstock` command in them is understood, key by key; every file they point to exists."""

import ast
import re
import runpy
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from jsonargparse import ArgumentError

from penstock.lightning_modules.cli import HELP, _run
from penstock.lightning_modules.cli.compose import compose
from penstock.lightning_modules.cli.conf import groups
from penstock.lightning_modules.cli.encode import OWN
from penstock.lightning_modules.cli.export import OWN as EXPORT
from penstock.lightning_modules.cli.given import check_keys, pieces
from penstock.lightning_modules.cli.lab import Lab
from penstock.lightning_modules.cli.plan import split_words
from penstock.lightning_modules.cli.verbs import _own_argv_hidden, plan
from penstock.lightning_modules.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(penstock [^`]+)`")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)[^)]*\)")
PROGRAM = re.compile(r"(?:^|[\s/])penstock(?:\.lightning_modules)? (?P<words>[a-z-].*)$")
CHECKPOINT, IMAGES = re.compile(r"^ckpt_path=.*"), re.compile(r"^images=.*")
FOLDER, WEIGHTS = re.compile(r"^data=.*"), re.compile(r"^weights=.*")
TINY = ["logger=csv", "callbacks=base", "callbacks.ema=null", "model.net.width=8", "model.net.blocks=1"]


def commands(pages):
    """The words after `penstock` in code blocks and in running text, each once."""
    found = {}
    for page in pages:
        text = page.read_text()
        lines = [line for block in BLOCK.findall(text) for line in block.splitlines()]
        for line in lines + INLINE.findall(" ".join(BLOCK.sub("", text).split())):
            for part in line.split("&&"):
                if match := PROGRAM.search(part.split("  #")[0].strip()):
                    found.setdefault(match["words"], page.name)
    return found


class Judge(Lab):
    """Checks every key and type as a run would, then stops before anything is built."""

    def instantiate_classes(self):
        pass

    def _run_subcommand(self, subcommand):
        pass


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with a finished run, as the pages assume, and the method of docs/add_a_method.md."""
    folder = tmp_path_factory.mktemp("docs")
    runpy.run_path(str(ROOT / "tests" / "cli" / "test_own_method.py"))["write_files"](folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("RUN_DIR", str(folder / "run"))
        assert _run(["fit", *TINY, "trainer.max_steps=1"]) == 0
    return folder


@pytest.fixture
def inside(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.setenv("PENSTOCK_CONF", "conf")
    monkeypatch.setenv("RUN_DIR", str(place / "other"))


def judge(verb, words):
    args, _ = plan(verb, words, run=False)
    with _own_argv_hidden():
        Judge(args, lambda: None)


def jobs(words):
    """The words of enough jobs of a sweep that every choice is in one of them."""
    choices = [[f"{key}={v}" for v in value.split(",")] for key, _, value in (w.partition("=") for w in words)]
    return [[c[min(i, len(c) - 1)] for c in choices] for i in range(max(map(len, choices)))]


def check(line):
    """Raises, or fails, where the line would be refused; runs nothing that trains."""
    verb, *words = shlex.split(line)
    words = [CHECKPOINT.sub("ckpt_path=run/checkpoints/last.ckpt", w) for w in words]
    words = [IMAGES.sub("images=run", w) for w in words]
    words = ["run/config.yaml" if before == "--config" else w for before, w in zip(["", *words], words)]
    if not words and verb != "list":
        assert f"\n  {verb} " in HELP or verb.startswith("--")
    elif verb in ("fit", "validate", "test", "predict") and "--help" not in words:
        given = [w for w in words if w not in ("-m", "--print")]
        for job in jobs(given) if "-m" in words else [given]:
            judge(verb, job)
    elif verb == "sample":
        assert _run([verb, *words, "n=2", "steps=1", "out=out"]) == 0
    elif verb == "pairs" and words[0].startswith("from="):
        source = Path(words[0].removeprefix("from="), "0")
        source.mkdir(parents=True)
        for name in ("z0.npy", "z1.npy"):
            np.save(source / name, np.zeros((2, 1, 8, 8), np.float32))
        assert _run([verb, *words]) == 0
        shutil.rmtree("pairs")
    elif verb == "pairs":
        small = [w for w in words if not w.startswith(("n=", "steps=", "batch=", "shard=", "out="))]
        assert _run([verb, *small, "n=2", "steps=1", "batch=2", "shard=2", "out=pairs"]) == 0
        shutil.rmtree("pairs")
    elif verb == "encode":
        compose([w for w in words if w.partition("=")[0] not in OWN])
    elif verb == "export":
        check_keys(verb, pieces(verb, words, EXPORT), EXPORT)
    elif verb == "compare":
        assert _run([verb, *("run" if "=" not in w else w for w in words)]) == 0
    elif verb == "table":
        words = [WEIGHTS.sub("weights=run/config.yaml", FOLDER.sub("data=run", w)) for w in words]
        assert _run([verb, *words, "--dry-run"]) == 0
    elif verb == "flops":
        assert _run([verb, *words]) == 0
    elif verb == "plan":
        compose(split_words(words)[1])
    elif verb == "list":
        assert _run([verb, *(w for w in words if not w.startswith("["))]) == 0
    else:
        with pytest.raises(SystemExit, match="0"):
            _run([verb, *words])


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize("line", commands(PAGES))
def test_every_command_is_understood(line):
    check(line)


@pytest.mark.usefixtures("inside")
@pytest.mark.parametrize(
    ("line", "error", "part"),
    [
        ("fit experiment=rectified_flow_digit", UserError, "rectified_flow_digits"),
        ("fit experiment=rectified_flow_digits model.guidence=2", ArgumentError, "guidence"),
        ("fit -m experiment=rectified_flow_digits trainer.max_epoch=1,2", ArgumentError, "max_epoch"),
        ("test ckpt_path=runs/x.ckpt trainer.devizes=3", ArgumentError, "devizes"),
        ("fitt", AssertionError, "fitt"),
        ("sample ckpt_path=runs/x.ckpt step=4", UserError, "step"),
    ],
)
def test_a_wrong_word_would_be_found(line, error, part):
    with pytest.raises(error, match=part):
        check(line)


def test_commands_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Say `penstock list\nmethods`.\n```bash\ncd x && .venv/bin/penstock fit a=1  # note\n```\n")
    assert list(commands([page])) == ["fit a=1", "list methods"]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    missing = [link for link in LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not missing


def test_the_table_of_groups_is_complete():
    text = (ROOT / "docs" / "commands.md").read_text().split("| group |")[1].split("\n\n")[0]
    named = {name for row in text.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == set(groups())


def rooms():
    """Folder -> what docs/architecture.md lets it import of the project; None is anything."""
    text = (ROOT / "docs" / "architecture.md").read_text().split("## Rooms")[1].split("## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): None if row[2] == "anything" else set(re.findall(r"`(\w+)`", row[2])) for row in rows}


@pytest.mark.parametrize("folder", [name for name, allowed in rooms().items() if allowed is not None])
def test_rooms_import_what_architecture_says(folder):
    found = set()
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("penstock."):
                parts = [p for p in node.module.split(".") if p not in ("penstock", "lightning_modules")]
                found |= {parts[0]} if parts else {alias.name for alias in node.names}
    assert found - {Path(folder).name} <= rooms()[folder]
