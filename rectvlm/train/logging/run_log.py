"""The files that a run leaves.

    RUN/phaseN/metrics.jsonl           one line a step
    RUN/phaseN/validation.jsonl        one line a validation
    RUN/phaseN/validation/step-…/      pictures and reports of some cases
    RUN/phaseN/engine.json             what really runs: kind, ZeRO stage, bytes on each rank
    RUN/phaseN/run.json                where the run came from and how it ended (`run_metadata`)
    RUN/phaseN/config.yaml             the resolved configuration
    RUN/phaseN/ranks/rank-0000.jsonl   the samples that a rank took at each step

Beside that, figures go to W&B and TensorBoard (`trackers`) and to the console (`console`).
"""

import logging
import os
import time
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from rectvlm.config import Config
from rectvlm.files import append_json_line, atomic_file, fsync_file, write_json
from rectvlm.runs.run_files import (
    ENGINE_FILE,
    METRICS_FILE,
    RANKS_FOLDER,
    RUN_CONFIG_FILE,
    VALIDATION_FILE,
)
from rectvlm.train.engine.engine import Engine
from rectvlm.train.logging.console import ProgressDisplay, ProgressMeter
from rectvlm.train.logging.jsonl import truncate_after_step
from rectvlm.train.logging.mfu import StepFlops
from rectvlm.train.logging.run_metadata import SessionLog
from rectvlm.train.logging.startup_clock import StartupClock
from rectvlm.train.logging.trackers import ExperimentTrackers, choose_trackers
from rectvlm.train.phases import Phase
from rectvlm.train.recovery.exit_codes import ExitCode, RunEnded
from rectvlm.train.step_result import StepResult
from rectvlm.train.validation import ValidationResult

log = logging.getLogger(__name__)


class RunLog:
    """Writes a run's files while the phase trains; open it in a `with` statement."""

    def __init__(
        self,
        engine: Engine,
        phase: Phase,
        config: Config,
        folder: Path,
        step: int,
        last_step: int,
        step_flops: StepFlops | None = None,
        startup: StartupClock | None = None,
    ) -> None:
        """Continue the files after `step`, dropping lines of later steps that will be done again.

        Args:
            engine: the prepared engine.
            phase: the phase that trains.
            config: the configuration.
            folder: the phase's run folder.
            step: number of steps done.
            last_step: number of the phase's last step.
            step_flops: FLOPs of a step, for the MFU.
            startup: clock of the start, which the first step ends.
        """
        self.engine, self.phase, self.folder = engine, phase, folder
        self._step = step
        self._startup = startup
        self._quantization = config.generator.quantization if "generator" in phase.parts else None
        self._has_described_engine = False
        self._rank_path = folder / RANKS_FOLDER / f"rank-{engine.rank:04d}.jsonl"
        self._rank_path.parent.mkdir(parents=True, exist_ok=True)
        self._paths = [self._rank_path]
        self._metrics_path = folder / METRICS_FILE
        self._validation_path = folder / VALIDATION_FILE
        if engine.is_main:
            self._paths += [self._metrics_path, self._validation_path]
        for path in self._paths:
            truncate_after_step(path, step)
            path.touch()
        if engine.is_main:
            self._truncate_files_of_former_ranks()
            with atomic_file(folder / RUN_CONFIG_FILE) as file:
                file.write(config.to_yaml().encode())
            self._start_session(config, last_step, step_flops)

    def _truncate_files_of_former_ranks(self) -> None:
        """Drop later steps of ranks that exist no more, since there were more ranks before."""
        for path in (self.folder / RANKS_FOLDER).glob("rank-*.jsonl"):
            if int(path.stem.removeprefix("rank-")) >= self.engine.world_size:
                truncate_after_step(path, self._step)

    def _start_session(self, config: Config, last_step: int, step_flops: StepFlops | None) -> None:
        self._sessions = SessionLog(self.folder)
        facts = _describe_session(self.engine, self.phase, config, step_flops)
        self._sessions.start_session(self._step, last_step, facts)
        first_start = self._sessions.first_start
        self._trackers = ExperimentTrackers(
            choose_trackers(config), config, self.folder, self._step, first_start
        )
        loss_weights = config.train.loss_weights.model_dump()
        self._meter = ProgressMeter(last_step, step_flops, loss_weights)
        name = f"phase {self.phase.number}"
        if self.phase.stage:
            name += f" {self.phase.stage}"
        self._display = ProgressDisplay(name, last_step, self._step)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.engine.is_main:
            self._display.close()
            self._trackers.close()
            self._sessions.end_session(*_describe_ending(error, self._step))

    def log_step(self, result: StepResult) -> None:
        """Log a step; every rank must call it."""
        if not self._has_described_engine:
            self._write_engine_description()
        self._step = result.step
        append_json_line(self._rank_path, {"step": result.step, "samples": result.sample_keys})
        if not self.engine.is_main:
            return
        if self._startup is not None:
            self._log_startup(self._startup, result)
            self._startup = None
        line = result.to_metrics_line()
        append_json_line(self._metrics_path, line)
        sample_count = self.engine.world_size * len(result.sample_keys)
        figures = self._meter.add_step(result, sample_count, time.monotonic())
        self._display.show_progress(figures)
        line["recent"] = {
            "samples_per_second": figures.samples_per_second,
            "tokens_per_second": figures.tokens_per_second,
            "mfu": figures.mfu,
            "data_wait": figures.data_wait_share,
        }
        self._trackers.log_numbers(line, result.step)

    def _log_startup(self, startup: StartupClock, result: StepResult) -> None:
        """Log how long it took from the start of the process to the end of the first step."""
        startup.end_first_step(result.seconds_by_operation["data"])
        log.info("the first step ended after %s", startup)
        self._sessions.add_facts({"startup_seconds": startup.seconds_by_part})

    def fsync_logs(self) -> None:
        """Flush all lines to disk, so that no checkpoint is ahead of them after a power cut.

        Raises:
            OSError: they could not be written.
        """
        for path in self._paths:
            fsync_file(path)

    def log_validation(self, result: ValidationResult) -> None:
        """Log a validation's metrics, and pictures and reports of rank 0's examples."""
        if not self.engine.is_main:
            return
        step = result.step
        append_json_line(self._validation_path, {"step": step, "metrics": result.metrics})
        self._trackers.log_numbers({"validation": result.metrics}, step)
        if result.examples:
            # Imported here: most runs draw nothing, and a drawing library takes a second to load.
            from rectvlm.train.logging.validation_figures import write_validation_figures

            folder = self.folder / "validation" / f"step-{step:06d}"
            pictures, texts = {}, {}
            for key, written in write_validation_figures(result.examples, folder).items():
                pictures[f"validation/{key}"] = written.picture
                texts[f"reports/{key}"] = written.text
            self._trackers.log_examples(pictures, texts, step)

    def _write_engine_description(self) -> None:
        """Write `engine.json` after the first step, when ZeRO holds what it keeps on a rank."""
        description = asdict(self.engine.describe_ranks())
        description["llm_quantization"] = self._quantization
        if self.engine.is_main:
            write_json(self.folder / ENGINE_FILE, description)
        self._has_described_engine = True


def _describe_session(
    engine: Engine, phase: Phase, config: Config, step_flops: StepFlops | None
) -> dict[str, Any]:
    """Entries of a session in `run.json` that describe the training."""
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", engine.world_size))
    return {
        "name": config.name,
        "phase": phase.number,
        "stage": phase.stage,
        "world_size": engine.world_size,
        "nodes": max(1, engine.world_size // max(1, local_ranks)),
        "work": None if step_flops is None else asdict(step_flops),
    }


def _describe_ending(error: BaseException | None, step: int) -> tuple[str, int, str | None]:
    """State, step and reason of a session's end."""
    if error is None:
        return "finished", step, None
    if isinstance(error, KeyboardInterrupt):
        return "stopped", step, "interrupted"
    if isinstance(error, RunEnded):
        is_stopped = error.exit_code == ExitCode.STOPPED_BY_SIGNAL
        return ("stopped" if is_stopped else "failed"), step, error.reason
    first_line = (str(error).splitlines() or [""])[0]
    return "failed", step, f"{type(error).__name__}: {first_line}"[:500]
