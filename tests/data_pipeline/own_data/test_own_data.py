"""A table of own cases to shards: what is not said is unknown, what is wrong is refused by name."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import dicom_files
import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipeline import preprocess as pipeline
from data_pipeline.own_data.case_table import split_by_hash
from data_pipeline.own_data.table_cases import list_table_cases
from data_pipeline.verify.verify import main as verify_main
from rectvlm.config import load_config
from rectvlm.data.dataset import ShardDataset
from rectvlm.data.shards import read_index, read_sample
from rectvlm.labels import FINDINGS, LESION_BY_KEY
from rectvlm.types import Sample, UserError
from tests.small_cases import AFFINE, body

CHECKOUT = Path(__file__).parents[3]
NODULE = "lung_nodule"


def write_nifti(path: Path, array: NDArray[np.generic], affine: NDArray[np.float64]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)


def write_ct(path: Path, seed: int = 0) -> None:
    write_nifti(path, body(seed)[0], AFFINE)


def write_mask(path: Path, seed: int = 0) -> None:
    write_nifti(path, body(seed)[1], AFFINE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three CTs and a mask of the first one's nodule, without a table."""
    for seed, name in enumerate("abc"):
        write_ct(tmp_path / f"{name}.nii.gz", seed)
    write_mask(tmp_path / "a_nodule.nii.gz")
    return tmp_path


def write_table(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "cases.csv"
    path.write_bytes(text.encode(encoding))
    return path


def preprocess(table: Path, *more: str) -> int:
    out = ["--out", str(table.parent / "out"), "--workers", "0", "--config", "tiny"]
    return pipeline.main(["--table", str(table), *out, *more])


def read_samples(folder: Path) -> dict[str, Sample]:
    index = read_index(folder / "out")
    samples = [
        read_sample(folder / "out", record)
        for split in ("train", "valid")
        for record in index.select_split(split)
    ]
    return {sample.meta.key: sample for sample in samples}


def refusal(table: Path, mapping: Path | None = None) -> str:
    """Sentence by which a table is refused."""
    with pytest.raises(UserError) as error:
        list_table_cases(table, mapping)
    message = str(error.value)
    assert "\n" not in message and "expected" in message and message.endswith(".")
    return message


# What is not said is unknown


def test_what_the_table_does_not_say_is_unknown(folder: Path) -> None:
    table = write_table(
        folder,
        "ct,split,Lung nodule,cardiomegaly,lung_nodule_mask,Pleural_Effusion mask,report\n"
        "a.nii.gz,train,1,,a_nodule.nii.gz,,A nodule.\n"
        "b.nii.gz,valid,0,1.0,none,,\n"
        "c.nii.gz,train,,0,,,NA\n",
    )
    assert preprocess(table) == 0
    samples = read_samples(folder)
    unknown = dict.fromkeys(FINDINGS)
    assert samples["a"].meta.labels == unknown | {"Lung nodule": 1}
    assert samples["b"].meta.labels == unknown | {"Lung nodule": 0, "Cardiomegaly": 1}
    assert samples["c"].meta.labels == unknown | {"Cardiomegaly": 0}
    for key, annotated in {"a": True, "b": True, "c": False}.items():
        meta = samples[key].meta
        expected = dict.fromkeys(LESION_BY_KEY, False) | {NODULE: annotated}
        assert meta.lesions_annotated == expected
        assert not any(meta.lesions_partial.values())
        assert samples[key].lesions.any() == (key == "a")
    assert set(np.unique(samples["a"].lesions)) == {0, LESION_BY_KEY[NODULE].mask_value}
    assert samples["a"].meta.findings == "A nodule." and samples["c"].meta.findings is None
    assert verify_main([str(folder / "out"), "--config", "tiny"]) == 0


def test_a_table_of_cts_alone_knows_nothing(folder: Path) -> None:
    assert preprocess(write_table(folder, "Path\na.nii.gz\nb.nii.gz\n")) == 0
    for sample in read_samples(folder).values():
        assert sample.meta.labels == dict.fromkeys(FINDINGS)
        assert not any(sample.meta.lesions_annotated.values())
        assert sample.meta.findings is None and sample.meta.impression is None


def test_a_mask_of_a_part_of_the_ct_leaves_the_rest_unknown(folder: Path) -> None:
    part = body(0)[1][:, :, :5]
    write_nifti(folder / "part.nii.gz", part, AFFINE)
    table = write_table(folder, "ct,lung nodule mask\na.nii.gz,part.nii.gz\n")
    assert preprocess(table) == 0
    meta = read_samples(folder)["a"].meta
    assert meta.lesions_partial[NODULE] and not meta.lesions_annotated[NODULE]


# Sides come from the affine


@pytest.mark.parametrize("axes", ["LPS", "RAS", "SAL", "PRI"])
def test_sides_come_from_the_affine_of_each_file(folder: Path, axes: str) -> None:
    hu, mask = body(0)
    ornt = nib.orientations.axcodes2ornt(axes)
    for name, array in (("turned", hu), ("turned_nodule", mask)):
        image = nib.Nifti1Image(array, AFFINE)
        turn = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), ornt)
        # Only one of the two is turned, so that indexes alone would put the mask elsewhere.
        turned = image.as_reoriented(turn) if name == "turned_nodule" else image
        nib.save(turned, folder / f"{name}.nii.gz")
    table = write_table(
        folder,
        "ct,lung_nodule_mask\na.nii.gz,a_nodule.nii.gz\nturned.nii.gz,turned_nodule.nii.gz\n",
    )
    assert preprocess(table) == 0
    samples = read_samples(folder)
    np.testing.assert_array_equal(samples["a"].lesions, samples["turned"].lesions)
    place = np.argwhere(samples["a"].lesions).mean(axis=0)
    world_x = (AFFINE @ [6, 10.5, 2.5, 1])[0]
    grid_affine = np.array(samples["a"].meta.geometry.grid_affine)
    assert abs((grid_affine @ [*place, 1])[0] - world_x) < 7.2


def test_files_that_tell_nothing_about_sides_are_set_aside(folder: Path) -> None:
    hu, mask = body(0)
    write_nifti(folder / "blank.nii.gz", hu, np.eye(4))
    write_nifti(folder / "mirrored.nii.gz", hu, np.diag([-1.0, -1, 1, 1]))
    write_nifti(folder / "blank_nodule.nii.gz", mask, np.eye(4))
    elsewhere = AFFINE.copy()
    elsewhere[0, 3] += 500
    write_nifti(folder / "elsewhere.nii.gz", mask, elsewhere)
    table = write_table(
        folder,
        "ct,lung_nodule_mask\na.nii.gz,a_nodule.nii.gz\nblank.nii.gz,\nmirrored.nii.gz,\n"
        "b.nii.gz,blank_nodule.nii.gz\nc.nii.gz,elsewhere.nii.gz\n",
    )
    assert preprocess(table) == 0
    assert set(read_samples(folder)) == {"a"}
    lines = (folder / "out/quarantine.jsonl").read_text().splitlines()
    assert {json.loads(line)["key"] for line in lines} == {"blank", "mirrored", "b", "c"}


# Files as spreadsheets and users write them

TABLE = (
    "ct,key,Lung nodule,report\n"
    'a.nii.gz,k1,1,"Größe 3 mm; ""rund"", glatt.\nFindings: none\nImpression: Knötchen"\n'
    "b.nii.gz,k2,0,\n"
)
LOOKS: dict[str, Callable[[str], bytes]] = {
    "UTF-8": lambda text: text.encode(),
    "UTF-8 with a mark": lambda text: text.encode("utf-8-sig"),
    "Windows-1252": lambda text: text.encode("cp1252"),
    "UTF-16": lambda text: text.encode("utf-16"),
    "Windows line ends": lambda text: text.replace("\n", "\r\n").encode(),
    "semicolons": lambda text: with_delimiter(text, ";").encode("cp1252"),
    "tabs": lambda text: with_delimiter(text, "\t").encode("utf-16"),
    "Excel's first line": lambda text: b"sep=;\r\n" + with_delimiter(text, ";").encode(),
    "empty rows and columns": lambda text: (
        text.replace(",report\n", ",report,,\n")
        .replace("k2,0,\n", "k2,0,,,\n,,,,,\n\n")
        .replace('Knötchen"\n', 'Knötchen",,\n')
    ).encode(),
}


def with_delimiter(text: str, delimiter: str) -> str:
    import csv
    import io

    target = io.StringIO(newline="")
    rows = list(csv.reader(io.StringIO(text, newline="")))
    csv.writer(target, delimiter=delimiter).writerows(rows)
    return target.getvalue()


@pytest.mark.parametrize("look", LOOKS)
def test_a_table_is_the_same_however_it_was_saved(folder: Path, look: str) -> None:
    table = folder / "cases.csv"
    table.write_bytes(LOOKS[look](TABLE))
    first, second = list_table_cases(table).cases
    assert (first.key, second.key) == ("k1", "k2")
    data = first.load()
    assert data.labels["Lung nodule"] == 1 and second.load().labels["Lung nodule"] == 0
    assert data.findings == "none" and data.impression == "Knötchen"
    assert second.load().findings is None


def test_paths_may_have_spaces_a_tilde_and_backslashes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder / "home"))
    write_ct(folder / "my scans/case 1.nii.gz", 1)
    write_ct(folder / "home/ct.nii.gz", 2)
    write_ct(folder / "win/dir/x.nii.gz", 3)
    rows = ["my scans/case 1.nii.gz", "~/ct.nii.gz", "win\\dir\\x.nii.gz", str(folder / "b.nii.gz")]
    table = write_table(folder, "\n".join(["ct", *rows]))
    monkeypatch.chdir("/")  # paths are relative to the table, not to the current folder
    cases = list_table_cases(table).cases
    assert [case.key for case in cases] == ["case_1", "ct", "x", "b"]
    for case in cases:
        assert case.load().volume.array.shape == (24, 24, 12)


def test_a_report_may_be_a_file(folder: Path) -> None:
    text = "Herzgröße normal.\r\nImpression:\vKein Befund."
    (folder / "a.txt").write_bytes(text.encode("cp1252"))
    table = write_table(folder, "ct,report\na.nii.gz,a.txt\nb.nii.gz,missing.txt\n")
    first, second = list_table_cases(table).cases
    data = first.load()
    assert data.findings == "Herzgröße normal." and data.impression == "Kein Befund."
    with pytest.raises(UserError, match=r"missing\.txt cannot be read"):
        second.load()


def test_parts_of_a_report_have_columns_of_their_own(folder: Path) -> None:
    table = write_table(folder, "ct,Findings Text,impression\na.nii.gz,A nodule.,\n")
    data = list_table_cases(table).cases[0].load()
    assert (data.findings, data.impression) == ("A nodule.", None)


def test_indication_and_technique_have_columns_of_their_own(folder: Path) -> None:
    (folder / "why.txt").write_text("Cough.")
    rows = "ct,report,Clinical information,technique\na.nii.gz,,why.txt,low dose\nb.nii.gz,x,,\n"
    own_cases = list_table_cases(write_table(folder, rows))
    first, second = (case.load() for case in own_cases.cases)
    assert (first.indication, first.technique, first.findings) == ("Cough.", "low dose", None)
    assert (second.indication, second.technique, second.findings) == (None, None, "x")
    assert own_cases.counts["cases without a report"] == 1


def test_other_names_and_words_are_mapped(folder: Path) -> None:
    mapping = folder / "mapping.yaml"
    mapping.write_text(
        "columns: {Datei: ct, Rundherd: Lung nodule, Maske: lung_nodule_mask, Alter: ignore}\n"
        "words: {ja: 1, yes: 1, nein: 0, no: 0, unklar: unknown, kein: none, Test: valid}\n"
    )
    table = write_table(
        folder,
        "Datei;Rundherd;Maske;Alter;Split\na.nii.gz;Ja;a_nodule.nii.gz;7;train\n"
        "b.nii.gz;NO;kein;8;test\nc.nii.gz;unklar;;9;\n",
    )
    cases = list_table_cases(table, mapping).cases
    data = [case.load() for case in cases]
    assert [case.labels["Lung nodule"] for case in data] == [1, 0, None]
    assert [case.lesions_annotated[NODULE] for case in data] == [True, True, False]
    assert [case.split for case in cases[:2]] == ["train", "valid"]


# Splits


def test_a_patient_without_a_split_has_one_that_others_do_not_change(folder: Path) -> None:
    for number in range(30):
        os.link(folder / "a.nii.gz", folder / f"n{number}.nii.gz")
    rows = [f"n{number}.nii.gz,p{number // 2}" for number in range(30)]
    few = list_table_cases(write_table(folder, "\n".join(["ct,patient", *rows[:10]]))).cases
    many = list_table_cases(write_table(folder, "\n".join(["ct,patient", *rows]))).cases
    assert [case.split for case in many[:10]] == [case.split for case in few]
    assert all(one.split == two.split for one, two in zip(many[::2], many[1::2], strict=True))
    patients = [f"patient {number}" for number in range(2000)]
    assert 0.17 < sum(split_by_hash(name) == "valid" for name in patients) / 2000 < 0.23


def test_a_case_without_a_split_follows_its_patient(folder: Path) -> None:
    text = "ct,patient,split\na.nii.gz,p,\nb.nii.gz,p,Validation\n"
    assert [case.split for case in list_table_cases(write_table(folder, text)).cases] == [
        "valid",
        "valid",
    ]


def test_a_table_may_name_the_patients_that_choose_checkpoints(folder: Path) -> None:
    text = "ct,split\na.nii.gz,Dev\nb.nii.gz,train\n"
    cases = list_table_cases(write_table(folder, text)).cases
    assert [case.split for case in cases] == ["dev", "train"]


def test_a_split_without_cases_is_said_before_training_stops_at_it(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert preprocess(write_table(folder, "ct,split\na.nii.gz,train\n")) == 0
    assert "no case is in valid: name one in a column 'split'" in caplog.messages
    data = load_config("tiny", [f"data.shards={folder / 'out'}"]).data
    with pytest.raises(UserError, match=r"no sample of the split 'valid'.*validation\.every=0"):
        ShardDataset(data, "valid")


# What is refused

REFUSED = {
    "": "is empty: expected a CSV table",
    "ct,key\n": "has no rows",
    "\ufeff": "is empty",
    "ct,Lung noduel,age\na.nii.gz,1,3\n": "2 columns of unknown meaning.*'Lung noduel' "
    r"\(did you mean 'Lung nodule'\?\), 'age'.*--mapping",
    "ct,ground glass opacity\na.nii.gz,1\n": r"did you mean 'ground_glass_opacity_mask'\?",
    "key,Lung nodule\na,1\n": "no column of CT files.*'ct'.*found key, Lung nodule",
    "ct,path\na.nii.gz,b.nii.gz\n": "two columns that mean 'ct'",
    "ct,ct\na.nii.gz,b.nii.gz\n": "the column 'ct' twice",
    "ct,Lung nodule,lung_nodule\na.nii.gz,1,1\n": "two columns that mean 'Lung nodule'",
    "ct,report,impression\na.nii.gz,x,y\n": "the report twice",
    "ct,Lung nodule\na.nii.gz,1\nb.nii.gz,yes\nc.nii.gz,2\n": "row 3, column 'Lung nodule'.*"
    r"0, 1 or nothing.*'yes' \(and in 1 more cell\).*--mapping",
    "ct,Lung nodule\na.nii.gz,-1\n": "'-1'",
    "ct,Lung nodule\na.nii.gz,0.5\n": "'0.5'",
    "ct,Lung nodule\na.nii.gz,none\n": "'none'",
    "ct,lung_nodule_mask\na.nii.gz,0\n": "'none' for looked for and not there",
    "ct,lung_nodule_mask\na.nii.gz,None\n": "found 'None'",
    "ct,lung_nodule_mask\na.nii.gz,a_nodule.png\n": "a mask file",
    "ct,key\na.nii.gz,x\nb.nii.gz,x\n": "the key 'x' twice.*rows 2, 3",
    "ct,key\na.nii.gz,x/1\n": "letters.*found 'x/1'",
    "ct,key\na.nii.gz,fall_ü\n": "found 'fall_ü'",
    "ct,key\na.nii.gz,1.2\n": "found '1.2'",
    "ct\na.nii.gz\n./a.nii.gz\n": "the key 'a' twice.*add a column 'key'",
    "ct,key\na.nii.gz,x\n./a.nii.gz,y\n": "names a file twice.*rows 2, 3",
    "ct,lung_nodule_mask,consolidation_mask\na.nii.gz,a_nodule.nii.gz,a_nodule.nii.gz\n": "names a "
    "file twice.*one file a lesion",
    "ct,patient,split\na.nii.gz,p,train\nb.nii.gz,p,valid\n": "patient 'p' in two.*row 2.*row 3",
    "ct,patient\na.nii.gz,\n": "row 2, column 'patient'",
    "ct,split\na.nii.gz,test\n": "train, dev, valid or nothing",
    "ct,patient,split\na.nii.gz,Ju\u0308rg  X,train\nb.nii.gz,\u200bJ\xfcrg x,valid\n": "in "
    "two splits.*row 2.*row 3",
    "ct,patient\na.nii.gz,nan\nb.nii.gz,nan\n": "row 2, column 'patient'.*fill it in",
    "ct,lung_nodule_mask,Lung nodule\na.nii.gz,none,1\n": "'Lung nodule' is 1 in this row",
    "ct\na.nii.gz\nlink.nii.gz\n": "names a file twice.*rows 2, 3",
    "ct,key\n,x\n": "row 2, column 'ct'",
    "ct,split\n,train\n": "row 2, column 'ct'",
    "ct,key\nno.nii.gz,x\nno2.nii.gz,y\n": "only CTs that do not exist.*relative to the table",
    'ct,report\na.nii.gz,"open\nb.nii.gz,x\n': "cannot be read as a table near line 3.*quotes",
    "ct,key,report\na.nii.gz,x,one,two\n": "row of another length, row 2",
    "ct,key,report\na.nii.gz,x\n": "row of another length, row 2",
    "ct,,key\na.nii.gz,3,x\n": "below no name in row 2",
    "\nct\na.nii.gz\n": "no header",
}


def test_a_mask_that_contradicts_its_label_is_set_aside(folder: Path) -> None:
    write_nifti(folder / "empty.nii.gz", np.zeros_like(body(0)[1]), AFFINE)
    table = write_table(
        folder,
        "ct,Lung nodule,Lung opacity,lung_nodule_mask,ground_glass_opacity_mask\n"
        "a.nii.gz,0,,a_nodule.nii.gz,\nb.nii.gz,1,,empty.nii.gz,\nc.nii.gz,0,1,none,none\n",
    )
    assert preprocess(table) == 0
    assert set(read_samples(folder)) == {"c"}
    lines = (folder / "out/quarantine.jsonl").read_text().splitlines()
    found = {json.loads(line)["key"]: json.loads(line)["found"] for line in lines}
    assert found == {
        "a": "'Lung nodule' of 0 and a lesion",
        "b": "'Lung nodule' of 1 and no lesion",
    }


@pytest.mark.parametrize("text", REFUSED)
def test_what_cannot_be_meant_is_refused_by_name_before_any_work(folder: Path, text: str) -> None:
    import re

    (folder / "link.nii.gz").symlink_to(folder / "a.nii.gz")
    message = refusal(write_table(folder, text))
    assert message.startswith(str(folder / "cases.csv"))
    assert re.search(REFUSED[text], message), message


@pytest.mark.parametrize("content", [b"PK\x03\x04a", b"\xd0\xcf\x11\xe0", b"ct\0x", b"\x81\x8d\n"])
def test_a_file_that_is_no_table_is_refused(folder: Path, content: bytes) -> None:
    (folder / "cases.csv").write_bytes(content)
    assert "CSV UTF-8" in refusal(folder / "cases.csv")
    assert "correct the path" in refusal(folder / "nowhere.csv")
    assert "correct the path" in refusal(folder)


@pytest.mark.parametrize(
    "text",
    ["- a", "colums: {a: ct}", "columns: [a]", "words: {x: maybe}", "words: {x: [1]}", "a: b: c"],
)
def test_a_wrong_mapping_is_refused(folder: Path, text: str) -> None:
    (folder / "m.yaml").write_text(text)
    table = write_table(folder, "ct\na.nii.gz\n")
    assert refusal(table, folder / "m.yaml").startswith(str(folder / "m.yaml"))


def test_missing_and_broken_cts_are_listed_and_set_aside(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "broken.nii.gz").write_bytes(b"no")
    (folder / "series").mkdir()
    text = "ct\na.nii.gz\nmissing.nii.gz\nbroken.nii.gz\nseries\n" + "x" * 300 + "\n"
    text = text.replace("\n", ",\n").replace("ct,", "ct,lung_nodule_mask") + "b.nii.gz,no.nii.gz\n"
    caplog.set_level("INFO")
    assert preprocess(write_table(folder, text)) == 0
    assert set(read_samples(folder)) == {"a"}
    assert any("2 of 6 CTs do not exist" in line for line in caplog.messages)
    assert any("1 of 1 masks do not exist" in line for line in caplog.messages)
    lines = (folder / "out/quarantine.jsonl").read_text().splitlines()
    reasons = {json.loads(line)["key"]: json.loads(line)["reason"] for line in lines}
    assert len(reasons) == 5 and reasons["missing"] == "does not exist"
    assert reasons["series"] == "is a folder or archive without a DICOM series of a CT"


def test_a_changed_cell_makes_its_case_again(folder: Path) -> None:
    text = "ct,Lung nodule\na.nii.gz,1\nb.nii.gz,0\n"
    assert preprocess(write_table(folder, text), "--samples-per-shard", "1") == 0
    before = (folder / "out/train-000000.tar").stat().st_mtime_ns
    assert preprocess(write_table(folder, text.replace("b.nii.gz,0", "b.nii.gz,"))) == 0
    assert read_samples(folder)["b"].meta.labels["Lung nodule"] is None
    assert before != (folder / "out/train-000000.tar").stat().st_mtime_ns


def test_a_ct_may_be_a_dicom_folder_a_file_of_it_or_an_npz(folder: Path) -> None:
    hu, _ = body(0)
    dicom_files.write_series(hu, AFFINE, folder / "P1" / "3", suffix="")
    dicom_files.write_series(hu, AFFINE, folder / "P2")
    np.savez(folder / "P3.npz", ct=hu, affine=AFFINE)
    lines = ["ct,split", "a.nii.gz,train", "P1/,train", "P2/IM0000.dcm,valid", "P3.npz,train"]
    table = write_table(folder, "\n".join(lines))
    assert preprocess(table) == 0
    samples = read_samples(folder)
    assert set(samples) == {"a", "P1", "IM0000", "P3"}
    for sample in samples.values():
        # Headers round positions, and half a HU may then round the other way.
        np.testing.assert_allclose(sample.ct, samples["a"].ct, atol=1)
    before = {case.key: case.identity for case in list_table_cases(table).cases}
    (folder / "P2" / "IM0003.dcm").unlink()
    after = {case.key: case.identity for case in list_table_cases(table).cases}
    assert {key for key in before if before[key] != after[key]} == {"IM0000"}


def test_four_times_the_rows_take_about_four_times_as_long(folder: Path) -> None:
    """10,000 rows take about a second; a search for each row among all would take 16 times."""
    header = ["ct", "key", "report", *FINDINGS, *(f"{lesion}_mask" for lesion in LESION_BY_KEY)]
    report = '"' + "The heart is normal, no effusion.\n" * 20 + '"'
    rows = [
        ["a.nii.gz" if not number else f"{number}.nii.gz", f"k{number}", report]
        + ["1", "0", ""] * 6
        + [f"{number}_{lesion}.nii.gz" for lesion in range(5)]
        for number in range(10_000)
    ]

    def measure_seconds(count: int) -> float:
        lines = [",".join(cells) for cells in [header, *rows[:count]]]
        table = write_table(folder, "\n".join(lines))
        seconds = []
        for _ in range(2):  # the quicker of two: others may use the cores
            start = time.process_time()
            assert len(list_table_cases(table).cases) == count
            seconds.append(time.process_time() - start)
        return min(seconds)

    assert measure_seconds(10_000) < 10 * measure_seconds(2_500)


# Options


def test_a_data_set_is_named_once_and_options_of_others_are_refused(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = write_table(folder, "ct\na.nii.gz\n")
    for more, message in (
        (["--ct-rate", str(folder)], "--ct-rate and --table name two data sets"),
        (["--kernel", "sharp"], "--kernel belongs to --ct-rate"),
        (["--limit", "3"], "--limit belongs to --ct-rate"),
    ):
        assert preprocess(table, *more) == 2
        assert message in caplog.messages[-1]
    assert pipeline.main(["--mapping", str(table)]) == 2
    assert "--mapping belongs to --table" in caplog.messages[-1]
    assert pipeline.main(["--regions", str(folder)]) == 2
    assert "--regions belongs to --ct-rate" in caplog.messages[-1]


def test_masks_of_a_folder_add_to_those_of_the_table(folder: Path) -> None:
    write_mask(folder / "masks/a/consolidation.nii.gz")
    table = write_table(folder, "ct,lung_nodule_mask\na.nii.gz,a_nodule.nii.gz\n")
    assert preprocess(table, "--lesions", str(folder / "masks")) == 0
    annotated = read_samples(folder)["a"].meta.lesions_annotated
    assert [key for key, known in annotated.items() if known] == ["consolidation", NODULE]


FUNCTION = """
from functools import partial
from data_pipeline.cases import Case, CaseData
from tests.small_cases import load_small, small_case

def list_cases():
    yield small_case(1)
    yield small_case(2, "valid")

def nothing():
    return []

def lambdas():
    yield Case("x", "train", "x", "x", lambda: load_small(1), ())

def wrong_type():
    yield "x"

def wrong_key():
    yield Case("x/1", "train", "x", "x", partial(load_small, 1), ())

def wrong_split():
    yield Case("x", "test", "x", "x", partial(load_small, 1), ())
"""


def test_a_function_lists_what_no_table_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "my_hospital.py").write_text(FUNCTION)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    out = ["--out", "out", "--config", "tiny", "--workers", "0"]
    assert pipeline.main(["--cases", "my_hospital:list_cases", *out]) == 0
    assert set(read_samples(tmp_path)) == {"small_1", "small_2"}
    for reference, message in {
        "my_hospital.py:list_cases": "expected module:function",
        "my_hospital": "expected module:function",
        "my_hospitl:list_cases": "cannot be imported",
        "my_hospital:list_case": "names no function",
        "my_hospital:nothing": "yields nothing",
        "my_hospital:lambdas": "use no lambda",
        "my_hospital:wrong_type": "found str",
        "my_hospital:wrong_key": "'x/1' of x is not valid",
        "my_hospital:wrong_split": "the split 'test': expected train, dev, valid or grounding",
    }.items():
        assert pipeline.main(["--cases", reference, *out]) == 2
        assert message in caplog.messages[-1], reference


def test_the_command_of_the_package_finds_the_checkout_from_any_folder(folder: Path) -> None:
    command = [sys.executable, "-m", "rectvlm", "preprocess", "--table", "cases.csv"]
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("cases.csv cannot be read: expected a CSV table")
