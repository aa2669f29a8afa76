"""The whole model: encoder, classifier, localizer and report generator behind one forward.

Shapes: B samples, Z × Y × X voxels.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rectvlm.config import Config, ModelPart
from rectvlm.labels import AIR_HU, FINDINGS, LESION_BY_KEY, LESIONS, N_LESIONS
from rectvlm.lesion_bits import pack_lesion, pack_lesions
from rectvlm.lesion_places import describe_places, locate_lesions
from rectvlm.models.classifier import FindingClassifier
from rectvlm.models.encoder import ImageFeatures, VolumeEncoder
from rectvlm.models.language_model import LanguageModel
from rectvlm.models.localizer import LesionLocalizer, LocalizerOutput
from rectvlm.models.prompt_embeddings import PromptEmbeddings
from rectvlm.models.report_generator import ReportGenerator, ReportLoss
from rectvlm.types import COARSE_REGIONS_SOURCE, Batch, BatchPrediction


class ModelOutputs(NamedTuple):
    """What a training forward gives; a part that the model lacks gives None."""

    finding_logits: Tensor
    """(B, 18) float32 logits."""
    localization: LocalizerOutput | None
    report_loss: ReportLoss | None
    token_count: int
    """Patches and language positions that were processed, padding left out."""


class RectVLM(nn.Module):
    """3D chest-CT vision-language model. Plain PyTorch: it runs with or without a launcher."""

    def __init__(
        self,
        config: Config,
        parts: Sequence[ModelPart],
        prompts: PromptEmbeddings,
        language: LanguageModel | None = None,
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
        assert {"encoder", "classifier"} <= set(parts), (
            f"parts {parts} lack the encoder or the classifier"
        )
        width = config.encoder.width
        self.prompts = prompts
        self.encoder = VolumeEncoder(config.encoder, config.data)
        self.classifier = FindingClassifier(config.classifier, width, prompts.embedding_width)
        self.localizer = (
            LesionLocalizer(config.localizer, config.data, config.encoder, prompts.embedding_width)
            if "localizer" in parts
            else None
        )
        self.generator = None
        if "generator" in parts:
            assert language is not None, "the generator needs a language model"
            self.generator = ReportGenerator(config.generator, width, language)

    @property
    def has_generator(self) -> bool:
        """Whether the model can write reports."""
        return self.generator is not None

    def forward(self, batch: Batch) -> ModelOutputs:
        """Training forward. Every part runs on every rank, whatever the batch lacks, so that ranks stay in step."""
        features = self.encoder(batch.ct, batch.regions, batch.regions_known)
        findings = self.classifier(features, self.prompts)
        localization = (
            self.localizer(batch.ct, features, self.prompts) if self.localizer is not None else None
        )
        if localization is not None and localization.finding_logits is not None:
            findings = findings + localization.finding_logits
        report = None
        if self.generator is not None:
            cues = self._describe_training_cues(batch, findings, localization)
            report = self.generator(features, cues, batch.reports)
        tokens = features.patches.shape[0] * features.patches.shape[1]
        return ModelOutputs(
            findings,
            localization,
            report,
            tokens + (0 if report is None else report.position_count),
        )

    @torch.no_grad()
    def predict_batch(
        self, batch: Batch, generate: bool = True, ablate_image: bool = False, localize: bool = True
    ) -> BatchPrediction:
        """Findings, masks and, if asked and possible, reports.

        Args:
            batch: labels, lesions and reports are not read.
            generate: write reports.
            ablate_image: replace the CT by air and forget the region map. Reports that score as well without the image
                were not read from it: the control that belongs beside every report metric.
            localize: outline lesions; when False all masks are empty, and nothing can be generated.
        """
        assert localize or not generate, "the report's prompt carries the lesions"
        assert not self.training, (
            "predict needs eval mode: noise and dropout would change the result"
        )
        ct, known = batch.ct, batch.regions_known
        if ablate_image:
            ct, known = torch.full_like(ct, AIR_HU), torch.zeros_like(known)
        features: ImageFeatures = self.encoder(ct, batch.regions, known)
        logits = self.classifier(features, self.prompts)
        lesions = torch.zeros(len(ct), N_LESIONS, *ct.shape[1:], device=ct.device)
        if self.localizer is not None and (localize or self.config.localizer.volumes_to_findings):
            localization = self.localizer(ct, features, self.prompts)
            logits = (
                logits
                if localization.finding_logits is None
                else logits + localization.finding_logits
            )
            lesions = localization.mask_logits.sigmoid() if localize else lesions
        findings = logits.sigmoid()
        reports = None
        if generate and self.generator is not None:
            outlined = _pack_lesion_bits(lesions, lambda p: p)
            reports = self.generator.generate_reports(
                features,
                self._describe_batch_cues(replace(batch, ct=ct), findings, outlined, known),
            )
        return BatchPrediction(findings.float(), lesions, reports)

    def _describe_training_cues(
        self, batch: Batch, logits: Tensor, localization: LocalizerOutput | None
    ) -> list[str]:
        """Cues for the prompt: the truth for a share of the samples, the model's own predictions for the rest.

        Truth alone would teach the language model to copy what it will not have; predictions alone are noise at first.
        """
        assert localization is not None, (
            "the generator's prompt carries lesions: build the localizer with it"
        )
        # What is unknown stays the model's guess: no label, or a lesion that no one outlined, does not mean absent.
        true = (
            torch.rand(len(batch.keys)).to(batch.ct.device) < self.config.generator.true_cue_share
        )
        findings = torch.where(
            batch.labels_known & true[:, None], batch.labels, logits.detach().sigmoid()
        )
        guessed = _pack_lesion_bits(localization.mask_logits.detach(), torch.sigmoid)
        told = pack_lesions(batch.lesions_annotated & true[:, None], axis=1)[:, None, None, None]
        return self._describe_batch_cues(
            batch, findings, batch.lesions & told | guessed & ~told, batch.regions_known
        )

    def _describe_batch_cues(
        self, batch: Batch, findings: Tensor, lesions: Tensor, known: Tensor
    ) -> list[str]:
        """Cues from probabilities (B, 18) and lesion bits (B, Z, Y, X)."""
        # The lobes of a coarse map are only roughly placed: lesions are then worded by side and zone, as without a map.
        lobes = [
            bool(k) and meta.regions_source != COARSE_REGIONS_SOURCE
            for k, meta in zip(known, batch.metas, strict=True)
        ]
        return [
            describe_cues(
                findings[i],
                lesions[i],
                batch.ct[i],
                batch.regions[i] if lobes[i] else None,
                batch.spacing,
            )
            for i in range(len(batch.keys))
        ]


def _pack_lesion_bits(masks: Tensor, probability: Callable[[Tensor], Tensor]) -> Tensor:
    """Lesion bits (B, Z, Y, X) of (B, 5, Z, Y, X), one lesion at a time: at full size, float copies of all are a GB."""
    bits = torch.zeros_like(masks[:, 0], dtype=torch.uint8)
    for lesion in LESIONS:
        bits |= pack_lesion(probability(masks[:, lesion.bit]) >= 0.5, lesion)
    return bits


def describe_cues(
    findings: Tensor,
    lesions: Tensor,
    ct: Tensor,
    regions: Tensor | None,
    spacing: tuple[float, float, float],
) -> str:
    """Findings and lesions of one sample, in words, from probabilities (18,) and lesion bits (Z, Y, X).

    An outline whose finding is not suggested is not told: a prompt that contradicts itself makes the language model
    write the finding, and a localizer outlines specks where a classifier sees none.
    """
    names = [name.lower() for name, p in zip(FINDINGS, findings.tolist(), strict=True) if p >= 0.5]
    hu = ct.round().to(torch.int16).cpu().numpy()
    places = locate_lesions(
        lesions.cpu().numpy(),
        hu,
        None if regions is None else regions.cpu().numpy().astype(np.uint8),
        spacing,
    )
    told = [place for place in places if LESION_BY_KEY[place.lesion].finding.lower() in names]
    found = f"Findings suggested: {', '.join(names)}." if names else "No findings suggested."
    return f"{found} {describe_places(told)}"
