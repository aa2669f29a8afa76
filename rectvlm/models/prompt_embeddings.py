"""Prompt embeddings of a frozen text encoder.

The text encoder is frozen and the prompts are fixed, so each prompt is embedded once, when the
model is built. The embeddings are saved with the weights: a trained model needs no text encoder.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from rectvlm.labels import FINDINGS, LESIONS, finding_prompts, lesion_prompt
from rectvlm.pretrained import explain_model_errors, require_safetensors
from rectvlm.types import UserError


@torch.no_grad()
def embed_texts(model: str | Path, texts: list[str], max_tokens: int) -> Tensor:
    """Mean of the last hidden states over each text's tokens, scaled to a standard deviation of 1.

    Sentence encoders give vectors of length 1, whose entries are far smaller than the layers that
    read them expect.

    Args:
        model: folder or hub id of the text encoder.
        texts: sentences.
        max_tokens: length at which a text is cut.

    Returns:
        (len(texts), width of the text encoder) float32.

    Raises:
        UserError: the text encoder cannot be loaded, or its weights are pickles.
    """
    with explain_model_errors(str(model)):
        require_safetensors(str(model))
        tokenizer = AutoTokenizer.from_pretrained(model)
        encoder = AutoModel.from_pretrained(model, dtype=torch.float32, use_safetensors=True).eval()
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
    """(18, T): each finding is present."""
    absent: Tensor
    """(18, T): each finding is absent."""
    lesions: Tensor
    """(5, T): each lesion."""

    def __init__(self, present: Tensor, absent: Tensor, lesions: Tensor) -> None:
        super().__init__()
        self.register_buffer("present", present)
        self.register_buffer("absent", absent)
        self.register_buffer("lesions", lesions)

    @classmethod
    def from_text_encoder(cls, model: str | Path, max_tokens: int) -> "PromptEmbeddings":
        """Embed every prompt with the text encoder in a folder or on the hub."""
        present, absent = zip(*map(finding_prompts, FINDINGS), strict=True)
        lesions = map(lesion_prompt, LESIONS)
        embeddings = embed_texts(model, [*present, *absent, *lesions], max_tokens)
        groups = embeddings.split([len(FINDINGS), len(FINDINGS), len(LESIONS)])
        return cls(*(group.clone() for group in groups))

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
