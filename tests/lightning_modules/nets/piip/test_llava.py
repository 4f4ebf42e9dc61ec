"""PIIP-LLaVA as a network: places of an image's tokens, losses as transformers counts them, generation."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("transformers", reason="transformers is not installed (extra llava)")

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.conversation import IGNORED, IMAGE_ID, Prompt, tokenized, with_image, written
from penstock.lightning_modules.nets.language_model import PretrainedLanguage, WordLlama
from penstock.lightning_modules.nets.piip.clip import ClipBranch
from penstock.lightning_modules.nets.piip.llava import LlavaNet, spliced
from penstock.lightning_modules.nets.piip.llava_tower import LlavaTower

MODEL = "vit_base_patch16_clip_quickgelu_224"
TALKS = [
    (with_image("what is it?"), "a seven"),
    ("how many?", "one", "and what?", "seven"),
    (with_image("how many are there in all?"), "one and one"),
]


@pytest.fixture(scope="module")
def net() -> LlavaNet:
    torch.manual_seed(0)
    own = {"weights": "random", "groups": 2, "depth": 2, "num_heads": 2, "patch": 8}
    tower = LlavaTower([ClipBranch(MODEL, size, embed_dim=dim, **own) for size, dim in ((16, 64), (24, 32))])
    language = WordLlama("what is it? a seven how many one and are there in all", dim=64, depth=2, heads=2, hidden=64)
    net = LlavaNet(tower, language).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


def prompts(net, talks):
    return [tokenized(written(turns), net.language.tokenizer) for turns in talks]


def test_tokens_of_an_image_stand_where_it_stood():
    asked = [Prompt(torch.tensor([5, IMAGE_ID, 6, 7]), torch.tensor([IGNORED, IGNORED, IGNORED, 7]))]
    asked += [Prompt(torch.tensor([8, 9]), torch.tensor([IGNORED, 9]))]
    visual = torch.arange(6.0).view(2, 3, 1) + 100

    def embed(ids):
        return ids[:, None].float()

    read = spliced(asked, visual, embed)
    assert read.embedded[..., 0].tolist() == [[5, 100, 101, 102, 6, 7], [8, 9, 0, 0, 0, 0]]
    assert read.labels.tolist() == [[IGNORED] * 5 + [7], [IGNORED, 9] + [IGNORED] * 4]
    assert read.mask.sum(1).tolist() == read.lengths == [6, 2]
    at_end = spliced(asked, visual, embed, at_end=True)
    assert at_end.embedded[1, :, 0].tolist() == [0, 0, 0, 0, 8, 9]
    assert at_end.mask[1].tolist() == [False] * 4 + [True] * 2
    cut = spliced(asked, visual, embed, most=4)
    assert cut.embedded[0, :, 0].tolist() == [5, 100, 101, 102]
    assert cut.lengths == [6, 2]
    assert (cut.labels[0] == IGNORED).all()


def test_loss_is_that_of_transformers(net):
    image = torch.randn(3, 3, 24, 24)
    asked = prompts(net, TALKS)
    logits, following, read = net(image, asked, 200)
    assert [len(prompt.ids) + 8 * (IMAGE_ID in prompt.ids) for prompt in asked] == read.lengths
    out = net.language.net(inputs_embeds=read.embedded, attention_mask=read.mask.long(), labels=read.labels)
    torch.testing.assert_close(F.cross_entropy(logits, following), out.loss)
    words = net.language.tokenizer.convert_ids_to_tokens(following.tolist())
    assert " ".join(words) == "a seven </s> one </s> seven </s> one and one </s>"
    each = [net(image[k : k + 1], asked[k : k + 1], 200)[0] for k in range(3)]
    torch.testing.assert_close(logits, torch.cat(each), rtol=1e-4, atol=1e-4)


def test_only_images_that_are_asked_about_count(net):
    image = torch.randn(3, 3, 24, 24, requires_grad=True)
    logits = net(image, prompts(net, TALKS), 200)[0]
    logits.square().sum().backward()
    assert (image.grad.flatten(1).abs().amax(1) > 0).tolist() == [True, False, True]


def test_answers_are_the_likeliest_tokens_one_by_one(net):
    image, most = torch.randn(2, 3, 24, 24), 5
    asked = [TALKS[0][:1], TALKS[2][:1]]
    found = net.generate(image, prompts(net, asked), most)
    end = net.language.tokenizer.eos_token_id
    for k, turns in enumerate(asked):
        prompt, ids = prompts(net, [turns])[0], []
        while len(ids) < most and end not in ids:
            told = torch.cat([prompt.ids, torch.tensor(ids, dtype=torch.long)])
            told = Prompt(told, torch.full_like(told, IGNORED))
            read = spliced([told], net.visual(image[k : k + 1]), net.language.embed)
            ids.append(net.language(read.embedded, read.mask)[0, -1].argmax().item())
        assert found[k] == net.language.tokenizer.decode(ids, skip_special_tokens=True).strip()
    first = net.language.tokenizer(found[0].split()[0], add_special_tokens=False)["input_ids"]
    assert net.language.generate(
        net.language.embed(torch.tensor(first))[None], torch.ones(1, 1, dtype=torch.bool), 1
    ) != [""]


def test_a_pretrained_model_comes_from_a_folder(net, tmp_path):
    net.language.net.save_pretrained(tmp_path)
    net.language.tokenizer.save_pretrained(tmp_path)
    language = PretrainedLanguage(str(tmp_path))
    name = "model.layers.0.mlp.up_proj.weight"
    assert not language.net.state_dict()[name].equal(net.language.net.state_dict()[name])
    language.load()
    assert language.net.state_dict()[name].equal(net.language.net.state_dict()[name])
    assert language.dim == 64
    assert language.tokenizer("how many")["input_ids"] == net.language.tokenizer("how many")["input_ids"]


@pytest.mark.parametrize(
    ("path", "message"),
    [("vicuna", r"path: no folder vicuna; expected one or a hub name"), (".", r"path: \. cannot be read")],
)
def test_what_is_no_model(path, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        PretrainedLanguage(path)


def test_images_that_fill_everything_are_refused(net):
    with pytest.raises(UserError, match="max_length: found 9, expected more than the 9 tokens of an image"):
        net(torch.randn(1, 3, 24, 24), prompts(net, TALKS[:1]), 9)
