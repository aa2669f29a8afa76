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
from rectvlm.models.encoder import build_encoder
from rectvlm.models.language_model import LanguageModel
from rectvlm.models.localizer import LesionLocalizer, LocalizerOutput
from rectvlm.models.prompt_embeddings import PromptEmbeddings
from rectvlm.models.report_generator import ReportGenerator, ReportLoss
from rectvlm.types import COARSE_REGIONS_SOURCE, Batch, BatchPrediction


class ModelOutputs(NamedTuple):
    """Result of a training forward pass. A part that the model lacks gives None."""

    finding_logits: Tensor
    """(B, 18) float32."""
    localization: LocalizerOutput | None
    report_loss: ReportLoss | None
    token_count: int
    """Patches and language positions that were processed, without padding."""


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
            config: configuration of the model.
            parts: parts to build, the encoder and the classifier among them.
            prompts: embeddings of the finding and lesion prompts.
            language: language model; needed with the generator.

        Raises:
            UserError: the configuration names no known encoder.
        """
        super().__init__()
        assert {"encoder", "classifier"} <= set(parts), (
            f"parts {parts} lack the encoder or the classifier"
        )
        self.config, self.parts = config, tuple(parts)
        image_width, text_width = config.encoder.width, prompts.embedding_width
        self.prompts = prompts
        self.encoder = build_encoder(config.encoder, config.data)
        self.classifier = FindingClassifier(config.classifier, image_width, text_width)
        self.localizer = None
        if "localizer" in parts:
            self.localizer = LesionLocalizer(
                config.localizer, config.data, config.encoder, text_width
            )
        self.generator = None
        if "generator" in parts:
            assert language is not None, "the generator needs a language model"
            self.generator = ReportGenerator(config.generator, image_width, language)

    @property
    def has_generator(self) -> bool:
        """Whether the model can write reports."""
        return self.generator is not None

    def forward(self, batch: Batch) -> ModelOutputs:
        """Compute what the losses need.

        Every part runs on every rank, whatever the batch lacks, so that ranks stay in step.
        """
        features = self.encoder(batch.ct, batch.regions, batch.regions_known)
        finding_logits = self.classifier(features, self.prompts)
        localization = None
        if self.localizer is not None:
            localization = self.localizer(batch.ct, features, self.prompts)
            finding_logits = _add_localizer_logits(finding_logits, localization)

        report_loss = None
        token_count = features.patches.shape[0] * features.patches.shape[1]
        if self.generator is not None:
            cues = self._describe_training_cues(batch, finding_logits, localization)
            report_loss = self.generator(features, cues, batch.reports)
            token_count += report_loss.position_count
        return ModelOutputs(finding_logits, localization, report_loss, token_count)

    @torch.no_grad()
    def predict_batch(
        self, batch: Batch, generate: bool = True, ablate_image: bool = False, localize: bool = True
    ) -> BatchPrediction:
        """Predict findings, masks and, if asked and possible, reports.

        Args:
            batch: samples. Labels, lesions and reports are not read.
            generate: whether to write reports.
            ablate_image: replace the CT by air and hide the region map. Reports that score as well
                without the image were not read from it: the control that belongs beside every
                report metric.
            localize: whether to outline lesions. When False all masks are empty, and no reports can
                be written.
        """
        assert localize or not generate, "the report's prompt carries the lesions"
        assert not self.training, (
            "predict_batch needs eval mode: noise and dropout would change the result"
        )
        if ablate_image:
            batch = replace(
                batch,
                ct=torch.full_like(batch.ct, AIR_HU),
                regions_known=torch.zeros_like(batch.regions_known),
            )
        features = self.encoder(batch.ct, batch.regions, batch.regions_known)
        logits = self.classifier(features, self.prompts)
        shape = (len(batch.ct), N_LESIONS, *batch.ct.shape[1:])
        lesions = torch.zeros(shape, device=batch.ct.device)
        if self.localizer is not None and (localize or self.config.localizer.volumes_to_findings):
            localization = self.localizer(batch.ct, features, self.prompts)
            logits = _add_localizer_logits(logits, localization)
            if localize:
                lesions = localization.mask_logits.sigmoid()

        findings = logits.sigmoid()
        reports = None
        if generate and self.generator is not None:
            lesion_bits = _pack_lesion_bits(lesions, lambda probability: probability)
            cues = describe_batch_cues(batch, findings, lesion_bits)
            reports = self.generator.generate_reports(features, cues)
        return BatchPrediction(findings.float(), lesions, reports)

    def _describe_training_cues(
        self, batch: Batch, logits: Tensor, localization: LocalizerOutput | None
    ) -> list[str]:
        """Cues from the truth for a share of the samples, from predictions for the rest.

        Truth alone would teach the language model to copy what it will not have; predictions alone
        are noise at first. What is unknown stays the model's prediction: a missing label, or a
        lesion that no one outlined, does not mean absent.
        """
        assert localization is not None, (
            "the generator's prompt carries lesions: build the localizer with it"
        )
        shows_truth = torch.rand(len(batch.keys)).to(batch.ct.device)
        shows_truth = (shows_truth < self.config.generator.true_cue_share)[:, None]
        findings = torch.where(
            batch.labels_known & shows_truth, batch.labels, logits.detach().sigmoid()
        )
        predicted = _pack_lesion_bits(localization.mask_logits.detach(), torch.sigmoid)
        true_bits = pack_lesions(batch.lesions_annotated & shows_truth, axis=1)
        true_bits = true_bits[:, None, None, None]
        lesion_bits = batch.lesions & true_bits | predicted & ~true_bits
        return describe_batch_cues(batch, findings, lesion_bits)


def _add_localizer_logits(finding_logits: Tensor, localization: LocalizerOutput) -> Tensor:
    if localization.finding_logits is None:
        return finding_logits
    return finding_logits + localization.finding_logits


def _pack_lesion_bits(masks: Tensor, to_probability: Callable[[Tensor], Tensor]) -> Tensor:
    """Lesion bits (B, Z, Y, X) of masks (B, 5, Z, Y, X) at a probability of 0.5.

    One lesion at a time: at full size, float copies of all are a GB.
    """
    bits = torch.zeros_like(masks[:, 0], dtype=torch.uint8)
    for lesion in LESIONS:
        bits |= pack_lesion(to_probability(masks[:, lesion.bit]) >= 0.5, lesion)
    return bits


def describe_batch_cues(batch: Batch, findings: Tensor, lesion_bits: Tensor) -> list[str]:
    """Cues of each sample from probabilities (B, 18) and lesion bits (B, Z, Y, X)."""
    cues = []
    for i, meta in enumerate(batch.metas):
        # The lobes of a coarse map are only roughly placed. Lesions are then described by side and
        # zone, as without a map.
        has_lobes = bool(batch.regions_known[i]) and meta.regions_source != COARSE_REGIONS_SOURCE
        regions = batch.regions[i] if has_lobes else None
        cues.append(describe_cues(findings[i], lesion_bits[i], batch.ct[i], regions, batch.spacing))
    return cues


def describe_cues(
    findings: Tensor,
    lesion_bits: Tensor,
    ct: Tensor,
    regions: Tensor | None,
    spacing: tuple[float, float, float],
) -> str:
    """Findings and lesions of one sample, in words.

    A lesion whose finding is not suggested is left out. A prompt that contradicts itself makes the
    language model write the finding, and a localizer outlines specks where a classifier sees none.

    Args:
        findings: (18,), probabilities.
        lesion_bits: (Z, Y, X).
        ct: (Z, Y, X) HU.
        regions: (Z, Y, X) region ids, if they are known.
        spacing: voxel size (z, y, x), mm.
    """
    suggested = []
    for name, probability in zip(FINDINGS, findings.tolist(), strict=True):
        if probability >= 0.5:
            suggested.append(name.lower())
    hu = ct.round().to(torch.int16).cpu().numpy()
    region_ids = None if regions is None else regions.cpu().numpy().astype(np.uint8)

    consistent_places = []
    for place in locate_lesions(lesion_bits.cpu().numpy(), hu, region_ids, spacing):
        if LESION_BY_KEY[place.lesion].finding.lower() in suggested:
            consistent_places.append(place)
    summary = "No findings suggested."
    if suggested:
        summary = f"Findings suggested: {', '.join(suggested)}."
    return f"{summary} {describe_places(consistent_places)}"
