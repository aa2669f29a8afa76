"""The report generator: image features become visual tokens of a language model.

Shapes: B samples, M image tokens, Q visual tokens, T text positions, K positions with loss,
C encoder width, E width of the language model.

The prompt (`report_prompt.py`) holds the visual tokens and the cues: the findings and the lesions
with their places, in words. Only the report's tokens carry loss. Rows are padded on the left, so
that all reports end at the same position. Logits are then computed for the last positions alone,
some at a time.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rectvlm.config import GeneratorConfig
from rectvlm.models.image_features import ImageFeatures
from rectvlm.models.language_model import LanguageModel, compute_head_logits, compute_hidden_states
from rectvlm.models.layers import Mlp, TransformerBlock
from rectvlm.models.report_decoding import (
    PrefixCache,
    ReportPrompt,
    batch_by_length,
    count_decoded_reports,
    count_weight_bytes,
    is_sharded,
    read_device_memory,
)
from rectvlm.models.report_prompt import PromptTokens, encode_report_prompt

IGNORE_INDEX = -100
"""Label of a position without loss."""


class VisualResampler(nn.Module):
    """Learned queries that read the image, and a projector to the width of the language model."""

    def __init__(
        self, config: GeneratorConfig, image_width: int, language_width: int, embedding_std: float
    ) -> None:
        super().__init__()
        self.inputs = nn.Linear(image_width, config.width)
        self.context_norm = nn.LayerNorm(config.width)
        self.queries = nn.Parameter(torch.randn(1, config.queries, config.width) * 0.02)
        self.blocks = nn.ModuleList(
            TransformerBlock(config.width, config.heads) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)
        self.project = Mlp(config.width, 4.0, out=language_width)
        self.scale = nn.LayerNorm(language_width)
        # Visual tokens start with the standard deviation of word embeddings; far larger ones drown
        # the prompt.
        nn.init.constant_(self.scale.weight, embedding_std)

    def forward(self, features: ImageFeatures) -> Tensor:
        """Visual tokens, (B, Q, E)."""
        context = self.context_norm(self.inputs(features.all_tokens()))
        x = self.queries.expand(len(context), -1, -1)
        for block in self.blocks:
            x = block(x, context)
        return self.scale(self.project(self.norm(x)))


class ReportLoss(NamedTuple):
    """Negative log-likelihood of the reports."""

    per_sample: Tensor
    """(B,) float32, mean over the report's tokens; 0 where there is no report."""
    token_counts: Tensor
    """(B,) int64, number of tokens of each report."""
    log_likelihood: Tensor
    """(B, K) float32, log-likelihood of each report token, aligned at the right; 0 elsewhere."""
    position_count: int
    """Positions of the language model, with prompts and visual tokens, without padding."""


class ReportGenerator(nn.Module):
    """Resampler and language model."""

    def __init__(self, config: GeneratorConfig, image_width: int, language: LanguageModel) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = language.tokenizer
        self.language_model = language.model
        self.resampler = VisualResampler(
            config, image_width, language.embedding_width, language.embedding_std
        )

    def encode_prompt(self, cues: str) -> PromptTokens:
        """Token ids before and after the visual tokens."""
        return encode_report_prompt(self.tokenizer, cues)

    def forward(
        self, features: ImageFeatures, cues: Sequence[str], reports: Sequence[str | None]
    ) -> ReportLoss:
        """Loss of each report, given the image and the cues.

        A sample without a report runs through the model too, with loss 0.
        """
        visual = self.resampler(features)
        rows, targets = [], []
        for cue, report in zip(cues, reports, strict=True):
            before, after = self.encode_prompt(cue)
            target = [] if report is None else self._encode_target(report)
            rows.append((before, after + target))
            targets.append(target)

        chunks = math.ceil(len(rows) * self.config.max_report_tokens / self.config.loss_chunk)
        longest = max(math.ceil(chunks / len(rows)), *map(len, targets))
        embeds, mask = self._embed_prompts(visual, rows, longest + 1)
        labels = _align_right(targets, longest, visual.device)
        # Padding is on the left, so positions are counted from each row's first real token.
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        hidden = compute_hidden_states(self.language_model, embeds, mask, positions)
        # Position t predicts token t + 1: the last `longest + 1` positions, without the very last.
        hidden = hidden[:, -longest - 1 : -1]
        losses = self._token_losses(hidden.flatten(0, 1), labels.flatten(), chunks).view_as(labels)

        counts = (labels != IGNORE_INDEX).sum(1)
        return ReportLoss(
            per_sample=losses.sum(1) / counts.clamp_min(1),
            token_counts=counts,
            log_likelihood=-losses,
            position_count=sum(_row_lengths(rows, visual.shape[1])),
        )

    @torch.no_grad()
    def make_prompts(self, features: ImageFeatures, cues: Sequence[str]) -> list[ReportPrompt]:
        """Prompts of the samples, with their visual tokens."""
        return [ReportPrompt(*row) for row in zip(self.resampler(features), cues, strict=True)]

    def generate_reports(
        self,
        features: ImageFeatures,
        cues: Sequence[str],
        max_tokens: int | None = None,
        **options: Any,
    ) -> list[str]:
        """Write a report for each sample; see `write_reports`."""
        return self.write_reports(self.make_prompts(features, cues), max_tokens, **options)

    @torch.no_grad()
    def write_reports(
        self, prompts: Sequence[ReportPrompt], max_tokens: int | None = None, **options: Any
    ) -> list[str]:
        """Write a report for each prompt, in batches of like length.

        Args:
            prompts: prompts of `make_prompts`, of any number of calls.
            max_tokens: length at which a report is cut; by default `generator.max_report_tokens`.
            options: options of `generate` in Transformers; decoding is greedy by default.
        """
        assert prompts, "no prompts"
        max_tokens = max_tokens or self.config.max_report_tokens
        rows = [self.encode_prompt(prompt.cues) for prompt in prompts]
        lengths = _row_lengths(rows, self.config.queries)
        positions = max(lengths) + max_tokens
        # Where an engine shards the model, all ranks must run until the longest report has ended,
        # in one batch and without a prefix, of which other ranks may have none.
        must_sync = is_sharded(self.language_model)
        options = {"do_sample": False, "synced_gpus": must_sync, **options}
        batches, prefix = [list(range(len(rows)))], None
        if not must_sync:
            device = prompts[0].visual.device
            size = count_decoded_reports(
                self.language_model.config,
                positions,
                read_device_memory(device),
                count_weight_bytes(self.language_model),
            )
            batches = batch_by_length(lengths, size)
            prefix = PrefixCache(self.language_model, rows, positions)

        texts = [""] * len(rows)
        for batch in batches:
            visual = torch.stack([prompts[row].visual for row in batch])
            batch_rows = [rows[row] for row in batch]
            batch_texts = self._decode(visual, batch_rows, prefix, max_tokens, options)
            for row, text in zip(batch, batch_texts, strict=True):
                texts[row] = text.strip()
        return texts

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[ReportPrompt]) -> list[Tensor]:
        """Embeddings (T, E) of each whole prompt, for a language model that runs elsewhere."""
        embeds = []
        for visual, cues in prompts:
            row_embeds, _ = self._embed_prompts(visual[None], [self.encode_prompt(cues)])
            embeds.append(row_embeds[0])
        return embeds

    def _decode(
        self,
        visual: Tensor,
        rows: Sequence[PromptTokens],
        prefix: PrefixCache | None,
        max_tokens: int,
        options: dict[str, Any],
    ) -> list[str]:
        """Write the reports of a batch of prompts."""
        if prefix is None:
            embeds, mask = self._embed_prompts(visual, rows)
        else:
            skipped = len(prefix.tokens)
            rows = [(before[skipped:], after) for before, after in rows]
            embeds, mask = prefix.prepend(*self._embed_prompts(visual, rows))
            options = options | prefix.arguments(len(rows) * options.get("num_beams", 1))
        tokens = self.language_model.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            max_new_tokens=max_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            **options,
        )
        texts: list[str] = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return texts

    def is_cut(self, report: str) -> bool:
        """Whether a report and its end token are longer than `generator.max_report_tokens`."""
        return self._encode_target(report)[-1] != self.tokenizer.eos_token_id

    def _encode_target(self, report: str) -> list[int]:
        """Token ids of a report, cut at the limit.

        A report that is cut has no end token: it would teach the model to stop in mid-sentence.
        """
        tokens = self.tokenizer.encode(report, add_special_tokens=False)
        return [*tokens, self.tokenizer.eos_token_id][: self.config.max_report_tokens]

    def _embed_prompts(
        self, visual: Tensor, rows: Sequence[PromptTokens], min_length: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Embed rows of token ids with the visual tokens between them, padded on the left.

        Args:
            visual: (B, Q, E), visual tokens.
            rows: token ids before and after the visual tokens.
            min_length: smallest number of positions T.

        Returns:
            Embeddings (B, T, E) and mask (B, T), 1 where a position is no padding.
        """
        assert len(visual) == len(rows), f"{len(visual)} images, but prompts of {len(rows)}"
        count = visual.shape[1]
        lengths = _row_lengths(rows, count)
        length = max(min_length, *lengths)
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id, device=visual.device)
        mask = torch.zeros_like(ids)
        is_visual = torch.zeros_like(ids, dtype=torch.bool)
        for row, (before, after) in enumerate(rows):
            start = length - lengths[row]
            first_visual = start + len(before)
            mask[row, start:] = 1
            ids[row, start:first_visual] = torch.tensor(before, device=ids.device)
            is_visual[row, first_visual : first_visual + count] = True
            if after:
                ids[row, -len(after) :] = torch.tensor(after, device=ids.device)
        words = self.language_model.get_input_embeddings()(ids)
        embeds = words.masked_scatter(is_visual[..., None], visual.to(words.dtype))
        return embeds, mask

    def _token_losses(self, hidden: Tensor, labels: Tensor, chunks: int) -> Tensor:
        """Negative log-likelihoods (P,) float32 of labels (P,) after hidden states (P, E); 0 where
        ignored.

        Logits of one chunk exist at a time, here and in the backward pass, which computes them
        again where there are several. The number of chunks is a function of the configuration and
        the batch size, not of the reports: under ZeRO-3 every rank must call the output layer
        equally often.
        """
        if chunks == 1:
            return self._chunk_losses(hidden, labels)
        losses = []
        for chunk in zip(hidden.tensor_split(chunks), labels.tensor_split(chunks), strict=True):
            losses.append(
                checkpoint(
                    self._chunk_losses, *chunk, use_reentrant=False, preserve_rng_state=False
                )
            )
        return torch.cat(losses)

    def _chunk_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = compute_head_logits(self.language_model, hidden[None])[0]
        return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="none")


def _align_right(targets: Sequence[list[int]], length: int, device: torch.device) -> Tensor:
    """Labels (B, length): each target at the right end, `IGNORE_INDEX` before it."""
    labels = torch.full((len(targets), length), IGNORE_INDEX, device=device)
    for row, target in enumerate(targets):
        if target:
            labels[row, -len(target) :] = torch.tensor(target, device=device)
    return labels


def _row_lengths(rows: Sequence[PromptTokens], visual_count: int) -> list[int]:
    """Positions of each row with its visual tokens, without padding."""
    return [len(before) + visual_count + len(after) for before, after in rows]
