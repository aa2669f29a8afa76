"""The checks of `rectvlm doctor`. None changes anything; each says what to do."""

import importlib.util
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import psutil
import torch
from packaging.requirements import Requirement

from rectvlm.optional_packages import missing_packages

CheckState = Literal["ok", "missing", "failed"]
_MIN_FREE_GB = 50.0
"""Free disk space for the demo with its packages, shards and checkpoints, GB."""
_MIN_SHARED_GB = 1.0
"""Shared memory from which loader workers can hand over batches, GB; containers start with 0.06."""
_MIN_MEMORY_GB = 12.0
_NETWORK_SECONDS = 3.0
_NCCL_TIMEOUT_SECONDS = 120
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    state: CheckState
    """Whether it is there; `failed` for what is needed and does not work, `missing` for what only
    some commands need."""
    finding: str
    """What was found."""
    remedy: str = ""
    """What to do; empty where nothing has to be done."""


def run_checks() -> list[Check]:
    """Run all checks, in the order of the table."""
    checks: list[Callable[[], Check]] = [
        check_packages,
        check_extras,
        check_memory,
        check_gpu,
        check_nccl,
        check_disk,
        check_shared_memory,
        check_network,
        check_hub_token,
        check_wandb,
    ]
    return [check() for check in checks]


def check_packages() -> Check:
    """Whether what rectvlm needs is installed in the versions that it needs."""
    faults = find_package_faults(requires("rectvlm") or [])
    if faults:
        remedy = "pip install --upgrade rectvlm, or make setup in a checkout"
        return Check("packages", "failed", "; ".join(faults), remedy)
    names = ("torch", "transformers", "peft", "monai")
    return Check("packages", "ok", ", ".join(f"{name} {version(name)}" for name in names))


def find_package_faults(requirements: list[str]) -> list[str]:
    """What is not installed, or in another version; a package of an extra may be missing."""
    faults = []
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        is_optional = marker is not None and not marker.evaluate({"extra": ""})
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            if not is_optional:
                faults.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            faults.append(f"{requirement.name} {installed}, expected {requirement.specifier}")
    return faults


def check_extras() -> Check:
    """Which optional packages are not installed."""
    extras = metadata("rectvlm").get_all("Provides-Extra") or []
    missing = [extra for extra in sorted({*extras} - {"dev"}) if missing_packages(extra)]
    if not missing:
        return Check("extras", "ok", "all optional packages are installed")
    remedy = f'pip install "rectvlm[{",".join(missing)}]" if you need them'
    return Check("extras", "missing", ", ".join(missing), remedy)


def check_memory() -> Check:
    """Main memory."""
    total_gb = psutil.virtual_memory().total / 1e9
    if total_gb < _MIN_MEMORY_GB:
        remedy = f"use a machine with {_MIN_MEMORY_GB:g} GB for the demo"
        return Check("memory", "failed", f"{total_gb:.1f} GB", remedy)
    return Check("memory", "ok", f"{total_gb:.1f} GB, {psutil.cpu_count()} processors")


def check_gpu() -> Check:
    """GPUs, their driver and torch's CUDA."""
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        return Check("GPU", "ok", f"{', '.join(names)}; CUDA {torch.version.cuda}")
    driver = Path("/proc/driver/nvidia/version")
    if torch.version.cuda is None:
        finding = f"torch {torch.__version__} is a build for the CPU"
        return Check("GPU", "missing", finding, "install a CUDA build of torch to use a GPU")
    if not driver.is_file():
        remedy = "install NVIDIA's driver, or run the container with --gpus all; the CPU works too"
        return Check("GPU", "missing", "no NVIDIA driver", remedy)
    finding = f"the driver is there, but CUDA {torch.version.cuda} does not start"
    return Check("GPU", "failed", finding, "update the driver, or install torch for its CUDA")


def check_nccl() -> Check:
    """An all-reduce between all GPUs, in processes of their own."""
    n_gpus = torch.cuda.device_count()
    if n_gpus < 2:
        return Check("NCCL", "ok", "not needed with fewer than two GPUs")
    fault = try_all_reduce("nccl", n_gpus, _NCCL_TIMEOUT_SECONDS)
    if fault is None:
        return Check("NCCL", "ok", f"{n_gpus} GPUs add up a tensor")
    remedy = "set NCCL_DEBUG=INFO and run again; try NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1"
    return Check("NCCL", "failed", fault, remedy)


def try_all_reduce(backend: str, n_processes: int, timeout_seconds: float) -> str | None:
    """Let processes add up a tensor, on one GPU each with NCCL; the fault, or None.

    Args:
        backend: nccl or gloo.
        n_processes: number of processes.
        timeout_seconds: time after which they are ended.
    """
    context = torch.multiprocessing.get_context("spawn")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=_all_reduce, args=(backend, rank, n_processes, port), daemon=True)
        for rank in range(n_processes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout_seconds)
    is_hung = any(process.is_alive() for process in processes)
    for process in processes:
        process.kill()
        process.join()
    if is_hung:
        return f"no answer within {timeout_seconds:g} s"
    codes = [process.exitcode for process in processes]
    return None if not any(codes) else f"processes ended with {codes}"


def _all_reduce(backend: str, rank: int, n_processes: int, port: int) -> None:
    import torch.distributed as dist

    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=n_processes)
    device = f"cuda:{rank}" if backend == "nccl" else "cpu"
    tensor = torch.ones(1, device=device)
    dist.all_reduce(tensor)
    is_sum = tensor.item() == n_processes
    dist.destroy_process_group()
    if not is_sum:
        raise SystemExit(1)


def check_disk() -> Check:
    """Free space of the disk that the command was started on."""
    free_gb = shutil.disk_usage(Path.cwd()).free / 1e9
    finding = f"{free_gb:.0f} GB free in {Path.cwd()}"
    if free_gb < _MIN_FREE_GB:
        remedy = f"make room: the demo takes {_MIN_FREE_GB:g} GB with its packages"
        return Check("disk", "missing", finding, remedy)
    return Check("disk", "ok", finding)


def check_shared_memory() -> Check:
    """Shared memory, through which loader workers hand over batches."""
    if not _SHARED_MEMORY.is_dir():
        return Check("shared memory", "ok", "this system has no /dev/shm to be too small")
    total_gb = shutil.disk_usage(_SHARED_MEMORY).total / 1e9
    finding = f"{total_gb:.2g} GB"
    if total_gb < _MIN_SHARED_GB:
        remedy = "start the container with --shm-size=8g, or set data.workers=0"
        return Check("shared memory", "failed", finding, remedy)
    return Check("shared memory", "ok", finding)


def check_network() -> Check:
    """Whether the hub's host can be reached; nothing is sent."""
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return Check("network", "ok", "HF_HUB_OFFLINE is set: nothing is fetched")
    try:
        with socket.create_connection((host, port), _NETWORK_SECONDS):
            return Check("network", "ok", f"{host} can be reached")
    except OSError as error:
        remedy = (
            "set HTTPS_PROXY or HF_ENDPOINT (a mirror), or copy the weights (weights pull --from)"
        )
        return Check("network", "missing", f"{host}: {error.strerror or error}", remedy)


def check_hub_token() -> Check:
    """Whether a token for the hub is set, which gated models need; it is not shown or sent."""
    from huggingface_hub import get_token

    if get_token():
        return Check("Hub token", "ok", "a token is set")
    return Check("Hub token", "missing", "none", "hf auth login, for gated models such as Llama")


def check_wandb() -> Check:
    """Whether Weights & Biases knows a key; it is not shown or sent."""
    if importlib.util.find_spec("wandb") is None:
        return Check("W&B", "missing", "wandb is not installed", 'pip install "rectvlm[train]"')
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return Check("W&B", "ok", f"WANDB_MODE={os.environ['WANDB_MODE']}")
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    has_login = netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="replace")
    if os.environ.get("WANDB_API_KEY") or has_login:
        return Check("W&B", "ok", "a key is set")
    remedy = "wandb login, or WANDB_MODE=offline; runs are logged to TensorBoard all the same"
    return Check("W&B", "missing", "no key", remedy)
