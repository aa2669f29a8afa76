"""Workspace of matrix products and convolutions, measured on the device where they will run.

No tensor shows what a kernel allocates for itself: copies in its own layout, padded channels, fp32
sums. The amount depends on the library and the machine, so each distinct operation runs once, on
tensors of zeros, and its memory peak is recorded.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map_only


class KernelWorkspaceMeter:
    """Measures the memory peak of single operations on a device, each distinct one once."""

    def __init__(self, device: torch.device | str) -> None:
        """Start with nothing measured on `device`: `cpu`, or the GPU that is planned for."""
        self.device = torch.device(device)
        self._peak_by_operation: dict[str, int] = {}

    def measure_peak(self, func: Any, args: Any, kwargs: Any) -> int:
        """Return the largest number of bytes that an operation holds beside its arguments.

        The operation's results are part of it.

        Args:
            func: one of torch's operators.
            args: its positional arguments, with tensors on the meta device.
            kwargs: its keyword arguments, with tensors on the meta device.
        """
        key = repr((str(func), tree_map_only(Tensor, _layout_key, (args, kwargs))))
        if key not in self._peak_by_operation:
            self._peak_by_operation[key] = self._run_and_measure(func, args, kwargs)
        return self._peak_by_operation[key]

    def _run_and_measure(self, func: Any, args: Any, kwargs: Any) -> int:
        real_args, real_kwargs = tree_map_only(Tensor, self._materialize, (args, kwargs))

        def run_operation() -> None:
            func(*real_args, **real_kwargs)

        if self.device.type == "cuda":
            return _measure_gpu_peak(run_operation, self.device)
        return _measure_cpu_peak(run_operation)

    def _materialize(self, tensor: Tensor) -> Tensor:
        """Make a tensor of zeros with the layout of a meta tensor."""
        layout = (tensor.shape, tensor.stride())
        return torch.empty_strided(*layout, dtype=tensor.dtype, device=self.device).zero_()


def _layout_key(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def _measure_gpu_peak(run_operation: Callable[[], None], device: torch.device) -> int:
    run_operation()  # libraries set themselves up at their first call
    torch.cuda.reset_peak_memory_stats(device)
    bytes_before = torch.cuda.memory_allocated(device)
    run_operation()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - bytes_before


def _measure_cpu_peak(run_operation: Callable[[], None]) -> int:
    activities = [ProfilerActivity.CPU]
    with torch.no_grad(), profile(activities=activities, profile_memory=True) as profiler:
        run_operation()
    events: Any = profiler.profiler.kineto_results.events()
    memory_events = [event for event in events if event.name() == "[memory]"]
    live_bytes = peak_bytes = 0
    for event in sorted(memory_events, key=lambda event: event.start_ns()):
        live_bytes += event.nbytes()
        peak_bytes = max(peak_bytes, live_bytes)
    return peak_bytes
