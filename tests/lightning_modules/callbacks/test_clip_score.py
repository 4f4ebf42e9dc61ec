"""CLIP score against torchmetrics and against plain open_clip, over ranks, and what it refuses."""

import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("open_clip", reason="open_clip is not installed (extra clip)")

import open_clip
from PIL import Image

from penstock.lightning_modules.callbacks import clip_score
from penstock.lightning_modules.callbacks.clip_score import ClipScore
from penstock.lightning_modules.callbacks.generation import Generated, GenerationMetrics
from penstock.lightning_modules.errors import UserError

TINY = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
PROMPTS = ["a cat", "two dogs in the sun", "a red bus", "nothing at all", "a lake"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A CLIP of no size with random weights: its architecture and its file; pictures agree with prompts."""
    folder = tmp_path_factory.mktemp("clip")
    (folder / "tiny.json").write_text(json.dumps(TINY))
    open_clip.add_model_config(folder / "tiny.json")
    torch.manual_seed(0)
    state = open_clip.create_model("tiny").state_dict()
    state["visual.proj"] = -state["visual.proj"]
    torch.save(state, folder / "tiny.pt")
    torch.save(state | {"visual.proj": -state["visual.proj"]}, folder / "against.pt")
    return {"model": str(folder / "tiny.json"), "weights": str(folder / "tiny.pt")}


def captioned(fakes, takes_text=True):
    module, data = fakes.digits_module_and_data()
    module.takes_text = takes_text
    plain = module.sample
    module.asked = []

    def sample(n, *, steps, cond=None, generator=None):
        module.asked.append(cond)
        return plain(n, steps=steps, generator=generator, cond=None if isinstance(cond, list) else cond)

    module.sample = sample
    data.prompts = lambda n, split="test": ([PROMPTS[i % 5] for i in range(n)], None)
    return module, data


def run(fakes, folder, metric, n=13, takes_text=True, **settings):
    module, data = captioned(fakes, takes_text)
    trainer = fakes.quiet_trainer(folder, [GenerationMetrics([metric], steps=[2], n=n, **settings)])
    trainer.validate(module, datamodule=data, verbose=False)
    return module, {k: float(v) for k, v in trainer.callback_metrics.items()}


def images(n=5, size=16):
    levels = torch.randint(256, (n, 3, size, size), generator=torch.Generator().manual_seed(0))
    return levels / 127.5 - 1


def independent(tiny, pictures, prompts):
    """Mean of 100 cos by open_clip's own preprocessing of 8-bit files."""
    net, _, preprocess = open_clip.create_model_and_transforms("tiny", pretrained=tiny["weights"])
    files = [Image.fromarray(((p + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()) for p in pictures]
    net.eval()
    with torch.no_grad():
        seen = net.encode_image(torch.stack([preprocess(f) for f in files]))
        said = net.encode_text(open_clip.get_tokenizer("tiny")(prompts))
    return 100 * torch.nn.functional.cosine_similarity(seen, said)


def scored(metric, pictures, prompts):
    metric._net = metric._net or metric._load().eval()
    metric.reset(torch.device("cpu"))
    for first in range(0, len(pictures), 2):
        part = slice(first, first + 2)
        index = torch.arange(len(pictures))[part]
        metric.update(Generated(index, pictures[part], None, 1, prompts[part]))
    return metric.compute(None)["clip_score_tiny"]


def test_value_is_that_of_open_clip_on_files(tiny):
    expected = independent(tiny, images(), PROMPTS)
    found = scored(ClipScore(**tiny, chunk=3), images(), PROMPTS)
    assert found == pytest.approx(max(float(expected.mean()), 0), abs=1e-3)
    metric = ClipScore(**tiny)
    metric._net = metric._load().eval()
    torch.testing.assert_close(100 * metric.cosines(images(), PROMPTS), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("weights", ["tiny.pt", "against.pt"])
def test_value_is_that_of_torchmetrics(tiny, weights):
    """Of its `compute`, on what its `update` sums; the second network's cosines are negative."""
    library = pytest.importorskip("torchmetrics.multimodal.clip_score")
    metric = ClipScore(tiny["model"], tiny["weights"].replace("tiny.pt", weights))
    found = scored(metric, images(), PROMPTS)
    cosines = metric.cosines(images(), PROMPTS)
    theirs = SimpleNamespace(score=100 * cosines.sum(), n_samples=torch.tensor(len(cosines)))
    assert found == pytest.approx(float(library.CLIPScore.compute(theirs)), abs=1e-4)
    assert (found > 1) == (weights == "tiny.pt")
    assert (cosines.abs() > 0.01).all()


def test_it_scores_samples_of_the_datas_prompts(fakes, tiny, tmp_path):
    module, values = run(fakes, tmp_path, ClipScore(**tiny))
    assert set(values) == {"clip_score_tiny/2"}
    assert module.asked == [[PROMPTS[i % 5] for i in range(13)]]


def test_uneven_ranks_give_the_value_of_one(tiny, monkeypatch):
    pictures, prompts = images(), PROMPTS
    alone = scored(ClipScore(**tiny), pictures, prompts)
    shares = []
    for rows in ([0, 1, 2, 4], [3], []):
        metric = ClipScore(**tiny)
        metric._net = metric._load().eval()
        metric.reset(torch.device("cpu"))
        if rows:
            metric.update(Generated(torch.tensor(rows), pictures[rows], None, 1, [prompts[r] for r in rows]))
        monkeypatch.setattr(clip_score, "gather_rows", lambda *own: shares.append(own))
        assert metric.compute(None) == {}
    monkeypatch.undo()
    from penstock.lightning_modules.callbacks import ranks

    monkeypatch.setattr(ranks, "gather", lambda value: [tuple(share) for share in shares])
    metric._rows = []
    assert metric.compute(None)["clip_score_tiny"] == pytest.approx(alone, abs=1e-6)


def test_only_a_published_architecture_earns_the_plain_name(tiny):
    assert ClipScore().name == "clip_score"
    assert ClipScore(**tiny).name == "clip_score_tiny"


def test_what_is_missing_is_named(fakes, tiny, tmp_path):
    missing = tmp_path / "ViT-B-32.pt"
    with pytest.raises(UserError, match=r"no weights .*ViT-B-32\.pt; expected a file of ViT-B-32's weights"):
        run(fakes, tmp_path, ClipScore("ViT-B-32", str(missing)))
    with pytest.raises(UserError, match=r"no weights opnai \(did you mean 'openai'"):
        run(fakes, tmp_path, ClipScore("ViT-B-32", "opnai"))
    with pytest.raises(UserError, match=r"open_clip has no model 'ViT-B-23' \(did you mean 'ViT-B-"):
        run(fakes, tmp_path, ClipScore("ViT-B-23"))
    with pytest.raises(UserError, match=r"no file .*none\.json; expected an architecture"):
        run(fakes, tmp_path, ClipScore(str(tmp_path / "none.json"), tiny["weights"]))
    missing.write_bytes(b"not weights")
    with pytest.raises(UserError, match=r"ViT-B-32\.pt does not fit .*tiny\.json"):
        run(fakes, tmp_path, ClipScore(tiny["model"], str(missing)))
    with pytest.raises(UserError, match="FakeModule takes no prompts, expected a text-conditional model"):
        run(fakes, tmp_path, ClipScore(**tiny), takes_text=False)
    module, data = fakes.digits_module_and_data()
    module.takes_text = True
    trainer = fakes.quiet_trainer(tmp_path, [GenerationMetrics([ClipScore(**tiny)], steps=[1], n=2)])
    with pytest.raises(UserError, match="FakeData has no captions, expected data=image_text"):
        trainer.validate(module, datamodule=data, verbose=False)
