"""Where the YAML files lie: the project's own `conf/` and, after it, the user's folder `PENSTOCK_CONF`."""

import os
from pathlib import Path

from penstock.lightning_modules.errors import UserError, did_you_mean


def conf_dirs() -> list[Path]:
    """Folders searched for configuration, the project's first.

    Raises:
        UserError: `PENSTOCK_CONF` names no folder.
    """
    import penstock.conf

    dirs = [Path(next(p for p in penstock.conf.__path__ if Path(p).is_dir()))]
    if own := os.environ.get("PENSTOCK_CONF"):
        if not Path(own).is_dir():
            raise UserError(f"PENSTOCK_CONF={own}: no such folder; expected one with subfolders such as experiment/")
        dirs.append(Path(own).resolve())
    return dirs


def groups() -> list[str]:
    """Names of the config groups: the folders of `conf/`."""
    folders = (path for folder in conf_dirs() for path in folder.iterdir() if path.is_dir())
    return sorted({path.name for path in folders if not path.name.startswith(("_", "."))})


def options(group: str) -> dict[str, Path]:
    """Choices of a group: name -> file."""
    return {p.stem: p for d in conf_dirs() for p in sorted((d / group).glob("*.yaml"))}


def check_choice(group: str, value: str) -> None:
    """Raises UserError when `group=value` names a file that no folder holds."""
    names = value.strip("[]").split(",") if value.startswith("[") else [value]
    for name in (n.strip() for n in names):
        known = options(group)
        if name not in known and name not in ("null", ""):
            where = f"no conf/{group}/{name}.yaml"
            raise UserError(f"{group}={name}: {where}{did_you_mean(name, known)}; choices: {', '.join(known)}")
