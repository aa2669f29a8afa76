"""The configuration: one tree of validated values, read from a YAML file and changed with `part.field=value`.

`load("demo", ["train.phases.phase1.steps=10"])` reads `rectvlm/configs/demo.yaml` (or any path to a YAML file). A file must
name every value, so that what runs is what can be read; an unknown key or a wrong type is an error that names it. Some
fields of the training came later: they have a default, which is what training did before them, so that the
configuration of an older checkpoint reads. The files of `rectvlm/configs` name these too.
"""

import difflib
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rectvlm.types import UserError

CONFIG_FOLDER = Path(__file__).parent / "configs"

ModelPart = Literal["encoder", "classifier", "localizer", "generator"]
MODEL_PARTS: tuple[ModelPart, ...] = typing.get_args(ModelPart)
PhaseKey = Literal["phase1", "phase2-localize", "phase2", "phase3-align", "phase3"]
"""Rows of `rectvlm.train.phases`: the three phases, and the sub-steps of the second and of the third."""
ValidationMetric = Literal[
    "macro_auroc",
    "macro_average_precision",
    "mean_dice",
    "loss",
    "loss_classification",
    "loss_localization",
    "loss_report",
]
"""What validation during training measures; a loss is better when it is smaller, anything else when it is larger."""
PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0)]


ELASTIC_LATTICE_MM = 60.0
"""Distance of the control points of the elastic augmentation."""
NORM_GROUPS = 4
"""Groups of the localizer's group norms, where a level has so many channels."""


class _ConfigSection(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=False,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


class AugmentConfig(_ConfigSection):
    """Random changes of a training batch, on the device. All are exact identities at 0."""

    probability: Fraction
    """Share of samples that are changed at all."""
    rotate: float
    """Largest rotation about the body's long axis, degrees."""
    tilt: float
    """Largest rotation about each of the other two axes, degrees."""
    scale: Fraction
    """Largest relative change of size."""
    shift: Fraction
    """Largest shift, as a share of each side of the grid."""
    elastic: Annotated[float, Field(ge=0, le=0.4 * ELASTIC_LATTICE_MM)]
    """Largest move of a control point of the elastic deformation along each axis, mm. Above 0.4 of their distance the
    tissue could fold (Choi and Lee, 2000)."""
    contrast: Fraction
    """Largest relative change of HU above 0, as tube voltage and contrast medium make it; air and water are calibrated
    and stay."""
    intensity: float
    """Largest offset of the HU scale, HU."""
    noise: float
    """Largest standard deviation of added noise, HU."""
    mirror: Fraction
    """Share of the changed samples that are mirrored left for right, with their text and region ids, where that is
    safe: see `rectvlm.data.mirror` for what it teaches, and why it is 0 by default."""
    hide_regions: Fraction
    """Share of samples whose region map is hidden: a new CT comes without one."""


class DataConfig(_ConfigSection):
    """Shards and the grid that they hold."""

    shards: str
    """Folder of the shards, with `index.json`."""
    grid: tuple[PositiveInt, PositiveInt, PositiveInt]
    """Voxels (z, y, x)."""
    spacing: tuple[PositiveFloat, PositiveFloat, PositiveFloat]
    """Voxel size (z, y, x), mm."""
    windows: Annotated[tuple[Literal["lung", "mediastinal", "bone"], ...], Field(min_length=1)]
    """One input channel a window."""
    workers: Annotated[int, Field(ge=0)]
    """Loader processes a rank."""
    augment: AugmentConfig


class EncoderConfig(_ConfigSection):
    """The 3D encoder that all heads share."""

    patch: tuple[PositiveInt, PositiveInt, PositiveInt]
    """Voxels of a patch (z, y, x)."""
    width: PositiveInt
    depth: PositiveInt
    heads: PositiveInt
    mlp_ratio: PositiveFloat
    tap_blocks: tuple[PositiveInt, ...]
    """Blocks, counted from 1, whose patches the localizer reads beside those of the last."""
    activation_checkpointing: bool
    """Recompute each block in the backward pass."""
    atlas_cases: Annotated[int, Field(ge=0)] = 0
    """Training cases whose mean is taken from every CT before it is cut into patches; 0 takes nothing away. Of patients
    who lie alike, what is left is what they do not share, and learning begins there."""


class TextConfig(_ConfigSection):
    """The frozen text encoder that turns prompts into embeddings."""

    model: str
    """A folder, a hub id, or `bundled:NAME` (see `rectvlm.pretrained`)."""
    max_tokens: PositiveInt


class ClassifierConfig(_ConfigSection):
    """The text-prompt classifier."""

    width: PositiveInt
    """Size of the space that image and text share."""


class LocalizerConfig(_ConfigSection):
    """The three-stage localizer."""

    width: PositiveInt
    """Width of the denoising transformer."""
    depth: PositiveInt
    heads: PositiveInt
    noise: Annotated[float, Field(ge=0)]
    """Largest standard deviation of the noise put on patch features in training, relative to their own."""
    channels: tuple[PositiveInt, ...]
    """Channels of the U-Net, full resolution first."""
    activation_checkpointing: bool
    volumes_to_findings: bool = False
    """Whether the volumes of the masks speak for the findings that they imply, beside the classifier. Findings then
    wait for the masks, and their loss reaches every voxel that is wrongly marked."""


class GeneratorConfig(_ConfigSection):
    """The report generator."""

    model: str
    """Language model: a folder, a hub id, or `bundled:NAME`."""
    quantization: Literal["nf4", "none"]
    quant_storage: Literal["bfloat16", "uint8"]
    """How packed 4-bit weights are stored. float16 corrupts silently under a bf16 engine, so it is not a choice."""
    double_quantization: bool
    queries: PositiveInt
    """Visual tokens that the language model sees."""
    width: PositiveInt
    """Width of the resampler."""
    depth: PositiveInt
    heads: PositiveInt
    lora_rank: PositiveInt
    lora_alpha: PositiveInt
    lora_dropout: Fraction
    lora_targets: Literal["attention", "all-linear"]
    max_report_tokens: PositiveInt
    loss_chunk: PositiveInt
    """Report positions of a micro-batch whose logits exist at once; the loss is the same for any value."""
    true_cue_share: Fraction
    """Share of training samples whose prompt carries the true findings and lesions instead of the predicted ones."""
    activation_checkpointing: bool


class UnfreezeConfig(_ConfigSection):
    """When a part, or the end of it, begins to train."""

    part: ModelPart
    """One that has a learning rate. What no row of a part covers stays frozen."""
    last_blocks: PositiveInt | None
    """The last blocks of the encoder, with what follows them; null is the whole part."""
    step: Annotated[int, Field(ge=0)]
    """Optimizer steps before it begins; its rate then rises over `warmup` steps."""


class ValidationConfig(_ConfigSection):
    """Validation while a phase trains."""

    every: Annotated[int, Field(ge=0)]
    """Optimizer steps between validations, and one after the last step; 0 never validates."""
    cases: PositiveInt
    """Most cases of the valid split, spread evenly over it and over the ranks."""
    shown_cases: Annotated[int, Field(ge=0)]
    """Cases of the first rank that are shown with outlines and, where a generator exists, with a written report. Every
    token that is written costs a pass through the language model, by all ranks."""
    best_metric: ValidationMetric
    """The metric that decides which checkpoint is the best; it is kept beside the newest."""
    patience: Annotated[int, Field(ge=0)]
    """Validations without a better value after which the phase ends early; 0 never ends it."""


class PhaseConfig(_ConfigSection):
    """How long and how fast one phase, or a sub-step of one, trains."""

    steps: PositiveInt
    """Optimizer steps."""
    epochs: Annotated[float, Field(ge=0)] = 0.0
    """Passes over the training split; above 0 they decide the steps, whatever `steps` says."""
    micro_batch: PositiveInt
    """Samples a rank takes at once."""
    accumulation: PositiveInt
    """Micro-batches a step."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate goes on after the warm-up: down to `final_lr_ratio` along a cosine or a line, or as it is."""
    warmup: Annotated[int, Field(ge=0)]
    """Steps of linear warm-up."""
    final_lr_ratio: Fraction
    """Last learning rate, as a share of the peak."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the moving average of the weights that train; 0 keeps none. Where there is one, a checkpoint's weights
    are the average: it is what is validated, evaluated, exported, and what the next phase starts from."""
    save_every: PositiveInt
    """Steps between checkpoints; the last step is always saved."""
    lr: dict[ModelPart, float]
    """Peak learning rate of each part that trains."""
    unfreeze: tuple[UnfreezeConfig, ...] = ()
    """Parts that begin to train later; what is not named trains from the first step."""
    validation: ValidationConfig = ValidationConfig(
        every=0, cases=64, shown_cases=0, best_metric="loss", patience=0
    )

    @model_validator(mode="after")
    def _check_unfrozen_parts_have_lr(self) -> "PhaseConfig":
        for row in self.unfreeze:
            if row.part not in self.lr:
                raise ValueError(f"unfreeze names {row.part}, which has no learning rate in lr")
            if row.last_blocks is not None and row.part != "encoder":
                raise ValueError(
                    f"unfreeze.blocks is for the encoder, so it must be null for {row.part}"
                )
        return self


class LossWeightsConfig(_ConfigSection):
    """Weights of the tasks."""

    classification: float
    localization: float
    report: float


LossWeight = Annotated[float, Field(ge=0)]


class LocalizationLossWeightsConfig(_ConfigSection):
    """Weights of the localization loss's terms beside Dice and cross-entropy at full resolution, which count 1. A
    term of weight 0 changes nothing."""

    half_resolution: LossWeight
    """Dice and cross-entropy at half resolution."""
    patch_resolution: LossWeight
    """Cross-entropy of the patches that hold a lesion."""
    denoising: LossWeight
    """Squared error of the denoised patch features."""
    consistency: LossWeight
    """Squared difference between what the three resolutions say."""
    alignment: LossWeight
    """Cross-entropy of the match of image and lesion prompt, also where a label is all that is known of a lesion."""


class TrainingLimitsConfig(_ConfigSection):
    """What is not normal in training. A step whose loss or gradient is not is skipped by all ranks together: weights
    and optimizer stay as they are, and its samples count as seen."""

    max_loss: PositiveFloat
    """Largest loss of a micro-batch, in size."""
    max_gradient_norm: PositiveFloat
    """Largest norm of all gradients together, before clipping."""
    max_bad_steps: PositiveInt
    """Skipped steps in a row that end the run."""
    timeout_minutes: PositiveFloat
    """Minutes that a rank may need for one step, one checkpoint or one case of a validation; then it counts as hung."""


TrackerName = Literal["wandb", "tensorboard"]


class TrainConfig(_ConfigSection):
    """What the phases share, and the phases."""

    runs: str
    """Folder of all runs; phase N writes to `RUNS/NAME/phaseN`, a sub-step of it to `RUNS/NAME/phaseN-STAGE`."""
    seed: int
    weight_decay: Annotated[float, Field(ge=0)]
    betas: tuple[Fraction, Fraction]
    gradient_clipping: PositiveFloat
    """Largest norm of all gradients together."""
    loss_weights: LossWeightsConfig
    weighting: Literal["fixed", "uncertainty"] = "fixed"
    """Whether `losses` weigh the tasks throughout, or are where learned weights begin (see
    `rectvlm.train.uncertainty_weighting`)."""
    weighting_lr: PositiveFloat = 0.01
    """Peak learning rate of learned weights."""
    localization_loss_weights: LocalizationLossWeightsConfig
    limits: TrainingLimitsConfig = TrainingLimitsConfig(
        max_loss=1e3, max_gradient_norm=1e4, max_bad_steps=5, timeout_minutes=30.0
    )
    keep_checkpoints: PositiveInt
    """Newest checkpoints that are kept, beside the best."""
    trackers: tuple[TrackerName, ...] = ("wandb", "tensorboard")
    """Who else is told of every step; `RECTVLM_TRACKERS` in the environment decides when it is set."""
    phases: dict[PhaseKey, PhaseConfig]
    """Phases by number, and their sub-steps by name."""


class Config(_ConfigSection):
    """Everything that decides a run."""

    name: str
    data: DataConfig
    encoder: EncoderConfig
    text: TextConfig
    classifier: ClassifierConfig
    localizer: LocalizerConfig
    generator: GeneratorConfig
    train: TrainConfig

    @model_validator(mode="after")
    def _check_patches_tile_grid(self) -> "Config":
        if any(g % p for g, p in zip(self.data.grid, self.encoder.patch, strict=True)):
            raise ValueError(
                f"encoder.patch {self.encoder.patch} does not tile data.grid {self.data.grid}"
            )
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
        taps = self.encoder.tap_blocks
        if list(taps) != sorted(set(taps)) or (taps and taps[-1] >= self.encoder.depth):
            raise ValueError(
                f"encoder.tap_blocks {taps} must rise and stay below encoder.depth {self.encoder.depth}"
            )
        return self

    @model_validator(mode="after")
    def _check_unet_levels(self) -> "Config":
        if any(side & (side - 1) for side in self.encoder.patch):
            raise ValueError(f"encoder.patch {self.encoder.patch} is not made of powers of 2")
        levels = max(self.encoder.patch).bit_length() - 1
        if levels < 2 or len(self.localizer.channels) != levels:
            raise ValueError(
                f"localizer.channels {self.localizer.channels} must have one entry a level: encoder.patch "
                f"{self.encoder.patch} makes {levels}, and 2 are the least"
            )
        odd = [n for n in self.localizer.channels if n > NORM_GROUPS and n % NORM_GROUPS]
        if odd:
            raise ValueError(
                f"localizer.channels: {odd[0]} is neither up to {NORM_GROUPS} nor a multiple (group norm)"
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
        stage: sub-step of the phase; None is the phase itself.
    """
    key = f"phase{number}" + (f"-{stage}" if stage else "")
    assert key in typing.get_args(PhaseKey), key
    return typing.cast(PhaseKey, key)


def load_config(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration by name or path and apply overrides.

    Args:
        source: `tiny`, `demo`, … (a file of `rectvlm/configs`), or a path to a YAML file.
        overrides: `part.field=value`; the value is read as YAML.

    Raises:
        UserError: no such file, an unknown key (with the nearest valid one), or a value of the wrong type.
    """
    path = Path(source)
    if not path.suffix:
        path = CONFIG_FOLDER / f"{source}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in CONFIG_FOLDER.glob("*.yaml")))
        raise UserError(
            f"No configuration {str(source)!r}: give one of {known}, or the path of a YAML file."
        )
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {error}".replace("\n", " ")) from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a tree of settings, but holds {type(tree).__name__}.")
    if overrides:
        _fill_defaults(tree, Config)
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, where=str(path))


def parse_config(tree: dict[str, Any], where: str) -> Config:
    """Validate a tree of plain values.

    Raises:
        UserError: naming every fault found, and `where` the tree came from.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        faults = "; ".join(_explain_fault(fault["loc"], fault) for fault in error.errors())
        raise UserError(f"Configuration {where}: {faults}.") from error


def _fill_defaults(tree: dict[Any, Any], section: type[BaseModel]) -> None:
    """Name the values that a file leaves to their defaults, so that overrides find them."""
    for name, field in section.model_fields.items():
        if not field.is_required():
            default = field.get_default()
            tree.setdefault(
                name, default.model_dump() if isinstance(default, BaseModel) else default
            )
        inner: Any = field.annotation
        below = [tree.get(name)]
        if typing.get_origin(inner) is dict and isinstance(tree.get(name), dict):
            inner, below = typing.get_args(inner)[1], list(tree[name].values())
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            for subtree in below:
                if isinstance(subtree, dict):
                    _fill_defaults(subtree, inner)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    dotted, separator, text = override.partition("=")
    if not separator:
        raise UserError(f"Override {override!r} is not of the form part.field=value.")
    *parents, leaf = dotted.split(".")
    node: dict[Any, Any] = tree
    done: list[str] = []
    for name in parents:
        if not isinstance(node.get(name), dict):
            raise UserError(f"Override {override!r}: {_describe_unknown_key([*done, name], node)}.")
        node, done = node[name], [*done, name]
    if leaf not in node:
        raise UserError(f"Override {override!r}: {_describe_unknown_key([*done, leaf], node)}.")
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"Override {override!r}: {text!r} is not a YAML value.") from error


def _describe_unknown_key(path: Sequence[str | int], siblings: Iterable[Any]) -> str:
    names = [str(name) for name in siblings]
    near = difflib.get_close_matches(str(path[-1]), names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}" if near else f"valid here: {', '.join(names)}"
    return f"unknown key {'.'.join(map(str, path))!r}, {hint}"


def _explain_fault(loc: tuple[int | str, ...], fault: Any) -> str:
    path = [part for part in loc if part != "[key]"]
    if fault["type"] == "extra_forbidden":
        return _describe_unknown_key(path, _section_at(path[:-1]).model_fields)
    if "[key]" in loc:
        return f"unknown key {'.'.join(map(str, path))!r}, {fault['msg'].lower()}"
    if fault["type"] == "missing":
        return f"missing key {'.'.join(map(str, path))!r}"
    message = fault["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    return (
        f"{'.'.join(map(str, path)) or 'top level'} = {fault['input']!r}: {message}"
        if path
        else message
    )


def _section_at(path: Sequence[str | int]) -> type[BaseModel]:
    section: Any = Config
    for name in path:
        if typing.get_origin(section) in (dict, tuple):
            section = typing.get_args(section)[typing.get_origin(section) is dict]
        else:
            section = section.model_fields[name].annotation
        assert not isinstance(section, types.UnionType)
    return section
