"""The machine and the package versions that a figure was measured with."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from rectvlm.types import JsonObject

VERSIONED_PACKAGES = (
    "rectvlm",
    "torch",
    "accelerate",
    "deepspeed",
    "transformers",
    "peft",
    "bitsandbytes",
)
"""Packages that decide what a model computes."""


def package_versions(*extra_packages: str) -> dict[str, str]:
    """Versions of Python, of the packages that decide what a model computes, and of extra ones."""
    versions = {"python": platform.python_version()}
    for name in (*VERSIONED_PACKAGES, *extra_packages):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def describe_machine() -> JsonObject:
    """Processor, usable cores, memory and GPUs of this machine."""
    return {
        "cpu": _processor_name(),
        "cores": count_cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def count_cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    return ", ".join(sorted(names)) or platform.processor() or platform.machine()
