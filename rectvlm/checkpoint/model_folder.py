"""A trained model as a folder, in the layout of Hugging Face: what is in it, written and read here alone.

    FOLDER/
        config.json                     model_type "rectvlm": parts, configuration, labels, training, versions
        model.safetensors               encoder.*, classifier.*, localizer.*, generator.resampler.*, prompts.*
        adapter/adapter_config.json     LoRA of the language model, as PEFT reads it
        adapter/adapter_model.safetensors
        thresholds.json                 fitted thresholds of the findings, where the model was evaluated
        README.md                       model card (`rectvlm.checkpoint.model_card`)

Above a size limit `model.safetensors` becomes `model-00001-of-0000N.safetensors` with `model.safetensors.index.json`,
as Transformers does it. The language model itself is not in the folder: `config.json` says which one. Only safetensors
and JSON are read; a pickle is never opened.
"""

import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from peft import LoraConfig
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rectvlm.config import MODEL_PARTS, Config, ModelPart, parse_config
from rectvlm.labels import FINDINGS, LESIONS, REGIONS
from rectvlm.types import UserError

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE, CARD_FILE = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "README.md",
)
ADAPTER_FOLDER, ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE = (
    "adapter",
    "adapter_config.json",
    "adapter_model.safetensors",
)
MODEL_TYPE, FORMAT_VERSION = "rectvlm", 1
LANGUAGE_MODEL_PREFIX = "generator.language_model."
"""Prefix of the language model's names; of those that train, all are the adapter's."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def label_lists() -> dict[str, list[str]]:
    """The vocabulary, in the order of the logits, masks and region ids."""
    return {
        "findings": list(FINDINGS),
        "lesions": [lesion.key for lesion in LESIONS],
        "regions": [region.name for region in REGIONS],
    }


@dataclass(frozen=True)
class TrainingRecord:
    """How the weights came about."""

    phase: int
    step: int
    samples_seen: int
    world_size: int
    stage: str | None = None
    """Sub-step of the phase."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ModelDescription:
    """`config.json`."""

    parts: tuple[ModelPart, ...]
    config: dict[str, Any]
    """The whole configuration; `rectvlm.config.Config` validates it."""
    labels: dict[str, list[str]]
    training: TrainingRecord
    versions: dict[str, str]
    """Of Python and of the packages that the weights were trained with."""
    architectures: tuple[str, ...] = ("RectVLM",)
    model_type: str = MODEL_TYPE
    format: int = FORMAT_VERSION


_DESCRIPTION_ADAPTER = TypeAdapter(ModelDescription)


def is_model_folder(folder: Path) -> bool:
    """Whether a folder has the layout above; a run's checkpoint has `config.yaml` instead."""
    return (folder / CONFIG_FILE).is_file()


def describe_model(
    config: Config, parts: Collection[ModelPart], training: TrainingRecord, versions: dict[str, str]
) -> ModelDescription:
    """The description of a model."""
    tree = config.model_dump(mode="json")
    return ModelDescription(
        tuple(part for part in MODEL_PARTS if part in parts),
        tree,
        label_lists(),
        training,
        versions,
    )


def read_description(folder: Path) -> ModelDescription:
    """Read and check `config.json`.

    Raises:
        UserError: missing, damaged, of another kind of model, or with other labels than this version's.
    """
    path = folder / CONFIG_FILE
    tree = _read_json(path)
    kind = tree.get("model_type")
    if kind != MODEL_TYPE:
        raise UserError(
            f"{path} describes a model of type {kind!r}, not {MODEL_TYPE!r}: give a folder of rectvlm."
        )
    if isinstance(tree.get("format"), int) and tree["format"] > FORMAT_VERSION:
        raise UserError(
            f"{path} has format {tree['format']}, this version reads up to {FORMAT_VERSION}: update rectvlm."
        )
    try:
        found = _DESCRIPTION_ADAPTER.validate_python(tree)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise UserError(
            f"{path} is damaged: {where}: {fault['msg']}; fetch or export the model again."
        ) from None
    for name, own in label_lists().items():
        if found.labels.get(name) != own:
            raise UserError(
                f"{path} lists other {name} than this version of rectvlm, or in another order, so that its weights "
                "would be read under wrong names; use the version that wrote it."
            )
    return found


def parse_stored_config(description: ModelDescription, where: Path) -> Config:
    """The validated configuration.

    Raises:
        UserError: a key is missing, unknown or of the wrong type.
    """
    return parse_config(description.config, where=str(where / CONFIG_FILE))


def write_model_folder(
    folder: Path,
    tensors: dict[str, Tensor],
    description: ModelDescription,
    lora: LoraConfig | None,
    max_shard_size: str,
) -> None:
    """Write the layout into an empty folder, `config.json` last.

    Args:
        folder: exists.
        tensors: by their names in the model, on the CPU or not.
        description: goes to `config.json`.
        lora: the adapter's settings; needed when `tensors` holds an adapter.
        max_shard_size: for example `5GB`.

    Raises:
        UserError: `max_shard_size` is no size.
    """
    adapter = {
        name: tensor for name, tensor in tensors.items() if name.startswith(LANGUAGE_MODEL_PREFIX)
    }
    others = {
        name: tensors[name].detach().cpu() for name in sorted(tensors.keys() - adapter.keys())
    }
    try:
        split = split_torch_state_dict_into_shards(others, max_shard_size=max_shard_size)
    except ValueError as error:
        raise UserError(
            f"max_shard_size {max_shard_size!r} is no size ({error}): give one such as 5GB."
        ) from None
    for file, names in split.filename_to_tensors.items():
        # A copy each: safetensors refuses tensors that share memory or are not contiguous.
        _save_tensors({name: others[name].contiguous().clone() for name in names}, folder / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / INDEX_FILE, index)
    if adapter:
        assert lora is not None, "an adapter needs its settings"
        (folder / ADAPTER_FOLDER).mkdir()
        renamed = {
            _to_peft_name(name): tensor.detach().cpu().contiguous()
            for name, tensor in adapter.items()
        }
        _save_tensors(renamed, folder / ADAPTER_FOLDER / ADAPTER_WEIGHTS_FILE)
        lora.save_pretrained(str(folder / ADAPTER_FOLDER))
    tree = _DESCRIPTION_ADAPTER.dump_python(description, mode="json")
    first = {key: tree.pop(key) for key in ("model_type", "architectures", "format")}
    _write_json(folder / CONFIG_FILE, first | tree)


def read_tensors(
    folder: Path, description: ModelDescription, parts: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Tensors by their names in the model.

    Args:
        folder: has the layout above.
        description: of that folder.
        parts: read these parts and the prompts only, by default everything. What belongs to no part is always read, so
            that it can be named as unexpected.

    Raises:
        UserError: a file is missing or damaged, the index does not fit its files, or the adapter's settings contradict
            the configuration.
    """
    left_out = (
        set(MODEL_PARTS) - set(description.parts if parts is None else parts)
        if parts is not None
        else set()
    )
    tensors: dict[str, Tensor] = {}
    for path, names in _list_weight_files(folder):
        with _open_safetensors(path) as file:
            if names is not None and set(file.keys()) != names:
                odd = sorted(set(file.keys()) ^ names)[0]
                raise UserError(
                    f"{folder / INDEX_FILE} and {path.name} disagree about {odd}: fetch the model again."
                )
            wanted = [name for name in file.keys() if name.partition(".")[0] not in left_out]  # noqa: SIM118
            tensors |= {name: file.get_tensor(name) for name in wanted}
    if "generator" in description.parts and "generator" not in left_out:
        _check_adapter_config(folder, description)
        with _open_safetensors(folder / ADAPTER_FOLDER / ADAPTER_WEIGHTS_FILE) as file:
            tensors |= {_from_peft_name(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def find_differing_tensors(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> list[str]:
    """Names of tensors that are not the same to the last bit, in dtype and in shape, or are in one only."""
    names = tensors.keys() ^ others.keys()
    return sorted(
        names
        | {
            name
            for name in tensors.keys() & others.keys()
            if not _is_identical(tensors[name], others[name])
        }
    )


def _is_identical(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    # As bytes: NaN differs from itself, and −0 equals 0.
    first, second = (
        x.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for x in (one, other)
    )
    return torch.equal(first, second)


def _list_weight_files(folder: Path) -> Iterator[tuple[Path, set[str] | None]]:
    """Weight files, with the names that the index says each holds (None without an index)."""
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    if single.is_file() and index.is_file():
        raise UserError(
            f"{folder} holds both {WEIGHTS_FILE} and {INDEX_FILE}: remove the one that is out of date."
        )
    if single.is_file():
        yield single, None
        return
    if not index.is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
        found = (
            f"found {', '.join(pickles)}, a pickle, which is never read"
            if pickles
            else "found neither"
        )
        raise UserError(
            f"No weights in {folder}: expected {WEIGHTS_FILE} or {INDEX_FILE}, {found}; export the model again."
        )
    shards: dict[str, set[str]] = {}
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(
            f"{index} is damaged: it has no weight_map; fetch or export the model again."
        )
    for name, file in weight_map.items():
        if not re.fullmatch(r"[\w.-]+\.safetensors", str(file)):
            raise UserError(
                f"{index} names the file {file!r}, which is not a safetensors file beside it."
            )
        shards.setdefault(file, set()).add(name)
    for file, names in shards.items():
        yield folder / file, names


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read ({error}): fetch or export the model again."
        ) from error


def _check_adapter_config(folder: Path, description: ModelDescription) -> None:
    """The settings that PEFT reads must be those that the model is built with, or the two would answer differently."""
    path = folder / ADAPTER_FOLDER / ADAPTER_CONFIG_FILE
    found, config = _read_json(path), parse_stored_config(description, folder).generator
    expected = {"peft_type": "LORA", "r": config.lora_rank, "lora_alpha": config.lora_alpha}
    plain = (
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "modules_to_save",
    )  # variants we do not build
    wrong = [
        f"{key} = {found.get(key)!r}, not {value!r}"
        for key, value in expected.items()
        if found.get(key) != value
    ]
    wrong += [f"{key} = {found[key]!r}" for key in plain if found.get(key)]
    if wrong:
        raise UserError(
            f"{path} does not fit {CONFIG_FILE}: {', '.join(wrong)}; fetch or export the model again."
        )


def _to_peft_name(name: str) -> str:
    """PEFT's files leave out the adapter's name, which the reader chooses."""
    return re.sub(r"\.(lora_[AB])\.default\.", r".\1.", name.removeprefix(LANGUAGE_MODEL_PREFIX))


def _from_peft_name(name: str) -> str:
    return LANGUAGE_MODEL_PREFIX + re.sub(r"\.(lora_[AB])\.(weight|bias)$", r".\1.default.\2", name)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, metadata={"format": "pt"})


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): fetch or export the model again."
        ) from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): fetch or export the model again.") from None
    if not isinstance(tree, dict):
        raise UserError(
            f"{path} holds a {type(tree).__name__}, not an object: fetch or export the model again."
        )
    return tree
