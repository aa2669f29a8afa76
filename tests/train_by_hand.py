"""What each rank does in `test_phases.py`.

Each trains a toy under ZeRO beside the same arithmetic on whole tensors. Accelerate starts it as
`tests.train_by_hand OUT STAGE`; every rank raises where the two differ, and leaves OUT/rank-N.
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from rectvlm.config import Config, PhaseConfig, load_config
from rectvlm.train.budget import PhaseBudget, read_world_size
from rectvlm.train.ema import ema_decay_at
from rectvlm.train.engine.engine import Engine
from rectvlm.train.optimizer import (
    build_optimizer,
    freeze_all_but,
    set_learning_rates,
    set_requires_grad,
)
from rectvlm.train.uncertainty_weighting import UncertaintyWeighting

WIDTH, DECAY, STEPS, SAVED = 16, 0.6, 9, 3
GLOBAL_BATCH = 4
"""Samples of a step in the configuration, for the schedule; the toy has batches of its own."""
LAST, WHOLE = 2, 5
"""Steps from which the encoder's last block, and all of it, train."""
UNFREEZE = (
    f"[{{part: encoder, last_blocks: 1, start: {LAST / STEPS}}}, "
    f"{{part: encoder, last_blocks: null, start: {WHOLE / STEPS}}}]"
)


class Encoder(nn.Module):
    """Named as the real one's parts are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x).tanh()
        return self.norm(x)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.classifier = nn.Linear(WIDTH, 4)
        self.weighting = UncertaintyWeighting(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.encoder(x))


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Every 32-bit weight, whole, on every rank."""
    found = {}
    for name, parameter in model.named_parameters():
        asks = parameter.requires_grad
        found[name] = safe_get_full_fp32_param(parameter.requires_grad_(True)).clone()
        parameter.requires_grad_(asks)
    return found


class Run:
    """An engine around a toy."""

    def __init__(self, out: Path, stage: int) -> None:
        lr = "train.phases.phase1.lr={encoder: 1.0e-2, classifier: 1.0e-2}"
        self.config: Config = load_config(
            "tiny",
            [
                lr,
                f"train.phases.phase1.samples={STEPS * GLOBAL_BATCH}",
                f"train.phases.phase1.global_batch={GLOBAL_BATCH}",
                f"train.phases.phase1.micro_batch={GLOBAL_BATCH}",
                f"train.phases.phase1.warmup={2 / STEPS}",
                f"train.phases.phase1.ema_decay={DECAY}",
                f"train.phases.phase1.unfreeze={UNFREEZE}",
            ],
        )
        self.phase: PhaseConfig = self.config.train.phases["phase1"]
        settings: dict[str, Any] = json.loads(Path(f"ds_configs/phase{stage}.json").read_text())
        if stage == 3:  # biases stay whole on every rank, matrices are sharded
            settings["zero_optimization"]["stage3_param_persistence_threshold"] = WIDTH
        (out / f"stage{stage}.json").write_text(json.dumps(settings))
        world_size = read_world_size()
        self.budget = PhaseBudget.plan(self.phase, sample_count=6, world_size=world_size)
        clipping = self.config.train.gradient_clipping
        self.engine = Engine(out / f"stage{stage}.json", self.budget.step_batch, clipping, out)
        torch.manual_seed(0)
        model = Toy()
        freeze_all_but(model, self.phase.lr, self.phase.unfreeze, extra_modules=["weighting"])
        self.engine.prepare(
            model, build_optimizer(model, self.config.train, self.phase, self.budget)
        )
        self.model: nn.Module = self.engine.model.module

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.engine.optimizer.param_groups

    def step(self, number: int) -> dict[str, float]:
        """One step on a batch of this rank's own; the rates."""
        torch.manual_seed(100 * number + self.engine.rank)
        rates = set_learning_rates(self.groups, self.phase, self.budget, number * GLOBAL_BATCH)
        set_requires_grad(self.model, self.groups)
        found = self.engine.model(torch.randn(6, 8, dtype=torch.bfloat16)).float()
        weighted = torch.stack(
            [found[:, :2].square().mean(), 3 * (found[:, 2:] - 1).square().mean()]
        )
        self.engine.backward(self.model.weighting(weighted, torch.tensor([True, number > 0])))  # type: ignore[operator]
        self.engine.step()
        return rates

    def average(self, names: list[str]) -> dict[str, Tensor]:
        """What a checkpoint would hold, on rank 0."""
        with self.engine.use_ema_weights():
            return self.engine.gather_tensors(names)


def begins(name: str) -> int:
    """The step that a weight trains from."""
    if not name.startswith("encoder"):
        return 0
    return LAST if name.startswith(("encoder.blocks.2", "encoder.norm")) else WHOLE


def check_step(
    number: int, before: dict[str, Tensor], after: dict[str, Tensor], rates: dict[str, float]
) -> None:
    for name, now in after.items():
        moved = (now - before[name]).abs().max().item()
        if number < begins(name):
            assert moved == 0, (
                f"step {number} moved {name}, which waits for step {begins(name)}, by {moved}"
            )
            continue
        assert moved > 0, f"step {number} left {name} where it was"
        if number == begins(
            name
        ):  # the first update of an Adam is its rate, and decay 1% of 1% of that
            part = name.partition(".")[0]
            assert moved <= 1.02 * rates[part], (
                f"{name} began with {moved} at a rate of {rates[part]}"
            )
            assert moved > 0.5 * rates[part] or now.numel() < 4


def main(out: Path, stage: int) -> None:
    run = Run(out, stage)
    names = list(whole(run.model))
    bits = run.engine.gather_tensors(names)
    with run.engine.use_ema_weights():  # before the first step there is none
        assert all(
            torch.equal(tensor, bits[name])
            for name, tensor in run.engine.gather_tensors(names).items()
        )
    by_hand: dict[str, Tensor] = {}
    seen: list[dict[str, Tensor]] = []
    values = whole(run.model)
    for number in range(STEPS):
        before = values
        rates = run.step(number)
        values = whole(run.model)
        check_step(number, before, values, rates)
        for name, now in values.items():
            own = max(1, number - begins(name) + 1)  # steps since it began
            old = by_hand.get(name, now)
            by_hand[name] = (
                torch.lerp(old, now, 1 - ema_decay_at(own, DECAY))
                if name in by_hand
                else now.clone()
            )
        bits, average = run.engine.gather_tensors(names), run.average(names)
        for name, tensor in average.items():
            assert torch.equal(tensor, by_hand[name].to(tensor.dtype)), (
                f"step {number}: the average of {name} differs"
            )
            assert torch.equal(bits[name], values[name].to(tensor.dtype)), (
                f"{name} is not its rounded 32-bit weight"
            )
        after = run.engine.gather_tensors(names)
        assert all(torch.equal(after[name], bits[name]) for name in after), (
            "the weights did not come back"
        )
        assert all(torch.equal(tensor, values[name]) for name, tensor in whole(run.model).items())
        if number == SAVED:  # some of the encoder trains, some waits
            state = out / f"state{stage}"
            state.mkdir(exist_ok=True)
            run.engine.save_optimizer_shard(state)
            run.engine.barrier()
        seen.append(values)
    apart = [name for name in names if not torch.equal(by_hand[name], values[name])]
    assert set(apart) == set(names), "an average that is its weights shows nothing"
    final = run.average(names)
    with run.engine.use_ema_weights():
        full = whole(run.model)
    assert all(torch.equal(full[name], by_hand[name]) for name in names), (
        "the 32-bit averages differ"
    )

    run.engine.load_optimizer_shards(out / f"state{stage}", run.engine.world_size, keeps_ema=True)
    for number in range(SAVED + 1, STEPS):
        run.step(number)
        for name, tensor in whole(run.model).items():
            assert torch.equal(tensor, seen[number][name]), (
                f"resumed, step {number} gave another {name}"
            )
    resumed = run.average(names)
    assert all(torch.equal(resumed[name], final[name]) for name in resumed), (
        "resumed, the average differs"
    )
    # Rank 0 has seen 1 case with a loss of 1, rank 1 three whose losses sum to 9; of another task
    # nobody has seen one.
    sums, counts = (
        torch.tensor([share[run.engine.rank], 0.0]) for share in ((1.0, 9.0), (1.0, 3.0))
    )
    mean, expected = (
        run.engine.all_reduce_mean(sums, counts).tolist(),
        (1.0, 2.5)[run.engine.world_size - 1],
    )
    assert mean[0] == expected and math.isnan(mean[1]), (
        f"cases count alike: {expected} and nan, not {mean}"
    )
    (out / f"rank-{run.engine.rank}").write_text(str(run.engine.model.zero_optimization_stage()))
    run.engine.barrier()
    run.engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)  # threads of gloo may still run, which ends an orderly exit with SIGABRT
