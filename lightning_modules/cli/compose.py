"""Words -> one plain tree for LightningCLI, by Hydra's compose API; no torch import.

Group words (`experiment=x`, `perf=[bf16,compile]`) choose files. All other words become `++key=value`: Hydra only
merges, so that jsonargparse alone judges keys and types. Files are written flat: whatever stands beside `class_path`
is moved into `init_args`, so `model.net.width=64` and `model.init_args.net.init_args.width=64` say the same.
"""

import os
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from penstock.lightning_modules.cli.conf import check_choice, conf_dirs, groups
from penstock.lightning_modules.errors import UserError, did_you_mean

KEYS = ("model", "data", "trainer", "callbacks", "logger", "seed_everything", "ckpt_path", "weights_only")
OWN = ("objective", "shape", "num_classes", "image_size", "frames", "teacher", "initial")
SUGAR = {"model.lr": "model.optimizer.lr"}


def new_run_dir(name: str) -> str:
    """`runs/<name>/<time>`, or `RUN_DIR` where the environment has it (children of DDP, jobs of a sweep)."""
    return os.environ.get("RUN_DIR") or str(Path("runs") / name / new_run_name())


def new_run_name() -> str:
    """The time; under torchrun or SLURM, where every rank works it out, something all ranks agree on."""
    if launch := os.environ.get("TORCHELASTIC_RUN_ID"):
        return f"torchrun-{launch if launch != 'none' else os.getppid()}"
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1 and (job := os.environ.get("SLURM_JOB_ID")):
        return f"slurm-{job}"
    return datetime.now().strftime("%Y%m%d-%H%M%S-%f")


def split_word(word: str) -> tuple[str, str, bool]:
    """Checks a word's form and the first segment of its key.

    Returns:
        The key as Hydra wants it (`experiment`, `++model.optimizer.lr`), the value, and whether the key is a group.

    Raises:
        UserError: no `=`, or an unknown top-level key.
    """
    known_groups = groups()
    key, equals, value = word.partition("=")
    if not equals:
        raise UserError(f"word '{word}': expected key=value{did_you_mean(word, [*KEYS, *known_groups])}")
    bare = key.lstrip("+")
    if bare in known_groups and not value.startswith("{"):
        return bare, value, True
    first = bare.split(".")[0]
    if first not in (*KEYS, *OWN):
        raise UserError(
            f"key '{first}' in '{word}': unknown{did_you_mean(first, [*KEYS, *OWN, *known_groups])}; "
            f"groups: {', '.join(known_groups)}; keys: {', '.join([*KEYS, *OWN])}"
        )
    return f"++{SUGAR.get(bare, bare)}", value, False


def hydra_words(words: list[str]) -> list[str]:
    """The words as Hydra overrides, group choices checked.

    Raises:
        UserError: a word without `=`, an unknown group choice, or an unknown top-level key.
    """
    result = []
    for word in words:
        if word.startswith("~"):
            result.append(word)
            continue
        key, value, is_group = split_word(word)
        if is_group:
            check_choice(key, value)
        if is_group and value == "null":
            result.append(f"~{key}")
            continue
        result.append(f"{key}={value if is_group else quoted(value)}")
    return result


def quoted(value: str) -> str:
    """Quotes a value that Hydra's grammar would stumble over (a path that holds `=`, for one)."""
    if re.search(r"[=:\s()@']", value) and value[:1] not in ("'", '"', "[", "{", "$"):
        return "'" + value.replace("'", "\\'") + "'"
    return value


def nest_init_args(node: Any) -> Any:
    """Moves every key beside `class_path` into `init_args`, at any depth; `init_args` written out wins."""
    if isinstance(node, list):
        return [nest_init_args(item) for item in node]
    if not isinstance(node, dict):
        return node
    if "class_path" not in node:
        return {k: nest_init_args(v) for k, v in node.items()}
    flat = {k: v for k, v in node.items() if k not in ("class_path", "init_args", "dict_kwargs")}
    nested = {k: nest_init_args(node[k]) for k in ("dict_kwargs",) if k in node}
    init_args = nest_init_args({**flat, **(node.get("init_args") or {})})
    return {"class_path": node["class_path"], **({"init_args": init_args} if init_args else {}), **nested}


def as_given(run: str, key: str) -> str:
    """Leaves the name of a run as the user wrote it."""
    return run


def compose(words: list[str], find: Callable[[str, str], str] = as_given) -> tuple[dict[str, Any], str]:
    """Composes the words into LightningCLI's tree.

    Args:
        words: Of the command line.
        find: Makes the path of a checkpoint from what the key `teacher` or `initial` holds, before `${teacher}` and
            `${initial}` are read; `initial` only where it is read and is not the teacher.

    Returns:
        The tree (keys `model`, `data`, `trainer`, ...) and the run's name (experiment, else `<model>-<data>`).

    Raises:
        UserError: an unknown group choice or key, or a value that can't be read.
    """
    overrides = hydra_words(words)
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import MarkedYAMLError

    main, *own = conf_dirs()
    if own:
        overrides.append(f"hydra.searchpath=[{','.join(f'file://{d}' for d in own)}]")
    try:
        with initialize_config_dir(str(main), version_base="1.3"):
            config = hydra_compose("config", overrides, return_hydra_config=True)
            choices = OmegaConf.to_container(config.hydra.runtime.choices)
        own_keys = OmegaConf.masked_copy(config, [k for k in config if k != "hydra"])
        if own_keys.teacher is not None:
            own_keys.teacher = find(str(own_keys.teacher), "teacher")
        own_start = own_keys.initial is not None and not OmegaConf.is_interpolation(own_keys, "initial")
        if own_start and "${initial}" in OmegaConf.to_yaml(own_keys):
            own_keys.initial = find(str(own_keys.initial), "initial")
        tree = OmegaConf.to_container(own_keys, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(refusal(error, "configuration", dict(zip(overrides, words)))) from error
    except MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{mark.name}, line {mark.line + 1}" if mark else "configuration"
        raise UserError(f"{place}: can't be read as YAML ({error.problem})") from error
    return _finish(tree), choices.get("experiment") or f"{choices['model']}-{choices['data']}"


def refusal(error: Exception, place: str, words: dict[str, str]) -> str:
    """What Hydra or OmegaConf refuses, on one line that holds the word as the user wrote it.

    Args:
        error: What was raised.
        place: Where the line starts if the error belongs to no word.
        words: Override -> the user's word.
    """
    cause = error.__cause__ or error
    text = (str(cause).strip().splitlines() or [repr(cause)])[0]
    if word := words.get(getattr(error, "override", "")):
        why = "" if error.override in text else f" ({text})"
        return f"word '{word}': can't be read{why}; expected key=value with brackets and quotes in pairs"
    for override, word in words.items():
        if override in text:
            return f"{place}: {text.replace(override, word)}"
        if override.lstrip("+").partition("=")[0] == getattr(cause, "full_key", None):
            return f"word '{word}': {text}"
    return f"{place}: {text}"


def _finish(tree: dict[str, Any]) -> dict[str, Any]:
    for key in OWN:
        tree.pop(key, None)
    tree = nest_init_args(tree)
    for key in ("callbacks", "logger"):
        named = tree.pop(key, None) or {}
        for name, entry in named.items():
            if entry and "class_path" not in entry:
                raise UserError(
                    f"{key}.{name}: no class_path, found only {entry}; switch it off with {key}.{name}=null"
                )
        tree["trainer"][key] = [entry for entry in named.values() if entry]
    return {k: v for k, v in tree.items() if v is not None or k in ("model", "data")}
