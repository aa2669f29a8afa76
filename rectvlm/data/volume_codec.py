"""Volumes as bytes: a line of JSON (dtype, shape), then a blosc2 buffer (zstd, bit shuffle)."""

import json
import math
from typing import Any, cast

import blosc2
import numpy as np
from numpy.typing import NDArray

from rectvlm.types import UserError

_BLOCK_BYTES = 1 << 18
"""Block size. By default it depends on the machine's caches, but shards must repeat exactly."""
_MAX_HEADER_BYTES = 256
_MAX_VOLUME_BYTES = 1 << 30


def encode_volume(array: NDArray[Any]) -> bytes:
    """Compress a volume to bytes, the same on every machine."""
    array = np.ascontiguousarray(array)
    header = json.dumps({"dtype": array.dtype.name, "shape": array.shape}).encode() + b"\n"
    body = blosc2.compress2(
        array,
        codec=blosc2.Codec.ZSTD,
        clevel=1,
        typesize=array.itemsize,
        filters=[blosc2.Filter.BITSHUFFLE],
        filters_meta=[0],
        blocksize=_BLOCK_BYTES,
        nthreads=1,
    )
    return header + cast(bytes, body)


def decode_volume(
    data: bytes | memoryview, dtype: np.dtype[Any], where: str, out: NDArray[Any] | None = None
) -> NDArray[Any]:
    """Decompress a volume.

    Sizes are compared before anything is allocated: a damaged header must not ask for all memory.

    Args:
        data: bytes of `encode_volume`.
        dtype: expected type.
        where: name of the data in messages.
        out: contiguous array of the type that receives the volume and is returned.

    Raises:
        UserError: the data are damaged, of another type, or of another shape than `out`.
    """
    header, newline, _ = bytes(data[:_MAX_HEADER_BYTES]).partition(b"\n")
    body = memoryview(data)[len(header) + 1 :]
    try:
        described = json.loads(header) if newline else {}
        shape = tuple(int(n) for n in described["shape"])
        if described["dtype"] != dtype.name or len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"found {described}")
        n_bytes, packed_bytes, _ = blosc2.get_cbuffer_sizes(body)
        if (
            n_bytes != math.prod(shape) * dtype.itemsize
            or packed_bytes != len(body)
            or n_bytes > _MAX_VOLUME_BYTES
        ):
            raise ValueError(f"{len(body)} bytes for shape {shape}")
        if out is not None and out.shape != shape:
            raise ValueError(f"of shape {out.shape}, found {shape}")
        array = np.empty(shape, dtype) if out is None else out
        assert array.dtype == dtype and array.flags.c_contiguous
        blosc2.decompress2(body, dst=array, nthreads=1)
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{where} is damaged: expected a {dtype.name} volume, {error}; make the shards again."
        ) from None
    return array
