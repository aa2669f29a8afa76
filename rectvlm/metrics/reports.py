"""Metrics of generated reports: words, findings, sides. The definitions are in `docs/report-metrics.md`.

`report_rows` reads the texts once and keeps what each case contributes; `reports` and `report_scores` only add rows up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rectvlm.labels import N_FINDINGS
from rectvlm.metrics import text_overlap
from rectvlm.metrics.clinical_efficacy import count_confusions, crg_score, score_clinical_efficacy
from rectvlm.metrics.report_labeler.labeler import ReportLabeler, load_labeler
from rectvlm.metrics.report_labeler.laterality import (
    count_side_outcomes,
    score_laterality,
    score_lesion_laterality,
)
from rectvlm.metrics.report_labeler.rule_labeler import FindingState

CIDER_LEFT_OUT_REASON = "needs at least two cases: with one, every word has weight 0"


@dataclass(frozen=True)
class ReportStatistics:
    """What each case contributes to the figures. N cases."""

    has_reference: NDArray[np.bool_]
    """(N,)."""
    bleu_counts: NDArray[np.int64]
    """(N, 10) counts of `words.bleu_counts`, 0 without a reference."""
    rouge_l: NDArray[np.float64]
    """(N,), as the next three: 0 without a reference, read only with one."""
    meteor: NDArray[np.float64]
    cider: NDArray[np.float64]
    bertscore_f1: NDArray[np.float64] | None
    """None where no encoder was given or could be loaded."""
    label_counts: NDArray[np.int64] | None
    """(N, 18, 4) counts of `clinical.finding_counts` against the cases' labels; None where none were given."""
    reference_counts: NDArray[np.int64]
    """(N, 18, 4) counts against what the labeler reads in the reference reports."""
    side_counts: NDArray[np.int64]
    """(N, 11, 5) counts of `sides.side_outcomes`."""
    signatures: dict[str, str]
    left_out: dict[str, str]

    def __len__(self) -> int:
        return len(self.has_reference)


def compute_report_statistics(
    generated: Sequence[str],
    references: Sequence[str | None],
    bertscore_model: str | Path | None = None,
    *,
    labels: NDArray[Any] | None = None,
    known: NDArray[np.bool_] | None = None,
    labeler: str | Path | ReportLabeler = "rules",
    uncertain_is_present: bool = True,
) -> ReportStatistics:
    """Reads the texts, and keeps what each case contributes; the arguments are those of `reports`.

    Raises:
        UserError: the labeler cannot be loaded, or has other labels.
    """
    assert len(generated) == len(references)
    has = np.array([reference is not None for reference in references], dtype=bool)
    texts = [
        text for text, reference in zip(generated, references, strict=True) if reference is not None
    ]
    truths = [reference for reference in references if reference is not None]
    reader = load_labeler(labeler)
    least = FindingState.UNCERTAIN if uncertain_is_present else FindingState.PRESENT
    called = reader.label_reports(generated) >= least
    told = np.zeros((len(generated), N_FINDINGS), dtype=bool)
    told[has] = reader.label_reports(truths) >= least
    by_labels = None
    if labels is not None:
        known = np.ones(labels.shape, dtype=bool) if known is None else known
        by_labels = count_confusions(called, labels > 0.5, known)
    signatures = {
        "rouge_l": text_overlap.ROUGE_SIGNATURE,
        "meteor": text_overlap.meteor_signature(),
        "cider": text_overlap.CIDER_SIGNATURE,
    }
    signatures |= {f"bleu_{order}": text_overlap.bleu_signature(order) for order in range(1, 5)}
    signatures["clinical"] = (
        f"{reader.signature}; uncertain counts as {'present' if uncertain_is_present else 'absent'}"
    )
    left_out = {} if len(truths) > 1 else {"cider": CIDER_LEFT_OUT_REASON}
    scores, reason = _compute_bertscore(texts, truths, bertscore_model, signatures)
    if reason is not None:
        left_out["bertscore_f1"] = reason
    return ReportStatistics(
        has_reference=has,
        bleu_counts=_scatter_to_all_cases(text_overlap.bleu_counts(texts, truths), has),
        rouge_l=_scatter_to_all_cases(text_overlap.rouge_l(texts, truths), has),
        meteor=_scatter_to_all_cases(text_overlap.meteor(texts, truths), has),
        cider=_scatter_to_all_cases(text_overlap.cider(texts, truths), has),
        bertscore_f1=None if scores is None else _scatter_to_all_cases(scores, has),
        label_counts=by_labels,
        reference_counts=count_confusions(
            called, told, np.repeat(has[:, None], N_FINDINGS, axis=1)
        ),
        side_counts=count_side_outcomes(generated, references),
        signatures=signatures,
        left_out=left_out,
    )


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
    except OSError as error:
        return None, f"{model} cannot be loaded: {str(error).splitlines()[0]}"
    return scores, None


def _scatter_to_all_cases(values: NDArray[Any], has: NDArray[np.bool_]) -> NDArray[Any]:
    """Values of the cases with a reference, at their places among all."""
    spread = np.zeros((len(has), *values.shape[1:]), dtype=values.dtype)
    spread[has] = values
    return spread


def score_reports(
    generated: Sequence[str],
    references: Sequence[str | None],
    bertscore_model: str | Path | None = None,
    *,
    labels: NDArray[Any] | None = None,
    known: NDArray[np.bool_] | None = None,
    labeler: str | Path | ReportLabeler = "rules",
    uncertain_is_present: bool = True,
) -> dict[str, Any]:
    """Words, findings and sides of generated reports. A score is None where it is not defined.

    BLEU is of the corpus; ROUGE-L, METEOR, CIDEr and BERTScore are means over the cases with a reference report; the
    others are counted. `clinical` compares the findings that the labeler reads in the generated report with the cases'
    labels (`labels`, every case; None when none are given) and with what it reads in the reference
    (`reference_reports`). `laterality` compares sides. The signatures state libraries, versions and tokens.

    Args:
        generated: one text a case.
        references: the true report of each case, None where there is none.
        bertscore_model: folder or hub id of an encoder; without one that loads, BERTScore is left out and says why.
        labels: (N, 18), 0 or 1; read only where known.
        known: (N, 18); all are when it is not given.
        labeler: `rules`, the folder or hub id of a classifier, or a `Labeler`.
        uncertain: whether an uncertain finding counts as present.

    Raises:
        UserError: the labeler cannot be loaded, or has other labels.
    """
    rows = compute_report_statistics(
        generated,
        references,
        bertscore_model,
        labels=labels,
        known=known,
        labeler=labeler,
        uncertain_is_present=uncertain_is_present,
    )
    return summarize_reports(rows)


def summarize_reports(rows: ReportStatistics) -> dict[str, Any]:
    """The figures of `reports` from its rows."""
    n = int(rows.has_reference.sum())
    return {
        "n": n,
        "n_without_reference": len(rows) - n,
        **_text_overlap_scores(rows),
        "clinical": {
            "labels": None
            if rows.label_counts is None
            else score_clinical_efficacy(rows.label_counts),
            "reference_reports": score_clinical_efficacy(rows.reference_counts),
        },
        "laterality": score_laterality(rows.side_counts),
        "signatures": rows.signatures,
        "left_out": rows.left_out,
    }


def _text_overlap_scores(rows: ReportStatistics) -> dict[str, float | None]:
    """BLEU-1 to 4 and the means over cases; BERTScore only where it was computed."""
    has = rows.has_reference
    counts = rows.bleu_counts[has].sum(axis=0)
    result: dict[str, float | None] = {
        f"bleu_{order}": text_overlap.bleu(counts, order) if has.any() else None
        for order in range(1, 5)
    }
    for name in ("rouge_l", "meteor", "cider", "bertscore_f1"):
        values = getattr(rows, name)
        if name == "cider" and "cider" in rows.left_out:
            result[name] = None
        elif values is not None:
            result[name] = float(values[has].mean()) if has.any() else None
    return result


def headline_scores(rows: ReportStatistics) -> dict[str, float | None]:
    """The headline figures in one level, quick enough to be computed for every bootstrap sample.

    `clinical_labels_*` against the cases' labels (where given), `clinical_reference_*` against the reference reports.
    """
    scores = _text_overlap_scores(rows)
    for name, counts in (("labels", rows.label_counts), ("reference", rows.reference_counts)):
        if counts is not None:
            result = score_clinical_efficacy(counts)
            for mean in ("micro", "macro", "weighted"):
                for score, value in result[mean].items():
                    scores[f"clinical_{name}_{mean}_{score}"] = value
            scores[f"clinical_{name}_crg"] = crg_score(counts.sum(axis=(0, 1)))
    scores["laterality"] = score_lesion_laterality(rows.side_counts)["accuracy"]
    return scores
