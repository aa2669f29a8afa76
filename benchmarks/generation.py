"""Generation of reports: time to the first token, tokens a second, batch sizes.

    python -m benchmarks.generation [--config large] [--batch 1 4 16] [--tokens 64] [--rounds 3]

The report generator has its language model's true geometry and random weights, as in
`benchmarks.report_step`, and reads random image features. Decoding is greedy and never ends before
`--tokens`, so every row has the same length. The first token's time is that of resampler, prompt
and one token; tokens a second are those after it, of all rows of a batch. Batch sizes take turns.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit

from benchmarks.measurements import Comparison, Repetitions
from benchmarks.publishing import (
    Program,
    add_config_options,
    make_parser,
    positive_int,
    publish_result,
    quiet_main,
)
from benchmarks.report_step import build_generator, make_features
from benchmarks.timing import default_device, synchronized_time
from rectvlm.config import Config, load_config
from rectvlm.machine import package_versions
from rectvlm.models.report_generator import ReportGenerator
from rectvlm.train.engine.peak_memory import peak_memory_bytes, reset_peak_memory
from rectvlm.types import JsonObject, UserError

VALIDATION_REPORTS = 3039
"""Volumes of CT-RATE's validation split."""
_CUES = "Findings suggested:" + " nodule" * 30


def time_generation(
    generator: ReportGenerator, config: Config, batch: int, tokens: int, device: torch.device
) -> float:
    """Return the seconds in which a batch of reports of a length is written."""
    features = make_features(config, batch, device)
    start_seconds = synchronized_time(device)
    generator.generate_reports(features, [_CUES] * batch, tokens, min_new_tokens=tokens)
    return synchronized_time(device) - start_seconds


def measure_generation(
    config: Config, layers: int | None, batches: Sequence[int], tokens: int, rounds: int
) -> list[JsonObject]:
    """Measure every batch size in turns, after one turn that warms up.

    Raises:
        UserError: a batch does not fit into memory.
    """
    device = default_device()
    generator, _ = build_generator(config, layers, device)
    for module in generator.modules():
        if isinstance(module, Linear4bit):
            # In eval mode it would repack its weights, and count that as the first token.
            module.support_avx512bf16_for_cpu = False
    generator.eval()
    rows: dict[int, JsonObject] = {}
    for batch in batches:
        rows[batch] = {"batch": batch, "first_token_seconds": [], "seconds": [], "peak_bytes": 0}
    for turn in range(rounds + 1):
        for batch, row in rows.items():
            reset_peak_memory()
            try:
                first_seconds = time_generation(generator, config, batch, 1, device)
                seconds = time_generation(generator, config, batch, tokens, device)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"A batch of {batch} reports needs more memory than {device} has: name smaller "
                    "ones with --batch."
                ) from error
            if turn:  # the first turn warms up
                row["first_token_seconds"].append(first_seconds)
                row["seconds"].append(seconds)
                row["peak_bytes"] = max(row["peak_bytes"], peak_memory_bytes())
    return list(rows.values())


def compute_rates(row: JsonObject, tokens: int) -> list[float]:
    """Tokens a second after the first, of all rows of the batch, by round."""
    rates: list[float] = []
    for first, total in zip(row["first_token_seconds"], row["seconds"], strict=True):
        rates.append(row["batch"] * (tokens - 1) / max(total - first, 1e-9))
    return rates


def list_comparisons(result: JsonObject) -> list[Comparison]:
    """List the first token's time, tokens a second and memory over the batch size."""
    first, rates, memory = Repetitions(), Repetitions(), Repetitions()
    for row in result["rows"]:
        at = row["batch"]
        first.add("first token", row["first_token_seconds"], at)
        rates.add("all rows", compute_rates(row, result["tokens"]), at)
        memory.add("peak", row["peak_bytes"] / 1e9, at)
    shared: dict[str, Any] = {"plot": "lines", "at_label": "batch"}
    return [
        Comparison("Time to the first token", "s", first.to_measurements(), **shared),
        Comparison("Tokens a second", "tokens/s", rates.to_measurements(), "higher", **shared),
        Comparison("Memory of generation", "GB", memory.to_measurements(), **shared),
    ]


def write_text(result: JsonObject) -> str:
    """Write the circumstances, and what the rate means for CT-RATE's validation split."""
    layers = "all layers" if result["layers"] is None else f"{result['layers']} layers"
    best = max(max(compute_rates(row, result["tokens"])) for row in result["rows"])
    hours = VALIDATION_REPORTS * result["max_report_tokens"] / best / 3600
    return (
        f"Geometry of {result['geometry']}, {layers}, {result['quantization']}, random weights; "
        f"{result['tokens']} tokens, {result['rounds']} rounds. At the best rate the "
        f"{VALIDATION_REPORTS} reports of CT-RATE's validation split, of at most "
        f"{result['max_report_tokens']} tokens each, take at most {hours:.2f} h on this device "
        "(computed).\n"
    )


PROGRAM = Program("generation", "Generation of reports", write_text, list_comparisons)


@quiet_main
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parse_arguments(arguments)
    start_seconds = time.monotonic()
    if options.tokens < 2:
        raise UserError("--tokens must be at least 2, to time what follows the first; found 1.")
    config = load_config(options.config, options.overrides)
    rows = measure_generation(config, options.layers, options.batch, options.tokens, options.rounds)
    facts = {
        "versions": package_versions(),
        "config": config.name,
        "geometry": config.generator.model,
        "quantization": config.generator.quantization,
        "max_report_tokens": config.generator.max_report_tokens,
        "layers": options.layers,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "rows": rows,
    }
    publish_result(options.out, PROGRAM, arguments, start_seconds, facts)
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("generation", "Generation of reports.")
    add_config_options(parser, "tiny")
    parser.add_argument(
        "--layers", type=positive_int, metavar="N", help="of the language model, instead of all"
    )
    parser.add_argument("--batch", type=positive_int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=positive_int, default=64, help="length (default 64)")
    parser.add_argument("--rounds", type=positive_int, default=3, help="measurements (default 3)")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
