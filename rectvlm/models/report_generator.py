"""The report generator: image features become visual tokens of a language model that writes the report.

Shapes: B samples, M image tokens, Q visual tokens, T text positions, E width of the language model, V its vocabulary.

The prompt (`prompt.py`) holds the visual tokens and the cues: the findings and the lesions with their places, in words.
Only the report's tokens carry loss. Rows are padded on the left, so that all reports end at the same position and
logits are computed for those positions alone, some at a time.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rectvlm.config import GeneratorConfig
from rectvlm.models.encoder import ImageFeatures
from rectvlm.models.language_model import LanguageModel, compute_head_logits, compute_hidden_states
from rectvlm.models.layers import Mlp, TransformerBlock
from rectvlm.models.report_prompt import PromptTokens, encode_report_prompt

IGNORE_INDEX = -100


class VisualResampler(nn.Module):
    """Learned queries that read the image, and the projector into the language model's space."""

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
        # Visual tokens start with the spread of word embeddings; far larger ones drown the prompt.
        nn.init.constant_(self.scale.weight, embedding_std)

    def forward(self, features: ImageFeatures) -> Tensor:
        """(B, Q, E)."""
        image = torch.cat(
            [features.global_token[:, None], features.region_tokens, features.patches], dim=1
        )
        context = self.context_norm(self.inputs(image))
        x = self.queries.expand(len(image), -1, -1)
        for block in self.blocks:
            x = block(x, context)
        return self.scale(self.project(self.norm(x)))


class ReportLoss(NamedTuple):
    """Negative log-likelihood of the reports."""

    per_sample: Tensor
    """(B,) float32: mean over the report's tokens; 0 where there is no report."""
    token_counts: Tensor
    """(B,) int64: tokens of each report."""
    log_likelihood: Tensor
    """(B, K) float32: of each report token, aligned at the right; 0 elsewhere."""
    position_count: int
    """Positions of the language model, prompts and visual tokens included, padding left out."""


class ReportGenerator(nn.Module):
    """Resampler, projector and language model."""

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
        """Loss of each report, given the image and the cues. A sample without a report takes part with loss 0."""
        visual = self.resampler(features)
        rows, targets = [], []
        for cue, report in zip(cues, reports, strict=True):
            before, after = self.encode_prompt(cue)
            target = [] if report is None else self._encode_target(report)
            rows.append((before, after + target))
            targets.append(target)
        chunks = math.ceil(len(rows) * self.config.max_report_tokens / self.config.loss_chunk)
        longest = max(math.ceil(chunks / len(rows)), *(len(target) for target in targets))
        embeds, mask = self._embed_prompts(visual, rows, longest + 1)
        labels = torch.full((len(rows), longest), IGNORE_INDEX, device=visual.device)
        for row, target in enumerate(targets):
            if target:
                labels[row, -len(target) :] = torch.tensor(target, device=visual.device)
        # Padding is on the left, so positions are counted from each row's first real token.
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        # Position t predicts token t + 1: the last `longest + 1` positions, without the very last.
        hidden = compute_hidden_states(self.language_model, embeds, mask, positions)[
            :, -longest - 1 : -1
        ]
        loss = self._token_losses(hidden.flatten(0, 1), labels.flatten(), chunks).view_as(labels)
        count = (labels != IGNORE_INDEX).sum(1)
        return ReportLoss(
            loss.sum(1) / count.clamp_min(1),
            count,
            -loss,
            sum(len(b) + visual.shape[1] + len(a) for b, a in rows),
        )

    @torch.no_grad()
    def generate_reports(
        self,
        features: ImageFeatures,
        cues: Sequence[str],
        max_tokens: int | None = None,
        **options: Any,
    ) -> list[str]:
        """Write a report for each sample; greedy unless `options` (of `generate` in Transformers) say otherwise."""
        visual = self.resampler(features)
        embeds, mask = self._embed_prompts(visual, [self.encode_prompt(cue) for cue in cues])
        # Sharded by an engine, all ranks must run until the longest report has ended.
        shared = any(hasattr(parameter, "ds_id") for parameter in self.language_model.parameters())
        options = {"do_sample": False, "synced_gpus": shared, **options}
        tokens = self.language_model.generate(
            inputs_embeds=embeds,
            attention_mask=mask,
            max_new_tokens=max_tokens or self.config.max_report_tokens,
            pad_token_id=self.tokenizer.pad_token_id,
            **options,
        )
        return [
            text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        ]

    def _encode_target(self, report: str) -> list[int]:
        tokens = self.tokenizer.encode(report, add_special_tokens=False)[
            : self.config.max_report_tokens - 1
        ]
        return [*tokens, self.tokenizer.eos_token_id]

    def _embed_prompts(
        self, visual: Tensor, rows: Sequence[PromptTokens], least: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Rows of ids before and after the visual tokens, padded on the left to at least `least` positions: (B, T, E)
        and mask (B, T)."""
        assert len(visual) == len(rows), f"{len(visual)} images, but prompts of {len(rows)}"
        q = visual.shape[1]
        length = max(least, *(len(before) + q + len(after) for before, after in rows))
        ids = torch.full((len(rows), length), self.tokenizer.pad_token_id, device=visual.device)
        mask = torch.zeros_like(ids)
        is_visual = torch.zeros_like(ids, dtype=torch.bool)
        for row, (before, after) in enumerate(rows):
            start = length - len(before) - q - len(after)
            mask[row, start:] = 1
            ids[row, start : start + len(before)] = torch.tensor(before, device=ids.device)
            is_visual[row, start + len(before) : length - len(after)] = True
            if after:
                ids[row, length - len(after) :] = torch.tensor(after, device=ids.device)
        words = self.language_model.get_input_embeddings()(ids)
        embeds = words.masked_scatter(is_visual[..., None], visual.to(words.dtype))
        return embeds, mask

    def _token_losses(self, hidden: Tensor, labels: Tensor, chunks: int) -> Tensor:
        """Negative log-likelihoods (P,) float32 of labels (P,) after hidden states (P, E); 0 where ignored.

        Logits of one chunk exist at a time, here and in the backward pass, which computes them again. The number of
        chunks is a function of the configuration and the batch size, not of the reports: under ZeRO-3 every rank must
        call the output layer equally often.
        """
        parts = []
        for states, wanted in zip(
            hidden.tensor_split(chunks), labels.tensor_split(chunks), strict=True
        ):
            parts.append(
                checkpoint(
                    self._chunk_losses,
                    states,
                    wanted,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            )
        return torch.cat(parts)

    def _chunk_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = compute_head_logits(self.language_model, hidden[None])[0]
        return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="none")
