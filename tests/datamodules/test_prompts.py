"""Prompts of benchmarks: the three formats, samples over batches and ranks, what is left out, what is refused."""

import csv
import json
import sys

import pytest

from penstock.datamodules.prompts import BenchmarkPrompts
from penstock.lightning_modules.errors import UserError

TEXTS = ["a photo of a bench", "two red clocks", "a cow left of a dog"]


def geneval(path):
    rows = [{"tag": "t", "include": [{"class": "x", "count": 1}], "exclude": [], "prompt": text} for text in TEXTS]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def dpg_folder(path):
    path.mkdir()
    for name, text in zip(("10", "COCO1", "2"), TEXTS):
        (path / f"{name}.txt").write_text(text)
    return path


def dpg_table(path):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["item_id", "text", "proposition_id", "question_natural_language"])
        for name, text in (("2", TEXTS[2]), ("COCO1", TEXTS[1]), ("10", TEXTS[0])):
            writer.writerows([name, text, k, "Is there one?"] for k in (1, 2))
    return path


def ready(path, form="geneval", **options):
    data = BenchmarkPrompts(form, str(path), **options)
    data.prepare_data()
    data.setup()
    return data


def drawn(data):
    return [(i, t) for batch in data.predict_dataloader() for i, t in zip(batch["index"].tolist(), batch["text"])]


def test_geneval_keeps_each_line_for_the_scorer(tmp_path):
    data = ready(geneval(tmp_path / "p.jsonl"), samples_per_prompt=4)
    assert [(item.name, item.text) for item in data.items] == [(f"0000{n}", text) for n, text in enumerate(TEXTS)]
    assert [item.metadata for item in data.items] == [json.loads(x) for x in (tmp_path / "p.jsonl").open()]
    assert drawn(data) == [(i, TEXTS[i // 4]) for i in range(12)]
    assert data.prompts(4) == ([*TEXTS, TEXTS[0]], None)


def test_dpg_is_the_same_from_its_folder_and_its_table(tmp_path):
    datas = [ready(dpg_folder(tmp_path / "prompts"), "dpg"), ready(dpg_table(tmp_path / "dpg.csv"), "dpg")]
    assert [[(item.name, item.text) for item in data.items] for data in datas] == 2 * [
        [("10", TEXTS[0]), ("2", TEXTS[2]), ("COCO1", TEXTS[1])]
    ]
    assert datas[0].fingerprint == datas[1].fingerprint
    assert datas[0].layout == "grid"


def test_lines_and_the_first_of_them(tmp_path):
    (tmp_path / "p.txt").write_text("\n".join(["", *TEXTS, ""]))
    data = ready(tmp_path / "p.txt", "lines", limit=2, samples_per_prompt=1)
    assert drawn(data) == [(0, TEXTS[0]), (1, TEXTS[1])]
    other = ready(tmp_path / "p.txt", "lines", limit=2, samples_per_prompt=2)
    assert data.fingerprint != other.fingerprint


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_sample_comes_once_over_the_ranks(world, tmp_path, attach):
    geneval(tmp_path / "p.jsonl")
    shares = [
        drawn(attach(ready(tmp_path / "p.jsonl", batch_size=6, samples_per_prompt=5), rank=r, world=world))
        for r in range(world)
    ]
    assert sorted(pair for share in shares for pair in share) == [(i, TEXTS[i // 5]) for i in range(15)]


def test_samples_that_exist_are_left_out_but_every_rank_has_one(tmp_path, attach):
    data = ready(geneval(tmp_path / "p.jsonl"), batch_size=4)
    data.leave_out({0, 1, 5, 11})
    assert [i for i, _ in drawn(data)] == [2, 3, 4, 6, 7, 8, 9, 10]
    data.leave_out(set(range(12)))
    assert [i for i, _ in drawn(data)] == [0]
    data.leave_out(set(range(11)))
    assert [[i for i, _ in drawn(attach(data, rank=r, world=2))] for r in range(2)] == [[0], [11]]


def test_the_usual_place_and_the_hub(tmp_path, monkeypatch):
    (tmp_path / "geneval").mkdir()
    geneval(tmp_path / "geneval" / "evaluation_metadata.jsonl")
    with pytest.raises(
        UserError, match=r"data\.path: found none; expected the prompts of the format 'geneval', from ht"
    ):
        ready_without_path()
    monkeypatch.setenv("PENSTOCK_DATA", str(tmp_path))
    assert [item.text for item in ready_without_path().items] == TEXTS
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(tmp_path / "geneval")
    )
    data = ready("evaluation_metadata.jsonl", hub="someone/geneval")
    assert [item.text for item in data.items] == TEXTS
    assert asked[0] == (
        ("someone/geneval",),
        {"repo_type": "dataset", "allow_patterns": ["evaluation_metadata.jsonl", "evaluation_metadata.jsonl/*"]},
    )

    def offline(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"data\.hub=a/b: cannot be had \(ConnectionError\); .* data\.path=p\.jsonl"):
        ready("p.jsonl", hub="a/b")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="huggingface_hub is not installed"):
        ready("p.jsonl", hub="a/b")


def ready_without_path():
    data = BenchmarkPrompts("geneval")
    data.setup()
    return data


def test_prompts_of_vbench_are_names_and_known_once(tmp_path):
    rows = [{"prompt_en": text, "dimension": ["scene"], "auxiliary_info": {}} for text in TEXTS]
    rows.append({"prompt_en": TEXTS[1], "dimension": ["color", "scene"]})
    (tmp_path / "p").write_text(json.dumps(rows))
    data = BenchmarkPrompts("vbench", str(tmp_path / "p"), samples_per_prompt=5)
    data.setup()
    assert [(item.name, item.text) for item in data.items] == [(text, text) for text in TEXTS]
    assert [item.metadata["dimension"] for item in data.items] == [["scene"], ["scene", "color"], ["scene"]]
    assert data.layout == "videos"


@pytest.mark.parametrize(
    ("form", "content", "says"),
    [
        ("vbench", "{", "p: not JSON"),
        ("vbench", "{}", "p: found dict, expected a list of objects with prompt_en, dimension"),
        ("vbench", "[]", "p: no prompts in it"),
        ("vbench", '[{"prompt": "a"}]', "p entry 1: found prompt, expected an object with prompt_en, dimension"),
        ("vbench", '[{"prompt_en": "a/b", "dimension": []}]', "p entry 1: 'a/b' cannot be part of a file's name"),
        ("vbench", '[{"prompt_en": "a", "dimension": "b"}]', "p entry 1: dimension 'b', expected a list of words"),
        ("geneval", '{"tag": "a"', r"p line 1: not JSON"),
        ("geneval", '{"tag": "a", "prompt": "b"}', r"p line 1: found tag, prompt, expected .* tag, include, prompt"),
        ("geneval", '\n{"tag": "a", "include": [], "prompt": " "}', r"p line 2: found ' ', expected a prompt"),
        ("geneval", "", "p: no prompts in it"),
        ("lines", "\n\n", "p: no prompts in it"),
        ("dpg", "id,text\n1,a\n", "columns id, text; expected item_id and text"),
        ("dpg", "item_id,text\n1,a\n1,b\n", "line 3: another prompt of the name '1'"),
        ("dpg", "item_id,text\n../1,a\n", r"name '\.\./1'; expected one without dots and slashes"),
    ],
)
def test_a_file_at_fault_is_named(form, content, says, tmp_path):
    (tmp_path / "p").write_text(content)
    with pytest.raises(UserError, match=says):
        ready(tmp_path / "p", form)


def test_what_else_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"no file or folder .*none\.jsonl; .*get it from https://github\.com/djghosh13"
    ):
        ready(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is a folder; expected the file of the format 'lines'"):
        ready(tmp_path, "lines")
    (tmp_path / "b").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="cannot be read as text"):
        ready(tmp_path / "b", "lines")
    with pytest.raises(UserError, match=r"data\.samples_per_prompt: found 0"):
        BenchmarkPrompts(samples_per_prompt=0)
    with pytest.raises(UserError, match=r"data\.path: found none; .* in data\.hub=a/b"):
        BenchmarkPrompts(hub="a/b")
    data = ready(geneval(tmp_path / "p.jsonl"))
    for loader in (data.train_dataloader, data.val_dataloader, data.test_dataloader, data.reference_dataloader):
        with pytest.raises(UserError, match="no images to train or score on; expected penstock predict"):
            loader()
