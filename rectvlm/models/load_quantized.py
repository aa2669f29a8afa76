"""A causal LM from its checkpoint, one module at a time.

Transformers puts the whole model on every rank before anything is sharded. Here the model starts without memory, and
each module is read, packed to 4 bits and handed on (`settle`) before the next is read: what a rank needs is what it
keeps and one module. The tensors are those of Transformers, bit for bit.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.hub import cached_file

from rectvlm.types import UserError

ShardModule = Callable[[nn.Module], None]
"""Takes a module whose own parameters are whole, and may leave this process a share of them."""

QUANT_STATE_MARKER = ".quant_state.bitsandbytes__"
"""In the name of the tensor that marks a weight as packed by bitsandbytes."""
WEIGHTS_FILE, WEIGHTS_INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


class TensorSource(Protocol):
    """Where tensors come from."""

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor of that name."""

    def read_tensor(self, name: str, shape: torch.Size | None, device: torch.device) -> Tensor:
        """A tensor of a shape; None when it is stored in one of its own, packed."""


@dataclass
class SafetensorsCheckpoint:
    """The safetensors of a folder or of a hub id, read one tensor at a time."""

    reference: str
    file_by_tensor: Mapping[str, str]
    """The file of each tensor."""
    packed_weights: dict[str, list[str]] = field(init=False)
    """Weights that bitsandbytes packed, with the names of their statistics."""

    def __post_init__(self) -> None:
        weights = [
            name.partition(QUANT_STATE_MARKER)[0]
            for name in self.file_by_tensor
            if QUANT_STATE_MARKER in name
        ]
        self.packed_weights = {weight: [] for weight in weights}
        for name in self.file_by_tensor:
            owner = next(
                (name[:k] for k in _dot_positions(name) if name[:k] in self.packed_weights), None
            )
            if owner is not None:
                self.packed_weights[owner].append(name)

    @classmethod
    def from_reference(cls, reference: str) -> "SafetensorsCheckpoint | None":
        """The checkpoint, or None where there are no safetensors.

        Where there are an index and a single file, the index says what is read. Repositories of the Hub hold both: an
        index that names the single file alone, or a variant of the weights beside the shards.

        Raises:
            UserError: a file cannot be read, or one that the index names cannot be had.
        """
        paths: set[str] = set()
        index = _cached_file_path(reference, WEIGHTS_INDEX_FILE)
        if index is not None:
            names = set(json.loads(Path(index).read_text())["weight_map"].values())
            paths = {_fetch_indexed_file(reference, name) for name in names}
        elif (single := _cached_file_path(reference, WEIGHTS_FILE)) is not None:
            paths = {single}
        files = {}
        for path in sorted(paths):
            try:
                with safe_open(path, "pt") as handle:
                    files.update(dict.fromkeys(handle.keys(), path))
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{path} cannot be read as safetensors ({error}); fetch it again."
                ) from error
        return cls(reference, files) if files else None

    def __contains__(self, name: str) -> bool:
        return name in self.file_by_tensor

    def read_tensor(self, name: str, shape: torch.Size | None, device: torch.device) -> Tensor:
        """A tensor as it is stored.

        Raises:
            UserError: it has another shape than the model asks for.
        """
        with safe_open(self.file_by_tensor[name], "pt", device=str(device)) as handle:
            tensor: Tensor = handle.get_tensor(name)
        if shape is not None and tensor.shape != shape:
            raise UserError(
                f"{self.file_by_tensor[name]} holds {name} as {tuple(tensor.shape)}, but its config.json asks for "
                f"{tuple(shape)}; fetch the model again."
            )
        return tensor

    def read_quant_state(self, name: str, device: torch.device) -> dict[str, Tensor]:
        """What bitsandbytes stored beside a packed weight, by its own names."""
        return {
            key.removeprefix(f"{name}."): self.read_tensor(key, None, device)
            for key in self.packed_weights[name]
            if key in self.file_by_tensor
        }


def _dot_positions(name: str) -> Iterator[int]:
    return (k for k, letter in enumerate(name) if letter == ".")


def _fetch_indexed_file(reference: str, name: str) -> str:
    """A file that the index names. A rank that went on without it would load the whole model by itself, while those
    that have the file wait for it to shard with them."""
    path = _cached_file_path(reference, name)
    if path is None:
        target = f"OWNER/NAME --out {reference}" if Path(reference).is_dir() else reference
        raise UserError(
            f"The language model {reference} lacks {name}, which its {WEIGHTS_INDEX_FILE} names, and it could not be fetched: "
            f"complete it with `rectvlm weights pull {target}`."
        )
    return path


def _cached_file_path(reference: str, name: str) -> str | None:
    return cached_file(
        reference,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )


def build_meta_causal_lm(config: PretrainedConfig) -> Any:
    """A causal LM in bf16 whose parameters lie on the meta device; buffers are computed.

    Raises:
        UserError: Transformers has no causal LM of that kind.
    """
    try:
        with _parameters_on_meta():
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except ValueError as error:
        raise UserError(
            f"Transformers knows no causal language model of kind {config.model_type!r} ({str(error).splitlines()[0]})."
        ) from error
    model.tie_weights()
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that are registered lose their memory at once; buffers, which no checkpoint may hold, keep theirs."""
    register = nn.Module.register_parameter

    def without(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = without  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def replace_linear_with_4bit(
    model: Any, settings: BitsAndBytesConfig, packed: Mapping[str, Any] | None
) -> None:
    """Replace linear layers by 4-bit ones, as Transformers does.

    Args:
        model: without memory.
        settings: of the quantization.
        packed: names of the weights that a checkpoint holds packed; None when they are packed now.
    """
    if packed:
        linear = [
            name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)
        ]
        settings.llm_int8_skip_modules = [name for name in linear if f"{name}.weight" not in packed]
    quantizer: Any = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map=None)
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)


def has_all_tensors(model: nn.Module, source: TensorSource) -> bool:
    """Whether every parameter has a tensor of its name: where not, Transformers knows how to convert."""
    return all(any(name in source for name in names) for names in _parameter_names(model).values())


def _parameter_names(model: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter, tied ones together."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return found


def materialize_weights(
    model: nn.Module, source: TensorSource, device: torch.device, shard_module: ShardModule
) -> None:
    """Give a model without memory its weights, module by module.

    Args:
        model: from `without_memory`, with packed layers or not.
        source: complete.
        device: where weights are packed and kept.
        settle: called after each module, before the next is read.
    """
    names = _parameter_names(model)
    persistent = model.state_dict(keep_vars=True)
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
    for name, buffer in model.named_buffers():
        if name in persistent and name in source:
            buffer.copy_(source.read_tensor(name, buffer.shape, device))
    whole: dict[int, nn.Parameter] = {}
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        for key, empty in own.items():
            if id(empty) not in whole:
                name = next(name for name in names[id(empty)] if name in source)
                whole[id(empty)] = _materialize_parameter(module, key, empty, name, source, device)
                whole[id(whole[id(empty)])] = whole[id(empty)]  # a tied module meets it again
            setattr(module, key, whole[id(empty)])
        if own:
            shard_module(module)


def _materialize_parameter(
    module: nn.Module,
    key: str,
    empty: nn.Parameter,
    name: str,
    source: TensorSource,
    device: torch.device,
) -> nn.Parameter:
    packs = isinstance(module, Linear4bit) and key == "weight"
    if packs and isinstance(source, SafetensorsCheckpoint) and name in source.packed_weights:
        return _load_prequantized_weight(module, name, source, device)
    transposed = packs and getattr(module, "source_cls", None) is Conv1D
    shape = torch.Size(reversed(empty.shape)) if transposed else empty.shape
    value = source.read_tensor(name, shape, device)
    if value.is_floating_point():
        # Unpacked weights are kept: a copy, since on a CPU the tensor is a view of the mapped file.
        value = value.to(torch.bfloat16, copy=not packs)
    if packs:
        packed: Any = Params4bit(
            value.T if transposed else value, requires_grad=False, **empty.__dict__
        )
        return packed.to(device)
    return nn.Parameter(value, requires_grad=False)


def _load_prequantized_weight(
    module: Any, name: str, source: SafetensorsCheckpoint, device: torch.device
) -> nn.Parameter:
    """A weight that was packed before: the same bytes, stored in the dtype that the configuration asks for."""
    data = source.read_tensor(name, None, device)
    # A copy of the mapped file; dtypes of storage differ in what they call the bytes alone.
    stored = data.clone().view(-1).view(torch.uint8).view(module.quant_storage)[:, None]
    statistics = {
        key: value.clone() for key, value in source.read_quant_state(name, device).items()
    }
    return Params4bit.from_prequantized(
        stored, statistics, requires_grad=False, device=device, module=module
    )


def read_generation_tokens(
    reference: str, config: PretrainedConfig, tokenizer: Any
) -> GenerationConfig:
    """The tokens that begin, fill and end a text, from the model's own file if it has one, and the tokenizer's end."""
    try:
        found = GenerationConfig.from_pretrained(reference)
    except OSError:
        found = GenerationConfig.from_model_config(config)
    ends = found.eos_token_id if isinstance(found.eos_token_id, list) else [found.eos_token_id]
    ends = sorted({*ends, tokenizer.eos_token_id} - {None})
    return GenerationConfig(
        bos_token_id=found.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
