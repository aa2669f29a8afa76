"""The three phases: which parts exist and which tasks are learnt. How long and how fast is in the configuration."""

from dataclasses import dataclass
from typing import Literal

from rectvlm.config import Config, Part, PhaseConfig
from rectvlm.types import UserError

Task = Literal["classification", "localization", "report"]
PhaseNumber = Literal[1, 2, 3]


@dataclass(frozen=True)
class Phase:
    """One row of the table."""

    number: PhaseNumber
    parts: tuple[Part, ...]
    """Parts of the model that exist in this phase. Those with a learning rate train, the others are frozen."""
    tasks: tuple[Task, ...]

    @property
    def init_from(self) -> PhaseNumber | None:
        """The phase whose checkpoint this one starts from."""
        return None if self.number == 1 else PHASES[self.number - 1].number

    def settings(self, config: Config) -> PhaseConfig:
        """This phase's section of the configuration.

        Raises:
            UserError: the section is missing, or names a part that this phase does not have.
        """
        section = config.train.phases.get(self.number)
        if section is None:
            raise UserError(f"Configuration {config.name} has no train.phases.{self.number}: add the section.")
        strangers = set(section.lr) - set(self.parts)
        if strangers or not section.lr:
            raise UserError(
                f"train.phases.{self.number}.lr names {', '.join(sorted(strangers)) or 'no part'}; phase {self.number} "
                f"trains one or more of {', '.join(self.parts)}."
            )
        return section


PHASES: dict[int, Phase] = {
    1: Phase(1, ("encoder", "classifier"), ("classification",)),
    2: Phase(2, ("encoder", "classifier", "localizer"), ("classification", "localization")),
    3: Phase(3, ("encoder", "classifier", "localizer", "generator"), ("classification", "localization", "report")),
}
