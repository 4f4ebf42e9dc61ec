"""What a video flow's prompts say of the shape of frames, in training and in sampling."""

import pytest
import torch

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.flow.affine import ScoreGuidance
from penstock.lightning_modules.flow.inverse import Sequential
from penstock.lightning_modules.nets.aspects import ASPECTS, aspect_size, nearest_aspect
from penstock.lightning_modules.nets.flow_denoiser import FlowDenoiser
from penstock.lightning_modules.nets.prompt_template import Template
from penstock.lightning_modules.nets.starflow import STARFlow as Net
from penstock.lightning_modules.nets.text_encoder import HashedText, TextEncoder
from penstock.lightning_modules.starflow_v import STARFlowV

SIZES = {"16:9": (9, 16), "1:1": (12, 12), "9:21": (21, 9)}


class Heard(TextEncoder):
    """Keeps what it is given."""

    dim = 8

    def __init__(self):
        self.texts = []

    def __call__(self, texts, device="cpu"):
        self.texts += texts
        return torch.zeros(len(texts), 2, 8, device=device)


def flow(encoder, size=(9, 16), **options):
    net = Net((3, 2, *size), dim=32, depths=(1, 1), head_dim=32, text_dim=8)
    text = Template(encoder, fps=16, noise=0.5, aspect="own")
    return STARFlowV(net, torch.optim.AdamW, text=text, inverse=Sequential(), noise=0.5, **options)


def says(caption, aspect, first="A video with 16 fps"):
    return f"Noise Level 500:\n{first}:\n{caption}\n\n in a {aspect} aspect ratio.\n"


@pytest.mark.parametrize("aspect", SIZES)
def test_captions_and_null_prompts_of_a_batch_have_its_own_aspect(aspect):
    encoder = Heard()
    model = flow(encoder)
    text = {"text": ["waves", "trees"]}
    for key, shape, first in (
        ("video", (2, 3, 2, *SIZES[aspect]), "A video with 16 fps"),
        ("latent", (2, 3, 2, *SIZES[aspect]), "A video with 16 fps"),
        ("image", (2, 2, *SIZES[aspect]), "An image"),
        ("latent", (2, 2, *SIZES[aspect]), "An image"),
    ):
        batch = {**text, key: torch.zeros(shape)}
        model.condition(batch)
        assert encoder.texts[-2:] == [says(caption, aspect, first) for caption in text["text"]]
        model.dropped(torch.zeros(2, 2, 8), torch.tensor([True, False]), batch)
    nulls = [said for said in encoder.texts if said in (says("", aspect), says("", aspect, "An image"))]
    assert len(nulls) == 2, "each is encoded once"
    assert model.task({"latent": torch.zeros(2, 48, 4, 4)}, 0) == "plain"


@pytest.mark.parametrize("aspect", SIZES)
def test_samples_are_asked_for_and_guided_in_the_aspect_that_is_made(aspect):
    encoder = Heard()
    model = flow(encoder, SIZES[aspect], guidance=ScoreGuidance(1.0), first_frame_dropout=0.0)
    with torch.inference_mode():
        model.sample(1, prompt="waves", frames=1)
    assert set(encoder.texts) == {says("waves", aspect), says("", aspect)}
    model.condition({"text": ["alone"]})
    assert encoder.texts[-1] == says("alone", aspect), "prompts without clips are for clips of the network's shape"


def test_the_nearest_aspect_is_known_in_pixels_and_in_latents():
    for aspect in ASPECTS:
        height, width = aspect_size(aspect, 640, 16)
        assert nearest_aspect(height, width) == nearest_aspect(height // 16, width // 16) == aspect
    assert nearest_aspect(100, 230) == "21:9"
    assert nearest_aspect(100, 120) == "5:4"


def test_an_aspect_of_its_own_has_to_be_told_the_size():
    template = Template(Heard(), aspect="own")
    with pytest.raises(ValueError, match="take of_size"):
        template(["waves"])
    assert template.of_images().of_size(1, 1).prompts(["x"]) == ["x\n in a 1:1 aspect ratio.\n"]
    fixed = Template(Heard(), aspect="4:3")
    assert fixed.of_size(9, 16) is fixed
    assert HashedText(8).of_size(1, 2)(["a"]).shape == (1, 8, 8)
    with pytest.raises(UserError, match=r"model\.text\.aspect: found 'mine', expected own, or width:height"):
        Template(Heard(), aspect="mine")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"channels": 4, "text_dim": 8},
            r"model\.denoiser\.channels: found 4, expected 2: 2 channels in patches of 1x1",
        ),
        ({"channels": 2, "text_dim": 5}, r"model\.denoiser\.text_dim: found 5, expected 0 or 8"),
    ],
)
def test_a_denoiser_of_other_tokens_is_refused(options, line):
    model = flow(Heard(), denoiser=FlowDenoiser(dim=32, depth=1, head_dim=32, **options))

    class Data:
        shape, num_classes = (3, 2, 9, 16), 0

    with pytest.raises(UserError, match=line):
        model.fits(Data())
