"""Leaf modules: ZeRO-3 gathers a block as one, and what is learned does not change."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launches import TWO, metrics, run, settings
from torch import Tensor, nn

from rectvlm.checkpoint import Checkpoint, run_folder
from rectvlm.train.engine.leaf_modules import require_input_gradient

LATE = "train.phases.phase2.unfreeze=[{part: encoder, last_blocks: 1, start: 0.5}]"


def test_a_block_that_trains_alone_gets_an_input_that_needs_a_gradient() -> None:
    block, x = nn.Linear(2, 2), torch.ones(1, 2)
    changed = require_input_gradient(block, ("first", x, None))
    assert changed is not None and changed[0] == "first" and changed[2] is None
    assert changed[1].requires_grad and torch.equal(changed[1], x) and not x.requires_grad
    assert require_input_gradient(block, (changed[1],)) is None
    with torch.no_grad():
        assert require_input_gradient(block, (x,)) is None
    assert require_input_gradient(block.requires_grad_(False), (x,)) is None


def read_tensors(phase_folder: Path) -> dict[str, Tensor]:
    checkpoint = Checkpoint.open(run_folder.find_checkpoint(phase_folder, ""))
    return checkpoint.read_tensors(["encoder", "localizer"])


@pytest.mark.slow
def test_blocks_gathered_as_one_learn_what_whole_weights_learn(
    tiny_run: Callable[[int], Path], phantom_shards: Path, tmp_path: Path
) -> None:
    """Two processes, ZeRO-2 beside ZeRO-3 with leaves. The encoder's last block starts late and
    trains alone, the localizer recomputes its activations."""
    source = tiny_run(1)
    zero = {"stage": 3, "stage3_param_persistence_threshold": 100, "overlap_comm": False}
    sharded = tmp_path / "phase2.json"
    sharded.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": zero}))
    folders = []
    for name, ds_config in (("whole", Path("ds_configs/phase2.json")), ("leaves", sharded)):
        command = [*TWO, "launch/phase2.py", "--from", str(source), "--ds-config", str(ds_config)]
        command += settings(2, phantom_shards, tmp_path / name, steps=4)
        run([*command, LATE, "localizer.activation_checkpointing=true"], tmp_path)
        folders.append(tmp_path / name / "tiny" / "phase2")

    whole, leaves = (metrics(folder) for folder in folders)
    for key, tolerance in (("loss", 5e-3), ("gradient_norm", 5e-2)):
        expected = [row[key] for row in whole if key in row]
        assert len(expected) == 4
        assert [row[key] for row in leaves if key in row] == pytest.approx(expected, rel=tolerance)

    start = Checkpoint.open(run_folder.find_checkpoint(source, "")).read_tensors(["encoder"])
    after_whole, after_leaves = map(read_tensors, folders)
    last_block = max(name.split(".")[2] for name in start if name.startswith("encoder.blocks."))
    learned = [name for name in start if name.startswith(f"encoder.blocks.{last_block}.mlp")]
    assert learned
    for name in learned:
        steps = [after[name].float() - start[name].float() for after in (after_whole, after_leaves)]
        assert steps[0].norm() > 0 and (steps[1] - steps[0]).norm() < 0.3 * steps[0].norm()
