"""Generated reports beside their control without the image: figures, differences and paired intervals."""

import logging
from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rectvlm import metrics, pretrained
from rectvlm.config import Config
from rectvlm.evaluate.scans import ScanResults
from rectvlm.metrics import ReportStatistics
from rectvlm.metrics.bootstrap import ResampleWeights, iterate_chunks, percentile_interval
from rectvlm.metrics.report_labeler.labeler import ReportLabeler
from rectvlm.types import UserError

log = logging.getLogger(__name__)

FloatArray = NDArray[np.floating[Any]]


def evaluate_reports(
    scans: ScanResults, config: Config, labeler: ReportLabeler, drawn: ResampleWeights | None
) -> dict[str, Any]:
    """`image`, `image_ablated` and `difference`: the first minus the second, on the same resamples of the patients.

    Args:
        scans: of the evaluation.
        config: names the encoder of BERTScore.
        labeler: reads findings in the texts.
        drawn: (R, N) resamples of the N scans with a generated report; None for no intervals.
    """
    numbers, volumes = scans.select_report_cases()
    references = [one.reference for one in volumes]
    texts = {
        "image": [one.generated or "" for one in volumes],
        "image_ablated": [one.without_image or "" for one in volumes],
    }
    labels, known = scans.labels[numbers], scans.known[numbers]
    encoder = resolve_bertscore_encoder(config)
    result: dict[str, Any] = {}
    samples: dict[str, dict[str, FloatArray]] = {}
    for name, generated in texts.items():
        rows = metrics.compute_report_statistics(
            generated, references, encoder, labels=labels, known=known, labeler=labeler
        )
        result[name] = metrics.summarize_reports(rows) | {"scores": metrics.headline_scores(rows)}
        if drawn is not None:
            samples[name] = resample_report_scores(rows, drawn)
            result[name]["ci95"] = _score_intervals(samples[name], result[name]["scores"])
    result["difference"] = _score_differences(result, samples)
    return result


def resample_report_scores(rows: ReportStatistics, drawn: ResampleWeights) -> dict[str, FloatArray]:
    """Each figure of `report_scores` in each resample (R,), NaN where it has none.

    Counts add up and means are weighted, so that a resample is one row of sums, whatever the number of cases.

    Args:
        rows: N cases.
        drawn: (R, N).
    """
    found: list[dict[str, float | None]] = []
    columns = {f.name: getattr(rows, f.name) for f in fields(rows)}
    counts = {
        name: a for name, a in columns.items() if isinstance(a, np.ndarray) and a.dtype == np.int64
    }
    means = {
        name: a
        for name, a in columns.items()
        if isinstance(a, np.ndarray) and a.dtype == np.float64
    }
    has = rows.has_reference
    for some in iterate_chunks(drawn):
        referenced = some @ has
        sums = {name: np.tensordot(some, a, axes=1).astype(np.int64) for name, a in counts.items()}
        averages = {
            name: (some @ np.where(has, a, 0)) / np.maximum(referenced, 1)
            for name, a in means.items()
        }
        for i in range(len(some)):
            one: dict[str, Any] = {name: a[i : i + 1] for name, a in (sums | averages).items()}
            found.append(
                metrics.headline_scores(
                    replace(rows, has_reference=referenced[i : i + 1] > 0, **one)
                )
            )
    names = list(found[0]) if found else []
    return {
        name: np.array([np.nan if row[name] is None else row[name] for row in found])
        for name in names
    }


def _score_intervals(
    samples: dict[str, FloatArray], scores: dict[str, float | None]
) -> dict[str, Any]:
    return {
        name: percentile_interval(samples[name])
        for name, value in scores.items()
        if value is not None
    }


def _score_differences(
    result: dict[str, Any], samples: dict[str, dict[str, FloatArray]]
) -> dict[str, Any]:
    """Image minus control of each figure that both have; intervals of the differences on the same resamples."""
    image, air = result["image"]["scores"], result["image_ablated"]["scores"]
    both = [name for name in image if image[name] is not None and air.get(name) is not None]
    found: dict[str, Any] = {name: image[name] - air[name] for name in both}
    if samples:
        pairs: dict[str, FloatArray] = {
            name: samples["image"][name] - samples["image_ablated"][name] for name in both
        }
        found["ci95"] = _score_intervals(pairs, {name: found[name] for name in both})
    return found


def resolve_bertscore_encoder(config: Config) -> str | None:
    """The text encoder for BERTScore, None where it cannot be had."""
    try:
        return pretrained.resolve_model(config.text.model)
    except UserError as error:
        log.warning("BERTScore is left out: %s", error)
        return None
