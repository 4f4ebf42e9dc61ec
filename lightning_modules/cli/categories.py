"""`data.category=all` in a sweep: every category that the data folder holds."""

from itertools import product
from typing import Any

from penstock.lightning_modules.cli.compose import compose
from penstock.lightning_modules.errors import UserError

KEY, ALL = "data.category", "all"
SOURCES = ("experiment", "data", "data.name", "data.data_dir")


def expanded(words: list[str]) -> list[str]:
    """The words of a sweep with `data.category=all` written out, sorted by name; others as they are.

    Raises:
        UserError: data that have no categories, a folder without any, or swept data sets whose categories differ.
    """
    if not any(_key(word) == KEY and word.partition("=")[2] == ALL for word in words):
        return words
    found = {" ".join(choice): _categories(choice) for choice in product(*_sources(words))}
    first, *rest = found
    for choice in rest:
        if found[choice] != found[first]:
            raise UserError(f"{KEY}={ALL}: '{choice}' has other categories than '{first}'; expected a sweep for each")
    value = ",".join(f"'{name}'" for name in found[first])
    return [f"{KEY}={value}" if _key(word) == KEY else word for word in words]


def _key(word: str) -> str:
    return word.lstrip("+").partition("=")[0]


def _sources(words: list[str]) -> list[list[str]]:
    """For every word that says which data, its choices."""
    values = [(_key(word), word.partition("=")[2]) for word in words if _key(word) in SOURCES]
    return [[f"{key}={choice}" for choice in value.split(",")] for key, value in values]


def _categories(choice: tuple[str, ...]) -> list[str]:
    from penstock.datamodules.anomaly_sources import find_categories
    from penstock.datamodules.base import find_folder

    tree, _ = compose(list(choice))
    own: dict[str, Any] = tree["data"].get("init_args", {})
    if "category" not in own:
        raise UserError(f"{KEY}={ALL}: {tree['data']['class_path']} has no categories; expected e.g. data=mvtec")
    root = find_folder(own["name"], own.get("data_dir"))
    if root is None:
        raise UserError(f"{KEY}={ALL}: no folder for '{own['name']}'; set data.data_dir=FOLDER or PENSTOCK_DATA")
    return find_categories(root)
