"""Figures of RadEval (Xu et al., EMNLP 2025), an optional package, for sets of generated reports.

Its metrics that are not computed here already: by a CT text classifier, by a language model that
compares facts (RadFact-CT), and three that were trained on chest X-rays, which say less of a CT.
Each loads weights of its own from the hub; one that cannot run is left out with the reason.

Shapes: N cases, R resamples.
"""

import importlib.util
import logging
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rectvlm.cli_options import argument
from rectvlm.metrics.arrays import FloatArray
from rectvlm.metrics.bootstrap import ResampleWeights, percentile_interval, weighted_ratio
from rectvlm.types import JsonObject, UserError

log = logging.getLogger(__name__)

RadEvalKey = Literal["f1radbert_ct", "radfact_ct", "green", "ratescore", "radgraph"]
"""Metric as RadEval names it."""
PROMPTS_FOLDER = Path("metrics", "radfact_ct", "prompts", "ct")
"""Folder in the package that RadFact-CT reads its prompts from."""
ENDPOINT_TIMEOUT_SECONDS = 20.0
"""Longest wait for the first answer of an endpoint, seconds."""
_BASE_URL = "OPENAI_BASE_URL"
"""Variable from which RadEval's client takes its endpoint."""


@dataclass(frozen=True)
class RadEvalMetric:
    """A metric of RadEval and its figures."""

    name: str
    trained_on: str
    """Reports that the metric was made for: `CT` or `chest X-rays`."""
    figures: Mapping[str, str]
    """Names of the figures by RadEval's key."""
    is_by_case: bool = True
    """Whether a figure is a mean over cases, so that patients can be drawn."""


RADEVAL_METRICS: dict[RadEvalKey, RadEvalMetric] = {
    "f1radbert_ct": RadEvalMetric(
        "RadBERT-CT",
        "CT",
        {
            "f1radbert_ct_micro_f1": "RadBERT-CT, micro F1",
            "f1radbert_ct_macro_f1": "RadBERT-CT, macro F1",
            "f1radbert_ct_weighted_f1": "RadBERT-CT, weighted F1",
        },
        is_by_case=False,
    ),
    "radfact_ct": RadEvalMetric(
        "RadFact-CT",
        "CT",
        {
            "radfact_ct_precision": "RadFact-CT, precision",
            "radfact_ct_recall": "RadFact-CT, recall",
            "radfact_ct_f1": "RadFact-CT, F1",
        },
    ),
    "green": RadEvalMetric("GREEN", "chest X-rays", {"green": "GREEN"}),
    "ratescore": RadEvalMetric("RaTEScore", "chest X-rays", {"ratescore": "RaTEScore"}),
    "radgraph": RadEvalMetric(
        "RadGraph",
        "chest X-rays",
        {
            "radgraph_simple": "RadGraph F1, entities",
            "radgraph_partial": "RadGraph F1, entities with a relation",
            "radgraph_complete": "RadGraph F1, entities and relations",
        },
    ),
}


@dataclass(frozen=True)
class RadEvalOptions:
    """What RadEval computes."""

    metrics: tuple[RadEvalKey, ...] = field(default=(), metadata=argument(flag="--radeval"))
    """Metrics of RadEval beside our own, which need `pip install 'rectvlm[radeval]'`; green,
    ratescore and radgraph were trained on chest X-rays."""
    radfact_endpoint: str | None = field(default=None, metadata=argument(metavar="URL"))
    """Endpoint of RadFact-CT that speaks OpenAI's protocol, such as http://localhost:8000/v1; the
    reports are sent there, with the key in OPENAI_API_KEY if there is one."""
    radfact_model: str | None = field(default=None, metadata=argument(metavar="NAME"))
    """Language model of the endpoint."""


def require_radeval(options: RadEvalOptions) -> None:
    """Check, before any work, that the package and the endpoint of RadFact-CT are there.

    Raises:
        UserError: The package or its prompts are missing, or no endpoint is named, or none answers.
    """
    if not options.metrics:
        return
    package = importlib.util.find_spec("radeval")
    if package is None or not package.submodule_search_locations:
        raise UserError(
            "--radeval needs the package RadEval, which is not installed: "
            "pip install 'rectvlm[radeval]'."
        )
    if "radfact_ct" in options.metrics:
        _require_prompts(Path(package.submodule_search_locations[0]) / PROMPTS_FOLDER)
        _require_endpoint(options)


def _require_prompts(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(
            f"RadFact-CT needs RadEval's prompts in {folder}, which the archive of RadEval "
            f"{version('radeval')} on PyPI lacks: install a clone of github.com/jbdel/RadEval "
            "with pip install -e, or leave radfact_ct out of --radeval."
        )


def _require_endpoint(options: RadEvalOptions) -> None:
    if options.radfact_endpoint is None or options.radfact_model is None:
        raise UserError(
            "RadFact-CT asks a language model: expected --radfact-endpoint URL and --radfact-model "
            "NAME, such as http://localhost:8000/v1 of a local vLLM and the name it serves."
        )
    url = options.radfact_endpoint.rstrip("/") + "/models"
    headers = {"Authorization": f"Bearer {_read_key()}"}
    try:
        request = urllib.request.Request(url, headers=headers)
        urllib.request.urlopen(request, timeout=ENDPOINT_TIMEOUT_SECONDS).close()
    except (OSError, ValueError) as error:
        is_answer = isinstance(error, urllib.error.HTTPError)
        reason = error if is_answer else getattr(error, "reason", error)
        raise UserError(
            f"RadFact-CT's endpoint does not answer: {url} ({reason}); start the server, or "
            "correct --radfact-endpoint, which mostly ends in /v1."
        ) from None


def _read_key() -> str:
    """Key of the endpoint; local servers mostly want none, and the client refuses an empty one."""
    return os.environ.get("OPENAI_API_KEY") or "none"


def score_by_radeval(
    options: RadEvalOptions,
    texts_by_kind: Mapping[str, Sequence[str]],
    references: Sequence[str | None],
    weights: ResampleWeights | None,
) -> JsonObject:
    """Score several sets of reports against the same references.

    Args:
        options: metrics and endpoint.
        texts_by_kind: generated report of each case, (N,), by the set's name.
        references: true report of each case, (N,); None where there is none, which leaves the case
            out.
        weights: resamples of the cases, (R, N); None for no intervals.

    Returns:
        `version` of RadEval, `n`, `reports` with `scores` and `ci95` by set, and `left_out` with
        reasons by metric.
    """
    numbers = [i for i, reference in enumerate(references) if reference is not None]
    truths = [reference for reference in references if reference is not None]
    case_weights = None if weights is None else weights[:, numbers].astype(np.float64)
    reports: JsonObject = {kind: {"scores": {}, "ci95": {}} for kind in texts_by_kind}
    left_out: dict[str, str] = {}
    for key in options.metrics if truths else ():
        try:
            values_by_kind = _run_metric(
                key,
                options,
                {kind: [texts[i] for i in numbers] for kind, texts in texts_by_kind.items()},
                truths,
            )
        except Exception as error:  # RadEval lets through what its many libraries raise
            left_out[key] = _describe_error(error)
            log.warning("%s is left out: it %s", RADEVAL_METRICS[key].name, left_out[key])
            continue
        for kind, values in values_by_kind.items():
            scores, intervals = _summarize_values(RADEVAL_METRICS[key], values, case_weights)
            reports[kind]["scores"] |= scores
            reports[kind]["ci95"] |= intervals
    return {
        "version": version("radeval"),
        "n": len(truths),
        "reports": reports,
        "left_out": left_out,
    }


def _describe_error(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"stopped: {lines[0].rstrip('.') if lines else type(error).__name__}"


def _run_metric(
    key: RadEvalKey,
    options: RadEvalOptions,
    texts_by_kind: Mapping[str, list[str]],
    references: list[str],
) -> dict[str, dict[str, Any]]:
    """RadEval's values by set and figure: of each case, or one, as `is_by_case` says."""
    from radeval import RadEval

    settings: JsonObject = {}
    if key == "radfact_ct":
        settings = {"model_name": options.radfact_model, "openai_api_key": _read_key()}
    with _use_endpoint(options.radfact_endpoint):
        evaluator = RadEval(
            metrics={key: settings},
            per_sample=RADEVAL_METRICS[key].is_by_case,
            show_progress=False,
        )
        return {
            kind: evaluator(refs=references, hyps=texts) for kind, texts in texts_by_kind.items()
        }


@contextmanager
def _use_endpoint(url: str | None) -> Iterator[None]:
    """Let clients of OpenAI's protocol take this endpoint meanwhile."""
    previous = os.environ.get(_BASE_URL)
    if url is not None:
        os.environ[_BASE_URL] = url
    try:
        yield
    finally:
        if previous is not None:
            os.environ[_BASE_URL] = previous
        elif url is not None:
            del os.environ[_BASE_URL]


def _summarize_values(
    metric: RadEvalMetric, values: Mapping[str, Any], weights: FloatArray | None
) -> tuple[dict[str, float | None], dict[str, list[float] | None]]:
    """Figures of one metric and their intervals; those of a whole set have no intervals."""
    if not metric.is_by_case:
        return {figure: float(values[figure]) for figure in metric.figures}, {}
    columns = {figure: np.array(values[figure], np.float64) for figure in metric.figures}
    n = len(next(iter(columns.values())))
    scores: dict[str, float | None] = {}
    for figure, means in average_cases(columns, np.ones((1, n))).items():
        scores[figure] = float(means[0]) if np.isfinite(means[0]) else None
    if weights is None:
        return scores, {}
    samples = average_cases(columns, weights)
    return scores, {figure: percentile_interval(means) for figure, means in samples.items()}


def average_cases(columns: Mapping[str, FloatArray], weights: FloatArray) -> dict[str, FloatArray]:
    """Weighted mean of each figure over the cases that have a value, (R,).

    RadFact's F1 is that of mean precision and mean recall, as RadEval computes it.

    Args:
        columns: values of the cases by figure, (N,); NaN where there is none.
        weights: how often each case counts, (R, N).
    """
    means = {}
    for figure, values in columns.items():
        has_value = np.isfinite(values)
        means[figure] = weighted_ratio(
            weights, np.where(has_value, values, 0), has_value.astype(np.float64)
        )
    if "radfact_ct_f1" in means:
        precision, recall = means["radfact_ct_precision"], means["radfact_ct_recall"]
        total = precision + recall
        # 0 where both are 0, NaN where one has no value.
        means["radfact_ct_f1"] = 2 * precision * recall / np.where(total == 0, 1, total)
    return means
