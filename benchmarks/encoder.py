"""Encoder and localizer, forward and backward: seconds, TFLOP/s, and how near they come to the matrix product's rate.

    python -m benchmarks.encoder [--config large] [--parts encoder localizer] [--micro-batch 1] [--rounds 5]

Plain PyTorch in bfloat16, as the engine trains, on a random CT of the configuration's grid. Floating-point operations
are those that PyTorch counts in one forward and backward pass without recomputation (`flop_counter`): what
checkpointing or a fused kernel computes twice counts once, and the channels that carry the biases of the encoder's
attention not at all, so the share is of useful work; what they add stands in a column of its own. The matrix product
is square, in bfloat16, of 8192 rows on a GPU and 2048 elsewhere. Results go to
benchmarks/results/encoder-MACHINE-DATE.json and .md.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attention
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.publishing import (
    RESULTS_FOLDER,
    make_page_header,
    positive_int,
    publish_result,
    quiet_main,
)
from rectvlm.config import Config, load_config
from rectvlm.labels import N_FINDINGS, N_LESIONS, N_REGIONS
from rectvlm.models.attention import SliceRegionAttention
from rectvlm.models.image_features import ImageFeatures
from rectvlm.models.localizer import LesionLocalizer
from rectvlm.models.prompt_embeddings import PromptEmbeddings
from rectvlm.models.slice_region_encoder import SliceRegionEncoder
from rectvlm.train.engine.peak_memory import peak_memory_bytes, reset_peak_memory

PARTS = ("encoder", "localizer")
TEXT_WIDTH = 768


class NoiseBatch:
    """A batch of noise on the grid of a configuration."""

    def __init__(self, config: Config, micro_batch: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (micro_batch, *config.data.grid)
        self.ct = torch.randint(-1024, 600, shape, generator=generator, dtype=torch.int16).to(
            device
        )
        self.regions = torch.randint(
            0, N_REGIONS + 1, shape, generator=generator, dtype=torch.uint8
        ).to(device)
        self.regions_known = torch.ones(micro_batch, dtype=torch.bool, device=device)
        counts = (N_FINDINGS, N_FINDINGS, N_LESIONS)
        self.prompts = PromptEmbeddings(*(torch.randn(n, TEXT_WIDTH) for n in counts)).to(device)
        z, y, x = (n // p for n, p in zip(config.data.grid, config.encoder.patch, strict=True))
        levels, width = 1 + len(config.encoder.tap_blocks), config.encoder.width

        def features(*size: int) -> Tensor:
            return torch.randn(
                micro_batch, *size, device=device, dtype=torch.bfloat16
            ).requires_grad_()

        patches = features(z * y * x, width)
        self.features = ImageFeatures(
            features(width),
            patches,
            features(N_REGIONS, width),
            (z, y, x),
            features(z * y * x, width * levels),
        )


def build_part(part: str, config: Config, checkpointing: bool) -> nn.Module:
    """A part with random weights, in bfloat16."""
    torch.manual_seed(0)
    encoder = config.encoder.model_copy(update={"activation_checkpointing": checkpointing})
    if part == "encoder":
        return SliceRegionEncoder(encoder, config.data).bfloat16()
    localizer = config.localizer.model_copy(update={"activation_checkpointing": checkpointing})
    return LesionLocalizer(localizer, config.data, encoder, TEXT_WIDTH).bfloat16()


def run_forward(part: str, module: nn.Module, inputs: NoiseBatch) -> Tensor:
    """A forward pass, to a scalar."""
    if part == "encoder":
        features = module(inputs.ct, inputs.regions, inputs.regions_known)
        return (
            features.global_token.float().square().mean()
            + features.multilevel_patches.float().square().mean()
        )
    found = module(inputs.ct, inputs.features, inputs.prompts)
    return (
        found.mask_logits.square().mean()
        + found.half_mask_logits.square().mean()
        + found.patch_logits.square().mean()
        + found.denoising_loss
    )


def count_flops(part: str, config: Config, micro_batch: int, folded: bool) -> int:
    """Floating-point operations of a forward and a backward pass without recomputation, counted on the meta device.

    Args:
        part: of `PARTS`.
        config: sizes.
        micro_batch: samples.
        folded: count the encoder's attention with the channels that carry its biases, as it is computed; else as the
            formula has it, whose biases are additions.
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
) -> dict[str, Any]:
    """Seconds forward and backward by round, and peak memory; seconds are None where it does not fit."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module, inputs = (
        build_part(part, config, checkpointing).to(device).train(),
        NoiseBatch(config, micro_batch, device),
    )
    row: dict[str, Any] = {
        "part": part,
        "checkpointing": checkpointing,
        "forward": [],
        "backward": [],
    }
    try:
        for turn in range(rounds + 1):
            module.zero_grad(set_to_none=True)
            begin = _synchronized_time(device)
            loss = run_forward(part, module, inputs)
            middle = _synchronized_time(device)
            loss.backward()
            end = _synchronized_time(device)
            if turn:  # the first warms up
                row["forward"].append(middle - begin)
                row["backward"].append(end - middle)
            else:
                reset_peak_memory()
    except torch.OutOfMemoryError:
        row |= {"forward": None, "backward": None}
    return row | {"peak_bytes": peak_memory_bytes()}


def _synchronized_time(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_matrix_rate(rounds: int = 10) -> float:
    """FLOP/s of a square bfloat16 matrix product, the best of some."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    product: Callable[[], Tensor] = lambda: a @ b  # noqa: E731
    product()
    best = float("inf")
    for _ in range(rounds):
        begin = _synchronized_time(device)
        product()
        best = min(best, _synchronized_time(device) - begin)
    return 2 * n**3 / best


def to_markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    rate = result["matrix_flops_per_second"]
    lines = [
        make_page_header("Encoder and localizer", "python -m benchmarks.encoder", result),
        f"Configuration {result['config']}: grid {' × '.join(map(str, result['grid']))}, micro-batch "
        f"{result['micro_batch']}, bfloat16, median of {result['rounds']}. A square bfloat16 matrix product does "
        f"{rate / 1e12:.2f} TFLOP/s here.\n\n| part | checkpointing | forward s | backward s | TFLOP | TFLOP/s "
        "| of the matrix product | with the folded channels | peak GB |\n" + "|---" * 9 + "|\n",
    ]
    for row in result["rows"]:
        name = f"| {row['part']} | {'yes' if row['checkpointing'] else 'no'} "
        if row["forward"] is None:
            lines.append(f"{name}| out of memory | | | | | | |\n")
            continue
        forward, backward = statistics.median(row["forward"]), statistics.median(row["backward"])
        done = row["flops"] / (forward + backward)
        lines.append(
            f"{name}| {forward:.3f} | {backward:.3f} | {row['flops'] / 1e12:.2f} | {done / 1e12:.2f} "
            f"| {done / rate:.0%} | {done / rate * row['folded_flops'] / row['flops']:.0%} "
            f"| {row['peak_bytes'] / 1e9:.2f} |\n"
        )
    return "".join(lines)


@quiet_main
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    options = _parse_arguments(arguments)
    begin = time.monotonic()
    config = load_config(options.config, options.overrides)
    rows = []
    for part in options.parts:
        flops, folded = (
            count_flops(part, config, options.micro_batch, folded=one) for one in (False, True)
        )
        for checkpointing in (False, True):
            row = measure_part(part, config, options.micro_batch, options.rounds, checkpointing)
            rows.append(row | {"flops": flops, "folded_flops": folded})
    facts = {
        "versions": {"torch": torch.__version__},
        "config": config.name,
        "grid": config.data.grid,
        "micro_batch": options.micro_batch,
        "rounds": options.rounds,
        "matrix_flops_per_second": measure_matrix_rate(),
        "rows": rows,
    }
    publish_result(options.out, "encoder", begin, facts, to_markdown)
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.encoder", description=(__doc__ or "").split("\n")[0]
    )
    default = "large" if torch.cuda.is_available() else "demo"
    parser.add_argument("--config", default=default, help="default: large on a GPU, else demo")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--micro-batch", type=positive_int, default=1)
    parser.add_argument("--rounds", type=positive_int, default=5, help="measurements (default 5)")
    parser.add_argument("--out", type=Path, default=RESULTS_FOLDER, metavar="DIR")
    parser.add_argument(
        "overrides", nargs="*", metavar="part.field=value", help="changes of the configuration"
    )
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
