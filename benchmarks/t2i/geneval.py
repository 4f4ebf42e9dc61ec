"""GenEval (arXiv 2310.11513): does an object detector find what the prompt asks for?"""

import json
from collections import defaultdict
from pathlib import Path

from penstock.benchmarks.t2i.scorer import Official
from penstock.lightning_modules.errors import UserError

DETECTOR = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco"
DETECTOR_URL = (
    f"https://download.openmmlab.com/mmdetection/v2.0/mask2former/{DETECTOR}/{DETECTOR}_20220504_001756-743b7d99.pth"
)


class GenEval(Official):
    """The official detector and rules, then the mean over tasks of the share of right pictures; needs a CUDA device.

    Scores: `geneval`, and `geneval/<task>` with the tasks `single_object`, `two_object`, `counting`, `colors`,
    `position` and `color_attr`. One line a picture stays in `<folder>.results.jsonl`.
    """

    name = "geneval"
    url = "https://github.com/djghosh13/geneval"
    files = ("evaluation/evaluate_images.py", "evaluation/object_names.txt")
    packages = ("mmdet", "open_clip", "clip_benchmark", "pandas")

    def missing_weights(self) -> list[str]:
        file = self.weights / f"{DETECTOR}.pth"
        return [] if file.is_file() else [f"no detector {file}; get it from {DETECTOR_URL}"]

    def measure(self, folder: Path) -> dict[str, float]:
        pictures = len(list(folder.glob("*/samples/*.png")))
        if not pictures:
            raise UserError(f"geneval: no pictures in {folder}; expected 00000/samples/0000.png and so on")
        results = folder.with_name(f"{folder.name}.results.jsonl")
        results.unlink(missing_ok=True)
        self.run(self.files[0], str(folder), "--outfile", str(results), "--model-path", str(self.weights))
        scores, seen = summary(results)
        if seen != pictures:
            raise UserError(f"geneval: {results} has {seen} lines, expected one for each of {pictures} pictures")
        return scores


def summary(results: Path) -> tuple[dict[str, float], int]:
    """The scores of a results file of `evaluate_images.py` (JSON lines with `tag` and `correct`), and its lines.

    `geneval/<task>` is the share of right pictures of a task, `geneval` the mean of these shares: tasks weigh the
    same, however many prompts they have.

    Raises:
        UserError: no such file, a line that is none of it, or none at all.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    try:
        lines = results.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"geneval: {results}: cannot be read ({error.strerror})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            right[row["tag"]].append(bool(row["correct"]))
        except (ValueError, KeyError, TypeError):
            raise UserError(f"geneval: {results} line {number}: expected an object with tag and correct") from None
    if not right:
        raise UserError(f"geneval: {results}: empty; expected one line a picture")
    shares = {tag: sum(marks) / len(marks) for tag, marks in right.items()}
    overall = {"geneval": sum(shares.values()) / len(shares)}
    return overall | {f"geneval/{tag}": share for tag, share in shares.items()}, sum(map(len, right.values()))
