"""Every benchmark runs with tiny settings and writes its two files; no statement about speed."""

import json
import os
from pathlib import Path

import pytest
import torch

from penstock.benchmarks import bellman, cifar10, machine, overhead, peers, philox, report, startup, timing, toys

SHARED = Path(__file__).resolve().parents[2] / ".." / "shared"
NEEDS_SHARED = pytest.mark.skipif(
    not (SHARED / "data/cifar10").is_dir() or not (SHARED / "weights").is_dir(),
    reason="needs the CIFAR-10 parquet files and MobileNetV2 weights in ../shared",
)
TINY = ["model.net.width=8", "callbacks.metrics.n=20", "callbacks.samples.rows=1", "callbacks.samples.steps=1"]


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    monkeypatch.setenv("PENSTOCK_CACHE", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def result(out: Path, name: str) -> dict:
    found = json.loads((out / f"{name}.json").read_text())
    text = (out / f"{name}.md").read_text()
    assert found["title"] in text
    assert {"command", "seed", "machine", "rows"} <= found.keys()
    assert {"cpu", "cores", "torch", "lightning", "commit", "date"} <= found["machine"].keys()
    assert text.count("\n| ") == len(found["rows"]) + 2
    assert str(out) not in text
    return found


def test_machine_says_neither_host_nor_user():
    words = json.dumps(machine.facts())
    assert os.uname().nodename not in words
    assert str(Path.home()) not in words
    assert machine.facts()["cores"] >= 1


def test_table_escapes_bars_and_rounds():
    rows = [{"E|x|": 0.123456, "n": 3}, {"E|x|": None, "n": "a|b"}]
    assert report.table(rows).splitlines() == [r"| E\|x\| | n |", "| --- | --- |", "| 0.123 | 3 |", r"|  | a\|b |"]


def test_rivals_take_turns_and_warmup_does_not_count():
    order = []
    rivals = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    taken = timing.alternate(rivals, rounds=3, device=torch.device("cpu"))
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert {name: len(spent) for name, spent in taken.items()} == {"a": 3, "b": 3}
    assert timing.ratio([2.0, 3.0, 9.0], [1.0, 2.0, 3.0]) == 2.0


def test_startup(tmp_path):
    startup.main(["--rounds", "1", "--out", str(tmp_path)])
    found = result(tmp_path, "startup")
    assert len(found["rows"]) == len(startup.WORDS)
    assert {row["heavy imports"] for row in found["rows"]} == {"none"}


def test_startup_tells_an_unexpected_exit_code():
    with pytest.raises(RuntimeError, match="exit code 2, expected 0"):
        startup.run(["lst"], 0)


def test_philox(tmp_path, monkeypatch):
    monkeypatch.setattr(philox, "SHAPES", {"tiny": (8, 1, 4, 4)})
    philox.main(["--rounds", "1", "--out", str(tmp_path)])
    found = result(tmp_path, "philox_cpu")
    assert found["rows"][0]["kernel"] == "reference"
    assert found["bandwidth_gb_per_second"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_bellman(tmp_path):
    words = ["--n", "6", "--k-max", "10", "--width", "4", "--rounds", "1", "--threads", "1"]
    bellman.main([*words, "--out", str(tmp_path)])
    found = result(tmp_path, "bellman")
    assert [row["same schedules"] for row in found["rows"]] == ["yes", "yes"]
    assert all(row["median difference of costs"] < 1e-3 for row in found["rows"])


def test_overhead(tmp_path):
    overhead.main(["--turns", "2", "--block", "3", "--threads", "1", "--out", str(tmp_path), *TINY])
    found = result(tmp_path, "overhead")
    assert found["turns"] == 2
    assert found["steps_per_second"] > 0


@pytest.mark.slow
def test_overhead_shows_the_error_of_a_run_that_fails(tmp_path):
    with pytest.raises(RuntimeError, match="widht"):
        overhead.main(["--turns", "1", "--block", "1", "--out", str(tmp_path), "model.net.widht=8"])
    assert not list(tmp_path.glob("overhead*"))


@pytest.mark.slow
def test_peers(tmp_path):
    pytest.importorskip("torchcfm")
    words = ["--turns", "1", "--block", "2", "--rounds", "1", "--n", "4", "--steps", "2", "--threads", "1"]
    peers.main([*words, "--out", str(tmp_path)])
    found = result(tmp_path, "peers")
    assert set(found["training"]) == {"training, independent pairs", "training, exact OT"}
    assert len(found["rows"]) == 4


def test_samplers_of_peers_agree():
    pytest.importorskip("torchcfm")
    (module,) = peers.build(peers.compose(["experiment=rectified_flow_digits"])[0], "model")
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in module.net.parameters():
            weight += 0.02 * torch.randn_like(weight)
    ends = []
    for draw in peers.samplers(module.eval(), 3, 5).values():
        torch.manual_seed(1)
        ends.append(draw())
    assert ends[0].shape == (3, 1, 8, 8)
    for end in ends[1:]:
        assert torch.allclose(end, ends[0], atol=0.01)


def test_toys(tmp_path):
    toys.main(
        ["--steps", "4", "--reflow-steps", "4", "--pairs", "64", "--n", "64", "--batch", "32", "--out", str(tmp_path)]
    )
    found = result(tmp_path, "toys")
    assert set(found["flows"]) == {"exact", "1-rectified", "2-rectified"}
    assert (tmp_path / "toys.png").stat().st_size > 10_000


@NEEDS_SHARED
@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_cifar10(tmp_path, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    net = ["net=unet", "model.net.width=8"]
    words = ["--parts", "run", "speed", "curve", "--n", "12", "--limit", "40", "--steps", "4", "--speed-steps", "4"]
    words += ["--rounds", "1", "--minutes", "0.1", "--every", "1", "--perf", "channels_last", "--batch", "4"]
    words += [f"--word={word}" for word in net]
    weights = SHARED / "weights/mobilenetv2_100_imagenet_fp16.safetensors"
    data = ["--data", str(SHARED / "data/cifar10"), "--weights", str(weights)]
    cifar10.main([*data, "--device", device, "--out", str(tmp_path), *words])
    run = result(tmp_path, f"cifar10_{device}_run")
    assert {"fd_mobilenetv2/1", "fd_mobilenetv2/2", "train/loss"} <= run["metrics"].keys()
    assert {"config.yaml", "metrics.csv", "checkpoints/last.ckpt", "samples/test.png"} <= set(run["files"])
    speed = result(tmp_path, f"cifar10_{device}_speed")
    assert set(speed["images_per_second"]) == {"channels_last", "default"}
    curve = result(tmp_path, f"cifar10_{device}_curve")
    assert all(row["fd_mobilenetv2/20"] > 0 and row["training seconds"] > 0 for row in curve["rows"])
