"""DeepSpeed's ZeRO optimizer from inside: its 32-bit groups, rounding to model weights, skipping.

This module alone knows the attributes of all three ZeRO stages, as they are in deepspeed 0.19.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from rectvlm.train import ema
from rectvlm.train.engine import optimizer_shards
from rectvlm.train.engine.optimizer_shards import FlatGroup, ParameterFragment


class ZeroOptimizer:
    """The ZeRO optimizer of a prepared model on one rank."""

    def __init__(self, optimizer: Any, module: nn.Module) -> None:
        self.optimizer = optimizer
        self.names = {parameter: name for name, parameter in module.named_parameters()}
        self.gradient_norm: float | None = None
        """Norm of the last step's gradient before clipping; None where it is not finite."""
        self.skip_next_step = False
        """Whether the next step is skipped in any case; all ranks must agree."""
        self.max_norm = math.inf
        """Gradient norm above which the next step is skipped; all ranks must agree."""
        self._hook_gradient_norm()

    @property
    def has_sharded_parameters(self) -> bool:
        """Whether the stage is ZeRO-3."""
        return hasattr(self.optimizer, "fp32_partitioned_groups_flat")

    @property
    def has_skipped_step(self) -> bool:
        """Whether the last step was skipped."""
        return bool(self.optimizer.overflow)

    @property
    def optimizer_states(self) -> dict[Tensor, dict[str, Any]]:
        """State of the inner optimizer, by master weights."""
        states: dict[Tensor, dict[str, Any]] = self.optimizer.optimizer.state
        return states

    def list_master_weights(self) -> list[Tensor]:
        """This rank's partitions of the 32-bit weights, which its optimizer steps."""
        if self.has_sharded_parameters:
            return list(self.optimizer.fp32_partitioned_groups_flat)
        return list(self.optimizer.single_partition_of_fp32_groups)

    def list_flat_groups(self, rank: int) -> list[FlatGroup]:
        """This rank's partitions, with the places of the parameters in them."""
        if self.has_sharded_parameters:
            parameter_groups = self.optimizer.fp16_groups
            fragments = [self._list_parameter_shards(group, rank) for group in parameter_groups]
        else:
            parameter_groups = self.optimizer.bit16_groups
            fragments = [self._list_group_fragments(group) for group in parameter_groups]
        return [
            FlatGroup(*pair) for pair in zip(self.list_master_weights(), fragments, strict=True)
        ]

    def _list_parameter_shards(self, group: list[Any], rank: int) -> list[ParameterFragment]:
        """Fragments of ZeRO-3, where each rank holds a part of every parameter."""
        sizes = [(self.names[p], p.ds_numel, p.partition_numel()) for p in group]
        return optimizer_shards.split_evenly(sizes, rank)

    def _list_group_fragments(self, group: list[Any]) -> list[ParameterFragment]:
        """Fragments of ZeRO-1 and 2, which cut the sequence of all parameters into parts."""
        fragments = []
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping:
                in_parameter, in_group = mapping.lp_fragment_address, mapping.hp_fragment_address
                fragments.append(
                    ParameterFragment(
                        self.names[parameter],
                        parameter.numel(),
                        in_parameter.start,
                        in_group.start,
                        in_group.numel,
                    )
                )
        return fragments

    def round_master_weights(self) -> None:
        """Set the model's weights to the rounded master weights, as after a step.

        Every rank must call it.
        """
        zero = self.optimizer
        if not self.has_sharded_parameters:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for number in range(len(self.list_master_weights())):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        self._gather_persistent_parameters()

    def finish_skipped_step(self) -> None:
        """Leave the weights as an applied step leaves them; every rank must call it.

        ZeRO-3 releases all weights before it looks at the norm, and gathers those that should stay
        only after it has stepped.
        """
        if self.has_sharded_parameters:
            self._gather_persistent_parameters()

    def _gather_persistent_parameters(self) -> None:
        persistent = self.optimizer.persistent_parameters
        if persistent:
            persistent[0].all_gather(persistent)

    def swap_ema_weights(self) -> None:
        """Swap the weights and their moving averages, where there are some.

        Every rank must call it.
        """
        has_swapped = False
        for weights in self.list_master_weights():
            state = self.optimizer_states.get(weights)
            if state is not None:
                has_swapped |= ema.swap_ema_tensor(weights, state)
        if has_swapped:
            self.round_master_weights()

    def load_shards(
        self, reader: optimizer_shards.OptimizerShardReader, rank: int, keeps_ema: bool
    ) -> None:
        """Load weights and optimizer state from files; every rank must call it.

        Args:
            reader: the opened files.
            rank: number of this process.
            keeps_ema: whether the run keeps a moving average; if not, a saved one is not loaded.

        Raises:
            UserError: the files are of another model.
        """
        inner_optimizer = self.optimizer.optimizer
        for group in self.list_flat_groups(rank):
            tensors, step = reader.fill_group(group)
            if not keeps_ema:
                tensors.pop(ema.EMA_KEY, None)
            if step is not None:
                # A fused torch optimizer keeps its step count on the device, others on the CPU.
                is_fused = inner_optimizer.defaults.get("fused")
                device = group.flat_weights.device if is_fused else "cpu"
                step_tensor = torch.tensor(step, dtype=torch.float32, device=device)
                inner_optimizer.state[group.flat_weights] = {
                    **tensors,
                    optimizer_shards.STEP_KEY: step_tensor,
                }
        self.round_master_weights()

    def count_bytes(self) -> dict[str, int]:
        """Bytes that the optimizer holds on this rank between steps, by kind."""
        tensors = self.list_master_weights()
        for state in self.optimizer_states.values():
            # Step counters are scalars and do not count.
            tensors += [
                value for value in state.values() if isinstance(value, Tensor) and value.ndim
            ]
        bytes_by_kind = {"optimizer": sum(tensor.nbytes for tensor in tensors)}
        if self.has_sharded_parameters:
            bytes_by_kind["gradients"] = self.optimizer.grad_partitions_flat_buffer.nbytes
        return bytes_by_kind

    def _hook_gradient_norm(self) -> None:
        """Show DeepSpeed an infinite norm where a step should be skipped, so that it skips it.

        DeepSpeed then drops the gradients and keeps its buffers and hooks in order, as at an
        overflow in fp16. This is the only way that each stage of ZeRO has, and all ranks take it,
        since all see the same norm.
        """
        method_name = "_get_norm_groups" if self.has_sharded_parameters else "scaled_global_norm"
        compute_norm = getattr(self.optimizer, method_name)

        def compute_norm_or_infinity() -> Any:
            group_norms = compute_norm()
            is_list = isinstance(group_norms, list)
            norms = group_norms
            if is_list:
                norms = torch.stack([torch.as_tensor(n, dtype=torch.float32) for n in group_norms])
            # DeepSpeed gives -1 for a group's norm that is not finite.
            is_finite = bool((norms >= 0).all())
            norm = float(torch.linalg.vector_norm(norms)) if is_finite else math.inf
            self.gradient_norm = norm if math.isfinite(norm) else None
            if self.skip_next_step or self.gradient_norm is None or norm > self.max_norm:
                infinite = torch.full_like(norms, math.inf)
                return list(infinite) if is_list else infinite
            return group_norms

        setattr(self.optimizer, method_name, compute_norm_or_infinity)
        if not self.has_sharded_parameters:
            # DeepSpeed would first search every gradient for an overflow; the norm shows the same.
            self.optimizer.check_grad_overflow = True
            self.optimizer.check_overflow = lambda **_: None
