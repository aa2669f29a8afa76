"""Metrics of generated reports: words, findings, sides, sizes (`docs/concepts/report-metrics.md`).

`compute_report_statistics` reads the texts once and keeps what each case contributes;
`summarize_reports` and `headline_scores` only add rows up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rectvlm.labels import DEFAULT_CONVENTION, N_FINDINGS, LabelConvention
from rectvlm.metrics import text_overlap
from rectvlm.metrics.arrays import BoolArray, CountArray
from rectvlm.metrics.clinical_efficacy import (
    FN,
    TP,
    count_confusions,
    group_by_prevalence,
    precision_recall_f1,
    recall_of,
    score_clinical_efficacy,
    score_prevalence_groups,
)
from rectvlm.metrics.report_labeler.entity_terms import ENTITIES
from rectvlm.metrics.report_labeler.finding_states import FindingState
from rectvlm.metrics.report_labeler.labeler import ReportLabeler, load_labeler
from rectvlm.metrics.report_labeler.laterality import (
    count_lobe_outcomes,
    count_side_outcomes,
    score_laterality,
    score_lesion_laterality,
    score_lobes,
)
from rectvlm.metrics.report_labeler.rule_labeler import label_entities
from rectvlm.metrics.report_labeler.stated_sizes import (
    count_size_outcomes,
    score_sizes,
    size_accuracy,
)
from rectvlm.metrics.text_diversity import measure_diversity
from rectvlm.types import JsonObject, UserError

CIDER_LEFT_OUT_REASON = "needs at least two cases: with one, every word has weight 0"
_MEAN_SCORES = ("rouge_l", "meteor", "cider", "bertscore_f1")


@dataclass(frozen=True)
class ReportStatistics:
    """Contribution of each of N cases to the figures.

    Text scores are 0 for a case without a reference, and read only with one.
    """

    has_reference: BoolArray
    """Whether each case has a reference report, (N,)."""
    bleu_counts: CountArray
    """Counts of `text_overlap.bleu_counts`, (N, 10)."""
    rouge_l: NDArray[np.float64]
    """ROUGE-L, (N,)."""
    meteor: NDArray[np.float64]
    """METEOR, (N,)."""
    cider: NDArray[np.float64]
    """CIDEr-D, (N,)."""
    bertscore_f1: NDArray[np.float64] | None
    """BERTScore F1, (N,); None where no encoder was given or could be loaded."""
    label_counts: CountArray | None
    """Counts of `count_confusions` against the labels, (N, 18, 4); None without labels."""
    reference_counts: CountArray
    """Counts of `count_confusions` against the findings of the reference reports, (N, 18, 4)."""
    side_counts: CountArray
    """Counts of `count_side_outcomes`, (N, 11, 5)."""
    lobe_counts: CountArray
    """Counts of `count_lobe_outcomes`, (N, 11, 5)."""
    size_counts: CountArray
    """Counts of `count_size_outcomes`, (N, F, 4)."""
    entity_counts: CountArray
    """Counts of `count_confusions` of the findings beyond the 18 against those of the reference
    reports, (N, E, 4)."""
    prevalence_groups: dict[str, list[str]]
    """Findings by group of `group_by_prevalence`, of the labels, or of the reference reports where
    there are none; a resample has the groups of all cases."""
    diversity: JsonObject
    """Figures of `measure_diversity` of the generated reports."""
    convention: LabelConvention
    """Convention of the rules that read findings and sides."""
    signatures: dict[str, str]
    """Libraries, versions and settings by score."""
    left_out: dict[str, str]
    """Reasons by score that is left out."""

    def __len__(self) -> int:
        return len(self.has_reference)


def compute_report_statistics(
    generated: Sequence[str],
    references: Sequence[str | None],
    bertscore_model: str | Path | None = None,
    *,
    labels: NDArray[Any] | None = None,
    known: BoolArray | None = None,
    labeler: str | Path | ReportLabeler = "rules",
    convention: LabelConvention = DEFAULT_CONVENTION,
    uncertain_is_present: bool = True,
) -> ReportStatistics:
    """Read the texts and keep what each case contributes; arguments as for `score_reports`.

    Raises:
        UserError: The labeler cannot be loaded, or has other labels.
    """
    has_reference = np.array([reference is not None for reference in references], dtype=bool)
    texts, truths = [], []
    for text, reference in zip(generated, references, strict=True):
        if reference is not None:
            texts.append(text)
            truths.append(reference)

    labeler = load_labeler(labeler, convention)
    lowest_state = FindingState.UNCERTAIN if uncertain_is_present else FindingState.PRESENT
    called = labeler.label_reports(generated) >= lowest_state
    stated = _scatter_to_all_cases(labeler.label_reports(truths) >= lowest_state, has_reference)
    has_reference_by_finding = np.repeat(has_reference[:, None], N_FINDINGS, axis=1)
    label_counts = None
    if labels is not None:
        known = np.ones(labels.shape, dtype=bool) if known is None else known
        label_counts = count_confusions(called, labels > 0.5, known)
    reference_counts = count_confusions(called, stated, has_reference_by_finding)

    uncertain = "present" if uncertain_is_present else "absent"
    signatures = {
        **_text_signatures(),
        "clinical": f"{labeler.signature}; uncertain counts as {uncertain}",
    }
    left_out = {} if len(truths) > 1 else {"cider": CIDER_LEFT_OUT_REASON}
    bertscore, reason = _compute_bertscore(texts, truths, bertscore_model, signatures)
    if reason is not None:
        left_out["bertscore_f1"] = reason
    if bertscore is not None:
        bertscore = _scatter_to_all_cases(bertscore, has_reference)
    return ReportStatistics(
        has_reference=has_reference,
        bleu_counts=_scatter_to_all_cases(text_overlap.bleu_counts(texts, truths), has_reference),
        rouge_l=_scatter_to_all_cases(text_overlap.rouge_l(texts, truths), has_reference),
        meteor=_scatter_to_all_cases(text_overlap.meteor(texts, truths), has_reference),
        cider=_scatter_to_all_cases(text_overlap.cider(texts, truths), has_reference),
        bertscore_f1=bertscore,
        label_counts=label_counts,
        reference_counts=reference_counts,
        side_counts=count_side_outcomes(generated, references, convention),
        lobe_counts=count_lobe_outcomes(generated, references, convention),
        size_counts=count_size_outcomes(generated, references, convention),
        entity_counts=_count_entities(generated, references, lowest_state),
        prevalence_groups=group_by_prevalence(
            reference_counts if label_counts is None else label_counts
        ),
        diversity=measure_diversity(generated),
        convention=convention,
        signatures=signatures,
        left_out=left_out,
    )


def score_reports(
    generated: Sequence[str],
    references: Sequence[str | None],
    bertscore_model: str | Path | None = None,
    *,
    labels: NDArray[Any] | None = None,
    known: BoolArray | None = None,
    labeler: str | Path | ReportLabeler = "rules",
    convention: LabelConvention = DEFAULT_CONVENTION,
    uncertain_is_present: bool = True,
) -> JsonObject:
    """Score text overlap, findings and sides of generated reports.

    A score is None where it is not defined. BLEU is of the corpus; ROUGE-L, METEOR, CIDEr and
    BERTScore are means over the cases with a reference report; the others are counted. `clinical`
    compares the findings that the labeler reads in the generated report with the cases' labels
    (`labels`, every case; None without labels) and with those that it reads in the reference
    (`reference_reports`). `laterality` and `lobes` compare places, `sizes`
    sizes, `other_findings` findings beyond the 18, all with the reference. `by_prevalence` has the
    recall of rare and of common findings. `diversity` compares the generated reports with each
    other. The signatures state libraries, versions and tokens.

    Args:
        generated: generated report of each case, (N,).
        references: true report of each case, (N,); None where there is none.
        bertscore_model: folder or hub id of an encoder; BERTScore is left out, with its reason,
            without one that loads.
        labels: labels, (N, 18), 0 or 1; read only where known.
        known: whether each label is known, (N, 18); by default all are.
        labeler: `rules`, the folder or hub id of a classifier, or a `ReportLabeler`.
        convention: convention of the rules, which read the sides beside any labeler.
        uncertain_is_present: whether an uncertain finding counts as present.

    Raises:
        UserError: The labeler cannot be loaded, or has other labels.
    """
    statistics = compute_report_statistics(
        generated,
        references,
        bertscore_model,
        labels=labels,
        known=known,
        labeler=labeler,
        convention=convention,
        uncertain_is_present=uncertain_is_present,
    )
    return summarize_reports(statistics)


def summarize_reports(statistics: ReportStatistics) -> JsonObject:
    """All figures of `score_reports`, as in `metrics.json`."""
    n_references = int(statistics.has_reference.sum())
    by_labels = None
    if statistics.label_counts is not None:
        by_labels = score_clinical_efficacy(statistics.label_counts)
    return {
        "n": n_references,
        "n_without_reference": len(statistics) - n_references,
        **_text_overlap_scores(statistics),
        "convention": statistics.convention,
        "clinical": {
            "labels": by_labels,
            "reference_reports": score_clinical_efficacy(statistics.reference_counts),
        },
        "laterality": score_laterality(statistics.side_counts),
        "lobes": score_lobes(statistics.lobe_counts),
        "sizes": score_sizes(statistics.size_counts),
        "other_findings": _score_entities(statistics.entity_counts),
        "by_prevalence": score_prevalence_groups(
            _best_truth(statistics), statistics.prevalence_groups
        ),
        "diversity": statistics.diversity,
        "signatures": statistics.signatures,
        "left_out": statistics.left_out,
    }


def headline_scores(statistics: ReportStatistics) -> dict[str, float | None]:
    """The headline figures in one level, quick enough to be computed for every bootstrap resample.

    `clinical_labels_*` are against the cases' labels (where given), `clinical_reference_*` against
    the reference reports.
    """
    scores = _text_overlap_scores(statistics)
    counts_by_truth = {"labels": statistics.label_counts, "reference": statistics.reference_counts}
    for truth, counts in counts_by_truth.items():
        if counts is None:
            continue
        efficacy = score_clinical_efficacy(counts)
        for mean in ("micro", "macro", "weighted"):
            for score, value in efficacy[mean].items():
                scores[f"clinical_{truth}_{mean}_{score}"] = value
        scores[f"clinical_{truth}_crg"] = efficacy["crg"]
    scores["laterality"] = score_lesion_laterality(statistics.side_counts)["accuracy"]
    scores["lobe_accuracy"] = score_lobes(statistics.lobe_counts)["accuracy"]
    scores["size_accuracy"] = size_accuracy(statistics.size_counts)
    scores["other_findings_f1"] = _entity_f1(statistics.entity_counts)
    rare_findings = statistics.prevalence_groups["rare"]
    scores["rare_findings_recall"] = recall_of(_best_truth(statistics), rare_findings)
    return scores


def _best_truth(statistics: ReportStatistics) -> CountArray:
    """Counts of the 18 findings against the labels, or the reference reports without labels."""
    if statistics.label_counts is None:
        return statistics.reference_counts
    return statistics.label_counts


def _count_entities(
    generated: Sequence[str], references: Sequence[str | None], lowest_state: FindingState
) -> CountArray:
    """Counts of `count_confusions` of the findings beyond the 18, (N, E, 4)."""
    called = label_entities(generated) >= lowest_state
    stated = label_entities([reference or "" for reference in references]) >= lowest_state
    has_reference = np.array([reference is not None for reference in references], dtype=bool)
    return count_confusions(called, stated, np.repeat(has_reference[:, None], len(ENTITIES), 1))


def _score_entities(counts: CountArray) -> JsonObject:
    """Figures of the findings beyond the 18; of those that neither report names, no row."""
    scores = score_clinical_efficacy(counts, ENTITIES)
    del scores["crg"], scores["weighted"]
    per_finding = {}
    for name, row in scores["per_finding"].items():
        if row["n_positive"] or row["n_called"]:
            per_finding[name] = row
    return scores | {"per_finding": per_finding}


def _entity_f1(counts: CountArray) -> float | None:
    """F1 of all pairs of case and finding beyond the 18; None where no reference names one."""
    totals = counts.sum(axis=(0, 1))
    has_positive = bool(totals[TP] + totals[FN])
    return float(precision_recall_f1(totals[None])[0, 2]) if has_positive else None


def _text_signatures() -> dict[str, str]:
    signatures = {
        "rouge_l": text_overlap.ROUGE_SIGNATURE,
        "meteor": text_overlap.meteor_signature(),
        "cider": text_overlap.CIDER_SIGNATURE,
    }
    for order in range(1, 5):
        signatures[f"bleu_{order}"] = text_overlap.bleu_signature(order)
    return signatures


def _compute_bertscore(
    texts: Sequence[str],
    truths: Sequence[str],
    model: str | Path | None,
    signatures: dict[str, str],
) -> tuple[NDArray[np.float64] | None, str | None]:
    """Scores, or the reason why there are none; adds the signature."""
    if model is None:
        return None, "no encoder was given"
    if not truths:
        return None, None
    try:
        scores, signatures["bertscore_f1"] = text_overlap.bertscore_by_case(texts, truths, model)
    except (OSError, UserError) as error:
        return None, f"{model} cannot be loaded: {str(error).splitlines()[0]}"
    return scores, None


def _scatter_to_all_cases(values: NDArray[Any], has_reference: BoolArray) -> NDArray[Any]:
    """Values of the cases with a reference at their places among all cases; 0 elsewhere."""
    all_values = np.zeros((len(has_reference), *values.shape[1:]), dtype=values.dtype)
    all_values[has_reference] = values
    return all_values


def _text_overlap_scores(statistics: ReportStatistics) -> dict[str, float | None]:
    """BLEU-1 to 4 and the means over cases; BERTScore only where it was computed."""
    has_reference = statistics.has_reference
    is_defined = bool(has_reference.any())
    counts = statistics.bleu_counts[has_reference].sum(axis=0)
    scores: dict[str, float | None] = {}
    for order in range(1, 5):
        scores[f"bleu_{order}"] = text_overlap.bleu(counts, order) if is_defined else None
    for name in _MEAN_SCORES:
        values = getattr(statistics, name)
        if values is None:
            continue
        is_scored = is_defined and name not in statistics.left_out
        scores[name] = float(values[has_reference].mean()) if is_scored else None
    return scores
