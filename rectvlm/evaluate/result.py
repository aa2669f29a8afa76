"""Result of an evaluation: the metrics as `metrics.json` holds them."""

from dataclasses import asdict, dataclass, fields

from rectvlm.evaluate.region_maps import RegionMapUsage
from rectvlm.finding_thresholds import FindingThresholds
from rectvlm.metrics.bootstrap import CONFIDENCE_LEVEL
from rectvlm.types import JsonObject, Split


@dataclass(frozen=True)
class BootstrapSettings:
    """Settings of the confidence intervals."""

    resamples: int
    """Number of resamples, 0 for no intervals."""
    unit: str = "patient"
    """Unit that is drawn."""
    interval: str = "percentile"
    level: float = CONFIDENCE_LEVEL
    seed: int = 0


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics of a checkpoint on a split, and what was measured where."""

    checkpoint: str
    """Folder of the checkpoint."""
    config: str
    """Name of the configuration."""
    step: int
    """Optimizer steps of the checkpoint."""
    shards: str
    """Folder or URL of the shards."""
    labels: str | None
    """Origin of the shards' labels in words; None where their manifest does not say it."""
    split: Split
    threshold_split: Split | None
    """Split of the shards that the thresholds were fitted on: dev, or train where there is no dev,
    or the split of validation for those of the model. None where they were fitted elsewhere."""
    selected_on_this_split: bool | None
    """Whether the checkpoint was chosen on this split; None where that is not known."""
    n_cases: int
    """Number of volumes."""
    region_maps: RegionMapUsage
    """Region maps that the model was given; three keys of the file."""
    n_scans: int
    n_patients: int
    limit: int | None
    """Largest number of cases; None for all."""
    classification: JsonObject
    """Figures of `score_findings`."""
    other_thresholds: JsonObject
    """Figures of `compare_thresholds`: at the model's thresholds (`model`) and at 0.5 (`0.5`)."""
    other_labels: JsonObject | None
    """Figures of `summarize_other_labels`, with file and SHA-256; None without another table."""
    thresholds: FindingThresholds
    localization: JsonObject | None
    """Figures of `summarize_lesions`; None without a localizer."""
    reports: JsonObject | None
    """Figures of `evaluate_reports`; None where no reports were generated."""
    bootstrap: BootstrapSettings
    fingerprint: JsonObject
    """What the case records have in common."""
    machine: JsonObject
    """Description of `describe_machine`."""
    device: str
    processes: int
    """Number of processes."""
    versions: dict[str, str]
    """Versions of the packages that decide a figure."""
    seconds: float
    """Duration of the call, seconds."""

    @property
    def is_fitted_on_split(self) -> bool:
        """Whether thresholds are fitted on the split that is evaluated."""
        return self.split == self.threshold_split

    def as_dict(self) -> JsonObject:
        """Tree for JSON."""
        tree: JsonObject = {}
        for field in fields(self):
            if field.name == "region_maps":
                tree |= self.region_maps.as_dict()
            else:
                tree[field.name] = getattr(self, field.name)
        tree["thresholds"] = self.thresholds.as_dict() | {"same_data": self.is_fitted_on_split}
        tree["bootstrap"] = asdict(self.bootstrap)
        return tree
