"""Attention with slice bias and region prior: the folded form against what else could compute it.

    python -m benchmarks.attention [--sides 8 16] [--heads 12] [--rounds 3] [--dtype float32]

One attention of 16 slices of side × side patches, 12 heads of 64 channels and 20 region tokens runs
forward and backward, to all inputs and to the learned slice bias. The ways to compute it are plain
attention without the biases (the difference is their cost), the folded form of
`rectvlm/models/attention.py`, a dense mask given to the fused call, the formula written out with
its N × N matrices as published code has it, and on a GPU the kernels of cuDNN, which need no padded
values, and FlexAttention. On a CPU each measurement is a process of its own, whose memory is the
growth of its resident peak. Results go to benchmarks/results/attention-MACHINE-DATE.json and .md.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.publishing import (
    CHECKOUT,
    make_page_header,
    make_parser,
    make_table,
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
    """Measure all ways; a way that fails has the reason instead."""
    device = torch.device("cuda")
    measurements: dict[str, JsonObject] = {}
    for method in GPU_METHODS:
        inputs = AttentionInputs(side, heads, dtype, device)
        try:
            measurements[method] = _measure_method_on_gpu(inputs, method, rounds)
        except torch.OutOfMemoryError:
            measurements[method] = _describe_failure("out of memory")
        except RuntimeError as error:
            measurements[method] = _describe_failure(str(error).splitlines()[0][:80])
        del inputs
        torch.cuda.empty_cache()
    return measurements


def _measure_method_on_gpu(inputs: AttentionInputs, method: str, rounds: int) -> JsonObject:
    time_step(inputs, method)  # compiles, and sets libraries up
    warm_seconds = time_step(inputs, method)
    memory_before = reset_peak_memory()
    # What takes minutes is not worth all rounds.
    worthwhile_rounds = max(1, min(rounds, int(MAX_SECONDS_PER_METHOD / warm_seconds)))
    seconds = [time_step(inputs, method) for _ in range(worthwhile_rounds)]
    return {"seconds": seconds, "peak_bytes": peak_memory_bytes() - memory_before}


def _describe_failure(reason: str) -> JsonObject:
    return {"seconds": None, "peak_bytes": None, "why": reason}


def measure_in_process(
    method: str, side: int, heads: int, dtype: torch.dtype, rounds: int
) -> JsonObject:
    """Measure one way on the CPU in this process: seconds, and growth of its resident peak."""
    inputs = AttentionInputs(side, heads, dtype, torch.device("cpu"))
    memory_before = reset_peak_memory()
    seconds = [time_step(inputs, method) for _ in range(rounds + 1)]
    # The first step warms up.
    return {"seconds": seconds[1:], "peak_bytes": peak_memory_bytes() - memory_before}


def measure_on_cpu(side: int, heads: int, dtype: str, rounds: int) -> dict[str, JsonObject]:
    """Measure all ways that run on a CPU, each in a process of its own.

    PyTorch has FlexAttention's backward pass for GPUs only.
    """
    measurements: dict[str, JsonObject] = {}
    size = ("--sides", str(side), "--heads", str(heads))
    settings = ("--dtype", dtype, "--rounds", str(rounds))
    for method in METHODS:
        module = (sys.executable, "-m", "benchmarks.attention")
        command = [*module, "--one", method, *size, *settings]
        process = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
        measurements[method] = json.loads(process.stdout)
    return measurements


def to_markdown(result: JsonObject) -> str:
    """Write the result as a page."""
    script = "python -m benchmarks.attention"
    rows: list[list[str]] = []
    for size_row in result["rows"]:
        patches, measurements = str(size_row["patches"]), size_row["ways"]
        plain_seconds = statistics.median(measurements["plain"]["seconds"] or [math.nan])
        for method, measurement in measurements.items():
            label = _METHOD_LABELS[method]
            if measurement["seconds"] is None:
                rows.append([patches, label, measurement["why"], "", ""])
                continue
            seconds = statistics.median(measurement["seconds"])
            peak_gb = measurement["peak_bytes"] / 1e9
            figures = [f"{seconds:.4f}", f"{seconds / plain_seconds:.2f}", f"{peak_gb:.2f}"]
            rows.append([patches, label, *figures])
    return (
        make_page_header("Attention with slice bias and region prior", script, result)
        + f"{result['heads']} heads of {CHANNELS} channels, {result['dtype']}, {SLICES} slices; "
        f"forward and backward, median of up to {result['rounds']}; memory beyond the inputs.\n\n"
        + make_table(["patches", "way", "seconds", "times plain", "GB"], rows)
    )


@quiet_main
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parse_arguments(arguments)
    heads, rounds = options.heads, options.rounds
    dtype = getattr(torch, options.dtype)
    if options.one:
        measurement = measure_in_process(options.one, options.sides[0], heads, dtype, rounds)
        sys.stdout.write(json.dumps(measurement))
        return 0
    start_seconds = time.monotonic()
    rows: list[JsonObject] = []
    for side in options.sides:
        if torch.cuda.is_available():
            measurements = measure_on_gpu(side, heads, dtype, rounds)
        else:
            measurements = measure_on_cpu(side, heads, options.dtype, rounds)
        rows.append({"patches": SLICES * side * side, "ways": measurements})
    facts = {
        "versions": {"torch": torch.__version__},
        "heads": heads,
        "dtype": options.dtype,
        "rounds": rounds,
        "rows": rows,
    }
    publish_result(options.out, "attention", start_seconds, facts, to_markdown)
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
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
