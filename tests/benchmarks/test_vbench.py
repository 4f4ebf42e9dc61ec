"""VBench's scorer: results by hand, a program that is played, what is missing."""

import json

import pytest

from penstock.benchmarks.t2i.__main__ import main
from penstock.benchmarks.t2i.vbench import WEIGHTS, VBench, summary
from penstock.lightning_modules.errors import UserError

TEXTS = {"a cow": ["scene"], "a bus, still": ["temporal_flickering", "scene"], "a sea": ["color"]}
EVALUATE = """\
import json, os, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert words["--load_ckpt_from_local"] == "True", words
assert os.path.isfile(os.environ["VBENCH_CACHE_DIR"] + "/caption_model/tag2text_swin_14m.pth")
assert os.path.isfile(words["--full_json_dir"])
dimensions = sys.argv[sys.argv.index("--dimension") + 1 :]
count = len(os.listdir(words["--videos_path"]))
os.makedirs(words["--output_path"], exist_ok=True)
with open(words["--output_path"] + "/results_1_eval_results.json", "w") as file:
    json.dump({d: [count / 100 + k, []] for k, d in enumerate(dimensions)}, file)
"""


def constants(path):
    names = [name.replace("_", " ") for name in WEIGHTS]
    weights = {name: 0.5 if name == "dynamic degree" else 1 for name in names}
    limits = {name: {"Min": 0.0, "Max": 0.5 if name == "scene" else 1.0} for name in names}
    values = {"DIM_WEIGHT": weights, "NORMALIZE_DIC": limits, "QUALITY_WEIGHT": 4, "SEMANTIC_WEIGHT": 1}
    values |= {"QUALITY_LIST": names[:7], "SEMANTIC_LIST": names[7:]}
    path.write_text("import os\n" + "".join(f"{name} = {value!r}\n" for name, value in values.items()))
    return path


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(VBench, "packages", ("json",))
    root = tmp_path / "VBench"
    for folder in ("vbench", "scripts"):
        (root / folder).mkdir(parents=True)
    (root / "evaluate.py").write_text(EVALUATE)
    rows = [{"prompt_en": text, "dimension": dimension} for text, dimension in TEXTS.items()]
    (root / "vbench" / "VBench_full_info.json").write_text(json.dumps(rows))
    constants(root / "scripts" / "constant.py")
    file = tmp_path / "weights" / WEIGHTS["scene"][0]
    file.parent.mkdir(parents=True)
    file.touch()
    folder = tmp_path / "vbench"
    folder.mkdir()
    for text in list(TEXTS)[:2]:
        for k in range(5):
            (folder / f"{text}-{k}.mp4").touch()
    return root


def words(checkout, *more):
    place = checkout.parent
    return ["vbench", str(place / "vbench"), "--repository", str(checkout), "--weights", str(place / "weights"), *more]


def test_the_program_is_run_and_its_file_read(checkout, capsys):
    chosen = ["--dimensions", "scene", "temporal_flickering"]
    assert main(words(checkout, *chosen)) == 0
    assert json.loads(capsys.readouterr().out) == {"vbench/scene": 0.1, "vbench/temporal_flickering": 1.1}
    (checkout.parent / "vbench" / "a cow-4.mp4").unlink()
    assert main(words(checkout, *chosen)) == 2
    assert "a cow-4.mp4 (and 0 more); expected five a prompt" in capsys.readouterr().err


def test_totals_by_hand(tmp_path):
    """Quality: six of 0.8 with weight 1, one of 0.2 with 0.5: 4.9 / 6.5; semantic: eight of 0.5, scene 0.4 of 0.5."""
    scores = {name: [0.8 if k < 7 else 0.5, []] for k, name in enumerate(WEIGHTS)}
    scores["dynamic_degree"][0], scores["scene"][0] = 0.2, 0.4
    (tmp_path / "r.json").write_text(json.dumps(scores))
    found = summary(tmp_path / "r.json", list(WEIGHTS), constants(tmp_path / "c.py"))
    quality, semantic = 4.9 / 6.5, (8 * 0.5 + 0.8) / 9
    assert found["vbench/quality"] == pytest.approx(quality)
    assert found["vbench/semantic"] == pytest.approx(semantic)
    assert found["vbench"] == pytest.approx((4 * quality + semantic) / 5)
    assert found["vbench/scene"] == 0.4
    assert len(found) == 19
    with pytest.raises(UserError, match=r"c\.py: cannot be read as results"):
        summary(tmp_path / "c.py", ["scene"], tmp_path / "c.py")


def test_what_is_missing_is_named(checkout, capsys, monkeypatch):
    assert main(words(checkout)) == 2
    assert "no file" in (said := capsys.readouterr().err)
    assert "dino_vitbase16_pretrain.pth; see pretrained/ and vbench/utils.py of https://github.com/Vch" in said
    assert main(words(checkout, "--dimensions", "scenes")) == 2
    assert "no dimension 'scenes' (did you mean 'scene'?)" in capsys.readouterr().err
    monkeypatch.setattr(VBench, "packages", ("vbench_is_not_here",))
    assert main(words(checkout, "--dimensions", "scene")) == 2
    assert "no package vbench_is_not_here in the environment of" in capsys.readouterr().err
    (checkout / "evaluate.py").unlink()
    assert main(words(checkout)) == 2
    assert "evaluate.py; expected a checkout of https://github.com/Vchitect/VBench there" in capsys.readouterr().err
