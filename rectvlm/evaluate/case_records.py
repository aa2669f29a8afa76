"""Case records: prediction and truth of one volume, reduced to what the metrics need."""

from dataclasses import asdict, dataclass
from typing import Literal

from pydantic import TypeAdapter

from rectvlm.evaluate.native_grid import TruthSource
from rectvlm.metrics.lesions import LesionComparison
from rectvlm.types import JsonObject

CasePurpose = Literal["fit", "neighbor", "evaluate"]
"""Use of a case: `fit` is a case of the dev or train split on which thresholds are fitted;
`neighbor` one of the train split whose report stands for an evaluated case with like features."""


@dataclass(frozen=True)
class LesionRecord:
    """One annotated lesion of a case."""

    native: LesionComparison
    """Comparison on the native grid, in mm."""
    grid: tuple[int, int, int]
    """Voxels in the intersection, the prediction and the truth on the model's grid."""
    truth: TruthSource
    """Place where the true outline was read."""
    source: str
    """Who or what drew the true outline, in the words of `SampleMeta.lesions_source`."""


@dataclass(frozen=True)
class CaseRecord:
    """One volume of an evaluation; a line of `cases.jsonl`."""

    purpose: CasePurpose
    position: int
    """Number of the case in its split."""
    key: str
    scan: str
    patient: str
    probabilities: list[float]
    """Predicted probabilities of the findings, (18,)."""
    labels: list[int | None]
    """Labels of the findings, (18,), None where unknown."""
    lesions: list[LesionRecord | None]
    """Five lesions, None where not annotated; empty where the model has no localizer."""
    reference: str | None
    """Report of the radiologist."""
    generated: str | None
    """Report of the model; None where no report was asked for."""
    without_image: str | None
    """Report of the model on a volume of air."""
    regions: str | None
    """Source of the region map that the model was given; None where it had none."""
    features: list[float] | None = None
    """Global token of the encoder, (C,); None where no reports are evaluated."""

    def as_dict(self) -> JsonObject:
        """Tree for JSON."""
        return asdict(self)


CASE_RECORD_ADAPTER = TypeAdapter(CaseRecord)
