"""Attention with slice bias and region prior: the folded form against what else could compute it.

    python -m benchmarks.attention [--sides 8 16] [--heads 12] [--rounds 3] [--dtype float32]

One attention of 16 slices of side × side patches, 12 heads of 64 channels and 20 region tokens, forward and backward to
all inputs and to the learned slice bias. Ways: plain attention without the biases (what they cost is the difference),
the folded form of `rectvlm/models/attention.py`, a dense mask given to the fused call, the formula written out with its
N × N matrices as published code has it, and on a GPU the kernels of cuDNN, which need no padded values, and
FlexAttention. On a CPU each measurement is a process of its own, whose memory is the growth of its resident peak.
Results go to benchmarks/results/attention-MACHINE-DATE.json and .md.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.publishing import (
    CHECKOUT,
    RESULTS_FOLDER,
    make_page_header,
    positive_int,
    publish_result,
    quiet_main,
)
from rectvlm.labels import N_REGIONS
from rectvlm.models.attention import SliceRegionAttention
from rectvlm.train.engine.peak_memory import peak_memory_bytes, reset_peak_memory

SLICES, CHANNELS = 16, 64
METHODS = ("plain", "folded", "dense mask", "formula")
GPU_METHODS = (*METHODS, "plain cudnn", "folded cudnn", "folded narrow", "flex")
MAX_SECONDS_PER_METHOD = 2.0
"""Seconds that the rounds of one way may take on a GPU, but for the first."""
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

        def leaf(*shape: int) -> Tensor:
            return torch.randn(1, heads, *shape, dtype=dtype, device=device).requires_grad_()

        keys = 1 + self.patch_count + N_REGIONS
        self.q, self.k, self.v = (
            leaf(1 + self.patch_count, CHANNELS),
            leaf(keys, CHANNELS),
            leaf(keys, CHANNELS),
        )
        self.slice_index = torch.arange(SLICES, device=device).repeat_interleave(side * side)
        self.log_prior = torch.randn(
            1, self.patch_count, N_REGIONS, dtype=dtype, device=device
        ).log_softmax(-1)

    def dense_mask(self) -> Tensor:
        """(1, H, 1 + N, 1 + N + R): both biases, dense."""
        distance = self.slice_index[:, None] - self.slice_index[None] + SLICES - 1
        patches = torch.cat(
            [
                self.module.slice_bias[:, distance],
                self.log_prior.expand(self.module.heads, -1, -1).to(self.module.slice_bias.dtype),
            ],
            dim=-1,
        )
        return F.pad(patches, (1, 0, 1, 0))[None]

    def attend(self, method: str) -> Tensor:
        """(1, H, 1 + N, 64) by one of `WAYS`."""
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

        n, bias, prior, slices = (
            self.patch_count,
            self.module.slice_bias,
            self.log_prior,
            self.slice_index,
        )

        def score(value: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            own, other = slices[(i - 1).clamp(min=0)], slices[(j - 1).clamp(0, n - 1)]
            to_patch = bias[h, own - other + SLICES - 1]
            to_region = prior[b, (i - 1).clamp(min=0), (j - 1 - n).clamp(min=0)]
            added = torch.where(j == 0, 0.0, torch.where(j <= n, to_patch, to_region))
            return value + torch.where(i == 0, 0.0, added)

        global _compiled_flex_attention
        _compiled_flex_attention = _compiled_flex_attention or torch.compile(flex_attention)
        return _compiled_flex_attention(self.q, self.k, self.v, score_mod=score)


_compiled_flex_attention: Callable[..., Any] | None = None


def time_step(example: AttentionInputs, method: str) -> float:
    """Seconds of a forward and a backward pass."""
    for tensor in (example.q, example.k, example.v, example.module.slice_bias):
        tensor.grad = None
    _synchronize(example.q.device)
    begin = time.perf_counter()
    example.attend(method).square().sum().backward()
    _synchronize(example.q.device)
    return time.perf_counter() - begin


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_on_gpu(
    side: int, heads: int, dtype: torch.dtype, rounds: int
) -> dict[str, dict[str, Any]]:
    """All ways; of one that fails, why."""
    device = torch.device("cuda")
    found: dict[str, dict[str, Any]] = {}
    for way in GPU_METHODS:
        example = AttentionInputs(side, heads, dtype, device)
        try:
            time_step(example, way)  # compiles, and sets libraries up
            warm = time_step(example, way)
            before = reset_peak_memory()
            # What takes minutes is not worth all rounds.
            seconds = [
                time_step(example, way)
                for _ in range(max(1, min(rounds, int(MAX_SECONDS_PER_METHOD / warm))))
            ]
            found[way] = {"seconds": seconds, "peak_bytes": peak_memory_bytes() - before}
        except torch.OutOfMemoryError:
            found[way] = {"seconds": None, "peak_bytes": None, "why": "out of memory"}
        except RuntimeError as error:
            found[way] = {
                "seconds": None,
                "peak_bytes": None,
                "why": str(error).splitlines()[0][:80],
            }
        del example
        torch.cuda.empty_cache()
    return found


def measure_in_process(
    method: str, side: int, heads: int, dtype: torch.dtype, rounds: int
) -> dict[str, Any]:
    """One way on the CPU, in this process: seconds, and how much its resident peak grew."""
    example = AttentionInputs(side, heads, dtype, torch.device("cpu"))
    before = reset_peak_memory()
    seconds = [time_step(example, method) for _ in range(rounds + 1)][1:]  # the first warms up
    return {"seconds": seconds, "peak_bytes": peak_memory_bytes() - before}


def measure_on_cpu(side: int, heads: int, dtype: str, rounds: int) -> dict[str, dict[str, Any]]:
    """All ways that are for CPUs too: FlexAttention's backward pass, for one, PyTorch has for GPUs only."""
    found = {}
    for way in METHODS:
        arguments = [
            "--sides",
            str(side),
            "--heads",
            str(heads),
            "--dtype",
            dtype,
            "--rounds",
            str(rounds),
        ]
        command = [sys.executable, "-m", "benchmarks.attention", "--one", way, *arguments]
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
        found[way] = json.loads(done.stdout)
    return found


def to_markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    lines = [
        make_page_header(
            "Attention with slice bias and region prior", "python -m benchmarks.attention", result
        ),
        f"{result['heads']} heads of {CHANNELS} channels, {result['dtype']}, {SLICES} slices; forward and backward, "
        f"median of up to {result['rounds']}; memory beyond the inputs.\n\n"
        "| patches | way | seconds | times plain | GB |\n"
        "|---|---|---|---|---|\n",
    ]
    for row in result["rows"]:
        plain = statistics.median(row["ways"]["plain"]["seconds"] or [math.nan])
        for way, one in row["ways"].items():
            if one["seconds"] is None:
                lines.append(f"| {row['patches']} | {_METHOD_LABELS[way]} | {one['why']} | | |\n")
                continue
            seconds = statistics.median(one["seconds"])
            lines.append(
                f"| {row['patches']} | {_METHOD_LABELS[way]} | {seconds:.4f} | {seconds / plain:.2f} "
                f"| {one['peak_bytes'] / 1e9:.2f} |\n"
            )
    return "".join(lines)


@quiet_main
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    options = _parse_arguments(arguments)
    dtype = getattr(torch, options.dtype)
    if options.one:
        sys.stdout.write(
            json.dumps(
                measure_in_process(
                    options.one, options.sides[0], options.heads, dtype, options.rounds
                )
            )
        )
        return 0
    begin = time.monotonic()
    gpu = torch.cuda.is_available()
    rows = [
        {
            "patches": SLICES * side * side,
            "ways": measure_on_gpu(side, options.heads, dtype, options.rounds)
            if gpu
            else measure_on_cpu(side, options.heads, options.dtype, options.rounds),
        }
        for side in options.sides
    ]
    facts = {
        "versions": {"torch": torch.__version__},
        "heads": options.heads,
        "dtype": options.dtype,
        "rounds": options.rounds,
        "rows": rows,
    }
    publish_result(options.out, "attention", begin, facts, to_markdown)
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention", description=(__doc__ or "").split("\n")[0]
    )
    sides = [16, 24, 32] if gpu else [8, 12, 16]
    parser.add_argument(
        "--sides",
        type=positive_int,
        nargs="+",
        default=sides,
        help=f"patches a row (default {sides})",
    )
    parser.add_argument("--heads", type=positive_int, default=12)
    parser.add_argument(
        "--rounds", type=positive_int, default=10 if gpu else 3, help="measurements of each way"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="bfloat16" if gpu else "float32"
    )
    parser.add_argument("--out", type=Path, default=RESULTS_FOLDER, metavar="DIR")
    parser.add_argument("--one", choices=METHODS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
