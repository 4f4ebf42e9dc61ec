"""What a pyramid costs by resolution: the largest model on the smallest image, the same everywhere, or the reverse.

Closed forms of arXiv 2406.04330's DeiT-T, S and B with windows of 14 cells on images of 1, 4/5 and 2/5 of the side,
as its PIIP-TSB 1120/896/448, without a merging. Writes `piip_costs.json`, `.md` and `.png`.
"""

from collections.abc import Sequence
from pathlib import Path

from penstock.benchmarks.report import parser, write
from penstock.lightning_modules.nets.piip.flops import PATCH, Shape, pyramid_operations

WIDTHS = {"T": 192, "S": 384, "B": 768}
DEPTH, WINDOW = 12, 14
PARTS = (0.4, 0.8, 1.0)  # of the side, the smallest image first
KINDS = {"inverted": "BST", "equal": "BBB", "reversed": "TSB", "B alone": "B"}
SIDES = tuple(range(320, 1793, 160))
NOMINAL = 1120


def shapes(models: str, side: int) -> list[Shape]:
    """Of the models by letters, the one on the smallest image first; a single one sees the largest."""
    parts = PARTS[-len(models) :]
    return [
        Shape(WIDTHS[letter], DEPTH, round(side * part / PATCH) * PATCH, WINDOW, DEPTH)
        for letter, part in zip(models, parts)
    ]


def costs(side: int) -> dict[str, float]:
    """1e9 operations of every kind."""
    return {kind: pyramid_operations(shapes(models, side), light_merge=False) / 1e9 for kind, models in KINDS.items()}


def plot(sides: Sequence[int], path: Path) -> None:
    """A line a kind over the side of the largest image."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = [costs(side) for side in sides]
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for kind, models in KINDS.items():
        label = (
            kind
            if len(models) == 1
            else f"{kind}: " + ", ".join(f"{letter} on {part:g}" for letter, part in zip(models, PARTS))
        )
        axis.plot(sides, [one[kind] for one in found], marker="o", markersize=3, label=label)
    axis.set(xlabel="side of the largest image, pixels", ylabel="1e9 operations", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the table and the picture."""
    given = parser(__doc__).parse_args(argv)
    rows = [{"side": side, **costs(side)} for side in sorted({*SIDES, NOMINAL})]
    for row in rows:
        row["reversed / inverted"] = row["reversed"] / row["inverted"]
    title = "Operations of pyramids of DeiT-T, S and B by the side of the largest image (1e9)"
    write("piip_costs", {}, rows, title=title, seed=given.seed, out=given.out)
    plot([row["side"] for row in rows], given.out / "piip_costs.png")


if __name__ == "__main__":
    main()
