"""Prompts as embeddings of a frozen text encoder.

The encoder is frozen and the prompts are fixed, so each is embedded once, when the model is built. The embeddings
travel with the weights: a trained model needs no text encoder to run.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from rectvlm.labels import FINDINGS, LESIONS, finding_prompts, lesion_prompt
from rectvlm.types import UserError


@torch.no_grad()
def embed_texts(model: str | Path, texts: list[str], max_tokens: int) -> Tensor:
    """Mean of the last hidden states over each text's tokens, scaled to a spread of 1: (len(texts), T) float32.

    Sentence encoders give vectors of length 1, whose entries are far smaller than what the layers behind them expect.
    """
    tokenizer = AutoTokenizer.from_pretrained(model)
    encoder = AutoModel.from_pretrained(model, dtype=torch.float32).eval()
    tokens = tokenizer(
        texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt"
    )
    hidden = encoder(**tokens).last_hidden_state
    mask = tokens["attention_mask"][..., None].to(hidden.dtype)
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return nn.functional.normalize(mean, dim=-1) * mean.shape[-1] ** 0.5


class PromptEmbeddings(nn.Module):
    """Frozen embeddings of the prompts of the 18 findings and the 5 lesions."""

    present: Tensor
    absent: Tensor
    lesions: Tensor

    def __init__(self, present: Tensor, absent: Tensor, lesions: Tensor) -> None:
        super().__init__()
        self.register_buffer("present", present)
        self.register_buffer("absent", absent)
        self.register_buffer("lesions", lesions)

    @classmethod
    def from_text_encoder(cls, model: str | Path, max_tokens: int) -> "PromptEmbeddings":
        """Embed every prompt with the text encoder in a folder or on the hub."""
        pairs = [finding_prompts(finding) for finding in FINDINGS]
        texts = (
            [p for p, _ in pairs]
            + [a for _, a in pairs]
            + [lesion_prompt(lesion) for lesion in LESIONS]
        )
        present, absent, lesions = embed_texts(model, texts, max_tokens).split(
            [len(pairs), len(pairs), len(LESIONS)]
        )
        return cls(present.clone(), absent.clone(), lesions.clone())

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], where: Path) -> "PromptEmbeddings":
        """The embeddings that a checkpoint carries.

        Args:
            tensors: of the checkpoint, by name.
            where: its folder, for the message.

        Raises:
            UserError: it carries none.
        """
        try:
            return cls(*(tensors[f"prompts.{name}"] for name in ("present", "absent", "lesions")))
        except KeyError as error:
            raise UserError(
                f"The weights in {where} lack {error}: they are not those of a rectvlm run."
            ) from error

    @property
    def embedding_width(self) -> int:
        """Channels of an embedding."""
        return self.present.shape[1]
