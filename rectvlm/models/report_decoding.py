"""Decoding of reports: batches of prompts of like length, and the cache of what all begin with.

Shapes: B prompts, Q visual tokens, P tokens of the common prefix, T positions, E width of the
language model.

All prompts begin with the same tokens, those of the system's turn. Their keys and values are
computed once for all batches. Within a batch the padding stands between them and the visual tokens:

    prefix (P) | padding | visual tokens (Q) | cues and request

It is masked and no position is counted for it, so a report is that of its prompt alone.
"""

import copy
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from rectvlm.models.language_model import unwrap_causal_lm
from rectvlm.models.report_prompt import PromptTokens

MAX_DECODED_REPORTS = 128
"""Reports that are decoded together, at most. A step of decoding reads every weight once, for one
report or for many."""
CACHE_MEMORY_SHARE = 0.6
"""Share of the device's memory beside the language model's weights that keys and values may take.
What other things hold does not count, so that a machine always makes the same batches."""
CACHE_ENTRY_BYTES = 2


class ReportPrompt(NamedTuple):
    """What a report is written from."""

    visual: Tensor
    """(Q, E), visual tokens."""
    cues: str
    """Findings and lesions in words."""


def count_cache_bytes(model_config: Any) -> int:
    """Count the bytes of keys and values of one position in all layers, in bf16."""
    text_config = model_config.get_text_config()
    heads = getattr(text_config, "num_key_value_heads", None) or text_config.num_attention_heads
    head_width = getattr(text_config, "head_dim", None)
    if head_width is None:
        head_width = text_config.hidden_size // text_config.num_attention_heads
    return 2 * text_config.num_hidden_layers * heads * head_width * CACHE_ENTRY_BYTES


def count_decoded_reports(
    model_config: Any, positions: int, memory_bytes: float, weight_bytes: int
) -> int:
    """Count the reports that are decoded together.

    Args:
        model_config: configuration of the language model.
        positions: positions of the longest prompt with its report.
        memory_bytes: memory of the device, infinity for no limit.
        weight_bytes: memory of the language model's weights.
    """
    row_bytes = positions * count_cache_bytes(model_config)
    cache_bytes = CACHE_MEMORY_SHARE * (memory_bytes - weight_bytes)
    # The lesser one first: a plan without a limit of memory has infinite bytes.
    return max(1, int(min(MAX_DECODED_REPORTS, cache_bytes / row_bytes)))


def read_device_memory(device: torch.device) -> int:
    """Memory of a device, bytes; of a CPU, that of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def count_weight_bytes(model: Any) -> int:
    """Bytes of a model's parameters as they are stored."""
    return sum(parameter.nbytes for parameter in model.parameters())


def is_sharded(model: Any) -> bool:
    """Whether an engine holds the parameters of a model in shards."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def batch_by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Batches of at most `size` rows, longest first, as numbers of rows with these lengths.

    The longest come first, so that memory which does not suffice is noticed at once.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [order[start : start + size] for start in range(0, len(order), size)]


def find_common_prefix(sequences: Sequence[list[int]]) -> list[int]:
    """Tokens that all sequences begin with."""
    first, last = min(sequences), max(sequences)  # in the order of words in a dictionary
    length = 0
    while length < len(first) and first[length] == last[length]:
        length += 1
    return first[:length]


class PrefixCache:
    """Keys and values of the tokens that all prompts begin with."""

    @torch.no_grad()
    def __init__(self, model: Any, rows: Sequence[PromptTokens], positions: int) -> None:
        """Compute them with one forward pass.

        Args:
            model: language model with its adapter.
            rows: token ids of each prompt before and after the visual tokens.
            positions: positions of the longest prompt with its report, padding included.
        """
        causal_lm = unwrap_causal_lm(model)
        self._cache = DynamicCache(config=causal_lm.config.get_text_config())
        self._argument = _name_cache_argument(causal_lm)
        self.tokens: list[int] = []
        if all(_is_shareable(layer, positions) for layer in self._cache.layers):
            self.tokens = find_common_prefix([before for before, _ in rows])
        self.embeds: Tensor | None = None
        if self.tokens:
            embedding = model.get_input_embeddings()
            ids = torch.tensor([self.tokens], device=embedding.weight.device)
            self.embeds = embedding(ids)
            arguments = {self._argument: self._cache, "use_cache": True}
            causal_lm.base_model(inputs_embeds=self.embeds, **arguments)

    def prepend(self, embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Put the prefix before embeddings (B, T, E) and their mask (B, T)."""
        if self.embeds is None:
            return embeds, mask
        prefix = self.embeds.expand(len(embeds), -1, -1)
        is_prefix = mask.new_ones(len(mask), len(self.tokens))
        return torch.cat([prefix, embeds], 1), torch.cat([is_prefix, mask], 1)

    def arguments(self, row_count: int) -> dict[str, Cache]:
        """Arguments of `generate` that continue the prefix in so many rows."""
        if self.embeds is None:
            return {}
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(row_count)
        return {self._argument: cache}


def _is_shareable(layer: Any, positions: int) -> bool:
    """Whether a layer's keys and values do not depend on where padding stands.

    A sliding window counts padding too, and a recurrent layer reads it.
    """
    if type(layer) is DynamicSlidingWindowLayer:
        return positions < layer.sliding_window
    return type(layer) is DynamicLayer


def _name_cache_argument(causal_lm: Any) -> str:
    """Name of the cache among the decoder's arguments: Transformers 5.24 has renamed it."""
    parameters = inspect.signature(causal_lm.base_model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"
