"""Layers that keep only their input: the same values and gradients as the plain ones, and less
memory."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rectvlm.models import memory_efficient
from rectvlm.models.memory_efficient import (
    GeluSingleChannelConv,
    NormGelu,
    upsample_nearest,
)

SHAPE = (2, 6, 3, 4, 5)


def norm_gelu() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    layer = NormGelu(2, 6)
    return layer, lambda x: F.gelu(F.group_norm(x, 2, layer.weight, layer.bias, layer.eps))


def gelu_to_one() -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    layer = GeluSingleChannelConv(6)
    return layer, lambda x: F.conv3d(F.gelu(x), layer.weight, layer.bias)


EACH = pytest.mark.parametrize("build", [norm_gelu, gelu_to_one])


@EACH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True], ids=["channels-first", "gradient-channels-last"])
def test_values_and_gradients_are_those_of_the_plain_layers(
    build: Callable[[], tuple[nn.Module, Callable[[Tensor], Tensor]]],
    dtype: torch.dtype,
    last: bool,
) -> None:
    torch.manual_seed(0)
    layer, plain = build()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    layer.to(dtype)
    x = torch.randn(SHAPE, dtype=dtype, requires_grad=True)
    output, expected = layer(x), plain(x)
    # In bfloat16 the bias is added to a sum that is rounded already.
    torch.testing.assert_close(
        output, expected, **({"rtol": 0.016, "atol": 5e-3} if dtype == torch.bfloat16 else {})
    )
    grad = torch.randn_like(expected)
    if last:
        grad = grad.to(memory_format=torch.channels_last_3d)
    inputs = [x, *layer.parameters()]
    ours, theirs = (torch.autograd.grad(out, inputs, grad) for out in (output, expected))
    torch.testing.assert_close(ours, theirs)


@EACH
def test_only_the_input_is_kept(
    build: Callable[[], tuple[nn.Module, Callable[[Tensor], Tensor]]],
) -> None:
    layer, plain = build()
    x = torch.randn(SHAPE, requires_grad=True)

    def kept(function: Callable[[Tensor], Tensor]) -> int:
        found: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            function(x * 1)
        return sum(n == x.numel() for n in found.values())

    assert kept(plain) == 2
    assert kept(layer) == 1


def test_compiled_layers_give_the_same_gradients() -> None:
    """Between two convolutions, where gradients arrive channels-last."""
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv3d(4, 6, 3), NormGelu(2, 6), nn.Conv3d(6, 6, 3), GeluSingleChannelConv(6)
    )
    x = torch.randn(2, 4, 6, 7, 8).to(memory_format=torch.channels_last_3d)

    def gradients(run: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(x).square().sum(), list(layers.parameters()))

    def ours(x: Tensor) -> Tensor:
        first, norm, second, head = layers
        y = norm(first(x).contiguous()).to(memory_format=torch.channels_last_3d)
        return head(second(y).contiguous())

    def plain(x: Tensor) -> Tensor:
        first, norm, second, head = layers
        assert isinstance(norm, NormGelu) and isinstance(head, GeluSingleChannelConv)
        y = second(F.gelu(F.group_norm(first(x), 2, norm.weight, norm.bias, norm.eps)))
        return F.conv3d(F.gelu(y), head.weight, head.bias)

    wanted = gradients(plain)
    torch.testing.assert_close(gradients(ours), wanted, rtol=1e-4, atol=1e-4)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(compiled), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "off"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.016)]
)
def test_group_norm_by_sums_is_group_norm(dtype: torch.dtype, off: float) -> None:
    """As GPUs compute it; with a mean that is larger than the spread."""
    torch.manual_seed(0)
    x, weight, bias = (
        (3 + torch.randn(SHAPE)).to(dtype),
        torch.randn(6).to(dtype),
        torch.randn(6).to(dtype),
    )
    results = memory_efficient._group_norm_by_sums(x, weight, bias, (2, 6, 60, 2), 1e-5)
    wanted = torch.ops.aten.native_group_norm(
        x.double(), weight.double(), bias.double(), 2, 6, 60, 2, 1e-5
    )
    for ours, theirs in zip(results, wanted, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=off, atol=off)


@pytest.mark.parametrize("stride", [(1, 2, 2), (2, 2, 2)])
def test_enlarging_by_a_copy_is_the_nearest_neighbour(stride: tuple[int, int, int]) -> None:
    x = torch.randn(SHAPE, dtype=torch.float64, requires_grad=True)
    copied, wanted = (
        memory_efficient._UpsampleNearestFunction.apply(x, stride),
        upsample_nearest(x, stride),
    )
    assert torch.equal(copied, wanted)
    grad = torch.randn_like(wanted)
    ours, theirs = (torch.autograd.grad(out, x, grad)[0] for out in (copied, wanted))
    torch.testing.assert_close(ours, theirs)
