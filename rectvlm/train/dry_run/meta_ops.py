"""Stand-ins for what the meta device runs otherwise than a GPU, and for values that it does not have.

- Attention: the meta device would compute it with an N × N matrix. GPUs run a fused kernel that keeps queries, keys,
  values, result and one number a row.
- 4-bit layers: the skeleton has their bf16 shapes. bitsandbytes unpacks each weight for its product, forward and
  backward, and keeps nothing.
- Dropout: GPUs keep one byte an element.
- A meta tensor that is asked for its values answers with zeros.
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
    """What FlashAttention-2 allocates and computes (Dao, 2023): its backward computes the scores again."""

    @staticmethod
    def forward(ctx: Any, ledger: MemoryTracker, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, n, d = q.shape
        out = q.new_empty(b, n, h, v.shape[-1]).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(b, h, n, dtype=torch.float32))
        ctx.ledger = ledger
        ctx.product = 2.0 * b * h * n * k.shape[2] * d
        ctx.traffic = sum(t.numel() * t.element_size() for t in (q, k, v, out))
        ledger.add_operation(2 * ctx.product, ctx.traffic)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        q.new_empty(q.shape, dtype=torch.float32)  # the kernel sums the queries' gradient in fp32
        ledger: MemoryTracker = ctx.ledger
        ledger.add_operation(4 * ctx.product, 2 * ctx.traffic)
        ledger.add_operation(ctx.product, 0, "recomputation")
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


class _MetaValuesAsZeros(TorchFunctionMode):
    """A meta tensor that is asked for its values answers with zeros."""

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
        return {Tensor.cpu: lambda: zeros, Tensor.tolist: zeros.tolist}.get(
            func, lambda: zeros.item()
        )()


_VALUE_FUNCTIONS = {
    Tensor.__bool__,
    Tensor.cpu,
    Tensor.tolist,
    Tensor.item,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__index__,
}


@contextmanager
def replace_meta_ops(
    ledger: MemoryTracker, quantized_weight_ids: set[int], is_padded: bool
) -> Iterator[None]:
    """Put the stand-ins in their places.

    The functions are replaced where modules look them up, since a function mode is off while checkpoints recompute.

    Args:
        ledger: is told what the fused kernels compute.
        packed: ids of the weights that are packed.
        padded: whether rows differ in length, so that masks are needed.
    """
    linear, dropout, attention = F.linear, F.dropout, F.scaled_dot_product_attention

    def packed_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if id(weight) in quantized_weight_ids:
            with ledger.mark_recomputation(ledger.current_pass == "recomputation"):
                return _QuantizedLinear.apply(linear, input, weight, bias)
        return linear(input, weight, bias)

    def one_byte_dropout(
        input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        return torch.native_dropout(input, p, True)[0] if training and p > 0 else input

    def fused_attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        with ledger.mark_recomputation(ledger.current_pass == "recomputation"):
            return _FusedAttention.apply(ledger, query, key, value)

    F.linear, F.dropout, F.scaled_dot_product_attention = (
        packed_linear,
        one_byte_dropout,
        fused_attention,
    )
    try:
        with _MetaValuesAsZeros(is_padded):
            yield
    finally:
        F.linear, F.dropout, F.scaled_dot_product_attention = linear, dropout, attention


def count_quantization_state_bytes(weights: int, double_quantization: bool) -> int:
    """Bytes of the scales of a packed weight: one for each 64 entries, in fp32, or in 8 bits with a second level.

    QLoRA (Dettmers et al., 2023), section 3, as bitsandbytes stores it: the second level has blocks of 256, a table of
    256 fp32 codes and an offset; each weight keeps the table of its 16 codes.
    """
    blocks = math.ceil(weights / 64)
    codes = 16 * 4
    return (
        blocks + math.ceil(blocks / 256) * 4 + 256 * 4 + 4 + codes
        if double_quantization
        else 4 * blocks + codes
    )
