"""Peak memory of this process: of the GPU if there is one, else resident memory."""

import contextlib
import resource
from pathlib import Path

import torch


def peak_memory_bytes() -> int:
    """Largest memory held since the start, or since `reset_peak_memory`, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    kilobytes = _read_peak_resident_kilobytes()
    return 1024 * (kilobytes or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def _read_peak_resident_kilobytes() -> int | None:
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else []:
        if line.startswith("VmHWM"):
            return int(line.split()[1])
    return None


def reset_peak_memory() -> int:
    """Forget the peak so far, where the system can.

    Returns:
        Memory held now, in bytes.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory_bytes()
