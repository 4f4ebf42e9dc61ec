"""The methods under the reliability tests: name -> words of a run of two epochs of four batches.

A new method is covered by adding one line, and one with its teacher where it starts from trained weights. The words
must leave everything random switched on (dropout, dequantisation, couplings), a learning-rate schedule, and the average
of the weights where there is one.
"""

import pytest
import teachers

GENERATIVE = ["callbacks.metrics=null", "callbacks.samples=null", "callbacks.ema.decay=0.9"]
DIGITS = [
    *GENERATIVE,
    "data=digits",
    "data.val_fraction=0.95",
    "data.batch_size=20",
    "data.eval_batch_size=40",
    "data.dequantise=true",
    "model.net.width=8",
    "model.net.dropout=0.2",
    "+model.scheduler={class_path: penstock.lightning_modules.schedules.WarmupCosine, total: 8, warmup: 2}",
]
POINTS = [*GENERATIVE, "data.size=400", "data.batch_size=100", "model.net.width=16"]
POINTS += ["+model.scheduler={class_path: penstock.lightning_modules.schedules.LinearWarmup, warmup: 3}"]

TEXT = [*GENERATIVE, "data.val_fraction=0.95", "data.batch_size=20", "data.eval_batch_size=40", "model.net.width=8"]
TEXT += ["model.net.dropout=0.2", "model.scheduler.total=8", "model.scheduler.warmup=2"]

PAIRS = [*GENERATIVE, "data.n=100", "data.steps=2", "data.pairs_batch=20", "data.shard=40"]
PAIRS += [
    "data.val_fraction=0.2",
    "data.batch_size=20",
    "data.eval_batch_size=40",
    "model.net.width=8",
    "model.net.dropout=0.2",
]
PAIRS += ["model.net.blocks=1", "callbacks.straightness=null"]
PAIRS += ["+model.scheduler={class_path: penstock.lightning_modules.schedules.WarmupCosine, total: 8, warmup: 2}"]

STARFLOW = [*GENERATIVE, "data.batch_size=20", "data.eval_batch_size=40", "callbacks.likelihood=null"]
STARFLOW += ["model.net.dim=32", "model.net.depths=[1,1]", "data.val_fraction=0.95", "model.scheduler.warmup=2"]
CLIPS = [*GENERATIVE, "frames=4", "data.batch_size=20", "data.eval_batch_size=40", "data.video.n_train=80"]
CLIPS += ["data.video.n_val=80", "data.video.n_test=40", "data.image.n_train=80", "data.image.batch_size=40"]
CLIPS += ["data.share=0.3", "data.short.frames=2", "data.short.n_train=80", "data.short.batch_size=20"]
CLIPS += ["data.short_share=0.3", "model.net.dim=32", "model.net.depths=[1,1]", "model.net.patch=4"]
CLIPS += ["model.denoiser.channels=16", "model.denoiser.head_dim=32", "model.denoiser.dim=32"]
CLIPS += ["model.optimizer.least=32", "model.scheduler.total=8", "model.scheduler.warmup=2", "model.last_frame=0.25"]
CLIPS += ["callbacks.anomaly=null", "trainer.max_steps=-1"]

ANOMALIES = ["data.batch_size=26", "data.eval_batch_size=60", "model.net.flow_steps=1"]
ANOMALIES += ["model.net.backbone.model=mobilenetv2_035", "callbacks.gallery=null"]
ANOMALIES += ["+model.scheduler={class_path: penstock.lightning_modules.schedules.LinearWarmup, warmup: 3}"]

SHORT_COSINE = ["model.scheduler.total=8", "model.scheduler.warmup=2"]
SCENES = ["data.batch_size=4", "data.scenes=16", "model.net.channels=16", "image_size=64", "callbacks.cost=null"]
SCENES += ["callbacks.gallery=null", *SHORT_COSINE]
LONE = ["data.batch_size=8", "data.pictures=32", "callbacks.cost=null", *SHORT_COSINE]
MASKS = ["data.batch_size=4", "data.scenes=16", "model.net.channels=8", "model.net.auxiliary_channels=8"]
MASKS += ["data.distort=true", "callbacks.cost=null", "callbacks.gallery=null", *SHORT_COSINE]
QUESTIONS = [
    "teacher=null",
    "data.batch_size=8",
    "data.eval_batch_size=8",
    "data.pictures=32",
    "model.new_tokens=2",
    *SHORT_COSINE,
]

TEACHERS = {
    "reflow_digits": ("rectified_flow_digits",),
    "reflow_online": ("rectified_flow_digits",),
    "rectified_flow_pp_digits": ("rectified_flow_digits",),
    "boss_digits": ("rectified_flow_digits",),
    "boss_lora": ("rectified_flow_digits",),
    "instaflow_digits": ("rectified_flow_digits_text", "model.net.blocks=1", "model.net.width=8"),
}

METHODS = {
    "reflow_digits": ["experiment=reflow_digits", *PAIRS],
    "reflow_online": ["experiment=reflow_digits", *PAIRS, "data.online=true"],
    "rectified_flow_pp_digits": ["experiment=rectified_flow_pp_digits", *PAIRS],
    "boss_digits": ["experiment=boss_digits", *PAIRS, "data.steps=6"],
    "boss_lora": ["experiment=boss_digits", *PAIRS, "data.steps=6", "model.lora_rank=2"],
    "rectified_flow_digits_text": ["experiment=rectified_flow_digits_text", *TEXT],
    "instaflow_digits": ["experiment=instaflow_digits", *PAIRS],
    "rectified_flow_digits": ["experiment=rectified_flow_digits", *DIGITS],
    "starflow_digits": ["experiment=starflow_digits", *STARFLOW],
    "starflow_v_moving_digits": ["experiment=starflow_v_moving_digits", *CLIPS],
    "twinflow_digits": ["experiment=twinflow_digits", *DIGITS],
    "rectified_flow_points": ["experiment=rectified_flow_points", *POINTS],
    "rectified_flow_ot": [
        "experiment=rectified_flow_points",
        *POINTS,
        "+model.coupling={class_path: penstock.lightning_modules.flow.couplings.MinibatchOT, reg: 0.05}",
    ],
    "fastflow_digits": ["experiment=fastflow_digits", *ANOMALIES],
    "sepc_digits": ["experiment=sepc_digits", *SCENES, "model.net.backbone.model=resnet10t"],
    "piip_digits": ["experiment=piip_digits", *LONE, "model.net.drop_path=0.2"],
    "piip_digit_objects": ["experiment=piip_digit_objects", *SCENES, "model.net.hidden=16"],
    "piip_digit_masks": ["experiment=piip_digit_masks", *MASKS],
    "piip_llava_digits_stage2": ["experiment=piip_llava_digits_stage2", *QUESTIONS],
}

DOUBLE = "trainer.precision=64-true"
NO_DROPOUT = ["model.net.dropout=0"]
ODD_SCENES = ["data.scenes=20", "data.eval_batch_size=3", "trainer.limit_train_batches=4"]
ALIKE = {
    "reflow_digits": NO_DROPOUT,
    "reflow_online": NO_DROPOUT,
    "rectified_flow_pp_digits": NO_DROPOUT,
    "boss_digits": NO_DROPOUT,
    "boss_lora": NO_DROPOUT,
    "rectified_flow_digits_text": NO_DROPOUT,
    "instaflow_digits": NO_DROPOUT,
    "rectified_flow_digits": [
        *NO_DROPOUT,
        "data.eval_batch_size=18",
        "trainer.limit_val_batches=null",
        "data.val_fraction=0.0606",
        "data.batch_size=24",
        "trainer.limit_train_batches=4",
    ],
    "twinflow_digits": [*NO_DROPOUT, "data.batch_size=24", "data.val_fraction=0.94", "trainer.limit_train_batches=4"],
    "fastflow_digits": ["data.eval_batch_size=61"],
    "sepc_digits": [*ODD_SCENES, DOUBLE],
    "piip_digits": ["data.eval_batch_size=5", "model.net.drop_path=0"],
    "piip_digit_objects": [*ODD_SCENES, DOUBLE],
    "piip_digit_masks": [*ODD_SCENES, *NO_DROPOUT],
    "piip_llava_digits_stage2": ["data.eval_batch_size=5", DOUBLE],
}
"""Words that leave each method nothing random that is a rank's own, such as dropout, and odd batches in validation.

Double precision is for those whose weights Adam moves by gradients of rounding alone: biases below a batch norm.
"""

COMMON = [
    "logger=csv",
    "perf=default",
    "callbacks.checkpoint.every_n_epochs=null",
    "callbacks.checkpoint.every_n_train_steps=1",
    "trainer.max_epochs=2",
    "trainer.check_val_every_n_epoch=1",
    "trainer.log_every_n_steps=1",
    "trainer.limit_val_batches=2",
    "trainer.limit_test_batches=1",
    "trainer.accelerator=cpu",
    "trainer.enable_model_summary=false",
]


def mostly_slow(*quick: str) -> list:
    """All methods as parameters of a test that only `quick` ones pass through in the quick suite."""
    return [method if method in quick else pytest.param(method, marks=pytest.mark.slow) for method in METHODS]


def without_dropout(method: str) -> list[str]:
    """Words that switch off what a device draws by itself."""
    return [word for word in ALIKE.get(method, []) if "drop" in word]


def words(method: str) -> list[str]:
    """Everything behind `penstock fit` for a tiny run of `method`."""
    teacher = [f"teacher={teachers.shared(*TEACHERS[method])}"] if method in TEACHERS else []
    return [*METHODS[method], *teacher, *COMMON]
