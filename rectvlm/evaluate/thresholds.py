"""Thresholds of an evaluation: fitted on other cases, beside those that the model carries."""

from collections.abc import Sequence
from dataclasses import replace

from rectvlm.evaluate.case_records import CaseRecord
from rectvlm.evaluate.region_maps import RegionMapUsage
from rectvlm.evaluate.scans import group_by_scan
from rectvlm.finding_thresholds import (
    DEFAULT_THRESHOLD,
    MIN_CASES_TO_FIT,
    FindingThresholds,
)
from rectvlm.metrics.findings import fit_thresholds


def choose_thresholds(
    model_thresholds: FindingThresholds,
    fit_records: Sequence[CaseRecord],
    cases: str,
    regions_hidden: bool = False,
    fallback: FindingThresholds | None = None,
) -> FindingThresholds:
    """Choose fitted thresholds, else those of `fallback` or of the model.

    A finding with fewer than `MIN_CASES_TO_FIT` known positives or negatives is not fitted. The
    model's threshold of it is 0.5 where training had too few of them, too.

    Args:
        model_thresholds: thresholds that the model carries.
        fit_records: records of the cases to fit on.
        cases: split and shards that these cases come from, in words.
        regions_hidden: whether region maps were kept from the model.
        fallback: thresholds of the findings that are not fitted; None: the model's.
    """
    unfitted = fallback or model_thresholds
    if not fit_records:
        return unfitted
    scans = group_by_scan(fit_records)
    region_maps = RegionMapUsage.from_records(fit_records, regions_hidden)
    source = f"maximum F1 on the first {len(scans.patients)} scans of the {cases}"
    fitted = fit_thresholds(
        scans.probabilities, scans.labels, scans.known, source, MIN_CASES_TO_FIT
    )
    if fitted.not_fitted:
        kept = "the model's" if fallback is None else f"{DEFAULT_THRESHOLD:g}"
        source += f"; {kept} for {', '.join(fitted.not_fitted)}"
    source += f"; region maps: {region_maps}"
    return unfitted.replace_fitted(replace(fitted, source=source))
