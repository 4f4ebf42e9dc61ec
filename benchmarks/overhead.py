"""What Lightning and the default callbacks cost in training: steps a second against a plain PyTorch loop.

`python -m penstock.benchmarks.overhead`: `experiment=rectified_flow_digits` as composed by the command line, with every
training callback, the csv logger and without validation, takes turns with a loop written by hand around a copy of the
same net, the same optimiser, schedule, clipping, average and loss.
"""

import sys
from collections.abc import Sequence

from penstock.benchmarks.interleave import contest
from penstock.benchmarks.report import parser, write

WORDS = ["trainer.limit_val_batches=0", "callbacks.metrics.n=20", "callbacks.metrics.steps=[1]"]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and writes `overhead.json` and `overhead.md`."""
    options = parser(__doc__)
    options.add_argument("--experiment", default="rectified_flow_digits")
    options.add_argument("--turns", type=int, default=60, help="turns of each loop that count")
    options.add_argument("--block", type=int, default=25, help="steps of a turn")
    options.add_argument("words", nargs="*", help="further words for penstock fit")
    given = options.parse_args(argv)
    words = [f"experiment={given.experiment}", f"seed_everything={given.seed}", *WORDS, *given.words]
    result = contest("plain", words, given.turns, given.block, given.threads)
    rows = [
        {
            "Lightning's time": what,
            "steps/s": result.rival_steps_per_second / (1 + wall),
            "plain PyTorch, steps/s": result.rival_steps_per_second,
            "overhead": f"{wall:+.1%}",
            "overhead in CPU time": f"{cpu:+.1%}",
        }
        for what, wall, cpu in (
            ("median turn", result.overhead, result.cpu_overhead),
            ("all turns", result.overhead_with_epoch_ends, result.cpu_overhead_with_epoch_ends),
        )
    ]
    values = {"target": "overhead <= 5 %", **result._asdict()}
    write(
        "overhead",
        values,
        rows,
        title="Overhead of the LightningModule and its callbacks",
        seed=given.seed,
        out=given.out,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
