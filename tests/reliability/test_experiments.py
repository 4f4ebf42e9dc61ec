"""Every experiment composes, and runs two steps of training, a validation and a test with a tiny network.

The quick suite leaves out `VARIANTS`: the classes of each are those of an experiment that it runs.
"""

import json
import subprocess
import sys
from pathlib import Path

import harness
import numpy as np
import pytest
import teachers
from PIL import Image

from penstock.lightning_modules.checkpoints import load_checkpoint
from penstock.lightning_modules.cli.compose import compose
from penstock.lightning_modules.cli.conf import options
from tests.anomaly_trees import btad, mvtec, visa
from tests.box_trees import coco, with_masks
from tests.mask_trees import mask_tree

EXPERIMENTS = list(options("experiment"))
VARIANTS = ("boss_cifar10_16", "boss_cifar10_distill", "boss_cifar10_uniform_reflow", "boss_digits_uniform_reflow")
VARIANTS += ("distill_cifar10_16", "rectified_flow_celebahq", "rectified_flow_cifar10_16")
VARIANTS += (
    "rectified_flow_lsun_bedroom",
    "rectified_flow_lsun_church",
    "rectified_flow_pp_cifar10",
    "rectified_flow_pp_cifar10_16",
)
VARIANTS += ("fastflow_mvtec_wide_resnet50", "fastflow_mvtec_deit", "fastflow_mvtec_cait")
VARIANTS += ("rectified_flow_pp_cifar10_16", "reflow_cifar10_16", "twinflow_cifar10_16", "twinflow_digits_tuned")
SHARED = Path(__file__).resolve().parents[3] / "shared"
CIFAR10, BCCD = SHARED / "data" / "cifar10", SHARED / "data" / "bccd"
SQUEEZE = SHARED / "weights" / "squeezenet1_1_imagenet_fp16.safetensors"
SHORT = ["trainer.max_epochs=-1", "trainer.max_steps=2", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
SHORT += ["logger=csv", "callbacks.metrics=null", "trainer.accelerator=cpu", "trainer.enable_model_summary=false"]
TINY_UNET = ["net=unet", "model.net.width=4", "model.net.mult=[1,1]"]
TINY_GRID = ["callbacks.samples.rows=1", "callbacks.samples.cols=2", "callbacks.samples.steps=1"]
TINY_PAIRS = ["data.n=40", "data.steps=6", "data.pairs_batch=20", "data.shard=20", "data.batch_size=4"]
TINY_PAIRS += ["data.val_fraction=0.2"]
TINY_NET = {False: ["model.net.width=8", "model.net.blocks=1"], True: ["model.net.width=16"]}


@pytest.fixture(scope="module")
def defects(tmp_path_factory):
    """A folder for each set of images with defects."""
    folder = tmp_path_factory.mktemp("defects")
    mvtec(folder / "mvtec", "bottle")
    mvtec(folder / "magnetic_tile", "tile")
    for make, name, category in ((btad, "btad", "01"), (visa, "visa", "candle")):
        (folder / name).mkdir()
        make(folder / name, category)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Sixteen pictures of 256 px."""
    folder, draws = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for n in range(16):
        pixels = draws.integers(256, size=(256, 256, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
    return folder


def cheap_lpips(tree):
    """Words that give a loss with LPIPS the smallest of its networks, from a file."""
    if "distance" not in tree["model"]["init_args"].get("loss", {}).get("init_args", {}):
        return []
    if not SQUEEZE.is_file():
        pytest.skip(f"no {SQUEEZE}")
    words = {"distance.net": "squeeze", "distance.average_pooling": "false", "distance.weights": SQUEEZE, "size": 32}
    return [f"++model.loss.{key}={value}" for key, value in words.items()]


def own_videos(folder):
    """Words for a folder of two clips of 24 frames, one of them a GIF."""
    draws = np.random.default_rng(0)
    frames = [Image.fromarray(draws.integers(256, size=(40, 48, 3), dtype=np.uint8)) for _ in range(24)]
    (folder / "frames").mkdir(parents=True, exist_ok=True)
    for n, frame in enumerate(frames):
        frame.save(folder / "frames" / f"{n}.png")
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    return [f"data.data_dir={folder}", "data.val_fraction=0.5", "model.denoiser.dim=32"]


def small_anomalies(data, defects):
    """Words that make FastFlow on `data` small; a folder of `defects` is where it is read from."""
    kind, own = data["class_path"].rpartition(".")[2], data["init_args"]
    words = ["net=fastflow_mobilenetv2", "image_size=64", "model.net.flow_steps=1", "model.net.backbone.weights=random"]
    words += ["data.batch_size=2", "data.eval_batch_size=20", "model.net.backbone.model=mobilenetv2_035"]
    if kind == "Anomaly":
        words.append(f"data.data_dir={defects / own['name']}")
    elif own.get("data", {})["class_path"].endswith("Images"):
        if not CIFAR10.is_dir():
            pytest.skip(f"no CIFAR-10 at {CIFAR10}")
        words += [f"data.data.data_dir={CIFAR10}", "data.data.memory_gb=0"]
    return words


def small_boxes(data, own):
    """Words that make a detector small."""
    words = ["data.batch_size=2", "model.net.channels=16", "callbacks.cost.runs=1"]
    if data["class_path"].endswith("DigitScenes"):
        return [*words, "image_size=96"]
    if not BCCD.is_dir():
        pytest.skip(f"no BCCD at {BCCD}")
    words += [f"data.data_dir={BCCD}", "num_classes=3", "data.min_size=96", "data.max_size=128", "data.num_workers=0"]
    words += ["model.net.backbone.model=mobilenetv2_035", "model.net.backbone.weights=random"]
    return [*words, "model.net.hidden=16"] if own["net"]["class_path"].endswith("TwoStageDetector") else words


def small_objects(name, folder):
    """Words that make a detector on a pyramid small; photographs with masks are made in a folder."""
    words = ["data.batch_size=2", "callbacks.cost.runs=1"]
    if name == "piip_bccd":
        if not BCCD.is_dir():
            pytest.skip(f"no BCCD at {BCCD}")
        words += [f"data.data_dir={BCCD}", "data.min_size=96", "data.max_size=128", "data.num_workers=0"]
        return [*words, "model.net.channels=64", "model.net.backbone.weights=random"]
    words += ["model.net.channels=16", "model.net.hidden=16"]
    words += ["backbone=piip_tiny", "model.net.backbone.sizes=[64,128]", "model.net.backbone.dims=[64,32]"]
    if name == "piip_digit_objects":
        return [*words, "data.scenes=16"]
    words += [f"data.data_dir={with_masks(coco(folder))}", "num_classes=3", "data.num_workers=0"]
    return [*words, "data.min_size=64", "data.max_size=128", "data.pad_multiple=32"]


def small_classes(name, images, folder):
    """Words that make a classifier on a pyramid small; images with classes are made in a folder."""
    if name == "piip_cifar10":
        if not CIFAR10.is_dir():
            pytest.skip(f"no CIFAR-10 at {CIFAR10}")
        return [f"data.data_dir={CIFAR10}", "data.memory_gb=0", "data.batch_size=8", "callbacks.cost.runs=1"]
    if name == "piip_digits":
        return ["data.pictures=32", "data.batch_size=8", "callbacks.cost.runs=1"]
    for n, file in enumerate(sorted(images.glob("*.png"))):
        place = folder / ("val" if n % 8 < 2 else "train") / "ab"[n % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / file.name).write_bytes(file.read_bytes())
    words = [f"data.data_dir={folder}", "data.num_workers=0", "data.batch_size=4", "num_classes=2", "image_size=64"]
    return [*words, "net=piip_tiny", "model.scheduler.warmup=1"]


def small_masks(data, folder):
    """Words that make a segmenter small; data that are not embedded are made in a folder."""
    words = ["model.net.channels=8", "model.net.auxiliary_channels=8", "data.batch_size=4"]
    if data["class_path"].endswith("DigitMasks"):
        return [*words, "data.scenes=16", "image_size=64", "callbacks.cost.runs=1"]
    words += [f"data.data_dir={mask_tree(folder, classes=150)}", "shape=[3,64,64]", "data.num_workers=0"]
    words += ["data.min_size=64", "data.max_size=96", "backbone=piip_tiny", "perf=default", "callbacks.cost=null"]
    words += ["model.net.backbone.sizes=[32,64]", "model.net.backbone.dims=[64,32]", "model.net.backbone.patch=4"]
    words += ["model.window=64", "model.stride=48", "trainer.val_check_interval=1"]
    return words


def small_questions(data, folder):
    """Words that make PIIP-LLaVA small; conversations that are not embedded are made in a folder of pictures."""
    pytest.importorskip("transformers", reason="transformers is not installed (extra llava)")
    words = ["data.batch_size=4", "data.eval_batch_size=4", "teacher=null", "model.new_tokens=2"]
    if data["class_path"].endswith("DigitQuestions"):
        return [*words, "data.pictures=32"]
    turns = [{"from": "human", "value": "<image> What digit is shown?"}, {"from": "gpt", "value": "seven"}]
    rows = [{"id": str(n), "image": f"{n}.png", "conversations": turns} for n in range(16)]
    (folder / "list.json").write_text(json.dumps(rows))
    words += ["net=piip_llava_tiny", "image_size=64", f"data.data_dir={folder}", "data.file=list.json", "data.images=."]
    return [*words, "data.num_workers=0", "data.val_fraction=0.25", "perf=default", "strategy=auto"]


def small(name, images, defects):
    """Words that make the experiment `name` small; its data come from a folder where they are not embedded."""
    tree = compose([f"experiment={name}"])[0]
    data, own = tree["data"], tree["model"]["init_args"]
    encoded = (own.get("autoencoder") or {}).get("class_path", "").endswith("latents.Latents")
    if encoded and ("net" not in own or "starflow" in own["net"]["class_path"]):
        made = "test_starflow_recipes.py" if "net" in own else "test_decoder_tuning.py"
        pytest.skip(f"needs folders of diffusers and transformers: {made} makes them")
    net = own["net"]["class_path"]
    if "stable_diffusion" in net or net.endswith("weights.twinflow.pretrained"):
        made = "test_twinflow_recipes.py" if "twinflow" in net else "test_stable_diffusion.py"
        pytest.skip(f"needs a folder of diffusers: tests/lightning_modules/weights/{made} makes one")
    if tree["model"]["class_path"].endswith("PiipLlava"):
        return small_questions(data, images)
    if tree["model"]["class_path"].endswith("piip.Piip"):
        return small_classes(name, images, images.parent / "classes")
    if tree["model"]["class_path"].endswith("PiipDetector"):
        return small_objects(name, images.parent / "objects")
    if tree["model"]["class_path"].endswith("sepc.Sepc"):
        return small_boxes(data, own)
    if net.endswith("upernet.SegmentationNet"):
        return small_masks(data, images.parent / "masks")
    if net.endswith("fastflow.FastFlowNet"):
        return small_anomalies(data, defects)
    if net.endswith("starflow.STARFlow"):
        words = ["model.net.dim=32", "model.net.depths=[1,1]", "data.batch_size=4", *TINY_GRID]
        return [*words, *own_videos(images.parent / "videos")] if data["class_path"].endswith("video.Video") else words
    if net.endswith("tarflow.TARFlow"):
        sizes = ["image_size=16", "num_classes=0", "model.net.dim=64", "model.net.blocks=2", "model.net.depth=1"]
        sizes += ["callbacks.ema={class_path: penstock.lightning_modules.callbacks.ema.EMA, decay: 0.9}"]
        return [*sizes, f"data.data_dir={images}", "data.batch_size=2", "data.num_workers=0", *TINY_GRID]
    kind = data["class_path"].rpartition(".")[2]
    if kind == "Images" and "cifar10" in data["init_args"]["name"]:
        if not CIFAR10.is_dir():
            pytest.skip(f"no CIFAR-10 at {CIFAR10}")
        return [*TINY_UNET, *TINY_GRID, f"data.data_dir={CIFAR10}", "data.batch_size=4", "data.memory_gb=0"]
    if kind == "Images":
        folder = [f"data.data_dir={images}", "data.batch_size=2", "data.num_workers=0", "data.val_fraction=0.2"]
        return [*TINY_UNET, *TINY_GRID, *folder, "data.image_size=16", "shape=[3,16,16]"]
    if name.endswith("transfer"):
        own = [*TINY_UNET, "image_size=16"]
        folder = "data" if kind == "Pair" else "data.real"
        own += [f"{folder}.{side}.data_dir={images}" for side in ("source", "target")]
        if kind == "Pair":
            return [*own, "data.target.batch_size=2"]
        return [*own, f"teacher={teachers.shared('rectified_flow_transfer', *TINY_UNET, 'image_size=16')}", *TINY_PAIRS]
    if name == "rectified_flow_three_modes":
        return ["callbacks.straightness.n=4"]
    if name == "reflow_three_modes":
        return [f"teacher={teachers.shared('rectified_flow_three_modes')}", "callbacks.straightness.n=4", *TINY_PAIRS]
    if kind in ("Pairs", "RealPairs") and "cifar10" in name:
        if not CIFAR10.is_dir():
            pytest.skip(f"no CIFAR-10 at {CIFAR10}")
        small_images = "_16" if name.endswith("_16") else ""
        teacher = teachers.shared(f"rectified_flow_cifar10{small_images}", *TINY_UNET, "num_classes=0")
        starts = [f"teacher={teacher}", f"initial={teacher}"]
        words = [*starts, *TINY_UNET, *TINY_GRID, f"data.real.data_dir={CIFAR10}", *TINY_PAIRS]
        return [*words, "data.real.memory_gb=0", *cheap_lpips(tree)]
    if kind == "Pairs":
        points = name.endswith("points")
        teacher = teachers.shared(f"rectified_flow_{'points' if points else 'digits'}", *TINY_NET[points])
        straight = ["callbacks.straightness.n=4"] if "straightness" in options("experiment")[name].read_text() else []
        return [f"teacher={teacher}", *TINY_NET[points], *TINY_GRID, *TINY_PAIRS, *straight, *cheap_lpips(tree)]
    if kind == "PromptedPairs":
        teacher = teachers.shared("rectified_flow_digits_text", *TINY_NET[False])
        return [f"teacher={teacher}", *TINY_NET[False], *TINY_GRID, *TINY_PAIRS]
    if kind in ("Digits", "ImageText"):
        teacher = tree["model"]["init_args"].get("initial")
        start = [f"teacher={teachers.shared(teacher, *TINY_NET[False])}", *TINY_NET[False]] if teacher else []
        return ["model.net.width=8", *start, *TINY_GRID]
    return TINY_GRID


QUICK_OR_SLOW = [pytest.param(name, marks=pytest.mark.slow) if name in VARIANTS else name for name in EXPERIMENTS]


@pytest.mark.parametrize("name", QUICK_OR_SLOW)
def test_two_steps(name, images, defects, tmp_path):
    words = small(name, images, defects)
    done = harness.penstock("fit", f"experiment={name}", *SHORT, *words, run=tmp_path)
    assert done.code == 0, done.err[-2000:]
    values = json.loads((tmp_path / "metrics.json").read_text())
    assert np.isfinite(values["ap" if "ap" in values else "test/loss"])
    assert load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 2
    assert list((tmp_path / "samples").glob("*.png")) or "callbacks.samples" not in " ".join(words)


def test_all_compose_without_torch():
    code = "import sys\nfrom penstock.lightning_modules.cli.compose import compose\n"
    code += f"for name in {EXPERIMENTS}:\n    tree, called = compose([f'experiment={{name}}'])\n"
    code += "    assert called == name and tree['model']['class_path'] and tree['data']['class_path'], name\n"
    code += "assert 'torch' not in sys.modules, 'torch was imported'\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_file_opens_with_its_command(name):
    first = next(line for line in options("experiment")[name].read_text().splitlines() if "@package" not in line)
    assert first.startswith(f"# penstock fit experiment={name}")
