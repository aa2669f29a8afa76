"""The engine: the only module that knows Accelerate and DeepSpeed.

It turns a DeepSpeed JSON into a running engine, with whatever number of processes the launcher started, and checks that
what runs is what was asked for: Accelerate can fall back to one process, or drop DeepSpeed, without a word.
"""

import logging
import math
import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate.accelerator import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs
from bitsandbytes.nn import Linear4bit
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rectvlm.config import PhaseConfig
from rectvlm.train.engine import optimizer_shards
from rectvlm.train.engine.build_lock import load_extension_exclusively
from rectvlm.train.engine.ds_config import choose_persistence_threshold, read_ds_config
from rectvlm.train.engine.peak_memory import peak_memory_bytes
from rectvlm.train.engine.zero_optimizer import ZeroOptimizer
from rectvlm.types import UserError

log = logging.getLogger(__name__)


def _set_single_process_environment() -> None:
    """A plain `accelerate launch` on a CPU machine starts one process and sets no rendezvous; DeepSpeed needs one."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        os.environ.update(alone)
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _list_quantization_tensors(state: Any) -> list[Tensor]:
    """Tensors of a weight's quantization state, with those of its second level."""
    own = [value for value in (state.absmax, state.code, state.offset) if isinstance(value, Tensor)]
    return own + (_list_quantization_tensors(state.state2) if state.state2 is not None else [])


def _load_shared_memory_extension() -> None:
    """What DeepSpeed compiles on a CPU when it starts; afterwards it finds it in memory."""
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None and deepspeed.ops.__compatible_ops__.get(builder.NAME, False):
        load_extension_exclusively(builder.name, builder.load)


@dataclass(frozen=True)
class OptimizerStepResult:
    """What became of an optimizer step."""

    gradient_norm: float | None
    """Of the gradient, before clipping; None where it is not finite."""
    is_applied: bool
    """Whether the weights changed."""


def is_lost_peer_error(error: RuntimeError) -> bool:
    """Whether an error of a collective says that other ranks have gone away, or did not answer in time."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


class Engine:
    """Processes, sharding, backward, optimizer step, and the state of all that."""

    def __init__(
        self,
        ds_config: Path,
        phase: PhaseConfig,
        max_gradient_norm: float,
        run_folder: Path,
        trackers: Sequence[str] = (),
        timeout_seconds: float = 1800.0,
    ) -> None:
        """Start.

        Args:
            ds_config: DeepSpeed JSON; `auto` is filled from the configuration.
            phase: batch sizes.
            clip: largest gradient norm.
            run_folder: where trackers write.
            trackers: of Accelerate, by name.
            timeout: seconds that a rank waits for the others.

        Raises:
            UserError: no such JSON, or Accelerate was told to run without DeepSpeed.
        """
        settings = read_ds_config(ds_config, phase, max_gradient_norm)
        _set_single_process_environment()
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        # A launcher's own DeepSpeed settings would win over the JSON of the phase.
        for name in [
            name
            for name in os.environ
            if name.startswith(("ACCELERATE_DEEPSPEED_", "ACCELERATE_CONFIG_DS_"))
        ]:
            del os.environ[name]
        _load_shared_memory_extension()
        self.accelerator = Accelerator(
            mixed_precision="bf16",
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings),
            kwargs_handlers=[
                InitProcessGroupKwargs(backend=backend, timeout=timedelta(seconds=timeout_seconds))
            ],
            log_with=list(trackers) or None,
            project_dir=str(run_folder),
        )
        # `settle` shards; what Transformers loads, such as the text encoder of the prompts, stays whole.
        unset_hf_deepspeed_config()
        self._check_launch(ds_config)
        self._settled: Any = None
        self.zero_optimizer: ZeroOptimizer
        self.model: Any = None
        self.optimizer: Any = None

    def _check_launch(self, ds_config: Path) -> None:
        kind = self.accelerator.distributed_type
        if kind != DistributedType.DEEPSPEED:
            raise UserError(
                f"Accelerate started as {kind.value}, not with DeepSpeed as {ds_config} asks; unset ACCELERATE_USE_CPU "
                "and drop `--cpu` from `accelerate launch`."
            )
        wanted = int(os.environ["WORLD_SIZE"])
        found = (self.accelerator.num_processes, dist.get_world_size())
        assert found == (wanted, wanted), (
            f"{wanted} processes started, Accelerate and torch see {found}"
        )

    @property
    def rank(self) -> int:
        """Number of this process."""
        return dist.get_rank()

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return dist.get_world_size()

    @property
    def is_main(self) -> bool:
        """Whether this process writes what exists once."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where batches go."""
        return self.accelerator.device

    def shard_module(self, module: nn.Module) -> None:
        """Under ZeRO-3, keep this rank's share of a module's own parameters alone; else nothing happens.

        A model that is loaded module by module is never whole on any rank. Every rank must call it in the same order.
        """
        fresh = [p for p in module.parameters(recurse=False) if not hasattr(p, "ds_id")]
        if not fresh or self._zero_settings["stage"] != 3:
            return
        if self._settled is None:
            settings = {
                "zero_optimization": {"stage": 3},
                "bf16": {"enabled": True},
                "train_batch_size": self.world_size,
            }
            deepspeed.zero.Init(nn.ParameterList(fresh), config_dict_or_path=settings)
            self._settled = fresh[0]
        else:
            self._settled.convert_to_zero_parameters(param_list=fresh)

    @property
    def _zero_settings(self) -> dict[str, Any]:
        return self.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]

    def _cast_and_move(self, model: nn.Module) -> None:
        """What DeepSpeed leaves out when a part of the model is sharded already: dtype, device, one value for all."""
        for parameter in model.parameters():
            if not hasattr(parameter, "ds_id"):  # DeepSpeed broadcasts it when it shards it
                dtype = torch.bfloat16 if parameter.is_floating_point() else parameter.dtype
                parameter.data = parameter.data.to(self.device, dtype)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer = buffer.to(self.device).contiguous()
                    dist.broadcast(buffer, 0)

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Shard the model and the optimizer state."""
        packed = {
            name: getattr(p, "ds_numel", p.numel())
            for name, p in model.named_parameters()
            if type(p).__name__ == "Params4bit"
        }
        self._packed = list(packed)
        for module in model.modules():
            if isinstance(module, Linear4bit):
                # In eval mode it would repack its weights, and the state that it shares with shards of them.
                module.support_avx512bf16_for_cpu = False
        zero = self._zero_settings
        if zero.get("stage3_param_persistence_threshold") == "auto":
            zero["stage3_param_persistence_threshold"] = choose_persistence_threshold(
                packed.values()
            )
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            self._cast_and_move(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.zero_optimizer = ZeroOptimizer(self.optimizer.optimizer, self.model.module)
        self.model.train()

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-batch."""
        self.model.backward(loss)

    def step(self, skip: bool = False, max_norm: float = math.inf) -> OptimizerStepResult | None:
        """End a micro-batch; at the last of a step the weights change, unless it is skipped.

        Args:
            refuse: skip the step; all ranks must agree.
            largest_norm: skip it too when the gradient's norm is above this or not finite.

        Returns:
            What became of the step, at the last micro-batch of one.
        """
        boundary = self.model.is_gradient_accumulation_boundary()
        (
            self.zero_optimizer.gradient_norm,
            self.zero_optimizer.skip_next_step,
            self.zero_optimizer.max_norm,
        ) = None, skip, max_norm
        self.model.step()
        if not boundary:
            return None
        if self.zero_optimizer.has_skipped_step:
            self.zero_optimizer.finish_skipped_step()
        return OptimizerStepResult(
            self.zero_optimizer.gradient_norm, not self.zero_optimizer.has_skipped_step
        )

    def all_reduce_mean(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Mean over what all ranks know; sums and counts (n,) float of each, NaN where no rank knows anything."""
        both = torch.stack([sums, counts]).float().to(self.device)
        dist.all_reduce(both)
        return both[0] / both[1].where(both[1] > 0, torch.nan)

    def all_reduce_sum(self, value: float) -> int:
        """The sum of all ranks' values."""
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return int(tensor)

    def all_reduce_max(self, *values: float) -> list[float]:
        """The largest of all ranks' values, for each."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks, on all of them."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def describe_ranks(self) -> dict[str, Any]:
        """What runs, measured on every rank; after a step, when what stays resident is resident."""
        mine = {
            "rank": self.rank,
            "device": str(self.device),
            "packed_bytes": self._count_packed_bytes(local=True),
            "packed_bytes_of_model": self._count_packed_bytes(local=False),
            "bytes": self._count_bytes_by_kind(),
            "peak_memory_bytes": peak_memory_bytes(),
        }
        return {
            "distributed_type": self.accelerator.distributed_type.value,
            "zero_stage": self.model.zero_optimization_stage(),
            "world_size": self.world_size,
            "ranks": self.all_gather_object(mine),
        }

    def _count_bytes_by_kind(self) -> dict[str, int]:
        """What this rank holds between steps, by kind, as `rectvlm.plan` predicts it."""
        found = dict.fromkeys(
            ("weights_4bit", "weights_frozen", "weights_trainable", "weights_resident"), 0
        )
        packed = set(self._packed)
        for name, p in self.model.module.named_parameters():
            kind = (
                "weights_4bit"
                if name in packed
                else "weights_trainable"
                if p.requires_grad
                else "weights_frozen"
            )
            if not hasattr(p, "ds_tensor"):
                found[kind] += p.numel() * p.element_size()
                continue
            found[kind] += p.ds_tensor.numel() * p.ds_tensor.element_size()
            if p.ds_status == ZeroParamStatus.AVAILABLE:
                found["weights_resident"] += p.ds_numel * p.ds_tensor.element_size()
        layers: list[Any] = [m for m in self.model.module.modules() if isinstance(m, Linear4bit)]
        tensors = [
            t for layer in layers for t in _list_quantization_tensors(layer.weight.quant_state)
        ]
        found["quantization_state"] = sum(t.numel() * t.element_size() for t in tensors)
        return found | self.zero_optimizer.count_bytes()

    def _count_packed_bytes(self, local: bool) -> int:
        """Bytes of packed 4-bit weights: of this rank's shard, or of the whole model."""
        total = 0
        parameters = dict(self.model.module.named_parameters())
        for name in self._packed:
            parameter = parameters[name]
            if hasattr(parameter, "ds_tensor"):
                numel = parameter.ds_tensor.numel() if local else parameter.ds_numel
                # A gathered parameter lies whole on this rank, whatever its shard.
                if local and parameter.ds_status == ZeroParamStatus.AVAILABLE:
                    numel = parameter.ds_numel
                total += numel * parameter.ds_tensor.element_size()
            else:
                total += parameter.numel() * parameter.element_size()
        return total

    @contextmanager
    def use_ema_weights(self) -> Iterator[None]:
        """Inside, the weights are their moving averages, where the optimizer keeps some; every rank must enter it.

        The averages are exchanged with the 32-bit weights and rounded to the model's dtype as a step does it. Outside,
        every bit is as before: the model's weights are the rounded 32-bit ones at any time.
        """
        self.zero_optimizer.swap_ema_weights()
        yield
        self.zero_optimizer.swap_ema_weights()

    def gather_tensors(self, names: list[str]) -> dict[str, Tensor]:
        """Whole tensors by name, on the CPU of rank 0; every rank must call it."""
        module = self.model.module
        own: dict[str, Any] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        found = {}
        for name in names:  # one at a time: no rank ever holds more than one whole tensor
            tensor = own[name]
            sharded = [tensor] if hasattr(tensor, "ds_tensor") else []
            with deepspeed.zero.GatheredParameters(sharded, enabled=bool(sharded)):
                if self.is_main:
                    found[name] = tensor.detach().to("cpu", copy=True)
        return found

    def save_optimizer_shard(self, folder: Path) -> Path:
        """Write this rank's share of the 32-bit weights and the optimizer's state; the file.

        Raises:
            OSError, SafetensorError: it could not be written.
        """
        path = folder / optimizer_shards.shard_file_name(self.rank, self.world_size)
        optimizer_shards.write_optimizer_shard(
            path,
            self.zero_optimizer.list_flat_groups(self.rank),
            self.zero_optimizer.optimizer_states,
        )
        return path

    def load_optimizer_shards(self, folder: Path, saved_world_size: int, keeps_ema: bool) -> None:
        """Go on from what `world` ranks saved; every rank must call it.

        Args:
            folder: of the files.
            world: ranks that wrote them.
            averaged: whether the run keeps a moving average of the weights.

        Raises:
            UserError: a file is missing, damaged, or of another model.
        """
        with optimizer_shards.OptimizerShardReader(folder, saved_world_size) as saved:
            self.zero_optimizer.load_shards(saved, self.rank, keeps_ema)

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def close(self) -> None:
        """End trackers and leave the group of processes."""
        self.accelerator.end_training()
        if dist.is_initialized():
            dist.destroy_process_group()
