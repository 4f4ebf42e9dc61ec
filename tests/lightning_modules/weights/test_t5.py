"""T5 as STARFlow reads prompts: transformers' own states, 0 after the prompt, repeated prompts encoded once."""

import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed (extra text2image)")

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.weights.t5 import T5Text

FOLDERS = runpy.run_path(str(Path(__file__).parent / "starflow_folders.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(FOLDERS["t5"](tmp_path_factory.mktemp("t5")))


@pytest.fixture
def counted(folder):
    """An encoder, and what its network was given."""
    encoder, calls = T5Text(folder, length=10, dtype="float32", keep=2), []
    encoder._net.register_forward_pre_hook(lambda net, args: calls.append(len(args[0])))
    return encoder, calls


def test_states_are_those_of_transformers_and_0_after_the_prompt(folder):
    from transformers import AutoTokenizer, T5EncoderModel

    encoder = T5Text(folder, length=10, dtype="float32")
    texts = ["a cat", "", "a very long prompt"]
    tokens = AutoTokenizer.from_pretrained(folder)(
        texts, padding="max_length", truncation=True, max_length=10, return_tensors="pt"
    )
    mask = tokens.attention_mask
    with torch.no_grad():
        states = T5EncoderModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
    found = encoder(texts)
    assert found.shape == (3, 10, encoder.dim) == (3, 10, 12)
    assert mask.sum(1).tolist()[1:] == [1, 10]
    torch.testing.assert_close(found, states * mask[..., None])
    assert not found[mask == 0].any()
    assert states[mask == 0].abs().sum() > 0
    half = T5Text(folder, length=10)(texts)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, found, atol=0.05, rtol=0.05)


def test_repeated_prompts_are_encoded_once_and_the_last_are_kept(counted):
    encoder, calls = counted
    first = encoder(["a", "b", "a"])
    assert first[0].equal(first[2])
    assert not first[0].equal(first[1])
    assert encoder(["b", "a"]).equal(first[[1, 0]])
    assert calls == [2]
    encoder(["c"])
    encoder(["a"])
    assert calls == [2, 1]
    torch.testing.assert_close(encoder(["b"]), first[1:2])
    assert calls == [2, 1, 1]
    assert len(encoder._kept) == 2


def test_features_that_were_kept_when_sampling_serve_training(folder):
    encoder, weight = T5Text(folder, length=10), torch.ones(12, requires_grad=True)
    with torch.inference_mode():
        encoder(["a"])
    (encoder(["a"]) * weight).sum().backward()
    assert weight.grad.abs().sum() > 0


def test_what_is_no_such_model_is_one_line(folder, tmp_path):
    with pytest.raises(
        UserError, match=r"no 'config.json' in it; found no folders, expected a folder with config.json"
    ):
        T5Text(str(tmp_path))
    with pytest.raises(UserError, match=r"no such folder; expected a folder or a hub name like owner/model"):
        T5Text("./nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"model cannot be read \(.*\); expected a folder with config.json and weights"):
        T5Text(str(tmp_path))
