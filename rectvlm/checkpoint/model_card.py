"""The model card of an exported model: `README.md`, with the metadata that the Hub reads."""

import json
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor

from rectvlm.checkpoint import model_folder
from rectvlm.checkpoint.model_folder import ModelDescription
from rectvlm.config import Config, phase_key
from rectvlm.labels import FINDINGS, LESIONS, REGIONS
from rectvlm.types import UserError

TEMPLATE_FILE = Path(__file__).parent / "model_card.md.j2"
HUB_ID_PATTERN = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
CARD_FINDING_SCORES = ("auroc", "f1", "precision", "recall")
CARD_REPORT_SCORES = ("bleu_1", "bleu_4", "rouge_l", "bertscore_f1")


def render_model_card(
    name: str,
    description: ModelDescription,
    config: Config,
    tensors: Mapping[str, Tensor],
    license_id: str | None,
    datasets: Sequence[str],
    metrics: Path | None,
) -> str:
    """The text of the card.

    Args:
        name: heading.
        description: what the folder holds.
        config: its configuration.
        tensors: to count parameters.
        license_id: for the metadata, for example `apache-2.0`; None leaves it to whoever publishes.
        datasets: hub ids or names of what it was trained on.
        metrics: JSON of `rectvlm evaluate`.

    Raises:
        UserError: the metrics cannot be read.
    """
    parts, training = description.parts, description.training
    base = config.generator.model if "generator" in parts else None
    schedule = config.train.phases.get(phase_key(training.phase, training.stage))
    values: dict[str, Any] = {
        "name": name,
        "size": config.name,
        "version": version("rectvlm"),
        "gives": _describe_outputs(parts),
        "grid": " × ".join(map(str, config.data.grid)),
        "spacing": " × ".join(f"{mm:g}" for mm in config.data.spacing),
        "findings": [finding.lower() for finding in FINDINGS],
        "lesions": [lesion.name for lesion in LESIONS] if "localizer" in parts else [],
        "regions": REGIONS,
        "parts": _part_rows(description, tensors),
        "language_model": base,
        "quantization": "4-bit NF4, frozen"
        if config.generator.quantization == "nf4"
        else "bfloat16, frozen",
        "lora_rank": config.generator.lora_rank,
        "training": training,
        "schedule": schedule,
        "losses": ", ".join(f"{task} {weight:g}" for task, weight in config.train.loss_weights),
        "versions": ", ".join(
            f"{package} {number}" for package, number in description.versions.items()
        ),
        "datasets": datasets,
        "evaluation": None if metrics is None else _read_evaluation(metrics),
        "license": license_id,
    }
    return str(
        ModelCard.from_template(
            _card_metadata(parts, base, license_id, datasets), str(TEMPLATE_FILE), **values
        )
    )


def _card_metadata(
    parts: Sequence[str], base: str | None, license_id: str | None, datasets: Sequence[str]
) -> ModelCardData:
    """What the Hub searches by. A language model that is not on the Hub cannot be named there."""
    task = (
        "image-to-text"
        if base
        else "image-segmentation"
        if "localizer" in parts
        else "image-classification"
    )
    on_hub = base if base is not None and HUB_ID_PATTERN.fullmatch(base) else None
    return ModelCardData(
        language="en",
        license=license_id,
        library_name="rectvlm",
        pipeline_tag=task,
        tags=[
            "medical",
            "radiology",
            "chest-ct",
            "3d",
            "vision-language",
            *(["lora", "peft"] if base else []),
        ],
        datasets=[dataset for dataset in datasets if HUB_ID_PATTERN.fullmatch(dataset)] or None,
        base_model=on_hub,
        base_model_relation="adapter" if on_hub else None,
    )


def _describe_outputs(parts: Sequence[str]) -> str:
    said = [f"the probabilities of {len(FINDINGS)} findings"]
    said += [f"masks of {len(LESIONS)} kinds of lesions"] if "localizer" in parts else []
    said += ["a written report"] if "generator" in parts else []
    return said[0] if len(said) == 1 else f"{', '.join(said[:-1])} and {said[-1]}"


def _part_rows(
    description: ModelDescription, tensors: Mapping[str, Tensor]
) -> list[dict[str, str]]:
    """Parameters of each part; the language model's own are not in the folder."""
    rows = []
    for part in description.parts:
        count = sum(
            tensor.numel() for name, tensor in tensors.items() if name.startswith(f"{part}.")
        )
        names = (
            f"`{part}.*`"
            if part != "generator"
            else f"`{part}.resampler.*`, and `{model_folder.ADAPTER_FOLDER}/`"
        )
        rows.append({"name": part, "parameters": f"{count:,}", "names": names})
    return rows


def _read_evaluation(path: Path) -> dict[str, Any]:
    """Figures of `rectvlm evaluate`, as rows of metric, value and n."""
    try:
        found = json.loads(path.read_bytes())
        mean = found["classification"]["macro"]
        rows = [
            [
                "findings",
                f"macro {score}",
                _format_number(mean[score]),
                f"{mean[f'n_findings_{score}']} of {len(FINDINGS)}",
            ]
            for score in CARD_FINDING_SCORES
        ]
        for key, row in (found["localization"] or {"per_lesion": {}})["per_lesion"].items():
            cases = f"{row['n_cases']} cases, {row['n_present']} with it"
            rows.append(
                ["lesions", f"Dice, {key.replace('_', ' ')}", _format_number(row["dice"]), cases]
            )
        if found["reports"]:
            image, air = found["reports"]["image"], found["reports"]["image_ablated"]
            for score in (score for score in CARD_REPORT_SCORES if score in image):
                value = f"{_format_number(image[score])} ({_format_number(air[score])} without the image)"
                rows.append(["reports", score.replace("_", " "), value, f"{image['n']} cases"])
        told = {name: found[name] for name in ("n_cases", "split", "step")}
        return told | {"selected": found.get("selected_on_this_split"), "rows": rows}
    except OSError as error:
        raise UserError(f"The metrics {path} cannot be read ({error.strerror}).") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path} is not the JSON of `rectvlm evaluate` ({reason}): give its metrics.json."
        ) from None


def _format_number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
