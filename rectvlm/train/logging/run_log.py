"""What a run leaves to read and to see.

    RUN/phaseN/metrics.jsonl           one line a step
    RUN/phaseN/validation.jsonl        one line a validation
    RUN/phaseN/validation/step-…/      pictures and reports of some cases
    RUN/phaseN/engine.json             what really runs: kind, ZeRO stage, ranks, bytes of packed weights on each
    RUN/phaseN/run.json                where it came from and how it ended, see `provenance`
    RUN/phaseN/config.yaml             the resolved configuration
    RUN/phaseN/ranks/rank-0000.jsonl   the samples that a rank took at each step

Beside that, W&B and TensorBoard are told (`trackers`), and whoever watches (`progress`).
"""

import contextlib
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from rectvlm.config import Config
from rectvlm.runs.run_files import CONFIG_FILE, ENGINE_FILE, METRICS_FILE, VALIDATION_FILE
from rectvlm.train.engine.engine import Engine
from rectvlm.train.logging.console import ProgressDisplay, ProgressMeter
from rectvlm.train.logging.jsonl import truncate_after_step
from rectvlm.train.logging.mfu import StepFlops
from rectvlm.train.logging.run_metadata import SessionLog
from rectvlm.train.logging.trackers import ExperimentTrackers
from rectvlm.train.phases import Phase
from rectvlm.train.recovery.exit_codes import ExitCode, RunEnded

if TYPE_CHECKING:
    from rectvlm.train.validation import ValidationExample


class RunLog:
    """Open while a phase trains."""

    def __init__(
        self,
        engine: Engine,
        phase: Phase,
        config: Config,
        folder: Path,
        step: int,
        work: StepFlops | None = None,
    ) -> None:
        """Open the files; lines after `step`, of a run that was cut off after its last checkpoint, are dropped.

        Args:
            engine: prepared.
            phase: for its name.
            config: as it is resolved.
            folder: of the phase's run.
            step: steps done so far.
            work: FLOPs of a step, for the MFU.
        """
        self.engine, self.phase, self.folder = engine, phase, folder
        self._files: dict[str, IO[str]] = {}
        self._step = step
        trace = folder / "ranks" / f"rank-{engine.rank:04d}.jsonl"
        trace.parent.mkdir(parents=True, exist_ok=True)
        self._files["trace"] = _reopen_log(trace, step)
        self._quantization = config.generator.quantization if "generator" in phase.parts else None
        self._described = False
        if not engine.is_main:
            return
        steps = phase.get_settings(config).steps
        for other in (folder / "ranks").glob("rank-*.jsonl"):
            if (
                int(other.stem.removeprefix("rank-")) >= engine.world_size
            ):  # there were more ranks before
                _reopen_log(other, step).close()
        (folder / CONFIG_FILE).write_text(config.to_yaml())
        self._files["metrics"] = _reopen_log(folder / METRICS_FILE, step)
        self._files["validation"] = _reopen_log(folder / VALIDATION_FILE, step)
        self._sessions = SessionLog(folder)
        self._sessions.start_session(step, steps, _describe_session(engine, phase, config, work))
        self._trackers = ExperimentTrackers(
            engine, config, folder, step, self._sessions.first_start
        )
        self._meter = ProgressMeter(steps, work)
        self._watch = ProgressDisplay(
            f"phase {phase.number}" + (f" {phase.stage}" if phase.stage else ""), steps, step
        )

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._files.values():
            with contextlib.suppress(OSError):  # a full disk, which has ended the run already
                handle.close()
        if not self.engine.is_main:
            return
        self._watch.close()
        self._trackers.close()
        self._sessions.end_session(*_describe_ending(error, self._step))

    def log_step(self, line: dict[str, Any], samples: list[str]) -> None:
        """One step; every rank must call it."""
        if not self._described:
            self._write_engine_description()
        self._step = line["step"]
        _append_line(self._files["trace"], {"step": line["step"], "samples": samples})
        if not self.engine.is_main:
            return
        _append_line(self._files["metrics"], line)
        figures = self._meter.add_step(
            line, self.engine.world_size * len(samples), time.monotonic()
        )
        self._watch.show_progress(figures)
        rates = {
            "samples_per_second": figures.samples_per_second,
            "tokens_per_second": figures.tokens_per_second,
            "mfu": figures.mfu,
            "data_wait": figures.data_wait_share,
        }
        self._trackers.log_numbers(line | {"recent": rates}, line["step"])

    def fsync_logs(self) -> None:
        """Have all lines on the disk: a checkpoint that survives a power cut must not be ahead of them.

        Raises:
            OSError: they could not be written.
        """
        for handle in self._files.values():
            os.fsync(handle.fileno())

    def log_validation(
        self, step: int, metrics: dict[str, float | None], samples: "list[ValidationExample]"
    ) -> None:
        """One validation: its metrics by name, and some cases, of rank 0, to be looked at."""
        if not self.engine.is_main:
            return
        _append_line(self._files["validation"], {"step": step, "metrics": metrics})
        self._trackers.log_numbers({"validation": metrics}, step)
        if samples:
            # Imported here: most runs draw nothing, and a drawing library takes a second to load.
            from rectvlm.train.logging.validation_figures import write_validation_figures

            shown = write_validation_figures(
                samples, self.folder / "validation" / f"step-{step:06d}"
            )
            pictures = {f"validation/{key}": picture for key, (picture, _) in shown.items()}
            self._trackers.log_examples(
                pictures, {f"reports/{key}": words for key, (_, words) in shown.items()}, step
            )

    def _write_engine_description(self) -> None:
        """After the first step: what ZeRO keeps whole on a rank is known by then."""
        described = self.engine.describe_ranks() | {"llm_quantization": self._quantization}
        if self.engine.is_main:
            (self.folder / ENGINE_FILE).write_text(json.dumps(described, indent=2) + "\n")
        self._described = True


def _describe_session(
    engine: Engine, phase: Phase, config: Config, work: StepFlops | None
) -> dict[str, Any]:
    """What only the caller of a session's record knows."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", engine.world_size))
    return {
        "name": config.name,
        "phase": phase.number,
        "stage": phase.stage,
        "world_size": engine.world_size,
        "nodes": max(1, engine.world_size // max(1, local)),
        "work": None if work is None else asdict(work),
    }


def _describe_ending(error: BaseException | None, step: int) -> tuple[str, int, str | None]:
    """State, step and reason of a session's end."""
    if error is None:
        return "finished", step, None
    if isinstance(error, KeyboardInterrupt):
        return "stopped", step, "interrupted"
    if isinstance(error, RunEnded):
        return (
            ("stopped" if error.exit_code == ExitCode.STOPPED_BY_SIGNAL else "failed"),
            step,
            error.reason,
        )
    text = (str(error).splitlines() or [""])[0]
    return "failed", step, f"{type(error).__name__}: {text}"[:500]


def _reopen_log(path: Path, step: int) -> IO[str]:
    truncate_after_step(path, step)
    return path.open("a")


def _append_line(handle: IO[str], line: dict[str, Any]) -> None:
    handle.write(json.dumps(line) + "\n")
    handle.flush()
