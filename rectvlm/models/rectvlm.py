"""The whole model: encoder, classifier, localizer and report generator behind one forward.

Shapes: B samples, Z × Y × X voxels.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rectvlm.config import Config, Part
from rectvlm.labels import AIR_HU, FINDINGS, LESION_BY_KEY, N_LESIONS
from rectvlm.models.classifier import Classifier
from rectvlm.models.encoder import Encoder, Features
from rectvlm.models.language import LanguageModel
from rectvlm.models.localizer import Localization, Localizer
from rectvlm.models.reporter import ReportGenerator, ReportLoss
from rectvlm.models.text import Prompts
from rectvlm.places import describe, locate
from rectvlm.types import COARSE, Batch, Prediction


class Outputs(NamedTuple):
    """What a training forward gives; a part that the model lacks gives None."""

    findings: Tensor
    """(B, 18) float32 logits."""
    localization: Localization | None
    report: ReportLoss | None
    tokens: int
    """Patches and language positions that were processed, padding left out."""


class RectVLM(nn.Module):
    """3D chest-CT vision-language model. Plain PyTorch: it runs with or without a launcher."""

    def __init__(
        self, config: Config, parts: Sequence[Part], prompts: Prompts, language: LanguageModel | None = None
    ) -> None:
        """Build with random weights around a language model that is loaded already.

        Args:
            config: sizes.
            parts: which parts to build; the encoder and the classifier always belong to them.
            prompts: embeddings of the finding and lesion prompts.
            language: needed with the generator.
        """
        super().__init__()
        self.config, self.parts = config, tuple(parts)
        assert {"encoder", "classifier"} <= set(parts), f"parts {parts} lack the encoder or the classifier"
        width = config.encoder.width
        self.prompts = prompts
        self.encoder = Encoder(config.encoder, config.data)
        self.classifier = Classifier(config.classifier, width, prompts.width)
        self.localizer = (
            Localizer(config.localizer, config.data, config.encoder, prompts.width) if "localizer" in parts else None
        )
        self.generator = None
        if "generator" in parts:
            assert language is not None, "the generator needs a language model"
            self.generator = ReportGenerator(config.generator, width, language)

    @property
    def has_generator(self) -> bool:
        """Whether the model can write reports."""
        return self.generator is not None

    def forward(self, batch: Batch) -> Outputs:
        """Training forward. Every part runs on every rank, whatever the batch lacks, so that ranks stay in step."""
        features = self.encoder(batch.ct, batch.regions, batch.regions_known)
        findings = self.classifier(features, self.prompts)
        localization = self.localizer(batch.ct, features, self.prompts) if self.localizer is not None else None
        if localization is not None and localization.findings is not None:
            findings = findings + localization.findings
        report = None
        if self.generator is not None:
            cues = self._training_cues(batch, findings, localization)
            report = self.generator(features, cues, batch.reports)
        tokens = features.patches.shape[0] * features.patches.shape[1]
        return Outputs(findings, localization, report, tokens + (0 if report is None else report.positions))

    @torch.no_grad()
    def predict(
        self, batch: Batch, generate: bool = True, ablate_image: bool = False, localize: bool = True
    ) -> Prediction:
        """Findings, masks and, if asked and possible, reports.

        Args:
            batch: labels, lesions and reports are not read.
            generate: write reports.
            ablate_image: replace the CT by air and forget the region map. Reports that score as well without the image
                were not read from it: the control that belongs beside every report metric.
            localize: outline lesions; when False all masks are empty, and nothing can be generated.
        """
        assert localize or not generate, "the report's prompt carries the lesions"
        assert not self.training, "predict needs eval mode: noise and dropout would change the result"
        ct, known = batch.ct, batch.regions_known
        if ablate_image:
            ct, known = torch.full_like(ct, AIR_HU), torch.zeros_like(known)
        features: Features = self.encoder(ct, batch.regions, known)
        logits = self.classifier(features, self.prompts)
        lesions = torch.zeros(len(ct), N_LESIONS, *ct.shape[1:], device=ct.device)
        if self.localizer is not None and (localize or self.config.localizer.informs):
            localization = self.localizer(ct, features, self.prompts)
            logits = logits if localization.findings is None else logits + localization.findings
            lesions = localization.masks.sigmoid() if localize else lesions
        findings = logits.sigmoid()
        reports = None
        if generate and self.generator is not None:
            outlined = _bits(lesions, lambda p: p)
            reports = self.generator.generate(features, self._cues(replace(batch, ct=ct), findings, outlined, known))
        return Prediction(findings.float(), lesions, reports)

    def _training_cues(self, batch: Batch, logits: Tensor, localization: Localization | None) -> list[str]:
        """Cues for the prompt: the truth for a share of the samples, the model's own predictions for the rest.

        Truth alone would teach the language model to copy what it will not have; predictions alone are noise at first.
        """
        assert localization is not None, "the generator's prompt carries lesions: build the localizer with it"
        # What is unknown stays the model's guess: no label, or a lesion that no one outlined, does not mean absent.
        true = torch.rand(len(batch.keys)).to(batch.ct.device) < self.config.generator.true_cues
        findings = torch.where(batch.labels_known & true[:, None], batch.labels, logits.detach().sigmoid())
        guessed = _bits(localization.masks.detach(), torch.sigmoid)
        shown = (batch.lesions_annotated & true[:, None]).to(torch.uint8)
        told = (shown << torch.arange(N_LESIONS, device=shown.device, dtype=torch.uint8)).sum(1, dtype=torch.uint8)
        told = told[:, None, None, None]
        return self._cues(batch, findings, batch.lesions & told | guessed & ~told, batch.regions_known)

    def _cues(self, batch: Batch, findings: Tensor, lesions: Tensor, known: Tensor) -> list[str]:
        """Cues from probabilities (B, 18) and lesion bits (B, Z, Y, X)."""
        # The lobes of a coarse map are only roughly placed: lesions are then worded by side and zone, as without a map.
        lobes = [bool(k) and meta.regions_source != COARSE for k, meta in zip(known, batch.meta, strict=True)]
        return [
            cue_words(findings[i], lesions[i], batch.ct[i], batch.regions[i] if lobes[i] else None, batch.spacing)
            for i in range(len(batch.keys))
        ]


def _bits(masks: Tensor, probability: Callable[[Tensor], Tensor]) -> Tensor:
    """Lesion bits (B, Z, Y, X) of (B, 5, Z, Y, X), one lesion at a time: at full size, float copies of all are a GB."""
    bits = torch.zeros_like(masks[:, 0], dtype=torch.uint8)
    for k, mask in enumerate(masks.unbind(1)):
        bits |= (probability(mask) >= 0.5).to(torch.uint8) << k
    return bits


def cue_words(
    findings: Tensor, lesions: Tensor, ct: Tensor, regions: Tensor | None, spacing: tuple[float, float, float]
) -> str:
    """Findings and lesions of one sample, in words, from probabilities (18,) and lesion bits (Z, Y, X).

    An outline whose finding is not suggested is not told: a prompt that contradicts itself makes the language model
    write the finding, and a localizer outlines specks where a classifier sees none.
    """
    names = [name.lower() for name, p in zip(FINDINGS, findings.tolist(), strict=True) if p >= 0.5]
    hu = ct.round().to(torch.int16).cpu().numpy()
    places = locate(
        lesions.cpu().numpy(), hu, None if regions is None else regions.cpu().numpy().astype(np.uint8), spacing
    )
    told = [place for place in places if LESION_BY_KEY[place.lesion].finding.lower() in names]
    found = f"Findings suggested: {', '.join(names)}." if names else "No findings suggested."
    return f"{found} {describe(told)}"
