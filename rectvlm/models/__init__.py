"""The model: a shared 3D encoder and three heads. Plain PyTorch, without a launcher."""

from rectvlm.models.rectvlm import ModelOutputs, RectVLM, load_part

__all__ = ["ModelOutputs", "RectVLM", "load_part"]
