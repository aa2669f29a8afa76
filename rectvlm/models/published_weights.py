"""Weights that others published: read from safetensors, never from a pickle."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rectvlm.types import UserError


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file, by name, to the CPU.

    Raises:
        UserError: the file is of another format or damaged.
    """
    if path.suffix != ".safetensors":
        raise UserError(
            f"{path} is no .safetensors file, and pickled weights run code when they are read: "
            "convert them where you trust them (see docs/how-to/own-encoder.md)."
        )
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}): fetch it again.") from None
