"""Classes of reconstruction kernels, by the names that scanners give them."""

import re
from typing import Literal

KernelClass = Literal["soft", "sharp"]

_MIN_SHARP_KERNEL_NUMBER = 50
"""Siemens numbers kernels from 10 (smooth) to 90 (sharp): about 40 for soft tissue, 50 and more for
lung and bone."""
_SIEMENS_KERNEL = re.compile(
    r"(?:B[a-z]?|I|J|Q[a-z]|H[a-z]?|U[a-z]?|D|T|C|S[a-z]?)(\d{2})[a-z]?\d?"
)
_CANON_KERNEL = re.compile(r"FC(\d{2})")
_MIN_SHARP_CANON_NUMBER = 30
_SOFT_KERNEL_NAMES = {
    *("A", "B", "C", "SB", "SC", "SA"),  # body filters of Philips, and their Neusoft kin
    *("SMOOTH", "SOFT", "STANDARD", "STD", "STND", "DETAIL", "BODY"),  # GE
}
_SHARP_KERNEL_NAMES = {
    *("D", "E", "L", "YA", "YB", "YC", "YD"),  # sharp, lung and high-resolution filters of Philips
    *("LUNG", "CHEST", "BONE", "BONEPLUS", "EDGE", "SHARP", "ULTRA", "HD"),  # GE
}


def siemens_kernel_number(kernel: str | None) -> int | None:
    """The number in a Siemens kernel: 40 in Br40f, 57 in Bl57d; None for a kernel without one."""
    match = _SIEMENS_KERNEL.fullmatch(kernel or "")
    return int(match[1]) if match else None


def kernel_class(kernel: str | None) -> KernelClass | None:
    """The class of a kernel: soft tissue, or sharp for lung and bone; None for an unknown name."""
    number = siemens_kernel_number(kernel)
    if number is not None:
        return "sharp" if number >= _MIN_SHARP_KERNEL_NUMBER else "soft"
    canon = _CANON_KERNEL.fullmatch(kernel or "")
    if canon:
        return "sharp" if int(canon[1]) >= _MIN_SHARP_CANON_NUMBER else "soft"
    name = (kernel or "").upper().replace(" ", "")
    if name in _SOFT_KERNEL_NAMES:
        return "soft"
    return "sharp" if name in _SHARP_KERNEL_NAMES else None
