"""Weights of another network: one line says what is missing or of another shape."""

import pytest
import torch
from torch import nn

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.timm_weights import load_weights, read_weights


def refused(net, other, tmp_path):
    torch.save(other.state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError) as error:
        load_weights(net, str(tmp_path / "other.pth"), "backbone.weights", "a net")
    return str(error.value).partition("does not fit a net: ")[2]


def test_shapes_that_differ(tmp_path):
    assert refused(nn.Linear(2, 3), nn.Linear(2, 4), tmp_path) == "weight has shape [4, 2], expected [3, 2] and 1 more"
    wide, narrow = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(3, 4, 3, bias=False)
    assert refused(wide, narrow, tmp_path) == "weight has shape [4, 3, 3, 3], expected [8, 3, 3, 3]"


def test_names_that_are_missing(tmp_path):
    layers = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    expected = 'Missing key(s) in state_dict: "0.weight", "0.bias", "1.weight" and 1 more'
    assert refused(layers, nn.Linear(1, 1), tmp_path).startswith(expected)


def test_files_that_wrap_their_tensors(tmp_path):
    net, file = nn.Linear(2, 3), tmp_path / "wrapped.pth"
    torch.save({"module": net.state_dict()}, file)
    read = read_weights(str(file), "weights", "a net")
    assert all(torch.equal(read[name], value) for name, value in net.state_dict().items())
    torch.save({"weights": net.state_dict()}, file)
    with pytest.raises(UserError, match="holds 'weights', which is no tensor; expected the state dict of a net"):
        read_weights(str(file), "weights", "a net")
