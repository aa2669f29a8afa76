"""Rates of a GPU and of the network between GPUs."""

from dataclasses import dataclass, field

from rectvlm.cli_options import argument


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
    """Time of ZeRO-3's hooks for one pass of a module with weights, seconds: by so much a step on
    an H200 took longer than under ZeRO-2."""
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
