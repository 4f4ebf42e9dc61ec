import pytest
import torch

from penstock.lightning_modules.callbacks.features import Pixels
from penstock.lightning_modules.callbacks.generation import GenerationMetrics
from penstock.lightning_modules.callbacks.label_accuracy import LabelAccuracy
from penstock.lightning_modules.errors import UserError


def score(fakes, folder, module, data, metric, steps=4):
    trainer = fakes.quiet_trainer(folder, [GenerationMetrics([metric], steps=[steps], n=600)])
    return trainer.test(module, datamodule=data, verbose=False)[0]


@pytest.mark.parametrize(("classifier", "floor"), [("svm", 0.975), ("logistic", 0.92)])
def test_good_samples_are_recognised_and_the_classifier_is_judged(fakes, tmp_path, classifier, floor):
    module, data = fakes.digits_module_and_data(scale=0.1)
    found = score(fakes, tmp_path, module, data, LabelAccuracy(Pixels(), classifier))
    assert set(found) == {"label_accuracy/4", "label_accuracy/real"}
    assert found["label_accuracy/real"] >= floor
    assert found["label_accuracy/4"] >= floor
    assert data.asked == ["train", "test"]


def test_samples_of_other_classes_score_by_chance(fakes, tmp_path):
    module, data = fakes.digits_module_and_data()
    module.labels = module.labels[torch.randperm(1797, generator=torch.Generator().manual_seed(0))]
    assert score(fakes, tmp_path, module, data, LabelAccuracy())["label_accuracy/4"] == pytest.approx(0.1, abs=0.05)


def test_accuracy_counts_hits(fakes, tmp_path):
    module, data = fakes.digits_module_and_data(scale=0.0)
    original = module.sample

    def every_third_wrong(n, *, steps, cond=None, generator=None):
        wrong = torch.arange(n) % 3 == 0
        return original(n, steps=steps, cond=torch.where(wrong, (cond + 5) % 10, cond), generator=generator)

    module.sample = every_third_wrong
    found = score(fakes, tmp_path, module, data, LabelAccuracy())["label_accuracy/4"]
    assert found == pytest.approx(2 / 3, abs=0.02)


def test_unconditional_or_mismatched_models_stop_before_training(fakes, tmp_path):
    images, labels = fakes.digits()
    _, data = fakes.digits_module_and_data()
    module = fakes.FakeModule(images, None)
    trainer = fakes.quiet_trainer(tmp_path, [GenerationMetrics([LabelAccuracy()], steps=[1])])
    with pytest.raises(UserError, match="label_accuracy: the model is unconditional"):
        trainer.fit(module, datamodule=data)
    assert float(module.weight.detach()) == 0
    data.num_classes = 7
    with pytest.raises(UserError, match="the model has 10 classes, the data 7"):
        score(fakes, tmp_path, fakes.FakeModule(images, labels), data, LabelAccuracy())
