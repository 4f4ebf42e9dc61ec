"""`penstock fit|validate|test|predict`: from words to a LightningCLI run in a run folder."""

import os
import sys
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

from penstock.lightning_modules.cli.compose import SUGAR, as_given, compose, new_run_dir
from penstock.lightning_modules.cli.conf import groups
from penstock.lightning_modules.cli.given import check_file
from penstock.lightning_modules.cli.teacher import find_or_train, known
from penstock.lightning_modules.errors import UserError

PARTS = ("model", "data", "trainer")
IMAGES = "images"
PICTURES = "penstock.datamodules.picture_folder.PictureFolder"


def run_of_checkpoint(path: str) -> Path | None:
    """The run folder of `<run>/checkpoints/x.ckpt`, or None when the file lies elsewhere."""
    folder = Path(path).resolve().parent
    return folder.parent if folder.name == "checkpoints" and (folder.parent / "config.yaml").is_file() else None


def _value(words: list[str], key: str) -> str | None:
    return next((w.partition("=")[2] for w in reversed(words) if w.lstrip("+-").partition("=")[0] == key), None)


def _as_flags(words: list[str]) -> list[str]:
    flags = []
    for word in words:
        key, equals, value = word.lstrip("+").partition("=")
        if key == IMAGES:
            flags[:0] = [f"--data={PICTURES}", f"--data.data_dir={value}", "--data.image_size=null"]
            continue
        flags.append(word if word.startswith("-") or not equals else f"--{SUGAR.get(key, key)}={value}")
    return flags


def plan(verb: str, words: list[str], run: bool = True) -> tuple[list[str] | dict, str]:
    """Understands the words: LightningCLI's arguments (a list of flags or a tree) and the run folder.

    A teacher that the words name is found, or trained first, only if the verb is to `run`.

    `ckpt_path=` without an experiment takes the configuration of the run that wrote the checkpoint; `fit` then goes
    on in that run's folder, the other verbs in a subfolder of it.
    """
    ckpt = _value(words, "ckpt_path")
    if ckpt and ckpt not in ("last", "best", "null"):
        check_file(ckpt)
    dialect = any(w.startswith("-") for w in words)
    images = _value(words, IMAGES)
    if images is not None and (verb != "predict" or not ckpt or any(w.startswith("experiment=") for w in words)):
        raise UserError(
            f"{IMAGES}={images}: expected penstock predict ckpt_path=FILE {IMAGES}=FOLDER, and no experiment"
        )
    if images is not None and not Path(images).expanduser().exists():
        raise UserError(f"{IMAGES}={images}: no such folder or file; expected pictures in a folder, or one picture")
    if ckpt and not dialect and not any(w.partition("=")[0] in ("experiment", "model", "data") for w in words):
        saved = run_of_checkpoint(ckpt)
        if saved is None:
            raise UserError(
                f"ckpt_path={ckpt}: no config.yaml in the folder above checkpoints/; add experiment=... or --config=..."
            )
        for word in words:
            if (key := word.lstrip("+~").partition("=")[0].partition(".")[0]) in groups() and key not in PARTS:
                raise UserError(
                    f"word '{word}': a saved configuration has no group or named entries '{key}'; add experiment=NAME"
                )
        run_dir = os.environ.get("RUN_DIR") or str(saved if verb == "fit" else saved / verb)
        return [verb, "--config", str(saved / "config.yaml"), *_as_flags(words)], run_dir
    if dialect:
        config = _value(words, "config") or next((b for a, b in pairwise(words) if a == "--config"), None)
        name = Path(config).resolve().parent.parent.name if config else verb
        return [verb, *_as_flags(words)], new_run_dir(name)
    if not words:
        raise UserError(f"{verb}: nothing to run; expected experiment=NAME (penstock list experiments)")
    named = []

    def checked(teacher: str, key: str) -> str:
        named.append(key)
        return known(teacher, key) if run else as_given(teacher, key)

    tree, name = compose(words, checked)
    if run and named:  # mistakes show before a teacher trains
        tree, name = compose(words, find_or_train)
    return {"subcommand": verb, verb: tree}, new_run_dir(name)


@contextmanager
def _own_argv_hidden():
    argv, sys.argv = sys.argv, sys.argv[:1]
    try:
        yield lambda: setattr(sys, "argv", argv)
    finally:
        sys.argv = argv


def run_verb(verb: str, words: list[str]) -> int:
    """Runs one verb in this process; returns the exit code.

    The run folder is `RUN_DIR` of the environment, else that of a word `run_dir=`, else what `plan` says.
    """
    asked = _value(words, "run_dir")
    words = [w for w in words if w.partition("=")[0] != "run_dir"]
    args, run_dir = plan(verb, [w for w in words if w != "--print"], run="--print" not in words)
    run_dir = os.environ.get("RUN_DIR") or asked or run_dir
    if "--print" in words and isinstance(args, dict):
        import yaml

        print(yaml.safe_dump(args[verb], sort_keys=False), end="")
        return 0
    os.environ["RUN_DIR"] = str(Path(run_dir).resolve())
    with _own_argv_hidden() as restore:
        from penstock.lightning_modules.cli.lab import run_lab

        if "--print" in words:
            with suppress(SystemExit):
                run_lab([*args, "--print_config"], restore)
            return 0
        return run_lab(args, restore)
