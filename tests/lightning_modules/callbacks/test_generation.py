import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging

from penstock.lightning_modules.callbacks import generation
from penstock.lightning_modules.callbacks.features import Pixels
from penstock.lightning_modules.callbacks.generation import GenerationMetrics, balanced_labels, generate
from penstock.lightning_modules.errors import UserError


class Spy:
    """A metric that remembers what it was given."""

    def __init__(self):
        self.sets, self.checked = [], 0

    def check(self, trainer, pl_module):
        self.checked += 1

    def reset(self, device):
        self.sets.append([])

    def update(self, samples):
        self.sets[-1].append(samples)

    def compute(self, trainer):
        return {"mean": float(torch.cat([s.data for s in self.sets[-1]]).mean())}

    def constants(self, trainer):
        return {"spy/constant": 1.5}


def one_set(module, n, labels, seed=0, steps=2):
    chunks = list(generate(module, n, steps, seed, labels))
    return torch.cat([c.index for c in chunks]), torch.cat([c.data for c in chunks])


@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_number_of_ranks_makes_the_same_set(fakes, monkeypatch, world):
    module, _ = fakes.digits_module_and_data()
    labels = balanced_labels(640, 10)
    _, alone = one_set(module, 640, labels)
    together = torch.full_like(alone, torch.nan)
    calls = []
    for rank in range(world):
        monkeypatch.setattr(generation, "rank_and_world", lambda rank=rank: (rank, world))
        module.calls.clear()
        for chunk in generate(module, 640, 2, 0, labels):
            assert torch.isnan(together[chunk.index]).all()
            together[chunk.index] = chunk.data
        calls.append(len(module.calls))
    assert torch.equal(together, alone)
    assert len(set(calls)) == 1


def test_samples_are_balanced_clamped_and_repeatable(fakes):
    module, _ = fakes.digits_module_and_data(scale=4.0)
    chunks = list(generate(module, 605, 1, 7, balanced_labels(605, 10)))
    assert [len(c.index) for c in chunks] == [250, 250, 105]
    labels = torch.cat([c.label for c in chunks])
    assert torch.equal(labels, torch.arange(605) % 10)
    data = torch.cat([c.data for c in chunks])
    assert data.min() == -1
    assert data.max() == 1
    assert torch.equal(data, one_set(module, 605, balanced_labels(605, 10), seed=7, steps=1)[1])
    assert not torch.equal(data, one_set(module, 605, balanced_labels(605, 10), seed=8, steps=1)[1])
    assert not torch.equal(chunks[0].data, chunks[1].data)


def test_points_are_not_clamped_and_have_no_labels(fakes):
    module = fakes.FakeModule(torch.full((5, 2), 7.0), None)
    (chunk,) = generate(module, 4, 1, 0, balanced_labels(4, module.num_classes))
    assert chunk.label is None
    assert chunk.data.min() > 1


def test_modes_and_global_random_state_are_as_before(fakes):
    module, _ = fakes.digits_module_and_data()
    module.train()
    module.dropout.eval()
    before = torch.get_rng_state()
    chunks = generate(module, 300, 1, 0, balanced_labels(300, 10))
    data = next(chunks).data
    assert not data.requires_grad
    assert module.training
    assert not module.dropout.training
    assert torch.equal(before, torch.get_rng_state())
    assert module.calls == [(250, 1, False)]


def test_metrics_share_one_set_and_are_named_by_network_calls(fakes, tmp_path):
    module, data = fakes.digits_module_and_data()
    first, second = Spy(), Spy()
    second.compute = lambda trainer: {}
    callback = GenerationMetrics([first, second], steps=[1, 4], n=30)
    trainer = fakes.quiet_trainer(tmp_path, [callback])
    trainer.fit(module, datamodule=data)
    assert [steps for _, steps, _ in module.calls] == [1, 4]
    assert first.sets[0][0].data is second.sets[0][0].data
    assert {"mean/1", "mean/4", "spy/constant"} <= set(trainer.callback_metrics)
    assert float(trainer.callback_metrics["mean/4"]) == pytest.approx(float(first.sets[1][0].data.mean()), rel=1e-6)
    assert float(trainer.callback_metrics["spy/constant"]) == 1.5


def test_names_stay_the_same_where_calls_depend_on_the_samples(fakes, tmp_path):
    module, data = fakes.digits_module_and_data()
    took, sample = iter([347, 350, 301]), module.sample

    def varying(n, **options):
        made, module.nfe = sample(n, **options), next(took)
        return made

    module.sample, module.calls_vary = varying, True
    callback = GenerationMetrics([Spy()], steps=[64], n=30)
    trainer = fakes.quiet_trainer(tmp_path, [callback])
    for expected in (347, 350, 301):
        trainer.validate(module, datamodule=data, verbose=False)
        assert set(trainer.callback_metrics) == {"mean/64", "network_calls/64", "spy/constant"}
        assert float(trainer.callback_metrics["network_calls/64"]) == expected


@pytest.mark.parametrize(("every", "expected"), [(0, 0), (1, 4), (2, 2), (3, 1)])
def test_every_kth_validation_and_never_in_the_sanity_check(fakes, tmp_path, every, expected):
    module, data = fakes.digits_module_and_data()
    spy = Spy()
    callback = GenerationMetrics([spy], steps=[1], n=2, every_n_validations=every)
    trainer = fakes.quiet_trainer(tmp_path, [callback], max_epochs=2, val_check_interval=4)
    trainer.fit(module, datamodule=data)
    assert len(spy.sets) == expected
    trainer.test(module, datamodule=data, verbose=False)
    trainer.validate(module, datamodule=data, verbose=False)
    assert len(spy.sets) == expected + 2


def test_a_resumed_run_counts_validations_on(fakes, tmp_path):
    module, data = fakes.digits_module_and_data()
    trainer = fakes.quiet_trainer(tmp_path, [GenerationMetrics([Spy()], steps=[1], n=2, every_n_validations=2)])
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    spy = Spy()
    callback = GenerationMetrics([spy], steps=[1], n=2, every_n_validations=2)
    trainer = fakes.quiet_trainer(tmp_path, [callback], max_epochs=2)
    trainer.fit(module, datamodule=data, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert len(spy.sets) == 1


def test_averaged_weights_are_what_is_scored(fakes, tmp_path):
    module = fakes.FakeModule(torch.zeros(4, 1, 2, 2), None, scale=0.0)
    data = fakes.FakeData({"image": torch.zeros(64, 1, 2, 2)}, 0, "zeros")
    average = EMAWeightAveraging(decay=0.5)
    callback = GenerationMetrics([Spy()], steps=[1], n=2)
    trainer = fakes.quiet_trainer(tmp_path, [callback, average])
    trainer.fit(module, datamodule=data)
    scored, last = float(trainer.callback_metrics["mean/1"]), float(average._average_model.module.weight.detach())
    raw = 1 - 0.98**8
    assert scored == pytest.approx(last)
    assert abs(scored - raw) > 0.01
    with pytest.raises(UserError, match="EMAWeightAveraging stands before GenerationMetrics"):
        fakes.quiet_trainer(tmp_path, [average, callback]).fit(module, datamodule=data)


def test_metrics_on_the_same_features_compute_them_once(fakes):
    class Counting(Pixels):
        calls = 0

        def __call__(self, data):
            Counting.calls += 1
            return super().__call__(data)

    module, _ = fakes.digits_module_and_data()
    (chunk,) = generate(module, 10, 1, 0, balanced_labels(10, 10))
    assert torch.equal(chunk.features(Counting()), chunk.features(Counting()))
    assert Counting.calls == 1


def test_two_metrics_of_one_name_are_refused(fakes, tmp_path):
    module, data = fakes.digits_module_and_data()
    trainer = fakes.quiet_trainer(tmp_path, [GenerationMetrics([Spy(), Spy()], steps=[1], n=2)])
    with pytest.raises(UserError, match="'mean/1' is measured twice"):
        trainer.validate(module, datamodule=data, verbose=False)


def test_a_run_without_datamodule_is_refused(fakes, tmp_path):
    module, _ = fakes.digits_module_and_data()
    trainer = fakes.quiet_trainer(tmp_path, [GenerationMetrics([], steps=[1])])
    with pytest.raises(UserError, match="GenerationMetrics: the run has no DataModule"):
        trainer.validate(module, torch.utils.data.DataLoader([0]), verbose=False)


def written(also):
    room = "penstock.lightning_modules.callbacks."
    network = {
        "model": "mobilenetv2_100",
        "name": "mobilenetv2",
        "pad_type": "same",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    features = {"class_path": room + "features.TimmFeatures", "init_args": network}
    metrics = [
        {"class_path": room + "frechet.FrechetDistance", "init_args": {"features": features, "also": [also]}},
        {"class_path": room + "label_accuracy.LabelAccuracy"},
    ]
    return [
        {"class_path": room + "generation.GenerationMetrics", "init_args": {"metrics": metrics, "steps": [1, 20]}},
        {"class_path": room + "samples.SampleGrid"},
        {"class_path": room + "throughput.Throughput"},
    ]


def test_everything_can_be_written_in_yaml():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callbacks", type=list[Callback])
    made = parser.instantiate_classes(parser.parse_object({"callbacks": written("kid")})).callbacks
    assert [type(callback).__name__ for callback in made] == ["GenerationMetrics", "SampleGrid", "Throughput"]
    assert made[0].metrics[0].features.mean == (0.5, 0.5, 0.5)
    with pytest.raises(ArgumentError, match="Got value: kit"):
        parser.parse_object({"callbacks": written("kit")})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 1}, "n: 1 samples given"),
        ({"steps": []}, r"steps: \[\] given"),
        ({"steps": [4, 0]}, "steps=0: expected a whole number of 1 or more"),
        ({"steps": ["belman:4"]}, "did you mean .bellman:4.?"),
        ({"every_n_validations": -1}, "every_n_validations: -1 given"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        GenerationMetrics(**({"metrics": [], "steps": [1]} | settings))
