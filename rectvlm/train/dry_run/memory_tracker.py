"""What a step allocates and computes, read from the operations that run.

On the meta device every operation runs with its shapes and without its numbers, so that a step of a 70B is rehearsed on
a laptop in seconds, with the modules, losses and autograd that will train. The ledger sees each operation below
autograd: the bytes that are alive, the bytes that move and the matrix products.
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
"""What the backward pass allocates: gradients of activations and recomputed ones, whatever the part."""
LOGITS_KIND = "logits"
WORKSPACE_KIND = "work areas"


@dataclass
class OperationCosts:
    """Operations of a part in one stage of a step, one entry each, so that any machine's rates can be put to them."""

    flops: list[float] = field(default_factory=list)
    bytes_moved: list[float] = field(default_factory=list)
    """Bytes read and written."""
    is_convolution: list[bool] = field(default_factory=list)
    """Whether it is a convolution: those reach another share of a GPU's rate."""


_CONVOLUTION_OPS = {torch.ops.aten.convolution, torch.ops.aten.convolution_backward}


def _match_kernel_layout(packet: Any, args: Any, out: Any) -> Any:
    """Convolutions of channels-last volumes give channels-last results on CPU and GPU, and the copies behind them
    depend on that; the meta device does not follow in three dimensions."""
    first = 0 if packet is torch.ops.aten.convolution else 1
    source, result = args[first], (out if first == 0 else out[0])
    last = torch.channels_last_3d
    if (
        source.ndim != 5
        or result is None
        or source.is_contiguous()
        or not source.is_contiguous(memory_format=last)
    ):
        return out
    laid = torch.empty_like(result, memory_format=last)
    return laid if first == 0 else (laid, *out[1:])


class MemoryTracker(TorchDispatchMode):
    """Active while a step is rehearsed."""

    def __init__(
        self,
        known_tensors: Iterable[Tensor],
        vocabulary_size: int | None,
        device: str = "meta",
        workspace_meter: KernelWorkspaceMeter | None = None,
    ) -> None:
        """Start with nothing alive.

        Args:
            known: tensors that exist already and are counted elsewhere: parameters and buffers.
            vocabulary: a tensor with a side of this length is counted as logits.
            device: tensors on it are counted; on a real one the ledger watches a real step.
            areas: what products and convolutions allocate for themselves; without it that is not counted.
        """
        super().__init__()
        self._known_storages = {tensor.untyped_storage()._cdata for tensor in known_tensors}
        self._keep = list(known_tensors)
        self._alive: dict[int, Any] = {}
        self._vocabulary_size, self._device, self._workspace_meter = (
            vocabulary_size,
            device,
            workspace_meter,
        )
        self.current_part = "other"
        self.is_backward = self._is_recomputing = False
        self.live_bytes_by_kind: dict[str, int] = defaultdict(int)
        """Bytes alive by kind."""
        self.live_bytes = self.peak_bytes = 0
        self.peak_bytes_by_kind: dict[str, int] = {}
        self.costs: dict[tuple[str, StepPass], OperationCosts] = defaultdict(OperationCosts)

    @contextmanager
    def attribute_to(self, part: str) -> Iterator[None]:
        """What happens inside belongs to a part."""
        before, self.current_part = self.current_part, part
        try:
            yield
        finally:
            self.current_part = before

    @contextmanager
    def mark_recomputation(self, is_recomputing: bool) -> Iterator[None]:
        """What happens inside a custom function, where gradients are off, is recomputation all the same."""
        before, self._is_recomputing = self._is_recomputing, is_recomputing
        try:
            yield
        finally:
            self._is_recomputing = before

    @property
    def current_pass(self) -> StepPass:
        """Where in a step we are: in the backward pass, recomputation alone builds a graph."""
        if not self.is_backward:
            return "forward"
        return "recomputation" if self._is_recomputing or torch.is_grad_enabled() else "backward"

    @property
    def _owning_part(self) -> str:
        """The part whose operation runs: in the backward pass, the part that built the node of the graph."""
        node: Any = torch._C._current_autograd_node() if self.is_backward else None
        return self.current_part if node is None else node.metadata.get("part", self.current_part)

    def claim_graph_nodes(self, tensors: Iterable[Tensor]) -> None:
        """Nodes of the graph behind a part's results, as far as no other part has signed them, are that part's."""
        waiting: list[Any] = [t.grad_fn for t in tensors]
        while waiting:
            node = waiting.pop()
            if node is not None and "part" not in node.metadata:
                node.metadata["part"] = self.current_part
                waiting += [following for following, _ in node.next_functions]

    def add_operation(
        self,
        flops: float,
        bytes_moved: float,
        step_pass: StepPass | None = None,
        is_convolution: bool = False,
    ) -> None:
        """One operation."""
        work = self.costs[self._owning_part, step_pass or self.current_pass]
        work.flops.append(flops)
        work.bytes_moved.append(bytes_moved)
        work.is_convolution.append(is_convolution)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if self._workspace_meter is not None and packet in flop_registry:
            self._record_workspace(self._workspace_meter.measure_peak(func, args, kwargs))
        if self._device == "meta" and packet in _CONVOLUTION_OPS:
            out = _match_kernel_layout(packet, args, out)
        tensors = [
            t for t in tree_leaves(out) if isinstance(t, Tensor) and t.device.type == self._device
        ]
        fresh = [t for t in tensors if self._track_storage(t)]
        flops = (
            flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
        )
        if flops or fresh or func._schema.is_mutable:
            inputs = [
                t
                for t in tree_leaves((args, kwargs))
                if isinstance(t, Tensor) and t.device.type == self._device
            ]
            moved = sum(t.numel() * t.element_size() for t in (*inputs, *tensors))
            self.add_operation(flops, moved, is_convolution=packet in _CONVOLUTION_OPS)
        return out

    def _record_workspace(self, size_bytes: int) -> None:
        """Bytes that are alive within an operation alone."""
        if self.live_bytes + size_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_bytes_by_kind = (
                self.live_bytes + size_bytes,
                {**self.live_bytes_by_kind, WORKSPACE_KIND: size_bytes},
            )

    def _track_storage(self, tensor: Tensor) -> bool:
        """Count a storage that was not there before; it is taken off when it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known_storages or key in self._alive:
            return False
        size = storage.nbytes()
        kind = BACKWARD_KIND if self.is_backward else self.current_part
        if self._vocabulary_size is not None and self._vocabulary_size in tensor.shape:
            kind = LOGITS_KIND

        def forget(_: Any) -> None:
            del self._alive[key]
            self.live_bytes_by_kind[kind] -= size
            self.live_bytes -= size

        self._alive[key] = weakref.ref(storage, forget)
        self.live_bytes_by_kind[kind] += size
        self.live_bytes += size
        if self.live_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_bytes_by_kind = (
                self.live_bytes,
                dict(self.live_bytes_by_kind),
            )
        return True
