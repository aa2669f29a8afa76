"""Evaluation of cases: prediction, comparison with the truth, and reports of a group at once."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

import numpy as np
import torch
from numpy.typing import NDArray

from rectvlm.evaluate.case_groups import CaseGroup
from rectvlm.evaluate.case_records import CasePurpose, CaseRecord, LesionRecord
from rectvlm.evaluate.native_grid import lesions_to_native_grid
from rectvlm.evaluate.options import LESION_THRESHOLD, EvaluationOptions
from rectvlm.evaluate.report_server import ReportServer
from rectvlm.labels import FINDINGS, LESIONS
from rectvlm.metrics.lesion_overlap import count_lesion_voxels
from rectvlm.metrics.lesions import compare_lesion_masks
from rectvlm.models import RectVLM
from rectvlm.models.cues import add_examination
from rectvlm.models.report_decoding import ReportPrompt
from rectvlm.types import (
    OWN_OUTLINES,
    UNKNOWN_OUTLINES,
    Batch,
    MaskVolume,
    SampleMeta,
)


class CaseEvaluator:
    """Predicts groups of cases and compares them with the truth."""

    def __init__(
        self, model: RectVLM, options: EvaluationOptions, server: ReportServer | None = None
    ) -> None:
        """Evaluate with a model.

        Args:
            model: in eval mode, on its device.
            options: options of the evaluation.
            server: what writes the reports; by default the model.
        """
        self.model, self.options, self._server = model, options, server
        self._device = next(model.parameters()).device
        self._air_prompt: ReportPrompt | None = None

    def evaluate_group(self, group: CaseGroup, batches: Iterator[Batch]) -> list[CaseRecord]:
        """Evaluate a group of cases.

        Args:
            group: the cases.
            batches: their samples, on the CPU; as many are taken as the group has batches.

        Raises:
            UserError: The model's output is not finite, a file of outlines cannot be used, or the
                server gives no reports.
        """
        records: list[CaseRecord] = []
        prompts: dict[int, ReportPrompt] = {}
        control_prompts: dict[int, ReportPrompt] = {}
        for positions in group.batches:
            batch = next(batches)
            if self.options.hide_regions:
                hidden = torch.zeros_like(batch.regions_known)
                batch = replace(batch, regions_known=hidden)
            batch_records, batch_prompts = self._evaluate_batch(batch, positions, group.purpose)
            records += batch_records
            if batch_prompts is None:
                continue
            controls = self._make_control_prompts(batch)
            limit = self.options.report_limit
            for position, prompt, control in zip(positions, batch_prompts, controls, strict=True):
                if limit is None or position < limit:
                    prompts[position], control_prompts[position] = prompt, control
        return self._add_reports(records, prompts, control_prompts)

    def _evaluate_batch(
        self, batch: Batch, positions: Sequence[int], purpose: CasePurpose
    ) -> tuple[list[CaseRecord], list[ReportPrompt] | None]:
        """Records without reports, and the prompts of the reports.

        With any purpose but `evaluate`, lesions and reports are left out.
        """
        model, options = self.model, self.options
        is_evaluated = purpose == "evaluate"
        localize = is_evaluated and model.localizer is not None
        generate = is_evaluated and options.reports and model.has_generator
        limit = options.report_limit
        generate = generate and (limit is None or positions[0] < limit)
        prediction, prompts = model.predict_and_prompt(
            batch.to(self._device), generate=generate, localize=localize
        )
        prediction.require_finite(batch.keys)

        has_baselines = options.reports and model.has_generator
        probabilities = prediction.finding_probabilities.float().cpu().numpy()
        records = []
        for i, meta in enumerate(batch.metas):
            lesions: list[LesionRecord | None] = []
            if localize:
                lesion_probabilities = prediction.lesion_probabilities[i].float().cpu().numpy()
                lesions = _compare_lesions(
                    lesion_probabilities, batch.lesions[i].numpy(), meta, options
                )
            record = CaseRecord(
                purpose=purpose,
                position=positions[i],
                key=meta.key,
                scan=meta.scan,
                patient=meta.patient,
                probabilities=probabilities[i].tolist(),
                labels=[meta.labels[name] for name in FINDINGS],
                lesions=lesions,
                reference=batch.reports[i],
                generated=None,
                without_image=None,
                regions=meta.regions_source if batch.regions_known[i] else None,
                features=prediction.global_tokens[i].tolist() if has_baselines else None,
            )
            records.append(record)
        return records, prompts

    def _make_control_prompts(self, batch: Batch) -> list[ReportPrompt]:
        """Prompts of the same cases without their image.

        A volume of air looks the same in every case, so the model sees it once. Only what was known
        before the CT differs.
        """
        if self._air_prompt is None:
            first = _take_first_sample(batch)
            unknown = replace(batch.metas[0], indication=None, technique=None)
            first = replace(first, metas=[unknown]).to(self._device)
            _, air_prompts = self.model.predict_and_prompt(first, ablate_image=True)
            assert air_prompts is not None
            self._air_prompt = air_prompts[0]
        visual, cues = self._air_prompt
        return [ReportPrompt(visual, add_examination(cues, meta)) for meta in batch.metas]

    def _add_reports(
        self,
        records: list[CaseRecord],
        prompts: dict[int, ReportPrompt],
        control_prompts: dict[int, ReportPrompt],
    ) -> list[CaseRecord]:
        """Write the reports of a group and of its control, and add them to the records."""
        if not prompts:
            return records
        # Control prompts with the same cues are the same prompt.
        distinct_controls = {prompt.cues: prompt for prompt in control_prompts.values()}
        texts = self._write_reports([*prompts.values(), *distinct_controls.values()])
        generated = dict(zip(prompts, texts, strict=False))
        control_texts = dict(zip(distinct_controls, texts[len(prompts) :], strict=True))
        complete_records = []
        for record in records:
            position = record.position
            if position in prompts:
                control = control_texts[control_prompts[position].cues]
                record = replace(record, generated=generated[position], without_image=control)
            complete_records.append(record)
        return complete_records

    def _write_reports(self, prompts: Sequence[ReportPrompt]) -> list[str]:
        generator = self.model.generator
        assert generator is not None, "prompts come from a generator"
        if self._server is None:
            return generator.write_reports(prompts)
        return self._server.write_reports(
            generator.embed_prompts(prompts),
            generator.config.max_report_tokens,
            generator.language_model.generation_config.eos_token_id,
        )


def _take_first_sample(batch: Batch) -> Batch:
    """Batch of the first sample of a batch."""
    first = {}
    for batch_field in fields(batch):
        value = getattr(batch, batch_field.name)
        first[batch_field.name] = value if batch_field.name == "spacing" else value[:1]
    return replace(batch, **first)


def _compare_lesions(
    probabilities: NDArray[np.float32],
    truth: MaskVolume,
    meta: SampleMeta,
    options: EvaluationOptions,
) -> list[LesionRecord | None]:
    """Compare the annotated lesions of one case on the model's grid and on its native one."""
    records: list[LesionRecord | None] = [None] * len(LESIONS)
    annotated = [lesion for lesion in LESIONS if meta.lesions_annotated[lesion.key]]
    if not annotated:
        return records

    voxel_counts = count_lesion_voxels(probabilities >= LESION_THRESHOLD, truth)
    native = lesions_to_native_grid(probabilities, truth, meta, annotated, options.truth)
    for lesion in annotated:
        predicted_mask, true_mask = native.extract_masks(lesion)
        comparison = compare_lesion_masks(
            predicted_mask, true_mask, native.spacing_mm, options.surface_tolerance
        )
        both, predicted, true = (int(count) for count in voxel_counts[lesion.bit])
        place = native.truth_sources[lesion.key]
        source = meta.lesions_source[lesion.key] or UNKNOWN_OUTLINES
        if place == "file":
            source = OWN_OUTLINES
        records[lesion.bit] = LesionRecord(comparison, (both, predicted, true), place, source)
    return records
