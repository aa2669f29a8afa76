"""Cases to shards: bad ones set aside, the same bytes however it is run, resumed after a kill, nothing done twice."""

import json
import multiprocessing
import os
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_pipeline import preprocess as pipeline
from data_pipeline.cases import Case, CaseData, case_to_sample, file_identity
from data_pipeline.demo import demo_cases
from data_pipeline.preprocess import preprocess
from data_pipeline.samples import read_nrrd
from rectvlm import assets
from rectvlm.data.phantom import make_phantom
from rectvlm.data.shards import read_index, read_sample
from rectvlm.data.volume import Volume, mask_to_native, read_mask, read_volume
from rectvlm.labels import FINDINGS, LESION_BY_KEY, LESIONS
from rectvlm.types import UserError
from tests.small_cases import GRID, SPACING, contents, die_once, raise_bug, small_cases


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


def test_bad_cases_are_set_aside_with_their_reason_and_the_rest_goes_on(tmp_path: Path) -> None:
    good = file_case(tmp_path, "good", 1)
    text, elsewhere = file_case(tmp_path, "text", 2), file_case(tmp_path, "elsewhere", 3)
    (tmp_path / "text.nii.gz").write_text("hello")
    far = nib.load(tmp_path / "elsewhere_mask.nii.gz")
    nib.save(nib.Nifti1Image(np.asanyarray(far.dataobj), far.affine + np.eye(4)[:, [3, 3, 3, 0]] * 0 + _shift(5000)),
             tmp_path / "elsewhere_mask.nii.gz")  # fmt: skip
    bug = Case("bug", "train", "bug", "nowhere", raise_bug, ())
    outcome = preprocess([text, good, elsewhere, bug], tmp_path / "out", GRID, SPACING)
    assert [entry.key for entry in outcome.index.select(None)] == ["good"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["key"], Path(line["file"]).name) for line in lines] == [
        ("text", "text.nii.gz"),
        ("elsewhere", "elsewhere_mask.nii.gz"),
        ("bug", "nowhere"),
    ]
    assert "not a NIfTI" in lines[0]["reason"] and "does not lie on its volume" in lines[1]["reason"]
    assert lines[2]["reason"] == "met an unexpected ZeroDivisionError" and "a bug" in lines[2]["message"]
    assert sum(outcome.manifest.provenance.set_aside.values()) == 3
    with pytest.raises(UserError, match="None of 1 cases"):
        preprocess([bug], tmp_path / "none", GRID, SPACING)


def _shift(mm: float) -> np.ndarray:
    shift = np.zeros((4, 4))
    shift[0, 3] = mm
    return shift


def test_a_file_goes_to_a_sample_and_its_mask_comes_home(tmp_path: Path) -> None:
    seed = 6  # has nodules; asserted below
    case = file_case(tmp_path, "a", seed)
    sample = case_to_sample(case, (64, 160, 160), (5.0, 2.5, 2.5))
    data = case.load()
    geometry = sample.meta.geometry
    assert geometry.native_shape == data.volume.array.shape
    home = mask_to_native(
        sample.lesions, np.array(geometry.grid_affine), geometry.native_shape, np.array(geometry.native_affine)
    )
    truth = make_phantom(seed).lesions >> 4 & 1
    assert truth.any()
    both = np.count_nonzero(home >> 4 & truth)
    assert 2 * both / (np.count_nonzero(home >> 4) + np.count_nonzero(truth)) > 0.8
    assert sample.meta.labels == dict.fromkeys(FINDINGS) and sample.meta.regions_source is None
    assert sample.meta.lesions_annotated == {lesion.key: lesion.bit == 4 for lesion in LESIONS}


def test_phantoms_keep_their_truth() -> None:
    case = demo_cases(1, 1, None)[0]
    made, sample = make_phantom(0), case_to_sample(case, GRID, SPACING)
    assert sample.meta.labels == made.labels and sample.meta.findings == made.findings
    assert sample.meta.lesions_annotated == made.lesions_annotated
    native, kept = (int(np.bitwise_or.reduce(bits, axis=None)) for bits in (made.lesions, sample.lesions))
    assert native == kept
    left, right = (np.argwhere(np.isin(sample.regions, ids)).mean(axis=0)[2] for ids in ([4, 5], [1, 2, 3]))
    assert left > right + 5


def test_runs_agree_byte_for_byte_and_a_second_one_has_nothing_to_do(tmp_path: Path) -> None:
    cases = small_cases(3, 2)
    one = preprocess(cases, tmp_path / "one", GRID, SPACING, samples_per_shard=2)
    two = preprocess(cases, tmp_path / "two", GRID, SPACING, samples_per_shard=2, workers=2)
    assert one.made == two.made == 3
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()}
    again = preprocess(cases, tmp_path / "one", GRID, SPACING, samples_per_shard=2)
    assert again.made == 0 and again.index == one.index
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "one").iterdir()} == before
    assert [entry.key for entry in read_index(tmp_path / "one").select("train")] == [f"small_{n}" for n in range(3)]

    (tmp_path / "one" / "valid-000000.tar").unlink()
    assert preprocess(cases, tmp_path / "one", GRID, SPACING, samples_per_shard=2).made == 1
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    fewer = preprocess(cases[:1], tmp_path / "one", GRID, SPACING, samples_per_shard=2)
    assert fewer.made == 1 and len(list((tmp_path / "one").glob("*.tar"))) == 1
    assert preprocess(cases[:1], tmp_path / "one", (8, 24, 24), SPACING, samples_per_shard=2).made == 1


def test_a_killed_run_goes_on_to_the_same_shards(tmp_path: Path) -> None:
    def cases(flag: Path) -> list[Case]:
        return [*small_cases(2, 0), Case("b", "train", "b", "phantom", partial(die_once, flag, 9), ("9",))]

    flag = tmp_path / "flag"
    run = multiprocessing.get_context("spawn").Process(
        target=preprocess, args=(cases(flag), tmp_path / "out", GRID, SPACING), kwargs={"samples_per_shard": 1}
    )
    run.start()
    run.join()
    assert run.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out" / "index.json").exists()
    with pytest.raises(UserError, match="make preprocess"):
        read_index(tmp_path / "out")
    assert preprocess(cases(flag), tmp_path / "out", GRID, SPACING, samples_per_shard=1).made == 1
    preprocess(cases(flag), tmp_path / "whole", GRID, SPACING, samples_per_shard=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    case = file_case(tmp_path, "a", 1)
    first = preprocess([case], tmp_path / "out", GRID, SPACING)
    changed = file_case(tmp_path, "a", 2)
    second = preprocess([changed], tmp_path / "out", GRID, SPACING)
    assert second.made == 1 and second.manifest.shards[0].sha256 != first.manifest.shards[0].sha256
    assert read_sample(tmp_path / "out", second.index.select("train")[0]).meta.key == "a"


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
    assert pipeline.main([*arguments, "data.spacing=[16.0, 8.0, 8.0]"]) == 0
    assert read_index(tmp_path).spacing == (16.0, 8.0, 8.0)
    assert "0 cases set aside" in capsys.readouterr().out
    assert pipeline.main([*arguments, "data.spacin=3"]) == 2
    assert "spacing" in caplog.text


def test_nrrd_directions_become_ras(tmp_path: Path) -> None:
    nrrd = pytest.importorskip("nrrd")
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    directions = [[0.0, 2.0, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 5.0]]
    header = {"space": "left-posterior-superior", "space directions": directions, "space origin": [10.0, 20.0, 30.0]}
    nrrd.write(str(tmp_path / "a.nrrd"), array, header)
    got, affine = read_nrrd(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(got, array)
    np.testing.assert_allclose(affine @ [1, 2, 3, 1], [-(10 + 1.0), -(20 + 2.0), 45.0, 1])
    nrrd.write(str(tmp_path / "b.nrrd"), array, {"space directions": directions})
    with pytest.raises(UserError, match="space"):
        read_nrrd(tmp_path / "b.nrrd")


def test_fetch_without_a_network_and_with_an_archive_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib
    import zipfile

    monkeypatch.setenv("RECTVLM_ARCHIVES", str(tmp_path / "archives"))
    for name, value in {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "", "PIP_RETRIES": "0",
                        "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull}.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    (tmp_path / "archives").mkdir()
    archive = tmp_path / "archives" / "some_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("some_data/a.txt", "a")
        zipped.writestr("../escape.txt", "out")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    into = tmp_path / "into"
    assert assets.fetch("some-data", "1.0", digest, ["some_data/a.txt", "../escape.txt"], into) == into
    assert contents(into) == {"a.txt": b"a", "escape.txt": b"out"} and not (tmp_path / "escape.txt").exists()
    with pytest.raises(UserError, match=r"holds no file some_data/b\.txt"):
        assets.fetch("some-data", "1.0", digest, ["some_data/b.txt"], into)
    with pytest.raises(UserError, match=r"Could not download some-data 1.0 .*check the network, or put its archive"):
        assets.fetch("some-data", "1.0", "0" * 64, ["some_data/c.txt"], into)
    archive.unlink()
    assert assets.fetch("some-data", "1.0", digest, ["some_data/a.txt"], into) == into
    assert sorted(p.name for p in into.iterdir()) == ["a.txt", "escape.txt"]
