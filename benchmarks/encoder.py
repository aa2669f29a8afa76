"""Encoder and localizer, forward and backward: seconds and TFLOP/s beside a matrix product's rate.

    python -m benchmarks.encoder [--config large] [--parts encoder localizer]
        [--grids 32x256x256 64x512x512] [--micro-batch 1] [--rounds 5]

Plain PyTorch runs in bfloat16, as the engine trains, on a random CT of the configuration's grid.
Floating-point operations are those that PyTorch counts in one forward and backward pass without
recomputation (`flop_counter`). What checkpointing or a fused kernel computes twice counts once, and
the channels that carry the biases of the encoder's attention not at all, so the share is of useful
work; a column of its own shows it with them. The matrix product is square, in bfloat16, of 8192
rows on a GPU and 2048 elsewhere.
"""

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attention
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.machine_limits import measure_matrix_rate
from benchmarks.measurements import Comparison, Repetitions, make_table
from benchmarks.publishing import (
    Program,
    add_config_options,
    make_parser,
    positive_int,
    publish_result,
    quiet_main,
)
from benchmarks.timing import default_device, synchronized_time
from rectvlm.config import Config, load_config
from rectvlm.labels import N_FINDINGS, N_LESIONS, N_REGIONS
from rectvlm.models.attention import SliceRegionAttention
from rectvlm.models.image_features import ImageFeatures
from rectvlm.models.localizer import LesionLocalizer
from rectvlm.models.prompt_embeddings import PromptEmbeddings
from rectvlm.models.slice_region_encoder import SliceRegionEncoder
from rectvlm.train.engine.peak_memory import peak_memory_bytes, reset_peak_memory
from rectvlm.types import JsonObject

PARTS = ("encoder", "localizer")
TEXT_WIDTH = 768


class NoiseBatch:
    """A batch of noise on the grid of a configuration."""

    def __init__(self, config: Config, micro_batch: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (micro_batch, *config.data.grid)
        ct = torch.randint(-1024, 600, shape, generator=generator, dtype=torch.int16)
        regions = torch.randint(0, N_REGIONS + 1, shape, generator=generator, dtype=torch.uint8)
        self.ct, self.regions = ct.to(device), regions.to(device)
        self.regions_known = torch.ones(micro_batch, dtype=torch.bool, device=device)
        counts = (N_FINDINGS, N_FINDINGS, N_LESIONS)
        self.prompts = PromptEmbeddings(*(torch.randn(n, TEXT_WIDTH) for n in counts)).to(device)
        z, y, x = (n // p for n, p in zip(config.data.grid, config.encoder.patch, strict=True))
        levels, width = 1 + len(config.encoder.tap_blocks), config.encoder.width

        def random_leaf(*size: int) -> Tensor:
            leaf = torch.randn(micro_batch, *size, device=device, dtype=torch.bfloat16)
            return leaf.requires_grad_()

        patches = random_leaf(z * y * x, width)
        self.features = ImageFeatures(
            random_leaf(width),
            patches,
            random_leaf(N_REGIONS, width),
            (z, y, x),
            random_leaf(z * y * x, width * levels),
        )


def build_part(part: str, config: Config, checkpointing: bool) -> nn.Module:
    """Build a part with random weights, in bfloat16."""
    torch.manual_seed(0)
    encoder = config.encoder.model_copy(update={"activation_checkpointing": checkpointing})
    if part == "encoder":
        return SliceRegionEncoder(encoder, config.data).bfloat16()
    localizer = config.localizer.model_copy(update={"activation_checkpointing": checkpointing})
    return LesionLocalizer(localizer, config.data, encoder, TEXT_WIDTH).bfloat16()


def run_forward(part: str, module: nn.Module, inputs: NoiseBatch) -> Tensor:
    """Run a forward pass, to a scalar."""
    if part == "encoder":
        features = module(inputs.ct, inputs.regions, inputs.regions_known)
        global_square = features.global_token.float().square().mean()
        return global_square + features.multilevel_patches.float().square().mean()
    outputs = module(inputs.ct, inputs.features, inputs.prompts)
    return (
        outputs.mask_logits.square().mean()
        + outputs.half_mask_logits.square().mean()
        + outputs.patch_logits.square().mean()
        + outputs.denoising_loss
    )


def count_flops(part: str, config: Config, micro_batch: int, folded: bool) -> int:
    """Count the FLOPs of a forward and a backward pass without recomputation, on the meta device.

    Args:
        part: one of `PARTS`.
        config: the configuration, for the sizes.
        micro_batch: number of samples.
        folded: whether the encoder's attention counts with the channels that carry its biases, as
            it is computed; else as the formula has it, whose biases are additions.
    """
    device = torch.device("meta")
    with device:
        module = build_part(part, config, checkpointing=False).train()
    plain = patch.object(
        SliceRegionAttention, "_attend_with_biases", lambda _, q, k, v, *biases: attention(q, k, v)
    )
    with nullcontext() if folded else plain, FlopCounterMode(display=False) as counter:
        run_forward(part, module, NoiseBatch(config, micro_batch, device)).backward()
    return counter.get_total_flops()


def measure_part(
    part: str, config: Config, micro_batch: int, rounds: int, checkpointing: bool
) -> JsonObject:
    """Measure seconds forward and backward by round, and peak memory.

    The seconds are None where the part does not fit.
    """
    device = default_device()
    module = build_part(part, config, checkpointing).to(device).train()
    inputs = NoiseBatch(config, micro_batch, device)
    forward: list[float] = []
    backward: list[float] = []
    fits = True
    try:
        for turn in range(rounds + 1):
            module.zero_grad(set_to_none=True)
            start_seconds = synchronized_time(device)
            loss = run_forward(part, module, inputs)
            forward_end = synchronized_time(device)
            loss.backward()
            backward_end = synchronized_time(device)
            if turn == 0:  # it warms up
                reset_peak_memory()
                continue
            forward.append(forward_end - start_seconds)
            backward.append(backward_end - forward_end)
    except torch.OutOfMemoryError:
        fits = False
    return {
        "part": part,
        "checkpointing": checkpointing,
        "forward": forward if fits else None,
        "backward": backward if fits else None,
        "peak_bytes": peak_memory_bytes(),
    }


def list_comparisons(result: JsonObject) -> list[Comparison]:
    """List time, share of the matrix rate and memory of every part over the number of patches."""
    seconds, shares, memory = Repetitions(), Repetitions(), Repetitions()
    rate = result["matrix_flops_per_second"]
    for row in result["rows"]:
        if row["forward"] is None:
            continue
        case = row["part"] + (", checkpointing" if row["checkpointing"] else "")
        steps = [sum(passes) for passes in zip(row["forward"], row["backward"], strict=True)]
        at = row["patches"]
        seconds.add(case, steps, at)
        shares.add(case, [row["flops"] / step / rate for step in steps], at)
        memory.add(case, row["peak_bytes"] / 1e9, at)
    shared: dict[str, Any] = {"plot": "lines", "at_label": "patches"}
    return [
        Comparison(
            "Encoder and localizer, forward and backward", "s", seconds.to_measurements(), **shared
        ),
        Comparison(
            "Share of a matrix product's rate in useful work",
            "of the rate",
            shares.to_measurements(),
            better="higher",
            **shared,
        ),
        Comparison("Memory of encoder and localizer", "GB", memory.to_measurements(), **shared),
    ]


def write_text(result: JsonObject) -> str:
    """Write circumstances and a table by pass."""
    rate = result["matrix_flops_per_second"]
    columns = ["part", "patches", "checkpointing", "forward s", "backward s", "TFLOP", "TFLOP/s"]
    columns += ["of the matrix product", "with the folded channels", "peak GB"]
    rows: list[list[str]] = []
    for measurement in result["rows"]:
        cells = [measurement["part"], str(measurement["patches"])]
        cells.append("yes" if measurement["checkpointing"] else "no")
        if measurement["forward"] is None:
            rows.append([*cells, "out of memory", "", "", "", "", "", ""])
            continue
        forward = statistics.median(measurement["forward"])
        backward = statistics.median(measurement["backward"])
        flops_per_second = measurement["flops"] / (forward + backward)
        share = flops_per_second / rate
        folded_share = share * measurement["folded_flops"] / measurement["flops"]
        cells += [f"{forward:.3f}", f"{backward:.3f}", f"{measurement['flops'] / 1e12:.2f}"]
        cells += [f"{flops_per_second / 1e12:.2f}", f"{share:.0%}", f"{folded_share:.0%}"]
        rows.append([*cells, f"{measurement['peak_bytes'] / 1e9:.2f}"])
    return (
        f"Configuration {result['config']}, micro-batch {result['micro_batch']}, bfloat16, median "
        f"of {result['rounds']}. A square bfloat16 matrix product does {rate / 1e12:.2f} TFLOP/s "
        "here.\n\n" + make_table(columns, rows)
    )


PROGRAM = Program("encoder", "Encoder and localizer", write_text, list_comparisons)


@quiet_main
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parse_arguments(arguments)
    start_seconds = time.monotonic()
    config = load_config(options.config, options.overrides)
    micro_batch = options.micro_batch
    rows: list[JsonObject] = []
    for grid, part in itertools.product(options.grids or [config.data.grid], options.parts):
        sized = load_config(options.config, [*options.overrides, f"data.grid={list(grid)}"])
        facts_of_part = {
            "grid": grid,
            "patches": math.prod(grid) // math.prod(config.encoder.patch),
            "flops": count_flops(part, sized, micro_batch, folded=False),
            "folded_flops": count_flops(part, sized, micro_batch, folded=True),
        }
        for checkpointing in (False, True):
            row = measure_part(part, sized, micro_batch, options.rounds, checkpointing)
            rows.append(row | facts_of_part)
    facts = {
        "versions": {"torch": torch.__version__},
        "config": config.name,
        "micro_batch": micro_batch,
        "rounds": options.rounds,
        "matrix_flops_per_second": max(measure_matrix_rate(torch.bfloat16, default_device())),
        "rows": rows,
    }
    publish_result(options.out, PROGRAM, arguments, start_seconds, facts)
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("encoder", "Encoder and localizer, forward and backward.")
    add_config_options(parser, "demo")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--grids",
        type=_parse_grid,
        nargs="+",
        metavar="ZxYxX",
        help="grids in voxels, instead of the configuration's",
    )
    parser.add_argument("--micro-batch", type=positive_int, default=1)
    parser.add_argument("--rounds", type=positive_int, default=5, help="measurements (default 5)")
    return parser.parse_intermixed_args(arguments)


def _parse_grid(text: str) -> tuple[int, ...]:
    grid = tuple(positive_int(side) for side in text.split("x"))
    if len(grid) != 3:
        raise argparse.ArgumentTypeError(f"expected three sides as 16x48x48, not {text!r}")
    return grid


if __name__ == "__main__":
    sys.exit(main())
