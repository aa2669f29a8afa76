"""The table of phases and their stages: which parts exist and may train, and what they learn.

Length and learning rates are in the configuration, one section a row. A part that a row may train
does so if the section gives it a learning rate; every other part is frozen.

| row        | starts from | may train                      | tasks                                |
|------------|-------------|--------------------------------|--------------------------------------|
| 1          | nothing     | encoder, classifier            | classification                       |
| 2 localize | phase 1     | localizer                      | localization                         |
| 2 labels   | phase 1     | encoder, classifier, localizer | classification, localization         |
| 2          | phase 1     | encoder, classifier, localizer | classification, localization         |
| 3 align    | phase 2     | generator                      | report                               |
| 3          | phase 2     | all four                       | classification, localization, report |

A stage has a run folder of its own; the phase itself starts from it where `--from` says so. The
row `2 labels` prepares nothing: it takes the place of phase 2 and learns localization from labels
alone, as the VLM3D challenge asks. No outline of a lesion reaches its losses, the order of its
samples or the choice of its best checkpoint.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rectvlm.config import Config, ModelPart, PhaseConfig, PhaseKey, phase_key
from rectvlm.types import Batch, UserError

Task = Literal["classification", "localization", "report"]
PhaseNumber = Literal[1, 2, 3]
Stage = Literal["localize", "labels", "align"]


@dataclass(frozen=True)
class Phase:
    """One row of the table."""

    number: PhaseNumber
    parts: tuple[ModelPart, ...]
    """Parts of the model that exist in this phase."""
    tasks: tuple[Task, ...]
    """Tasks whose losses are minimized."""
    stage: Stage | None = None
    """Stage of the phase; None is the phase itself, which trains everything jointly."""
    may_train: tuple[ModelPart, ...] | None = None
    """Parts that may have a learning rate; None stands for all."""
    reads_outlines: bool = True
    """Whether outlines of lesions are read; where they are not, no lesion counts as annotated."""

    @property
    def key(self) -> PhaseKey:
        """Name of the configuration's section and of the run folder: `phase3`, `phase3-align`."""
        return phase_key(self.number, self.stage)

    @property
    def previous_phase(self) -> PhaseNumber | None:
        """Number of the phase whose checkpoint this one starts from."""
        return None if self.number == 1 else PHASES[self.number - 1].number

    def get_settings(self, config: Config) -> PhaseConfig:
        """This row's section of the configuration.

        Raises:
            UserError: the section is missing, or names a part that this row does not train.
        """
        section = config.train.phases.get(self.key)
        if section is None:
            raise UserError(
                f"The configuration of run {config.name} has no train.phases.{self.key}: add the "
                "section."
            )
        trainable = self.parts if self.may_train is None else self.may_train
        unexpected = sorted(set(section.lr) - set(trainable))
        if unexpected or not section.lr:
            command = f"phase {self.number}"
            if self.stage:
                command += f" with --stage {self.stage}"
            raise UserError(
                f"train.phases.{self.key}.lr names {', '.join(unexpected) or 'no part'}; "
                f"{command} trains one or more of {', '.join(trainable)}."
            )
        if not self.reads_outlines:
            self._require_no_use_of_outlines(section)
        return section

    def _require_no_use_of_outlines(self, section: PhaseConfig) -> None:
        """Refuse settings that would let outlines in.

        Raises:
            UserError: rare outlines repeat cases, or Dice chooses the best checkpoint.
        """
        given = {
            "repeat_threshold": section.repeat_threshold > 0,
            "validation.best_metric": section.validation.best_metric == "mean_dice",
        }
        for name, uses_outlines in given.items():
            if uses_outlines:
                expected = "0" if name == "repeat_threshold" else "another metric than mean_dice"
                raise UserError(
                    f"train.phases.{self.key}.{name} reads outlines, and this row learns from "
                    f"labels alone: expected {expected}; correct the configuration."
                )

    def hide_outlines(self, batch: Batch) -> Batch:
        """The batch as this row may see it: as if no lesion was annotated, or unchanged."""
        return batch if self.reads_outlines else batch.without_outlines()

    def set_micro_batch(self, config: Config, micro_batch: int) -> Config:
        """Copy a configuration with another largest micro-batch in this row's section."""
        settings = self.get_settings(config).model_copy(update={"micro_batch": micro_batch})
        phases = config.train.phases | {self.key: settings}
        train = config.train.model_copy(update={"phases": phases})
        return config.model_copy(update={"train": train})


_PHASE_1_PARTS: tuple[ModelPart, ...] = ("encoder", "classifier")
_PHASE_2_PARTS: tuple[ModelPart, ...] = (*_PHASE_1_PARTS, "localizer")
_PHASE_3_PARTS: tuple[ModelPart, ...] = (*_PHASE_2_PARTS, "generator")
_PHASE_2_TASKS: tuple[Task, ...] = ("classification", "localization")

PHASE_TABLE: tuple[Phase, ...] = (
    Phase(1, _PHASE_1_PARTS, ("classification",)),
    Phase(2, _PHASE_2_PARTS, ("localization",), stage="localize", may_train=("localizer",)),
    Phase(2, _PHASE_2_PARTS, _PHASE_2_TASKS, stage="labels", reads_outlines=False),
    Phase(2, _PHASE_2_PARTS, _PHASE_2_TASKS),
    Phase(3, _PHASE_3_PARTS, ("report",), stage="align", may_train=("generator",)),
    Phase(3, _PHASE_3_PARTS, ("classification", "localization", "report")),
)
PHASES: dict[int, Phase] = {row.number: row for row in PHASE_TABLE if row.stage is None}
STAGES: dict[Stage, Phase] = {row.stage: row for row in PHASE_TABLE if row.stage is not None}

SettingsResolver = Callable[[Phase, Config, Path], Config]
"""Replaces `auto` in a phase's configuration, given its DeepSpeed JSON. Training takes one from
whoever starts it, since the planner, which decides, imports training."""


def get_run_folder(phase: Phase, config: Config) -> Path:
    """Run folder of a phase."""
    return Path(config.train.runs) / config.name / phase.key
