"""What a newcomer types: make's targets, the demo's stages, and its summary of a real run."""

import importlib.util
import io
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml
from conftest import write_nifti
from rich.console import Console
from rich.progress import Progress

from launch.demo import (
    SAMPLE_CT,
    CommandFailed,
    DemoCommand,
    FinishedCommand,
    _show_step,
    main,
    make_result_tables,
    plan_commands,
    run_command,
    summarize_demo,
)
from rectvlm.evaluate.run import evaluate_checkpoint
from rectvlm.phantom.phantom import make_phantom
from rectvlm.predict.run import predict_cases
from rectvlm.types import UserError

CHECKOUT = Path(__file__).resolve().parents[2]


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *arguments], cwd=CHECKOUT, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def demo_folder(launched_phase1: Path, phantom_shards: Path) -> Path:
    """A real run of phase 1 with its evaluation and a predicted case."""
    folder = launched_phase1.parent
    evaluate_checkpoint(launched_phase1, phantom_shards, out=folder / "evaluation" / "metrics.json")
    phantom = make_phantom(3)
    predict_cases(
        write_nifti(phantom.hu, phantom.affine, folder / "case.nii.gz"),
        launched_phase1,
        folder / "predictions",
        "cpu",
    )
    return folder


def test_help_lists_every_target() -> None:
    listed = make().stdout
    for target in ("help", "setup", "preprocess", "demo", "test", "test-slow", "bench", "clean"):
        assert f"\n  {target} " in listed
    assert listed == make("help").stdout


def test_make_hands_the_download_to_the_pipeline() -> None:
    """A dry run prints the commands, which the shell would then read."""
    lines = make(
        "-n", "preprocess", "CT_RATE=/data/my CT-RATE", "OUT=s3://bucket/shards", "ARGS=--limit 3"
    ).stdout
    assert '--ct-rate "/data/my CT-RATE" --out "s3://bucket/shards"' in " ".join(
        lines.replace("\\", "").split()
    )
    assert "--limit 3" in lines


def test_the_commands_are_those_a_user_would_type() -> None:
    stages = plan_commands("demo", ["name=other"], [1, 2, 3], "launch/accelerate/cpu2.yaml")
    names = [stage.name for stage in stages]
    assert names == ["shards", "phase 1", "phase 2", "phase 3", "evaluation", "prediction"]
    for stage in stages[1:4]:
        assert stage.command[1:4] == ("launch", "--config_file", "launch/accelerate/cpu2.yaml")
        assert "name=other" in stage.command
        assert stage.metrics_path is not None and stage.metrics_path.parts[:2] == ("runs", "other")
    assert "runs/other/phase3" in stages[4].command
    assert SAMPLE_CT in stages[5].command
    for stage in stages:
        assert (CHECKOUT / stage.command[4]).is_file() or not stage.name.startswith("phase")


def test_a_phase_that_the_configuration_lacks_is_named(tmp_path: Path) -> None:
    tree = yaml.safe_load((CHECKOUT / "rectvlm" / "configs" / "tiny.yaml").read_text())
    del tree["train"]["phases"]["phase3"]
    short = tmp_path / "short.yaml"
    short.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"train\.phases\.phase3"):
        plan_commands(str(short), [], [1, 2, 3], "launch/accelerate/cpu2.yaml")


def test_a_wrong_configuration_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(CHECKOUT)
    assert main(["--config", "demo", "encoder.widht=3"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error and "width" in error


def test_a_failed_command_is_an_error_with_its_log(tmp_path: Path) -> None:
    code = "import sys; print('what went wrong'); sys.exit(3)"
    with pytest.raises(CommandFailed, match="exit code 3") as failed:
        run_command(
            DemoCommand("phase 9", (sys.executable, "-c", code), 1),
            tmp_path,
            dict(os.environ),
            Console(stderr=True),
        )
    assert failed.value.log_path.read_text() == "what went wrong\n"


def test_the_summary_says_what_the_run_wrote(demo_folder: Path) -> None:
    done = [
        FinishedCommand("phase 1", "…", 12.5, "log"),
        FinishedCommand("evaluation", "…", 3.0, "log"),
    ]
    summary = summarize_demo(demo_folder, [1], done)
    lines = [
        json.loads(line)
        for line in (demo_folder / "phase1" / "metrics.jsonl").read_text().splitlines()
    ]
    assert summary.engine == {
        "distributed_type": "DEEPSPEED",
        "zero_stage": 1,
        "world_size": 1,
        "llm_quantization": None,
    }
    (phase,) = summary.phases
    assert (phase.phase, phase.steps, phase.seconds, phase.loss_over) == (1, 6, 12.5, 3)
    assert phase.loss_first == pytest.approx(sum(line["loss"] for line in lines[:3]) / 3)
    assert phase.loss_last == pytest.approx(sum(line["loss"] for line in lines[-3:]) / 3)
    assert phase.losses["classification"].last == pytest.approx(phase.loss_last)
    assert summary.evaluation.n_cases == 3
    assert summary.evaluation.reports is None and summary.evaluation.dice == {}
    (prediction,) = summary.predictions
    assert prediction.case == "case" and Path(prediction.page).is_file()
    assert summary.machine["cores"] >= 1 and summary.seconds == 15.5
    json.dumps(asdict(summary), allow_nan=False)
    console = Console(record=True, width=100, file=io.StringIO())
    console.print(*make_result_tables(summary))
    assert f"{phase.loss_last:.3f}" in console.export_text()
    without_loss = replace(phase, loss_last=None)  # its steps were skipped
    console.print(*make_result_tables(replace(summary, phases=[without_loss])))


def test_a_step_without_a_loss_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 3, "loss": None}) + "\n")
    shown = Progress(console=Console(file=io.StringIO()))
    bar = shown.add_task("phase 1", total=8)
    _show_step(DemoCommand("phase 1", (), 1, 8, path), time.monotonic() - 60, shown, bar)
    assert shown.tasks[0].description == "step 3 of 8, loss –"


def test_the_check_of_continuous_integration_sees_what_is_missing(demo_folder: Path) -> None:
    spec = importlib.util.spec_from_file_location(
        "check_summary", CHECKOUT / ".ci" / "check_summary.py"
    )
    assert spec is not None and spec.loader is not None
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    summary = asdict(
        summarize_demo(demo_folder, [1], [FinishedCommand("phase 1", "…", 12.5, "log")])
    )
    found = check.faults(summary)
    assert any("engine" in fault for fault in found) and any(
        "phases are [1]" in fault for fault in found
    )
    row = summary["phases"][0] | {"loss_first": 2.0, "loss_last": 1.0}
    whole = summary | {"engine": check.ENGINE, "phases": [row | {"phase": n} for n in (1, 2, 3)]}
    assert check.faults(whole) == []
    risen = [row | {"phase": 1}, row | {"phase": 2}, row | {"phase": 3, "loss_last": 3.0}]
    assert check.faults(whole | {"phases": risen}) == ["the loss of phase 3 went from 2.0 to 3.0"]
    assert check.faults(whole | {"predictions": []}) == ["no predictions"]
