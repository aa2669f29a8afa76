"""A linear probe: logistic regression of each finding on frozen features.

Features are standardized on the training cases. One C for all findings is the one with the best
macro AUROC on a fifth of the training patients, whom the fit for it has not seen; thresholds are
fitted on them too. The probe is then fitted on all training cases and scored on another split.

Shapes: N CTs, C channels, F findings (18).
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupShuffleSplit
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from rectvlm.embed.features import FeatureTable, join_tables, read_features
from rectvlm.embed.options import ProbeOptions
from rectvlm.evaluate.case_records import CaseRecord
from rectvlm.evaluate.result import BootstrapSettings
from rectvlm.evaluate.scans import ScanResults, group_by_scan
from rectvlm.evaluate.score_format import format_score
from rectvlm.files import require_writable_file, write_json
from rectvlm.finding_thresholds import FindingThresholds
from rectvlm.labels import N_FINDINGS
from rectvlm.machine import package_versions
from rectvlm.metrics.arrays import BoolArray
from rectvlm.metrics.bootstrap import draw_patient_weights
from rectvlm.metrics.findings import fit_thresholds, score_findings
from rectvlm.types import JsonObject, UserError

log = logging.getLogger(__name__)

C_VALUES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Inverse strengths of the L2 penalty that are tried."""
SELECTION_SHARE = 0.2
"""Share of the training patients on whom C and the thresholds are chosen."""
MAX_ITERATIONS = 1000
MIN_PATIENTS = 5
"""Smallest number of training patients that can be split."""


@dataclass(frozen=True)
class ProbeResult:
    """Scores of a linear probe; the keys of its JSON file."""

    features: list[str]
    """Files of the features."""
    encoder: str
    """Encoder of the features, in words."""
    channels: int
    """Channels of a feature."""
    split: str
    """Split that was scored."""
    n_train: int
    """Number of training CTs."""
    n_train_patients: int
    n_scans: int
    """Number of scored scans; reconstructions of one scan count once."""
    n_patients: int
    """Number of scored patients."""
    c: float
    """Chosen inverse strength of the L2 penalty."""
    macro_auroc_by_c: dict[str, float | None]
    """Macro AUROC on the training patients who chose C."""
    not_fitted: list[str]
    """Findings without both classes among the training labels; they are not scored."""
    classification: JsonObject
    """Figures of `score_findings`."""
    thresholds: FindingThresholds
    bootstrap: BootstrapSettings
    versions: dict[str, str]
    """Versions of the packages that decide a figure."""

    def as_dict(self) -> JsonObject:
        """Tree for JSON."""
        return asdict(self) | {"thresholds": self.thresholds.as_dict()}


class LinearProbe:
    """One logistic regression a finding."""

    def __init__(self, table: FeatureTable, c: float) -> None:
        """Fit on all rows of a table, each finding on those whose label is known.

        Args:
            table: training cases.
            c: inverse strength of the L2 penalty.
        """
        self.models: list[Pipeline | None] = []
        for i in range(N_FINDINGS):
            known = ~np.isnan(table.labels[:, i])
            truth = table.labels[known, i] > 0.5
            if not truth.any() or truth.all():
                self.models.append(None)
                continue
            model = make_pipeline(
                StandardScaler(), LogisticRegression(C=c, max_iter=MAX_ITERATIONS)
            )
            self.models.append(model.fit(table.features[known], truth))

    def predict(self, features: NDArray[np.float32]) -> NDArray[np.float64]:
        """Probabilities (N, F); 0.5 for a finding that could not be fitted."""
        probabilities = np.full((len(features), N_FINDINGS), 0.5)
        for i, model in enumerate(self.models):
            if model is not None:
                probabilities[:, i] = model.predict_proba(features)[:, 1]
        return probabilities

    @property
    def is_fitted(self) -> BoolArray:
        """Whether both classes were there to learn each finding from, (F,)."""
        return np.array([model is not None for model in self.models])


def probe_features(options: ProbeOptions) -> ProbeResult:
    """Fit a linear probe on the train split of features, score it on another split, and write the
    scores.

    Args:
        options: files of features, and how it is fitted and measured.

    Raises:
        UserError: a file holds no features, they come from different encoders, a split has no CT,
            too few patients or no labels, a patient is in both splits, or the scores cannot be
            written.
    """
    files = options.features
    require_writable_file(options.output_path)
    table = join_tables([read_features(file) for file in files], files)
    train = _select_split(table, "train", files)
    scored = _select_split(table, options.split, files)
    if options.split != "train":
        _require_disjoint_patients(train, scored, options.split)
    c, macro_auroc_by_c, thresholds = _choose_c(train, options.seed)
    probe = LinearProbe(train, c)

    scans = _group_predictions(scored, probe)
    weights = None
    if len(set(scans.patients)) > 1:
        weights = draw_patient_weights(scans.patients, options.bootstrap, options.seed)
    names = np.array(list(thresholds.by_finding()))
    result = ProbeResult(
        features=[str(file) for file in files],
        encoder=table.encoder,
        channels=table.features.shape[1],
        split=options.split,
        n_train=len(train),
        n_train_patients=len(set(train.patients)),
        n_scans=len(scans.names),
        n_patients=len(set(scans.patients)),
        c=c,
        macro_auroc_by_c=macro_auroc_by_c,
        not_fitted=names[~probe.is_fitted].tolist(),
        classification=score_findings(
            scans.probabilities, scans.labels, scans.known, thresholds.values, weights
        ),
        thresholds=thresholds,
        bootstrap=BootstrapSettings(resamples=options.bootstrap, seed=options.seed),
        versions=package_versions("numpy", "scikit-learn"),
    )
    write_json(options.output_path, result.as_dict())
    return result


def _select_split(table: FeatureTable, split: str, files: Sequence[Path]) -> FeatureTable:
    rows = np.flatnonzero(np.array(table.splits) == split)
    labelled = rows[~np.isnan(table.labels[rows]).all(axis=1)]
    if not len(labelled):
        fault = "no labels" if len(rows) else "no CT"
        raise UserError(
            f"The split {split!r} has {fault} in {', '.join(map(str, files))}: embed shards whose "
            "cases have labels, which `rectvlm embed` writes with their splits."
        )
    return table.select_rows(labelled)


def _require_disjoint_patients(train: FeatureTable, scored: FeatureTable, split: str) -> None:
    shared = sorted(set(train.patients) & set(scored.patients))
    if shared:
        raise UserError(
            f"{len(shared)} patients, such as {shared[0]}, are in train and in {split}, so the "
            "figures would be of cases that the probe has seen: split by patient."
        )


def _choose_c(
    train: FeatureTable, seed: int
) -> tuple[float, dict[str, float | None], FindingThresholds]:
    """The best C, the macro AUROC of each, and thresholds at the best one."""
    n_patients = len(set(train.patients))
    if n_patients < MIN_PATIENTS:
        raise UserError(
            f"The train split has {n_patients} patients with labels: a probe needs at least "
            f"{MIN_PATIENTS}."
        )
    splitter = GroupShuffleSplit(1, test_size=SELECTION_SHARE, random_state=seed)
    fit_rows, selection_rows = next(splitter.split(train.features, groups=train.patients))
    fit, selection = train.select_rows(fit_rows), train.select_rows(selection_rows)
    scans_by_c: dict[float, ScanResults] = {}
    macro_auroc_by_c: dict[str, float | None] = {}
    defaults = FindingThresholds.all_default("").values
    for c in C_VALUES:
        scans = _group_predictions(selection, LinearProbe(fit, c))
        scores = score_findings(scans.probabilities, scans.labels, scans.known, defaults)
        scans_by_c[c] = scans
        macro_auroc_by_c[f"{c:g}"] = scores["macro"]["auroc"]
        log.info("C = %g: macro AUROC %s", c, format_score(scores["macro"]["auroc"]))
    best = max(C_VALUES, key=lambda c: macro_auroc_by_c[f"{c:g}"] or 0.0)
    scans = scans_by_c[best]
    source = f"{len(scans.names)} training scans that chose C"
    return (
        best,
        macro_auroc_by_c,
        fit_thresholds(scans.probabilities, scans.labels, scans.known, source),
    )


def _group_predictions(table: FeatureTable, probe: LinearProbe) -> ScanResults:
    """Probabilities and labels by scan; findings that could not be fitted count as unknown."""
    records = []
    for number, probabilities in enumerate(probe.predict(table.features)):
        labels: list[int | None] = []
        for label, is_fitted in zip(table.labels[number], probe.is_fitted, strict=True):
            labels.append(None if np.isnan(label) or not is_fitted else int(label))
        records.append(
            CaseRecord(
                purpose="evaluate",
                position=number,
                key=table.keys[number],
                scan=table.scans[number],
                patient=table.patients[number],
                probabilities=probabilities.tolist(),
                labels=labels,
                lesions=[],
                reference=None,
                generated=None,
                without_image=None,
                regions=None,
            )
        )
    return group_by_scan(records)
