"""What a run leaves to read: metrics.jsonl, engine.json, one trace a rank, W&B, and the progress bar.

RUN/phaseN/metrics.jsonl        one line a step
RUN/phaseN/engine.json          what really runs: kind, ZeRO stage, ranks, bytes of packed weights on each
RUN/phaseN/ranks/rank-0000.jsonl   the samples that a rank took at each step
"""

import contextlib
import json
import logging
import os
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import wandb
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rectvlm.config import Config
from rectvlm.train.engine import Engine
from rectvlm.train.phases import Phase

log = logging.getLogger(__name__)

LOG_EVERY = 20.0
"""Seconds between two lines of progress where there is no terminal for a bar."""


class Record:
    """Open while a phase trains."""

    def __init__(self, engine: Engine, phase: Phase, config: Config, folder: Path, step: int) -> None:
        """Open the files; lines after `step`, of a run that was cut off after its last checkpoint, are dropped."""
        self.engine, self.phase, self.folder = engine, phase, folder
        self._files: dict[str, IO[str]] = {}
        self._steps = phase.settings(config).steps
        trace = folder / "ranks" / f"rank-{engine.rank:04d}.jsonl"
        trace.parent.mkdir(parents=True, exist_ok=True)
        self._files["trace"] = _continue(trace, step)
        self._progress: Progress | None = None
        self._told = time.monotonic()
        self._quantization = config.generator.quantization if "generator" in phase.parts else None
        self._described = False
        if engine.is_main:
            (folder / "config.yaml").write_text(config.to_yaml())
            self._files["metrics"] = _continue(folder / "metrics.jsonl", step)
            console = Console(stderr=True)
            if console.is_terminal:
                self._progress = _bar(console)
                self._task = self._progress.add_task(
                    "train", total=self._steps, completed=step, number=phase.number, text=""
                )
        _start_wandb(engine, config, folder)

    def __enter__(self) -> "Record":
        if self._progress is not None:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        for handle in self._files.values():
            handle.close()

    def write(self, line: dict[str, Any], samples: list[str]) -> None:
        """One step; every rank must call it."""
        if not self._described:
            self._describe()
        _append(self._files["trace"], {"step": line["step"], "samples": samples})
        if not self.engine.is_main:
            return
        _append(self._files["metrics"], line)
        self._tell(line, self.engine.world * len(samples) / line["seconds"]["total"])
        self.engine.accelerator.log(_flat(line), step=line["step"])

    def _describe(self) -> None:
        """After the first step: what ZeRO keeps whole on a rank is known by then."""
        described = self.engine.describe() | {"llm_quantization": self._quantization}
        if self.engine.is_main:
            (self.folder / "engine.json").write_text(json.dumps(described, indent=2) + "\n")
        self._described = True

    def _tell(self, line: dict[str, Any], rate: float) -> None:
        """To whoever watches: a bar on a terminal, now and then a line in a log."""
        step, last = line["step"], line["step"] == self._steps
        parts = " ".join(f"{task} {'–' if v is None else f'{v:.3f}'}" for task, v in line["losses"].items())
        text = f"loss {line['loss']:.3f} ({parts}) {rate:.1f} samples/s"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, text=text)
        elif last or time.monotonic() - self._told > LOG_EVERY:
            log.info("phase %d: step %d of %d, %s", self.phase.number, step, self._steps, text)
            self._told = time.monotonic()


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("phase {task.fields[number]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _continue(path: Path, step: int) -> IO[str]:
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            # The last line may be cut off by a kill.
            with contextlib.suppress(json.JSONDecodeError):
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
    handle = path.open("w")
    handle.writelines(kept)
    handle.flush()
    return handle


def _append(handle: IO[str], line: dict[str, Any]) -> None:
    handle.write(json.dumps(line) + "\n")
    handle.flush()


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}/")
        elif value is not None:
            flat[prefix + key] = value
    return flat


def _start_wandb(engine: Engine, config: Config, folder: Path) -> None:
    """Online when the user is logged in, else offline; `WANDB_MODE` decides when it is set."""
    if not engine.is_main:
        return
    mode = os.environ.get("WANDB_MODE") or ("online" if wandb.login(prompt=False) else "offline")
    engine.accelerator.init_trackers(
        "rectvlm",
        config=config.model_dump(mode="json"),
        init_kwargs={
            "wandb": {
                "dir": str(folder),
                "name": f"{config.name}-{folder.name}",
                "mode": mode,
                "settings": wandb.Settings(silent=True, console="off"),
            }
        },
    )
