"""A 2D vision transformer in safetensors: its tensors, and what the files beside it say of it.

Weights are read from safetensors alone, never from a pickle.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rectvlm.pretrained.vit_layouts import VitLayout, find_layout, translate_names
from rectvlm.pretrained.weight_files import SETTINGS_FILES, find_weight_files
from rectvlm.types import JsonObject, UserError

GELU_NAMES = {"gelu", "gelu_python", "gelu_new", "gelu_pytorch_tanh", "gelu_tanh"}
"""Activations that equal GELU to 5e-4."""


@dataclass(frozen=True)
class VitFile:
    """Tensors of a ViT by the names of `rectvlm.pretrained.vit_layouts`."""

    where: str
    """The file, for messages."""
    layout: VitLayout
    tensors: dict[str, Tensor]
    """Float32 tensors; on the meta device only their shapes are known."""
    unused: list[str]
    """Names of the file that no feature depends on: heads, decoders, text towers."""
    heads: int | None
    """Attention heads, where a file beside the weights says it."""
    mean: tuple[float, ...]
    """Mean of each input channel that training subtracted from images in [0, 1]."""
    std: tuple[float, ...]
    """Standard deviation of each input channel that training divided by."""
    states_normalization: bool
    """Whether a file beside the weights says mean and standard deviation."""

    @property
    def depth(self) -> int:
        """Number of blocks."""
        numbers = {name.split(".")[1] for name in self.tensors if name.startswith("blocks.")}
        return len(numbers)


def read_vit_file(reference: str, device: str = "cpu") -> VitFile:
    """Read a ViT.

    Args:
        reference: safetensors file, folder of one, or hub id.
        device: "meta" reads names and shapes alone.

    Raises:
        UserError: there is no such file, it is a pickle, or it holds no ViT whose features our
            encoder can give.
    """
    files = find_weight_files(reference)
    where = str(files[0] if len(files) == 1 else files[0].parent)
    tensors_by_name: dict[str, Tensor] = {}
    for path in files:
        tensors_by_name |= _read_tensors(path, device)
    names = [name for name, tensor in tensors_by_name.items() if tensor.numel()]
    layout, prefix = find_layout(names, where)
    translated, unused = translate_names(names, layout, prefix, where)

    settings = _read_settings(files[0].parent)
    _check_activation(settings, where)
    states_normalization = "mean" in settings and "std" in settings
    mean, std = layout.normalization
    if states_normalization:
        mean, std = settings["mean"], settings["std"]
    return VitFile(
        where,
        layout,
        {ours: tensors_by_name[name] for name, ours in translated.items()},
        unused,
        settings.get("num_attention_heads"),
        tuple(mean),
        tuple(std),
        states_normalization,
    )


def _read_tensors(path: Path, device: str) -> dict[str, Tensor]:
    with _explain_damage(path), safe_open(path, framework="pt") as file:
        if device == "meta":
            return {
                name: torch.empty(file.get_slice(name).get_shape(), device="meta")
                for name in file.keys()  # noqa: SIM118
            }
        return {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118


@contextmanager
def _explain_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"{path} is no safetensors file, or is damaged ({reason}): fetch it again; a pickle is "
            "never read, so save the model as safetensors."
        ) from None


def _read_settings(folder: Path) -> JsonObject:
    """What files of Transformers, timm and OpenCLIP beside the weights say of the ViT, with the
    names of Transformers and with `mean` and `std`."""
    config, preprocessing, open_clip = (_read_json(folder / name) for name in SETTINGS_FILES)
    settings = {**config, **config.get("vision_config", {}), **config.get("model_args", {})}
    sources: list[JsonObject] = [
        config.get("pretrained_cfg", {}),
        open_clip.get("preprocess_cfg", {}),
        {"mean": preprocessing.get("image_mean"), "std": preprocessing.get("image_std")},
    ]
    for source in sources:
        for key in ("mean", "std"):
            if source.get(key) is not None:
                settings[key] = source[key]
    return settings


def _read_json(path: Path) -> JsonObject:
    if not path.is_file():
        return {}
    try:
        tree: Any = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): fetch it again.") from None
    return tree if isinstance(tree, dict) else {}


def _check_activation(settings: JsonObject, where: str) -> None:
    activation = settings.get("hidden_act", settings.get("act_layer", "gelu"))
    if activation not in GELU_NAMES:
        raise UserError(
            f"{where} holds a ViT with the activation {activation!r}, but blocks of the encoder "
            "slice-region have GELU, so that its features would differ: give a ViT with GELU."
        )


def square_side(count: int) -> int | None:
    """Side of a square grid of some tokens; None if they make no square."""
    side = math.isqrt(count)
    return side if side * side == count else None
