"""Tensors are copied into a model strictly, and compared to the last bit."""

from pathlib import Path

import pytest
import torch
from torch import nn

from rectvlm.checkpoint.strict_load import find_differing_tensors, load_tensors, named_tensors
from rectvlm.types import UserError


class SmallModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 2)
        self.register_buffer("present", torch.randn(2, 2))


def test_every_fault_is_named_and_nothing_is_loaded() -> None:
    tensors = {
        name: tensor.detach().clone() for name, tensor in named_tensors(SmallModel()).items()
    }
    model = SmallModel()
    load_tensors(model, tensors, list(tensors), Path("here"))
    assert find_differing_tensors(named_tensors(model), tensors) == []

    wrong = {**tensors, "decoder.weight": torch.zeros(1), "encoder.weight": torch.zeros(5, 3)}
    del wrong["encoder.bias"]
    untouched = SmallModel()
    before = {name: tensor.clone() for name, tensor in named_tensors(untouched).items()}
    with pytest.raises(UserError) as caught:
        load_tensors(untouched, wrong, list(tensors), Path("here"))
    message = str(caught.value)
    assert "missing: encoder.bias" in message
    assert "unexpected: decoder.weight" in message
    assert "of another shape: encoder.weight (5, 3) instead of (2, 3)" in message
    assert "here" in message
    assert find_differing_tensors(named_tensors(untouched), before) == []


def test_long_lists_are_shortened() -> None:
    tensors = {f"x{k}": torch.zeros(1) for k in range(30)}
    with pytest.raises(UserError, match="and 22 more"):
        load_tensors(SmallModel(), tensors, [], Path("here"))


def test_equal_means_every_bit() -> None:
    nan, zero = torch.tensor([float("nan"), 1.0]), torch.tensor([0.0])
    three = torch.tensor(3)
    assert find_differing_tensors({"a": nan, "b": three}, {"a": nan.clone(), "b": three}) == []
    assert find_differing_tensors({"a": zero}, {"a": -zero}) == ["a"]
    assert find_differing_tensors({"a": zero}, {"a": zero.bfloat16()}) == ["a"]
    assert find_differing_tensors({"a": zero}, {"a": zero[None]}) == ["a"]
    assert find_differing_tensors({"a": zero, "b": zero}, {"b": zero, "c": zero}) == ["a", "c"]
