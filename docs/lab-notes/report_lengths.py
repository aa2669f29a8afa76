"""Padding of reports with and without length buckets; results in `planner.md`.

    python docs/lab-notes/report_lengths.py [--shards DIR] [--config demo]

A global batch is cut into micro-batches in the order of training. Rows of a micro-batch are as long
as its longest, and all ranks wait for the longest row of a round. Without `--shards`, lengths are
drawn from a log-normal distribution with CT-RATE's median of 330 and 95th percentile of 607 word
pieces, cut at 768.
"""

import argparse
import math

import numpy as np

from rectvlm import pretrained
from rectvlm.config import load_config
from rectvlm.data.dataset import ShardDataset
from rectvlm.data.order import TrainOrder
from rectvlm.data.report_text import join_report_sections
from rectvlm.data.shards import read_sample_meta
from rectvlm.models.language_model import load_tokenizer

MEDIAN_TOKENS, P95_TOKENS, MAX_TOKENS = 330, 607, 768
NORMAL_P95 = 1.645
STEPS = 500
CUTS = ((2, 8, 1), (2, 4, 2), (2, 2, 4), (2, 1, 8), (8, 1, 2), (1, 1, 2), (1, 2, 4))
"""Ranks, micro-batch and accumulation."""


def draw_lengths() -> tuple[list[int], list[int]]:
    """Draw report lengths; the sorted quantity is the length itself."""
    sigma = math.log(P95_TOKENS / MEDIAN_TOKENS) / NORMAL_P95
    tokens = np.random.default_rng(0).lognormal(math.log(MEDIAN_TOKENS), sigma, 24_128)
    lengths = [min(MAX_TOKENS, round(count)) for count in tokens]
    return lengths, lengths


def read_lengths(shards: str, size: str) -> tuple[list[int], list[int]]:
    """Read report lengths of shards in tokens, and the bytes that training sorts by."""
    config = load_config(size, [f"data.shards={shards}"])
    dataset = ShardDataset(config.data, "train")
    tokenizer = load_tokenizer(pretrained.resolve_model(config.generator.model))
    tokens, sorted_by = [], []
    for location in dataset.locations:
        meta = read_sample_meta(dataset.store, location)
        report = join_report_sections(meta.findings, meta.impression) or ""
        count = len(tokenizer.encode(report)) + 1
        tokens.append(min(config.generator.max_report_tokens, count))
        sorted_by.append(location.text_bytes)
    return tokens, sorted_by


def measure_cut(
    tokens: list[int], sorted_by: list[int] | None, ranks: int, micro_batch: int, accumulation: int
) -> tuple[float, float]:
    """Share of padding in the rows of all ranks, and length of a step: the sum over its rounds of
    the longest row of any rank, as a multiple of the mean report."""
    orders = []
    for rank in range(ranks):
        order = TrainOrder(
            range(len(tokens)), micro_batch, rank, ranks, 0, 0, accumulation, sorted_by
        )
        orders.append(iter(order))
    used = padded = longest = 0
    for _ in range(STEPS * accumulation):
        rows = [[tokens[number] for number in next(order)] for order in orders]
        used += sum(map(sum, rows))
        padded += sum(micro_batch * max(row) for row in rows)
        longest += max(map(max, rows))
    mean_tokens = used / (STEPS * accumulation * ranks * micro_batch)
    return 1 - used / padded, longest / STEPS / mean_tokens


def main() -> None:
    """Print a row for each cut."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards")
    parser.add_argument("--config", default="demo")
    options = parser.parse_args()
    if options.shards is None:
        tokens, sorted_by = draw_lengths()
    else:
        tokens, sorted_by = read_lengths(options.shards, options.config)
    lines = [
        f"{len(tokens)} reports, median {np.median(tokens):.0f} tokens, longest {max(tokens)}",
        f"rank correlation with what is sorted by: {correlate(tokens, sorted_by):.3f}",
        "ranks × micro-batch × accumulation: padding, length of a step; without, with buckets",
    ]
    for cut in CUTS:
        before, after = measure_cut(tokens, None, *cut), measure_cut(tokens, sorted_by, *cut)
        lines.append(
            f"{cut[0]} × {cut[1]} × {cut[2]}: {before[0]:.1%} → {after[0]:.1%}, "
            f"{before[1]:.2f} → {after[1]:.2f} ({after[1] / before[1] - 1:+.0%})"
        )
    print("\n".join(lines))  # noqa: T201


def correlate(a: list[int], b: list[int]) -> float:
    """Spearman's rank correlation."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


if __name__ == "__main__":
    main()
