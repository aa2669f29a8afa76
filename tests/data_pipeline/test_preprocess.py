"""Cases to shards: bad ones set aside, the same bytes however it is run, resumed after a kill,
nothing done twice."""

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_pipeline import preprocess as pipeline
from data_pipeline.cases import Case, CaseData, case_to_sample, file_identity
from data_pipeline.demo_cases import list_demo_cases
from data_pipeline.make_shards.progress import print_run_summary
from data_pipeline.make_shards.shard_folder import preprocess
from data_pipeline.sample_cts import read_nrrd
from data_pipeline.verify.verify import verify_shards
from rectvlm.data.canonical_grid import mask_to_native
from rectvlm.data.shards import read_index, read_sample
from rectvlm.data.volume import read_mask, read_volume
from rectvlm.labels import FINDINGS, LESION_BY_KEY, LESIONS
from rectvlm.phantom.phantom import make_phantom
from rectvlm.pretrained import package_archives
from rectvlm.types import UserError, Volume
from tests.small_cases import GRID, SPACING, contents, die_once, raise_bug, small_cases, small_tree


def load_files(ct: Path, mask: Path) -> CaseData:
    outline = read_mask(mask)
    return CaseData(
        volume=read_volume(ct),
        lesions=[Volume(outline.array << 4, outline.affine, outline.where)],
        lesions_annotated={key: key == "lung_nodule" for key in LESION_BY_KEY},
    )


def file_case(folder: Path, key: str, seed: int, split: str = "train") -> Case:
    """A phantom that went through files, its nodule mask in another axis order than its CT."""
    made = make_phantom(seed)
    ct, mask = folder / f"{key}.nii.gz", folder / f"{key}_mask.nii.gz"
    nib.save(nib.Nifti1Image(made.hu, made.affine), ct)
    nib.save(nib.as_closest_canonical(nib.Nifti1Image(made.lesions >> 4 & 1, made.affine)), mask)
    return Case(key, split, key, ct.name, partial(load_files, ct, mask), file_identity(ct, mask))  # type: ignore[arg-type]


def test_a_run_without_a_usable_case_says_so(tmp_path: Path) -> None:
    bug = Case("bug", "train", "bug", "nowhere", raise_bug, ())
    with pytest.raises(
        UserError, match=r"None of 1 cases could be used: see the reasons in .*quarantine\.jsonl"
    ):
        preprocess([bug], tmp_path, GRID, SPACING)
    (line,) = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"] == "met an unexpected ZeroDivisionError"
    with pytest.raises(UserError, match="make preprocess"):
        read_index(tmp_path)


def test_a_file_goes_to_a_sample_and_its_mask_comes_home(tmp_path: Path) -> None:
    seed = 6  # has nodules; asserted below
    case = file_case(tmp_path, "a", seed)
    sample = case_to_sample(case, (64, 160, 160), (5.0, 2.5, 2.5))
    data = case.load()
    geometry = sample.meta.geometry
    assert geometry.native_shape == data.volume.array.shape
    home = mask_to_native(
        sample.lesions,
        np.array(geometry.grid_affine),
        geometry.native_shape,
        np.array(geometry.native_affine),
    )
    truth = make_phantom(seed).lesions >> 4 & 1
    assert truth.any()
    both = np.count_nonzero(home >> 4 & truth)
    assert 2 * both / (np.count_nonzero(home >> 4) + np.count_nonzero(truth)) > 0.8
    assert sample.meta.labels == dict.fromkeys(FINDINGS) and sample.meta.regions_source is None
    assert sample.meta.lesions_annotated == {lesion.key: lesion.bit == 4 for lesion in LESIONS}


def test_phantoms_keep_their_truth() -> None:
    case = list_demo_cases(1, 1, None)[0]
    made, sample = make_phantom(0), case_to_sample(case, GRID, SPACING)
    assert sample.meta.labels == made.labels and sample.meta.findings == made.findings
    assert sample.meta.lesions_annotated == made.lesions_annotated
    native, kept = (
        int(np.bitwise_or.reduce(bits, axis=None)) for bits in (made.lesions, sample.lesions)
    )
    assert native == kept
    left, right = (
        np.argwhere(np.isin(sample.regions, ids)).mean(axis=0)[2] for ids in ([4, 5], [1, 2, 3])
    )
    assert left > right + 5


def test_runs_agree_byte_for_byte_and_a_second_one_has_nothing_to_do(tmp_path: Path) -> None:
    cases = small_cases(3, 2)
    one = preprocess(cases, tmp_path / "one", GRID, SPACING, samples_per_shard=2)
    two = preprocess(cases, tmp_path / "two", GRID, SPACING, samples_per_shard=2, workers=2)
    assert one.shards_made == two.shards_made == 3
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()}
    again = preprocess(cases, tmp_path / "one", GRID, SPACING, samples_per_shard=2)
    assert again.shards_made == 0 and again.index == one.index
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()} == before
    assert [entry.key for entry in read_index(tmp_path / "one").select_split("train")] == [
        f"small_{n}" for n in range(3)
    ]

    (tmp_path / "one" / "valid-000000.tar").unlink()
    assert preprocess(cases, tmp_path / "one", GRID, SPACING, samples_per_shard=2).shards_made == 1
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    fewer = preprocess(cases[:1], tmp_path / "one", GRID, SPACING, samples_per_shard=2)
    assert fewer.shards_made == 1 and len(list((tmp_path / "one").glob("*.tar"))) == 1
    assert (
        preprocess(
            cases[:1], tmp_path / "one", (8, 24, 24), SPACING, samples_per_shard=2
        ).shards_made
        == 1
    )


def test_a_shard_whose_worker_was_killed_once_is_made_again(tmp_path: Path) -> None:
    cases, flag = small_cases(4, 1), tmp_path / "flag"
    whole = preprocess(cases, tmp_path / "whole", GRID, SPACING, samples_per_shard=2)
    cases[1] = replace(cases[1], load=partial(die_once, flag, 1))
    outcome = preprocess(cases, tmp_path / "out", GRID, SPACING, samples_per_shard=2, workers=2)
    assert flag.exists() and outcome.rejected == []
    assert outcome.manifest.shards == whole.manifest.shards


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    case = file_case(tmp_path, "a", 1)
    first = preprocess([case], tmp_path / "out", GRID, SPACING)
    changed = file_case(tmp_path, "a", 2)
    second = preprocess([changed], tmp_path / "out", GRID, SPACING)
    assert (
        second.shards_made == 1
        and second.manifest.shards[0].sha256 != first.manifest.shards[0].sha256
    )
    assert read_sample(tmp_path / "out", second.index.select_split("train")[0]).meta.key == "a"


def test_a_case_that_moves_to_another_split_is_never_left_in_the_old_one(tmp_path: Path) -> None:
    cases = small_cases(4, 1)
    preprocess(cases, tmp_path / "out", GRID, SPACING, samples_per_shard=2)
    moved = [replace(case, split="dev") if case.key == "small_0" else case for case in cases]
    result = preprocess(moved, tmp_path / "out", GRID, SPACING, samples_per_shard=2)
    for split, keys in (
        ("train", ["small_1", "small_2", "small_3"]),
        ("dev", ["small_0"]),
        ("valid", ["small_4"]),
    ):
        entries = result.index.select_split(split)
        metas = [read_sample(tmp_path / "out", entry).meta for entry in entries]
        assert [(meta.key, meta.split) for meta in metas] == [(key, split) for key in keys]
    assert verify_shards(tmp_path / "out").issues.faults == []
    print_run_summary(tmp_path / "out", result.manifest, [], result.shards_made, 1.0)


def test_patients_and_keys_are_checked_before_any_work(tmp_path: Path) -> None:
    a, b = small_cases(1, 1)
    with pytest.raises(UserError, match="in train and in valid"):
        preprocess([a, replace(b, patient=a.patient)], tmp_path, GRID, SPACING)
    with pytest.raises(UserError, match="unique"):
        preprocess([a, a], tmp_path, GRID, SPACING)
    assert not list(tmp_path.iterdir())


def test_the_command_line_makes_shards_and_explains_a_wrong_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    counts = ["--phantoms", "1", "--valid-phantoms", "1", "--no-samples", "--workers", "1"]
    arguments = ["--config", "tiny", "--out", str(tmp_path), *counts]
    caplog.set_level("INFO")
    assert pipeline.main([*arguments, "data.spacing=[16.0, 8.0, 8.0]"]) == 0
    assert read_index(tmp_path).spacing == (16.0, 8.0, 8.0)
    assert "cases" in capsys.readouterr().out and "0 cases set aside" in caplog.text
    assert pipeline.main([*arguments, "data.spacin=3"]) == 2
    assert "spacing" in caplog.text


def test_the_command_line_on_a_download_tells_what_was_left_out_and_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    tree, out = small_tree(tmp_path / "ct", 6, 2), tmp_path / "out"
    whole = tree.path("train_2_a_1").read_bytes()
    for name in ("train_2_a_1", "train_3_a_1"):
        os.truncate(tree.path(name), 3000)
    tree.path("valid_1_a_1").write_bytes(b"")
    tree.no_chest["train"].append("train_6_a_1")
    tree.add("train_99_a_1", layout=None)
    tree.write()
    caplog.set_level("INFO")
    lesions = ["--lesions", str(tree.root / "lesions"), "--workers", "0"]
    arguments = ["--config", "tiny", "--ct-rate", str(tree.root), "--out", str(out), *lesions]

    def told(*more: str) -> tuple[int, list[str]]:
        caplog.clear()
        return pipeline.main([*arguments, *more]), caplog.messages

    code, said = told("--shard-mb", "0.1")  # three cases of 36 KB
    assert code == 0 and len(list(out.glob("*.tar"))) == 3
    assert {
        "left out 1: does not show the chest (no-chest list)",
        "7 cases; shards to make: 3",
    } <= set(said)
    assert "volumes that the tables name and that are not on disk: 1" in said
    there = said.index(f"3 cases set aside, all of them listed in {out / 'quarantine.jsonl'}:")
    assert said[there + 1 : there + 3] == ["     2: is cut short or damaged", "     1: is empty"]
    assert [line.partition(":")[0] for line in said[there + 3 :]] == [
        "train_2_a_1",
        "train_3_a_1",
        "valid_1_a_1",
    ]
    table = capsys.readouterr().out
    assert (
        "lung nodule          │ 3 / 3 │ 1 / 1" in table and "consolidation        │ 0 / 0" in table
    )

    code, said = told("--shard-mb", "0.1", "--strict")
    assert code == 1 and said[-1] == "--strict: exit status 1, since cases were set aside"
    assert "up to date: nothing has changed since the last run" in said
    # As after a repair of the disk: the file is whole again, and its size and time do not tell.
    stat = tree.path("train_2_a_1").stat()
    tree.path("train_2_a_1").write_bytes(whole)
    os.utime(tree.path("train_2_a_1"), ns=(stat.st_atime_ns, stat.st_mtime_ns))
    code, said = told("--shard-mb", "0.1", "--retry")
    assert code == 0 and any(line.startswith("2 cases set aside") for line in said)
    assert read_index(out).select_split("train")[1].key == "train_2_a_1"
    with pytest.raises(SystemExit):
        told("--workers", "-1")
    assert "argument --workers: must be at least 0, not -1" in capsys.readouterr().err


def test_nrrd_directions_become_ras(tmp_path: Path) -> None:
    nrrd = pytest.importorskip("nrrd")
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    directions = [[0.0, 2.0, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 5.0]]
    header = {
        "space": "left-posterior-superior",
        "space directions": directions,
        "space origin": [10.0, 20.0, 30.0],
    }
    nrrd.write(str(tmp_path / "a.nrrd"), array, header)
    got, affine = read_nrrd(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(got, array)
    np.testing.assert_allclose(affine @ [1, 2, 3, 1], [-(10 + 1.0), -(20 + 2.0), 45.0, 1])
    nrrd.write(str(tmp_path / "b.nrrd"), array, {"space directions": directions})
    with pytest.raises(UserError, match="space"):
        read_nrrd(tmp_path / "b.nrrd")


def test_fetch_without_a_network_and_with_an_archive_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib
    import zipfile

    monkeypatch.setenv("RECTVLM_ARCHIVES", str(tmp_path / "archives"))
    unreachable_index = {
        "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_RETRIES": "0",
        "PIP_FIND_LINKS": "",
        "PIP_CONFIG_FILE": os.devnull,
    }
    for name, value in unreachable_index.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "archives").mkdir()
    archive = tmp_path / "archives" / "some_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("some_data/a.txt", "a")
        zipped.writestr("../escape.txt", "out")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    into = tmp_path / "into"
    assert (
        package_archives.fetch_package_files(
            "some-data", "1.0", digest, ["some_data/a.txt", "../escape.txt"], into
        )
        == into
    )
    assert (
        contents(into) == {"a.txt": b"a", "escape.txt": b"out"}
        and not (tmp_path / "escape.txt").exists()
    )
    with pytest.raises(UserError, match=r"holds no file some_data/b\.txt"):
        package_archives.fetch_package_files("some-data", "1.0", digest, ["some_data/b.txt"], into)
    with pytest.raises(
        UserError, match=r"Could not download some-data 1.0 .*check the network, or put its archive"
    ):
        package_archives.fetch_package_files(
            "some-data", "1.0", "0" * 64, ["some_data/c.txt"], into
        )
    archive.unlink()
    assert (
        package_archives.fetch_package_files("some-data", "1.0", digest, ["some_data/a.txt"], into)
        == into
    )
    assert sorted(p.name for p in into.iterdir()) == ["a.txt", "escape.txt"]
