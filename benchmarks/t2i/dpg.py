"""DPG-Bench (arXiv 2403.05135): does a model that answers questions about pictures say yes to what the prompt says?"""

import re
from pathlib import Path

from PIL import Image

from penstock.benchmarks.t2i.scorer import Official
from penstock.lightning_modules.errors import UserError

MODEL = "damo/mplug_visual-question-answering_coco_large_en"
PLACES = ("", "hub", "models", "hub/models")  # below the cache of modelscope, whose versions differ
NUMBER = r"(nan|-?[\d.]+(?:e[-+]?\d+)?)"


class DPGBench(Official):
    """The official questions and mPLUG, in one process.

    Scores, in percent: `dpg`, and `dpg/<category>` for the broad categories (`dpg/entity`) and the fine ones
    (`dpg/attribute-color`). What the program writes stays in `<folder>.results.txt` and `<folder>.results_detail.txt`.

    Args:
        repository: Checkout of ELLA.
        weights: Cache folder of modelscope (`MODELSCOPE_CACHE`) that holds mPLUG.
        python: Interpreter in whose environment the packages are installed; None is this one.
        samples: Samples in a picture: 4 as 2x2, or 1.
    """

    name = "dpg"
    url = "https://github.com/TencentQQGYLab/ELLA"
    files = ("dpg_bench/compute_dpg_bench.py", "dpg_bench/dpg_bench.csv")
    packages = ("modelscope", "accelerate", "pandas")

    def __init__(self, repository: str, weights: str, python: str | None = None, samples: int = 4):
        super().__init__(repository, weights, python)
        if samples not in (1, 4):
            raise UserError(f"dpg: samples {samples}, expected 4 or 1")
        self.samples = samples

    def missing_weights(self) -> list[str]:
        if any((self.weights / place / MODEL / "configuration.json").is_file() for place in PLACES):
            return []
        place = self.weights / PLACES[-1] / MODEL
        return [f"no mPLUG at {place / 'configuration.json'}; get it from https://modelscope.cn/models/{MODEL}"]

    def measure(self, folder: Path) -> dict[str, float]:
        pictures = sorted(folder.glob("*.png"))
        if not pictures:
            raise UserError(f"dpg: no pictures in {folder}; expected <name>.png of each prompt")
        with Image.open(pictures[0]) as first:
            side = first.width // (2 if self.samples == 4 else 1)
        results = folder.with_name(f"{folder.name}.results.txt")
        options = {"image-root-path": folder, "resolution": side, "pic-num": self.samples, "res-path": results}
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        self.run(
            self.files[0], *words, "--csv", self.files[1], "--vqa-model", "mplug", MODELSCOPE_CACHE=str(self.weights)
        )
        scores, seen = summary(results)
        if seen != len(pictures):
            raise UserError(
                f"dpg: {results} has {seen} pictures, expected {len(pictures)}; the others could not be read"
            )
        return scores


def summary(results: Path) -> tuple[dict[str, float], int]:
    """The scores at the end of a results file of `compute_dpg_bench.py`, and how many pictures it lists.

    Raises:
        UserError: no such file, or one without the score, as a run that was stopped leaves it.
    """
    try:
        text = results.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"dpg: {results}: cannot be read ({error.strerror})") from error
    overall = re.search(rf"^DPG-Bench score: {NUMBER}$", text, re.MULTILINE)
    if not overall:
        raise UserError(
            f"dpg: {results}: no line 'DPG-Bench score: ...'; expected a file of a run that came to its end"
        )
    found = re.findall(rf"^\t(.+): {NUMBER}$", text, re.MULTILINE)
    parts = {f"dpg/{name.replace(' - ', '-').replace(' ', '_')}": float(value) for name, value in found}
    listed = re.findall(r"^.+\.png, [\d.]", text, re.MULTILINE)
    return {"dpg": float(overall[1]), **parts}, len(listed)
