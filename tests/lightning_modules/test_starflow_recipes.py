"""Networks of the released recipes have the papers' numbers of parameters."""

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn

from penstock.lightning_modules.cli.compose import compose

COUNTS = {  # of the flow and of the denoiser
    "starflow_t2i_256": (3_858_281_544, 0),
    "starflow_imagenet256": (1_412_255_816, 0),
    "starflow_v_480p": (5_977_211_744, 912_884_784),
    "tarflow_imagenet64": (None, 0),
}


def count(config):
    """Parameters of the network that a configuration names."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(nn.Module, "net", fail_untyped=False)
    with torch.device("meta"):
        net = parser.instantiate_classes(parser.parse_object({"net": config}))["net"]
    return sum(weight.numel() for weight in net.parameters())


def tarflow(dim, blocks, depth, patch, channels, places, classes):
    """By hand: tokens in and out, layers of attention and MLP, places and classes."""
    size = channels * patch**2
    layer = 4 * dim**2 + 4 * dim + 8 * dim**2 + 5 * dim + 4 * dim
    return blocks * (size * dim + dim + depth * layer + dim * 2 * size + 2 * size + places * dim + classes * dim)


def test_the_denoiser_of_the_recipe_sees_one_frame_ahead_and_shallow_blocks_are_exact():
    config = compose(["experiment=starflow_v_480p"])[0]["model"]["init_args"]
    assert config["denoiser"]["init_args"].get("sight", "first_layer") == "first_layer"
    assert config["shallow"]["init_args"]["tolerance"] == 1e-6


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_of_the_recipes(name):
    flow, denoiser = COUNTS[name]
    config = compose([f"experiment={name}"])[0]["model"]["init_args"]
    assert count(config["net"]) == (flow or tarflow(768, 8, 8, 2, 3, 32**2, 1000))
    if denoiser:
        assert count(config["denoiser"]) == denoiser
