"""Leaf modules: ZeRO-3 gathers a layer as one."""

import torch
from torch import nn

from rectvlm.train.engine.leaf_modules import require_input_gradient


def test_a_block_that_trains_alone_gets_an_input_that_needs_a_gradient() -> None:
    block, x = nn.Linear(2, 2), torch.ones(1, 2)
    changed = require_input_gradient(block, ("first", x, None))
    assert changed is not None and changed[0] == "first" and changed[2] is None
    assert changed[1].requires_grad and torch.equal(changed[1], x) and not x.requires_grad
    assert require_input_gradient(block, (changed[1],)) is None
    with torch.no_grad():
        assert require_input_gradient(block, (x,)) is None
    assert require_input_gradient(block.requires_grad_(False), (x,)) is None
