"""What a training step allocates and computes, read from the operations that run.

On the meta device every operation runs with its shapes and without its numbers, so the step of a
70B model is dry-run on a laptop in seconds, with the modules, losses and autograd that will train.
The tracker sees each operation below autograd: the bytes that are alive, the bytes that are read
and written, and the FLOPs of matrix products and convolutions.
"""

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from rectvlm.train.dry_run.kernel_workspace import KernelWorkspaceMeter

StepPass = Literal["forward", "recomputation", "backward"]
BACKWARD_KIND = "backward and recomputation"
"""Memory kind of all that the backward pass allocates, whatever the part: gradients of activations
and recomputed activations."""
LOGITS_KIND = "logits"
WORKSPACE_KIND = "work areas"


@dataclass
class OperationCosts:
    """Costs of a part's operations in one pass of a step, one list entry for each operation.

    They are kept apart so that the rates of any machine can be applied to each.
    """

    flops: list[float] = field(default_factory=list)
    bytes_moved: list[float] = field(default_factory=list)
    """Bytes read and written by each operation."""
    is_convolution: list[bool] = field(default_factory=list)
    """Whether each operation is a convolution: those reach another share of a GPU's rate."""


_CONVOLUTION_OPS = {torch.ops.aten.convolution, torch.ops.aten.convolution_backward}


def _match_kernel_layout(convolution: Any, args: Any, result: Any) -> Any:
    """Give a convolution's result the memory layout that it has on a CPU or a GPU.

    There, a channels-last volume gives a channels-last result, and the copies behind it depend on
    that; the meta device does not follow in three dimensions.
    """
    is_forward = convolution is torch.ops.aten.convolution
    volume, output = (args[0], result) if is_forward else (args[1], result[0])
    channels_last = torch.channels_last_3d
    if volume.ndim != 5 or output is None:
        return result
    if volume.is_contiguous() or not volume.is_contiguous(memory_format=channels_last):
        return result
    relaid = torch.empty_like(output, memory_format=channels_last)
    return relaid if is_forward else (relaid, *result[1:])


class MemoryTracker(TorchDispatchMode):
    """Counts memory and FLOPs by part while a step runs under it."""

    def __init__(
        self,
        known_tensors: Iterable[Tensor],
        vocabulary_size: int | None,
        device: str = "meta",
        workspace_meter: KernelWorkspaceMeter | None = None,
    ) -> None:
        """Start with nothing alive.

        Args:
            known_tensors: tensors that exist already and are counted elsewhere: parameters and
                buffers.
            vocabulary_size: a tensor with a side of this length is counted as logits.
            device: tensors on it are counted; on a real device the tracker watches a real step.
            workspace_meter: measures what products and convolutions allocate for themselves;
                without it the workspace is not counted.
        """
        super().__init__()
        self._known_tensors = list(known_tensors)
        self._known_storages = {t.untyped_storage()._cdata for t in self._known_tensors}
        self._alive: dict[int, Any] = {}
        self._vocabulary_size = vocabulary_size
        self._device = device
        self._workspace_meter = workspace_meter
        self._is_recomputing = False

        self.current_part = "other"
        self.is_backward = False
        self.live_bytes_by_kind: dict[str, int] = defaultdict(int)
        self.live_bytes = self.peak_bytes = 0
        self.peak_bytes_by_kind: dict[str, int] = {}
        self.costs: dict[tuple[str, StepPass], OperationCosts] = defaultdict(OperationCosts)

    @contextmanager
    def attribute_to(self, part: str) -> Iterator[None]:
        """Count what happens inside the `with` block for a part."""
        part_before, self.current_part = self.current_part, part
        try:
            yield
        finally:
            self.current_part = part_before

    @contextmanager
    def mark_recomputation(self, is_recomputing: bool) -> Iterator[None]:
        """Count what happens inside the `with` block as recomputation although gradients are off.

        Gradients are off inside custom autograd functions.
        """
        state_before, self._is_recomputing = self._is_recomputing, is_recomputing
        try:
            yield
        finally:
            self._is_recomputing = state_before

    @property
    def current_pass(self) -> StepPass:
        """Pass of the step that runs now.

        In the backward pass, only recomputation builds a graph.
        """
        if not self.is_backward:
            return "forward"
        is_recomputing = self._is_recomputing or torch.is_grad_enabled()
        return "recomputation" if is_recomputing else "backward"

    @property
    def _owning_part(self) -> str:
        """Part whose operation runs: in the backward pass, the part that built the graph node."""
        node: Any = torch._C._current_autograd_node() if self.is_backward else None
        return self.current_part if node is None else node.metadata.get("part", self.current_part)

    def claim_graph_nodes(self, tensors: Iterable[Tensor]) -> None:
        """Attribute the graph nodes behind a part's results to it, as far as they have no part."""
        waiting: list[Any] = [tensor.grad_fn for tensor in tensors]
        while waiting:
            node = waiting.pop()
            if node is not None and "part" not in node.metadata:
                node.metadata["part"] = self.current_part
                waiting += [next_node for next_node, _ in node.next_functions]

    def add_operation(
        self,
        flops: float,
        bytes_moved: float,
        step_pass: StepPass | None = None,
        is_convolution: bool = False,
    ) -> None:
        """Record the costs of one operation."""
        costs = self.costs[self._owning_part, step_pass or self.current_pass]
        costs.flops.append(flops)
        costs.bytes_moved.append(bytes_moved)
        costs.is_convolution.append(is_convolution)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operator = func._overloadpacket
        is_convolution = operator in _CONVOLUTION_OPS
        if self._workspace_meter is not None and operator in flop_registry:
            self._record_workspace(self._workspace_meter.measure_peak(func, args, kwargs))
        if self._device == "meta" and is_convolution:
            result = _match_kernel_layout(operator, args, result)

        outputs = self._list_tensors(result)
        has_new_storage = False
        for tensor in outputs:
            has_new_storage |= self._track_storage(tensor)
        flops = 0
        if operator in flop_registry:
            flops = flop_registry[operator](*args, **kwargs, out_val=result)
        if flops or has_new_storage or func._schema.is_mutable:
            tensors = self._list_tensors((args, kwargs)) + outputs
            bytes_moved = sum(t.numel() * t.element_size() for t in tensors)
            self.add_operation(flops, bytes_moved, is_convolution=is_convolution)
        return result

    def _list_tensors(self, tree: Any) -> list[Tensor]:
        """List the tensors in a tree of arguments or results that are on the watched device."""
        tensors = (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))
        return [tensor for tensor in tensors if tensor.device.type == self._device]

    def _record_workspace(self, size_bytes: int) -> None:
        """Count bytes that are alive within an operation alone."""
        bytes_within = self.live_bytes + size_bytes
        if bytes_within > self.peak_bytes:
            self.peak_bytes = bytes_within
            self.peak_bytes_by_kind = {**self.live_bytes_by_kind, WORKSPACE_KIND: size_bytes}

    def _track_storage(self, tensor: Tensor) -> bool:
        """Count a tensor's storage if it is new, until it is freed; return whether it is new."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known_storages or key in self._alive:
            return False
        size_bytes = storage.nbytes()
        kind = BACKWARD_KIND if self.is_backward else self.current_part
        if self._vocabulary_size is not None and self._vocabulary_size in tensor.shape:
            kind = LOGITS_KIND

        def forget_storage(_: Any) -> None:
            del self._alive[key]
            self.live_bytes_by_kind[kind] -= size_bytes
            self.live_bytes -= size_bytes

        self._alive[key] = weakref.ref(storage, forget_storage)
        self.live_bytes_by_kind[kind] += size_bytes
        self.live_bytes += size_bytes
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes = self.live_bytes
            self.peak_bytes_by_kind = dict(self.live_bytes_by_kind)
        return True
