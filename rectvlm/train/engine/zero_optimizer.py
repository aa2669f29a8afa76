"""DeepSpeed's ZeRO optimizer from inside: its 32-bit groups, how they become the model's weights, how it skips a step.

All three stages are met here, so that nothing else need know their attributes. Of deepspeed 0.19.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from rectvlm.train import ema
from rectvlm.train.engine import optimizer_shards
from rectvlm.train.engine.optimizer_shards import FlatGroup, ParameterFragment


class ZeroOptimizer:
    """The optimizer of a prepared model on one rank."""

    def __init__(self, optimizer: Any, module: nn.Module) -> None:
        self.optimizer = optimizer
        self.names = {parameter: name for name, parameter in module.named_parameters()}
        self.gradient_norm: float | None = None
        """Of the gradient of the last step, before clipping; None where it is not finite."""
        self.skip_next_step, self.max_norm = False, math.inf
        """Whether the next step is to be skipped, in any case or for its norm; all ranks must agree."""
        self._hook_gradient_norm()

    @property
    def has_sharded_parameters(self) -> bool:
        """Whether this is ZeRO-3."""
        return hasattr(self.optimizer, "fp32_partitioned_groups_flat")

    @property
    def has_skipped_step(self) -> bool:
        """Whether the last step was skipped."""
        return bool(self.optimizer.overflow)

    @property
    def optimizer_states(self) -> dict[Tensor, dict[str, Any]]:
        """What the inner optimizer keeps for each of `masters`."""
        states: dict[Tensor, dict[str, Any]] = self.optimizer.optimizer.state
        return states

    def list_master_weights(self) -> list[Tensor]:
        """This rank's partitions of the 32-bit weights, as its optimizer steps them."""
        zero = self.optimizer
        return list(
            zero.fp32_partitioned_groups_flat
            if self.has_sharded_parameters
            else zero.single_partition_of_fp32_groups
        )

    def list_flat_groups(self, rank: int) -> list[FlatGroup]:
        """This rank's partitions, with what lies where."""
        members = (
            self.optimizer.fp16_groups
            if self.has_sharded_parameters
            else self.optimizer.bit16_groups
        )
        return [
            FlatGroup(
                flat,
                self._list_parameter_shards(group, rank)
                if self.has_sharded_parameters
                else self._list_group_fragments(group),
            )
            for flat, group in zip(self.list_master_weights(), members, strict=True)
        ]

    def _list_parameter_shards(self, group: list[Any], rank: int) -> list[ParameterFragment]:
        """ZeRO-3: a part of every parameter."""
        return optimizer_shards.split_evenly(
            [(self.names[p], p.ds_numel, p.partition_numel()) for p in group], rank
        )

    def _list_group_fragments(self, group: list[Any]) -> list[ParameterFragment]:
        """ZeRO-1 and 2: what of a row of parameters lies on this rank."""
        held = [
            (p, p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address)
            for p in group
            if p._hp_mapping
        ]
        return [
            ParameterFragment(self.names[p], p.numel(), own.start, flat.start, flat.numel)
            for p, own, flat in held
        ]

    def round_master_weights(self) -> None:
        """The model's weights become the 32-bit ones, rounded, as after a step; every rank must call it."""
        zero = self.optimizer
        if not self.has_sharded_parameters:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for number in range(len(self.list_master_weights())):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        self._gather_persistent_parameters()

    def finish_skipped_step(self) -> None:
        """Leave the weights as a step that was applied leaves them; every rank must call it.

        ZeRO-3 releases all of them before it looks at the norm, and gathers those that should stay only after it has
        stepped.
        """
        if self.has_sharded_parameters:
            self._gather_persistent_parameters()

    def _gather_persistent_parameters(self) -> None:
        small = self.optimizer.persistent_parameters
        if small:
            small[0].all_gather(small)

    def swap_ema_weights(self) -> None:
        """Exchange the weights and their moving averages, where there are some; every rank must call it."""
        states = self.optimizer_states
        if sum(
            ema.swap_ema_tensor(weights, states[weights])
            for weights in self.list_master_weights()
            if weights in states
        ):
            self.round_master_weights()

    def load_shards(
        self, reader: optimizer_shards.OptimizerShardReader, rank: int, keeps_ema: bool
    ) -> None:
        """Take weights and optimizer state from files; every rank must call it.

        Args:
            saved: the files.
            rank: of this process.
            averaged: whether the run keeps a moving average; one that it no longer keeps is left in the files.

        Raises:
            UserError: they are of another model.
        """
        inner = self.optimizer.optimizer
        for group in self.list_flat_groups(rank):
            state = reader.fill_group(group)
            step = state.pop(optimizer_shards.STEP_KEY)
            if not keeps_ema:
                state.pop(ema.EMA_KEY, None)
            if step is not None:
                # Where torch's optimizers keep their count.
                device = group.flat_weights.device if inner.defaults.get("fused") else "cpu"
                inner.state[group.flat_weights] = {
                    **state,
                    optimizer_shards.STEP_KEY: torch.tensor(
                        step, dtype=torch.float32, device=device
                    ),
                }
        self.round_master_weights()

    def count_bytes(self) -> dict[str, int]:
        """What the optimizer holds on this rank between steps."""
        # Step counters are scalars.
        inner = [
            t
            for state in self.optimizer_states.values()
            for t in state.values()
            if isinstance(t, Tensor) and t.ndim
        ]
        found = {
            "optimizer": sum(
                t.numel() * t.element_size() for t in [*self.list_master_weights(), *inner]
            )
        }
        if self.has_sharded_parameters:
            buffer = self.optimizer.grad_partitions_flat_buffer
            found["gradients"] = buffer.numel() * buffer.element_size()
        return found

    def _hook_gradient_norm(self) -> None:
        """Let DeepSpeed see a norm that is not finite where a step is to be skipped, so that it skips it its own way.

        That way drops the gradients, keeps its buffers and hooks in order, and is taken by all ranks, since all see the
        same norm. It is the way of an overflow in fp16, and the only one that each stage of ZeRO has.
        """
        name = "_get_norm_groups" if self.has_sharded_parameters else "scaled_global_norm"
        measure = getattr(self.optimizer, name)

        def measured() -> Any:
            found = measure()
            several = isinstance(found, list)
            parts = (
                torch.stack([torch.as_tensor(part, dtype=torch.float32) for part in found])
                if several
                else found
            )
            # A group's norm that is not finite is -1 in DeepSpeed.
            norm = float(torch.linalg.vector_norm(parts)) if bool((parts >= 0).all()) else math.inf
            self.gradient_norm = norm if math.isfinite(norm) else None
            if self.skip_next_step or self.gradient_norm is None or norm > self.max_norm:
                bad = torch.full_like(parts, math.inf)
                return list(bad) if several else bad
            return found

        setattr(self.optimizer, name, measured)
        if not self.has_sharded_parameters:
            # DeepSpeed would look for what is not finite in every gradient first; the norm shows the same.
            self.optimizer.check_grad_overflow = True
            self.optimizer.check_overflow = lambda **_: None
