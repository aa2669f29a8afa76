"""The text-prompt classifier: 18 logits from image features and prompt embeddings.

Shapes: B samples, F findings (18), M image tokens, C encoder width, T text width, S shared width.

The prompt of a finding's presence asks the image where to look (attention over the global, region and patch tokens);
the answer v_f is compared with the prompts of presence and absence:

    logit_f = τ · (cos(v_f, t_f⁺) − cos(v_f, t_f⁻)) + b_f

The text encoder is frozen; projections, prompt offsets, temperature and bias learn.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rectvlm.config import ClassifierConfig
from rectvlm.labels import N_FINDINGS
from rectvlm.models.encoder import Features
from rectvlm.models.layers import Attention
from rectvlm.models.text import Prompts


class Classifier(nn.Module):
    """Finding logits by similarity of image and prompts."""

    def __init__(self, config: ClassifierConfig, image_width: int, text_width: int) -> None:
        super().__init__()
        width = config.width
        self.text = nn.Linear(text_width, width)
        self.image = nn.Linear(image_width, width)
        self.attention = Attention(width, heads=max(1, width // 32))
        self.norm = nn.LayerNorm(width)
        self.offset_present = nn.Parameter(torch.zeros(N_FINDINGS, text_width))
        self.offset_absent = nn.Parameter(torch.zeros(N_FINDINGS, text_width))
        self.log_temperature = nn.Parameter(torch.tensor([math.log(5.0)]))
        self.bias = nn.Parameter(torch.zeros(N_FINDINGS))

    def forward(self, features: Features, prompts: Prompts) -> Tensor:
        """(B, 18) float32 logits."""
        dtype = self.text.weight.dtype
        present = self.text(prompts.present.to(dtype) + self.offset_present)  # (F, S)
        absent = self.text(prompts.absent.to(dtype) + self.offset_absent)
        tokens = self.image(torch.cat([features.whole[:, None], features.regions, features.patches], dim=1))
        answers = self.norm(self.attention(present.expand(len(tokens), -1, -1), tokens) + tokens[:, :1])
        difference = F.cosine_similarity(answers.float(), present.float(), dim=-1) - F.cosine_similarity(
            answers.float(), absent.float(), dim=-1
        )
        return self.log_temperature.float().exp() * difference + self.bias.float()
