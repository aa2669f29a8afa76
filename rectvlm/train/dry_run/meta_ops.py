"""Replacements for operations that the meta device runs otherwise than a GPU.

- Attention: the meta device would compute it with an N × N matrix. GPUs run a fused kernel that
  keeps queries, keys, values, the result and one number a row.
- 4-bit layers: the meta model has their bf16 shapes. bitsandbytes unpacks each weight for its
  product, forward and backward, and keeps nothing.
- Dropout: GPUs keep one byte an element.
- Values: a meta tensor that is asked for its values answers with zeros.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from rectvlm.train.dry_run.memory_tracker import MemoryTracker


class _FusedAttention(torch.autograd.Function):
    """Allocations and FLOPs of FlashAttention-2 (Dao, 2023), whose backward recomputes scores."""

    @staticmethod
    def forward(ctx: Any, tracker: MemoryTracker, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, heads, rows, channels = q.shape
        out = q.new_empty(batch, rows, heads, v.shape[-1]).transpose(1, 2)
        row_sums = q.new_empty(batch, heads, rows, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, row_sums)
        ctx.tracker = tracker
        ctx.product_flops = 2.0 * batch * heads * rows * k.shape[2] * channels
        ctx.bytes_moved = sum(t.numel() * t.element_size() for t in (q, k, v, out))
        tracker.add_operation(2 * ctx.product_flops, ctx.bytes_moved)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        q.new_empty(q.shape, dtype=torch.float32)  # the kernel sums the queries' gradient in fp32
        tracker: MemoryTracker = ctx.tracker
        tracker.add_operation(4 * ctx.product_flops, 2 * ctx.bytes_moved)
        tracker.add_operation(ctx.product_flops, 0, "recomputation")
        return None, torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _QuantizedLinear(torch.autograd.Function):
    """A 4-bit linear layer: the weight is unpacked to bf16, used and dropped."""

    @staticmethod
    def forward(ctx: Any, linear: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return linear(x, torch.empty_like(weight), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, grads[0] @ torch.empty_like(ctx.weight), None, None


_VALUE_FUNCTIONS = {
    Tensor.__bool__,
    Tensor.cpu,
    Tensor.tolist,
    Tensor.item,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__index__,
}


class _MetaValuesAsZeros(TorchFunctionMode):
    """Answers with zeros where a meta tensor is asked for its values."""

    def __init__(self, is_padded: bool) -> None:
        super().__init__()
        self.is_padded = is_padded

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func not in _VALUE_FUNCTIONS or not args[0].is_meta:
            return func(*args, **(kwargs or {}))
        if func is Tensor.__bool__:
            return not self.is_padded  # asked of `mask.all()`
        zeros = torch.zeros(args[0].shape, dtype=args[0].dtype)
        if func is Tensor.cpu:
            return zeros
        return zeros.tolist() if func is Tensor.tolist else zeros.item()


@contextmanager
def replace_meta_ops(
    tracker: MemoryTracker, quantized_weight_ids: set[int], is_padded: bool
) -> Iterator[None]:
    """Replace linear layers, dropout, attention and the reading of values.

    The functions are replaced where modules look them up, since a function mode is off while
    activation checkpoints recompute.

    Args:
        tracker: records the costs of the fused kernels.
        quantized_weight_ids: `id` of each weight that is packed to 4 bits.
        is_padded: whether rows differ in length, so that masks are needed.
    """
    linear, dropout, attention = F.linear, F.dropout, F.scaled_dot_product_attention

    def quantized_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if id(weight) in quantized_weight_ids:
            with tracker.mark_recomputation(tracker.current_pass == "recomputation"):
                return _QuantizedLinear.apply(linear, input, weight, bias)
        return linear(input, weight, bias)

    def one_byte_dropout(
        input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        return torch.native_dropout(input, p, True)[0] if training and p > 0 else input

    def fused_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        with tracker.mark_recomputation(tracker.current_pass == "recomputation"):
            return _FusedAttention.apply(tracker, query, key, value)

    F.linear, F.dropout = quantized_linear, one_byte_dropout
    F.scaled_dot_product_attention = fused_attention
    try:
        with _MetaValuesAsZeros(is_padded):
            yield
    finally:
        F.linear, F.dropout, F.scaled_dot_product_attention = linear, dropout, attention


def count_quantization_state_bytes(weights: int, double_quantization: bool) -> int:
    """Count the bytes of the scales of a 4-bit weight.

    There is one scale for each 64 entries, in fp32, or in 8 bits with a second level of scales:
    QLoRA (Dettmers et al., 2023), section 3, as bitsandbytes stores it. The second level has
    blocks of 256, a table of 256 fp32 codes and an offset; each weight keeps the table of its 16
    codes.
    """
    blocks = math.ceil(weights / 64)
    code_table_bytes = 16 * 4
    if not double_quantization:
        return 4 * blocks + code_table_bytes
    second_level_bytes = math.ceil(blocks / 256) * 4 + 256 * 4 + 4
    return blocks + second_level_bytes + code_table_bytes
