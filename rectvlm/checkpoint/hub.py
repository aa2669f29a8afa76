"""`RectVLM.from_pretrained` and `save_pretrained`: models in the layout of Hugging Face, from a folder or the Hub.

    from rectvlm import RectVLM
    model = RectVLM.from_pretrained("owner/name")
    model.save_pretrained("folder")

The layout is in `rectvlm.checkpoint.model_folder`. Command: `rectvlm export --checkpoint runs/demo/phase3 --out folder`.
"""

import copy
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from peft import LoraConfig
from torch import Tensor, nn

from rectvlm import models, pretrained
from rectvlm.checkpoint import manifest, model_folder
from rectvlm.checkpoint import run_checkpoint as checkpoints
from rectvlm.checkpoint.model_card import HUB_ID_PATTERN, render_model_card
from rectvlm.checkpoint.model_folder import TrainingRecord
from rectvlm.checkpoint.run_checkpoint import THRESHOLDS_FILE, TrainingState
from rectvlm.config import MODEL_PARTS, Config, ModelPart
from rectvlm.models.language_model import load_language_model, resolve_device
from rectvlm.models.meta_model import build_meta_model
from rectvlm.pretrained.sources import Hub, explain_hub_errors
from rectvlm.types import UserError

log = logging.getLogger(__name__)

MAX_SHARD_SIZE = "5GB"
"""Size above which weights are split over files, as in Transformers."""


class RectVLM(models.RectVLM):
    """The model, with the two methods of Hugging Face."""

    training_state: TrainingState | None = None
    """How the weights came about, when they were loaded."""

    @classmethod
    def from_pretrained(
        cls,
        reference: str | Path,
        device: torch.device | str | None = None,
        revision: str | None = None,
        *,
        parts: Sequence[ModelPart] | None = None,
        language_model: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | None = None,
    ) -> "RectVLM":
        """Load a model in eval mode.

        Args:
            reference: an exported folder, a run's phase folder or checkpoint, or a hub id.
            device: by default the GPU if there is one.
            revision: branch, tag or commit on the Hub.
            parts: only these; the encoder and the classifier always belong to them. By default all that are there.
            language_model: folder or hub id to take the language model from, by default the one the folder names.
            cache_dir: of the Hub's files, by default that of huggingface_hub.
            token: of the Hub, by default that of the login.

        Raises:
            UserError: nothing there, no access, parts that would answer differently alone, or weights that do not fit.
        """
        folder = locate_model(reference, revision, parts, cache_dir, token)
        state = checkpoints.read_training_state(folder)
        if parts is not None:
            _check_parts(parts, state.parts, folder)
        model, _ = checkpoints.load_model_parts(cls, folder, device, parts, language_model)
        model.training_state = state
        return model

    def save_pretrained(self, folder: str | Path, **options: Any) -> Path:
        """Write the model into a folder; see `rectvlm.checkpoint.hub.save_pretrained` for the options."""
        return save_pretrained(self, folder, **{"state": self.training_state, **options})


@dataclass(frozen=True)
class ExportOptions:
    """What a folder says beside the weights, and how it is written."""

    base_model: str | None = None
    """How others find the language model, where the configuration has a path of this machine."""
    license_id: str | None = None
    """For the card, for example `apache-2.0`; left to whoever publishes by default."""
    datasets: Sequence[str] = ()
    """What it was trained on, hub ids or names, for the card."""
    metrics: str | Path | None = None
    """JSON of `rectvlm evaluate`, for the card."""
    thresholds: str | Path | None = None
    """Fitted thresholds of the findings, for predictions."""
    max_shard_size: str = MAX_SHARD_SIZE
    """Size above which `model.safetensors` is split."""
    overwrite: bool = False
    """Replace the model in a folder that is there; other files in it stay."""


def save_pretrained(
    model: models.RectVLM,
    folder: str | Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    state: TrainingState | None = None,
    **options: Any,
) -> Path:
    """Write a model into a folder, and compare what was written with the model to the last bit.

    Args:
        model: whole, or sharded by ZeRO-3 when `state_dict` is given.
        folder: appears complete or not at all.
        state_dict: gathered tensors by name, where the model's own are sharded.
        state: how far it was trained, for the record.
        options: fields of `Options`.

    Returns:
        The folder.

    Raises:
        UserError: the folder is there, or tensors are missing, unexpected, sharded or of another shape.
    """
    own = _parameters_and_buffers(model)
    names = exported_tensor_names(model)
    if state_dict is None:
        empty = [name for name in names if hasattr(own[name], "ds_id") or own[name].is_meta]
        if empty:
            raise UserError(
                f"{len(empty)} tensors of the model, such as {empty[0]}, are sharded or have no values: give gathered "
                "ones as `state_dict`, or export the run's checkpoint with `rectvlm export`."
            )
        state_dict = {name: own[name].detach() for name in names}
    checkpoints.check_weights(model, dict(state_dict), names, Path("state_dict"))
    if state is None:
        # The phase is the one that trains these parts; how far is not known.
        state = TrainingState(
            len(model.parts) - 1, model.parts, 0, 0, 1, checkpoints.package_versions()
        )
    state = replace(state, parts=model.parts)
    return _export_model(dict(state_dict), model, state, Path(folder), ExportOptions(**options))


def export_checkpoint(checkpoint: str | Path, folder: str | Path, **options: Any) -> Path:
    """Write a run's checkpoint as a folder. The language model is not loaded, so any machine can do it.

    Thresholds and metrics of an evaluation that lie with the checkpoint come along.

    Args:
        checkpoint: a run's phase folder, or one checkpoint in it.
        folder: appears complete or not at all.
        options: fields of `Options`.

    Returns:
        The folder.

    Raises:
        UserError: no checkpoint, one that does not fit its configuration, or the folder is there.
    """
    source = checkpoints.find_checkpoint(checkpoint, "give a run's phase folder")
    state, config, tensors = (
        checkpoints.read_training_state(source),
        checkpoints.read_config(source),
        checkpoints.read_weights(source),
    )
    width = checkpoints.prompts_from_tensors(tensors, source).embedding_width
    geometry = (
        pretrained.read_model_config(config.generator.model) if "generator" in state.parts else None
    )
    frame = build_meta_model(config, state.parts, width, geometry)
    checkpoints.check_weights(frame, tensors, exported_tensor_names(frame), source)
    beside = {
        "thresholds": source / THRESHOLDS_FILE,
        "metrics": source / "evaluation-valid" / "metrics.json",
    }
    found: dict[str, Any] = {name: path for name, path in beside.items() if path.is_file()}
    return _export_model(tensors, frame, state, Path(folder), ExportOptions(**(found | options)))


def load_part(
    reference: str | Path,
    part: ModelPart,
    device: torch.device | str | None = None,
    revision: str | None = None,
) -> nn.Module:
    """One part alone, such as the encoder, as a plain module in eval mode; the other parts are not read.

    Raises:
        UserError: nothing there, the part is not in it, or its weights do not fit.
    """
    folder = locate_model(reference, revision, [part])
    state, config = checkpoints.read_training_state(folder), checkpoints.read_config(folder)
    if part not in state.parts:
        raise UserError(f"{folder} has no {part}: it holds {', '.join(state.parts)}.")
    tensors = checkpoints.read_weights(folder, [part])
    device = resolve_device(device)
    language = None
    if part == "generator":
        language = load_language_model(
            config.generator, pretrained.resolve_model(config.generator.model), device
        )
    needed = [name for name in MODEL_PARTS if name in ("encoder", "classifier", part)]
    model = models.RectVLM(
        config, needed, checkpoints.prompts_from_tensors(tensors, folder), language
    )
    expected = [
        name for name in exported_tensor_names(model) if name.partition(".")[0] in (part, "prompts")
    ]
    checkpoints.load_weights(model, tensors, expected, folder)
    return model.get_submodule(part).eval().to(device)


def exported_tensor_names(model: models.RectVLM) -> list[str]:
    """Names of what travels: everything but the language model's own weights, whether it is frozen or not."""
    trained = [
        name
        for name, _ in model.named_parameters()
        if not name.startswith(model_folder.LANGUAGE_MODEL_PREFIX) or ".lora_" in name
    ]
    return trained + checkpoints.checkpoint_buffer_names(model)


def locate_model(
    reference: str | Path,
    revision: str | None = None,
    parts: Sequence[ModelPart] | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
) -> Path:
    """The local folder of a model; from the Hub only what `parts` need is fetched, and never a pickle.

    Raises:
        UserError: no such folder, no such repository or revision, no access to it, or no way to the Hub.
    """
    path, name = Path(reference).expanduser(), str(reference)
    if path.is_dir():
        if revision is not None:
            raise UserError(
                f"{path} is a folder here, which has no revision {revision!r}: leave the revision out."
            )
        return checkpoints.find_checkpoint(
            path, f"or {model_folder.CONFIG_FILE} of an exported model; give one of the two"
        )
    if not HUB_ID_PATTERN.fullmatch(name):
        raise UserError(
            f"No model at {name}: expected an exported folder, a run's phase folder or a hub id owner/name."
        )
    patterns = [
        model_folder.CONFIG_FILE,
        "model*.safetensors",
        model_folder.INDEX_FILE,
        THRESHOLDS_FILE,
    ]
    if parts is None or "generator" in parts:
        patterns += [
            f"{model_folder.ADAPTER_FOLDER}/{file}"
            for file in (model_folder.ADAPTER_CONFIG_FILE, model_folder.ADAPTER_WEIGHTS_FILE)
        ]
    with explain_hub_errors(Hub(name, revision or constants.DEFAULT_REVISION)):
        fetched = _download_snapshot(
            name, revision=revision, allow_patterns=patterns, cache_dir=cache_dir, token=token
        )
    if not model_folder.is_model_folder(fetched):
        raise UserError(
            f"{name} on the Hub is no model of rectvlm: it has no {model_folder.CONFIG_FILE}."
        )
    return fetched


def _download_snapshot(name: str, **options: Any) -> Path:
    """Through the Hub's cache. A name that is not there may have been meant as a folder, which the message says."""
    try:
        return Path(snapshot_download(name, library_name="rectvlm", **options))
    except GatedRepoError:
        raise
    except RepositoryNotFoundError:
        raise UserError(
            f"{name} is neither a folder here nor a repository that you may see at {constants.ENDPOINT}: check the "
            "spelling, or log in with `hf auth login` if it is private."
        ) from None
    except LocalEntryNotFoundError:
        reason = (
            "HF_HUB_OFFLINE is set"
            if constants.HF_HUB_OFFLINE
            else f"{constants.ENDPOINT} cannot be reached"
        )
        raise UserError(
            f"{name} is neither a folder here nor whole in the Hub's cache, and {reason}: fetch it once with a "
            "network, or give a folder."
        ) from None


def _check_parts(parts: Sequence[ModelPart], there: Sequence[ModelPart], folder: Path) -> None:
    missing = [part for part in parts if part not in there]
    if missing:
        raise UserError(f"{folder} has no {', '.join(missing)}: it holds {', '.join(there)}.")
    if not {"encoder", "classifier"} <= set(parts):
        raise UserError(
            f"parts {tuple(parts)} make no model: the encoder and the classifier belong to every one; "
            "rectvlm.checkpoint.hub.load_part loads one part alone."
        )
    if "generator" in parts and "localizer" not in parts:
        raise UserError(
            "parts with the generator need the localizer too: its prompt carries the lesions."
        )
    informs = checkpoints.read_config(folder).localizer.volumes_to_findings
    if informs and "localizer" in there and "localizer" not in parts:
        raise UserError(
            f"The localizer of {folder} is a summand of its findings (localizer.volumes_to_findings), so without it the classifier "
            "would answer differently: add the localizer to parts."
        )


def _parameters_and_buffers(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _export_model(
    tensors: dict[str, Tensor],
    model: models.RectVLM,
    state: TrainingState,
    folder: Path,
    options: ExportOptions,
) -> Path:
    """Write all files beside the folder, read them again, then move them."""
    folder = folder.expanduser().resolve()  # "." has no name, and a link is not to be replaced
    config, lora = _portable_config(model, options.base_model)
    training = TrainingRecord(
        state.phase, state.step, state.samples_seen, state.world_size, state.stage
    )
    description = model_folder.describe_model(config, state.parts, training, state.versions)
    metrics = None if options.metrics is None else Path(options.metrics)
    card = render_model_card(
        folder.name, description, config, tensors, options.license_id, options.datasets, metrics
    )
    with _staging_folder(folder, options.overwrite) as work:
        model_folder.write_model_folder(work, tensors, description, lora, options.max_shard_size)
        (work / model_folder.CARD_FILE).write_text(card.rstrip() + "\n", encoding="utf-8")
        if options.thresholds is not None:
            shutil.copyfile(options.thresholds, work / THRESHOLDS_FILE)
        verify_written_tensors(work, tensors)
    return folder


def verify_written_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Read a folder as `from_pretrained` does and compare it with what it should hold, to the last bit.

    Raises:
        UserError: naming what differs.
    """
    description = model_folder.read_description(folder)
    model_folder.parse_stored_config(description, folder)
    wrong = model_folder.find_differing_tensors(
        model_folder.read_tensors(folder, description), dict(tensors)
    )
    if wrong:
        raise UserError(
            f"{folder} does not hold what was written to it ({', '.join(wrong[:8])}): check the disk."
        )


def _portable_config(
    model: models.RectVLM, base_model: str | None
) -> tuple[Config, LoraConfig | None]:
    """Configuration and LoRA settings that name the language model as others find it."""
    config = model.config
    if model.generator is None:
        return config, None
    if base_model is not None:
        config = config.model_copy(
            update={"generator": config.generator.model_copy(update={"model": base_model})}
        )
    name = config.generator.model
    if Path(name).expanduser().is_dir():
        log.warning(
            "the language model is named as %s, a folder of this machine; base_model gives it another name",
            name,
        )
    lora = copy.deepcopy(model.generator.language_model.peft_config["default"])
    lora.base_model_name_or_path, lora.inference_mode = name, True
    lora.target_modules = sorted(
        lora.target_modules
    )  # PEFT keeps a set, whose order differs from run to run
    return config, lora


@contextmanager
def _staging_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """An empty folder beside the one to write; it takes that one's place when all is written."""
    taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken and (not overwrite or not folder.is_dir()):
        raise UserError(
            f"{folder} exists and is not empty: give a new folder, or replace the model in it with --overwrite."
        )
    work = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True)
        yield work
        for path in work.rglob("*"):
            if path.is_file():
                shutil.copymode(
                    work / model_folder.CARD_FILE, path
                )  # safetensors lets only the owner read
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if taken:
            _replace_model_files(work, folder)
        else:
            work.replace(folder)  # an empty folder gives way
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _replace_model_files(work: Path, folder: Path) -> None:
    """Put the files of one model in the place of another's.

    Without `config.json` a folder is no model, so it goes first and comes last: a kill leaves no mixture that loads.
    """
    (folder / model_folder.CONFIG_FILE).unlink(missing_ok=True)
    for path in [
        *folder.glob("model*.safetensors"),
        folder / model_folder.INDEX_FILE,
        folder / THRESHOLDS_FILE,
        folder / manifest.MANIFEST_FILE,
    ]:
        path.unlink(missing_ok=True)
    shutil.rmtree(folder / model_folder.ADAPTER_FOLDER, ignore_errors=True)
    for path in sorted(work.iterdir(), key=lambda path: path.name == model_folder.CONFIG_FILE):
        path.replace(folder / path.name)
