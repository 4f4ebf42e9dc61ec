"""Questions about images: the embedded ones, and LLaVA's, TextVQA's and MMBench's files."""

import base64
import json
from io import BytesIO
from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from penstock.datamodules.digit_questions import KINDS, DigitQuestions, draw_digits
from penstock.datamodules.digit_scenes import shares
from penstock.datamodules.image_text import NAMES
from penstock.datamodules.llava_conversations import LlavaConversations
from penstock.datamodules.mmbench import COPY, DIRECT, MmBench
from penstock.datamodules.textvqa import SHORT, TextVqa
from penstock.datamodules.visual_questions import GREY
from penstock.lightning_modules.errors import UserError

RED, BLUE = (255, 0, 0), (0, 0, 255)


def ready(data):
    data.setup()
    return data


def batch(data, split="test"):
    view = data.view(split)
    return data.finished(view.fetch(np.arange(len(view))))


def test_digits_and_captions():
    data, captions = (ready(DigitQuestions(pictures=24, texts=texts)) for texts in ("questions", "captions"))
    assert {name: len(numbers) for name, numbers in data.numbers.items()} == {"train": 24, "val": 6, "test": 6}
    found, told = batch(data, "train"), batch(captions, "train")
    assert found["image"].shape == (24, 3, 64, 64)
    assert found["image"].equal(told["image"])
    inks, labels = load_digits(return_X_y=True)
    choices, known = shares(len(inks))[0], set(NAMES)
    for n, (question, answer) in enumerate(found["conversation"]):
        kind = n % 3
        names = [name.split()[1] for name in told["conversation"][n][1].split(" and ")]
        assert question == f"<image>\n{KINDS[kind]}"
        assert set(names) <= known
        assert answer == (NAMES[len(names)] if kind == 1 else names[0])
        assert found["answers"][n] == (answer,)
        drawn = draw_digits(np.random.default_rng((0, n)), kind, inks.reshape(-1, 8, 8) / 16, choices, 64)
        assert found["image"][n].allclose(
            torch.from_numpy(drawn.picture / 127.5 - 1).permute(2, 0, 1).float(), atol=1e-5
        )
        assert [NAMES[labels[digit]] for digit in drawn.digits] == names
        assert len(names) >= (1, 1, 2)[kind]
        for (a, b, c, d), (x1, y1, x2, y2) in combinations(drawn.boxes, 2):
            assert c <= x1 or x2 <= a or d <= y1 or y2 <= b
            assert d - b >= y2 - y1 - 2  # ink may be a row less
        if kind == 2:
            heights = [y2 - y1 for _, y1, _, y2 in drawn.boxes]
            assert heights[0] >= 1.25 * heights[1]
    assert data.fingerprint != captions.fingerprint
    assert ready(DigitQuestions(pictures=24, seed=5)).fingerprint == data.fingerprint


def turns(*texts):
    return [{"from": role, "value": text} for role, text in zip(("human", "gpt") * len(texts), texts)]


def llava(folder, rows, **kwargs):
    (folder / "list.json").write_text(json.dumps(rows))
    return ready(LlavaConversations(str(folder), "list.json", "images", 8, val_fraction=0, **kwargs))


@pytest.fixture
def pictures(tmp_path):
    """A wide red picture and a high blue one."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    Image.new("RGB", (16, 8), RED).save(tmp_path / "images" / "red.png")
    Image.new("RGB", (8, 16), BLUE).save(tmp_path / "images" / "sub" / "blue.png")
    return tmp_path


def test_llava(pictures):
    rows = [
        {"id": "a", "image": "sub/blue.png", "conversations": turns("What?\n<image>", "blue", "Sure?", "yes")},
        {"id": 2, "conversations": [{"from": "gpt", "value": "hello"}, *turns("2 + 2?", "4")]},
        {"id": "c", "image": "red.png", "conversations": turns("<image>", "red")},
    ]
    data = llava(pictures, rows)
    found = batch(data, "train")
    assert found["conversation"] == [("<image>\nWhat?", "blue", "Sure?", "yes"), ("2 + 2?", "4"), ("<image>", "red")]
    assert found["answers"] == [("yes",), ("4",), ("red",)]
    assert [data.where(k) for k in range(3)] == ["a", "2", "c"]
    grey, blue = (torch.tensor(colour)[:, None] / 127.5 - 1 for colour in (GREY, BLUE))
    row = found["image"][0][:, 4]
    torch.testing.assert_close(row[:, [0, 7]], grey.expand(3, 2), rtol=0, atol=0.05)
    torch.testing.assert_close(row[:, [3, 4]], blue.expand(3, 2), rtol=0, atol=0.05)
    assert (found["image"][1] == -1).all()
    cropped = batch(llava(pictures, rows, fit="crop"), "train")["image"]
    assert cropped[0].allclose(blue[:, :, None])


ROW = {"image": "red.png", "conversations": turns("<image> What?", "red")}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"data": []}, r"list\.json: found dict of no rows, expected a list"),
        (["a"], r"list\.json row 0: found 'a', expected"),
        ([{**ROW, "image": "../list.json"}], r"row 0: path '\.\./list\.json' leaves the data folder"),
        ([{**ROW, "image": "/etc/hosts"}], r"row 0: path '/etc/hosts' leaves the data folder"),
        (
            [ROW, {**ROW, "conversations": turns("What?", "red")}],
            r"row 1: found image 'red\.png' and 0 turns with <image>",
        ),
        ([{"conversations": ROW["conversations"]}], r"row 0: found no image and 1 turns with <image>"),
        ([{**ROW, "conversations": turns("<image>")}], r"row 0: found turns of human, expected human and gpt in turn"),
        (
            [{**ROW, "conversations": [{"from": "user", "value": ""}]}],
            r"row 0: found turn .* expected from human or gpt",
        ),
        ([{**ROW, "image": 3}], r"row 0: found 3 as image"),
    ],
)
def test_llava_refuses(pictures, rows, message):
    with pytest.raises(UserError, match=message):
        llava(pictures, rows)


def test_pictures_that_cannot_be_read_are_named(pictures):
    (pictures / "images" / "red.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"red\.png: cannot read the image"):
        batch(llava(pictures, [ROW]), "train")
    with pytest.raises(UserError, match=r"blue\.png: cannot read the image \(FileNotFoundError"):
        batch(llava(pictures, [{**ROW, "image": "blue.png"}]), "train")


def textvqa(folder, rows, prompts=None):
    (folder / "v.json").write_text(json.dumps({"data": rows}))
    if prompts is not None:
        (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    return ready(TextVqa(str(folder), "v.json", "images", "prompts.jsonl" if prompts else None, image_size=8))


ASKED = {"question_id": 3, "image_id": "red", "question": "Which Colour?", "answers": ["red"] * 6 + ["Red!"] * 4}


def test_textvqa(pictures):
    (pictures / "images" / "red.png").rename(pictures / "images" / "red.jpg")
    found = batch(textvqa(pictures, [ASKED, {k: v for k, v in ASKED.items() if k != "answers"}]))
    asked = f"<image>\nWhich Colour?\n{SHORT}"
    assert found["conversation"] == [(asked, "red"), (asked,)]
    assert found["answers"] == [tuple(ASKED["answers"]), ()]
    text = "which colour?\nReference OCR token: RED\nAnswer."
    found = batch(textvqa(pictures, [ASKED], [{"question_id": "red", "text": text}]))
    assert found["conversation"] == [(f"<image>\n{text}", "red")]


@pytest.mark.parametrize(
    ("row", "prompts", "message"),
    [
        ({**ASKED, "answers": ["red"] * 9}, None, r"v\.json row 0: found answers .* expected a list of 10 texts"),
        ({**ASKED, "image_id": "../../x"}, None, r"row 0: path '\.\./\.\./x\.jpg' leaves the data folder"),
        ({"question": "a"}, None, r"row 0: found .* expected question, image_id and answers"),
        (ASKED, [{"question_id": "blue", "text": "which colour?"}], r"no prompt of image 'red' with 'Which Colour\?'"),
        (ASKED, [{"text": "which colour?"}], r"prompts\.jsonl line 1: found .* expected question_id and text"),
    ],
)
def test_textvqa_refuses(pictures, row, prompts, message):
    with pytest.raises(UserError, match=message):
        textvqa(pictures, [row], prompts)


def encoded(colour):
    Image.new("RGB", (8, 8), colour).save(file := BytesIO(), format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def mmbench(folder, rows, circular=True):
    columns = ("index", "question", "hint", "A", "B", "C", "D", "answer", "image")
    lines = ["\t".join(columns), *("\t".join(str(row.get(name, "")) for name in columns) for row in rows)]
    (folder / "m.tsv").write_text("\n".join(lines))
    return ready(MmBench(str(folder), "m.tsv", circular, image_size=8))


PICK = {"index": 5, "question": "Which?", "hint": "nan", "A": "red", "B": "blue", "C": "grey", "answer": "B"}


def test_mmbench_turns_the_options(tmp_path):
    rows = [PICK | {"image": encoded(RED)}, PICK | {"index": 2, "C": "", "hint": "Look.", "image": encoded(BLUE)}]
    data = mmbench(tmp_path, rows)
    found = batch(data)
    assert found["answers"] == [("B",), ("A",), ("B",), ("A",), ("C",)]
    assert found["group"].tolist() == [2, 2, 5, 5, 5]
    assert found["conversation"][1] == (f"<image>\nLook.\nWhich?\nA. blue\nB. red\n{DIRECT}", "A")
    assert found["conversation"][4] == (f"<image>\nWhich?\nA. grey\nB. red\nC. blue\n{DIRECT}", "C")
    assert data.where(4) == "5 turned by 2"
    for k, (question, letter) in enumerate(found["conversation"]):
        assert f"\n{letter}. blue" in question, k
    assert found["image"][4].allclose(torch.tensor(RED)[:, None, None] / 127.5 - 1)
    assert batch(mmbench(tmp_path, rows, circular=False))["answers"] == [("B",), ("B",)]


def test_mmbench_takes_the_turned_questions_of_a_file(tmp_path):
    turned = PICK | {"index": 5 + COPY, "A": "blue", "B": "grey", "C": "red", "answer": "A", "image": encoded(RED)}
    rows = [turned, PICK | {"image": encoded(RED), "answer": ""}]
    found = batch(mmbench(tmp_path, rows))
    assert found["group"].tolist() == [5, 5]
    assert found["answers"] == [(), ("A",)]
    assert len(found["conversation"][0]) == 1
    assert batch(mmbench(tmp_path, rows, circular=False))["answers"] == [()]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "D"}, r"m\.tsv row 2: found answer 'D', expected one of A, B, C"),
        ({"B": ""}, r"row 2: found no 'B'"),
        ({"C": "", "D": "green"}, r"row 2: found options A, B, D, expected them without a gap"),
        ({"index": "x"}, r"row 2: found index 'x', expected a whole number"),
        ({"image": "../a.png"}, r"m\.tsv index 5: found an image that is no base64"),
        ({"image": base64.b64encode(b"no").decode()}, r"m\.tsv index 5: cannot read the image"),
    ],
)
def test_mmbench_refuses(tmp_path, row, message):
    with pytest.raises(UserError, match=message):
        batch(mmbench(tmp_path, [PICK | {"image": encoded(RED)} | row]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            LlavaConversations,
            r"data\.data_dir: found none, and no \$PENSTOCK_DATA/llava; expected a folder with llava_v1",
        ),
        (TextVqa, r"no \$PENSTOCK_DATA/textvqa; expected a folder with TextVQA_0\.5\.1_val\.json and train_images/"),
        (MmBench, r"no \$PENSTOCK_DATA/mmbench; expected a folder with mmbench_dev_20230712\.tsv"),
    ],
)
def test_what_is_absent_is_said(make, message, tmp_path, monkeypatch):
    monkeypatch.delenv("PENSTOCK_DATA", raising=False)
    with pytest.raises(UserError, match=message):
        ready(make())
    with pytest.raises(UserError, match=r"no such file"):
        ready(make(data_dir=str(tmp_path)))


@pytest.mark.parametrize(("key", "value", "least"), [("pictures", 3, 4), ("image_size", 63, 64)])
def test_out_of_range(key, value, least):
    with pytest.raises(UserError, match=rf"data\.{key}: found {value}, expected at least {least}"):
        DigitQuestions(**{key: value})
