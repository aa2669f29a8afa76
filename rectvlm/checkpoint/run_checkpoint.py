"""Checkpoints: the trained weights with all that is needed to use them or to go on.

    RUN/phaseN/checkpoints/step-000060/
        weights.safetensors   trained weights and prompt embeddings (frozen language model weights stay where they are)
        config.yaml           the resolved configuration
        state.json            phase, parts, step, samples seen, versions
        engine/               32-bit weights and optimizer state, one file a rank (`rectvlm.train.engine.optimizer_shards`)
        manifest.json         size and SHA-256 of each of these files (`rectvlm.checkpoint.integrity`)
    RUN/phaseN/best.json      which checkpoint validated best; `RUN/phaseN/best` names it wherever a folder is asked for

A checkpoint is written under a temporary name and renamed when it is whole and on the disk. Nothing in it is a pickle.

An exported model (`rectvlm.checkpoint.model_folder`) is read by the same functions, so whatever takes a checkpoint takes it too.
"""

import json
import logging
import platform
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rectvlm import pretrained
from rectvlm.checkpoint import integrity, model_folder
from rectvlm.config import MODEL_PARTS, Config, ModelPart, load_config
from rectvlm.files import atomic_file
from rectvlm.models import RectVLM
from rectvlm.models.language_model import load_language_model, resolve_device
from rectvlm.models.prompt_embeddings import PromptEmbeddings
from rectvlm.types import UserError

log = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=RectVLM)

WEIGHTS_FILE, CONFIG_FILE, STATE_FILE, ENGINE_FOLDER = (
    "weights.safetensors",
    "config.yaml",
    "state.json",
    "engine",
)
BEST_CHECKPOINT = "best"
THRESHOLDS_FILE = "thresholds.json"
"""Fitted thresholds of the findings, in the checkpoint's folder, where prediction finds them."""


@dataclass(frozen=True)
class TrainingState:
    """Where a run stood."""

    phase: int
    parts: tuple[ModelPart, ...]
    step: int
    samples_seen: int
    """By all ranks together."""
    world_size: int
    versions: dict[str, str]
    stage: str | None = None
    """Sub-step of the phase."""
    bad_in_a_row: int = 0
    """Steps skipped just before."""


_TRAINING_STATE_ADAPTER = TypeAdapter(TrainingState)


def package_versions(*more: str) -> dict[str, str]:
    """Versions of Python, of the packages that decide what a model says, and of `more`."""
    found = {"python": platform.python_version()}
    for name in (
        "rectvlm",
        "torch",
        "accelerate",
        "deepspeed",
        "transformers",
        "peft",
        "bitsandbytes",
        *more,
    ):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def checkpoint_tensor_names(model: nn.Module) -> list[str]:
    """Names of what a checkpoint holds: parameters that may train, the prompt embeddings, the encoder's atlas."""
    return [
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    ] + checkpoint_buffer_names(model)


def checkpoint_buffer_names(model: nn.Module) -> list[str]:
    """Names of the buffers that no configuration gives back, here and in an exported model: prompts and the atlas."""
    return [
        f"{part}.{name}"
        for part in ("prompts", "encoder")
        for name, _ in model.get_submodule(part).named_buffers()
    ]


def write_checkpoint(
    folder: Path, tensors: dict[str, Tensor], config: Config, state: TrainingState
) -> list[Path]:
    """Write weights, configuration and state into a folder that exists; the files."""
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE
    )
    (folder / CONFIG_FILE).write_text(config.to_yaml())
    (folder / STATE_FILE).write_text(
        json.dumps(_TRAINING_STATE_ADAPTER.dump_python(state, mode="json"), indent=2) + "\n"
    )
    return [folder / WEIGHTS_FILE, folder / CONFIG_FILE, folder / STATE_FILE]


def step_folder(phase_folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return phase_folder / "checkpoints" / f"step-{step:06d}"


def list_step_folders(phase_folder: Path) -> list[Path]:
    """Checkpoints of a phase, whole or damaged, oldest first; a folder with another name, as a copy, is none."""
    found = [
        path
        for path in phase_folder.glob("checkpoints/step-*")
        if path.name.removeprefix("step-").isdigit()
    ]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def list_checkpoints(phase_folder: Path) -> list[Path]:
    """Checkpoints of a phase that can be read, oldest first."""
    return [folder for folder in list_step_folders(phase_folder) if (folder / STATE_FILE).is_file()]


def prune_checkpoints(phase_folder: Path, keep: int) -> None:
    """Remove all but the newest checkpoints and the best. One that cannot be removed stays, with a warning: that is no
    reason to end a run."""
    spared = best_checkpoint(phase_folder)
    for folder in list_checkpoints(phase_folder)[:-keep]:
        if folder != spared:
            try:
                integrity.remove_checkpoint(folder)
            except OSError as error:
                log.warning("%s could not be removed (%s)", folder, error)


def best_checkpoint(phase_folder: Path) -> Path | None:
    """The checkpoint that validated best, where there is one."""
    try:
        step = int(json.loads((phase_folder / f"{BEST_CHECKPOINT}.json").read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    folder = step_folder(phase_folder, step)
    return folder if (folder / STATE_FILE).is_file() else None


def record_best_checkpoint(
    phase_folder: Path, step: int | None, metric: str, value: float | None
) -> None:
    """Write down which checkpoint is the best, once it is whole; None forgets it."""
    path = phase_folder / f"{BEST_CHECKPOINT}.json"
    if step is None:
        path.unlink(missing_ok=True)
        return
    with atomic_file(path) as file:
        file.write((json.dumps({"step": step, "metric": metric, "value": value}) + "\n").encode())


def find_checkpoint(folder: str | Path, remedy: str) -> Path:
    """The checkpoint that a folder means: itself, the newest or the best (`…/best`) of a phase folder, or an exported
    model.

    Raises:
        UserError: none there; `remedy` says what to do.
    """
    folder = Path(folder)
    if folder.name == BEST_CHECKPOINT and not folder.exists():
        chosen = best_checkpoint(folder.parent)
        if chosen is None:
            raise UserError(
                f"No best checkpoint in {folder.parent}: expected {BEST_CHECKPOINT}.json there, which validation during training "
                f"writes (validation.every); {remedy}."
            )
        return chosen
    if (folder / STATE_FILE).is_file() or model_folder.is_model_folder(folder):
        return folder
    found = list_checkpoints(folder)
    if not found:
        raise UserError(
            f"No checkpoint in {folder}: expected checkpoints/step-…/{STATE_FILE} there; {remedy}."
        )
    return found[-1]


def read_training_state(folder: Path) -> TrainingState:
    """Phase, step and parts of a checkpoint.

    Raises:
        UserError: the file is damaged.
    """
    if model_folder.is_model_folder(folder):
        found = model_folder.read_description(folder)
        return TrainingState(parts=found.parts, versions=found.versions, **asdict(found.training))
    try:
        return _TRAINING_STATE_ADAPTER.validate_json((folder / STATE_FILE).read_bytes())
    except ValidationError as error:
        raise UserError(
            f"{folder / STATE_FILE} is damaged: {error.errors()[0]['msg']}; use another checkpoint."
        ) from error


def read_config(folder: Path) -> Config:
    """The configuration that a checkpoint was trained with.

    Raises:
        UserError: the file is missing or damaged.
    """
    if model_folder.is_model_folder(folder):
        return model_folder.parse_stored_config(model_folder.read_description(folder), folder)
    return load_config(folder / CONFIG_FILE)


def read_weights(folder: Path, parts: Sequence[ModelPart] | None = None) -> dict[str, Tensor]:
    """All tensors of a checkpoint, or those of some parts, with the prompts.

    Raises:
        UserError: a file is missing or damaged.
    """
    if model_folder.is_model_folder(folder):
        return model_folder.read_tensors(folder, model_folder.read_description(folder), parts)
    if integrity.has_manifest(folder) and (fault := integrity.find_faults(folder, [WEIGHTS_FILE])):
        raise UserError(f"{folder} is damaged: {fault[0]}; use another checkpoint.")
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder / WEIGHTS_FILE} cannot be read ({error}); use another checkpoint."
        ) from error
    left_out = set(MODEL_PARTS) - set(MODEL_PARTS if parts is None else parts)
    return {
        name: tensor for name, tensor in tensors.items() if name.partition(".")[0] not in left_out
    }


def load_weights(
    model: nn.Module, tensors: dict[str, Tensor], expected: Iterable[str], where: Path
) -> None:
    """Copy tensors into a model, strictly.

    Args:
        model: receives them, in its own dtypes.
        tensors: by name.
        expected: names that must be there, and no others.
        where: for the message.

    Raises:
        UserError: naming what is missing, what is unexpected and what has another shape.
    """
    expected = set(expected)
    check_weights(model, tensors, expected, where)
    own: dict[str, Tensor] = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name in expected:
            own[name].copy_(tensors[name])


def check_weights(
    model: nn.Module, tensors: dict[str, Tensor], expected: Iterable[str], where: Path
) -> None:
    """Whether tensors fit a model; it may lie on the meta device.

    Raises:
        UserError: naming what is missing, what is unexpected and what has another shape.
    """
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    # ZeRO-3 leaves a sharded parameter without entries and keeps its shape here.
    shapes = {
        name: tuple(getattr(tensor, "ds_shape", tensor.shape)) for name, tensor in own.items()
    }
    expected = set(expected)
    faults = [
        ("missing", sorted(expected - tensors.keys())),
        ("unexpected", sorted(tensors.keys() - expected)),
        (
            "of another shape",
            [
                f"{name} {tuple(tensors[name].shape)} instead of {shapes[name]}"
                for name in sorted(expected & tensors.keys())
                if tuple(tensors[name].shape) != shapes[name]
            ],
        ),
    ]
    if any(names for _, names in faults):
        text = "; ".join(f"{kind}: {_join_names(names)}" for kind, names in faults if names)
        raise UserError(
            f"The weights in {where} do not fit the model: {text}; use the configuration they came from."
        )


def _join_names(names: Sequence[str], most: int = 8) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def prompts_from_tensors(tensors: dict[str, Tensor], where: Path) -> PromptEmbeddings:
    """The prompt embeddings that a checkpoint carries.

    Raises:
        UserError: it carries none.
    """
    try:
        return PromptEmbeddings(
            *(tensors[f"prompts.{name}"] for name in ("present", "absent", "lesions"))
        )
    except KeyError as error:
        raise UserError(
            f"The weights in {where} lack {error}: they are not those of a rectvlm run."
        ) from error


def load_model(
    folder: str | Path, device: torch.device | str | None = None
) -> tuple[RectVLM, Config]:
    """A trained model, ready to predict.

    Args:
        folder: a phase folder of a run, one checkpoint, or an exported model.
        device: by default the GPU if there is one.

    Raises:
        UserError: no checkpoint there, or one that does not fit.
    """
    return load_model_parts(RectVLM, folder, device)


def load_model_parts(
    model_class: type[ModelT],
    folder: str | Path,
    device: torch.device | str | None = None,
    parts: Sequence[ModelPart] | None = None,
    language_model: str | None = None,
) -> tuple[ModelT, Config]:
    """`load_model` for a class of its own, or for some parts.

    Args:
        kind: class of the model.
        folder: a phase folder of a run, one checkpoint, or an exported model.
        device: by default the GPU if there is one.
        parts: build and read these alone, by default all.
        language_model: folder or hub id to take the language model from, by default the one of the configuration.

    Raises:
        UserError: no checkpoint there, or one that does not fit.
    """
    checkpoint = find_checkpoint(
        folder, "train first, for example `accelerate launch launch/phase1.py`"
    )
    config, tensors = read_config(checkpoint), read_weights(checkpoint, parts)
    parts = read_training_state(checkpoint).parts if parts is None else parts
    device = resolve_device(device)
    language = None
    if "generator" in parts:
        reference = pretrained.resolve_model(language_model or config.generator.model)
        language = load_language_model(config.generator, reference, device)
    model = model_class(config, parts, prompts_from_tensors(tensors, checkpoint), language)
    load_weights(model, tensors, checkpoint_tensor_names(model), checkpoint)
    return model.eval().to(device), config
