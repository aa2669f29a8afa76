"""`rectvlm predict` on folders: links, names, broken files, disks that are full."""

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from broken_cts import BROKEN
from conftest import write_nifti

from rectvlm.cli import main
from rectvlm.predict import run
from rectvlm.predict.case import predict_case
from rectvlm.predict.case_folder import remove_stale_folders
from rectvlm.predict.ct_source import CtSource
from rectvlm.predict.find_volumes import case_names, find_volumes
from rectvlm.types import UserError
from tests.small_cases import AFFINE, body


@pytest.fixture(scope="module")
def chest(tmp_path_factory):
    return write_nifti(body(1)[0], AFFINE, tmp_path_factory.mktemp("chest") / "chest.nii.gz")


def copy(chest: Path, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(chest, path)
    return path


def read_summary(out: Path) -> dict:
    return json.loads((out / "predict-summary.json").read_text())


def predict(source, checkpoint, out):
    return main(["predict", str(source), "--checkpoint", str(checkpoint), "--out", str(out)])


def make_cohort(folder: Path, n_good: int, n_broken: int) -> None:
    folder.mkdir()
    hu, _ = body(1)
    for number in range(n_good):
        write_nifti(hu + np.int16(number % 7), AFFINE, folder / f"P{number:03d}.nii.gz")
    for number in range(n_broken):
        word = list(BROKEN)[number % len(BROKEN)]
        BROKEN[word](hu, AFFINE, folder / f"X{number:03d}_{word}.nii.gz")


def check_cohort(folder: Path, checkpoint: Path, capsys, n_good: int, n_broken: int) -> None:
    make_cohort(folder, n_good, n_broken)
    out = folder.parent / "out"
    assert predict(folder, checkpoint, out) == 0
    lines = capsys.readouterr().out.splitlines()
    pages = [line for line in lines if line.endswith("index.html")]
    assert len(pages) == n_good and all(Path(page).is_file() for page in pages)
    assert len(list(out.glob("*/findings.json"))) == n_good
    summary = read_summary(out)
    assert summary["files"] == n_good + n_broken and len(summary["predicted"]) == n_good
    rows = [json.loads(line) for line in (out / "failed.jsonl").read_text().splitlines()]
    assert rows == summary["failed"] and len(rows) == n_broken
    for row in rows:
        assert row["file"] in row["reason"] and row["kind"] and "unexpected" not in row["kind"]
    assert not list(out.glob(".*"))


def test_fifteen_kinds_of_broken_files_end_no_batch(tiny_run, tmp_path, capsys):
    check_cohort(tmp_path / "cohort", tiny_run(1), capsys, 3, 15)


@pytest.mark.slow
def test_300_cts_of_which_30_are_broken_give_270_results_and_30_reasons(tiny_run, tmp_path, capsys):
    check_cohort(tmp_path / "cohort", tiny_run(1), capsys, 270, 30)


def test_linked_patients_are_predicted_and_what_is_skipped_is_listed(
    tiny_run, chest, tmp_path, caplog
):
    root, archive = tmp_path / "cohort", tmp_path / "archive"
    copy(chest, root / "P1" / "ct.nii.gz")
    copy(chest, archive / "P2" / "ct.nii.gz")
    copy(chest, archive / "P3.nii.gz")
    (root / "P2").symlink_to(archive / "P2")
    (root / "P3.nii.gz").symlink_to(archive / "P3.nii.gz")
    (root / "again.nii.gz").symlink_to(archive / "P3.nii.gz")
    os.link(root / "P1" / "ct.nii.gz", root / "P1" / "same.nii.gz")
    (root / "P1" / "up").symlink_to(root)
    (root / "gone.nii.gz").symlink_to(archive / "P9.nii.gz")
    (root / "P4").mkdir()
    for number in range(3):
        (root / "P4" / f"{number}.dcm").write_bytes(b"\0" * 128 + b"DICM")
    (root / "P5").mkdir()
    (root / "P5" / "IM0001").write_bytes(b"\0" * 128 + b"DICM")
    (root / "P6.png").write_text("no CT")
    (root / "._P1.nii.gz").write_bytes(b"AppleDouble")

    cases = run.predict_cases(root, tiny_run(1), tmp_path / "out", device="cpu")

    assert [case.name for case in cases] == ["P1_ct", "P2_ct", "P3"]
    summary = read_summary(tmp_path / "out")
    found = {os.path.relpath(row["path"], root): row["reason"] for row in summary["skipped"]}
    assert found.keys() == {
        *("again.nii.gz", "P1/same.nii.gz", "P1/up", "gone.nii.gz"),
        *("P4", "P5", "P6.png", "._P1.nii.gz"),
    }
    assert f"same file as {root / 'P3.nii.gz'}" in found["again.nii.gz"]
    assert "3 files, each of which is no CT slice" in found["P4"]
    assert "a file that is no CT slice" in found["P5"]
    for row in summary["skipped"]:
        assert row["path"] in caplog.text and row["reason"] in caplog.text


def test_a_folder_of_files_that_only_look_like_dicom_says_so(tmp_path):
    (tmp_path / "P1").mkdir()
    (tmp_path / "P1" / "1.dcm").write_bytes(b"")
    with pytest.raises(UserError, match=r"No CT in .*P1 holds a file that is not a DICOM file"):
        find_volumes(tmp_path, tmp_path / "out")


def test_a_broken_link_and_a_pipe_are_named_as_what_they_are(tmp_path):
    (tmp_path / "link.nii.gz").symlink_to("gone.nii.gz")
    os.mkfifo(tmp_path / "pipe.nii.gz")
    with pytest.raises(UserError, match=r"link.nii.gz is a broken link to gone\.nii\.gz: give"):
        find_volumes(tmp_path / "link.nii.gz", tmp_path / "out")
    with pytest.raises(UserError, match=r"pipe.nii.gz is neither a file nor a folder: give"):
        find_volumes(tmp_path / "pipe.nii.gz", tmp_path / "out")


def test_control_characters_of_a_name_are_escaped_in_the_log(tiny_run, chest, tmp_path, caplog):
    copy(chest, tmp_path / "in" / "new\nline.nii.gz")
    (tmp_path / "in" / "red\x1b[31m.nii.gz").write_bytes(b"")
    with caplog.at_level("INFO"):
        (folder,) = run.predict_cases(tmp_path / "in", tiny_run(1), tmp_path / "out", device="cpu")
    assert folder.name == "new\nline"
    assert "new\\x0aline" in caplog.text and "red\\x1b[31m" in caplog.text
    assert "\x1b" not in caplog.text


def test_what_a_killed_process_left_is_removed_and_work_of_others_is_not(tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    stale = tmp_path / f".case.{platform.node()}.{killed.pid}.tmp"
    own = tmp_path / f".case.{platform.node()}.{os.getpid()}.tmp"
    elsewhere = tmp_path / f".case.another-machine.{killed.pid}.tmp"
    for folder in (stale, own, elsewhere):
        folder.mkdir()
    remove_stale_folders(tmp_path)
    assert not stale.exists() and own.exists() and elsewhere.exists()


def test_results_are_no_inputs(tmp_path, chest):
    root = tmp_path / "in"
    copy(chest, root / "P1.nii.gz")
    for folder in ("out/P1", "earlier/P1"):
        (root / folder).mkdir(parents=True)
        (root / folder / "findings.json").write_text("{}")
        copy(chest, root / folder / "lesions.nii.gz")
    content = find_volumes(root, root / "out")
    assert content.sources == [CtSource(root / "P1.nii.gz")]
    assert {path.path: path.reason for path in content.skipped} == {
        str(root / "out"): "is the folder of the results",
        str(root / "earlier" / "P1"): "is the result of a prediction",
    }


def test_a_ct_below_the_folder_of_the_results_is_an_input(tmp_path, chest):
    copy(chest, tmp_path / "scans" / "P1.nii.gz")
    for out in (tmp_path, tmp_path / "scans"):
        assert find_volumes(tmp_path / "scans", out).sources == [
            CtSource(tmp_path / "scans" / "P1.nii.gz")
        ]


def test_names_are_bytes(tiny_run, chest, tmp_path):
    """Latin-1 in the name of a patient's folder, of a CT and of the results, as a user runs it."""
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/M\xfcnchen"))
    out = Path(os.fsdecode(os.fsencode(tmp_path) + b"/ergebni\xdf"))
    copy(chest, root / os.fsdecode(b"J\xf6rg.nii.gz"))
    copy(chest, root / "plain.nii.gz")
    (root / os.fsdecode(b"Bl\xf6d.nii.gz")).write_bytes(b"no CT")
    (root / os.fsdecode(b"\xe9crit.txt")).write_bytes(b"no CT")
    command = [sys.executable, "-m", "rectvlm", "predict", root, "--out", out, "--device", "cpu"]
    done = subprocess.run([*command, "--checkpoint", tiny_run(3)], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    page = os.fsencode(out) + b"/J\xf6rg/index.html"
    assert page in done.stdout.splitlines() and rb"J\xf6rg" in Path(os.fsdecode(page)).read_bytes()
    findings = json.loads(Path(os.fsdecode(page)).with_name("findings.json").read_text())
    assert Path(findings["file"]).is_file()
    (failed,) = read_summary(out)["failed"]
    assert os.fsencode(failed["file"]) == os.fsencode(root) + b"/Bl\xf6d.nii.gz"
    (skipped,) = read_summary(out)["skipped"]
    assert os.fsencode(skipped["path"]).endswith(b"/\xe9crit.txt")
    assert rb"Bl\xf6d.nii.gz" in done.stderr


def test_a_name_as_long_as_a_file_system_allows_has_a_result(tiny_run, chest, tmp_path):
    for patient in ("a" * 150, "b" * 150):
        copy(chest, tmp_path / "in" / patient / f"{'c' * 248}.nii.gz")
    cases = run.predict_cases(tmp_path / "in", tiny_run(1), tmp_path / "out", device="cpu")
    assert len({case.name for case in cases}) == 2


def test_equal_file_names_get_different_folders(tmp_path):
    files = [
        *(tmp_path / "a" / "ct.nii.gz", tmp_path / "b" / "ct.nii", tmp_path / "b" / "other.nii"),
        *(tmp_path / "a_ct.nii", tmp_path / "a_ct-2.nii", tmp_path / "failed.jsonl.nii"),
    ]
    names = case_names([CtSource(file) for file in files])
    assert names == ["a_ct", "b_ct", "other", "a_ct-2", "a_ct-2-2", "failed.jsonl-2"]


@contextmanager
def soft_limit(kind: int, amount: int) -> Iterator[None]:
    """A limit of the system for this process while the block runs."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (amount, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


def predict_with_little_memory(files: Path, checkpoint: Path, out: Path, room: int) -> None:
    """Predict each case in an address space that may grow by `room` bytes, all libraries loaded."""
    run.predict_cases(files / "a.nii.gz", checkpoint, out.with_name("first"), device="cpu")

    def predict_limited_case(*arguments):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        with soft_limit(resource.RLIMIT_AS, pages * resource.getpagesize() + room):
            return predict_case(*arguments)

    run.predict_case = predict_limited_case
    run.predict_cases(files, checkpoint, out, device="cpu")


def test_whatever_a_case_raises_is_that_case_s(tiny_run, chest, tmp_path):
    """An address space too small for one CT of three: a real MemoryError.

    In a process of its own: memory that earlier tests freed would have room for the CT.
    """
    (tmp_path / "in").mkdir()
    large = np.tile(body(1)[0], (20, 20, 12))
    small_voxels = AFFINE @ np.diag([0.05, 0.05, 0.1, 1])
    write_nifti(large, small_voxels, tmp_path / "in" / "b.nii.gz")
    copy(chest, tmp_path / "in" / "a.nii.gz")
    copy(chest, tmp_path / "in" / "c.nii.gz")
    arguments = (tmp_path / "in", tiny_run(1), tmp_path / "out", large.nbytes // 8)
    process = get_context("spawn").Process(target=predict_with_little_memory, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode == 0
    summary = read_summary(tmp_path / "out")
    assert [case["name"] for case in summary["predicted"]] == ["a", "c"]
    (failed,) = summary["failed"]
    assert failed["kind"] == "needs too much memory" and failed["file"].endswith("b.nii.gz")


def test_a_full_disk_ends_a_batch_with_one_sentence(tiny_run, chest, tmp_path, capsys):
    for name in ("a", "b", "c"):
        copy(chest, tmp_path / "in" / f"{name}.nii.gz")
    out, checkpoint = tmp_path / "out", tiny_run(1)
    with soft_limit(resource.RLIMIT_FSIZE, 6000):
        assert predict(tmp_path / "in", checkpoint, out) == 2
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line.startswith(f"rectvlm: {out} cannot be written to (File too large): make room")
    assert "0 of 3 files" in last_line
    assert not list(out.glob("**/*.tmp")) and not list(out.glob("*/findings.json"))


@pytest.mark.parametrize("kind", ["file", "below a file", "device", "broken link"])
def test_results_that_cannot_be_written_are_refused_before_the_model_is_loaded(
    tiny_run, chest, tmp_path, capsys, kind
):
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "link").symlink_to("/proc/no-such-folder/x")
    out = {
        "file": tmp_path / "taken",
        "below a file": tmp_path / "taken" / "deep" / "out",
        "device": Path("/proc/out"),
        "broken link": tmp_path / "link",
    }[kind]
    before = sorted(tmp_path.rglob("*"))
    assert predict(chest, tiny_run(1), out) == 2
    error = capsys.readouterr().err
    assert f"rectvlm: {out} cannot be written to" in error and "Traceback" not in error
    assert (tmp_path / "taken").read_text() == "mine" and sorted(tmp_path.rglob("*")) == before


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(
    tiny_run, chest, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    copy(chest, tmp_path / "ct.nii.gz")
    (tmp_path / "run").symlink_to(tiny_run(1))
    assert main(["predict", "~/ct.nii.gz", "--checkpoint=~/run", "--out=~/results"]) == 0
    assert (tmp_path / "results" / "ct" / "findings.json").is_file()
    assert not (tmp_path / "~").exists()
