"""Classes as texts: one token with a single 1, the last place for no class."""

import pytest
import torch

from penstock.lightning_modules.errors import UserError
from penstock.lightning_modules.nets.class_text import ClassText
from penstock.lightning_modules.nets.starflow import STARFlow


def test_a_class_is_one_token_and_no_class_the_last_place():
    found = ClassText(4)(["2", " 0 ", ""])
    assert found.shape == (3, 1, 5)
    assert found[:, 0].argmax(1).tolist() == [2, 0, 4]
    assert found.sum() == 3
    assert found.dtype == torch.float32


def test_it_is_what_a_flow_of_classes_makes_of_its_labels():
    net = STARFlow((3, 4, 4), 64, (1, 1), num_classes=4, head_dim=32)
    assert net.condition(torch.tensor([3, 1]), 2).equal(ClassText(4)(["3", "1"]))
    assert net.condition(None, 1).equal(ClassText(4)([""]))


@pytest.mark.parametrize("text", ["4", "-1", "cat", "1.0"])
def test_other_texts_are_refused(text):
    with pytest.raises(UserError, match=rf"prompt '{text}': expected a class, 0 to 3, or nothing"):
        ClassText(4)([text])


def test_at_least_one_class():
    with pytest.raises(UserError, match=r"num_classes: found 0, expected at least 1"):
        ClassText(0)
