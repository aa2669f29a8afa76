"""The whole model: encoder, classifier, localizer and report generator behind one forward.

Shapes: B samples, Z × Y × X voxels.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from peft import LoraConfig
from torch import Tensor, nn

from rectvlm.checkpoint.checkpoint import LANGUAGE_MODEL_PREFIX, Checkpoint, TrainingState
from rectvlm.checkpoint.export import ExportOptions, write_model
from rectvlm.checkpoint.hub import find_model_folder
from rectvlm.checkpoint.strict_load import check_tensors, load_tensors, named_tensors
from rectvlm.config import MODEL_PARTS, Config, ModelPart
from rectvlm.finding_thresholds import NOT_FITTED, FindingThresholds
from rectvlm.labels import AIR_HU, LESION_BY_KEY, LESIONS, N_LESIONS
from rectvlm.lesion_bits import pack_lesion, pack_lesions
from rectvlm.lesion_places import find_voxels_outside_chest
from rectvlm.machine import package_versions
from rectvlm.models.classifier import FindingClassifier
from rectvlm.models.cues import describe_batch_cues, draw_true_cues
from rectvlm.models.encoder import build_encoder
from rectvlm.models.language_model import LanguageModel, load_language_model, resolve_device
from rectvlm.models.localizer import LesionLocalizer, LocalizerOutput
from rectvlm.models.prompt_embeddings import PromptEmbeddings
from rectvlm.models.report_decoding import ReportPrompt
from rectvlm.models.report_generator import ReportGenerator, ReportLoss
from rectvlm.models.word_embeddings import load_word_embeddings
from rectvlm.pretrained import resolve_model
from rectvlm.types import Batch, BatchPrediction, UserError


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

    loaded_from: Checkpoint | None = None
    """Checkpoint that the weights were loaded from; None for a new model."""
    thresholds: FindingThresholds
    """Probabilities from which findings are called, and suggested in the report's prompt."""

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
        self.thresholds = NOT_FITTED
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

    @classmethod
    def from_pretrained(
        cls,
        reference: str | Path,
        device: torch.device | str | None = None,
        revision: str | None = None,
        *,
        parts: Sequence[ModelPart] | None = None,
        language_model: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | None = None,
    ) -> Self:
        """Load a model in eval mode.

        Args:
            reference: a checkpoint, a run's phase folder or an exported model, or a hub id.
            device: where to put the model, by default the GPU if there is one.
            revision: branch, tag or commit on the Hub.
            parts: parts to load, the encoder and the classifier among them; by default all.
            language_model: folder or hub id of the language model, by default the configured one.
            cache_dir: folder of the Hub's files, by default that of huggingface_hub.
            token: access token of the Hub, by default that of the login.

        Raises:
            UserError: there is no model or no access, the parts would answer differently alone, or
                the weights do not fit.
        """
        folder = find_model_folder(reference, revision, parts, cache_dir, token)
        return cls.from_checkpoint(Checkpoint.open(folder), device, parts, language_model)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        device: torch.device | str | None = None,
        parts: Sequence[ModelPart] | None = None,
        language_model: str | None = None,
        word_embeddings_only: bool = False,
    ) -> Self:
        """Load the model of an opened checkpoint in eval mode; see `from_pretrained`.

        With `word_embeddings_only` the language model lacks its layers and its adapter, which run
        elsewhere: the model can make prompts of reports, but write none.
        """
        if parts is None:  # all, unless only some were pulled
            parts = checkpoint.list_available_parts()
        _check_parts(parts, checkpoint)
        device = resolve_device(device)
        tensors = checkpoint.read_tensors(parts)
        prompts = PromptEmbeddings.from_tensors(tensors, checkpoint.folder)
        config = checkpoint.config
        language = None
        if "generator" in parts:
            folder = resolve_model(language_model or config.generator.model, checkpoint.folder)
            if word_embeddings_only:
                language = load_word_embeddings(folder, device)
                tensors = {name: tensors[name] for name in tensors if ".lora_" not in name}
            else:
                language = load_language_model(config.generator, folder, device)
        model = cls(config, parts, prompts, language)
        load_tensors(model, tensors, model.checkpoint_tensor_names(), checkpoint.folder)
        model.thresholds = checkpoint.read_thresholds()
        model.loaded_from = checkpoint
        return model.eval().to(device)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        training: TrainingState | None = None,
        **options: Any,
    ) -> Path:
        """Write the model into a folder that `from_pretrained` reads, and compare every bit of it.

        Args:
            folder: the folder to write.
            state_dict: gathered tensors by name, where ZeRO-3 has sharded the model's own.
            training: how far the model was trained, by default as when it was loaded.
            options: fields of `rectvlm.checkpoint.export.ExportOptions`.

        Returns:
            The folder.

        Raises:
            UserError: the folder exists, or tensors are missing, unexpected, sharded or of another
                shape.
        """
        names = self.checkpoint_tensor_names()
        tensors = self._own_tensors(names) if state_dict is None else dict(state_dict)
        check_tensors(self, tensors, names, Path("state_dict"))
        versions = package_versions() if self.loaded_from is None else self.loaded_from.versions
        if training is None and self.loaded_from is not None:
            training = self.loaded_from.training
        if training is None:
            # The phase is the one that trains these parts; how far is not known.
            training = TrainingState(len(self.parts) - 1, step=0, samples_seen=0, world_size=1)
        description = Checkpoint(Path(folder), self.parts, self.config, training, versions)
        options.setdefault("thresholds", self.thresholds)
        return write_model(tensors, description, self.lora_config(), ExportOptions(**options))

    def _own_tensors(self, names: Sequence[str]) -> dict[str, Tensor]:
        tensors = named_tensors(self)
        empty = [name for name in names if hasattr(tensors[name], "ds_id") or tensors[name].is_meta]
        if empty:
            raise UserError(
                f"{len(empty)} tensors of the model, such as {empty[0]}, are sharded or have no "
                "values: give gathered ones as `state_dict`, or export the run's checkpoint with "
                "`rectvlm export`."
            )
        return {name: tensors[name] for name in names}

    def checkpoint_tensor_names(self) -> list[str]:
        """Names of the tensors in a checkpoint.

        These are all parameters but the language model's own, with its adapter, and the buffers
        that no configuration gives back: the prompts and the encoder's atlas.
        """
        names = []
        for name, _ in self.named_parameters():
            if not name.startswith(LANGUAGE_MODEL_PREFIX) or ".lora_" in name:
                names.append(name)
        for part in ("prompts", "encoder"):
            names += [f"{part}.{name}" for name, _ in self.get_submodule(part).named_buffers()]
        return names

    def lora_config(self) -> LoraConfig | None:
        """Settings of the language model's adapter for a checkpoint; None without a generator."""
        if self.generator is None:
            return None
        lora: LoraConfig = copy.deepcopy(self.generator.language_model.peft_config["default"])
        lora.base_model_name_or_path = self.config.generator.model
        lora.inference_mode = True
        # PEFT keeps a set, whose order differs from run to run.
        lora.target_modules = sorted(lora.target_modules or ())
        return lora

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
        prediction, prompts = self.predict_and_prompt(batch, generate, ablate_image, localize)
        if prompts is not None and self.generator is not None:
            prediction.reports = self.generator.write_reports(prompts)
        return prediction

    @torch.no_grad()
    def predict_and_prompt(
        self, batch: Batch, generate: bool = True, ablate_image: bool = False, localize: bool = True
    ) -> tuple[BatchPrediction, list[ReportPrompt] | None]:
        """Predict as `predict_batch`, but leave the reports to a later call of the generator.

        `ReportGenerator.write_reports` is faster with the prompts of many batches at once.

        Returns:
            The prediction without reports, and the prompts of the reports, if they are asked for
            and possible.
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
                _empty_outside_chest(lesions, batch)

        findings = logits.sigmoid().float()
        prompts = None
        if generate and self.generator is not None:
            lesion_bits = _pack_lesion_bits(lesions, lambda probability: probability)
            thresholds = self.thresholds.values.tolist()
            cues = describe_batch_cues(batch, findings, thresholds, lesion_bits)
            prompts = self.generator.make_prompts(features, cues)
        prediction = BatchPrediction(findings, lesions, None, features.global_token.float())
        return prediction, prompts

    def _describe_training_cues(
        self, batch: Batch, logits: Tensor, localization: LocalizerOutput | None
    ) -> list[str]:
        """Cues from the truth for a share of the samples, from predictions for the rest.

        Truth alone would teach the language model to copy what it will not have; predictions alone
        are noise at first. What is unknown stays the model's prediction: a missing label, or a
        lesion that no one outlined, does not mean absent. In eval mode all cues are predictions,
        so that the loss of a validation measures what prediction will do.
        """
        assert localization is not None, (
            "the generator's prompt carries lesions: build the localizer with it"
        )
        findings = logits.detach().sigmoid().float()
        lesion_bits = _pack_lesion_bits(localization.mask_logits.detach(), torch.sigmoid)
        thresholds = self.thresholds.values.tolist()
        if self.training:
            settings = self.config.generator
            shows_truth = torch.rand(len(batch.keys)).to(findings.device)
            shows_truth = (shows_truth < settings.true_cue_share)[:, None]
            true_cues = draw_true_cues(
                batch.labels, findings.new_tensor(thresholds), settings.cue_noise
            )
            findings = torch.where(batch.labels_known & shows_truth, true_cues, findings)
            true_bits = pack_lesions(batch.lesions_annotated & shows_truth, axis=1)
            true_bits = true_bits[:, None, None, None]
            lesion_bits = batch.lesions & true_bits | lesion_bits & ~true_bits
        return describe_batch_cues(batch, findings, thresholds, lesion_bits)


def load_part(
    reference: str | Path,
    part: ModelPart,
    device: torch.device | str | None = None,
    revision: str | None = None,
) -> nn.Module:
    """Load one part alone, such as the encoder, as a plain module in eval mode.

    Args:
        reference: a checkpoint, a run's phase folder or an exported model, or a hub id.
        part: the part to load.
        device: where to put it, by default the GPU if there is one.
        revision: branch, tag or commit on the Hub.

    Raises:
        UserError: there is no model, it lacks the part, or the weights do not fit.
    """
    checkpoint = Checkpoint.open(find_model_folder(reference, revision, [part]))
    tensors = checkpoint.read_tensors([part])
    prompts = PromptEmbeddings.from_tensors(tensors, checkpoint.folder)
    device = resolve_device(device)
    language = None
    if part == "generator":
        generator = checkpoint.config.generator
        folder = resolve_model(generator.model, checkpoint.folder)
        language = load_language_model(generator, folder, device)
    built_parts = [name for name in MODEL_PARTS if name in ("encoder", "classifier", part)]
    model = RectVLM(checkpoint.config, built_parts, prompts, language)
    expected = []
    for name in model.checkpoint_tensor_names():
        if name.partition(".")[0] in (part, "prompts"):
            expected.append(name)
    load_tensors(model, tensors, expected, checkpoint.folder)
    return model.get_submodule(part).eval().to(device)


def _check_parts(parts: Sequence[ModelPart], checkpoint: Checkpoint) -> None:
    """Stop at parts that make no model, or one that would answer differently from the whole."""
    checkpoint.require_parts(parts)
    if not {"encoder", "classifier"} <= set(parts):
        raise UserError(
            f"parts {tuple(parts)} make no model: the encoder and the classifier belong to every "
            "one; rectvlm.models.load_part loads one part alone."
        )
    if "generator" in parts and "localizer" not in parts:
        raise UserError(
            "parts with the generator need the localizer too: its prompt carries the lesions."
        )
    leaves_out_localizer = "localizer" in checkpoint.parts and "localizer" not in parts
    if leaves_out_localizer and checkpoint.config.localizer.volumes_to_findings:
        raise UserError(
            f"The localizer of {checkpoint.folder} is a summand of its findings "
            "(localizer.volumes_to_findings), so without it the classifier would answer "
            "differently: add the localizer to parts."
        )


def _add_localizer_logits(finding_logits: Tensor, localization: LocalizerOutput) -> Tensor:
    if localization.finding_logits is None:
        return finding_logits
    return finding_logits + localization.finding_logits


def _empty_outside_chest(lesions: Tensor, batch: Batch) -> None:
    """Set probabilities (B, 5, Z, Y, X) of outlined voxels that no lesion can reach to 0."""
    lesion_bits = _pack_lesion_bits(lesions, lambda probability: probability).cpu().numpy()
    for probabilities, bits, ct in zip(lesions, lesion_bits, batch.ct, strict=True):
        hu = ct.round().to(torch.int16).cpu().numpy()
        for key, voxels in find_voxels_outside_chest(bits, hu, batch.spacing).items():
            probabilities[LESION_BY_KEY[key].bit].view(-1)[torch.from_numpy(voxels)] = 0


def _pack_lesion_bits(masks: Tensor, to_probability: Callable[[Tensor], Tensor]) -> Tensor:
    """Lesion bits (B, Z, Y, X) of masks (B, 5, Z, Y, X) at a probability of 0.5.

    One lesion at a time: at full size, float copies of all are a GB.
    """
    bits = torch.zeros_like(masks[:, 0], dtype=torch.uint8)
    for lesion in LESIONS:
        bits |= pack_lesion(to_probability(masks[:, lesion.bit]) >= 0.5, lesion)
    return bits
