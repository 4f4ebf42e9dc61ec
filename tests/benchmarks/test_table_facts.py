"""What a table says of a run beside its metrics: read off configurations, and off names of metrics."""

import json

import yaml

from penstock.benchmarks.table_facts import calls_of, named, of_run
from penstock.lightning_modules.cli.compose import compose


def facts_of(folder, words, **known):
    """What is said of a run of these words, whose configuration is composed and not completed."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(compose(words)[0]))
    (folder / "facts.json").write_text(json.dumps({"ranks": 2, "accumulation": 1, "split": "val", **known}))
    return of_run(folder)


def test_what_a_number_hangs_on(tmp_path):
    found = facts_of(tmp_path, ["experiment=rectified_flow_digits", "trainer.accumulate_grad_batches=3"])
    assert (found["batch"], found["accumulation"], found["global_batch"], found["ranks"]) == (128, 3, 384, 2)
    assert (found["split"], found["features"], found["ema"]) == ("val, FrechetDistance all", "Pixels", 0.999)
    found = facts_of(tmp_path, ["experiment=stable_diffusion_15"], split="test")
    assert found["split"] == "test, FrechetDistance test"
    assert found["features"] == "Inception, ClipScore (ViT-g-14, laion2b_s12b_b42k)"
    assert found["ema"] == "none"
    found = facts_of(tmp_path, ["experiment=starflow_v_moving_digits"])
    assert (found["epochs"], found["steps"]) == (None, 2900)
    assert found["global_batch"] == "1, image 16, short 3"
    assert facts_of(tmp_path, ["experiment=fastflow_cifar10"])["features"] is None
    tested = facts_of(tmp_path, ["experiment=rectified_flow_digits"], accumulation=None)
    assert tested["epochs"] is tested["steps"] is tested["batch"] is tested["global_batch"] is None


def test_calls_behind_a_metric():
    measured = {"network_calls/64": 18.2}
    assert [calls_of(name, measured) for name in ("fid/2", "fid/bellman-4", "fd_clip_pixels/64")] == [2, 4, 18]
    assert [calls_of(name, {}) for name in ("image_auroc", "best_on_test/pixel_auroc")] == [None, None]


def test_a_star_is_the_metric_of_the_most_calls():
    metrics = {"fid/2": 3.0, "fid/104": 2.5, "fid/20": 2.6, "fid/bellman-200": 1.0, "kid/500": 0.1}
    assert [named(name, metrics) for name in ("fid/*", "fid/2", "fid/3", "clip/*")] == ["fid/104", "fid/2", None, None]
