"""`penstock list`: what there is, read off the folders; no torch import, no YAML parsing."""

from pathlib import Path

from penstock.lightning_modules.cli.conf import groups, options
from penstock.lightning_modules.errors import UserError, did_you_mean

KINDS = {"experiments": "experiment", "methods": "model", "data": "data", "tables": "table"}


def _first_comment(path: Path) -> str:
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.strip().lstrip("#").strip().strip('"').strip()
        if text and not text.startswith("@package"):
            return text if line.lstrip().startswith(("#", '"""')) else ""
    return ""


def _entries(kind: str) -> dict[str, str]:
    if kind == "kernels":
        import penstock.kernels

        files = sorted(Path(penstock.kernels.__file__).parent.glob("*.py"))
        return {p.stem: _first_comment(p) for p in files if not p.stem.startswith("_") and p.stem != "dispatch"}
    if kind == "options":
        return {group: ", ".join(options(group)) for group in groups() if group not in KINDS.values()}
    return {name: _first_comment(path) for name, path in options(KINDS[kind]).items()}


def run_list(words: list[str]) -> int:
    """Prints one kind, or all; exit code 0."""
    kinds = [*KINDS, "kernels", "options"]
    for word in words:
        if word not in kinds:
            raise UserError(f"list {word}: expected one of {', '.join(kinds)}{did_you_mean(word, kinds)}")
    for kind in words or kinds:
        entries = _entries(kind)
        if not words:
            print(f"{kind}:")
        width = max(map(len, entries), default=0)
        for name, text in entries.items():
            print(f"{'' if words else '  '}{name:<{width}}  {text}".rstrip())
    return 0
