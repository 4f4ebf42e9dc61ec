"""jsonargparse's error -> one line: place, complaint, found, expected, nearest valid choice."""

import importlib
import inspect
import re
from collections.abc import Iterator
from typing import Any

from penstock.lightning_modules.cli.compose import SUGAR
from penstock.lightning_modules.cli.conf import groups, options
from penstock.lightning_modules.errors import did_you_mean

TOP = ("model", "data", "trainer", "seed_everything", "ckpt_path", "weights_only", "callbacks", "logger")


def explain(error: BaseException) -> str:
    """The first complaint of a jsonargparse error and where it belongs, on one line."""
    text = " ".join(str(error).split())
    for pattern, describe in _COMPLAINTS:
        if match := re.search(pattern, text):
            keys = re.findall(r'Parser key "([^"]+)"', text[: match.start()])
            classes = re.findall(r"given class_path '([^']+)'", text[: match.start()])
            place = ".".join(keys)
            return f"config error{' at ' * bool(keys)}{place}: {describe(match, classes, text, place)}"
    return f"config error: {text[:400]}"


def first_complaint(error: BaseException) -> str:
    """What a class said when it refused to be built, out of what jsonargparse wraps around it."""
    text = " ".join(str(error).split())
    while inner := re.search(r"Errors: - (Does not validate against any .*)", text):
        text = inner[1]
    found = re.search(r"Errors: - (.+?)(?= - (?:Not a valid|Expected|Does not|Problem with)| Given value|$)", text)
    return found.group(1) if found else text


def with_whole_key(complaint: str, config: dict[str, Any]) -> str:
    """What a class said of one of its keys, as in `neck.layers: found 0`, with the key as the command line has it.

    Args:
        complaint: Of a class that was refused.
        config: Of the run.

    Returns:
        `model.net.neck.layers: found 0`, or `configuration: <complaint>` where no key or several end so.
    """
    key, colon, rest = complaint.partition(": ")
    if colon and re.fullmatch(r"\w+(\.\w+)+", key):
        found = [whole for whole in _keys(config) if f".{whole}".endswith(f".{key}")]
        if len(found) == 1:
            return f"{found[0]}: {rest}"
    return f"configuration: {complaint}"


def _keys(node: Any, place: str = "") -> Iterator[str]:
    """Keys of a configuration, whatever is at them, without `init_args`."""
    node = node._asdict() if hasattr(node, "_asdict") else node
    for name, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        whole = place if name == "init_args" else f"{place}.{name}".lstrip(".")
        if name != "init_args":
            yield whole
        yield from _keys(value, whole)


def _parameters(class_path: str) -> list[str]:
    target = _lookup(class_path)
    names: list[str] = []
    for cls in inspect.getmro(target) if inspect.isclass(target) else (target,):
        if cls is object:
            continue
        parameters = inspect.signature(cls).parameters.values()
        names += [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return [n for n in dict.fromkeys(names) if n not in ("self", "params", "optimizer_") and not n.startswith("_")]


def _lookup(class_path: str) -> Any:
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _unknown_option(match: re.Match, classes: list[str], text: str, place: str) -> str:
    name = match.group(1).replace(".init_args.", ".")
    owner = classes[-1] if classes else None
    if owner is None and (used := re.findall(r"class_path='([^']+)'", text[match.start() :])):
        owner = used[0]
    if "callable class" in text and (used := re.search(r"class_path='([^']+)'", text[match.start() :])):
        owner = used.group(1)
    if owner is None:
        return f"option '{name}' is not accepted{did_you_mean(name, TOP)}"
    names = [*_parameters(owner), *(key.removeprefix(f"{place}.") for key in SUGAR if place == key.rpartition(".")[0])]
    short = owner.rpartition(".")[2]
    first = name.partition(".")[0]
    part = (
        f", leave it out with {first}=null" if first not in names and first in groups() else did_you_mean(name, names)
    )
    return f"option '{name}' is not accepted{part}; {short} takes {', '.join(names)}"


def _unknown_key(match: re.Match, classes: list[str], text: str, place: str) -> str:
    key = match.group(1)
    first, _, last = key.rpartition(".")
    if first == "trainer":
        names = _parameters("lightning.pytorch.Trainer")
        return f"'{key}' is not accepted{did_you_mean(last, names)}"
    return f"'{key}' is not accepted{did_you_mean(key, TOP)}; expected one of {', '.join(TOP)}"


def _no_attribute(match: re.Match, classes: list[str], text: str, place: str) -> str:
    module, name = match.groups()
    public = [n for n in dir(importlib.import_module(module)) if not n.startswith("_")]
    return f"class path '{module}.{name}': module '{module}' has no '{name}'{did_you_mean(name, public)}"


def _no_module(match: re.Match, classes: list[str], text: str, place: str) -> str:
    return f"class path '{classes[-1] if classes else match.group(1)}': no module named '{match.group(1)}'"


def _no_subclass(match: re.Match, classes: list[str], text: str, place: str) -> str:
    return f"class path '{match.group(1)}': expected a subclass of {match.group(2)}"


def _required(match: re.Match, classes: list[str], text: str, place: str) -> str:
    names = match.group(1).split(", ")
    by = f" by {classes[-1].rpartition('.')[2]}" if classes else ""
    is_ = "is" if len(names) == 1 else "are"
    return f"{', '.join(repr(name) for name in names)} {is_} required{by}{_choices(*names)}"


def _abstract(match: re.Match, classes: list[str], text: str, place: str) -> str:
    return f"no class_path, found keys of one only{_choices(place.rpartition('.')[2])}"


def _choices(*names: str) -> str:
    """The choices of keys that are groups."""
    found = [f"{name}={' or '.join(options(name))}" for name in names if name in groups()]
    return f"; expected {', '.join(found)}" if found else ""


def _protocol(match: re.Match, classes: list[str], text: str, place: str) -> str:
    module = match.group(1).rpartition(".")[0]
    protocol, room = _lookup(match.group(1)), vars(importlib.import_module(module))
    asked = {key for key in vars(protocol) if key == "__call__" or not key.startswith("_")}
    classes = [c for c in room.values() if inspect.isclass(c) and c.__module__ == module and c is not protocol]
    known = [f"{module}.{c.__name__}" for c in classes if asked <= vars(c).keys()]
    found = re.search(r"Given value: (.*?)(?= - Expected| - Not a valid|$)", text[match.start() :])
    return (
        f"no class_path, found only {found[1] if found else '?'}; expected {place}.class_path={' or '.join(known)} and "
        "its arguments beside it"
    )


def _wrong_type(match: re.Match, classes: list[str], text: str, place: str) -> str:
    rest = text[match.start() :]
    found = re.search(r"(?:Given|Got) value: (.*?)(?:\. Got value:| - Expected| - Not a valid|$)", rest)
    asked = rest[: found.start()].strip() if found else rest
    wanted = re.findall(r"Expected an? (.+?)(?=\.? Got| - | Given value|\.?$)", asked)
    names = [re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", w).replace("typing.", "") for w in wanted]
    names = [n for n in dict.fromkeys(names) if not n.startswith(("path but", "dot import", "list of"))]
    names = ["None" if n == "NoneType" else n for n in names]
    expected = " or ".join(names) or "a value of another type"
    value = found.group(1).strip() if found else "?"
    literals = re.findall(r"'([^']+)'", " ".join(n for n in names if n.startswith("Literal")))
    return f"expected {expected}, found {value}{did_you_mean(value, literals)}"


_COMPLAINTS = (
    (r"Option '([^']+)' is not accepted", _unknown_option),
    (r"does not accept option '([^']+)'", _unknown_key),
    (r"module '([^']+)' has no attribute '([^']+)'", _no_attribute),
    (r"No module named '([^']+)'", _no_module),
    (r"Import path (\S+) does not correspond to a subclass of (\w+)", _no_subclass),
    (r"following arguments are required: (\w+(?:, \w+)*)", _required),
    (r"Expected an instantiatable class, but (\S+) is a protocol", _protocol),
    (r"Expected an instantiatable class, but \S+ is abstract", _abstract),
    (r"Expected an? ", _wrong_type),
)
