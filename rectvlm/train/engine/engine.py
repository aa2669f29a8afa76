"""The engine: the only module that knows Accelerate and DeepSpeed.

It turns a DeepSpeed JSON into a running engine, with any number of processes that the launcher
started, and checks that what runs is what was asked for: Accelerate can fall back to one process,
or drop DeepSpeed, without a word.
"""

import logging
import math
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate.accelerator import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs
from bitsandbytes.nn import Linear4bit
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import set_z3_leaf_module
from torch import Tensor, nn
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rectvlm.train.budget import StepBatch
from rectvlm.train.engine.ds_config import read_ds_config
from rectvlm.train.engine.engine_memory import (
    EngineDescription,
    RankDescription,
    count_bytes_by_kind,
    count_packed_bytes,
)
from rectvlm.train.engine.launcher_settings import (
    check_process_count,
    lacks_processes,
    take_launcher_settings,
)
from rectvlm.train.engine.leaf_modules import find_leaf_modules, require_input_gradient
from rectvlm.train.engine.optimizer_shards import (
    OptimizerShardReader,
    shard_file_name,
    write_optimizer_shard,
)
from rectvlm.train.engine.peak_memory import peak_memory_bytes
from rectvlm.train.engine.zero_optimizer import ZeroOptimizer
from rectvlm.types import UserError

log = logging.getLogger(__name__)

MIN_DEEPSPEED_VERSION = (0, 19, 2)
"""First version of DeepSpeed that leaves buffers in float32. Those before cast them to bf16, and
the language model's rotary angles are off by up to 1.8 rad at distance 1,000."""


def check_deepspeed_version(version: tuple[int, int, int]) -> None:
    """Refuse a DeepSpeed that rounds the language model's rotary frequencies.

    Args:
        version: major, minor and patch number.

    Raises:
        UserError: it is older than `MIN_DEEPSPEED_VERSION`.
    """
    if version < MIN_DEEPSPEED_VERSION:
        least, found = (".".join(map(str, v)) for v in (MIN_DEEPSPEED_VERSION, version))
        raise UserError(
            f"Training needs deepspeed {least} or later, found {found}, which rounds the language "
            f"model's rotary frequencies to bf16: pip install 'deepspeed>={least}'."
        )


def _set_single_process_environment() -> None:
    """Give a single process the rendezvous that DeepSpeed needs.

    A plain `accelerate launch` on a CPU machine starts one process and sets none.
    """
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ |= {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _leave_out_inference_kernel() -> None:
    """Keep DeepSpeed from compiling a kernel when it starts on a CPU.

    The kernel sums tensors of tensor-parallel inference through shared memory. Nothing in training
    calls it, and it would need a C++ compiler and half a minute.
    """
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is not None:
        # DeepSpeed fills this table when it is first asked for, unless it is there.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})[builder.NAME] = False


@dataclass(frozen=True)
class OptimizerStepResult:
    """What became of an optimizer step."""

    gradient_norm: float | None
    """Norm of the gradient before clipping; None where it is not finite."""
    is_applied: bool
    """Whether the weights changed."""


def is_lost_peer_error(error: RuntimeError) -> bool:
    """Whether an error of a collective means that other ranks went away or did not answer."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def start_tracker(name: str, project: str, /, **settings: Any) -> GeneralTracker:
    """Start one of Accelerate's trackers."""
    tracker: GeneralTracker = LOGGER_TYPE_TO_CLASS[name](project, **settings)
    tracker.start()
    return tracker


class Engine:
    """Processes, sharding, backward pass, optimizer step, and the state of all that."""

    def __init__(
        self,
        ds_config: Path,
        step_batch: StepBatch,
        max_gradient_norm: float,
        run_folder: Path,
        timeout_seconds: float = 1800.0,
    ) -> None:
        """Start the engine.

        Args:
            ds_config: DeepSpeed JSON; `auto` is filled in from the configuration.
            step_batch: the samples of a step, and how the ranks take them.
            max_gradient_norm: norm to which gradients are clipped.
            run_folder: Accelerate's project folder.
            timeout_seconds: how long a rank waits for the others.

        Raises:
            UserError: the JSON is missing, the launcher started processes that cannot join, or
                DeepSpeed is too old.
        """
        check_deepspeed_version(
            (deepspeed.__version_major__, deepspeed.__version_minor__, deepspeed.__version_patch__)
        )
        settings = read_ds_config(ds_config, step_batch, max_gradient_norm)
        check_process_count(torch.cuda.device_count())
        is_alone_by_mistake = lacks_processes()
        _set_single_process_environment()
        self.launcher_settings = take_launcher_settings()
        _leave_out_inference_kernel()
        process_group = InitProcessGroupKwargs(
            backend="nccl" if torch.cuda.is_available() else "gloo",
            timeout=timedelta(seconds=timeout_seconds),
        )
        self.accelerator = Accelerator(
            mixed_precision="bf16",
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=settings),
            kwargs_handlers=[process_group],
            project_dir=str(run_folder),
        )
        # `shard_module` alone shards; what Transformers loads, such as the prompts' text encoder,
        # stays entire.
        unset_hf_deepspeed_config()
        self._check_launch(ds_config)
        if self.is_main:
            self._log_ignored_settings(ds_config, is_alone_by_mistake)
        self._first_sharded: Any = None
        self._packed_numels: dict[str, int] = {}
        self.zero_optimizer: ZeroOptimizer
        self.model: Any = None
        self.optimizer: Any = None

    def _check_launch(self, ds_config: Path) -> None:
        kind = self.accelerator.distributed_type
        assert kind == DistributedType.DEEPSPEED, f"{ds_config} was started as {kind.value}"
        started = int(os.environ["WORLD_SIZE"])
        joined = (self.accelerator.num_processes, dist.get_world_size())
        assert joined == (started, started), (
            f"{started} processes started, Accelerate and torch see {joined}"
        )

    def _log_ignored_settings(self, ds_config: Path, is_alone_by_mistake: bool) -> None:
        if ignored := self.launcher_settings.describe_ignored():
            log.warning(
                "the launcher's settings %s are not followed: %s and the configuration decide",
                ignored,
                ds_config,
            )
        if is_alone_by_mistake:
            log.warning(
                "the launcher was told of several processes and started one; `rectvlm train N "
                "--processes COUNT` starts more"
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
        """Device of this process, where batches go."""
        return self.accelerator.device

    def shard_module(self, module: nn.Module) -> None:
        """Under ZeRO-3, keep only this rank's share of a module's own parameters.

        A model that is loaded module by module is never entire on any rank. Every rank must call it
        in the same order. Under ZeRO-1 and ZeRO-2 nothing happens.
        """
        fresh = [p for p in module.parameters(recurse=False) if not hasattr(p, "ds_id")]
        if not fresh or self._zero_settings["stage"] != 3:
            return
        if self._first_sharded is None:
            settings = {
                "zero_optimization": {
                    "stage": 3,
                    "zero_hpz_partition_size": self._zero_settings.get(
                        "zero_hpz_partition_size", 1
                    ),
                },
                "bf16": {"enabled": True},
                "train_batch_size": self.world_size,
            }
            deepspeed.zero.Init(nn.ParameterList(fresh), config_dict_or_path=settings)
            self._first_sharded = fresh[0]
        else:
            self._first_sharded.convert_to_zero_parameters(param_list=fresh)

    @property
    def _zero_settings(self) -> dict[str, Any]:
        return self.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]

    def prepare(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Shard the model and the optimizer state."""
        for name, parameter in model.named_parameters():
            if type(parameter).__name__ == "Params4bit":
                self._packed_numels[name] = getattr(parameter, "ds_numel", parameter.numel())
        for module in model.modules():
            if isinstance(module, Linear4bit):
                # In eval mode it would repack its weights, and the state shared with their shards.
                module.support_avx512bf16_for_cpu = False
        if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            self._cast_and_move(model)
        if self._zero_settings["stage"] == 3:
            # Hooks of each linear layer and adapter would take longer than they save, a third of a
            # step of a small model on CPUs.
            for leaf in find_leaf_modules(model).values():
                leaf.register_forward_pre_hook(require_input_gradient)
                set_z3_leaf_module(leaf, True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.zero_optimizer = ZeroOptimizer(self.optimizer.optimizer, self.model.module)
        self.model.train()

    def _cast_and_move(self, model: nn.Module) -> None:
        """Set dtype and device and make ranks equal, which DeepSpeed omits for a sharded model."""
        for parameter in model.parameters():
            if not hasattr(parameter, "ds_id"):  # DeepSpeed broadcasts it when it shards it
                dtype = torch.bfloat16 if parameter.is_floating_point() else parameter.dtype
                parameter.data = parameter.data.to(self.device, dtype)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer = buffer.to(self.device).contiguous()
                    dist.broadcast(buffer, 0)

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of one micro-batch."""
        self.model.backward(loss)

    def step(self, skip: bool = False, max_norm: float = math.inf) -> OptimizerStepResult | None:
        """End a micro-batch; the last one of a step changes the weights, unless it is skipped.

        Args:
            skip: whether to skip the step; all ranks must agree.
            max_norm: norm of the gradient above which the step is skipped too. A step whose norm
                is not finite is always skipped.

        Returns:
            What became of the step; None before the last micro-batch.
        """
        ends_step = self.model.is_gradient_accumulation_boundary()
        zero_optimizer = self.zero_optimizer
        zero_optimizer.gradient_norm = None
        zero_optimizer.skip_next_step = skip
        zero_optimizer.max_norm = max_norm
        self.model.step()
        if not ends_step:
            return None
        if zero_optimizer.has_skipped_step:
            zero_optimizer.finish_skipped_step()
        return OptimizerStepResult(
            zero_optimizer.gradient_norm, not zero_optimizer.has_skipped_step
        )

    def all_reduce_mean(self, sums: Tensor, counts: Tensor) -> Tensor:
        """Mean over what all ranks know.

        Args:
            sums: (n,) float, this rank's sums.
            counts: (n,) float, the number of values in each sum.

        Returns:
            (n,) float32; NaN where no rank has a value.
        """
        sums_and_counts = torch.stack([sums, counts]).float().to(self.device)
        dist.all_reduce(sums_and_counts)
        total, count = sums_and_counts
        return total / count.where(count > 0, torch.nan)

    def all_reduce_sum(self, value: float) -> int:
        """Sum of all ranks' values."""
        tensor = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return int(tensor)

    def all_reduce_max(self, *values: float) -> list[float]:
        """Largest of all ranks' values, for each value."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks, on all of them."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def describe_ranks(self) -> EngineDescription:
        """Measure what runs on every rank; every rank must call it.

        Parameters that ZeRO-3 keeps entire on a rank are so after the first step.
        """
        module, packed_names = self.model.module, self._packed_numels.keys()
        bytes_by_kind = count_bytes_by_kind(module, packed_names)
        this_rank = RankDescription(
            rank=self.rank,
            device=str(self.device),
            packed_bytes=count_packed_bytes(module, packed_names, local=True),
            packed_bytes_of_model=count_packed_bytes(module, packed_names, local=False),
            bytes=bytes_by_kind | self.zero_optimizer.count_bytes(),
            peak_memory_bytes=peak_memory_bytes(),
        )
        return EngineDescription(
            distributed_type=self.accelerator.distributed_type.value,
            zero_stage=self.model.zero_optimization_stage(),
            world_size=self.world_size,
            mixed_precision=self.accelerator.mixed_precision,
            dynamo_backend=self.accelerator.state.dynamo_plugin.backend.value,
            launcher=self.launcher_settings,
            ranks=self.all_gather_object(this_rank),
        )

    @contextmanager
    def use_ema_weights(self) -> Iterator[None]:
        """Compute with the moving averages of the weights, where the optimizer keeps some.

        The averages are swapped with the 32-bit weights and rounded to the model's dtype as in a
        step. Afterwards every bit is as before: the model's weights are always the rounded 32-bit
        ones. Every rank must enter it.
        """
        self.zero_optimizer.swap_ema_weights()
        yield
        self.zero_optimizer.swap_ema_weights()

    def gather_tensors(self, names: list[str]) -> dict[str, Tensor]:
        """Entire tensors by name, on the CPU of rank 0; every rank must call it.

        They are gathered one at a time: no rank ever holds more than one entire tensor.
        """
        module = self.model.module
        sharded_tensors: dict[str, Any] = dict(module.named_parameters())
        sharded_tensors |= dict(module.named_buffers())
        tensors = {}
        for name in names:
            tensor = sharded_tensors[name]
            to_gather = [tensor] if hasattr(tensor, "ds_tensor") else []
            with deepspeed.zero.GatheredParameters(to_gather, enabled=bool(to_gather)):
                if self.is_main:
                    tensors[name] = tensor.detach().to("cpu", copy=True)
        return tensors

    def save_optimizer_shard(self, folder: Path) -> Path:
        """Write this rank's share of the 32-bit weights and the optimizer's state.

        Returns:
            The file.

        Raises:
            OSError, SafetensorError: it could not be written.
        """
        path = folder / shard_file_name(self.rank, self.world_size)
        groups = self.zero_optimizer.list_flat_groups(self.rank)
        write_optimizer_shard(path, groups, self.zero_optimizer.optimizer_states)
        return path

    def load_optimizer_shards(self, folder: Path, saved_world_size: int, keeps_ema: bool) -> None:
        """Load what any number of ranks saved; every rank must call it.

        Args:
            folder: where the files are.
            saved_world_size: number of ranks that wrote them.
            keeps_ema: whether the run keeps a moving average of the weights.

        Raises:
            UserError: a file is missing, damaged, or of another model.
        """
        with OptimizerShardReader(folder, saved_world_size) as reader:
            self.zero_optimizer.load_shards(reader, self.rank, keeps_ema)

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier()

    def close(self) -> None:
        """Leave the process group."""
        self.accelerator.end_training()
        if dist.is_initialized():
            dist.destroy_process_group()
