"""The runner of all benchmarks: sizes, limits, and what becomes of a section that fails."""

import json
from pathlib import Path

import pytest

from benchmarks import compare, run
from benchmarks.run import PROGRAMS, SCALES, SECTIONS, Hardware, run_section

SMALL = Hardware(cores=2, memory_bytes=3e9, gpus=0, gpu_bytes=0)
LARGE = Hardware(cores=16, memory_bytes=1e11, gpus=1, gpu_bytes=140e9)


@pytest.mark.parametrize("hardware", [SMALL, LARGE])
@pytest.mark.parametrize("scale", SCALES)
def test_every_program_takes_the_arguments_that_are_chosen(
    scale: run.Scale, hardware: Hardware
) -> None:
    import importlib

    for section in SECTIONS:
        module = importlib.import_module(f"benchmarks.{section.program}")
        module._parse_arguments(section.choose_arguments(hardware, scale))


def test_sizes_fit_the_machine() -> None:
    assert (SMALL.config, SMALL.slices, SMALL.worker_counts) == ("demo", "100", ["1", "2"])
    assert (LARGE.config, LARGE.slices, LARGE.process_counts) == ("large", "300", ["1"])


def test_a_section_without_figures_says_why() -> None:
    failed, versions = run_section("machine_limits", ["--rounds", "none"], 300)
    assert failed.failure is not None and not versions
    assert failed.failure.startswith("exit code 2: ") and "--rounds" in failed.failure
    late, _ = run_section("machine_limits", [], 0.05)
    assert late.failure is not None and "had not ended" in late.failure


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf", "ten"])
def test_a_time_that_is_none_is_refused(minutes: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--minutes", minutes])
    assert "expected a number of minutes above 0" in capsys.readouterr().err


def test_an_output_that_is_a_file_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results").touch()
    assert run.main(["--sections", "overhead", "--out", str(tmp_path / "results")]) == 1
    assert str(tmp_path / "results") in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_one_folder_that_can_be_compared(tmp_path: Path) -> None:
    sections = ["--sections", "machine_limits", "attention", "encoder"]
    assert run.main(["--scale", "smallest", *sections, "--out", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    results = json.loads((folder / "results.json").read_text())
    names = [section["name"] for section in results["sections"]]
    assert names == ["machine_limits", "attention", "encoder"]
    assert results["versions"]["torch"] and results["git"]["commit"]
    for section in results["sections"]:
        assert section["comparisons"] and section["failure"] is None
        for comparison in section["comparisons"]:
            for measurement in comparison["measurements"]:
                assert all(value > 0 for value in measurement["values"])
    report = (folder / "report.md").read_text()
    assert "## Limits of the machine" in report and "python -m benchmarks.encoder" in report
    for picture in folder.glob("*.png"):
        assert f"({picture.name})" in report
    assert compare.main([str(folder), str(folder)]) == 0


def test_every_benchmark_of_a_machine_is_in_the_run() -> None:
    folder = Path(run.__file__).parent
    programs = {path.stem for path in folder.glob("*.py") if "PROGRAM = " in path.read_text()}
    # It asks whether weights help, not how fast something is.
    assert programs - {"inflated_start"} == set(PROGRAMS)
