"""Weights & Biases and TensorBoard, through Accelerate's trackers; rank 0 alone speaks to them."""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from rectvlm.config import Config, TrackerName
from rectvlm.train.engine.engine import Engine
from rectvlm.types import UserError

log = logging.getLogger(__name__)

PROJECT_NAME = "rectvlm"
TRACKERS_VARIABLE = "RECTVLM_TRACKERS"


def choose_trackers(config: Config) -> list[str]:
    """Names of the trackers: those of the environment if it names any (`none` for none), else the configuration's.

    Raises:
        UserError: a name that is no tracker.
    """
    text = os.environ.get(TRACKERS_VARIABLE)
    if text is None:
        return list(config.train.trackers)
    names = [name for name in text.replace(",", " ").split() if name != "none"]
    if strangers := set(names) - set(get_args(TrackerName)):
        raise UserError(
            f"{TRACKERS_VARIABLE}={text} names {', '.join(sorted(strangers))}: give one or more of "
            f"{', '.join(get_args(TrackerName))}, or none."
        )
    return names


class ExperimentTrackers:
    """The trackers that were started with the engine; on other ranks than 0 nothing happens."""

    def __init__(
        self, engine: Engine, config: Config, folder: Path, step: int, first_start: str
    ) -> None:
        """Start them.

        Args:
            engine: started with the names of `chosen`.
            config: shown beside the curves.
            folder: of the phase's run.
            step: what was logged after it, by a run that was cut off, is taken back where that is possible.
            begun: when this run first started; W&B's name for it is made of that, so that a resumed run goes on.
        """
        self._accelerator = engine.accelerator if engine.is_main else None
        if self._accelerator is None:
            return
        self._names = [str(name) for name in self._accelerator.log_with]
        self._accelerator.project_configuration.logging_dir = str(folder / "tensorboard")
        name = f"{config.name}-{folder.name}"
        settings: dict[str, Any] = {"tensorboard": {"purge_step": step + 1}}
        if "wandb" in self._names:
            identity = hashlib.sha256(f"{name} {first_start}".encode()).hexdigest()[:12]
            settings["wandb"] = _make_wandb_settings(folder, name, identity)
        self._start_trackers(settings)
        if "wandb" in self._names:
            self._accelerator.get_tracker("wandb").store_init_configuration(
                config.model_dump(mode="json")
            )
        if "tensorboard" in self._names:
            self._accelerator.get_tracker("tensorboard").log(
                {"config": f"```\n{config.to_yaml()}\n```"}, step
            )

    def _start_trackers(self, settings: dict[str, Any]) -> None:
        assert self._accelerator is not None
        if "wandb" not in self._names:
            self._accelerator.init_trackers(PROJECT_NAME, init_kwargs=settings)
            return
        import wandb

        try:
            self._accelerator.init_trackers(PROJECT_NAME, init_kwargs=settings)
        except wandb.Error as error:
            # A run must not end because a server elsewhere does not answer.
            log.warning(
                "W&B could not be reached (%s); its record is kept in the run's folder instead",
                error,
            )
            settings["wandb"]["mode"] = "offline"
            self._accelerator.init_trackers(PROJECT_NAME, init_kwargs=settings)

    def log_numbers(self, tree: Mapping[str, Any], step: int) -> None:
        """Numbers, by name; nested names are joined, what is None is left out."""
        numbers = flatten_numbers(tree)
        self._call_each_tracker(lambda tracker: tracker.log(numbers, step=step))

    def log_examples(
        self, pictures: Mapping[str, NDArray[np.uint8]], texts: Mapping[str, str], step: int
    ) -> None:
        """Pictures (H, W, 3) and texts by name."""

        def tell(tracker: Any) -> None:
            batches = {name: picture[None] for name, picture in pictures.items()}
            if tracker.name == "tensorboard":
                tracker.log_images(batches, step=step, dataformats="NHWC")
                # Its texts are Markdown, where a line break alone is none.
                tracker.log(
                    {name: text.replace("\n", "  \n") for name, text in texts.items()}, step=step
                )
            else:
                tracker.log_images(batches, step=step)
                rows = [[name, text] for name, text in texts.items()]
                tracker.log_table(
                    "validation/reports", columns=["case", "text"], data=rows, step=step
                )

        self._call_each_tracker(tell)

    def close(self) -> None:
        """Let them finish what is under way."""
        self._call_each_tracker(lambda tracker: tracker.finish())
        if self._accelerator is not None:
            self._accelerator.trackers = []

    def _call_each_tracker(self, tell: Callable[[Any], None]) -> None:
        """A tracker that fails is left out from then on: its service may have died of a signal, or its disk be full,
        and neither is a reason to end a run, or to end one without a checkpoint."""
        if self._accelerator is None:
            return
        for tracker in list(self._accelerator.trackers):
            try:
                tell(tracker)
            except Exception as error:
                log.warning("%s failed (%s) and is left out from here on", tracker.name, error)
                self._accelerator.trackers.remove(tracker)


def flatten_numbers(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """A tree of numbers as one level of them: `losses/report`; None is left out."""
    found: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            found |= flatten_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            found[prefix + key] = value
    return found


def _make_wandb_settings(folder: Path, name: str, identity: str) -> dict[str, Any]:
    """Online when the user is logged in, else offline; `WANDB_MODE` decides when it is set."""
    import wandb

    return {
        "dir": str(folder),
        "name": name,
        "id": identity,
        "resume": "allow",
        "mode": os.environ.get("WANDB_MODE")
        or ("online" if wandb.login(prompt=False) else "offline"),
        "settings": wandb.Settings(silent=True, console="off"),
    }
