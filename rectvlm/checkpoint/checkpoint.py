"""A checkpoint: one folder with a trained model. Runs, exports and the Hub share the format.

    config.json                         parts, configuration, labels, training state, versions
    encoder.safetensors                 one file per part, tensors by their names in the model
    classifier.safetensors
    localizer.safetensors
    generator.safetensors               resampler and projector
    prompts.safetensors                 embeddings of the prompts, which every part needs
    adapter/adapter_config.json         LoRA of the language model, as PEFT reads it
    adapter/adapter_model.safetensors
    thresholds.json                     thresholds of the findings, if any was fitted
    README.md                           model card (`rectvlm.checkpoint.model_card`)
    manifest.json                       sizes and SHA-256 (`rectvlm.checkpoint.integrity`)
    engine/                             runs only: 32-bit weights and optimizer state, to resume

The language model's own weights are in no checkpoint: `config.json` says which model it is. Only
safetensors and JSON are read, never a pickle.
"""

import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from safetensors import SafetensorError, safe_open

from rectvlm.checkpoint.integrity import find_faults, has_manifest, read_manifest
from rectvlm.checkpoint.run_folder import MODEL_CONFIG_FILE, find_checkpoint
from rectvlm.config import MODEL_PARTS, Config, ModelPart, parse_config
from rectvlm.files import read_json_object, write_json
from rectvlm.finding_thresholds import NOT_FITTED, THRESHOLDS_FILE, FindingThresholds
from rectvlm.labels import FINDINGS, LESIONS, REGIONS
from rectvlm.types import UserError

if TYPE_CHECKING:  # a command that refuses a wrong path does not spend seconds on libraries
    from peft import LoraConfig
    from torch import Tensor

CARD_FILE = "README.md"
ENGINE_FOLDER = "engine"
PROMPTS_FILE = "prompts.safetensors"
ADAPTER_FOLDER = "adapter"
ADAPTER_CONFIG_FILE = f"{ADAPTER_FOLDER}/adapter_config.json"
ADAPTER_WEIGHTS_FILE = f"{ADAPTER_FOLDER}/adapter_model.safetensors"
MODEL_TYPE = "rectvlm"
FORMAT_VERSION = 1
LANGUAGE_MODEL_PREFIX = "generator.language_model."
"""Prefix of the language model's tensor names; those in a checkpoint are the adapter's."""
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
UNSUPPORTED_LORA_KEYS = (
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
)
"""Settings of LoRA variants that the model does not build."""
_REMEDY = "fetch or export the model again"


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class TrainingState:
    """How far training had come when the weights were saved."""

    phase: int
    """Phase, 1 to 3."""
    step: int
    """Optimizer steps done."""
    samples_seen: int
    """Samples that all ranks together have processed."""
    world_size: int
    """Number of ranks."""
    stage: str | None = None
    """Stage of the phase; None for the phase itself."""
    skipped_in_a_row: int = 0
    """Skipped steps immediately before this one."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ModelDescription:
    """Content of `config.json`."""

    model_type: str
    architectures: tuple[str, ...]
    format: int
    parts: tuple[ModelPart, ...]
    config: dict[str, Any]
    """Configuration, as plain values that `rectvlm.config.parse_config` validates."""
    labels: dict[str, list[str]]
    training: TrainingState
    versions: dict[str, str]
    """Versions of Python and of the packages that the weights were trained with."""


_DESCRIPTION_ADAPTER = TypeAdapter(ModelDescription)


def label_lists() -> dict[str, list[str]]:
    """The vocabulary, in the order of the logits, masks and region ids."""
    return {
        "findings": list(FINDINGS),
        "lesions": [lesion.key for lesion in LESIONS],
        "regions": [region.name for region in REGIONS],
    }


def part_file(part: str) -> str:
    """Name of a part's weights file."""
    return f"{part}.safetensors"


def list_model_files(parts: Collection[str]) -> list[str]:
    """Files that a model with these parts is loaded from, without the optional ones."""
    files = [MODEL_CONFIG_FILE, PROMPTS_FILE]
    files += [part_file(part) for part in MODEL_PARTS if part in parts]
    if "generator" in parts:
        files += [ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE]
    return files


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's folder and the content of its `config.json`."""

    folder: Path
    parts: tuple[ModelPart, ...]
    """Parts of the model whose weights it holds."""
    config: Config
    """Configuration that the model was trained with."""
    training: TrainingState
    versions: dict[str, str]
    """Versions of Python and of the packages that the weights were trained with."""

    @classmethod
    def open(
        cls, folder: str | Path, remedy: str = "train first, or give a run's phase folder"
    ) -> "Checkpoint":
        """Find a checkpoint and read its `config.json`.

        Args:
            folder: of a checkpoint or an exported model, or a run's phase folder (its newest
                checkpoint), or `PHASE/best`.
            remedy: what the user can do when there is none, as the end of a sentence.

        Raises:
            UserError: there is no checkpoint, or `config.json` is damaged, describes another kind
                of model, or lists other labels than this version.
        """
        folder = find_checkpoint(folder, remedy)
        path = folder / MODEL_CONFIG_FILE
        description = _read_description(path)
        config = parse_config(description.config, where=str(path))
        return cls(folder, description.parts, config, description.training, description.versions)

    @property
    def engine_folder(self) -> Path:
        """The folder of the optimizer's shards."""
        return self.folder / ENGINE_FOLDER

    def list_available_parts(self) -> tuple[ModelPart, ...]:
        """List the parts whose files are there: all, unless only some were pulled.

        Raises:
            UserError: the manifest is damaged.
        """
        if not has_manifest(self.folder):
            return self.parts
        listed = read_manifest(self.folder).keys()
        return tuple(part for part in self.parts if listed >= set(list_model_files([part])))

    def require_parts(self, parts: Collection[str]) -> None:
        """Stop unless the checkpoint holds some parts.

        Raises:
            UserError: a part is missing.
        """
        missing = [part for part in parts if part not in self.parts]
        if missing:
            raise UserError(
                f"{self.folder} has no {', '.join(missing)}: it holds {', '.join(self.parts)}."
            )

    def read_tensors(self, parts: Collection[ModelPart] | None = None) -> dict[str, "Tensor"]:
        """Read tensors by their names in the model.

        The files must agree with the manifest, if there is one.

        Args:
            parts: parts to read, with the prompts; by default all.

        Raises:
            UserError: a part or a file is missing or damaged, or the adapter's settings contradict
                the configuration.
        """
        parts = self.parts if parts is None else parts
        self.require_parts(parts)
        files = list_model_files(parts)
        if has_manifest(self.folder):
            faults = find_faults(self.folder, files)
            if faults:
                raise UserError(
                    f"{self.folder} is damaged: {'; '.join(faults)}; use another checkpoint, or "
                    "fetch or export the model again."
                )
        if "generator" in parts:
            _check_adapter_config(self)
        tensors: dict[str, Tensor] = {}
        for file_name in files:
            if file_name.endswith(".safetensors"):
                is_adapter = file_name == ADAPTER_WEIGHTS_FILE
                with _open_safetensors(self.folder / file_name) as file:
                    for name in file.keys():  # noqa: SIM118 (it is no dict)
                        model_name = _from_peft_name(name) if is_adapter else name
                        tensors[model_name] = file.get_tensor(name)
        return tensors

    def read_thresholds(self) -> FindingThresholds:
        """Read the thresholds of the findings; 0.5 for each where none was fitted.

        Raises:
            UserError: the file is damaged.
        """
        path = self.folder / THRESHOLDS_FILE
        return FindingThresholds.read(path) if path.is_file() else NOT_FITTED

    def write_thresholds(self, thresholds: FindingThresholds) -> None:
        """Write the thresholds of the findings, if any was fitted.

        The manifest does not list them: the validation that fits them follows the save.

        Raises:
            OSError: the file could not be written.
        """
        if thresholds.is_fitted.any():
            thresholds.write(self.folder / THRESHOLDS_FILE)

    def count_parameters(self) -> dict[ModelPart, int]:
        """Count the values of each part, those of the adapter among the generator's."""
        counts: dict[ModelPart, int] = {}
        for part in self.parts:
            names = [part_file(part)]
            if part == "generator":
                names.append(ADAPTER_WEIGHTS_FILE)
            counts[part] = sum(_count_values(self.folder / name) for name in names)
        return counts

    def write_files(self, tensors: Mapping[str, "Tensor"], lora: "LoraConfig | None") -> list[Path]:
        """Write `config.json` and the weights into the folder, which exists; return the files.

        Args:
            tensors: by their names in the model, on any device.
            lora: settings of the adapter; needed with the generator.

        Raises:
            OSError, SafetensorError: a file could not be written.
        """
        by_file: dict[str, dict[str, Tensor]] = {}
        for name in sorted(tensors):
            # A copy each: safetensors refuses tensors that share memory or are not contiguous.
            tensor = tensors[name].detach().cpu().contiguous().clone()
            file_name, stored_name = _place_tensor(name)
            by_file.setdefault(file_name, {})[stored_name] = tensor
        self.write_config()
        paths = [self.folder / MODEL_CONFIG_FILE]
        if "generator" in self.parts:
            assert lora is not None, "an adapter needs its settings"
            lora.save_pretrained(str(self.folder / ADAPTER_FOLDER))
            paths.append(self.folder / ADAPTER_CONFIG_FILE)
        for file_name, content in by_file.items():
            _save_tensors(content, self.folder / file_name)
            # safetensors lets only the owner read its files.
            shutil.copymode(self.folder / MODEL_CONFIG_FILE, self.folder / file_name)
            paths.append(self.folder / file_name)
        return paths

    def write_config(self) -> None:
        """Write `config.json`."""
        description = ModelDescription(
            MODEL_TYPE,
            ("RectVLM",),
            FORMAT_VERSION,
            self.parts,
            self.config.model_dump(mode="json"),
            label_lists(),
            self.training,
            self.versions,
        )
        write_json(
            self.folder / MODEL_CONFIG_FILE,
            _DESCRIPTION_ADAPTER.dump_python(description, mode="json"),
        )


def _read_description(path: Path) -> ModelDescription:
    tree = read_json_object(path, _REMEDY)
    if tree.get("model_type") != MODEL_TYPE:
        raise UserError(
            f"{path} describes a model of type {tree.get('model_type')!r}, not {MODEL_TYPE!r}: "
            "give a folder of rectvlm."
        )
    version = tree.get("format")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format {version}, this version reads up to {FORMAT_VERSION}: update "
            "rectvlm."
        )
    try:
        description = _DESCRIPTION_ADAPTER.validate_python(tree)
    except ValidationError as error:
        fault = error.errors()[0]
        location = ".".join(map(str, fault["loc"]))
        raise UserError(f"{path} is damaged: {location}: {fault['msg']}; {_REMEDY}.") from None
    for name, labels in label_lists().items():
        stored_labels = description.labels.get(name, [])
        if stored_labels != labels:
            difference = _describe_label_difference(stored_labels, labels)
            raise UserError(
                f"{path} lists other {name} than this version of rectvlm ({difference}), so that "
                "its weights would be read under wrong names; use the version that wrote it."
            )
    return description


def _describe_label_difference(stored: Sequence[str], known: Sequence[str]) -> str:
    added = [label for label in stored if label not in known]
    missing = [label for label in known if label not in stored]
    phrases = []
    if added:
        phrases.append(f"also {', '.join(added)}")
    if missing:
        phrases.append(f"not {', '.join(missing)}")
    return "; ".join(phrases) or "the same in another order"


def _place_tensor(name: str) -> tuple[str, str]:
    """The file that a tensor is stored in, and its name there."""
    if name.startswith(LANGUAGE_MODEL_PREFIX):
        # PEFT's files leave out the adapter's name, which the reader chooses.
        stored_name = name.removeprefix(LANGUAGE_MODEL_PREFIX)
        return ADAPTER_WEIGHTS_FILE, re.sub(r"\.(lora_[AB])\.default\.", r".\1.", stored_name)
    owner = name.partition(".")[0]
    assert owner in (*MODEL_PARTS, "prompts"), f"{name} belongs to no part"
    return part_file(owner), name


def _from_peft_name(name: str) -> str:
    """The name in the model of a tensor of the adapter's file."""
    return LANGUAGE_MODEL_PREFIX + re.sub(r"\.(lora_[AB])\.(weight|bias)$", r".\1.default.\2", name)


@contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except FileNotFoundError:
        pickles = sorted(
            file.name for file in path.parent.iterdir() if file.suffix in PICKLE_SUFFIXES
        )
        hint = f" beside {', '.join(pickles)}, a pickle, which is never read" if pickles else ""
        raise UserError(f"{path} is missing{hint}: {_REMEDY}.") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}): {_REMEDY}.") from error


def _count_values(path: Path) -> int:
    total = 0
    with _open_safetensors(path) as file:
        for name in file.keys():  # noqa: SIM118 (it is no dict)
            count = 1
            for length in file.get_slice(name).get_shape():
                count *= length
            total += count
    return total


def _check_adapter_config(checkpoint: Checkpoint) -> None:
    """Compare the settings that PEFT reads with those that the model is built with.

    Raises:
        UserError: they differ, so that PEFT and the model would answer differently.
    """
    path = checkpoint.folder / ADAPTER_CONFIG_FILE
    stored = read_json_object(path, _REMEDY)
    generator = checkpoint.config.generator
    expected = {
        "peft_type": "LORA",
        "r": generator.lora_rank,
        "lora_alpha": generator.lora_alpha,
    }
    faults = []
    for key, value in expected.items():
        if stored.get(key) != value:
            faults.append(f"{key} = {stored.get(key)!r}, not {value!r}")
    for key in UNSUPPORTED_LORA_KEYS:
        if stored.get(key):
            faults.append(f"{key} = {stored[key]!r}")
    if faults:
        raise UserError(f"{path} does not fit {MODEL_CONFIG_FILE}: {', '.join(faults)}; {_REMEDY}.")


def _save_tensors(tensors: dict[str, "Tensor"], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})
