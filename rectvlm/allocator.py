"""How this process's memory allocator treats freed memory."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""
_NEVER = -1
"""Trim threshold with which the end of the heap is never given back."""
_LARGEST_KEPT_BYTES = 1 << 30
"""Size of a block from which it is still taken from the system and given back."""
_LARGEST_BYTES_OF_OLD_GLIBC = 1 << 25
"""Largest such size that older glibc takes, 32 MiB."""


def keep_freed_memory() -> bool:
    """Let this process use freed memory again instead of giving it back to the system.

    A model on the CPU allocates and frees its activations in every step. glibc returns large blocks
    at once, and the system clears every page of the next one: a quarter of a step of the demo's
    phase 3. The process then holds what it needed at its peak until it ends.

    Returns:
        Whether the allocator took the settings; only glibc's knows them.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not mallopt(_M_TRIM_THRESHOLD, _NEVER):
        return False
    return any(
        mallopt(_M_MMAP_THRESHOLD, size)
        for size in (_LARGEST_KEPT_BYTES, _LARGEST_BYTES_OF_OLD_GLIBC)
    )
