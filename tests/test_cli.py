import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_nifti
from launches import CHECKOUT, HEAVY_LIBRARIES, imported_libraries

import rectvlm
from rectvlm import cli


def test_help_is_quick_because_nothing_heavy_is_imported():
    code = (
        "import sys, rectvlm.cli; "
        "heavy = {'torch', 'transformers', 'numpy', 'sklearn'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    done = subprocess.run(
        [sys.executable, "-m", "rectvlm", "--help"], capture_output=True, text=True, check=True
    )
    for command in ("predict", "evaluate", "weights", "version"):
        assert command in done.stdout


def test_a_users_error_is_one_sentence_and_exit_code_2(tmp_path, capsys):
    code = cli.main(
        [
            "predict",
            str(tmp_path / "gone.nii"),
            "--checkpoint",
            str(tmp_path),
            "--out",
            str(tmp_path / "o"),
        ]
    )
    error = capsys.readouterr().err
    assert (
        code == 2
        and error.startswith("rectvlm: ")
        and error.count("\n") == 1
        and "gone.nii" in error
    )


@pytest.mark.parametrize(
    "arguments", [[], ["predict"], ["evaluate", "--checkpoint", "x", "--limit", "0"]]
)
def test_wrong_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and "usage: rectvlm" in capsys.readouterr().err


def test_predict_prints_the_pages_and_nothing_else(tiny_run, phantoms, tmp_path):
    """In a process of its own: libraries that are imported must not write to stdout either."""
    file = write_nifti(phantoms(1).hu, phantoms(1).affine, tmp_path / "chest.nii.gz")
    command = [
        sys.executable,
        "-m",
        "rectvlm",
        "predict",
        str(file),
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        [*command, "--checkpoint", str(tiny_run(3))], capture_output=True, text=True, check=True
    )
    page = tmp_path / "out" / "chest" / "index.html"
    assert done.stdout == f"{page}\n" and page.is_file()


def test_evaluate_prints_a_table_and_where_the_metrics_are(
    tiny_run, phantom_shards, tmp_path, capsys
):
    out = tmp_path / "metrics.json"
    arguments = [
        "evaluate",
        "--checkpoint",
        str(tiny_run(2)),
        "--shards",
        str(phantom_shards),
        "--out",
        str(out),
    ]
    assert cli.main([*arguments, "--no-reports", "--limit", "2", "--batch-size", "2"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == str(out) and "macro auroc" in printed.lower()
    result = json.loads(out.read_text())
    assert result["n_cases"] == 2 and result["reports"] is None


def test_an_unusable_device_is_named(tiny_run, tmp_path, capsys):
    code = cli.main(["evaluate", "--checkpoint", str(tiny_run(1)), "--device", "abacus"])
    assert code == 2 and "'abacus'" in capsys.readouterr().err


def test_weights_pull_builds_a_bundled_model(capsys):
    assert cli.main(["weights", "pull", "tiny-bert"]) == 0
    assert (Path(capsys.readouterr().out.strip()) / "config.json").is_file()
    assert cli.main(["weights", "pull", "nothing"]) == 2
    assert "nothing" in capsys.readouterr().err


MISTAKES = {
    "predict {0}/gone.nii --checkpoint {0} --out {0}/out": "gone.nii does not exist",
    "predict {0} --checkpoint {0}/gone --out {0}/out": "No checkpoint in",
    "predict {0} --checkpont {0} --out {0}/out": "did you mean --checkpoint",
    "predict dicomweb://pacs.example/studies/1.2 --checkpoint {0} --out {0}/o": "unencrypted over",
    "serve {0}/gone": "No checkpoint in",
    "serve {0} --host 0.0.0.0": "expected a secret in RECTVLM_TOKEN",
    "evaluate --checkpoint {0}/gone": "No checkpoint in",
    "evaluate --checkpoint {0} --truth {0}/gone": "is not a folder",
    "evaluate --checkpoint {0} --split vald": "did you mean valid?",
    "embed {0}/gone --checkpoint {0} --out {0}/f.npz": "gone does not exist",
    "embed {0} --checkpoint {0} --out {0}/f.txt": "ends with .safetensors or .npz",
    "embed {0} --checkpoint {0}/gone --out {0}/f.npz": "No checkpoint in",
    "embed {0} --out {0}/f.npz": "give --checkpoint DIR of a run, or --config",
    "embed {0} --config tiny encoder.dpth=3 --out {0}/f.npz": "did you mean 'depth'",
    "probe {0}/gone.npz": "gone.npz is no file",
    "plan --config dmo": "No configuration 'dmo'",
    "plan --config tiny encoder.dpth=3": "did you mean 'depth'",
    "plan --config tiny --gpus none": "--gpus takes a number",
    "plan --config tiny --ds-configs {0}/gone": "cannot be read",
    "export --checkpoint {0}/gone --out {0}/out": "No checkpoint in",
    "weights verify {0}/gone": "gone",
    "weights vrify {0}/gone": "did you mean verify?",
    "predct": "did you mean predict?",
    "--versoin": "did you mean --version",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_is_told_before_anything_heavy_is_imported(words, tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "rectvlm", *words.format(tmp_path).split()]
    code, output, libraries = imported_libraries(command, CHECKOUT)
    assert code == 2 and MISTAKES[words] in output
    assert not libraries & HEAVY_LIBRARIES
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "words",
    ["--help", "--version"]
    + [f"{command} --help" for command in ("predict", "evaluate", "embed", "probe", "plan")],
)
def test_help_imports_nothing_heavy(words):
    command = [sys.executable, "-X", "importtime", "-m", "rectvlm", *words.split()]
    code, output, libraries = imported_libraries(command, CHECKOUT)
    assert code == 0 and "rectvlm" in output
    assert not libraries & HEAVY_LIBRARIES


@pytest.mark.parametrize(
    ("group", "action"), [("", "predict"), ("weights", "pull"), ("runs", "list")]
)
def test_a_command_without_its_action_prints_its_help(group, action, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(group.split())
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and f"usage: rectvlm {group}".strip() in printed
    assert action in printed and "--help" in printed


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"rectvlm {rectvlm.__version__}\n"


PROGRAMS = sorted(
    ".".join(path.relative_to(CHECKOUT).with_suffix("").parts).removesuffix(".__main__")
    for folder in ("data_pipeline", "launch", "benchmarks")
    for path in (CHECKOUT / folder).rglob("*.py")
    if 'if __name__ == "__main__"' in path.read_text()
)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_has_a_help_and_refuses_what_it_does_not_know(program):
    command = [sys.executable, "-m", program]
    shown = subprocess.run([*command, "--help"], cwd=CHECKOUT, capture_output=True, text=True)
    assert shown.returncode == 0 and shown.stdout.startswith("usage: ")
    refused = subprocess.run([*command, "--hlep"], cwd=CHECKOUT, capture_output=True, text=True)
    assert refused.returncode == 2 and "did you mean --help" in refused.stderr


def test_the_sample_cts_are_not_fetched_for_a_help(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    for option, code in (("--help", 0), ("--hlep", 2)):
        done = subprocess.run(
            [sys.executable, "-m", "data_pipeline.sample_cts", option],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == code and "usage: " in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_command_without_its_streams_does_its_work(closed, tmp_path):
    command = f'exec "$0" -m rectvlm weights list --from "$1" {closed}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable, str(tmp_path)],
        cwd=CHECKOUT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
