"""A trained report classifier as a labeler: any Hugging Face sequence classifier with one label a finding."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from rectvlm.labels import FINDINGS, N_FINDINGS
from rectvlm.metrics.report_labeler.rule_labeler import FindingState
from rectvlm.types import UserError

log = logging.getLogger(__name__)

PRESENT_THRESHOLD = 0.5


class ClassifierLabeler:
    """Present where the sigmoid of a finding's logit is at least 0.5, absent elsewhere; it has no other states.

    The labels are matched by name (case and underscores do not matter); a classifier that names none, only `LABEL_0`
    to `LABEL_17`, is taken to have the order of `labels.FINDINGS`, which is CT-RATE's. A report longer than the
    encoder's context is cut there, and counted in the log.
    """

    def __init__(self, model: str | Path, batch_size: int = 16, device: str | None = None) -> None:
        """Loads the classifier of a folder or hub id; by default onto the GPU if there is one.

        Raises:
            UserError: it cannot be loaded, or its labels are not the 18 findings.
        """
        try:
            config = AutoConfig.from_pretrained(model)
            self.order = _match_outputs(dict(config.id2label), str(model))
            # Without it, Transformers would invent a random head for an encoder that has none.
            network, info = AutoModelForSequenceClassification.from_pretrained(
                model, use_safetensors=True, output_loading_info=True
            )
            self.tokenizer = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"The report labeler {model} cannot be loaded ({reason}): give `rules`, or the folder or hub id of a "
                "Transformers sequence classifier with safetensors weights."
            ) from None
        if info["missing_keys"]:
            raise UserError(
                f"The report labeler {model} is not trained: expected a sequence classifier, found no weights for "
                f"{sorted(info['missing_keys'])[0]}; give the folder of a classifier, not of its encoder."
            )
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.network = network.eval().to(self.device)
        self.batch_size = batch_size
        self.context = min(self.tokenizer.model_max_length, _context_length(network))
        name = Path(model).name if Path(model).is_dir() else str(model)
        self.signature = f"sequence classifier {name}, threshold {PRESENT_THRESHOLD}, first {self.context} tokens"

    @torch.inference_mode()
    def label_reports(self, reports: Sequence[str]) -> NDArray[np.int8]:
        """States (N, 18)."""
        states = np.full((len(reports), N_FINDINGS), FindingState.ABSENT, dtype=np.int8)
        cut = 0
        for first in range(0, len(reports), self.batch_size):
            texts = list(reports[first : first + self.batch_size])
            cut += sum(
                len(ids) > self.context for ids in self.tokenizer(texts, verbose=False)["input_ids"]
            )
            inputs = self.tokenizer(
                texts, padding=True, truncation=True, max_length=self.context, return_tensors="pt"
            ).to(self.device)
            probabilities = self.network(**inputs).logits.float().sigmoid().cpu().numpy()
            present = probabilities[:, self.order] >= PRESENT_THRESHOLD
            states[first : first + len(texts)][present] = FindingState.PRESENT
        if cut:
            log.warning(
                "%d of %d reports were cut to %d tokens for the labeler",
                cut,
                len(reports),
                self.context,
            )
        return states


def _match_outputs(id2label: dict[int, str], model: str) -> list[int]:
    """The classifier's output for each finding of `FINDINGS`."""
    names = [_normalize_label(id2label[i]) for i in sorted(id2label)]
    wanted = [_normalize_label(finding) for finding in FINDINGS]
    if names == [f"label {i}" for i in range(N_FINDINGS)]:
        return list(range(N_FINDINGS))
    missing = [finding for finding in FINDINGS if _normalize_label(finding) not in names]
    if missing:
        raise UserError(
            f"The report labeler {model} has other labels: expected the 18 findings, found {len(names)} labels without "
            f"{missing[0]!r}; name them in `id2label` of its config.json."
        )
    return [names.index(name) for name in wanted]


def _normalize_label(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())


def _context_length(network: nn.Module) -> int:
    """Tokens that fit: RoBERTa and its kin count their positions from the padding id + 1."""
    positions = int(getattr(network.config, "max_position_embeddings", None) or 512)
    tables = [
        part for name, part in network.named_modules() if name.endswith("position_embeddings")
    ]
    padding = next((table.padding_idx for table in tables if isinstance(table, nn.Embedding)), None)
    return positions if padding is None else positions - padding - 1
