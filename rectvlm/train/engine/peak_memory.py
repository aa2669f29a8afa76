"""Peak memory of this process: of the GPU if there is one, else resident memory."""

import contextlib
import resource
from pathlib import Path

import torch


def peak_memory_bytes() -> int:
    """Largest memory held since the start, or since `reset_peak_memory`, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    kilobytes = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
    return 1024 * (kilobytes or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def reset_peak_memory() -> int:
    """Forget the peak so far, where the system can; what is held now, in bytes."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory_bytes()
