"""A trained report classifier as a labeler: any Hugging Face sequence classifier with 18 labels."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from rectvlm.labels import FINDINGS, N_FINDINGS
from rectvlm.metrics.report_labeler.finding_states import FindingState
from rectvlm.types import UserError

log = logging.getLogger(__name__)

PRESENT_THRESHOLD = 0.5
DEFAULT_CONTEXT_TOKENS = 512
"""Context of an encoder whose configuration does not state one, tokens."""


class ClassifierLabeler:
    """Present where the sigmoid of a finding's logit is at least 0.5, else absent.

    There are no other states. The labels are matched by name (case and underscores do not matter);
    a classifier that names none, only `LABEL_0` to `LABEL_17`, is taken to have the order of
    `labels.FINDINGS`, which is CT-RATE's. A report longer than the encoder's context is cut there,
    and counted in the log.
    """

    def __init__(self, model: str | Path, batch_size: int = 16, device: str | None = None) -> None:
        """Load a classifier.

        Args:
            model: folder or hub id.
            batch_size: number of reports that are read together.
            device: device of the classifier; by default the GPU if there is one.

        Raises:
            UserError: It cannot be loaded, or its labels are not the 18 findings.
        """
        try:
            config = AutoConfig.from_pretrained(model)
            self.output_indices = _match_outputs(dict(config.id2label), str(model))
            network, loading_info = AutoModelForSequenceClassification.from_pretrained(
                model, use_safetensors=True, output_loading_info=True
            )
            self.tokenizer = AutoTokenizer.from_pretrained(model)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"The report labeler {model} cannot be loaded ({reason}): give `rules`, or the "
                "folder or hub id of a Transformers sequence classifier with safetensors weights."
            ) from None
        # Transformers makes a random head for an encoder that has none.
        missing_weights = sorted(loading_info["missing_keys"])
        if missing_weights:
            raise UserError(
                f"The report labeler {model} is not trained: expected a sequence classifier, found "
                f"no weights for {missing_weights[0]}; give the folder of a classifier, not of its "
                "encoder."
            )

        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.network = network.eval().to(self.device)
        self.batch_size = batch_size
        self.max_tokens = min(self.tokenizer.model_max_length, _context_length(network))
        name = Path(model).name if Path(model).is_dir() else str(model)
        self.signature = (
            f"sequence classifier {name}, threshold {PRESENT_THRESHOLD}, "
            f"first {self.max_tokens} tokens"
        )

    @torch.inference_mode()
    def label_reports(self, reports: Sequence[str]) -> NDArray[np.int8]:
        """States of the findings, (N, 18)."""
        states = np.full((len(reports), N_FINDINGS), FindingState.ABSENT, dtype=np.int8)
        n_cut = 0
        for start in range(0, len(reports), self.batch_size):
            texts = list(reports[start : start + self.batch_size])
            token_ids = self.tokenizer(texts, verbose=False)["input_ids"]
            n_cut += sum(len(ids) > self.max_tokens for ids in token_ids)
            inputs = self.tokenizer(
                texts,
                padding=True,
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            )
            logits = self.network(**inputs.to(self.device)).logits
            probabilities = logits.float().sigmoid().cpu().numpy()[:, self.output_indices]
            is_present = probabilities >= PRESENT_THRESHOLD
            states[start : start + len(texts)][is_present] = FindingState.PRESENT
        if n_cut:
            log.warning(
                "%d of %d reports were cut to %d tokens for the labeler",
                n_cut,
                len(reports),
                self.max_tokens,
            )
        return states


def _match_outputs(id2label: dict[int, str], model: str) -> list[int]:
    """Number of the classifier's output for each finding of `FINDINGS`."""
    names = [_normalize_label(id2label[i]) for i in sorted(id2label)]
    if names == [f"label {i}" for i in range(N_FINDINGS)]:
        return list(range(N_FINDINGS))

    indices = []
    for finding in FINDINGS:
        name = _normalize_label(finding)
        if name not in names:
            raise UserError(
                f"The report labeler {model} has other labels: expected the 18 findings, found "
                f"{len(names)} labels without {finding!r}; name them in `id2label` of its "
                "config.json."
            )
        indices.append(names.index(name))
    return indices


def _normalize_label(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())


def _context_length(network: nn.Module) -> int:
    """Largest number of tokens; RoBERTa and its kin count positions from the padding id + 1."""
    n_positions = getattr(network.config, "max_position_embeddings", None)
    n_positions = int(n_positions or DEFAULT_CONTEXT_TOKENS)
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            padding_id = module.padding_idx
            return n_positions if padding_id is None else n_positions - padding_id - 1
    return n_positions
