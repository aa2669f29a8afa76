"""What `accelerate launch` exports from a user's default file, and what becomes of it."""

import json
import os
import subprocess
from pathlib import Path

import launches
import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

from rectvlm.train.engine.launcher_settings import (
    check_process_count,
    follow_use_cpu,
    lacks_processes,
    take_launcher_settings,
)
from rectvlm.types import UserError

CPU_FILE = """
compute_environment: LOCAL_MACHINE
distributed_type: 'NO'
machine_rank: 0
main_training_function: main
num_machines: 1
num_processes: 1
use_cpu: true
"""
"""As `accelerate config default` writes it on a CPU machine, without `mixed_precision`."""
DYNAMO = """
debug: true
dynamo_config: {dynamo_backend: INDUCTOR, dynamo_mode: max-autotune}
mixed_precision: fp16
"""
DEEPSPEED_FILE = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config:
  gradient_accumulation_steps: 4
  gradient_clipping: 2.5
  offload_optimizer_device: cpu
  zero3_init_flag: true
  zero_stage: 3
mixed_precision: fp16
main_process_port: 0
num_machines: 1
num_processes: 2
use_cpu: false
"""
FSDP_FILE = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config: {fsdp_version: 2, fsdp_offload_params: true, fsdp_cpu_ram_efficient_loading: true}
parallelism_config: {parallelism_config_tp_size: 2}
mixed_precision: bf16
main_process_port: 0
num_machines: 1
num_processes: 2
use_cpu: false
"""


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests change the process's environment; it is restored afterwards."""
    names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")
    for name in [*os.environ]:
        if name in names or name.startswith(("ACCELERATE_", "FSDP_", "SLURM_", "PMI_", "OMPI_")):
            monkeypatch.delenv(name)


def export(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str, *options: str) -> None:
    """Export what Accelerate's launcher makes of a config file."""
    path = folder / "default_config.yaml"
    path.write_text(text)
    words = ["--config_file", str(path), *options, "launch/phase1.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = "zero_stage,mixed_precision"
        environment = prepare_deepspeed_cmd_env(args)[1]
    elif args.use_fsdp:
        environment = prepare_multi_gpu_env(args)
    else:
        environment = prepare_simple_launcher_cmd_env(args)[1]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            monkeypatch.setenv(name, value)


def test_a_cpu_machines_default_file_hides_gpus_and_asks_for_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    export(monkeypatch, tmp_path, CPU_FILE)
    follow_use_cpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    settings = take_launcher_settings()
    assert settings.followed == {"ACCELERATE_USE_CPU": "True"}
    assert settings.describe_ignored() == ""
    assert "ACCELERATE_USE_CPU" not in os.environ  # Accelerate would drop DeepSpeed


def test_gpus_stay_where_the_file_does_not_ask_for_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    export(monkeypatch, tmp_path, CPU_FILE.replace("true", "false"))
    follow_use_cpu()
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_compiling_and_precision_are_removed_and_named_and_debugging_stays(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    export(monkeypatch, tmp_path, CPU_FILE + DYNAMO)
    settings = take_launcher_settings()
    assert settings.describe_ignored() == "dynamo_backend INDUCTOR, mixed_precision fp16"
    assert settings.ignored["ACCELERATE_DYNAMO_MODE"] == "max-autotune"
    left = [name for name in os.environ if name.startswith("ACCELERATE_")]
    assert left == ["ACCELERATE_DEBUG_MODE"]


def test_the_deepspeed_section_of_a_default_file_does_not_decide(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    export(monkeypatch, tmp_path, DEEPSPEED_FILE)
    words = take_launcher_settings().describe_ignored()
    for setting in ("zero_stage 3", "offload_optimizer_device cpu", "gradient_clipping 2.5"):
        assert setting in words
    assert "gradient_accumulation_steps 4" in words and "mixed_precision fp16" in words
    assert not [name for name in os.environ if name.startswith("ACCELERATE_")]


def test_fsdp_and_tensor_parallelism_of_a_default_file_do_not_decide(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    export(monkeypatch, tmp_path, FSDP_FILE, "--fsdp_version", "2")
    settings = take_launcher_settings()
    assert "use_fsdp true" in settings.describe_ignored()
    assert settings.ignored["FSDP_OFFLOAD_PARAMS"] == "true"
    prefixes = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")
    assert not [name for name in os.environ if name.startswith(prefixes)]


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_processes_without_ranks_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    check_process_count(0)
    monkeypatch.setenv(name, "4")
    with pytest.raises(UserError, match=f"4 processes were started \\({name}\\)"):
        check_process_count(0)
    monkeypatch.setenv("RANK", "3")
    check_process_count(0)


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "2", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    check_process_count(4)
    with pytest.raises(UserError, match=r"4 processes were started .* 2 GPUs are visible"):
        check_process_count(2)


def test_several_cpu_processes_that_accelerate_does_not_start_are_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    export(monkeypatch, tmp_path, CPU_FILE)
    assert not lacks_processes()
    export(monkeypatch, tmp_path, CPU_FILE.replace("num_processes: 1", "num_processes: 3"))
    assert lacks_processes()
    check_process_count(0)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.7")
    with pytest.raises(UserError, match=r"several machines \(the first is 10\.0\.0\.7\)"):
        check_process_count(0)


@pytest.mark.slow
def test_readmes_command_works_beside_any_default_file(
    tmp_path: Path, phantom_shards: Path
) -> None:
    file = tmp_path / "hf" / "accelerate" / "default_config.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(CPU_FILE + DYNAMO)
    arguments = launches.settings(1, phantom_shards, tmp_path / "runs", steps=1)
    process = subprocess.run(
        [*launches.LAUNCH, "launch/phase1.py", *arguments],
        cwd=launches.CHECKOUT,
        env=launches.environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    assert "dynamo_backend INDUCTOR, mixed_precision fp16 are not followed" in process.stderr
    engine = json.loads((tmp_path / "runs" / "tiny" / "phase1" / "engine.json").read_text())
    assert (engine["mixed_precision"], engine["dynamo_backend"]) == ("bf16", "NO")
    assert engine["launcher"]["followed"]["ACCELERATE_USE_CPU"] == "True"
    assert engine["launcher"]["ignored"]["ACCELERATE_DYNAMO_BACKEND"] == "INDUCTOR"
