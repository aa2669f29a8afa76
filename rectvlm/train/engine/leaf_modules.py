"""Blocks that ZeRO-3 gathers as one.

ZeRO-3 runs hooks for each module with weights; on an H200 they take the host 0.48 ms a pass. Of a
leaf module, which is gathered with everything in it, the hooks run once.

DeepSpeed reduces the gradients of a leaf in a backward hook of the module, so a leaf is called once
in a forward pass. Where no tensor among the module's arguments needs a gradient, torch runs that
hook before the weights have theirs. So leaves are modules that get tensors, not structures of them,
and `require_input_gradient` sees that one of the tensors needs a gradient.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def find_decoder_layer_class(model: nn.Module) -> type[nn.Module] | None:
    """Class of the layers of the language model inside a model; None where there is none."""
    layer_lists: list[Sequence[nn.Module]] = []
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            layer_lists += [list(m) for m in module.modules() if isinstance(m, nn.ModuleList)]
    longest = max(layer_lists, key=len, default=[])
    return type(longest[0]) if longest else None


def is_gathered_whole(module: nn.Module | None) -> bool:
    """Whether the class of a module says that the module is one block, whatever is in it."""
    return getattr(type(module), "is_gathered_whole", False)


def find_leaf_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Find the blocks of a model, by name.

    These are the decoder layers of the language model, and outside it what stands in a
    `ModuleList`: blocks of transformers and stages. A module whose class says `is_gathered_whole`
    is one block.
    """
    layer_class = find_decoder_layer_class(model)
    leaf_modules: dict[str, nn.Module] = {}

    def visit(name: str, module: nn.Module, is_language_model: bool) -> None:
        is_language_model |= isinstance(module, PreTrainedModel)
        is_block_list = isinstance(module, nn.ModuleList) and not is_language_model
        for child_name, child in module.named_children():
            child_path = f"{name}.{child_name}" if name else child_name
            if is_block_list or is_gathered_whole(child) or type(child) is layer_class:
                leaf_modules[child_path] = child
            else:
                visit(child_path, child, is_language_model)

    visit("", model, False)
    return leaf_modules


def require_input_gradient(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Forward pre-hook of a leaf: give a module that trains an input that needs a gradient.

    Returns:
        The arguments, if they had to be changed.
    """
    if not torch.is_grad_enabled() or not any(p.requires_grad for p in module.parameters()):
        return None
    tensors = [arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()]
    if not tensors or any(tensor.requires_grad for tensor in tensors):
        return None
    entry = tensors[0].detach().requires_grad_()
    return tuple(entry if arg is tensors[0] else arg for arg in args)
