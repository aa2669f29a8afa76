"""Choice of the labeler that reads the findings of reports: the rules, or a trained classifier."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from rectvlm.labels import DEFAULT_CONVENTION, LabelConvention
from rectvlm.metrics.report_labeler.rule_labeler import RuleLabeler


class ReportLabeler(Protocol):
    """Reads findings from reports."""

    signature: str
    """Name and settings of the labeler, for the metrics."""

    def label_reports(self, reports: Sequence[str]) -> NDArray[np.int8]:
        """States of the findings, (N, 18): values of `FindingState` in the order of `FINDINGS`."""


def load_labeler(
    labeler: "str | Path | ReportLabeler" = "rules",
    convention: LabelConvention = DEFAULT_CONVENTION,
) -> ReportLabeler:
    """Load a labeler by name.

    Args:
        labeler: `rules`, the folder or hub id of a sequence classifier with 18 labels, or a
            labeler, which is returned as it is.
        convention: convention of the rules; a classifier has that of its training labels.

    Raises:
        UserError: The classifier cannot be loaded, or its labels are not the 18 findings.
    """
    if not isinstance(labeler, str | Path):
        return labeler
    if str(labeler) == "rules":
        return RuleLabeler(convention)
    # Transformers takes seconds to import.
    from rectvlm.metrics.report_labeler.classifier_labeler import ClassifierLabeler

    return ClassifierLabeler(labeler)
