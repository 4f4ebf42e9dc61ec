"""Share of captions that samples keep, beside the same of real samples."""

import pytest
import torch

from penstock.datamodules.moving_digits import MovingDigits
from penstock.lightning_modules.callbacks.caption_accuracy import CaptionAccuracy
from penstock.lightning_modules.callbacks.generation import GenerationMetrics
from penstock.lightning_modules.errors import UserError


class Judge:
    """A sample keeps its caption if its first number is that of the caption."""

    def __call__(self, data, captions):
        right = data.flatten(1)[:, 0].round().long() == torch.tensor([int(caption) for caption in captions])
        return {"": right.double(), "half": right.double() / 2}


def module_and_data(fakes):
    data = MovingDigits(frames=2, height=10, width=10, n_train=4, n_val=3, n_test=10, batch_size=4)
    data.prepare_data()
    data.setup()
    module = fakes.FakeModule(torch.zeros(1, 2, 1, 10, 10), None)
    module.takes_text = True

    def sample(n, *, steps, cond=None, generator=None):
        module.nfe = steps
        said = torch.tensor([float(text) for text in cond]).view(-1, 1, 1, 1, 1)
        return said.expand(n, 2, 1, 10, 10)

    module.sample = sample
    data.prompts = lambda n, split: (["1", "0", "-1", "2"][:n], None)
    return module, data


def score(fakes, folder, module, data, metric):
    trainer = fakes.quiet_trainer(folder, [GenerationMetrics([metric], steps=[1], n=4, chunk=3)])
    return trainer.test(module, datamodule=data, verbose=False)[0]


def test_samples_are_judged_by_the_captions_that_they_were_asked_for(fakes, tmp_path):
    module, data = module_and_data(fakes)
    metric = CaptionAccuracy(Judge(), n_real=6)
    judged = []

    def judge(samples, captions):
        judged.append(captions)
        if captions[0].startswith("a"):
            return {"": torch.ones(len(captions)), "half": torch.full((len(captions),), 0.5)}
        return Judge()(samples, captions)

    metric.judge = judge
    found = score(fakes, tmp_path, module, data, metric)
    assert judged[:2] == [["1", "0", "-1"], ["2"]]
    assert [len(captions) for captions in judged[2:]] == [4, 2]
    assert found == pytest.approx(
        {
            "caption_accuracy/1": 0.75,
            "caption_accuracy_half/1": 0.375,
            "caption_accuracy/real": 1.0,
            "caption_accuracy_half/real": 0.5,
        }
    )


def test_refusals(fakes, tmp_path):
    with pytest.raises(UserError, match="n_real: 0 samples given"):
        CaptionAccuracy(Judge(), n_real=0)
    module, data = module_and_data(fakes)
    module.takes_text = False
    with pytest.raises(UserError, match="caption_accuracy: FakeModule takes no text"):
        score(fakes, tmp_path, module, data, CaptionAccuracy(Judge()))
    module.takes_text = True
    with pytest.raises(UserError, match="caption_accuracy: FakeData has no captions"):
        score(fakes, tmp_path, module, fakes.digits_module_and_data()[1], CaptionAccuracy(Judge()))
