"""Thresholds of the findings: fitted on cases that are not evaluated, kept with the checkpoint."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rectvlm import metrics
from rectvlm.checkpoint import THRESHOLDS
from rectvlm.data.store import atomic_file
from rectvlm.evaluate.cases import CaseRecord
from rectvlm.evaluate.scans import by_scan
from rectvlm.labels import FINDINGS
from rectvlm.metrics import Thresholds
from rectvlm.types import UserError

log = logging.getLogger(__name__)


def read_thresholds(folder: Path) -> dict[str, float] | None:
    """Fitted thresholds of a checkpoint by finding, or None when it was never evaluated.

    Raises:
        UserError: the file is damaged.
    """
    stored = stored_thresholds(folder)
    return None if stored is None else stored.by_finding()


def stored_thresholds(folder: Path) -> Thresholds | None:
    """Thresholds that lie with a checkpoint, and where they came from; None when there are none.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / THRESHOLDS
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text())
        values = np.array([float(found["values"][name]) for name in FINDINGS])
        unfitted = set(found.get("not_fitted", ()))
        fitted = np.array([name not in unfitted for name in FINDINGS])
        return Thresholds(values, fitted, str(found.get("source", "unknown")), int(found.get("n_cases", 0)))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: run `rectvlm evaluate` again, or delete it.") from None


def decide(folder: Path, fitting: Sequence[CaseRecord], shards: str, stored_alone: bool = False) -> Thresholds:
    """Thresholds fitted on some cases; without cases those that lie with the checkpoint, else one half.

    Fitted ones, and halves where there was nothing, are written into the checkpoint's folder if it can be written to.

    Raises:
        UserError: stored thresholds are needed and damaged, or with `stored_alone` not there.
    """
    if fitting:
        scans = by_scan(fitting)
        source = f"maximum F1 on the first {len(scans.patients)} scans of the train split of {shards}"
        thresholds = metrics.fit_thresholds(scans.probabilities, scans.labels, scans.known, source)
    else:
        stored = stored_thresholds(folder)
        if stored is not None:
            return stored
        if stored_alone:
            raise UserError(f"No {THRESHOLDS} in {folder}: evaluate with --thresholds fit first.")
        thresholds = Thresholds.unfitted("0.5 for every finding: the shards hold no train split")
    try:
        with atomic_file(folder / THRESHOLDS) as file:
            file.write((json.dumps(thresholds.as_dict(), indent=2, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        log.warning(
            "Thresholds are in the metrics only, %s cannot be written (%s).", folder / THRESHOLDS, error.strerror
        )
    return thresholds
