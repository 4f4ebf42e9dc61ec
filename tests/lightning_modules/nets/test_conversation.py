"""Conversations as text and tokens: LLaVA's layout, what is learnt, what is refused."""

import pytest

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.conversation import (
    IGNORED,
    IMAGE,
    IMAGE_ID,
    SYSTEM,
    tokenized,
    with_image,
    written,
)
from penstock.lightning_modules.nets.language_model import word_tokenizer

TALK = (with_image("Which digit is it?"), "a seven", "And how many?", "one")


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("transformers", reason="transformers is not installed (extra llava)")
    return word_tokenizer([SYSTEM, "USER: ASSISTANT:", "Which digit is it? a seven And how many? one\n"])


def test_vicuna_v1():
    found = written(TALK)
    assert found.text == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhich digit is it? ASSISTANT: a seven</s>"
        "USER: And how many? ASSISTANT: one</s>"
    )
    assert [found.text[a:b] for a, b in found.answers] == [" a seven</s>", " one</s>"]
    asked = written(TALK[:3])
    assert found.text.startswith(asked.text)
    assert asked.text.endswith("USER: And how many? ASSISTANT:")
    assert len(asked.answers) == 1


def test_plain():
    found = written((f"Describe it. {IMAGE}", "a seven"), "plain")
    assert found == ("<image>a seven\n", [(7, 15)])
    assert written((IMAGE,), "plain") == (IMAGE, [])


def test_with_image():
    assert with_image("What is it?") == with_image("What is it?\n<image>") == "<image>\nWhat is it?"
    assert with_image(f"{IMAGE}\n") == IMAGE


def test_answers_and_their_ends_are_learnt(tokenizer):
    prompt = tokenized(written(TALK), tokenizer)
    words = [tokenizer.convert_ids_to_tokens(i) if i >= 0 else IMAGE for i in prompt.ids.tolist()]
    assert words[0] == "<s>"
    assert prompt.ids.tolist().count(IMAGE_ID) == words.count(IMAGE) == 1
    assert words[words.index(IMAGE) - 2 : words.index(IMAGE) + 3] == ["USER", ":", IMAGE, "\n", "Which"]
    kept = prompt.labels != IGNORED
    assert prompt.labels[kept].equal(prompt.ids[kept])
    assert tokenizer.convert_ids_to_tokens(prompt.ids[kept].tolist()) == ["a", "seven", "</s>", "one", "</s>"]
    assert not (tokenized(written(TALK[:1]), tokenizer).labels != IGNORED).any()


def test_captions_are_learnt_with_the_end_of_their_line(tokenizer):
    prompt = tokenized(written((IMAGE, "a seven"), "plain"), tokenizer)
    assert prompt.ids.tolist()[:2] == [tokenizer.bos_token_id, IMAGE_ID]
    assert tokenizer.convert_ids_to_tokens(prompt.labels[2:].tolist()) == ["a", "seven", "\n"]
    assert prompt.labels[:2].tolist() == [IGNORED] * 2


def test_spaces_before_answers_may_be_part_of_their_tokens():
    """As Llama's are."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra llava)")
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    whole = Tokenizer(models.BPE(unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    whole.train_from_iterator([written(TALK).text.replace("<image>", "")] * 20, trainer)
    own = transformers.PreTrainedTokenizerFast(tokenizer_object=whole, bos_token="<s>", eos_token="</s>")
    prompt = tokenized(written(TALK), own)
    learnt = own.convert_ids_to_tokens(prompt.labels[prompt.labels != IGNORED].tolist())
    assert "".join(learnt) == "\u2581a\u2581seven</s>\u2581one</s>"
    asked = "".join(own.convert_ids_to_tokens(prompt.ids[(prompt.labels == IGNORED) & (prompt.ids >= 0)].tolist()))
    assert asked.endswith("ASSISTANT:USER:\u2581And\u2581how\u2581many?\u2581ASSISTANT:")


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ((IMAGE, "a zebra"), "its vocabulary has no 'zebra'"),
        ((f"{IMAGE} Which {IMAGE}", "one"), "conversation 'Which': found 2 images, expected at most 1"),
    ],
)
def test_refusals(tokenizer, turns, message):
    with pytest.raises(UserError, match=message):
        tokenized(written(turns), tokenizer)
