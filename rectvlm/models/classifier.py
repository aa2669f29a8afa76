"""The text-prompt classifier: 18 logits from image features and prompt embeddings.

Shapes: B samples, F findings (18), M image tokens, C encoder width, T text width, S shared width.

A finding's direction in the shared space comes from its prompts' difference, d_f = t_f⁺ − t_f⁻.
Most of it is the word "no", which all findings share (MiniLM: cosines of .93 between findings), so
the mean over the findings is subtracted, and lengths are made equal:

    w_f = W (√(2T) · (d_f − d̄) / |d_f − d̄| + o_f)

The offset o_f starts small, so at first the text decides (a cosine of .96), and yet findings with
similar prompts part sooner than from 0. Every image token u_m (global, regions,
patches) gives the evidence e_fm = u_m · w_f / √S. Attention pools the evidence; its query is the
prompt of presence, with an offset too, and the evidence itself sharpens it:

    logit_f = Σ_m a_fm · e_fm + b_f,   a_f = softmax_m(u_m · q(t_f⁺) / √S + β_f · e_fm)

With β > 0 a small finding in one patch is not averaged away by a thousand quiet patches. β starts
at 0: attention that sharpens on evidence which is still noise settles on tokens that have nothing
to do with the finding, and stays there (docs/lab-notes/learning.md).

The mean over the patient's tokens is subtracted from every token first, and the product is an inner
product, not a cosine. Most of an image feature is common to all tokens and patients, and a cosine
is nearly blind to the rest (with it, training did not overfit eight patients in 50 steps).

The bias starts as the log-odds of each finding among the training cases (`set_prior`).

The text encoder is frozen. Projections, prompt offsets, sharpness β and bias b learn.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rectvlm.config import ClassifierConfig
from rectvlm.labels import N_FINDINGS
from rectvlm.models.image_features import ImageFeatures
from rectvlm.models.prompt_embeddings import PromptEmbeddings

OFFSET_STD = 0.4
"""Standard deviation of a direction's first offset; that of the text is √2."""


class FindingClassifier(nn.Module):
    """Finding logits from evidence that is pooled over the image tokens."""

    def __init__(self, config: ClassifierConfig, image_width: int, text_width: int) -> None:
        super().__init__()
        width = config.width
        # A bias of `text` would give all findings one direction.
        self.text = nn.Linear(text_width, width, bias=False)
        self.query = nn.Linear(text_width, width)
        self.image = nn.Linear(image_width, width)
        self.norm = nn.LayerNorm(width)
        self.direction_offset = nn.Parameter(OFFSET_STD * torch.randn(N_FINDINGS, text_width))
        self.query_offset = nn.Parameter(torch.zeros(N_FINDINGS, text_width))
        self.sharpness = nn.Parameter(torch.zeros(N_FINDINGS))
        self.bias = nn.Parameter(torch.zeros(N_FINDINGS))

    @torch.no_grad()
    def set_prior(self, present: Tensor, absent: Tensor) -> None:
        """Make the bias the log-odds of each finding, so that the first loss is that of the
        prevalences (Lin et al., 2017, "Focal loss for dense object detection").

        Half a case is added to both counts (Anscombe, 1956): a finding that no case has keeps
        finite log-odds, and one that is never known has 0.

        Args:
            present: (18,), number of cases that are known to have each finding.
            absent: (18,), number of cases that are known not to have it.
        """
        self.bias.copy_(torch.log((present + 0.5) / (absent + 0.5)))

    def finding_directions(self, prompts: PromptEmbeddings) -> Tensor:
        """Directions of the findings in the shared space, (F, S)."""
        difference = prompts.present - prompts.absent
        centred = difference - difference.mean(dim=0, keepdim=True)
        length = (2 * centred.shape[-1]) ** 0.5
        text = F.normalize(centred, dim=-1) * length
        return self.text(text.to(self.text.weight.dtype) + self.direction_offset)

    def forward(self, features: ImageFeatures, prompts: PromptEmbeddings) -> Tensor:
        """Finding logits, (B, 18) float32."""
        assert len(prompts.present) == len(prompts.absent) == N_FINDINGS, (
            f"prompts must be of {N_FINDINGS} findings, "
            f"not {len(prompts.present)} and {len(prompts.absent)}"
        )
        direction = self.finding_directions(prompts)
        present = prompts.present.to(self.query.weight.dtype) + self.query_offset
        tokens = self.image(features.all_tokens())  # (B, M, S)
        # The mean tells little; with it, training sits on a plateau for some 40 steps first.
        tokens = self.norm(tokens - tokens.mean(dim=1, keepdim=True))
        scale = tokens.shape[-1] ** 0.5
        evidence = (tokens @ direction.T).float() / scale  # (B, M, F)
        scores = (tokens @ self.query(present).T).float() / scale
        attention = (scores + self.sharpness.float() * evidence).softmax(1)
        return (attention * evidence).sum(1) + self.bias.float()
