"""Peak memory of this process: of the GPU if there is one, else resident memory."""

import resource

import torch


def peak_memory_bytes() -> int:
    """Largest memory held so far, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
