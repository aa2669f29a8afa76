"""The model card of a checkpoint: `README.md`, with the metadata that the Hub reads."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from rectvlm.checkpoint.checkpoint import ADAPTER_FOLDER, CARD_FILE, Checkpoint
from rectvlm.config import ModelPart, phase_key
from rectvlm.files import atomic_file
from rectvlm.labels import FINDINGS, LESIONS, REGIONS
from rectvlm.types import UserError

TEMPLATE_FILE = Path(__file__).parent / "model_card.md.j2"
HUB_ID_PATTERN = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
CARD_FINDING_SCORES = ("auroc", "f1", "precision", "recall")
CARD_REPORT_SCORES = ("bleu_1", "bleu_4", "rouge_l", "bertscore_f1")
CARD_GROUNDING_SCORES = ("dice", "hit_rate", "instance_f1")
NO_VALUE = "–"


@dataclass(frozen=True)
class CardPartRow:
    """One row of the card's table of parts."""

    name: str
    parameters: str
    """Number of parameters in the folder, with thousands separators."""
    files: str
    """Files of the part, in Markdown."""


@dataclass(frozen=True)
class CardEvaluation:
    """Results of `rectvlm evaluate` for the card."""

    n_cases: int
    split: str
    step: int
    is_selected: bool | None
    """Whether validation during training chose the checkpoint on the split; None where unknown."""
    labels: str | None
    """Origin of the labels; None where it is not known."""
    rows: list[list[str]]
    """Rows of subject, metric, value and number of cases."""


def write_model_card(
    checkpoint: Checkpoint,
    name: str,
    license_id: str | None = None,
    datasets: Sequence[str] = (),
    metrics: Path | None = None,
) -> None:
    """Write the card into the folder of a checkpoint whose weights are there.

    Args:
        checkpoint: what the card describes.
        name: heading.
        license_id: license for the metadata, for example `apache-2.0`; None states none.
        datasets: hub ids or names of the training data.
        metrics: JSON of `rectvlm evaluate`.

    Raises:
        OSError: the card could not be written.
        UserError: the metrics cannot be read.
    """
    parts, config, training = checkpoint.parts, checkpoint.config, checkpoint.training
    base_model = config.generator.model if "generator" in parts else None
    versions = [f"{package} {number}" for package, number in checkpoint.versions.items()]
    losses = [f"{task} {weight:g}" for task, weight in config.train.loss_weights]
    is_quantized = config.generator.quantization == "nf4"
    values: dict[str, Any] = {
        "name": name,
        "version": version("rectvlm"),
        "outputs": _describe_outputs(parts),
        "grid": " × ".join(map(str, config.data.grid)),
        "spacing": " × ".join(f"{mm:g}" for mm in config.data.spacing),
        "findings": [finding.lower() for finding in FINDINGS],
        "thresholds": checkpoint.read_thresholds(),
        "lesions": [lesion.name for lesion in LESIONS] if "localizer" in parts else [],
        "regions": REGIONS,
        "parts": _part_rows(checkpoint),
        "language_model": base_model,
        "quantization": "4-bit NF4, frozen" if is_quantized else "bfloat16, frozen",
        "lora_rank": config.generator.lora_rank,
        "training": training,
        "schedule": config.train.phases.get(phase_key(training.phase, training.stage)),
        "losses": ", ".join(losses),
        "versions": ", ".join(versions),
        "datasets": datasets,
        "evaluation": None if metrics is None else _read_evaluation(metrics),
        "license": license_id,
    }
    metadata = _card_metadata(parts, base_model, license_id, datasets)
    text = str(ModelCard.from_template(metadata, str(TEMPLATE_FILE), **values))
    with atomic_file(checkpoint.folder / CARD_FILE) as file:
        file.write((text.rstrip() + "\n").encode())


def _card_metadata(
    parts: Sequence[ModelPart],
    base_model: str | None,
    license_id: str | None,
    datasets: Sequence[str],
) -> ModelCardData:
    """Metadata that the Hub searches by; it names the language model if that is on the Hub."""
    task = "image-classification"
    if base_model is not None:
        task = "image-to-text"
    elif "localizer" in parts:
        task = "image-segmentation"
    is_on_hub = base_model is not None and HUB_ID_PATTERN.fullmatch(base_model) is not None
    tags = ["medical", "radiology", "chest-ct", "3d", "vision-language"]
    if base_model is not None:
        tags += ["lora", "peft"]
    hub_datasets = [dataset for dataset in datasets if HUB_ID_PATTERN.fullmatch(dataset)]
    return ModelCardData(
        language="en",
        license=license_id,
        library_name="rectvlm",
        pipeline_tag=task,
        tags=tags,
        datasets=hub_datasets or None,
        base_model=base_model if is_on_hub else None,
        base_model_relation="adapter" if is_on_hub else None,
    )


def _describe_outputs(parts: Sequence[ModelPart]) -> str:
    outputs = [f"the probabilities of {len(FINDINGS)} findings"]
    if "localizer" in parts:
        outputs.append(f"masks of {len(LESIONS)} kinds of lesions")
    if "generator" in parts:
        outputs.append("a written report")
    if len(outputs) == 1:
        return outputs[0]
    return f"{', '.join(outputs[:-1])} and {outputs[-1]}"


def _part_rows(checkpoint: Checkpoint) -> list[CardPartRow]:
    """Parameters of each part; the language model's own are not in the folder."""
    rows = []
    for part, count in checkpoint.count_parameters().items():
        files = f"`{part}.safetensors`"
        if part == "generator":
            files += f", `{ADAPTER_FOLDER}/`"
        rows.append(CardPartRow(part, f"{count:,}", files))
    return rows


def _read_evaluation(path: Path) -> CardEvaluation:
    try:
        metrics = json.loads(path.read_bytes())
        return CardEvaluation(
            metrics["n_cases"],
            metrics["split"],
            metrics["step"],
            metrics.get("selected_on_this_split"),
            metrics.get("labels"),
            [*_finding_rows(metrics), *_lesion_rows(metrics), *_report_rows(metrics)],
        )
    except OSError as error:
        raise UserError(f"The metrics {path} cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path} is not the JSON of `rectvlm evaluate` ({reason}): give its metrics.json."
        ) from None


def _finding_rows(metrics: dict[str, Any]) -> list[list[str]]:
    macro = metrics["classification"]["macro"]
    rows = []
    for score in CARD_FINDING_SCORES:
        count = f"{macro[f'n_findings_{score}']} of {len(FINDINGS)}"
        rows.append(["findings", f"macro {score}", _format_score(macro[score]), count])
    return rows


def _lesion_rows(metrics: dict[str, Any]) -> list[list[str]]:
    if not metrics["localization"]:
        return []
    rows = []
    for key, lesion in metrics["localization"]["per_lesion"].items():
        name = key.replace("_", " ")
        if not lesion["per_source"]:
            rows.append(["lesions", f"Dice, {name}", NO_VALUE, "no outlines"])
        for source, scores in lesion["per_source"].items():
            cases = f"{scores['n_cases']} cases, {scores['n_present']} with it"
            metric = f"Dice against {source}, {name}"
            rows.append(["lesions", metric, _format_score(scores["dice"]), cases])
    return rows + _grounding_rows(metrics["localization"]["rexgrounding"])


def _grounding_rows(grounding: dict[str, Any] | None) -> list[list[str]]:
    """Figures by the protocol of ReXGroundingCT, where its outlines were evaluated."""
    if grounding is None:
        return []
    count = f"{grounding['n_findings']} findings of {grounding['n_scans']} scans"
    rows = []
    for score in CARD_GROUNDING_SCORES:
        metric = f"ReXGroundingCT {score.replace('_', ' ')}"
        rows.append(["lesions", metric, _format_score(grounding[score]), count])
    return rows


def _report_rows(metrics: dict[str, Any]) -> list[list[str]]:
    if not metrics["reports"]:
        return []
    with_image, without_image = metrics["reports"]["image"], metrics["reports"]["image_ablated"]
    rows = []
    for score in CARD_REPORT_SCORES:
        if score in with_image:
            ablated = _format_score(without_image[score])
            value = f"{_format_score(with_image[score])} ({ablated} without the image)"
            rows.append(["reports", score.replace("_", " "), value, f"{with_image['n']} cases"])
    return rows


def _format_score(value: float | None) -> str:
    return NO_VALUE if value is None else f"{value:.3f}"
