"""VBench (arXiv 2311.17982): sixteen dimensions of the quality of clips and of what they show of their prompts."""

import ast
import json
from pathlib import Path
from typing import Any

from penstock.benchmarks.t2i.scorer import Official
from penstock.lightning_modules.errors import UserError, did_you_mean

DINO = "dino_model"
CLIP, GRIT = "clip_model/ViT-B-32.pt", "grit_model/grit_b_densecap_objectdet.pth"
VICLIP = "ViCLIP/ViClip-InternVid-10M-FLT.pth"
WEIGHTS: dict[str, tuple[str, ...]] = {
    "subject_consistency": (f"{DINO}/dino_vitbase16_pretrain.pth", f"{DINO}/facebookresearch_dino_main/hubconf.py"),
    "background_consistency": (CLIP,),
    "temporal_flickering": (),
    "motion_smoothness": ("amt_model/amt-s.pth",),
    "dynamic_degree": ("raft_model/models/raft-things.pth",),
    "aesthetic_quality": ("clip_model/ViT-L-14.pt", "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth"),
    "imaging_quality": ("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",),
    "object_class": (GRIT,),
    "multiple_objects": (GRIT,),
    "human_action": ("umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",),
    "color": (GRIT,),
    "spatial_relationship": (GRIT,),
    "scene": ("caption_model/tag2text_swin_14m.pth",),
    "appearance_style": (CLIP,),
    "temporal_style": (VICLIP,),
    "overall_consistency": (VICLIP,),
}


class VBench(Official):
    """The official program on its prompts, in one process on a CUDA device.

    Scores in [0, 1]: `vbench/<dimension>`, and, where all sixteen are measured, `vbench` (the total),
    `vbench/quality` and `vbench/semantic`, normalised and weighted with the constants of the checkout. What the
    program writes stays in `<folder>.results/`.

    Args:
        repository: Checkout of VBench.
        weights: Folder of the networks (`VBENCH_CACHE_DIR`), laid out as the program does.
        python: Interpreter in whose environment the packages are installed; None is this one.
        dimensions: What is measured; None is all.

    Raises:
        UserError: an unknown dimension.
    """

    name = "vbench"
    url = "https://github.com/Vchitect/VBench"
    files = ("evaluate.py", "vbench/VBench_full_info.json", "scripts/constant.py")
    packages = ("torch", "cv2", "clip", "decord", "timm", "pyiqa", "detectron2")

    def __init__(self, repository: str, weights: str, python: str | None = None, dimensions: list[str] | None = None):
        super().__init__(repository, weights, python)
        for dimension in dimensions or ():
            if dimension not in WEIGHTS:
                raise UserError(f"vbench: no dimension '{dimension}'{did_you_mean(dimension, WEIGHTS)}")
        self.dimensions = list(dimensions or WEIGHTS)

    def missing_weights(self) -> list[str]:
        needed = dict.fromkeys(file for dimension in self.dimensions for file in WEIGHTS[dimension])
        where = f"see pretrained/ and vbench/utils.py of {self.url}"
        return [f"no file {self.weights / file}; {where}" for file in needed if not (self.weights / file).is_file()]

    def measure(self, folder: Path) -> dict[str, float]:
        prompts = json.loads((self.repository / self.files[1]).read_text(encoding="utf-8"))
        asked = dict.fromkeys(row["prompt_en"] for row in prompts if set(row["dimension"]) & set(self.dimensions))
        absent = [name for text in asked for k in range(5) if not (folder / (name := f"{text}-{k}.mp4")).is_file()]
        if absent:
            raise UserError(
                f"vbench: no file {folder / absent[0]} (and {len(absent) - 1} more); expected five a prompt"
            )
        results = folder.with_name(f"{folder.name}.results")
        known = set(results.glob("*_eval_results.json"))
        words = ["--videos_path", folder, "--output_path", results, "--full_json_dir", self.files[1]]
        words += ["--load_ckpt_from_local", "True", "--dimension", *self.dimensions]
        self.run(self.files[0], *map(str, words), VBENCH_CACHE_DIR=str(self.weights))
        new = set(results.glob("*_eval_results.json")) - known
        if len(new) != 1:
            raise UserError(f"vbench: {results}: {len(new)} new results, expected one")
        return summary(new.pop(), self.dimensions, self.repository / self.files[2])


def summary(results: Path, dimensions: list[str], constants: Path) -> dict[str, float]:
    """The scores in a results file of the program, and their total where it has all dimensions.

    Raises:
        UserError: a file that is not one, or without a dimension.
    """
    try:
        found = json.loads(results.read_text(encoding="utf-8"))
        scores = {dimension: float(found[dimension][0]) for dimension in dimensions}
    except (ValueError, OSError, TypeError, KeyError, IndexError) as error:
        raise UserError(f"vbench: {results}: cannot be read as results ({type(error).__name__}: {error})") from error
    named = {f"vbench/{dimension}": score for dimension, score in scores.items()}
    if set(scores) != set(WEIGHTS):
        return named
    known = _constants(constants)
    parts = {"quality": "QUALITY_LIST", "semantic": "SEMANTIC_LIST"}
    means = {part: _weighted(scores, known[names], known) for part, names in parts.items()}
    shares = {part: known[f"{part.upper()}_WEIGHT"] for part in parts}
    total = sum(shares[part] * means[part] for part in parts) / sum(shares.values())
    return {"vbench": total, **{f"vbench/{part}": mean for part, mean in means.items()}, **named}


def _constants(path: Path) -> dict[str, Any]:
    """What a file assigns to names, read and not run."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    given = [node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)]
    return {node.targets[0].id: ast.literal_eval(node.value) for node in given}


def _weighted(scores: dict[str, float], names: list[str], known: dict[str, Any]) -> float:
    total = 0.0
    for name in names:
        low, high = known["NORMALIZE_DIC"][name]["Min"], known["NORMALIZE_DIC"][name]["Max"]
        total += known["DIM_WEIGHT"][name] * (scores[name.replace(" ", "_")] - low) / (high - low)
    return total / sum(known["DIM_WEIGHT"][name] for name in names)
