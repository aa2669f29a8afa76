"""Load the weights of a causal LM one module at a time, packed to 4 bits.

Transformers puts the whole model on every rank before anything is sharded. Here the model starts
on the meta device. Each module is read, packed and handed to `shard_module` before the next one is
read, so that a rank needs room for its shards and one module. The tensors are those of
Transformers, bit for bit.
"""

import json
from collections.abc import Callable, Container, Iterator, Mapping
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
"""Callback that receives a module whose own parameters are complete, and may leave this process a
share of them."""

QUANT_STATE_MARKER = ".quant_state.bitsandbytes__"
"""Substring of the name of the tensor that marks a weight as packed by bitsandbytes."""
WEIGHTS_FILE, WEIGHTS_INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


class TensorSource(Protocol):
    """A collection of named tensors."""

    def __contains__(self, name: str) -> bool:
        """Whether it holds a tensor of this name."""

    def read_tensor(self, name: str, shape: torch.Size | None, device: torch.device) -> Tensor:
        """Read a tensor. A shape of None accepts any: packed weights have one of their own."""


@dataclass
class SafetensorsCheckpoint:
    """The safetensors files of a folder or a hub id, read one tensor at a time."""

    file_by_tensor: Mapping[str, str]
    """Path of the file that holds each tensor."""
    packed_weights: dict[str, list[str]] = field(init=False)
    """Names of the weights that bitsandbytes packed, each with the names of its statistics."""

    def __post_init__(self) -> None:
        self.packed_weights = {}
        for name in self.file_by_tensor:
            weight, marker, _ = name.partition(QUANT_STATE_MARKER)
            if marker:
                self.packed_weights[weight] = []
        for name in self.file_by_tensor:
            owner = _find_dotted_prefix(name, self.packed_weights)
            if owner is not None:
                self.packed_weights[owner].append(name)

    @classmethod
    def from_reference(cls, reference: str) -> "SafetensorsCheckpoint | None":
        """Open a folder or hub id; None where it has no safetensors.

        Where there are an index and a single file, the index says which files are read: Hub
        repositories may hold both, and the index may name the single file alone.

        Raises:
            UserError: a file cannot be read, or one that the index names cannot be fetched.
        """
        paths: set[str] = set()
        index = _cached_file_path(reference, WEIGHTS_INDEX_FILE)
        if index is not None:
            weight_map: dict[str, str] = json.loads(Path(index).read_text())["weight_map"]
            paths = {_fetch_indexed_file(reference, name) for name in set(weight_map.values())}
        else:
            single = _cached_file_path(reference, WEIGHTS_FILE)
            if single is not None:
                paths = {single}

        files: dict[str, str] = {}
        for path in sorted(paths):
            try:
                with safe_open(path, "pt") as handle:
                    files.update(dict.fromkeys(handle.keys(), path))
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{path} cannot be read as safetensors ({error}); fetch it again."
                ) from error
        return cls(files) if files else None

    def __contains__(self, name: str) -> bool:
        return name in self.file_by_tensor

    def read_tensor(self, name: str, shape: torch.Size | None, device: torch.device) -> Tensor:
        """Read a tensor as it is stored.

        Raises:
            UserError: it has another shape than the model asks for.
        """
        path = self.file_by_tensor[name]
        with safe_open(path, "pt", device=str(device)) as handle:
            tensor: Tensor = handle.get_tensor(name)
        if shape is not None and tensor.shape != shape:
            raise UserError(
                f"{path} holds {name} as {tuple(tensor.shape)}, but its config.json asks for "
                f"{tuple(shape)}; fetch the model again."
            )
        return tensor

    def read_quant_state(self, name: str, device: torch.device) -> dict[str, Tensor]:
        """Read the statistics that bitsandbytes stored beside a packed weight, by its own names."""
        statistics = {}
        for key in self.packed_weights[name]:
            statistics[key.removeprefix(f"{name}.")] = self.read_tensor(key, None, device)
        return statistics


def _find_dotted_prefix(name: str, prefixes: Container[str]) -> str | None:
    """The shortest of some prefixes that ends before a dot of a name."""
    for end, letter in enumerate(name):
        if letter == "." and name[:end] in prefixes:
            return name[:end]
    return None


def _fetch_indexed_file(reference: str, name: str) -> str:
    """Path of a file that the index names.

    A rank that went on without it would load the whole model by itself, while the ranks that have
    the file wait for it to shard with them.
    """
    path = _cached_file_path(reference, name)
    if path is None:
        target = f"OWNER/NAME --out {reference}" if Path(reference).is_dir() else reference
        raise UserError(
            f"The language model {reference} lacks {name}, which its {WEIGHTS_INDEX_FILE} names, "
            f"and it could not be fetched: complete it with `rectvlm weights pull {target}`."
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
    """Build a causal LM in bf16 with its parameters on the meta device; buffers are computed.

    Raises:
        UserError: Transformers has no causal LM of this kind.
    """
    try:
        with _parameters_on_meta():
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except ValueError as error:
        raise UserError(
            f"Transformers knows no causal language model of kind {config.model_type!r} "
            f"({str(error).splitlines()[0]})."
        ) from error
    model.tie_weights()
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move parameters to the meta device as they are registered. Buffers, which a checkpoint may
    not hold, keep their memory."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def replace_linear_with_4bit(
    model: Any, quantization: BitsAndBytesConfig, packed: Container[str] | None
) -> None:
    """Replace linear layers by 4-bit ones, as Transformers does.

    Args:
        model: causal LM on the meta device.
        quantization: settings of bitsandbytes; changed in place.
        packed: names of the weights that a checkpoint holds packed. None or empty where weights are
            packed as they are loaded.
    """
    if packed:
        plain = []
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | Conv1D) and f"{name}.weight" not in packed:
                plain.append(name)
        quantization.llm_int8_skip_modules = plain
    quantizer: Any = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map=None)
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)


def has_all_tensors(model: nn.Module, source: TensorSource, part: nn.Module | None = None) -> bool:
    """Whether each parameter of a model, or of a part of it, has a tensor under one of its names.
    Where not, Transformers may know how to convert the names."""
    names_by_id = _parameter_names(model)
    return all(
        _find_tensor_name(names_by_id[id(parameter)], source) is not None
        for parameter in (part or model).parameters()
    )


def _find_tensor_name(names: list[str], source: TensorSource) -> str | None:
    return next((name for name in names if name in source), None)


def _parameter_names(model: nn.Module) -> dict[int, list[str]]:
    """All names of each parameter, by its `id`; a tied parameter has several."""
    names_by_id: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_by_id.setdefault(id(parameter), []).append(name)
    return names_by_id


def materialize_weights(
    model: nn.Module,
    source: TensorSource,
    device: torch.device,
    shard_module: ShardModule,
    part: nn.Module | None = None,
) -> None:
    """Load the weights of a causal LM on the meta device, module by module.

    Args:
        model: from `build_meta_causal_lm`, with 4-bit layers or without.
        source: a tensor for each parameter.
        device: device on which weights are packed and kept.
        shard_module: called after each module, before the next one is read.
        part: module of the model to load alone; by default the whole model.
    """
    names_by_id = _parameter_names(model)
    _load_buffers(model, source, device)
    loaded: dict[int, nn.Parameter] = {}
    for module in (part or model).modules():
        parameters = dict(module.named_parameters(recurse=False))
        for key, empty in parameters.items():
            if id(empty) not in loaded:
                name = _find_tensor_name(names_by_id[id(empty)], source)
                assert name is not None, f"no tensor for {names_by_id[id(empty)]}"
                parameter = _materialize_parameter(module, key, empty, name, source, device)
                loaded[id(empty)] = parameter
                # A tied module meets the new parameter again.
                loaded[id(parameter)] = parameter
            setattr(module, key, loaded[id(empty)])
        if parameters:
            shard_module(module)


def _load_buffers(model: nn.Module, source: TensorSource, device: torch.device) -> None:
    """Move all buffers to a device and read those that the source holds."""
    persistent = model.state_dict(keep_vars=True)
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
    for name, buffer in model.named_buffers():
        if name in persistent and name in source:
            buffer.copy_(source.read_tensor(name, buffer.shape, device))


def _materialize_parameter(
    module: nn.Module,
    key: str,
    empty: nn.Parameter,
    name: str,
    source: TensorSource,
    device: torch.device,
) -> nn.Parameter:
    is_packed = isinstance(module, Linear4bit) and key == "weight"
    if is_packed and isinstance(source, SafetensorsCheckpoint) and name in source.packed_weights:
        return _load_prequantized_weight(module, name, source, device)

    is_transposed = is_packed and getattr(module, "source_cls", None) is Conv1D
    shape = torch.Size(reversed(empty.shape)) if is_transposed else empty.shape
    value = source.read_tensor(name, shape, device)
    if value.is_floating_point():
        # Unpacked weights are kept: a copy, since on a CPU the tensor is a view of the mapped file.
        value = value.to(torch.bfloat16, copy=not is_packed)
    if not is_packed:
        return nn.Parameter(value, requires_grad=False)
    if is_transposed:
        value = value.T
    packed: Any = Params4bit(value, requires_grad=False, **empty.__dict__)
    return packed.to(device)


def _load_prequantized_weight(
    module: Any, name: str, source: SafetensorsCheckpoint, device: torch.device
) -> nn.Parameter:
    """Read a weight that is stored packed: the same bytes, in the dtype of the configuration."""
    data = source.read_tensor(name, None, device)
    # A copy of the mapped file. The bytes are the same in every storage dtype.
    stored = data.clone().view(-1).view(torch.uint8).view(module.quant_storage)[:, None]
    statistics = source.read_quant_state(name, device)
    copies = {key: value.clone() for key, value in statistics.items()}
    return Params4bit.from_prequantized(
        stored, copies, requires_grad=False, device=device, module=module
    )


def read_generation_tokens(
    reference: str, config: PretrainedConfig, tokenizer: Any
) -> GenerationConfig:
    """The tokens that begin, pad and end a text: those of the model's own file if it has one, and
    the tokenizer's end token."""
    try:
        settings = GenerationConfig.from_pretrained(reference)
    except OSError:
        settings = GenerationConfig.from_model_config(config)
    ends = settings.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    ends = sorted({*ends, tokenizer.eos_token_id} - {None})
    return GenerationConfig(
        bos_token_id=settings.bos_token_id,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
