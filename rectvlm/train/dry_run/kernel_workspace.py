"""Work areas of matrix products and convolutions, measured where they will run.

No tensor shows what a kernel allocates for itself: copies in its own layout, padded channels, fp32 sums. It depends on
the library and the machine, so it is measured: each distinct operation runs once, on tensors without content.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map_only


class KernelWorkspaceMeter:
    """Peaks of single operations on a device, each measured once."""

    def __init__(self, device: torch.device | str) -> None:
        """`device`: `cpu`, or the GPU that is planned for."""
        self.device = torch.device(device)
        self._peak_by_operation: dict[str, int] = {}

    def measure_peak(self, func: Any, args: Any, kwargs: Any) -> int:
        """Most bytes that an operation holds at once beside its arguments; its results are among them.

        Args:
            func: of torch's operators.
            args: with tensors on the meta device.
            kwargs: the same.
        """
        key = repr((str(func), tree_map_only(Tensor, _layout_key, (args, kwargs))))
        if key not in self._peak_by_operation:
            real_args, real_kwargs = tree_map_only(Tensor, self._materialize, (args, kwargs))

            def run() -> None:
                func(*real_args, **real_kwargs)

            self._peak_by_operation[key] = (
                _measure_gpu_peak(run, self.device)
                if self.device.type == "cuda"
                else _measure_cpu_peak(run)
            )
        return self._peak_by_operation[key]

    def _materialize(self, tensor: Tensor) -> Tensor:
        size = (tensor.shape, tensor.stride())
        return torch.empty_strided(*size, dtype=tensor.dtype, device=self.device).zero_()


def _layout_key(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype


def _measure_gpu_peak(run: Callable[[], None], device: torch.device) -> int:
    run()  # libraries set themselves up at their first call
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _measure_cpu_peak(run: Callable[[], None]) -> int:
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events: Any = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
