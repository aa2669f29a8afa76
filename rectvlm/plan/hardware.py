"""Rates of a GPU and of the network between GPUs."""

from dataclasses import dataclass, field

from rectvlm.cli_options import argument

H200_MEMORY_GB = 141.0
"""Memory of an H200, GB."""


@dataclass(frozen=True)
class HardwareRates:
    """Rates of one GPU and of the network.

    The defaults are an H200 SXM's data sheet, and shares of it that are assumed.
    """

    tflops: float = 989.0
    """Dense bf16 matrix rate of a GPU, TFLOP/s."""
    efficiency: float = 0.5
    """Share of the dense rate that matrix products reach."""
    convolution_efficiency: float = 0.11
    """Share of the dense rate that the localizer's convolutions reach: it makes their planned time
    the time that was measured on an H200."""
    bandwidth: float = field(default=4.8, metadata=argument(metavar="TB/s"))
    """Bandwidth of a GPU's memory, TB/s."""
    bandwidth_efficiency: float = 0.7
    """Share of the memory bandwidth that kernels reach."""
    launch: float = 6e-6
    """Shortest time of an operation, seconds: the host launches one after the other."""
    gpus_per_node: int = field(default=8, metadata=argument(metavar="N"))
    """Number of GPUs of a node."""
    intra: float = field(default=450.0, metadata=argument(metavar="GB/s"))
    """Bandwidth between GPUs of a node in one direction, GB/s for each GPU: NVLink 4."""
    inter: float = field(default=50.0, metadata=argument(metavar="GB/s"))
    """Bandwidth between nodes, GB/s for each GPU: InfiniBand NDR 400 Gb/s."""
    network_efficiency: float = 0.7
    """Share of the network bandwidth that collectives reach."""
    hop: float = 5e-6
    """Latency of each further member of a ring, seconds."""
    hook: float = 4.8e-4
    """Time of ZeRO-3's hooks for one pass of a module, seconds: by so much a step on an H200, with
    hooks at every module with weights, took longer than under ZeRO-2."""
    tensor: float = 2.0e-4
    """Time of the engine's optimizer for one tensor, seconds, on the same host."""


MEASURED_RATES = (
    "convolution_efficiency",
    "bandwidth_efficiency",
    "launch",
    "network_efficiency",
    "hop",
    "hook",
    "tensor",
)
"""Fields of `HardwareRates` that are no options of `rectvlm plan`."""

RATE_SOURCES = (
    "Measured on one H200, in a whole step of phase 3 at `large`: convolutions, hooks of ZeRO-3, "
    "tensors of the optimizer. Not measured on a GPU: the shares of the matrix rate, memory and "
    "network that are reached, launch times, and everything with more than one GPU."
)
"""Where the default rates come from, for the reader of a plan."""


def describe_assumed_rates(rates: HardwareRates, gpus: int, memory_gb: float) -> str | None:
    """Say which rates are an H200's though the machine is another; None where nothing is assumed.

    Args:
        rates: rates of the plan.
        gpus: number of GPUs; rates of a network that they do not use are left out.
        memory_gb: memory of each GPU, GB.
    """
    names = ["tflops", "bandwidth"]
    if gpus > 1:
        names.append("intra")
    if gpus > rates.gpus_per_node:
        names.append("inter")
    default_rates = HardwareRates()
    assumed = [name for name in names if getattr(rates, name) == getattr(default_rates, name)]
    is_h200 = memory_gb == H200_MEMORY_GB and assumed == names
    if is_h200 or not assumed:
        return None
    options = ", ".join(f"--{name} {getattr(rates, name):g}" for name in assumed)
    return (
        f"{options} are an H200's, and this plan is for another machine (GPUs of {memory_gb:g} GB):"
        " give its rates, or take the times for those of an H200."
    )
