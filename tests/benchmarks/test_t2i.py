"""Scorers of text-to-image benchmarks: results by hand, official programs that are played, LPIPS pair by pair."""

import json

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from penstock.benchmarks.t2i import dpg, geneval
from penstock.benchmarks.t2i.__main__ import main
from penstock.benchmarks.t2i.diversity import LPIPSDiversity, pairwise, prompts_of
from penstock.benchmarks.t2i.dpg import DPGBench
from penstock.benchmarks.t2i.geneval import DETECTOR, GenEval
from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.perceptual import LPIPS

DPG_RESULTS = """\
{folder}/0.png, 1.0, 0.5, 0.5, 0.0, 0.5
{folder}/COCO1.png, 0.25, 0.25, 0.25, 0.25, 0.25
Model: dpg
L1 category scores:
\tentity: 62.5
\tattribute: 25.0
L2 category scores:
\tattribute - color: 25.0
\tentity - whole: 62.5
Image path: {folder}
Save results to: {results}
DPG-Bench score: 37.5
"""
EVALUATE = """\
import argparse, json, pathlib
import mmdet
p = argparse.ArgumentParser()
p.add_argument("imagedir"); p.add_argument("--outfile"); p.add_argument("--model-path")
a = p.parse_args()
assert pathlib.Path(a.model_path, "%s.pth").is_file()
rows = []
for folder in pathlib.Path(a.imagedir).iterdir():
    tag = json.load(open(folder / "metadata.jsonl"))["tag"]
    rows += [{"filename": str(f), "tag": tag, "correct": f.name < "0002.png"} for f in folder.glob("samples/*.png")]
open(a.outfile, "w").write("\\n".join(map(json.dumps, rows)))
"""
COMPUTE = """\
import os, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert (words["--resolution"], words["--pic-num"], words["--vqa-model"]) == ("40", "4", "mplug"), words
assert os.path.isfile(words["--csv"]) and os.environ["MODELSCOPE_CACHE"]
text = open("results").read()
open(words["--res-path"], "w").write(text.format(folder=words["--image-root-path"], results=words["--res-path"]))
"""


def jsonl(path, marks):
    rows = [{"filename": "x", "tag": tag, "prompt": "p", "correct": good, "reason": ""} for tag, good in marks]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_geneval_by_hand(tmp_path):
    """3 of 4, 1 of 2, 0 of 3: tasks weigh the same, (3/4 + 1/2 + 0) / 3 = 5/12, though 4 of 9 pictures are right."""
    marks = [("single_object", True), ("counting", False), ("single_object", True), ("single_object", False)]
    marks += [("counting", True), ("colors", False), ("single_object", True), ("colors", False), ("colors", False)]
    scores, lines = geneval.summary(jsonl(tmp_path / "r.jsonl", marks))
    assert lines == 9
    assert scores == {
        "geneval": pytest.approx(5 / 12),
        "geneval/single_object": 0.75,
        "geneval/counting": 0.5,
        "geneval/colors": 0.0,
    }


def test_a_results_file_at_fault_is_named(tmp_path):
    path = tmp_path / "r"
    for content, says in (("", "r: empty"), ('{"tag": "a"}', "r line 1: expected an object with tag"), ("{", "line 1")):
        path.write_text(content)
        with pytest.raises(UserError, match=says):
            geneval.summary(path)
    with pytest.raises(UserError, match="none: cannot be read"):
        geneval.summary(tmp_path / "none")
    path.write_text("x/0.png, 1.0, 1.0\n")
    with pytest.raises(UserError, match=r"no line 'DPG-Bench score: \.\.\.'"):
        dpg.summary(path)
    with pytest.raises(UserError, match="none: cannot be read"):
        dpg.summary(tmp_path / "none")


def test_dpg_reads_what_the_official_program_writes(tmp_path):
    (tmp_path / "r.txt").write_text(DPG_RESULTS.format(folder="/a, b", results="r.txt"))
    scores, pictures = dpg.summary(tmp_path / "r.txt")
    assert pictures == 2
    assert scores == {
        "dpg": 37.5,
        "dpg/entity": 62.5,
        "dpg/attribute": 25.0,
        "dpg/attribute-color": 25.0,
        "dpg/entity-whole": 62.5,
    }


def noise(seed, size=40):
    return np.random.default_rng(seed).integers(256, size=(size, size, 3), dtype=np.uint8)


def folders(path, prompts=2, samples=4):
    for p in range(prompts):
        (path / f"{p:05d}" / "samples").mkdir(parents=True)
        tag = ("single_object", "colors")[p % 2]
        (path / f"{p:05d}" / "metadata.jsonl").write_text(json.dumps({"tag": tag, "include": [], "prompt": "x"}))
        for s in range(samples):
            Image.fromarray(noise(10 * p + s)).save(path / f"{p:05d}" / "samples" / f"{s:04d}.png")
    return path


def grids(path, names=("0", "COCO1")):
    path.mkdir()
    for p, name in enumerate(names):
        a, b, c, d = (noise(10 * p + s) for s in range(4))
        Image.fromarray(np.vstack((np.hstack((a, b)), np.hstack((c, d))))).save(path / f"{name}.png")
    return path


@pytest.fixture
def packages(tmp_path, monkeypatch):
    for name in (*GenEval.packages, *DPGBench.packages):
        (tmp_path / "packages" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "packages" / name / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    return tmp_path / "packages"


def checkout(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(content)
    return path


@pytest.mark.usefixtures("packages")
def test_geneval_runs_the_official_program(tmp_path, capsys):
    repository, weights = tmp_path / "geneval", tmp_path / "weights"
    words = ["geneval", str(folders(tmp_path / "out")), "--repository", str(repository), "--weights", str(weights)]

    def refused(*patterns):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert all(pattern in said for pattern in patterns), said

    refused(
        f"geneval: no file {repository}/evaluation/evaluate_images.py; expected a checkout of https://github.com/dj"
    )
    checkout(repository, {"evaluation/evaluate_images.py": EVALUATE % DETECTOR, "evaluation/object_names.txt": "x\n"})
    refused(f"geneval: no detector {weights}/{DETECTOR}.pth; get it from https://download.openmmlab.com/")
    checkout(weights, {f"{DETECTOR}.pth": ""})
    assert main([*words, "--to", str(tmp_path / "scores.json")]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "scores.json").read_text())
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores == {"geneval": 0.5, "geneval/single_object": 0.5, "geneval/colors": 0.5}
    (repository / "evaluation/evaluate_images.py").write_text("import sys\nsys.exit('no CUDA here')\n")
    refused("evaluation/evaluate_images.py failed with exit code 1; its last line: no CUDA here")
    (tmp_path / "packages" / "mmdet" / "__init__.py").unlink()
    (tmp_path / "packages" / "mmdet").rmdir()
    refused("geneval: no package mmdet in the environment of", "see https://github.com/djghosh13/geneval")
    words[1] = str(tmp_path / "none")
    refused("geneval: no folder", "expected the pictures of penstock predict")


@pytest.mark.usefixtures("packages")
def test_dpg_runs_the_official_program(tmp_path, monkeypatch):
    folder, repository, weights = grids(tmp_path / "out"), tmp_path / "ella", tmp_path / "cache"
    scorer = DPGBench(str(repository), str(weights))
    with pytest.raises(UserError, match=r"dpg: no file .*compute_dpg_bench\.py; expected a checkout .* \(and 2 more\)"):
        scorer.score(folder)
    checkout(repository, {"dpg_bench/compute_dpg_bench.py": COMPUTE, "dpg_bench/dpg_bench.csv": "x", "results": "x"})
    with pytest.raises(
        UserError, match=r"no mPLUG at .*configuration\.json; get it from https://modelscope\.cn/models/"
    ):
        scorer.score(folder)
    checkout(weights, {f"hub/{dpg.MODEL}/configuration.json": "{}"})
    (repository / "results").write_text(DPG_RESULTS)
    assert scorer.score(folder)["dpg"] == 37.5
    assert (tmp_path / "out.results.txt").is_file()
    (folder / "1.png").write_bytes((folder / "0.png").read_bytes())
    with pytest.raises(UserError, match=r"has 2 pictures, expected 3; the others could not be read"):
        scorer.score(folder)
    with pytest.raises(UserError, match="no interpreter /none"):
        DPGBench(str(repository), str(weights), python="/none").score(folder)
    with pytest.raises(UserError, match="samples 2, expected 4 or 1"):
        DPGBench(str(repository), str(weights), samples=2)


@pytest.fixture(scope="module")
def squeeze(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "squeeze.pth"
    torch.save(torchvision.models.squeezenet1_1().state_dict(), path)
    return str(path)


def test_diversity_is_the_mean_over_pairs_then_prompts(squeeze, tmp_path):
    distance = LPIPS("squeeze", squeeze)
    expected = []
    for p in range(2):
        images = [torch.from_numpy(noise(10 * p + s)).permute(2, 0, 1)[None] / 255 for s in range(4)]
        pairs = [float(distance(images[i], images[j])) for i in range(4) for j in range(i)]
        assert len(pairs) == 6
        expected.append(sum(pairs) / 6)
        assert float(pairwise(torch.cat(images), distance)) == pytest.approx(expected[-1], rel=1e-5)
    wanted = {"lpips_diversity_squeeze": pytest.approx(sum(expected) / 2, rel=1e-5)}
    scorer = LPIPSDiversity("squeeze", squeeze)
    assert scorer.score(folders(tmp_path / "folders")) == wanted
    assert scorer.score(grids(tmp_path / "grids")) == wanted
    assert wanted["lpips_diversity_squeeze"].expected > 0.01
    same = torch.rand(1, 3, 40, 40).expand(4, -1, -1, -1)
    assert float(pairwise(same, distance)) == 0


def test_diversity_says_what_it_cannot_measure(squeeze, tmp_path, capsys):
    missing = str(tmp_path / "alex.pth")
    assert main(["diversity", str(tmp_path), "--weights", missing]) == 2
    assert f"lpips_diversity_alex: no weights file {missing}; expected torchvision's alexnet" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"no pictures; expected 00000/samples"):
        LPIPSDiversity("squeeze", squeeze).score(tmp_path)
    with pytest.raises(UserError, match="1 samples of 40 x 40; expected two or more of one size, 32 pixels"):
        list(prompts_of(folders(tmp_path / "one", samples=1)))
    (tmp_path / "small").mkdir()
    Image.fromarray(noise(0, 16)).save(tmp_path / "small" / "0.png")
    with pytest.raises(UserError, match=r"0\.png: 4 samples of 8 x 8"):
        list(prompts_of(tmp_path / "small"))
    (tmp_path / "small" / "0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"0\.png: cannot be read"):
        list(prompts_of(tmp_path / "small"))
    with pytest.raises(ValueError, match="1 images, expected at least 2"):
        pairwise(torch.zeros(1, 3, 40, 40), LPIPS("squeeze", squeeze))
