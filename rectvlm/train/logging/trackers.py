"""Weights & Biases and TensorBoard, through Accelerate's trackers; only rank 0 calls them.

No tracker ends a run or holds it up: whatever one raises becomes a warning, and every wait for a
server has an end.
"""

import hashlib
import logging
import os
import queue
import ssl
import threading
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, get_args
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import numpy as np
from numpy.typing import NDArray

from rectvlm.config import Config, TrackerName
from rectvlm.train.engine.engine import start_tracker
from rectvlm.types import UserError

log = logging.getLogger(__name__)

PROJECT_NAME = "rectvlm"
TRACKERS_VARIABLE = "RECTVLM_TRACKERS"
ANSWER_TIMEOUT_SECONDS = 5.0
"""Time within which W&B's server must answer at all, seconds."""
START_TIMEOUT_SECONDS = 15.0
"""Time within which W&B must start a run, seconds."""
FINISH_TIMEOUT_SECONDS = 30.0
"""Time for W&B's last upload, seconds; what is left is on disk, for `wandb sync`."""


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
    """The trackers of a run, on rank 0. One that fails is left out with a warning."""

    def __init__(
        self, names: Sequence[str], config: Config, folder: Path, step: int, first_start: str
    ) -> None:
        """Start the trackers.

        Args:
            names: names from `choose_trackers`.
            config: configuration that is shown beside the curves.
            folder: the phase's run folder.
            step: number of steps done. What a run that was cut off logged after it is dropped,
                where the tracker can do that.
            first_start: time at which this run first started. W&B's id of the run is derived from
                it, so that a resumed run continues its curves.
        """
        self._trackers: list[Any] = []
        for name in names:
            try:
                if name == "wandb":
                    tracker = _start_wandb(config, folder, first_start)
                else:
                    tracker = _start_tensorboard(config, folder, step)
            except Exception as error:
                _warn_of_failure(name, error)
            else:
                self._trackers.append(tracker)

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
        self._trackers = []

    def _call_each_tracker(self, call: Callable[[Any], None]) -> None:
        """Call each tracker, and leave one out from then on if it fails.

        Its service may have died of a signal, or its disk be full; neither is a reason to end a
        run, or to end one without a checkpoint.
        """
        for tracker in list(self._trackers):
            try:
                call(tracker)
            except Exception as error:
                _warn_of_failure(tracker.name, error)
                self._trackers.remove(tracker)


def _warn_of_failure(name: str, error: Exception) -> None:
    log.warning("%s failed (%s) and is left out from here on", name, _first_line(error))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def flatten_numbers(tree: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a tree under their joined names, such as `losses/report`; None is left out."""
    numbers: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            numbers |= flatten_numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            numbers[prefix + key] = value
    return numbers


def _start_tensorboard(config: Config, folder: Path, step: int) -> Any:
    tracker = start_tracker(
        "tensorboard",
        PROJECT_NAME,
        logging_dir=str(folder / "tensorboard"),
        purge_step=step + 1,
    )
    tracker.log({"config": f"```\n{config.to_yaml()}\n```"}, step)
    return tracker


def _start_wandb(config: Config, folder: Path, first_start: str) -> Any:
    """Start W&B: online when the user is logged in and the server answers, else offline.

    `WANDB_MODE` decides when it is set.
    """
    import wandb

    run_name = f"{config.name}-{folder.name}"
    mode = os.environ.get("WANDB_MODE")
    settings = {
        "dir": str(folder),
        "name": run_name,
        "id": hashlib.sha256(f"{run_name} {first_start}".encode()).hexdigest()[:12],
        "resume": "allow",
        "settings": wandb.Settings(
            silent=True,
            console="off",
            init_timeout=START_TIMEOUT_SECONDS,
            finish_timeout=FINISH_TIMEOUT_SECONDS,
        ),
    }
    try:
        if not mode:
            # Without `verify`: the check alone would wait for a server that cannot be reached.
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        if mode == "online":
            _require_answer(wandb.setup().settings.base_url)
        tracker = start_tracker("wandb", PROJECT_NAME, mode=mode, **settings)
    except Exception as error:
        if mode == "offline":
            raise
        log.warning(
            "wandb cannot go online (%s): its record is kept in %s, for `wandb sync`",
            _first_line(error),
            folder / "wandb",
        )
        tracker = start_tracker("wandb", PROJECT_NAME, mode="offline", **settings)
    tracker.store_init_configuration(config.model_dump(mode="json"))
    return tracker


def _require_answer(address: str) -> None:
    """Check that a server answers at all, in a thread: a look-up of its name has no time limit.

    Raises:
        OSError: there is no answer in time.
    """
    answers: queue.Queue[bool] = queue.Queue()
    threading.Thread(target=lambda: answers.put(_answers(address)), daemon=True).start()
    try:
        has_answered = answers.get(timeout=ANSWER_TIMEOUT_SECONDS)
    except queue.Empty:
        has_answered = False
    if not has_answered:
        raise OSError(f"{address} does not answer")


def _answers(address: str) -> bool:
    """Whether a server answers a request in any way."""
    try:
        urlopen(address, timeout=ANSWER_TIMEOUT_SECONDS).close()
    except HTTPError:
        return True
    except URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # W&B has certificates of its own
    except (OSError, HTTPException, ValueError):
        return False
    return True
