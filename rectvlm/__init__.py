"""ReCT-VLM: train 3D chest-CT vision-language models from CT-RATE to a 4-bit 70B language model."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rectvlm.models import RectVLM

__version__ = "0.1.0"
__all__ = ["RectVLM", "__version__"]


def __getattr__(name: str) -> Any:
    # On first use: a model takes seconds to import, which `rectvlm --help` and loaders would pay.
    if name == "RectVLM":
        from rectvlm.models import RectVLM

        return RectVLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
