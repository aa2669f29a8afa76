"""Weights & Biases and TensorBoard, through Accelerate's trackers; only rank 0 calls them."""

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
    """Names of the trackers: the environment's if it is set (`none` for none), else the config's.

    Raises:
        UserError: a name is not a tracker's.
    """
    text = os.environ.get(TRACKERS_VARIABLE)
    if text is None:
        return list(config.train.trackers)
    names = [name for name in text.replace(",", " ").split() if name != "none"]
    known_names = get_args(TrackerName)
    unknown_names = sorted(set(names) - set(known_names))
    if unknown_names:
        raise UserError(
            f"{TRACKERS_VARIABLE}={text} names {', '.join(unknown_names)}: give one or more of "
            f"{', '.join(known_names)}, or none."
        )
    return names


class ExperimentTrackers:
    """The trackers that were started with the engine; on ranks other than 0 nothing happens."""

    def __init__(
        self, engine: Engine, config: Config, folder: Path, step: int, first_start: str
    ) -> None:
        """Start the trackers.

        Args:
            engine: engine that was started with the names from `choose_trackers`.
            config: configuration that is shown beside the curves.
            folder: the phase's run folder.
            step: number of steps done. What a run that was cut off logged after it is dropped,
                where the tracker can do that.
            first_start: time at which this run first started. W&B's id of the run is derived from
                it, so that a resumed run continues its curves.
        """
        self._accelerator = engine.accelerator if engine.is_main else None
        if self._accelerator is None:
            return
        self._names = [str(name) for name in self._accelerator.log_with]
        self._accelerator.project_configuration.logging_dir = str(folder / "tensorboard")
        run_name = f"{config.name}-{folder.name}"
        settings: dict[str, Any] = {"tensorboard": {"purge_step": step + 1}}
        if "wandb" in self._names:
            run_id = hashlib.sha256(f"{run_name} {first_start}".encode()).hexdigest()[:12]
            settings["wandb"] = _make_wandb_settings(folder, run_name, run_id)
        self._start_trackers(settings)
        if "wandb" in self._names:
            tracker = self._accelerator.get_tracker("wandb")
            tracker.store_init_configuration(config.model_dump(mode="json"))
        if "tensorboard" in self._names:
            tracker = self._accelerator.get_tracker("tensorboard")
            tracker.log({"config": f"```\n{config.to_yaml()}\n```"}, step)

    def _start_trackers(self, settings: dict[str, Any]) -> None:
        assert self._accelerator is not None
        if "wandb" not in self._names:
            self._accelerator.init_trackers(PROJECT_NAME, init_kwargs=settings)
            return
        import wandb

        try:
            self._accelerator.init_trackers(PROJECT_NAME, init_kwargs=settings)
        except wandb.Error as error:
            # A run must not end because a remote server does not answer.
            log.warning(
                "W&B could not be reached (%s); its record is kept in the run's folder instead",
                error,
            )
            settings["wandb"]["mode"] = "offline"
            self._accelerator.init_trackers(PROJECT_NAME, init_kwargs=settings)

    def log_numbers(self, tree: Mapping[str, Any], step: int) -> None:
        """Log the numbers of a tree under their joined names, without those that are None."""
        numbers = flatten_numbers(tree)
        self._call_each_tracker(lambda tracker: tracker.log(numbers, step=step))

    def log_examples(
        self, pictures: Mapping[str, NDArray[np.uint8]], texts: Mapping[str, str], step: int
    ) -> None:
        """Log pictures, (H, W, 3), and texts by name."""
        batches = {name: picture[None] for name, picture in pictures.items()}

        def log_to_tracker(tracker: Any) -> None:
            if tracker.name == "tensorboard":
                tracker.log_images(batches, step=step, dataformats="NHWC")
                # TensorBoard's texts are Markdown, where a single line break does not count.
                markdown = {name: text.replace("\n", "  \n") for name, text in texts.items()}
                tracker.log(markdown, step=step)
            else:
                tracker.log_images(batches, step=step)
                rows = [list(item) for item in texts.items()]
                tracker.log_table(
                    "validation/reports", columns=["case", "text"], data=rows, step=step
                )

        self._call_each_tracker(log_to_tracker)

    def close(self) -> None:
        """Let the trackers finish."""
        self._call_each_tracker(lambda tracker: tracker.finish())
        if self._accelerator is not None:
            self._accelerator.trackers = []

    def _call_each_tracker(self, call: Callable[[Any], None]) -> None:
        """Call each tracker, and leave one out from then on if it fails.

        Its service may have died of a signal, or its disk be full; neither is a reason to end a
        run, or to end one without a checkpoint.
        """
        if self._accelerator is None:
            return
        for tracker in list(self._accelerator.trackers):
            try:
                call(tracker)
            except Exception as error:
                log.warning("%s failed (%s) and is left out from here on", tracker.name, error)
                self._accelerator.trackers.remove(tracker)


def flatten_numbers(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a tree under their joined names, such as `losses/report`; None is left out."""
    numbers: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            numbers |= flatten_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            numbers[prefix + key] = value
    return numbers


def _make_wandb_settings(folder: Path, run_name: str, run_id: str) -> dict[str, Any]:
    """Settings of W&B: online when the user is logged in, else offline.

    `WANDB_MODE` decides when it is set.
    """
    import wandb

    mode = os.environ.get("WANDB_MODE")
    if not mode:
        mode = "online" if wandb.login(prompt=False) else "offline"
    return {
        "dir": str(folder),
        "name": run_name,
        "id": run_id,
        "resume": "allow",
        "mode": mode,
        "settings": wandb.Settings(silent=True, console="off"),
    }
