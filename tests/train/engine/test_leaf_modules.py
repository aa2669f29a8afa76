"""Leaf modules: ZeRO-3 gathers a block as one, and what is learned does not change."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import torch
from launches import CHECKOUT, environment, finish
from torch import nn

from rectvlm.train.engine.leaf_modules import require_input_gradient

TWINS = Path(__file__).parent / "leaf_twins.py"


def test_a_block_that_trains_alone_gets_an_input_that_needs_a_gradient() -> None:
    block, x = nn.Linear(2, 2), torch.ones(1, 2)
    changed = require_input_gradient(block, ("first", x, None))
    assert changed is not None and changed[0] == "first" and changed[2] is None
    assert changed[1].requires_grad and torch.equal(changed[1], x) and not x.requires_grad
    assert require_input_gradient(block, (changed[1],)) is None
    with torch.no_grad():
        assert require_input_gradient(block, (x,)) is None
    assert require_input_gradient(block.requires_grad_(False), (x,)) is None


def test_blocks_gathered_as_one_learn_what_modules_one_by_one_learn(tmp_path: Path) -> None:
    """Two processes under ZeRO-3, with a block whose input needs no gradient, one that recomputes,
    and two micro-batches a step."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 50}
    ds_config = tmp_path / "ds.json"
    ds_config.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": zero}))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    processes = []
    for rank in ("0", "1"):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
        processes.append(
            subprocess.Popen(
                [sys.executable, str(TWINS), str(tmp_path), str(ds_config)],
                cwd=CHECKOUT,
                env=environment(tmp_path) | ranks | address,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for process in processes:
        code, stderr = finish(process)
        assert code == 0, stderr[-4000:]

    rows = json.loads((tmp_path / "changes.json").read_text())
    assert {name.split(".")[1] for name, *_ in rows} == {"0", "1", "2"}
    for name, change, difference in rows:
        assert (change > 0) == (not name.startswith("leaves.0.")), name
        assert difference <= 0.02 * change, name
