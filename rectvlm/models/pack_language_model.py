"""Write a language model packed to 4 bits, one file a layer, so that training need not pack it.

A 70B model in bf16 is 141 GB, which every rank reads and packs at each start; packed it is 39 GB.
The folder is one of Transformers' own: `AutoModelForCausalLM.from_pretrained` reads it too.
"""

import logging
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, BitsAndBytesConfig, GenerationConfig, PretrainedConfig

from rectvlm.files import require_writable_folder, write_json
from rectvlm.models.language_model import check_text_only, load_tokenizer, resolve_device
from rectvlm.models.load_quantized import (
    WEIGHTS_INDEX_FILE,
    SafetensorsCheckpoint,
    build_meta_causal_lm,
    has_all_tensors,
    materialize_weights,
    replace_linear_with_4bit,
)
from rectvlm.pretrained import explain_model_errors, require_safetensors
from rectvlm.types import UserError

log = logging.getLogger(__name__)

_NUMBERED_LAYER = re.compile(r"(.*?\.\d+)(?:\.|$)")
"""Name of the layer, such as `model.layers.17`, that a tensor's name begins with."""


def pack_language_model(source: str, out: Path, device: torch.device | None = None) -> Path:
    """Write a causal LM packed to NF4 with double quantization.

    Args:
        source: folder or hub id of the model in bf16 or fp32 safetensors.
        out: folder to write; it must not exist, or be empty.
        device: device that packs; by default the GPU if there is one.

    Returns:
        `out`, which `generator.model` takes.

    Raises:
        UserError: the model is packed already, not known to Transformers, in pickles or incomplete,
            or `out` holds something.
    """
    out = out.expanduser().resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already: name a new folder with --out.")
    require_writable_folder(out.parent)
    with (
        explain_model_errors(source),
        tempfile.TemporaryDirectory(prefix=".rectvlm-", dir=out.parent) as folder,
    ):
        require_safetensors(source)
        work = Path(folder) / out.name
        work.mkdir()
        _write_packed_model(source, work, resolve_device(device))
        work.chmod(0o755)
        work.replace(out)  # an empty folder gives way
    return out


def _write_packed_model(source: str, folder: Path, device: torch.device) -> None:
    config, checkpoint = _open_unpacked(source)
    tokenizer = load_tokenizer(source)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=torch.uint8,
    )
    model = build_meta_causal_lm(config)
    if not has_all_tensors(model, checkpoint):
        raise UserError(
            f"The tensors of {source} do not have the names that Transformers gives them: load and "
            "save the model with Transformers first."
        )
    replace_linear_with_4bit(model, quantization, None)
    writer = _LayerWriter(model, folder)
    materialize_weights(model, checkpoint, device, writer.take)
    writer.finish()

    config.quantization_config = quantization
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    try:
        GenerationConfig.from_pretrained(source).save_pretrained(folder)
    except OSError:
        log.info("%s has no generation_config.json, so the packed model has none", source)


def _open_unpacked(source: str) -> tuple[PretrainedConfig, SafetensorsCheckpoint]:
    """The configuration and tensors of a model that is not packed."""
    config = AutoConfig.from_pretrained(source)
    check_text_only(config, source)
    checkpoint = SafetensorsCheckpoint.from_reference(source)
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"The weights of {source} are quantized already: use them as they are.")
    if checkpoint is None:
        raise UserError(f"{source} has no safetensors: choose a model that has them.")
    return config, checkpoint


class _LayerWriter:
    """Writes the modules of a model as they are loaded, one file a layer, and frees them."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        self.folder = folder
        self.name_by_module = {id(module): name for name, module in model.named_modules()}
        self.file_by_tensor: dict[str, str] = {}
        self.total_bytes = 0
        self._layer = ""
        self._tensors: dict[str, Tensor] = {}
        self._written: set[int] = set()
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self._buffers: list[tuple[str, nn.Module, str]] = []
        for name in model.state_dict():
            if name not in parameters:
                owner, _, key = name.rpartition(".")
                self._buffers.append((name, model.get_submodule(owner), key))

    def take(self, module: nn.Module) -> None:
        """Keep the tensors of a module for the file of its layer, and free them."""
        name = self.name_by_module[id(module)]
        match = _NUMBERED_LAYER.match(name)
        layer = match.group(1) if match else "beside-layers"
        if layer != self._layer:
            self._flush()
            self._layer = layer
        for key, parameter in module.named_parameters(recurse=False):
            # A tied module meets a parameter that was written before.
            if id(parameter) not in self._written:
                self._written.add(id(parameter))
                self._add_parameter(f"{name}.{key}", module, key, parameter)

    def finish(self) -> None:
        """Write what is left, and the index."""
        for name, module, key in self._buffers:
            buffer = getattr(module, key)
            self._tensors[name] = buffer.detach().cpu().contiguous()
        self._flush()
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": self.file_by_tensor}
        write_json(self.folder / WEIGHTS_INDEX_FILE, index)

    def _add_parameter(self, name: str, module: nn.Module, key: str, parameter: Any) -> None:
        tensors = {name: parameter.data}
        if isinstance(module, Linear4bit) and key == "weight":
            statistics = parameter.quant_state.as_dict(packed=True)
            tensors |= {f"{name}.{part}": tensor for part, tensor in statistics.items()}
        for tensor_name, tensor in tensors.items():
            self._tensors[tensor_name] = tensor.detach().cpu().contiguous()
        parameter.data = parameter.data.new_empty(0)

    def _flush(self) -> None:
        if not self._tensors:
            return
        file = f"model-{len(set(self.file_by_tensor.values())) + 1:05d}.safetensors"
        save_file(self._tensors, self.folder / file, metadata={"format": "pt"})
        self.file_by_tensor |= dict.fromkeys(self._tensors, file)
        self.total_bytes += sum(tensor.nbytes for tensor in self._tensors.values())
        log.info("%s: %s, %.1f GB so far", file, self._layer, self.total_bytes / 1e9)
        self._tensors = {}
