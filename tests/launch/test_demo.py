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

import numpy as np
import pytest
import yaml
from conftest import write_nifti
from rich.console import Console
from rich.progress import Progress

from data_pipeline.sample_cts import SAMPLE_CTS
from launch.commands import (
    TWO_CPU_PROCESSES,
    Command,
    CommandFailed,
    FinishedCommand,
    _show_step,
    run_command,
)
from launch.demo import CASES, DemoCases, add_run_overrides, find_size, main, plan_commands
from launch.demo_summary import (
    CaseCounts,
    DemoSummary,
    RealCt,
    make_result_tables,
    measure_real_cts,
    summarize_demo,
    to_markdown,
)
from launch.demo_targets import DemoTarget, LesionScores
from rectvlm.config import load_config
from rectvlm.evaluate.run import evaluate_checkpoint
from rectvlm.labels import LOBES
from rectvlm.phantom.patient_plan import PLAIN_STYLE
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


def test_the_console_loads_no_library_that_warns() -> None:
    """The models run in processes of their own, whose output goes to logs."""
    code = (
        "import sys, launch.demo; print(sorted({'transformers', 'bitsandbytes'} & {*sys.modules}))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (process.stdout.strip(), process.stderr) == ("[]", "")


def test_make_hands_the_download_to_the_pipeline() -> None:
    """A dry run prints the commands, which the shell would then read."""
    lines = make(
        "-n", "preprocess", "CT_RATE=/data/my CT-RATE", "OUT=s3://bucket/shards", "ARGS=--limit 3"
    ).stdout
    assert '--ct-rate "/data/my CT-RATE" --out "s3://bucket/shards"' in " ".join(
        lines.replace("\\", "").split()
    )
    assert "--limit 3" in lines


CASES_4 = DemoCases(train=4, valid=2, reports=1)


def test_the_commands_are_those_a_user_would_type() -> None:
    commands = plan_commands("demo", ["name=other"], CASES_4)
    names = [command.name for command in commands]
    assert names[:4] == ["shards", "phase 1", "phase 2", "phase 3"]
    assert names[4:] == ["evaluation", "held-out case", "sample CTs", "real CTs"]
    shards, *phases = commands[:4]
    assert shards.command[shards.command.index("--phantom-style") + 1] == "plain"
    assert shards.command[shards.command.index("--phantoms") + 1] == "4"
    assert "--no-samples" not in shards.command
    for phase in phases:
        assert phase.command[1:4] == ("launch", "--config_file", TWO_CPU_PROCESSES)
        assert "name=other" in phase.command and (CHECKOUT / phase.command[4]).is_file()
        assert phase.metrics_path is not None and phase.metrics_path.parts[:2] == ("runs", "other")
    for command in (*commands[4:6], *commands[7:]):
        assert "runs/other/phase3" in command.command
    assert "data/samples/cts" in commands[7].command
    assert commands[5].command[2:5] == ("data/shards/demo", "--keys", "phantom_100001")


def test_the_demo_trains_with_zero_3_and_4_bits() -> None:
    """No command takes the engine that phase 3 runs by default away."""
    commands = plan_commands("demo", [], CASES_4)
    assert not any("--ds-config" in command.command for command in commands)
    assert load_config("demo").generator.quantization == "nf4"


def test_a_proof_of_learning_has_its_own_cases() -> None:
    assert (find_size("demo"), find_size("learn"), find_size("tiny")) == ("demo", "learn", "demo")
    assert CASES["learn", "complete"].train > CASES["demo", "complete"].train
    assert "--no-samples" in plan_commands("learn", [], CASES_4)[0].command


def test_a_supervision_has_its_own_cases_shards_and_run() -> None:
    overrides = add_run_overrides("learn", ["train.seed=3"], "ct-rate")
    config = load_config("learn", overrides)
    assert (config.name, config.train.seed) == ("learn-ct-rate", 3)
    assert str(config.data.shards) == "data/shards/learn-ct-rate"
    commands = plan_commands("learn", overrides, CASES_4, supervision="ct-rate")
    shards, evaluation = commands[0].command, commands[4].command
    assert shards[shards.index("--phantom-style") + 1] == "ct-rate"
    assert shards[shards.index("--phantom-supervision") + 1] == "ct-rate"
    assert evaluation[evaluation.index("--convention") + 1] == "ct-rate"
    assert "runs/learn-ct-rate/phase3" in evaluation
    assert add_run_overrides("learn", ["name=other"], "complete") == ["name=other"]
    mine = load_config("learn", add_run_overrides("learn", ["name=other"], "ct-rate"))
    assert mine.name == "other"


def test_a_phase_that_the_configuration_lacks_is_named(tmp_path: Path) -> None:
    tree = yaml.safe_load((CHECKOUT / "rectvlm" / "configs" / "tiny.yaml").read_text())
    del tree["train"]["phases"]["phase3"]
    short = tmp_path / "short.yaml"
    short.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"train\.phases\.phase3"):
        plan_commands(str(short), [], CASES_4)


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
            Command("phase 9", (sys.executable, "-c", code), 1),
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
    summary = summarize_demo(demo_folder, [1], done, "demo", "complete", PLAIN_STYLE)
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
    assert summary.cases.valid == 3 and summary.cases.reports == 0
    assert summary.lesions == {} and summary.real_cts == []
    assert [Path(page).parent.name for page in summary.pages] == ["case"]
    assert summary.machine["cores"] >= 1 and summary.seconds == 15.5
    json.dumps(summary.to_json(), allow_nan=False)
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
    _show_step(Command("phase 1", (), 1, 8, path), time.monotonic() - 60, shown, bar)
    assert shown.tasks[0].description == "step 3 of 8, loss –"


def test_the_check_of_continuous_integration_sees_what_is_missing(demo_folder: Path) -> None:
    spec = importlib.util.spec_from_file_location(
        "check_summary", CHECKOUT / ".ci" / "check_summary.py"
    )
    assert spec is not None and spec.loader is not None
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    real_ct = RealCt("case", 10.0, 0.0, 1.0, 0.5)
    done = [FinishedCommand("phase 1", "…", 12.5, "log")]
    measured = summarize_demo(demo_folder, [1], done, "demo", "complete", PLAIN_STYLE)
    summary = replace(measured, targets=[], real_cts=[real_ct, real_ct]).to_json()
    found = check.faults(summary)
    assert any("engine" in fault for fault in found) and any(
        "phases are [1]" in fault for fault in found
    )
    row = summary["phases"][0] | {"loss_first": 2.0, "loss_last": 1.0}
    whole = summary | {"engine": check.ENGINE, "phases": [row | {"phase": n} for n in (1, 2, 3)]}
    assert check.faults(whole) == []
    risen = [row | {"phase": 1}, row | {"phase": 2}, row | {"phase": 3, "loss_last": 3.0}]
    assert check.faults(whole | {"phases": risen}) == ["the loss of phase 3 went from 2.0 to 3.0"]
    one = {"real_cts": [asdict(real_ct)]}
    assert check.faults(whole | one) == ["1 of 2 real CTs were predicted"]
    assert check.faults(whole | {"pages": []}) == ["no pages"]
    assert check.faults(whole | {"pages": ["/none"]}) == ["/none is not there"]
    missed = [asdict(DemoTarget(name, 0.9, 0.5)) | {"met": False} for name in ("AUROC", "minutes")]
    assert check.faults(whole | {"targets": missed}) == ["AUROC is 0.5, wanted 0.9"]
    assert check.faults(whole | {"targets": [missed[0] | {"found": 0.89}]}) == []
    assert check.faults(whole | {"targets": [missed[0] | {"found": None}]}) != []


def test_a_real_ct_says_how_much_of_its_tumour_was_found(tmp_path: Path) -> None:
    """A half of a tumour is outlined, and a block in the arm."""
    phantom = make_phantom(100_003)
    samples, case = tmp_path / "samples", tmp_path / "predictions" / SAMPLE_CTS[0].name
    samples.mkdir()
    case.mkdir(parents=True)
    is_lung = phantom.hu < -700
    tumour, bits = np.zeros(phantom.hu.shape, np.uint8), np.zeros(phantom.hu.shape, np.uint8)
    body = np.argwhere(phantom.regions == LOBES[0].id)
    middle = tuple(slice(n - 2, n + 2) for n in body[len(body) // 2])
    tumour[middle] = 1
    bits[middle] = 16
    first = body[len(body) // 2][0]
    bits[first : first + 2, middle[1], middle[2]] = 0
    for array, path in (
        (phantom.hu, SAMPLE_CTS[0].volume_path(samples)),
        (tumour, SAMPLE_CTS[0].mask_path(samples)),
    ):
        path.parent.mkdir()
        write_nifti(array, phantom.affine, path)
    write_nifti(bits, phantom.affine, case / "lesions.nii.gz")
    (inside,) = measure_real_cts(tmp_path / "predictions", samples)
    assert is_lung.any() and inside.tumour_share_found == 0.5 and inside.outside_chest_ml == 0
    assert inside.outlined_ml == pytest.approx(inside.tumour_ml / 2, abs=0.1)
    bits[0, 0, :4] = 16  # air at the corner of the field of view
    write_nifti(bits, phantom.affine, case / "lesions.nii.gz")
    (outside,) = measure_real_cts(tmp_path / "predictions", samples)
    assert outside.outside_chest_ml > 0
    assert "50%" in outside.describe()


def test_the_tables_say_what_is_missing() -> None:
    summary = DemoSummary(
        config="learn",
        size="learn",
        supervision="complete",
        engine={
            "distributed_type": "DEEPSPEED",
            "zero_stage": 3,
            "world_size": 2,
            "llm_quantization": "nf4",
        },
        targets=[DemoTarget("good", 0.95, 0.97), DemoTarget("bad", 0.95, None)],
        beside={"another figure": 0.5},
        report_scores={"BLEU-4": {"language model": "0.5 [0.4, 0.6]", "prevalence": "0.1"}},
        table_comparison="The table wins.",
        findings={"Emphysema": None},
        lesions={"lung_nodule": LesionScores(0.7, 0.6, 0.8, 0.5, 12.5)},
        cases=CaseCounts(train=4, valid=2, reports=1),
        real_cts=[RealCt("lung1", 10.0, 0.0, 1.36, 0.5)],
        pages=[],
        phases=[],
        evaluation="metrics.json",
        machine={"cores": 2, "cpu": "one"},
        versions={},
        stages=[FinishedCommand("shards", "…", 3.0, "log", 5.0)],
        seconds=3.0,
    )
    text = to_markdown(summary)
    assert "| good | ≥ 0.95 | 0.970 | yes |" in text and "| bad | ≥ 0.95 | – | no |" in text
    assert "| all | 3 | 5 |" in text
    assert "| reports | language model | prevalence |" in text
    assert "| BLEU-4 | 0.5 [0.4, 0.6] | 0.1 |\n\nThe table wins.\n" in text
    assert "| lung nodule | 0.700 | 0.600 | 0.800 | 0.500 | 12.500 |" in text
    assert [len(table.rows) for table in make_result_tables(summary)] == [0, 1, 2]
    tree = json.loads(json.dumps(summary.to_json(), allow_nan=False))
    assert [target["met"] for target in tree["targets"]] == [True, False]
    assert tree["lesions"]["lung_nodule"]["dice"] == 0.6 and tree["cases"]["train"] == 4
