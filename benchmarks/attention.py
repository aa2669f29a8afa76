"""Attention with slice bias and region prior: the folded form against what else could compute it.

    python -m benchmarks.attention [--sides 8 16] [--heads 12] [--rounds 3] [--dtype float32]

One attention of 16 slices of side × side patches, 12 heads of 64 channels and 20 region tokens runs
forward and backward, to all inputs and to the learned slice bias. The ways to compute it are plain
attention without the biases (the difference is their cost), the folded form of
`rectvlm/models/attention.py`, a dense mask given to the fused call, the formula written out with
its N × N matrices as published code has it, and on a GPU the kernels of cuDNN, which need no padded
values, and FlexAttention. All take turns. On a CPU each way has a process of its own, whose memory
is the growth of its resident peak.
"""

import argparse
import contextlib
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measurements import Comparison, Repetitions
from benchmarks.publishing import (
    Program,
    make_parser,
    positive_int,
    publish_result,
    quiet_main,
)
from benchmarks.timing import synchronized_time
from rectvlm.labels import N_REGIONS
from rectvlm.models.attention import SliceRegionAttention
from rectvlm.train.engine.peak_memory import peak_memory_bytes, reset_peak_memory
from rectvlm.types import JsonObject

SLICES, CHANNELS = 16, 64
METHODS = ("plain", "folded", "dense mask", "formula")
GPU_METHODS = (*METHODS, "plain cudnn", "folded cudnn", "folded narrow", "flex")
MAX_SECONDS_PER_METHOD = 2.0
"""Seconds of all rounds of one way on a GPU, without the first, at most."""
_METHOD_LABELS = {
    "plain": "plain, no biases",
    "folded": "folded (ours)",
    "dense mask": "dense mask",
    "formula": "formula, N × N matrices",
    "plain cudnn": "plain, cuDNN",
    "folded cudnn": "folded, cuDNN",
    "folded narrow": "folded, cuDNN, values not padded",
    "flex": "FlexAttention",
}


class AttentionInputs:
    """Queries, keys and values (1, H, …, 64) with both biases, all requiring gradients."""

    def __init__(self, side: int, heads: int, dtype: torch.dtype, device: torch.device) -> None:
        torch.manual_seed(0)
        self.patch_count = SLICES * side * side
        self.module = SliceRegionAttention(heads * CHANNELS, heads, SLICES).to(device, dtype)
        torch.nn.init.normal_(self.module.slice_bias)

        def random_leaf(rows: int) -> Tensor:
            leaf = torch.randn(1, heads, rows, CHANNELS, dtype=dtype, device=device)
            return leaf.requires_grad_()

        keys = 1 + self.patch_count + N_REGIONS
        self.q = random_leaf(1 + self.patch_count)
        self.k, self.v = random_leaf(keys), random_leaf(keys)
        self.slice_index = torch.arange(SLICES, device=device).repeat_interleave(side * side)
        prior = torch.randn(1, self.patch_count, N_REGIONS, dtype=dtype, device=device)
        self.log_prior = prior.log_softmax(-1)

    def dense_mask(self) -> Tensor:
        """Make both biases as a dense mask (1, H, 1 + N, 1 + N + R)."""
        distance = self.slice_index[:, None] - self.slice_index[None] + SLICES - 1
        slice_bias = self.module.slice_bias[:, distance]
        region_prior = self.log_prior.expand(self.module.heads, -1, -1).to(slice_bias.dtype)
        return F.pad(torch.cat([slice_bias, region_prior], dim=-1), (1, 0, 1, 0))[None]

    def attend(self, method: str) -> Tensor:
        """Compute the attention (1, H, 1 + N, 64) by one of `GPU_METHODS`."""
        if method == "plain":
            return F.scaled_dot_product_attention(self.q, self.k, self.v)
        if method == "folded":
            return self.module._attend_with_biases(
                self.q, self.k, self.v, self.slice_index, self.log_prior, SLICES
            )
        if method in ("plain cudnn", "folded cudnn", "folded narrow"):
            return self._attend_cudnn(method)
        if method == "dense mask":
            return F.scaled_dot_product_attention(
                self.q, self.k, self.v, attn_mask=self.dense_mask()
            )
        if method == "formula":
            return (self.q @ self.k.mT / CHANNELS**0.5 + self.dense_mask()).softmax(-1) @ self.v
        return self._attend_flex()

    def _attend_cudnn(self, method: str) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            if method == "plain cudnn":
                return F.scaled_dot_product_attention(self.q, self.k, self.v)
            q, k = self.module.fold_biases(self.q, self.k, self.slice_index, self.log_prior, SLICES)
            v = self.v if method == "folded narrow" else F.pad(self.v, (0, q.shape[-1] - CHANNELS))
            return F.scaled_dot_product_attention(q, k, v, scale=CHANNELS**-0.5)[..., :CHANNELS]

    def _attend_flex(self) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        patches, slices = self.patch_count, self.slice_index
        slice_bias, log_prior = self.module.slice_bias, self.log_prior

        def add_biases(value: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            query_slice = slices[(i - 1).clamp(min=0)]
            key_slice = slices[(j - 1).clamp(0, patches - 1)]
            to_patch = slice_bias[h, query_slice - key_slice + SLICES - 1]
            to_region = log_prior[b, (i - 1).clamp(min=0), (j - 1 - patches).clamp(min=0)]
            bias = torch.where(j == 0, 0.0, torch.where(j <= patches, to_patch, to_region))
            return value + torch.where(i == 0, 0.0, bias)

        global _compiled_flex_attention
        _compiled_flex_attention = _compiled_flex_attention or torch.compile(flex_attention)
        return _compiled_flex_attention(self.q, self.k, self.v, score_mod=add_biases)


_compiled_flex_attention: Callable[..., Any] | None = None


def time_step(inputs: AttentionInputs, method: str) -> float:
    """Return the seconds of a forward and a backward pass."""
    for tensor in (inputs.q, inputs.k, inputs.v, inputs.module.slice_bias):
        tensor.grad = None
    start_seconds = synchronized_time(inputs.q.device)
    inputs.attend(method).square().sum().backward()
    return synchronized_time(inputs.q.device) - start_seconds


def measure_on_gpu(side: int, heads: int, dtype: torch.dtype, rounds: int) -> dict[str, JsonObject]:
    """Measure all ways in turns; a way that fails has the reason instead."""
    inputs = AttentionInputs(side, heads, dtype, torch.device("cuda"))
    measurements: dict[str, JsonObject] = {}
    rounds_by_method: dict[str, int] = {}
    for method in GPU_METHODS:
        try:
            time_step(inputs, method)  # compiles, and sets libraries up
            warm_seconds = time_step(inputs, method)
            # What takes minutes is not worth all rounds.
            worthwhile_rounds = min(rounds, int(MAX_SECONDS_PER_METHOD / warm_seconds))
            rounds_by_method[method] = max(1, worthwhile_rounds)
            measurements[method] = {"seconds": [], "peak_bytes": 0}
        except torch.OutOfMemoryError:
            measurements[method] = _describe_failure("out of memory")
        except RuntimeError as error:
            measurements[method] = _describe_failure(str(error).splitlines()[0][:80])
        torch.cuda.empty_cache()
    for turn in range(rounds):
        for method in [key for key, allowed in rounds_by_method.items() if turn < allowed]:
            memory_before = reset_peak_memory()
            measurements[method]["seconds"].append(time_step(inputs, method))
            measurements[method]["peak_bytes"] = peak_memory_bytes() - memory_before
    return measurements


def _describe_failure(reason: str) -> JsonObject:
    return {"seconds": None, "peak_bytes": None, "why": reason}


class WarmAttention:
    """One way on the CPU, in a process of its own that has warmed up."""

    current: "WarmAttention"
    """The one of this process."""

    def __init__(self, method: str, side: int, heads: int, dtype: torch.dtype) -> None:
        """Take a step that does not count."""
        self.method = method
        self.inputs = AttentionInputs(side, heads, dtype, torch.device("cpu"))
        self.memory_before = reset_peak_memory()
        time_step(self.inputs, method)

    @classmethod
    def start(cls, *arguments: Any) -> None:
        """Make the one of this process."""
        cls.current = cls(*arguments)

    @classmethod
    def step(cls) -> tuple[float, int]:
        """Take a step: its seconds, and the growth of the resident peak so far in bytes."""
        seconds = time_step(cls.current.inputs, cls.current.method)
        return seconds, peak_memory_bytes() - cls.current.memory_before


def measure_on_cpu(side: int, heads: int, dtype: torch.dtype, rounds: int) -> dict[str, JsonObject]:
    """Measure all ways that run on a CPU in turns, each in a process of its own.

    PyTorch has FlexAttention's backward pass for GPUs only.
    """
    measurements: dict[str, JsonObject] = {}
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        executors: dict[str, ProcessPoolExecutor] = {}
        for method in METHODS:
            executors[method] = stack.enter_context(ProcessPoolExecutor(1, context))
            executors[method].submit(WarmAttention.start, method, side, heads, dtype).result()
            measurements[method] = {"seconds": [], "peak_bytes": 0}
        for _ in range(rounds):
            for method, executor in executors.items():
                seconds, peak_bytes = executor.submit(WarmAttention.step).result()
                measurements[method]["seconds"].append(seconds)
                measurements[method]["peak_bytes"] = peak_bytes
    return measurements


def list_comparisons(result: JsonObject) -> list[Comparison]:
    """List time and memory of every way over the number of patches."""
    seconds, memory = Repetitions(), Repetitions()
    for row in result["rows"]:
        for method, measurement in row["ways"].items():
            if measurement["seconds"] is not None:
                label, at = _METHOD_LABELS[method], row["patches"]
                seconds.add(label, measurement["seconds"], at)
                memory.add(label, measurement["peak_bytes"] / 1e9, at)
    shared: dict[str, Any] = {"plot": "lines", "at_label": "patches"}
    return [
        Comparison(
            "Attention, forward and backward",
            "s",
            seconds.to_measurements(),
            baseline=_METHOD_LABELS["plain"],
            **shared,
        ),
        Comparison("Memory of attention", "GB", memory.to_measurements(), **shared),
    ]


def write_text(result: JsonObject) -> str:
    """Write the circumstances, and which ways failed."""
    failures: list[str] = []
    for row in result["rows"]:
        for method, measurement in row["ways"].items():
            if measurement["seconds"] is None:
                label, reason = _METHOD_LABELS[method], measurement["why"]
                failures.append(f"- {row['patches']} patches, {label}: {reason}\n")
    return (
        f"{result['heads']} heads of {CHANNELS} channels, {result['dtype']}, {SLICES} slices; "
        f"up to {result['rounds']} rounds; memory is what comes beyond the inputs.\n"
        + "".join(["\n", *failures] if failures else [])
    )


PROGRAM = Program(
    "attention", "Attention with slice bias and region prior", write_text, list_comparisons
)


@quiet_main
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parse_arguments(arguments)
    heads, rounds = options.heads, options.rounds
    dtype = getattr(torch, options.dtype)
    start_seconds = time.monotonic()
    rows: list[JsonObject] = []
    for side in options.sides:
        if torch.cuda.is_available():
            measurements = measure_on_gpu(side, heads, dtype, rounds)
        else:
            measurements = measure_on_cpu(side, heads, dtype, rounds)
        rows.append({"patches": SLICES * side * side, "ways": measurements})
    facts = {
        "versions": {"torch": torch.__version__},
        "heads": heads,
        "dtype": options.dtype,
        "rounds": rounds,
        "rows": rows,
    }
    publish_result(options.out, PROGRAM, arguments, start_seconds, facts)
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    has_gpu = torch.cuda.is_available()
    parser = make_parser("attention", "Attention with slice bias and region prior, several ways.")
    sides = [16, 24, 32] if has_gpu else [8, 12, 16]
    parser.add_argument(
        "--sides",
        type=positive_int,
        nargs="+",
        default=sides,
        help=f"patches a row (default {sides})",
    )
    parser.add_argument("--heads", type=positive_int, default=12)
    parser.add_argument(
        "--rounds", type=positive_int, default=10 if has_gpu else 3, help="measurements of each way"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16" if has_gpu else "float32"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
