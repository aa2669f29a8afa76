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
from rectvlm.train.engine import Engine
from rectvlm.train.exits import Ended, Exit
from rectvlm.train.lines import cut_back
from rectvlm.train.phases import Phase
from rectvlm.train.progress import Meter, Watch
from rectvlm.train.provenance import Sessions
from rectvlm.train.trackers import Trackers
from rectvlm.train.utilization import StepWork

if TYPE_CHECKING:
    from rectvlm.train.validation import ValidationSample


class Record:
    """Open while a phase trains."""

    def __init__(
        self, engine: Engine, phase: Phase, config: Config, folder: Path, step: int, work: StepWork | None = None
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
        self._files["trace"] = _continue(trace, step)
        self._quantization = config.generator.quantization if "generator" in phase.parts else None
        self._described = False
        if not engine.is_main:
            return
        steps = phase.settings(config).steps
        for other in (folder / "ranks").glob("rank-*.jsonl"):
            if int(other.stem.removeprefix("rank-")) >= engine.world:  # there were more ranks before
                _continue(other, step).close()
        (folder / "config.yaml").write_text(config.to_yaml())
        self._files["metrics"] = _continue(folder / "metrics.jsonl", step)
        self._files["validation"] = _continue(folder / "validation.jsonl", step)
        self._sessions = Sessions(folder)
        self._sessions.start(step, steps, _facts(engine, phase, config, work))
        self._trackers = Trackers(engine, config, folder, step, self._sessions.begun)
        self._meter = Meter(steps, work)
        self._watch = Watch(f"phase {phase.number}" + (f" {phase.stage}" if phase.stage else ""), steps, step)

    def __enter__(self) -> "Record":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._files.values():
            with contextlib.suppress(OSError):  # a full disk, which has ended the run already
                handle.close()
        if not self.engine.is_main:
            return
        self._watch.close()
        self._trackers.close()
        self._sessions.end(*_ending(error, self._step))

    def write(self, line: dict[str, Any], samples: list[str]) -> None:
        """One step; every rank must call it."""
        if not self._described:
            self._describe()
        self._step = line["step"]
        _append(self._files["trace"], {"step": line["step"], "samples": samples})
        if not self.engine.is_main:
            return
        _append(self._files["metrics"], line)
        figures = self._meter.add(line, self.engine.world * len(samples), time.monotonic())
        self._watch.tell(figures)
        rates = {
            "samples_per_second": figures.samples_per_second,
            "tokens_per_second": figures.tokens_per_second,
            "mfu": figures.mfu,
            "data_wait": figures.waiting,
        }
        self._trackers.log(line | {"recent": rates}, line["step"])

    def settle(self) -> None:
        """Have all lines on the disk: a checkpoint that survives a power cut must not be ahead of them.

        Raises:
            OSError: they could not be written.
        """
        for handle in self._files.values():
            os.fsync(handle.fileno())

    def validated(self, step: int, metrics: dict[str, float | None], samples: "list[ValidationSample]") -> None:
        """One validation: its metrics by name, and some cases, of rank 0, to be looked at."""
        if not self.engine.is_main:
            return
        _append(self._files["validation"], {"step": step, "metrics": metrics})
        self._trackers.log({"validation": metrics}, step)
        if samples:
            # Imported here: most runs draw nothing, and a drawing library takes a second to load.
            from rectvlm.train.pictures import write_samples

            shown = write_samples(samples, self.folder / "validation" / f"step-{step:06d}")
            pictures = {f"validation/{key}": picture for key, (picture, _) in shown.items()}
            self._trackers.show(pictures, {f"reports/{key}": words for key, (_, words) in shown.items()}, step)

    def _describe(self) -> None:
        """After the first step: what ZeRO keeps whole on a rank is known by then."""
        described = self.engine.describe() | {"llm_quantization": self._quantization}
        if self.engine.is_main:
            (self.folder / "engine.json").write_text(json.dumps(described, indent=2) + "\n")
        self._described = True


def _facts(engine: Engine, phase: Phase, config: Config, work: StepWork | None) -> dict[str, Any]:
    """What only the caller of a session's record knows."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", engine.world))
    return {
        "name": config.name,
        "phase": phase.number,
        "stage": phase.stage,
        "world_size": engine.world,
        "nodes": max(1, engine.world // max(1, local)),
        "work": None if work is None else asdict(work),
    }


def _ending(error: BaseException | None, step: int) -> tuple[str, int, str | None]:
    """State, step and reason of a session's end."""
    if error is None:
        return "finished", step, None
    if isinstance(error, KeyboardInterrupt):
        return "stopped", step, "interrupted"
    if isinstance(error, Ended):
        return ("stopped" if error.exit == Exit.RESUME else "failed"), step, error.reason
    text = (str(error).splitlines() or [""])[0]
    return "failed", step, f"{type(error).__name__}: {text}"[:500]


def _continue(path: Path, step: int) -> IO[str]:
    cut_back(path, step)
    return path.open("a")


def _append(handle: IO[str], line: dict[str, Any]) -> None:
    handle.write(json.dumps(line) + "\n")
    handle.flush()
