"""The experiments for the paper's data say the published recipe: Adam, 500 epochs, batch 32, plain maps; CIFAR-10, of
which none is published, our own."""

import pytest

from penstock.lightning_modules.cli.compose import compose
from penstock.lightning_modules.cli.conf import options

PAPER = {
    "fastflow_mvtec_resnet18": ("resnet18.tv_in1k", [1, 2, 3], 256, "mvtec"),
    "fastflow_mvtec_wide_resnet50": ("wide_resnet50_2.tv_in1k", [1, 2, 3], 256, "mvtec"),
    "fastflow_mvtec_deit": ("deit_base_distilled_patch16_384.fb_in1k", [7], 384, "mvtec"),
    "fastflow_mvtec_cait": ("cait_m48_448.fb_dist_in1k", [40], 448, "mvtec"),
    "fastflow_visa": ("wide_resnet50_2.tv_in1k", [1, 2, 3], 256, "visa"),
    "fastflow_btad": ("wide_resnet50_2.tv_in1k", [1, 2, 3], 256, "btad"),
}


def test_cifar10_has_no_trainable_norm_and_scores_whole_images():
    tree, _ = compose(["experiment=fastflow_cifar10", "net=fastflow_mobilenetv2_tf"])
    own = tree["model"]["init_args"]
    assert (own["net"]["init_args"]["norm_affine"], own["top"]) == (False, 1)
    assert own["net"]["init_args"]["image_size"] == tree["data"]["init_args"]["image_size"] == [64, 64]
    assert tree["trainer"]["max_epochs"] == 20


@pytest.mark.parametrize("name", PAPER)
def test_the_recipe(name):
    tree, _ = compose([f"experiment={name}"])
    own, data, (model, layers, size, dataset) = tree["model"]["init_args"], tree["data"]["init_args"], PAPER[name]
    backbone = own["net"]["init_args"]["backbone"]["init_args"]
    assert (backbone["model"], backbone["layers"]) == (model, layers)
    assert own["optimizer"] == {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-3, "weight_decay": 1e-5}}
    assert not {"scheduler", "top", "blur", "tile"} & own.keys()
    assert own["net"]["init_args"]["image_size"] == data["image_size"] == [size, size]
    assert (data["batch_size"], data.get("name")) == (32, dataset)
    assert tree["trainer"]["max_epochs"] == 500
    assert not {"flip", "rotate", "shots", "val"} & data.keys()
    assert len(options("experiment")[name].read_text().splitlines()) <= 40
