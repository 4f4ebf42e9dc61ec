"""Where the YAML files lie: the project's own `conf/` and, after it, the user's folder `PENSTOCK_CONF`."""

import os
from pathlib import Path

from penstock.lightning_modules.errors import UserError, did_you_mean

NOT_COMPOSED = ("table",)  # folders of `conf/` that hold data


def conf_dirs() -> list[Path]:
    """Folders searched for configuration: the one beside the running code, then the user's.

    Raises:
        UserError: `PENSTOCK_CONF` names no folder.
    """
    dirs = [Path(__file__).resolve().parents[2] / "conf"]
    if own := os.environ.get("PENSTOCK_CONF"):
        if not Path(own).is_dir():
            raise UserError(f"PENSTOCK_CONF={own}: no such folder; expected one with subfolders such as experiment/")
        dirs.append(Path(own).resolve())
    return dirs


def groups() -> list[str]:
    """Names of the config groups: the folders of `conf/` that Hydra composes."""
    folders = (path for folder in conf_dirs() for path in folder.iterdir() if path.is_dir())
    names = {path.name for path in folders if not path.name.startswith(("_", "."))}
    return sorted(names - {*NOT_COMPOSED})


def options(group: str) -> dict[str, Path]:
    """Choices of a group: name -> file.

    Raises:
        UserError: the user's folder holds a file of a name that the project has.
    """
    found: dict[str, Path] = {}
    for folder in conf_dirs():
        for path in sorted((folder / group).glob("*.yaml")):
            if path.stem in found:
                raise UserError(
                    f"{path}: the name is taken by the project's {group}={path.stem}; expected another name"
                )
            found[path.stem] = path
    return found


def check_choice(group: str, value: str) -> None:
    """Raises UserError when `group=value` names a file that no folder holds."""
    names = value.strip("[]").split(",") if value.startswith("[") else [value]
    for name in (n.strip() for n in names):
        known = options(group)
        if name not in known and name != "null":
            where = f"no conf/{group}/{name}.yaml"
            raise UserError(f"{group}={name}: {where}{did_you_mean(name, known)}; choices: {', '.join(known)}")
