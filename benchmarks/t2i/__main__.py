"""Scores a folder of pictures or clips that `penstock predict data=geneval`, `data=dpg` or `data=vbench` wrote.

`python -m penstock.benchmarks.t2i geneval|dpg|vbench|diversity FOLDER ...`; prints the scores as JSON.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from penstock.benchmarks.t2i.diversity import LPIPSDiversity
from penstock.benchmarks.t2i.dpg import DPGBench
from penstock.benchmarks.t2i.geneval import GenEval
from penstock.benchmarks.t2i.scorer import Scorer
from penstock.benchmarks.t2i.vbench import VBench
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.loggers import write_atomically


def scorer(given: argparse.Namespace) -> Scorer:
    """The scorer that the words name."""
    if given.benchmark == "diversity":
        return LPIPSDiversity(given.net, given.weights, given.device)
    official = (given.repository, given.weights, given.python)
    if given.benchmark == "vbench":
        return VBench(*official, given.dimensions)
    return GenEval(*official) if given.benchmark == "geneval" else DPGBench(*official, given.samples)


def main(argv: Sequence[str] | None = None) -> int:
    """Scores one folder; exit code 2 and one line where something is missing."""
    options = argparse.ArgumentParser(prog="penstock.benchmarks.t2i", description=__doc__.split("\n")[0])
    kinds = options.add_subparsers(dest="benchmark", required=True)
    for name, repository, weights in (
        ("geneval", "djghosh13/geneval", "folder of the detector's weights"),
        ("vbench", "Vchitect/VBench", "folder of its networks (VBENCH_CACHE_DIR)"),
        ("dpg", "TencentQQGYLab/ELLA", "cache folder of modelscope with mPLUG"),
    ):
        kind = kinds.add_parser(name)
        kind.add_argument("--repository", required=True, help=f"checkout of {repository}")
        kind.add_argument("--weights", required=True, help=weights)
        kind.add_argument("--python", help="interpreter of the environment in which its packages are installed")
    kind.add_argument("--samples", type=int, default=4, help="samples in a picture, 4 or 1")
    kinds.choices["vbench"].add_argument("--dimensions", nargs="+", help="what is measured; all where none are given")
    kind = kinds.add_parser("diversity")
    kind.add_argument("--net", default="alex", choices=["alex", "vgg", "squeeze"])
    kind.add_argument("--weights", help="torchvision's weights of the network; downloaded where none are given")
    kind.add_argument("--device", default="cpu")
    for kind in kinds.choices.values():
        kind.add_argument("folder", type=Path, help="the pictures or clips")
        kind.add_argument("--to", type=Path, help="a file for the scores")
    given = options.parse_args(argv)
    try:
        text = json.dumps(scorer(given).score(given.folder), indent=1)
        if given.to:
            write_atomically(given.to, f"{text}\n")
    except UserError as error:
        print(f"penstock: {error}", file=sys.stderr)
        return 2
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
