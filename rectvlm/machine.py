"""The machine and the package versions that a figure was measured with."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

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


def describe_machine() -> dict[str, Any]:
    """Processor, cores that may be used, memory and GPUs."""
    names = {
        line.partition(":")[2].strip() for line in _read_cpuinfo() if line.startswith("model name")
    }
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": ", ".join(sorted(names)) or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": gpus,
    }


def _read_cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []
