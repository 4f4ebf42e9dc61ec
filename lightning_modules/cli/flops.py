"""`penstock flops experiment=...`: operations and parameters of a model, part by part, nothing computed or loaded."""

from penstock.lightning_modules.cli.compose import compose
from penstock.lightning_modules.errors import UserError


def run_flops(words: list[str]) -> int:
    """Prints what the model costs that the words of `fit` compose; exit code 0.

    Raises:
        UserError: an unknown word, or a model whose parts are not counted.
    """
    tree, name = compose(words)

    import torch

    from penstock.lightning_modules.build import build

    with torch.device("meta"):
        (model,) = build(tree, "model")
    if not hasattr(model, "costs"):
        raise UserError(f"flops: {type(model).__name__} has no costs by parts; expected a model such as piip")
    found = model.eval().costs()
    rows = [(part, f"{row.operations / 1e9:.3f}", f"{row.parameters / 1e6:.3f}") for part, row in found.parts.items()]
    whole = (sum(row[k] for row in found.parts.values()) for k in (0, 1))
    rows += [("all", *(f"{amount / unit:.3f}" for amount, unit in zip(whole, (1e9, 1e6))))]
    if found.as_published is not None:
        rows.append(("backbone, counted as published", f"{found.as_published / 1e9:.3f}", ""))
    if found.closed_form is not None:
        rows.append(("closed form of it, norms left out", f"{found.closed_form / 1e9:.3f}", ""))
    if found.published is not None:
        rows.append(("published", f"{found.published:g}", ""))
    table = [(name, "operations, 1e9", "parameters, 1e6"), *rows]
    widths = [max(len(row[k]) for row in table) for k in range(3)]
    for part, *amounts in table:
        print("  ".join([part.ljust(widths[0]), *(x.rjust(n) for x, n in zip(amounts, widths[1:]))]).rstrip())
    return 0
