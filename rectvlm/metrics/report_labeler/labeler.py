"""Which labeler reads the findings of reports: the rules of this project, or a trained classifier."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rectvlm.metrics.report_labeler.rule_labeler import RuleLabeler


class ReportLabeler(Protocol):
    """Reads findings from reports."""

    signature: str
    """Which labeler, for the metrics."""

    def label_reports(self, reports: Sequence[str]) -> NDArray[np.int8]:
        """States (N, 18), values of `State`, in the order of `labels.FINDINGS`."""


def load_labeler(labeler: "str | Path | ReportLabeler" = "rules") -> ReportLabeler:
    """The labeler of a name: `rules`, or the folder or hub id of a sequence classifier with 18 labels.

    Raises:
        UserError: the classifier cannot be loaded, or its labels are not the 18 findings.
    """
    if not isinstance(labeler, str | Path):
        return labeler
    if str(labeler) == "rules":
        return RuleLabeler()
    from rectvlm.metrics.report_labeler.classifier_labeler import (
        ClassifierLabeler,  # Transformers takes seconds to import
    )

    return ClassifierLabeler(labeler)
