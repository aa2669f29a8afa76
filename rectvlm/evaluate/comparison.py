"""Is A better than B? Paired intervals and tests over all figures of two evaluations."""

from dataclasses import asdict, dataclass

import numpy as np

from rectvlm.evaluate.comparison_options import ComparisonOptions
from rectvlm.evaluate.pair_figures import Figures, compute_figures
from rectvlm.evaluate.pairing import EvaluationPair, pair_evaluations
from rectvlm.evaluate.stored_evaluation import StoredEvaluation, read_stored_evaluation
from rectvlm.files import require_writable_file, write_json
from rectvlm.metrics.bootstrap import draw_patient_weights, percentile_interval
from rectvlm.metrics.paired_test import (
    SIGNIFICANCE_LEVEL,
    draw_patient_swaps,
    max_t_p_values,
    randomization_p_values,
    stack_pair_weights,
)
from rectvlm.types import JsonObject, UserError

LOWER_IS_BETTER = frozenset({"ece", "brier", "hd95_mm", "false_positive_ml"})
"""Scores of which the smaller one is the better."""
INTERVAL_METHOD = "percentile bootstrap of the difference, patients drawn (Efron & Tibshirani 1993)"
P_METHOD = "approximate randomization, A and B exchanged by patient (Noreen 1989; Yeh 2000)"
CORRECTION_METHOD = "step-down maxT over all tested figures (Westfall & Young 1993; Ge et al. 2003)"


@dataclass(frozen=True)
class ComparedFigure:
    """One figure of two models."""

    a: float
    b: float
    difference: float
    """A minus B."""
    ci95: list[float] | None
    """95% interval of the difference; None where too few resamples have it."""
    p: float | None
    """p-value of this figure alone; None where an exchange has no value, so that it is not
    tested."""
    p_corrected: float | None
    """p-value after correction for all tested figures."""
    better: str | None
    """`A` or `B` where they differ after correction; None where no difference was found."""


@dataclass(frozen=True)
class ModelComparison:
    """Comparison of models A and B."""

    a: JsonObject
    """File, checkpoint, configuration and step of A."""
    b: JsonObject
    """File, checkpoint, configuration and step of B."""
    split: str
    n_scans: int
    n_patients: int
    n_reports: int
    """Number of scans with a report of both."""
    n_tested: int
    """Number of figures that p-values are corrected for."""
    figures: dict[str, ComparedFigure]
    """Figures by dotted path in `metrics.json`."""
    left_out: dict[str, str]
    """Reasons by group of figures that is not compared."""
    bootstrap: int
    """Number of resamples."""
    permutations: int
    """Number of exchanges."""
    seed: int
    level: float = SIGNIFICANCE_LEVEL
    interval_method: str = INTERVAL_METHOD
    p_method: str = P_METHOD
    correction_method: str = CORRECTION_METHOD

    @property
    def verdict(self) -> str:
        """Answer in one sentence."""
        counts = dict.fromkeys(("A", "B"), 0)
        for figure in self.figures.values():
            if figure.better is not None:
                counts[figure.better] += 1
        tested = f"{self.n_tested} figures, corrected for their number (level {self.level:g})"
        if not any(counts.values()):
            return f"No difference was found in {tested}."
        if not all(counts.values()):
            better, worse = ("A", "B") if counts["A"] else ("B", "A")
            return f"{better} is better than {worse} in {counts[better]} of {tested}."
        return f"A is better in {counts['A']} and B in {counts['B']} of {tested}."

    def as_dict(self) -> JsonObject:
        """Tree for JSON."""
        return {"verdict": self.verdict} | asdict(self)


def compare_evaluations(options: ComparisonOptions) -> ModelComparison:
    """Compare two stored evaluations over all figures that both have.

    Raises:
        UserError: a file is missing or damaged, the evaluations cannot be compared, they have fewer
            than two patients, or the output cannot be written.
    """
    if options.out is not None:
        require_writable_file(options.out)
    pair = pair_evaluations(read_stored_evaluation(options.a), read_stored_evaluation(options.b))
    patients = pair.scans_a.patients
    if len(set(patients)) < 2:
        raise UserError(
            f"{pair.a.path} has scans of {len(set(patients))} patient: expected at least two, "
            "since patients are drawn; evaluate more cases."
        )
    figures = compare_pair(pair, options)
    comparison = ModelComparison(
        a=_describe_model(pair.a),
        b=_describe_model(pair.b),
        split=pair.a.metrics["split"],
        n_scans=len(patients),
        n_patients=len(set(patients)),
        n_reports=len(pair.report_scans),
        n_tested=sum(figure.p is not None for figure in figures.values()),
        figures=figures,
        left_out=pair.left_out,
        bootstrap=options.bootstrap,
        permutations=options.permutations,
        seed=options.seed,
    )
    if options.out is not None:
        write_json(options.out, comparison.as_dict())
    return comparison


def compare_pair(pair: EvaluationPair, options: ComparisonOptions) -> dict[str, ComparedFigure]:
    """Compare A and B over all figures that both have.

    Args:
        pair: evaluations of the same scans.
        options: numbers of resamples and exchanges, and their seed.
    """
    patients = pair.scans_a.patients
    weights_a = stack_pair_weights(
        draw_patient_weights(patients, options.bootstrap, options.seed),
        draw_patient_swaps(patients, options.permutations, options.seed),
    )
    weights_b = np.roll(weights_a, len(patients), axis=1)
    figures_a, figures_b = compute_figures(pair, weights_a), compute_figures(pair, weights_b)
    names = [
        name for name in figures_a if np.isfinite([figures_a[name][0], figures_b[name][0]]).all()
    ]
    return _test_figures(
        {name: figures_a[name] for name in names},
        {name: figures_b[name] for name in names},
        options.bootstrap,
    )


def _test_figures(
    figures_a: Figures, figures_b: Figures, n_resamples: int
) -> dict[str, ComparedFigure]:
    """Intervals and p-values; rows are the point, the resamples, then the exchanges.

    A figure without a value in some exchange is not tested.
    """
    differences = {name: values - figures_b[name] for name, values in figures_a.items()}
    first_exchange = 1 + n_resamples
    tested = []
    for name, values in differences.items():
        if np.isfinite(values[first_exchange:]).all():
            tested.append(name)
    p_by_name: dict[str, float] = {}
    corrected_by_name: dict[str, float] = {}
    if tested:
        columns = np.stack([differences[name] for name in tested], axis=1)
        p_values = randomization_p_values(columns[0], columns[first_exchange:])
        corrected = max_t_p_values(columns[0], columns[first_exchange:])
        p_by_name = dict(zip(tested, p_values.tolist(), strict=True))
        corrected_by_name = dict(zip(tested, corrected.tolist(), strict=True))

    compared = {}
    for name, values in differences.items():
        p_corrected = corrected_by_name.get(name)
        is_different = p_corrected is not None and p_corrected <= SIGNIFICANCE_LEVEL
        compared[name] = ComparedFigure(
            a=float(figures_a[name][0]),
            b=float(figures_b[name][0]),
            difference=float(values[0]),
            ci95=percentile_interval(values[1:first_exchange]),
            p=p_by_name.get(name),
            p_corrected=p_corrected,
            better=_better_model(name, values[0]) if is_different else None,
        )
    return compared


def _better_model(figure: str, difference: float) -> str:
    score = figure.rpartition(".")[2]
    is_a_better = difference < 0 if score in LOWER_IS_BETTER else difference > 0
    return "A" if is_a_better else "B"


def _describe_model(evaluation: StoredEvaluation) -> JsonObject:
    keys = ("checkpoint", "config", "step")
    return {"file": str(evaluation.path)} | {key: evaluation.metrics[key] for key in keys}
