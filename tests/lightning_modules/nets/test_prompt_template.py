"""Prompts as the released STARFlow-V takes them, character for character."""

import pytest
import torch
from golden_files import golden

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.prompt_template import Template, assemble, tagged
from penstock.lightning_modules.nets.text_encoder import HashedText, TextEncoder


class Heard(TextEncoder):
    """Notes what it is given."""

    dim = 3

    def __call__(self, texts, device="cpu"):
        self.texts = list(texts)
        return torch.zeros(len(texts), 2, 3, device=device)


def plain(value):
    text = bytes(value.tolist()).decode()
    return "" if text == "\0" else text


def recorded():
    """Options, caption and prompt of each record."""
    _, given, out = golden("starflow_v", "06")
    for n in range(5):
        fps, noise = int(given[f"{n}/fps"]), round(float(given[f"{n}/noise_std"]), 6)
        options = {"fps": None if fps < 0 else fps, "noise": None if noise < 0 else noise}
        options["aspect"] = plain(given[f"{n}/aspect"]) or None
        yield options, plain(given[f"{n}/caption"]), plain(out[f"{n}/prompt_utf8"])


def test_prompts_are_those_of_the_released_code():
    for options, caption, prompt in recorded():
        assert assemble(caption, **options) == prompt
        encoder = Heard()
        assert Template(encoder, **options)([caption, ""]).shape == (2, 2, 3)
        assert encoder.texts == [prompt, assemble("", **options)]


def test_tags_stand_before_the_caption_within_the_template():
    assert tagged(["waves", ""], "extend") == ["(extend) waves", "(extend) "]
    prompt = Template(Heard(), fps=16, noise=0.5, aspect="9:21").prompts(tagged(["waves"], "v2v"))[0]
    assert prompt == "Noise Level 500:\nA video with 16 fps:\n(v2v) waves\n\n in a 9:21 aspect ratio.\n"
    with pytest.raises(ValueError, match="did you mean 'extend'"):
        tagged(["waves"], "extended")


def test_a_template_is_a_text_encoder():
    template = Template(HashedText(dim=5, length=12), fps=8)
    assert template.dim == 5
    assert template([""]).abs().sum() > 0
    assert template(["a cat"]).equal(HashedText(dim=5, length=12)(["A video with 8 fps:\na cat\n"]))


@pytest.mark.parametrize(("options", "line"), [({"fps": -1}, "fps"), ({"noise": -0.1}, "noise")])
def test_numbers_below_0_are_refused(options, line):
    with pytest.raises(UserError, match=rf"model.text.{line}: found -.*, expected 0 or more"):
        Template(Heard(), **options)


@pytest.mark.parametrize("aspect", ["16x9", "0:1", "16:", ":9", "1:2:3"])
def test_an_aspect_is_two_numbers(aspect):
    with pytest.raises(UserError, match=r"model.text.aspect: found '.*', expected own, or width:height"):
        Template(Heard(), aspect=aspect)
