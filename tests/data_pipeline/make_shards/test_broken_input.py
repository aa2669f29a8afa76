"""Broken input: each kind is set aside with its file, reason, expectation and finding, and the rest
is untouched."""

import gzip
import json
import os
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipeline.cases import Case
from data_pipeline.ct_rate.cases import list_ct_rate_cases
from data_pipeline.ct_rate.options import CtRateOptions
from data_pipeline.make_shards.shard_folder import PreprocessResult, preprocess
from data_pipeline.masks.mask_folders import MaskFolders
from rectvlm.data import file_checks
from rectvlm.data.shards import read_index
from rectvlm.data.store import ShardStore
from rectvlm.data.volume import read_volume
from rectvlm.types import InputError
from tests.small_cases import (
    AFFINE,
    GRID,
    SPACING,
    ask_for_all_memory,
    body,
    die,
    never_end,
    raise_bug,
    say_what_is_wrong,
    small_tree,
)

HU, MASK = body(0)
TIMEOUT = 3.0


@dataclass(frozen=True)
class Files:
    """Those of one case."""

    ct: Path
    lesion: Path
    regions: Path


# Ways to break


def save(array: NDArray[Any], path: Path, affine: NDArray[np.float64] = AFFINE) -> None:
    nib.save(nib.Nifti1Image(array, affine), path)


def as_type(dtype: Any) -> NDArray[Any]:
    return HU.astype(dtype)


def with_voxel(value: float) -> NDArray[np.float32]:
    array = as_type(np.float32)
    array[1, 2, 3:5] = value
    return array


def edit(path: Path, **fields: Any) -> None:
    """Other values in a header, as they are; nibabel itself would refuse or mend some of them."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    header = nib.Nifti1Header(bytes(content[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    content[:348] = header.binaryblock
    path.write_bytes(gzip.compress(content))


def unpacked(path: Path) -> bytes:
    return gzip.decompress(path.read_bytes())


def in_place(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def flip_checksum(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)


def as_text(path: Path) -> None:
    """A header that promises float64 before voxels that someone wrote as text."""
    edit(path, datatype=64, bitpix=64)
    text = b"".join(b"%8.3f" % value for value in np.linspace(-999, 999, HU.size))
    path.write_bytes(gzip.compress(unpacked(path)[:352] + text))


def rgb() -> NDArray[Any]:
    return np.zeros(HU.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])


def tilted() -> NDArray[np.float64]:
    affine = AFFINE.copy()
    affine[:3, 1] = affine[:3, 0] + (0, 1, 0)
    return affine


def picture(low: float, high: float) -> NDArray[np.float64]:
    return (np.clip(HU, low, high) - low) / (high - low)


@dataclass(frozen=True)
class Broken:
    """A kind of broken input, and what the quarantine list must say of it; `found` and `expected`
    are patterns."""

    name: str
    damage: Callable[[Files], object] | None
    reason: str
    expected: str
    found: str
    file: str = "ct"
    load: Callable[[], Any] | None = None
    """In place of the case's own."""
    series: dict[str, str] = field(default_factory=dict)
    """Other cells of its row in the metadata."""


NIFTI = r"a NIfTI file \(\.nii or \.nii\.gz\)"
PICTURE = "is a windowed picture, not CT numbers"
DAMAGED = "is cut short or damaged"
SPACING_ROW = ("has an impossible voxel size", "0.1 to 50 mm")

KINDS = [
    # First, and so in another shard than the case that kills, which is tried more than once.
    Broken(
        "never ends",
        None,
        "took too long",
        "a case within 3 seconds",
        "no end",
        file="source",
        load=never_end,
    ),
    # The file as such
    Broken("missing", lambda f: f.ct.unlink(), "does not exist", NIFTI, "nothing"),
    Broken(
        "dangling link",
        lambda f: in_place(f.ct, lambda p: p.symlink_to("gone")),
        "does not exist",
        NIFTI,
        "nothing",
    ),
    Broken(
        "folder",
        lambda f: in_place(f.ct, Path.mkdir),
        "is a folder or archive without a DICOM series of a CT",
        "slices of a CT",
        "no DICOM files",
    ),
    Broken("pipe", lambda f: in_place(f.ct, os.mkfifo), "is not a file", NIFTI, "a pipe"),
    Broken(
        "link to itself",
        lambda f: in_place(f.ct, lambda p: p.symlink_to(p)),
        "cannot be read",
        "a readable file",
        "Too many levels of symbolic links",
    ),
    Broken("empty", lambda f: f.ct.write_bytes(b""), "is empty", NIFTI, "0 bytes"),
    Broken(
        "text",
        lambda f: f.ct.write_text("<html>404 not found</html>"),
        "is not a NIfTI file",
        "a NIfTI header",
        "starts with something else",
    ),
    Broken(
        "packed twice",
        lambda f: f.ct.write_bytes(gzip.compress(f.ct.read_bytes())),
        "is not a NIfTI file",
        "a NIfTI header",
        "starts with something else",
    ),
    # The packing
    Broken(
        "truncated gzip",
        lambda f: os.truncate(f.ct, f.ct.stat().st_size // 2),
        DAMAGED,
        "a whole gzip file",
        "ended before",
    ),
    Broken(
        "truncated gzip inside the header",
        lambda f: os.truncate(f.ct, 40),
        "is not a NIfTI file",
        "a NIfTI header",
        "ended before",
    ),
    Broken(
        "gzip with a wrong checksum",
        lambda f: flip_checksum(f.ct),
        DAMAGED,
        "a whole gzip file",
        "CRC",
    ),
    Broken(
        "gzip bomb",
        lambda f: f.ct.write_bytes(gzip.compress(unpacked(f.ct) + bytes(100 << 20), 1)),
        "holds more than its header says",
        r"14176 bytes",
        r"at least \d+",
    ),
    Broken(
        "truncated, not packed",
        lambda f: f.ct.write_bytes(unpacked(f.ct)[:-2000]),
        "is cut short",
        "14176 bytes by its header",
        "12176",
    ),
    Broken(
        "fewer slices than the header says",
        lambda f: f.ct.write_bytes(gzip.compress(unpacked(f.ct)[:-2000])),
        "is cut short",
        "14176 bytes by its header",
        "12176",
    ),
    Broken(
        "more slices than the header says",
        lambda f: edit(f.ct, dim=[3, 24, 24, 7, 1, 1, 1, 1]),
        "holds more than its header says",
        "8416 bytes",
        r"at least \d+",
    ),
    # The header
    Broken(
        "wrong magic",
        lambda f: edit(f.ct, magic=b"ni1"),
        "is not a single-file NIfTI",
        r"\.nii or \.nii\.gz",
        "a pair of .hdr and .img",
    ),
    Broken(
        "unknown voxel type",
        lambda f: edit(f.ct, datatype=77),
        "is not a NIfTI file",
        "a NIfTI header",
        "the unknown voxel type 77",
    ),
    Broken(
        "voxels that start nowhere",
        lambda f: edit(f.ct, vox_offset=np.nan),
        "is not a NIfTI file",
        "a NIfTI header",
        "start at byte nan",
    ),
    Broken(
        "scaling that is no number",
        lambda f: edit(f.ct, scl_slope=1, scl_inter=np.nan),
        "has an impossible scaling",
        "a finite slope and intercept",
        "slope 1 and intercept nan",
    ),
    Broken(
        "4-D",
        lambda f: save(np.stack([HU, HU], -1), f.ct),
        "is not one volume",
        "3 dimensions",
        r"shape \(24, 24, 12, 2\)",
    ),
    Broken(
        "2-D",
        lambda f: edit(f.ct, dim=[2, 24, 24, 1, 1, 1, 1, 1]),
        "is not one volume",
        "3 dimensions",
        r"shape \(24, 24\)",
    ),
    Broken(
        "one slice",
        lambda f: save(HU[:, :, :1], f.ct),
        "is a single slice",
        "a volume",
        r"shape \(24, 24, 1\)",
    ),
    Broken(
        "negative size",
        lambda f: edit(f.ct, dim=[3, 24, -24, 12, 1, 1, 1, 1]),
        "is not one volume",
        "3 dimensions",
        r"shape \(24, -24, 12\)",
    ),
    Broken(
        "absurd size",
        lambda f: edit(f.ct, dim=[3, 32767, 32767, 32767, 1, 1, 1, 1]),
        "has a header that asks for too much",
        r"a file of \d+ bytes",
        r"\(32767, 32767, 32767\) voxels, 655\d\d\.\d GiB",
    ),
    Broken(
        "colour",
        lambda f: save(rgb(), f.ct),
        "has voxels of a strange type",
        "integers or real numbers",
        "R",
    ),
    Broken(
        "complex",
        lambda f: save(as_type(np.complex64), f.ct),
        "has voxels of a strange type",
        "integers or real numbers",
        "complex64",
    ),
    # Where it lies
    Broken(
        "NaN spacing",
        lambda f: edit(f.ct, sform_code=0, qform_code=1, pixdim=[1, np.nan, 14, 20, 0, 0, 0, 0]),
        *SPACING_ROW,
        "nan",
    ),
    Broken(
        "zero spacing",
        lambda f: edit(f.ct, sform_code=0, qform_code=1, pixdim=[1, 14, 14, 0, 0, 0, 0, 0]),
        *SPACING_ROW,
        r"14 × 0 mm \(pixdim\)",
    ),
    Broken("affine with a zero axis", lambda f: edit(f.ct, srow_z=0), *SPACING_ROW, "by its sform"),
    Broken(
        "singular affine",
        lambda f: save(HU, f.ct, tilted()),
        "has axes that are not at right angles",
        "a straight grid",
        "a determinant of 0",
    ),
    Broken(
        "NaN in the affine",
        lambda f: edit(f.ct, srow_x=[np.nan, 0, 0, 0]),
        *SPACING_ROW,
        "by its sform",
    ),
    Broken(
        "no orientation",
        lambda f: edit(f.ct, sform_code=0, qform_code=0),
        "has no orientation, so left and right are unknown",
        "an sform or a qform",
        "codes 0 for both",
        series={"ImageOrientationPatient": "", "ImagePositionPatient": ""},
    ),
    Broken(
        "blank header",
        lambda f: save(HU, f.ct, np.eye(4)),
        "has a blank header (voxels along the world's axes, at the origin), so left and right are "
        "unknown",
        "the affine of the scan",
        "voxels of 1 × 1 × 1 mm",
        series={"ImageOrientationPatient": "", "ImagePositionPatient": ""},
    ),
    # The numbers
    Broken(
        "NaN voxels",
        lambda f: save(with_voxel(np.nan), f.ct),
        "has voxels that are no numbers",
        "finite HU",
        "2 voxels",
    ),
    Broken(
        "infinite voxels",
        lambda f: save(with_voxel(np.inf), f.ct),
        "has voxels that are no numbers",
        "finite HU",
        "2 voxels",
    ),
    Broken(
        "one value",
        lambda f: save(np.zeros_like(HU), f.ct),
        "holds one value throughout",
        "a CT",
        "0 in every voxel",
    ),
    Broken(
        "picture of 8 bits",
        lambda f: save((255 * picture(-1000, 400)).astype(np.uint8), f.ct),
        PICTURE,
        "HU from",
        r"grey levels from \d+ to \d+",
    ),
    Broken(
        "picture in another type",
        lambda f: save((255 * picture(-1000, 400)).astype(np.int16), f.ct),
        PICTURE,
        "HU from",
        r"grey levels from \d+ to \d+",
    ),
    Broken(
        "picture in real numbers",
        lambda f: save(picture(-1000, 400).astype(np.float32), f.ct),
        "is not in HU",
        "air or lung near −1000",
        "in numbers from 0",
    ),
    Broken(
        "rescaled twice",
        lambda f: save(HU - np.int16(1024), f.ct),
        "is not in HU",
        "air or lung near −1000",
        "slope 1 and intercept -1024 do not mend it",
    ),
    Broken("voxels as text", lambda f: as_text(f.ct), PICTURE, "HU from", "grey levels"),
    # Masks
    Broken(
        "mask off the volume",
        lambda f: save(MASK, f.lesion, AFFINE + np.outer([1, 0, 0, 0], [0, 0, 0, 5000])),
        "does not lie on its volume",
        "an overlap with",
        "L -5168 to -4832",
        file="lesion",
    ),
    Broken(
        "mask of another patient",
        lambda f: save(MASK, f.lesion, AFFINE + np.outer([0, 0, 1, 0], [0, 0, 0, 150])),
        "hardly lies on its volume",
        "at least 75%",
        r"3\d% with .*nii",
        file="lesion",
    ),
    Broken(
        "mask without a place",
        lambda f: save(MASK, f.lesion, np.eye(4)),
        "has a blank header (voxels along the world's axes, at the origin), so left and right are "
        "unknown",
        "the affine of the scan",
        "voxels of 1 × 1 × 1 mm",
        file="lesion",
    ),
    Broken(
        "mask of fractions",
        lambda f: save(MASK * np.float32(0.5), f.lesion),
        "is not a mask",
        "whole numbers",
        "values from 0.0 to 0.5",
        file="lesion",
    ),
    Broken(
        "mask of large numbers",
        lambda f: save(MASK * np.int16(300), f.lesion),
        "is not a mask",
        "whole numbers",
        "values from 0 to 300",
        file="lesion",
    ),
    Broken(
        "mask cut short",
        lambda f: os.truncate(f.lesion, f.lesion.stat().st_size - 20),
        DAMAGED,
        "a whole gzip file",
        "ended before",
        file="lesion",
    ),
    Broken(
        "mask gone", lambda f: f.lesion.unlink(), "does not exist", NIFTI, "nothing", file="lesion"
    ),
    Broken(
        "unknown classes",
        lambda f: save(MASK * np.uint8(200) + (HU < -700) * np.uint8(10), f.regions),
        "has numbers that are no class",
        "117 classes",
        "210",
        file="regions",
    ),
    # What no file tells
    Broken(
        "bug",
        None,
        "met an unexpected ZeroDivisionError",
        "no such error",
        "a bug",
        file="source",
        load=raise_bug,
    ),
    Broken(
        "without its library",
        None,
        "cannot be used",
        "a case of use",
        "needs pynrrd",
        file="source",
        load=say_what_is_wrong,
    ),
    Broken(
        "too large for memory",
        None,
        "needs too much memory",
        "the free memory",
        "Unable to allocate 4.00 EiB",
        file="source",
        load=ask_for_all_memory,
    ),
    Broken(
        "kills its process",
        None,
        "ended the process that worked on it",
        "a case that a process can hold",
        "ended each time",
        file="source",
        load=die,
    ),
    *[
        Broken(
            "no permission",
            lambda f: f.ct.chmod(0),
            "cannot be read",
            "a readable file",
            "Permission denied",
        )
        for _ in range(os.geteuid() != 0)
    ],  # root may read all
]

GOOD = {0, 17, 40}
"""Places of good cases among the bad ones; a last one follows, and one of the other split."""


@dataclass(frozen=True)
class Run:
    outcome: PreprocessResult
    place: Path
    lines: dict[str, dict[str, str]]
    """Of the quarantine list, by key."""
    files: dict[str, Files]
    keys: dict[str, str]
    """Of the case of a kind."""
    clean: PreprocessResult
    clean_place: Path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """All kinds between good cases, in one run as users start it; and the good ones in a run of
    their own."""
    root = tmp_path_factory.mktemp("broken")
    kinds = dict(zip(_bad_places(), KINDS, strict=True))
    tree = small_tree(root / "ct", len(KINDS) + len(GOOD) + 1, 1)
    names = [f"train_{number + 1}_a_1" for number in range(len(kinds) + len(GOOD) + 1)]
    files = {
        name: Files(
            tree.path(name),
            root / f"ct/lesions/{name}/lung_nodule.nii.gz",
            root / f"ct/regions/{name}.nii.gz",
        )
        for name in names
    }
    (root / "ct/regions").mkdir()
    for place, kind in kinds.items():
        tree.metadata[names[place]] |= kind.series
        if kind.file == "regions":
            save(MASK, files[names[place]].regions)
    options = CtRateOptions(
        masks=MaskFolders(lesions=root / "ct/lesions", regions=root / "ct/regions")
    )
    cases = list_ct_rate_cases(tree.write(), options).cases
    assert [case.key for case in cases] == [*names, "valid_1_a_1"]
    # Files break after they were listed: then also what a listing would not show comes to a worker.
    cases = [_broken(case, kinds.get(n), files.get(case.key)) for n, case in enumerate(cases)]
    good = [case for n, case in enumerate(cases) if n not in kinds]
    clean = preprocess(good, root / "clean", GRID, SPACING, samples_per_shard=2)
    outcome = preprocess(
        cases, root / "out", GRID, SPACING, samples_per_shard=6, workers=2, timeout_seconds=TIMEOUT
    )
    lines = [
        json.loads(line)
        for line in (root / "out" / "quarantine.jsonl").read_text("utf-8").splitlines()
    ]
    keys = {kind.name: names[place] for place, kind in kinds.items()}
    assert len(lines) == len({line["key"] for line in lines})
    return Run(
        outcome,
        root / "out",
        {line["key"]: line for line in lines},
        files,
        keys,
        clean,
        root / "clean",
    )


def _bad_places() -> list[int]:
    return [place for place in range(len(KINDS) + len(GOOD)) if place not in GOOD]


def _broken(case: Case, kind: Broken | None, files: Files | None) -> Case:
    if kind is None or files is None:
        return case
    if kind.damage is not None:
        kind.damage(files)
    return case if kind.load is None else replace(case, load=kind.load)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name.replace(" ", "_"))
def test_each_kind_is_set_aside_with_its_file_reason_expected_and_found(
    run: Run, kind: Broken
) -> None:
    key = run.keys[kind.name]
    line, files = run.lines[key], run.files[key]
    source = f"CT-RATE train_fixed/{key[:-4]}/{key[:-2]}/{key}.nii.gz"
    assert line["file"] == (source if kind.file == "source" else str(getattr(files, kind.file)))
    assert line["reason"] == kind.reason
    assert re.search(kind.expected, line["expected"]), line["expected"]
    assert re.search(kind.found, line["found"]), line["found"]
    assert line["remedy"]
    assert line[
        "message"
    ] == "{file} {reason}: expected {expected}, found {found}; {remedy}.".format(**line)
    assert "\n" not in line["message"]


def test_nothing_else_is_set_aside(run: Run) -> None:
    assert set(run.lines) == set(run.keys.values())
    assert run.outcome.manifest.provenance.set_aside == {
        reason: sum(kind.reason == reason for kind in KINDS)
        for reason in sorted({kind.reason for kind in KINDS})
    }


def test_good_cases_are_as_if_the_bad_ones_had_never_been(run: Run) -> None:
    def samples(place: Path) -> dict[str, list[bytes]]:
        store = ShardStore(place)
        return {
            entry.key: [
                store.read_range(entry.shard, *entry.members[name])
                for name in sorted(entry.members)
            ]
            for entry in read_index(place).select_split(None)
        }

    assert len(samples(run.clean_place)) == len(GOOD) + 2
    assert samples(run.place) == samples(run.clean_place)
    assert run.outcome.manifest.counts == run.clean.manifest.counts


@pytest.mark.parametrize("packed", [True, False])
def test_an_absurd_header_is_refused_before_memory_is_asked_for(
    tmp_path: Path, packed: bool
) -> None:
    path = tmp_path / "a.nii.gz"
    save(HU, path)
    edit(path, dim=[3, 32767, 32767, 32767, 1, 1, 1, 1])
    if not packed:
        path.write_bytes(unpacked(path))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"asks for too much|is cut short"):
            read_volume(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_machine_without_free_memory_does_not_blame_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(HU, tmp_path / "a.nii.gz")
    monkeypatch.setattr(file_checks.psutil, "virtual_memory", lambda: SimpleNamespace(available=9))
    with pytest.raises(MemoryError):
        read_volume(tmp_path / "a.nii.gz")


def test_a_gzip_bomb_is_left_at_its_first_surplus(tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    save(HU, path)
    path.write_bytes(gzip.compress(unpacked(path) + bytes(100 << 20), 1))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="holds more than its header says"):
            read_volume(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
