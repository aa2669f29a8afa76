"""Weights that a phase starts from: the parts of a checkpoint that it needs.

The checkpoint may hold more parts, which are left, or fewer, whose weights then start at random.
"""

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from rectvlm.checkpoint import Checkpoint
from rectvlm.checkpoint.strict_load import check_tensors
from rectvlm.config import Config, ModelPart
from rectvlm.data.dataset import ShardDataset
from rectvlm.data.shard_manifest import read_manifest
from rectvlm.data.store import ShardStore
from rectvlm.labels import FINDINGS
from rectvlm.models import RectVLM
from rectvlm.models.encoder import build_encoder, load_starting_weights
from rectvlm.models.meta_model import build_meta_model
from rectvlm.models.prompt_embeddings import PromptEmbeddings
from rectvlm.train.phases import Phase
from rectvlm.types import UserError

log = logging.getLogger(__name__)

_SHAPE_SETTINGS = {
    "data": {"grid", "windows"},
    "encoder": {
        *("name", "patch", "width", "depth", "heads", "volume_every", "mlp_ratio", "tap_blocks"),
        "init",
    },
    "classifier": {"width"},
    "localizer": {"width", "depth", "heads", "channels", "volumes_to_findings"},
    "generator": {"model", "queries", "width", "depth", "heads", "lora_rank", "lora_targets"},
}
"""Settings that decide which tensors a part has, by section of the configuration."""


def choose_parts(phase: Phase, checkpoint: Checkpoint) -> tuple[ModelPart, ...]:
    """Choose the parts of a checkpoint that a phase takes.

    Raises:
        UserError: it holds none of them.
    """
    available = checkpoint.list_available_parts()
    parts = tuple(part for part in phase.parts if part in available)
    if not parts:
        raise UserError(
            f"{checkpoint.folder} holds {', '.join(available) or 'no part'}, of which phase "
            f"{phase.number} needs nothing: it starts from {', '.join(phase.parts)}; give --from "
            "another model."
        )
    return parts


def set_label_prior(model: RectVLM, shards: str | Path | ShardStore) -> None:
    """Start the classifier's bias at the log-odds of the known labels of the train split.

    The counts are those of the shards' manifest: one small file, and the same on every rank.

    Raises:
        UserError: the manifest is missing or damaged.
    """
    counts = read_manifest(shards).counts["train"]["labels"]
    present = torch.tensor([counts[finding]["present"] for finding in FINDINGS])
    absent = torch.tensor([counts[finding]["absent"] for finding in FINDINGS])
    model.classifier.set_prior(present, absent)


def log_parts(phase: Phase, checkpoint: Checkpoint, parts: Collection[ModelPart]) -> None:
    """Log what a phase takes, what it leaves and what starts at random."""
    random_parts = [part for part in phase.parts if part not in parts]
    left_parts = [part for part in checkpoint.list_available_parts() if part not in parts]
    message = f"starting from {checkpoint.folder} with its {', '.join(parts)}"
    if random_parts:
        message += f"; {', '.join(random_parts)} with random weights"
    if left_parts:
        message += f"; its {', '.join(left_parts)} is left: phase {phase.number} has none"
    # The last part of a phase is the one that it adds.
    is_usual = set(random_parts) <= {phase.parts[-1]} and "encoder" in parts
    log.log(logging.INFO if is_usual else logging.WARNING, "%s", message)


def check_image_parts(
    config: Config, checkpoint: Checkpoint, tensors: Mapping[str, Tensor]
) -> None:
    """Check that tensors fit the configuration, before the language model is loaded.

    Raises:
        UserError: naming the settings that differ.
    """
    parts = {name.partition(".")[0] for name in tensors} - {"prompts"}
    image_parts: list[ModelPart] = ["encoder", "classifier"]
    if "localizer" in parts:
        image_parts.append("localizer")
    with explain_misfit(config, checkpoint):
        model = build_meta_model(config, image_parts, tensors["prompts.present"].shape[1], None)
        image_tensors = {
            name: tensor for name, tensor in tensors.items() if not name.startswith("generator.")
        }
        expected = select_names(model, parts)
        check_tensors(model, image_tensors, expected, checkpoint.folder)


def check_source_fits(phase: Phase, config: Config, source: Path) -> None:
    """Check that the weights a phase starts from fit, before an earlier run gives way.

    Raises:
        UserError: the checkpoint has nothing that the phase needs, or its weights do not fit.
    """
    checkpoint = Checkpoint.open(source)
    parts = [part for part in choose_parts(phase, checkpoint) if part != "generator"]
    tensors = checkpoint.read_tensors(parts)
    PromptEmbeddings.from_tensors(tensors, source)
    check_image_parts(config, checkpoint, tensors)


def check_encoder_init(config: Config) -> None:
    """Check that the weights of `encoder.init`, if any, are there and fit the encoder.

    Raises:
        UserError: they are not, or the encoder cannot start from weights of others.
    """
    if config.encoder.init is None:
        return
    with torch.device("meta"):
        encoder = build_encoder(config.encoder, config.data)
    load_starting_weights(encoder, config.encoder)


def start_encoder(model: RectVLM, config: Config, dataset: ShardDataset) -> None:
    """Give an encoder that no checkpoint holds what its configuration names: weights of others,
    or an atlas, which is the same on every rank.

    Raises:
        UserError: the weights do not fit.
    """
    if config.encoder.init is not None:
        log.info("%s", load_starting_weights(model.encoder, config.encoder))
    if config.encoder.atlas_cases:
        atlas_cases = range(min(config.encoder.atlas_cases, len(dataset)))
        model.encoder.fit_atlas(torch.from_numpy(dataset[number].ct) for number in atlas_cases)


def select_names(model: RectVLM, parts: Collection[str]) -> list[str]:
    """Names of the tensors of some parts, and of the prompts."""
    owners = {*parts, "prompts"}
    return [name for name in model.checkpoint_tensor_names() if name.partition(".")[0] in owners]


@contextmanager
def explain_misfit(config: Config, checkpoint: Checkpoint) -> Iterator[None]:
    """Name the settings that differ where the weights of a checkpoint do not fit a model."""
    try:
        yield
    except UserError:
        differences = _list_differing_settings(config, checkpoint)
        if not differences:
            raise
        raise UserError(
            f"{checkpoint.folder} does not fit the configuration {config.name}: "
            f"{', '.join(differences)}; set the same values, or give --from a model that has them."
        ) from None


def _list_differing_settings(config: Config, checkpoint: Checkpoint) -> list[str]:
    differences = []
    for section in ("data", *checkpoint.parts):
        names = _SHAPE_SETTINGS[section]
        here = getattr(config, section).model_dump(mode="json", include=names)
        there = getattr(checkpoint.config, section).model_dump(mode="json", include=names)
        for name in here:
            if here[name] != there[name]:
                differences.append(f"{section}.{name} is {there[name]} there and {here[name]} here")
    return differences
