"""The configuration of a run: one tree of validated values, read from a YAML file.

`load_config("demo", ["train.phases.phase1.samples=10"])` reads `rectvlm/configs/demo.yaml`, or the
YAML file at any path, and changes single values with `part.field=value`. A file names every value,
so that what runs is what can be read. A missing key, an unknown key and a wrong type are errors
that name the key.
"""

import difflib
import os
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from rectvlm.types import UserError

CONFIG_FOLDER = Path(__file__).parent / "configs"

ModelPart = Literal["encoder", "classifier", "localizer", "generator"]
MODEL_PARTS: tuple[ModelPart, ...] = typing.get_args(ModelPart)
PhaseKey = Literal["phase1", "phase2-localize", "phase2-labels", "phase2", "phase3-align", "phase3"]
"""Rows of the table in `rectvlm.train.phases`: three phases, and stages of the last two."""
ValidationMetric = Literal[
    "macro_auroc",
    "macro_average_precision",
    "mean_dice",
    "clinical_f1",
    "loss",
    "loss_classification",
    "loss_localization",
    "loss_report",
]
"""Metrics of the validation during training. A loss is better when it is smaller, any other metric
when it is larger."""
TrackerName = Literal["wandb", "tensorboard"]

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFraction = Annotated[float, Field(gt=0, le=1)]
ProperFraction = Annotated[float, Field(ge=0, lt=1)]

ELASTIC_LATTICE_MM = 60.0
"""Distance between the control points of the elastic augmentation, mm."""
MAX_NAME_BYTES = 200
"""Largest length of a run's name; file systems allow 255 bytes for a name and what is added."""
NORM_GROUPS = 4
"""Groups of each group norm in the localizer, in levels that have at least as many channels."""


def _check_run_name(name: str) -> str:
    """Return a run's name if it can be that of one folder in the folder of runs.

    Raises:
        ValueError: it is empty or too long, would lead elsewhere, or begins like a hidden file or
            an option.
    """
    is_plain = name.isprintable() and name == name.strip()
    if not is_plain or not name or name[0] in ".-" or "/" in name or "\\" in name:
        raise ValueError(
            "a run's name is one folder's name: expected printable characters without / and \\, "
            "no '.', '-' or space first (train.runs says where the folder lies)"
        )
    if len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(f"a run's name has at most {MAX_NAME_BYTES} bytes")
    return name


def _expand_user_path(path: str) -> str:
    """Return a path with its `~` replaced.

    Raises:
        ValueError: it is empty, or no system takes it.
    """
    if not path or "\0" in path:
        raise ValueError("expected a path")
    return os.path.expanduser(path)


UserPath = Annotated[str, AfterValidator(_expand_user_path)]


def _check_checkpointing(value: object) -> object:
    """Return a value of `Checkpointing`; a union's own message would name each of its types."""
    if isinstance(value, bool) or value == "auto":
        return value
    raise ValueError("expected true, false or auto")


Checkpointing = Annotated[bool | Literal["auto"], BeforeValidator(_check_checkpointing)]
"""Whether a part recomputes its activations in the backward pass. `auto` lets the planner decide
when a phase starts (`rectvlm.plan.auto_settings`), and counts as true where it has not decided."""


class _ConfigSection(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=False,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


class AugmentConfig(_ConfigSection):
    """Random changes of a training batch, on the device. Each is the exact identity at 0."""

    probability: Fraction
    """Share of samples that are changed at all."""
    rotate: float
    """Largest rotation about the body's long axis, degrees."""
    tilt: float
    """Largest rotation about each of the two other axes, degrees."""
    scale: Fraction
    """Largest relative change of size."""
    shift: Fraction
    """Largest shift, as a share of each side of the grid."""
    elastic: Annotated[float, Field(ge=0, le=0.4 * ELASTIC_LATTICE_MM)]
    """Largest move of a control point of the elastic deformation along each axis, mm. Above 0.4 of
    the distance between control points the tissue could fold (Choi and Lee, 2000)."""
    contrast: Fraction
    """Largest relative change of HU above 0, the effect of tube voltage and contrast medium. Air
    and water are calibrated, so they stay."""
    intensity: float
    """Largest offset of the HU scale, HU."""
    noise: float
    """Largest standard deviation of the added noise, HU."""
    mirror: Fraction
    """Share of the changed samples that are mirrored left to right, with their text and region
    ids, where this is safe. `rectvlm.data.mirror` says why every size leaves it at 0."""
    hide_regions: Fraction
    """Share of samples whose region map is hidden, since a new CT comes without one."""


class DataConfig(_ConfigSection):
    """The shards and the grid of their volumes."""

    shards: UserPath
    """Folder or URL of the shards, with `index.json`."""
    grid: tuple[PositiveInt, PositiveInt, PositiveInt]
    """Voxels (z, y, x) of a volume."""
    spacing: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    """Voxel size (z, y, x), mm."""
    windows: Annotated[tuple[Literal["lung", "mediastinal", "bone"], ...], Field(min_length=1)]
    """CT windows, each an input channel."""
    workers: NonNegativeInt
    """Loader processes of a rank."""
    augment: AugmentConfig


class EncoderConfig(_ConfigSection):
    """The 3D image encoder, which all other parts read."""

    name: str
    """Name of the encoder in `rectvlm.models.encoder.ENCODERS`."""
    patch: tuple[PositiveInt, PositiveInt, PositiveInt]
    """Voxels (z, y, x) of a patch."""
    width: PositiveInt
    """Channels of every feature."""
    depth: PositiveInt
    """Number of blocks."""
    heads: PositiveInt
    """Attention heads of a block."""
    volume_every: PositiveInt
    """One block in so many attends over the whole volume, the others within their slice; 1: all
    blocks do. Other encoders than `slice-region` ignore it."""
    mlp_ratio: PositiveFloat
    """Width of a block's MLP, relative to `width`."""
    tap_blocks: tuple[PositiveInt, ...]
    """Blocks, counted from 1, whose patches the localizer reads beside those of the last block."""
    activation_checkpointing: Checkpointing
    """Whether each block is recomputed in the backward pass; `auto` leaves it to the planner."""
    atlas_cases: NonNegativeInt
    """Training cases whose mean CT is subtracted from every CT before it is cut into patches; 0
    subtracts nothing. Where patients lie alike, the difference is what tells them apart, and
    learning begins there."""
    init: str | None
    """Published weights that the encoder of phase 1 starts from: safetensors file, folder, or hub
    id; null starts at random. `slice-region` takes a 2D ViT. It then has positions of a plane and
    attention gates, so the value stays in the configuration of later phases."""

    @model_validator(mode="after")
    def _check_slices_meet(self) -> "EncoderConfig":
        if self.name == "slice-region" and self.volume_every > self.depth:
            raise ValueError(
                f"volume_every is {self.volume_every} and depth {self.depth}: no block would "
                f"attend over the volume; volume_every must be at most {self.depth}"
            )
        return self

    @model_validator(mode="after")
    def _check_init_sees_images(self) -> "EncoderConfig":
        if self.init is not None and self.atlas_cases:
            raise ValueError(
                f"init is {self.init!r} and atlas_cases {self.atlas_cases}: published weights read "
                "CTs, not differences from an atlas; set init to null or atlas_cases to 0"
            )
        return self


class TextConfig(_ConfigSection):
    """The frozen text encoder that embeds the prompts."""

    model: str
    """Folder, hub id, or `bundled:NAME` (see `rectvlm.pretrained`)."""
    max_tokens: PositiveInt
    """Tokens at which a prompt is cut."""


class ClassifierConfig(_ConfigSection):
    """The text-prompt classifier."""

    width: PositiveInt
    """Channels of the space that image and text share."""


class LocalizerConfig(_ConfigSection):
    """The localizer: lesion prompts, denoising transformer, U-Net."""

    width: PositiveInt
    """Channels of the denoising transformer."""
    depth: PositiveInt
    """Blocks of the denoising transformer."""
    heads: PositiveInt
    """Attention heads of a block of the denoising transformer."""
    noise: NonNegativeFloat
    """Largest standard deviation of the noise on patch features in training, relative to that of
    the features."""
    channels: tuple[PositiveInt, ...]
    """Channels of each level of the U-Net, full resolution first."""
    activation_checkpointing: Checkpointing
    """Whether blocks and levels are recomputed in the backward pass."""
    volumes_to_findings: bool
    """Whether a learned function of the masks' volumes is added to the classifier's finding logits.
    Findings then wait for the masks, and their loss reaches every voxel that is marked wrongly."""


class GeneratorConfig(_ConfigSection):
    """The report generator: resampler and language model with LoRA."""

    model: str
    """Language model: folder, hub id, or `bundled:NAME`."""
    quantization: Literal["nf4", "none"]
    """Packing of the frozen weights of the language model: nf4 takes 4 bits a weight."""
    quant_storage: Literal["bfloat16", "uint8"]
    """Dtype in which packed 4-bit weights are stored. float16 corrupts them silently under a bf16
    engine, so it is not a choice."""
    double_quantization: bool
    """Whether the scales of the 4-bit weights are quantized too."""
    queries: PositiveInt
    """Visual tokens that the language model reads."""
    width: PositiveInt
    """Channels of the resampler."""
    depth: PositiveInt
    """Blocks of the resampler."""
    heads: PositiveInt
    """Attention heads of a block of the resampler."""
    lora_rank: PositiveInt
    """Rank of the LoRA adapters."""
    lora_alpha: PositiveInt
    """Scale of the LoRA adapters, times `lora_rank`."""
    lora_dropout: Fraction
    """Dropout before the LoRA adapters."""
    lora_targets: Literal["attention", "all-linear"]
    """Linear layers of the language model that get LoRA adapters."""
    max_report_tokens: PositiveInt
    """Tokens at which a report is cut, in training and when it is written. The end token counts; a
    report that is cut for training has none."""
    loss_chunk: PositiveInt
    """Report positions of a micro-batch whose logits exist at the same time. The loss is the same
    for any value."""
    true_cue_share: Fraction
    """Share of training samples whose prompt carries the true findings and lesions instead of the
    predicted ones."""
    cue_noise: NonNegativeFloat
    """Standard deviation of the log-odds that a true finding gets in a training prompt, around 3
    above or below its threshold. 0 grades all as certain, 1 varies the grades, 4 has the errors of
    a classifier with an AUROC of 0.86."""
    activation_checkpointing: Checkpointing
    """Whether each layer of the language model is recomputed in the backward pass."""


class UnfreezeConfig(_ConfigSection):
    """A part, or the end of the encoder, that begins to train late."""

    part: ModelPart
    """Part that starts late. Those of its parameters that no entry covers stay frozen."""
    last_blocks: PositiveInt | None
    """Number of the encoder's last blocks that train, with the layers that follow them; null is the
    whole part."""
    start: ProperFraction
    """Share of the phase after which the part begins to train. Its learning rate then has a warm-up
    of its own, as long as that of the phase."""


class ValidationConfig(_ConfigSection):
    """Validation while a phase trains."""

    every: Fraction
    """Share of the phase between validations; there is one after the last step too. 0 never
    validates."""
    cases: PositiveInt
    """Largest number of cases of the dev split, or of valid where there is no dev, spread evenly
    over it and over the ranks."""
    shown_cases: NonNegativeInt
    """Cases of the first rank that are drawn with outlines and, where the model has a generator,
    get a written report. Each token costs a pass through the language model on all ranks."""
    report_cases: NonNegativeInt
    """Largest number of cases of the split that get a written report for `clinical_f1`, spread
    evenly over it. Reports are written in batches of `micro_batch`, at the cost of those of
    `shown_cases`; a model without a generator writes none."""
    best_metric: ValidationMetric
    """Metric that decides which checkpoint is the best one, which is kept beside the newest."""
    patience: NonNegativeInt
    """Validations in a row without a better value after which the phase ends early; 0 never ends
    it."""

    @model_validator(mode="after")
    def _check_reports_are_written(self) -> "ValidationConfig":
        if self.every and self.best_metric == "clinical_f1" and not self.report_cases:
            raise ValueError(
                "best_metric clinical_f1 is measured on written reports, so report_cases must be "
                "at least 1, not 0"
            )
        return self


class PhaseConfig(_ConfigSection):
    """Length, batch size and learning rates of one phase, or of a stage of one. What happens on the
    way is placed by shares of the phase, so that it does not depend on the number of ranks."""

    samples: PositiveInt
    """Samples that all ranks see together. More ranks see them in less time."""
    epochs: NonNegativeFloat
    """Passes over the training split, by its number of cases without repeats. Above 0 they decide
    the length, not `samples`."""
    repeat_threshold: Fraction
    """Share of the cases below which a lesion counts as rarely outlined. One that a share f of them
    has outlined repeats its cases sqrt(repeat_threshold / f) times within a pass; 0 repeats none.
    """
    global_batch: PositiveInt
    """Samples of an optimizer step, of all ranks together. Ranks that do not divide it take the
    next larger number that they can share."""
    lr_batch: PositiveInt
    """Global batch that `lr` is meant for. Another one multiplies all learning rates with
    sqrt(global_batch / lr_batch), the rule of adaptive optimizers."""
    micro_batch: PositiveInt
    """Largest number of samples of a rank in one forward pass. Gradients are accumulated where a
    rank's share of a step is larger. Where a part's `activation_checkpointing` is `auto`, the
    planner may take fewer; the samples of a step stay the same."""
    schedule: Literal["cosine", "linear", "constant"]
    """Learning rate after the warm-up: down to `final_lr_ratio` along a cosine or a line, or
    constant."""
    warmup: ProperFraction
    """Share of the phase with a linear warm-up."""
    final_lr_ratio: Fraction
    """Last learning rate, as a share of the peak."""
    ema_decay: ProperFraction
    """Decay of the exponential moving average of the trained weights, for steps of `lr_batch`
    samples; 0 keeps none. Where there is one, a checkpoint's weights are the average: it is
    validated, evaluated and exported, and the next phase starts from it."""
    save_every: PositiveFraction
    """Share of the phase between checkpoints. The last step is always saved."""
    lr: dict[ModelPart, NonNegativeFloat]
    """Peak learning rate of each part that trains."""
    unfreeze: tuple[UnfreezeConfig, ...]
    """Parts that begin to train late. All others train from the first step."""
    validation: ValidationConfig

    @model_validator(mode="after")
    def _check_late_parts(self) -> "PhaseConfig":
        for entry in self.unfreeze:
            if entry.start + self.warmup > 1:
                raise ValueError(
                    f"unfreeze starts {entry.part} after {entry.start:g} of the phase, so its "
                    f"warm-up of {self.warmup:g} does not fit: start it earlier, or shorten warmup"
                )
            if entry.part not in self.lr:
                raise ValueError(f"unfreeze names {entry.part}, which has no learning rate in lr")
            if entry.last_blocks is not None and entry.part != "encoder":
                raise ValueError(
                    f"unfreeze.last_blocks is for the encoder, so it must be null for {entry.part}"
                )
        return self


class LossWeightsConfig(_ConfigSection):
    """Weight of each task's loss in the total."""

    classification: NonNegativeFloat
    """Weight of the loss of the findings."""
    localization: NonNegativeFloat
    """Weight of the loss of the lesion masks."""
    report: NonNegativeFloat
    """Weight of the loss of the report's tokens."""


class LocalizationLossWeightsConfig(_ConfigSection):
    """Weights of the terms of the localization loss. The overlap with the outlines at full
    resolution has weight 1; a term of weight 0 changes nothing."""

    volume: NonNegativeFloat
    """Weight of the volume that is drawn where a lesion is absent, or not drawn where it is present
    but not outlined, relative to the overlap."""
    half_resolution: NonNegativeFloat
    """Weight of overlap and volume at half resolution."""
    patch_resolution: NonNegativeFloat
    """Weight of overlap and volume of the patches that hold a lesion."""
    denoising: NonNegativeFloat
    """Weight of the squared error of the denoised patch features."""
    consistency: NonNegativeFloat
    """Weight of the squared differences between the predictions at the three resolutions."""
    alignment: NonNegativeFloat
    """Weight of the cross-entropy of the match of image and lesion prompt, also for lesions that
    are known only from a label."""


class TrainingLimitsConfig(_ConfigSection):
    """Limits of a normal training step. All ranks together skip a step whose loss or gradient
    exceeds them: weights and optimizer stay as they are, and its samples count as seen."""

    max_loss: PositiveFloat
    """Largest absolute loss of a micro-batch."""
    max_gradient_norm: PositiveFloat
    """Largest norm of all gradients together, before clipping."""
    max_bad_steps: PositiveInt
    """Skipped steps in a row that end the run."""
    timeout_minutes: PositiveFloat
    """Time that a rank may need for one step, one checkpoint or one case of a validation before it
    counts as hung, minutes."""


class TrainConfig(_ConfigSection):
    """Settings that all phases share, and the phases."""

    runs: UserPath
    """Folder of all runs. Phase N writes to `RUNS/NAME/phaseN`, a stage to
    `RUNS/NAME/phaseN-STAGE`."""
    seed: int
    """Seed of the initial weights, of the order of the samples and of augmentation."""
    weight_decay: NonNegativeFloat
    """AdamW's weight decay of the weights of linear and convolution layers; all else has none."""
    betas: tuple[Fraction, Fraction]
    """AdamW's decay rates of the means of gradients and of their squares."""
    gradient_clipping: PositiveFloat
    """Norm of all gradients together to which larger gradients are clipped."""
    loss_weights: LossWeightsConfig
    weighting: Literal["fixed", "uncertainty"]
    """Whether `loss_weights` hold throughout, or learned weights begin there (see
    `rectvlm.train.uncertainty_weighting`)."""
    weighting_lr: PositiveFloat
    """Peak learning rate of the learned weights."""
    localization_loss_weights: LocalizationLossWeightsConfig
    limits: TrainingLimitsConfig
    keep_checkpoints: PositiveInt
    """Number of newest checkpoints that are kept, beside the best one."""
    trackers: tuple[TrackerName, ...]
    """Services that every step is logged to. Where the environment variable `RECTVLM_TRACKERS` is
    set, it decides instead."""
    phases: dict[PhaseKey, PhaseConfig]


class Config(_ConfigSection):
    """Every value that decides a run."""

    name: Annotated[str, AfterValidator(_check_run_name)]
    """Name of the run, and of its folder."""
    data: DataConfig
    encoder: EncoderConfig
    text: TextConfig
    classifier: ClassifierConfig
    localizer: LocalizerConfig
    generator: GeneratorConfig
    train: TrainConfig

    @model_validator(mode="after")
    def _check_patches_tile_grid(self) -> "Config":
        grid, patch = self.data.grid, self.encoder.patch
        if any(voxels % side for voxels, side in zip(grid, patch, strict=True)):
            raise ValueError(f"encoder.patch {patch} does not tile data.grid {grid}")
        return self

    @model_validator(mode="after")
    def _check_heads_divide_width(self) -> "Config":
        for name in ("encoder", "localizer", "generator"):
            part = getattr(self, name)
            if part.width % part.heads:
                raise ValueError(
                    f"{name}.width {part.width} is not a multiple of {name}.heads {part.heads}"
                )
        return self

    @model_validator(mode="after")
    def _check_tap_blocks(self) -> "Config":
        taps, depth = self.encoder.tap_blocks, self.encoder.depth
        if list(taps) != sorted(set(taps)) or (taps and taps[-1] >= depth):
            raise ValueError(
                f"encoder.tap_blocks {taps} must rise and stay below encoder.depth {depth}"
            )
        return self

    @model_validator(mode="after")
    def _check_unet_levels(self) -> "Config":
        patch, channels = self.encoder.patch, self.localizer.channels
        if any(side & (side - 1) for side in patch):
            raise ValueError(f"encoder.patch {patch} is not made of powers of 2")

        levels = max(patch).bit_length() - 1
        if levels < 2 or len(channels) != levels:
            raise ValueError(
                f"localizer.channels {channels} must have one entry a level: encoder.patch "
                f"{patch} makes {levels}, and 2 are the least"
            )
        for count in channels:
            if count > NORM_GROUPS and count % NORM_GROUPS:
                raise ValueError(
                    f"localizer.channels: {count} is neither up to {NORM_GROUPS} nor a multiple "
                    "(group norm)"
                )
        return self

    def to_yaml(self) -> str:
        """The whole tree as YAML, in the order of the fields."""
        tree = self.model_dump(mode="json")
        return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=120)


def phase_key(number: int, stage: str | None = None) -> PhaseKey:
    """Name of a phase's section of the configuration, and of its run's folder.

    Args:
        number: 1, 2 or 3.
        stage: stage of the phase; None is the phase itself.
    """
    key = f"phase{number}" + (f"-{stage}" if stage else "")
    assert key in typing.get_args(PhaseKey), key
    return typing.cast(PhaseKey, key)


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration by name or path and apply overrides.

    Args:
        source: `tiny`, `demo`, … (a file of `rectvlm/configs`), or the path of a YAML file.
        overrides: `part.field=value`; the value is read as YAML.

    Raises:
        UserError: no such file, a missing key, an unknown key (with the nearest valid one), or a
            value of the wrong type.
    """
    path = Path(source)
    if not path.suffix:
        path = CONFIG_FOLDER / f"{source}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in CONFIG_FOLDER.glob("*.yaml")))
        raise UserError(
            f"No configuration {str(source)!r}: give one of {known}, or the path of a YAML file."
        )
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}".replace("\n", " ")) from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a tree of settings, but holds {type(tree).__name__}.")
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, where=str(path))


def parse_config(tree: dict[str, Any], where: str) -> Config:
    """Validate a tree of plain values.

    Args:
        tree: sections and values, as YAML or JSON holds them.
        where: origin of the tree, for the message.

    Raises:
        UserError: a value is missing, unknown or of the wrong type; the message names every fault.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        faults = "; ".join(map(_explain_fault, error.errors()))
        raise UserError(f"Configuration {where}: {faults}.") from error


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    if not separator:
        raise UserError(f"Override {override!r} is not of the form part.field=value.")

    keys = dotted.split(".")
    section: Any = tree
    for depth, key in enumerate(keys, start=1):
        if key not in section or (depth < len(keys) and not isinstance(section[key], dict)):
            fault = _describe_unknown_key(keys[:depth], section)
            raise UserError(f"Override {override!r}: {fault}.")
        if depth < len(keys):
            section = section[key]
    try:
        section[keys[-1]] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"Override {override!r}: {text!r} is not a YAML value.") from error


def _describe_unknown_key(path: Sequence[str | int], siblings: Iterable[Any]) -> str:
    names = [str(name) for name in siblings]
    near = difflib.get_close_matches(str(path[-1]), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}" if near else f"valid here: {', '.join(names)}"
    return f"unknown key {_join_path(path)!r}, {hint}"


def _explain_fault(fault: ErrorDetails) -> str:
    location, message = fault["loc"], fault["msg"].removeprefix("Value error, ")
    path = [key for key in location if key != "[key]"]
    if fault["type"] == "extra_forbidden":
        return _describe_unknown_key(path, _find_section(path[:-1]).model_fields)
    if fault["type"] == "missing":
        return f"missing key {_join_path(path)!r}"
    if "[key]" in location:
        return f"unknown key {_join_path(path)!r}, {message.lower()}"
    message = message[0].lower() + message[1:]
    return f"{_join_path(path)} = {fault['input']!r}: {message}" if path else message


def _join_path(path: Sequence[str | int]) -> str:
    return ".".join(map(str, path))


def _find_section(path: Sequence[str | int]) -> type[BaseModel]:
    section: Any = Config
    for key in path:
        container = typing.get_origin(section)
        if container in (dict, tuple):
            section = typing.get_args(section)[container is dict]
        else:
            section = section.model_fields[key].annotation
        assert not isinstance(section, types.UnionType)
    return section
