"""The text-prompt classifier: 18 logits from image features and prompt embeddings.

Shapes: B samples, F findings (18), M image tokens, C encoder width, T text width, S shared width.

A finding's direction is its prompt of presence minus that of absence, in the shared space: d_f = t_f⁺ − t_f⁻.
Every image token u_m (global, regions, patches) gives its evidence e_fm = u_m · d_f / √S, and the evidence is pooled by
attention whose query is the prompt of presence, sharpened by the evidence itself:

    logit_f = Σ_m a_fm · e_fm + b_f,   a_f = softmax_m(u_m · q(t_f⁺) / √S + β · e_fm)

With β > 0 a small finding in one patch is not averaged away by a thousand quiet ones. β starts at 0: attention that
sharpens on evidence which is still noise settles on tokens that have nothing to do with the finding, and stays there
(docs/learning.md). Tokens are centred over the
patient first, and the product is inner, not a cosine: most of an image feature is common to all tokens and patients,
and a cosine is nearly blind to what remains (with it, training did not overfit eight patients in 50 steps).

The text encoder is frozen; projections, prompt offsets, sharpness and bias learn.
"""

import torch
from torch import Tensor, nn

from rectvlm.config import ClassifierConfig
from rectvlm.labels import N_FINDINGS
from rectvlm.models.encoder import ImageFeatures
from rectvlm.models.prompt_embeddings import PromptEmbeddings


class FindingClassifier(nn.Module):
    """Finding logits from evidence pooled over image tokens."""

    def __init__(self, config: ClassifierConfig, image_width: int, text_width: int) -> None:
        super().__init__()
        width = config.width
        self.text = nn.Linear(
            text_width, width, bias=False
        )  # a bias would cancel in the difference
        self.query = nn.Linear(text_width, width)
        self.image = nn.Linear(image_width, width)
        self.norm = nn.LayerNorm(width)
        self.offset_present = nn.Parameter(torch.randn(N_FINDINGS, text_width))
        self.offset_absent = nn.Parameter(torch.randn(N_FINDINGS, text_width))
        self.sharpness = nn.Parameter(torch.zeros(N_FINDINGS))
        self.bias = nn.Parameter(torch.full((N_FINDINGS,), -0.5))

    def forward(self, features: ImageFeatures, prompts: PromptEmbeddings) -> Tensor:
        """(B, 18) float32 logits."""
        dtype = self.text.weight.dtype
        assert len(prompts.present) == len(prompts.absent) == N_FINDINGS, (
            f"prompts must be of {N_FINDINGS} findings"
        )
        present = prompts.present.to(dtype) + self.offset_present
        direction = self.text(present) - self.text(
            prompts.absent.to(dtype) + self.offset_absent
        )  # (F, S)
        tokens = torch.cat(
            [features.global_token[:, None], features.region_tokens, features.patches], dim=1
        )
        tokens = self.image(tokens)  # (B, M, S)
        # What all tokens share says little; with it, training sits on a plateau for some 40 steps first.
        tokens = self.norm(tokens - tokens.mean(dim=1, keepdim=True))
        root = tokens.shape[-1] ** 0.5
        evidence = (tokens @ direction.T).float() / root  # (B, M, F)
        attention = (
            tokens @ self.query(present).T
        ).float() / root + self.sharpness.float() * evidence
        return (attention.softmax(1) * evidence).sum(1) + self.bias.float()
