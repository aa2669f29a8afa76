"""Checkpoints: seconds to save, to load and to resume, and from the command to the first step.

    python -m benchmarks.checkpoint_times [--config demo] [--phases 1 2 3] [--rounds 3]

A phase is built with random weights and its engine, as in `benchmarks.phase_step`, and takes a
step, so that the optimizer has a state. Then it saves, reads the weights and resumes the
optimizer's state from the same folder, in turns. Saving counts checksums and flushing to disk;
files are in the system's cache when they are read. The time to the first step is that of
`accelerate launch launch/phase1.py` on one process, from the command to the first line of
metrics.jsonl.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measurements import Comparison, Repetitions
from benchmarks.phase_step import (
    PHASE_NAMES,
    EngineSteps,
    StepSettings,
    write_long_report_shards,
)
from benchmarks.publishing import (
    CHECKOUT,
    LaunchFailed,
    Program,
    add_config_options,
    make_parser,
    positive_int,
    prepare_engine_environment,
    publish_result,
    quiet_main,
)
from benchmarks.timing import run_in_new_process
from benchmarks.train_step import make_launch_command, make_phantom_shards
from rectvlm.config import load_config
from rectvlm.types import JsonObject

OPERATIONS = ("save", "read weights", "resume optimizer")
_POLL_SECONDS = 0.02
_MAX_START_SECONDS = 1800.0


def measure_checkpoints(settings: StepSettings, work: Path) -> JsonObject:
    """Measure the seconds of every operation by round, and the size of a checkpoint."""
    from rectvlm.checkpoint import Checkpoint, run_folder
    from rectvlm.train.recovery.position import TrainingPosition
    from rectvlm.train.recovery.save import save_checkpoint

    steps = EngineSteps.start(settings, work)
    engine, config, phase = steps.engine, settings.load_config(), settings.find_phase()
    steps.take_step(lambda _: None)
    names = steps.model.checkpoint_tensor_names()
    keeps_ema = phase.get_settings(config).ema_decay > 0
    seconds: dict[str, list[float]] = {operation: [] for operation in OPERATIONS}
    for number in range(1, settings.rounds + 1):
        position = TrainingPosition(number, number)
        times = [time.perf_counter()]
        is_saved = save_checkpoint(engine, phase, config, work, names, position)
        assert is_saved, "the checkpoint could not be written"
        times.append(time.perf_counter())
        folder = run_folder.step_folder(work, number)
        checkpoint = Checkpoint.open(folder)
        checkpoint.read_tensors(phase.parts)
        times.append(time.perf_counter())
        engine.load_optimizer_shards(checkpoint.engine_folder, engine.world_size, keeps_ema)
        times.append(time.perf_counter())
        for operation, start, end in zip(OPERATIONS, times, times[1:], strict=False):
            seconds[operation].append(end - start)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    engine.close()
    return {"phase": settings.phase, "seconds": seconds, "checkpoint_bytes": size}


def measure_first_step(size: str, shards: Path, runs: Path) -> float:
    """Return the seconds from the command of phase 1 to its first step.

    Raises:
        LaunchFailed: the run ended before its first step, or took too long.
    """
    key = "train.phases.phase1"
    step_samples = load_config(size).train.phases["phase1"].global_batch
    changes = [f"{key}.samples={step_samples}", f"{key}.validation.every=0"]
    folders = [f"data.shards={shards}", f"train.runs={runs}"]
    program = ["launch/phase1.py", "--config", size, "--restart", *folders, *changes]
    command, environment = make_launch_command(1, program)
    metrics = runs / load_config(size).name / "phase1" / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    start_seconds = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=CHECKOUT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not (metrics.is_file() and metrics.stat().st_size):
        if process.poll() is not None or time.monotonic() - start_seconds > _MAX_START_SECONDS:
            process.kill()
            raise LaunchFailed(f"{' '.join(command)} took no step; exit code {process.returncode}")
        time.sleep(_POLL_SECONDS)
    seconds = time.monotonic() - start_seconds
    process.wait()
    return seconds


def list_comparisons(result: JsonObject) -> list[Comparison]:
    """List the seconds of every operation by phase, and those to the first step."""
    operations, starts = Repetitions(), Repetitions()
    for row in result["rows"]:
        for operation, seconds in row["seconds"].items():
            operations.add(operation, seconds, f"phase {row['phase']}")
    starts.add("phase 1", result["first_step_seconds"])
    return [
        Comparison("Save, load and resume", "s", operations.to_measurements(), at_label="phase"),
        Comparison("Time to the first step", "s", starts.to_measurements()),
    ]


def write_text(result: JsonObject) -> str:
    """Write the circumstances and the sizes."""
    sizes: list[str] = []
    for row in result["rows"]:
        sizes.append(f"phase {row['phase']}: {row['checkpoint_bytes'] / 1e6:.1f} MB")
    return (
        f"Configuration {result['config']}, one process, {result['rounds']} rounds. A checkpoint "
        f"of {'; '.join(sizes)}.\n"
    )


PROGRAM = Program("checkpoint_times", "Checkpoints and start-up", write_text, list_comparisons)


@quiet_main
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parse_arguments(arguments)
    prepare_engine_environment()
    from rectvlm.machine import package_versions

    start_seconds = time.monotonic()
    rows: list[JsonObject] = []
    with tempfile.TemporaryDirectory(prefix="rectvlm-bench-") as temporary:
        work = Path(temporary)
        config = load_config(options.config, options.overrides)
        write_long_report_shards(config, work / "shards", 2)
        for phase in options.phases:
            settings = StepSettings(
                size=options.config,
                overrides=tuple(options.overrides),
                phase=phase,
                variant="zero3" if phase.startswith("3") else "",
                micro_batch=1,
                processes=1,
                checkpointing="configured",
                rounds=options.rounds,
                shards=str(work / "shards"),
            )
            rows.append(run_in_new_process(measure_checkpoints, settings, work / f"run{phase}"))
        make_phantom_shards(options.config, work / "phantoms")
        starts: list[float] = []
        for _ in range(min(options.rounds, 2)):
            starts.append(measure_first_step(options.config, work / "phantoms", work / "runs"))
    facts = {
        "versions": package_versions(),
        "config": config.name,
        "rounds": options.rounds,
        "rows": rows,
        "first_step_seconds": starts,
    }
    publish_result(options.out, PROGRAM, arguments, start_seconds, facts)
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("checkpoint_times", "Checkpoints and start-up.")
    add_config_options(parser, "demo")
    parser.add_argument("--phases", nargs="+", choices=PHASE_NAMES, default=["2"], metavar="PHASE")
    parser.add_argument("--rounds", type=positive_int, default=3, help="measurements (default 3)")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
