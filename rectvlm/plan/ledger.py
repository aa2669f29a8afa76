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

from rectvlm.plan.workarea import WorkAreas

Stage = Literal["forward", "recomputation", "backward"]
BACKWARD = "backward and recomputation"
"""What the backward pass allocates: gradients of activations and recomputed ones, whatever the part."""
LOGITS = "logits"
WORK_AREAS = "work areas"


@dataclass
class Work:
    """Operations of a part in one stage of a step, one entry each, so that any machine's rates can be put to them."""

    flops: list[float] = field(default_factory=list)
    moved: list[float] = field(default_factory=list)
    """Bytes read and written."""
    convolved: list[bool] = field(default_factory=list)
    """Whether it is a convolution: those reach another share of a GPU's rate."""


_CONVOLUTIONS = {torch.ops.aten.convolution, torch.ops.aten.convolution_backward}


def _as_kernels_lay_it_out(packet: Any, args: Any, out: Any) -> Any:
    """Convolutions of channels-last volumes give channels-last results on CPU and GPU, and the copies behind them
    depend on that; the meta device does not follow in three dimensions."""
    first = 0 if packet is torch.ops.aten.convolution else 1
    source, result = args[first], (out if first == 0 else out[0])
    last = torch.channels_last_3d
    if source.ndim != 5 or result is None or source.is_contiguous() or not source.is_contiguous(memory_format=last):
        return out
    laid = torch.empty_like(result, memory_format=last)
    return laid if first == 0 else (laid, *out[1:])


class Ledger(TorchDispatchMode):
    """Active while a step is rehearsed."""

    def __init__(
        self, known: Iterable[Tensor], vocabulary: int | None, device: str = "meta", areas: WorkAreas | None = None
    ) -> None:
        """Start with nothing alive.

        Args:
            known: tensors that exist already and are counted elsewhere: parameters and buffers.
            vocabulary: a tensor with a side of this length is counted as logits.
            device: tensors on it are counted; on a real one the ledger watches a real step.
            areas: what products and convolutions allocate for themselves; without it that is not counted.
        """
        super().__init__()
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._keep = list(known)
        self._alive: dict[int, Any] = {}
        self._vocabulary, self._device, self._areas = vocabulary, device, areas
        self.part = "other"
        self.in_backward = self._recomputing = False
        self.live: dict[str, int] = defaultdict(int)
        """Bytes alive by kind."""
        self.total = self.peak = 0
        self.at_peak: dict[str, int] = {}
        self.work: dict[tuple[str, Stage], Work] = defaultdict(Work)

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """What happens inside belongs to a part."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    @contextmanager
    def recomputing(self, really: bool) -> Iterator[None]:
        """What happens inside a custom function, where gradients are off, is recomputation all the same."""
        before, self._recomputing = self._recomputing, really
        try:
            yield
        finally:
            self._recomputing = before

    @property
    def stage(self) -> Stage:
        """Where in a step we are: in the backward pass, recomputation alone builds a graph."""
        if not self.in_backward:
            return "forward"
        return "recomputation" if self._recomputing or torch.is_grad_enabled() else "backward"

    @property
    def _owner(self) -> str:
        """The part whose operation runs: in the backward pass, the part that built the node of the graph."""
        node: Any = torch._C._current_autograd_node() if self.in_backward else None
        return self.part if node is None else node.metadata.get("part", self.part)

    def sign(self, tensors: Iterable[Tensor]) -> None:
        """Nodes of the graph behind a part's results, as far as no other part has signed them, are that part's."""
        waiting: list[Any] = [t.grad_fn for t in tensors]
        while waiting:
            node = waiting.pop()
            if node is not None and "part" not in node.metadata:
                node.metadata["part"] = self.part
                waiting += [following for following, _ in node.next_functions]

    def add(self, flops: float, moved: float, stage: Stage | None = None, convolved: bool = False) -> None:
        """One operation."""
        work = self.work[self._owner, stage or self.stage]
        work.flops.append(flops)
        work.moved.append(moved)
        work.convolved.append(convolved)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if self._areas is not None and packet in flop_registry:
            self._borrow(self._areas.peak(func, args, kwargs))
        if self._device == "meta" and packet in _CONVOLUTIONS:
            out = _as_kernels_lay_it_out(packet, args, out)
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.device.type == self._device]
        fresh = [t for t in tensors if self._register(t)]
        flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
        if flops or fresh or func._schema.is_mutable:
            inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.device.type == self._device]
            moved = sum(t.numel() * t.element_size() for t in (*inputs, *tensors))
            self.add(flops, moved, convolved=packet in _CONVOLUTIONS)
        return out

    def _borrow(self, size: int) -> None:
        """Bytes that are alive within an operation alone."""
        if self.total + size > self.peak:
            self.peak, self.at_peak = self.total + size, {**self.live, WORK_AREAS: size}

    def _register(self, tensor: Tensor) -> bool:
        """Count a storage that was not there before; it is taken off when it is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in self._alive:
            return False
        size = storage.nbytes()
        kind = BACKWARD if self.in_backward else self.part
        if self._vocabulary is not None and self._vocabulary in tensor.shape:
            kind = LOGITS

        def forget(_: Any) -> None:
            del self._alive[key]
            self.live[kind] -= size
            self.total -= size

        self._alive[key] = weakref.ref(storage, forget)
        self.live[kind] += size
        self.total += size
        if self.total > self.peak:
            self.peak, self.at_peak = self.total, dict(self.live)
        return True
