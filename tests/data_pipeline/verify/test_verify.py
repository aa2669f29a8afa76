"""Verify reads everything back: sound shards pass, and whatever is wrong is named with its place,
once."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.make_shards.shard_folder import preprocess
from data_pipeline.verify import verify as verify_module
from data_pipeline.verify.issues import VerificationIssue
from data_pipeline.verify.verify import VerificationResult, main, verify_shards
from rectvlm.data.sample import preprocessing_versions
from rectvlm.data.shard_manifest import (
    ShardManifest,
    dump_manifest,
    read_manifest,
    sum_counts,
)
from rectvlm.data.shards import (
    IndexedShard,
    PackedSample,
    ShardIndex,
    WrittenShard,
    dump_index,
    read_index,
    read_sample,
    write_shard,
)
from rectvlm.data.volume_codec import encode_volume
from rectvlm.labels import REGION_BY_NAME
from rectvlm.lesion_bits import present_lesions
from rectvlm.types import SPLITS, Sample, UserError
from tests.small_cases import GRID, SPACING, small_cases

CHECKOUT = Path(__file__).parents[3]
SHARDS = ["train-000000.tar", "train-000001.tar", "valid-000000.tar"]
Tree = dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of two and one samples to train on, one of two to validate; never changed."""
    folder = tmp_path_factory.mktemp("made")
    preprocess(small_cases(3, 2), folder, GRID, SPACING, samples_per_shard=2, workers=0)
    shutil.rmtree(folder / ".parts")
    return folder


@pytest.fixture
def shards(made: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made, tmp_path / "shards"))


def faults(place: Path | str, **options: Any) -> list[VerificationIssue]:
    return verify_shards(place, **options).issues.faults


def close(folder: Path, written: Sequence[WrittenShard]) -> None:
    """Index and manifest as `write_index` makes them, of whatever it would refuse, too."""
    counts = {
        split: sum_counts([shard.counts for shard in written if shard.facts.split == split])
        for split in SPLITS
    }
    old = read_manifest(folder)
    manifest = ShardManifest(
        [item.facts for item in written], counts, preprocessing_versions(), old.provenance
    )
    state(
        folder,
        ShardIndex(
            GRID, SPACING, [IndexedShard(item.facts.name, item.samples) for item in written]
        ),
        manifest,
    )


def state(folder: Path, index: ShardIndex, manifest: ShardManifest) -> None:
    """Write index and manifest so that each is sound by itself."""
    data = dump_manifest(manifest)
    (folder / "manifest.json").write_bytes(data)
    (folder / "index.json").write_bytes(
        dump_index(replace(index, manifest=sha256(data).hexdigest()))
    )


def rewrite(folder: Path, change: Callable[[Sample], PackedSample]) -> None:
    """Write all shards anew with the first sample changed; checksums, offsets and counts are those
    of the result."""
    index = read_index(folder)
    written = []
    for shard in index.shards:
        samples = [read_sample(folder, entry) for entry in shard.samples]
        packed = [change(item) if item.meta.key == "small_0" else packing(item) for item in samples]
        item = write_shard(packed, folder, shard.name)
        assert item is not None
        written.append(item)
    close(folder, written)


def packing(sample: Sample, tree: Tree | None = None, **members: bytes) -> PackedSample:
    """A sample as bytes, unchecked, with other JSON or members if given."""
    if tree is None:
        tree = json_tree(sample)
    arrays = {name: encode_volume(getattr(sample, name)) for name in ("ct", "lesions", "regions")}
    data = json.dumps(tree, separators=(",", ":")).encode()
    return PackedSample(
        sample.meta, {**arrays, "json": data, **members}, present_lesions(sample.lesions)
    )


def json_tree(sample: Sample) -> Tree:
    return dict(asdict(sample.meta))


# Sound shards


def test_sound_shards_pass(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = verify_shards(made)
    assert outcome.issues.faults == outcome.issues.notes == []
    assert len(outcome.statistics.sample_summaries) == 5 and outcome.shards_read == 3
    assert outcome.bytes_read == sum(path.stat().st_size for path in made.glob("*.tar"))
    assert main([str(made)]) == 0
    assert re.fullmatch(
        r"5 samples in 3 shards, .* MB in .* s \(.*\): no faults, no notes\n",
        capsys.readouterr().out,
    )


def test_exit_codes(
    shards: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (shards / SHARDS[1]).unlink()
    assert main([str(shards)]) == 1
    line = f"fault: {SHARDS[1]}: expected this shard, which the index names, found no such file"
    assert capsys.readouterr().out.splitlines()[0] == line
    assert main(["nosuch://bucket/shards"]) == 2 and "nosuch" in caplog.text
    assert main([str(shards / "elsewhere")]) == 1
    assert "No shards in" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(shards), "--sample", "0"])


def test_the_module_run_as_a_command_exits_with_1_on_a_fault(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data_pipeline.verify", str(tmp_path)]
    assert subprocess.run(command, cwd=CHECKOUT, capture_output=True).returncode == 1


def test_the_configuration_names_the_folder(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made.parent)
    assert main(["--config", "tiny"]) == 1  # none are there
    shutil.copytree(made, made.parent / verify_module.load_config("tiny").data.shards)
    assert main(["--config", "tiny"]) == 0


# Bytes


FILES = [*SHARDS, "index.json", "manifest.json"]


@pytest.fixture(scope="module")
def flippable(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(made, tmp_path_factory.mktemp("flips") / "shards"))


@settings(max_examples=120, deadline=None)
@given(
    name=st.sampled_from(FILES), where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255)
)
def test_any_other_byte_is_found(flippable: Path, name: str, where: float, flip: int) -> None:
    """Not one byte is harmless: tars have checksums in the manifest, the manifest has its own in
    the index, and all that the index says is compared with the tars, its spelling included."""
    path = flippable / name
    sound = path.read_bytes()
    data = bytearray(sound)
    data[int(where * len(data))] ^= flip
    try:
        path.write_bytes(data)
        found_issues = faults(flippable)
        assert found_issues and all(issue.expected and issue.found for issue in found_issues)
        if name in SHARDS:
            assert {issue.file_name for issue in found_issues} <= {name, "samples", "manifest.json"}
            assert any(
                issue.file_name == name and "SHA-256" in issue.expected for issue in found_issues
            )
        assert len(found_issues) <= 12, [str(issue) for issue in found_issues]
    finally:
        path.write_bytes(sound)


@pytest.mark.parametrize("name", ["index.json", "manifest.json"])
def test_other_spelling_of_the_same_json_is_found(shards: Path, name: str) -> None:
    path = shards / name
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    assert any("JSON as preprocessing writes it" in issue.expected for issue in faults(shards))


@pytest.mark.parametrize("share", [0.0, 0.0003, 0.1, 0.4, 0.7, 0.98])
def test_a_truncated_tar_is_a_few_faults_with_what_is_gone(shards: Path, share: float) -> None:
    path = shards / SHARDS[0]
    sound = path.read_bytes()
    path.write_bytes(sound[: int(share * len(sound))])
    found_issues = faults(shards)
    assert (
        VerificationIssue(
            SHARDS[0], None, f"{len(sound)} bytes", f"{int(share * len(sound))} bytes"
        )
        in found_issues
    )
    assert {issue.file_name for issue in found_issues} == {SHARDS[0]} and len(found_issues) <= 5
    if share < 0.9:
        lost = next(
            issue for issue in found_issues if "samples that the index names" in issue.expected
        )
        assert "small_1" in lost.found and ("small_0" in lost.found) == (share < 0.5)


def test_files_that_are_missing_or_too_many(shards: Path) -> None:
    (shards / SHARDS[2]).unlink()
    shutil.copy(shards / SHARDS[0], shards / "train-000002.tar")
    (shards / "notes.txt").write_text("mine")
    outcome = verify_shards(shards)
    assert {(issue.file_name, issue.found) for issue in outcome.issues.faults} == {
        (SHARDS[2], "no such file"),
        ("train-000002.tar", "a file that the index does not name"),
    }
    assert [issue.file_name for issue in outcome.issues.notes] == ["notes.txt"]


@pytest.mark.parametrize("name", ["index.json", "manifest.json"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"{}", b"\xff" * 9])
def test_no_usable_index_or_manifest(shards: Path, name: str, content: bytes | None) -> None:
    path = shards / name
    path.unlink() if content is None else path.write_bytes(content)
    (fault,) = faults(shards)
    assert fault.file_name == name and fault.sample_key is None and "make preprocess" in fault.found


@pytest.mark.parametrize(("first", "second"), [(0, 1), (0, 2)])
def test_swapped_tars_are_named_with_their_samples(shards: Path, first: int, second: int) -> None:
    a, b = shards / SHARDS[first], shards / SHARDS[second]
    a.rename(shards / "x")
    b.rename(a)
    (shards / "x").rename(b)
    found_issues = faults(shards)
    # Of each: checksum, too many, missing; sizes may agree.
    assert {issue.file_name for issue in found_issues} == {a.name, b.name} and len(
        found_issues
    ) <= 8
    for name, key in (
        (a.name, "small_0"),
        (b.name, read_index(shards).shards[second].samples[0].key),
    ):
        own_issues = [issue for issue in found_issues if issue.file_name == name]
        assert any("SHA-256" in issue.expected for issue in own_issues)
        assert any(
            key in issue.found and "samples that the index names" in issue.expected
            for issue in own_issues
        )


# Content that checksums cannot tell


def labels_beyond(sample: Sample) -> PackedSample:
    tree = json_tree(sample)
    tree["labels"]["Cardiomegaly"] = 2
    return packing(sample, tree)


def label_missing(sample: Sample) -> PackedSample:
    tree = json_tree(sample)
    del tree["labels"]["Cardiomegaly"]
    return packing(sample, tree)


def field_unknown(sample: Sample) -> PackedSample:
    return packing(sample, {**json_tree(sample), "extra": 1})


def field_missing(sample: Sample) -> PackedSample:
    tree = json_tree(sample)
    del tree["lesions_partial"]
    return packing(sample, tree)


def older_schema(sample: Sample) -> PackedSample:
    return packing(sample, {**json_tree(sample), "schema": 1})


def volume_damaged(sample: Sample) -> PackedSample:
    return packing(sample, ct=encode_volume(sample.ct)[:-7])


def volume_of_floats(sample: Sample) -> PackedSample:
    return packing(sample, ct=encode_volume(sample.ct.astype(np.float32)))


def mask_of_another_shape(sample: Sample) -> PackedSample:
    return packing(replace(sample, lesions=sample.lesions[:-1]))


def all_of_another_shape(sample: Sample) -> PackedSample:
    return packing(
        replace(sample, ct=sample.ct[:-1], lesions=sample.lesions[:-1], regions=sample.regions[:-1])
    )


def lesion_not_annotated(sample: Sample) -> PackedSample:
    return packing(replace(sample, lesions=sample.lesions | 1))


def lesion_bit_beyond(sample: Sample) -> PackedSample:
    return packing(replace(sample, lesions=sample.lesions | 1 << 5))


def region_beyond(sample: Sample) -> PackedSample:
    return packing(replace(sample, regions=sample.regions + np.uint8(21)))


def region_without_source(sample: Sample) -> PackedSample:
    return packing(replace(sample, regions=sample.regions + np.uint8(7)))


def regions_mirrored(sample: Sample) -> PackedSample:
    regions = np.zeros_like(sample.regions)
    regions[4:12, 20:28, 8:16] = REGION_BY_NAME["left upper lobe"].id
    regions[4:12, 20:28, 32:40] = REGION_BY_NAME["right upper lobe"].id
    return packing(
        replace(sample, regions=regions), {**json_tree(sample), "regions_source": "somewhere"}
    )


def hu_beyond(sample: Sample) -> PackedSample:
    ct = sample.ct.copy()
    ct[8, 24, 24] = 5000
    return packing(replace(sample, ct=ct))


def windowed(sample: Sample) -> PackedSample:
    ct = (np.clip(sample.ct.astype(float) / 4000 + 0.3, 0, 1) * 255).astype(np.int16)
    return packing(replace(sample, ct=ct))


def empty(sample: Sample) -> PackedSample:
    return packing(replace(sample, ct=np.full_like(sample.ct, -1024)))


def affine(
    column: int, factor: float, shift: float = 0.0, which: str = "grid_affine"
) -> Callable[[Sample], PackedSample]:
    """A change of one axis of an affine."""

    def change(sample: Sample) -> PackedSample:
        tree = json_tree(sample)
        rows = np.array(tree["geometry"][which])
        rows[:, column] *= factor
        rows[0, 3] += shift
        tree["geometry"] = {**tree["geometry"], which: rows.tolist()}
        return packing(sample, tree)

    return change


def affine_ragged(sample: Sample) -> PackedSample:
    tree = json_tree(sample)
    tree["geometry"]["grid_affine"] = [[1.0], [0.0, 1.0], [0.0, 0.0, 1.0], [0.0]]
    return packing(sample, tree)


def affine_not_a_number(sample: Sample) -> PackedSample:
    tree = json_tree(sample)
    tree["geometry"]["native_affine"][0][0] = None
    return packing(sample, tree)


def meta(**changes: Any) -> Callable[[Sample], PackedSample]:
    """Other JSON than the index, the grid or the schema wants."""
    return lambda sample: packing(sample, {**json_tree(sample), **changes})


CHANGES: list[tuple[Callable[[Sample], PackedSample], str]] = [
    (labels_beyond, r"labels must give 0, 1 or null"),
    (label_missing, r"labels must give .*'Cardiomegaly'"),
    (field_unknown, r"unknown \['extra'\]"),
    (field_missing, r"lesions_partial"),
    (older_schema, r"schema 1, this version reads 3"),
    (volume_damaged, r"member ct is damaged"),
    (volume_of_floats, r"expected a int16 volume, found .*float32"),
    (mask_of_another_shape, r"must have one shape, found \[\(15, 48, 48\), \(16, 48, 48\)\]"),
    (all_of_another_shape, r"expected volumes of \(16, 48, 48\) voxels, found \(15, 48, 48\)"),
    (
        lesion_not_annotated,
        r"expected no pericardial effusion outlined, since it was not annotated",
    ),
    (lesion_bit_beyond, r"lesion bits must be below 32"),
    (region_beyond, r"region ids at most 20"),
    (region_without_source, r"expected no regions, since they have no source, found 36864 voxels"),
    (
        regions_mirrored,
        r"right upper lobe .* further right than the left upper lobe .* "
        r"as if the volume were flipped",
    ),
    (hu_beyond, r"expected HU from -1024 to 3071, found -\d+ to 5000"),
    (windowed, r"expected plausible HU"),
    (empty, r"expected a CT, found -1024 HU throughout"),
    (
        affine(2, -1.0),
        r"grid axes that run to superior, posterior and left, found \('S', 'P', 'R'\)",
    ),
    (
        affine(1, -1.0),
        r"grid axes that run to superior, posterior and left, found \('S', 'A', 'L'\)",
    ),
    (affine(0, 0.0), r"expected an invertible 4 × 4 grid affine"),
    (affine(0, 0.0, which="native_affine"), r"expected an invertible 4 × 4 native affine"),
    (affine(2, 1.1), r"expected a grid affine with a spacing of \(16\.0, 7\.2, 7\.2\) mm"),
    (affine(0, 1.0, shift=5000.0), r"expected a grid that lies on its native volume"),
    (affine(0, 1.0, shift=90.0), r"expected -1024 HU outside the native volume"),
    (affine_ragged, r"expected an invertible 4 × 4 grid affine"),
    (affine_not_a_number, r"native_affine"),
    (
        meta(spacing=[16.0, 7.2, 7.3]),
        r"expected a spacing of \(16\.0, 7\.2, 7\.2\) mm, found \(16\.0, 7\.2, 7\.3\)",
    ),
    (meta(patient="other"), r"expected patient 'small_0' as in the index, found 'other'"),
    (meta(key="other"), r"expected key 'small_0' as in the index, found 'other'"),
    (
        meta(findings="No\x00 effusion."),
        r"expected findings without control characters, found U\+0000",
    ),
]


@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_wrong_content_under_right_checksums_is_one_fault(
    shards: Path, change: Callable[[Sample], PackedSample], words: str
) -> None:
    rewrite(shards, change)
    for options in ({}, {"sample_count": 5}):
        found_issues = [
            issue for issue in faults(shards, **options) if "of the same" not in issue.expected
        ]
        own_issues = [issue for issue in found_issues if issue.sample_key == "small_0"]
        assert any(re.search(words, str(issue)) for issue in own_issues), [
            str(issue) for issue in found_issues
        ]
        assert (
            all(issue.file_name == SHARDS[0] for issue in own_issues) and own_issues == found_issues
        )
        assert len(own_issues) <= 2, [str(issue) for issue in own_issues]


def test_rewriting_alone_is_no_fault(shards: Path) -> None:
    rewrite(shards, packing)
    assert faults(shards) == []


def test_a_lesion_in_a_case_labelled_without_is_a_note(shards: Path) -> None:
    def change(sample: Sample) -> PackedSample:
        item = replace(
            sample, meta=replace(sample.meta, labels={**sample.meta.labels, "Lung nodule": 0})
        )
        return packing(item)

    rewrite(shards, change)
    outcome = verify_shards(shards)
    assert outcome.issues.faults == []
    assert [(note.sample_key, note.found) for note in outcome.issues.notes] == [
        ("small_0", "the label 0")
    ]


@pytest.mark.parametrize(("share", "is_fault"), [(0.02, False), (0.0, True)])
def test_little_air_is_a_note_and_none_a_fault(shards: Path, share: float, is_fault: bool) -> None:
    def change(sample: Sample) -> PackedSample:
        dense = sample.ct.copy()
        air = np.flatnonzero((dense > -1024) & (dense <= -600))
        kept_sample = int(share * np.count_nonzero(dense > -1024))
        dense.ravel()[air[kept_sample:]] = np.random.default_rng(0).integers(
            -100, 100, len(air) - kept_sample
        )
        return packing(replace(sample, ct=dense))

    rewrite(shards, change)
    outcome = verify_shards(shards)
    (issue,) = outcome.issues.faults if is_fault else outcome.issues.notes
    assert (issue.sample_key, issue.expected) == ("small_0", "plausible HU")
    assert not (outcome.issues.notes if is_fault else outcome.issues.faults)


def test_a_patient_in_both_splits_and_a_key_twice(shards: Path) -> None:
    index = read_index(shards)
    train, _, valid = (
        [read_sample(shards, entry) for entry in shard.samples] for shard in index.shards
    )
    stranger = replace(valid[0], meta=replace(valid[0].meta, patient="small_0"))
    twin = replace(valid[1], meta=replace(valid[1].meta, key="small_1", scan="small_1"))
    written = [
        write_shard(train, shards, SHARDS[0]),
        write_shard([stranger, twin], shards, SHARDS[2]),
    ]
    (shards / SHARDS[1]).unlink()
    close(shards, [item for item in written if item is not None])
    found_issues = faults(shards)
    assert {(item.file_name, item.sample_key, item.expected) for item in found_issues} >= {
        ("index.json", None, "patient small_0 in one split"),
        ("samples", None, "patient small_0 in one split"),
        ("index.json", "small_1", "each key once"),
        (SHARDS[2], "small_1", "each key once"),
    }
    assert len(found_issues) <= 6, [str(item) for item in found_issues]


# Index and manifest


def edit_entry(index: ShardIndex, **changes: Any) -> ShardIndex:
    """Another first entry of the first shard."""
    shard = index.shards[0]
    entries = [replace(shard.samples[0], **changes), *shard.samples[1:]]
    return replace(index, shards=[replace(shard, samples=entries), *index.shards[1:]])


def offsets_wrong(index: ShardIndex, manifest: ShardManifest) -> tuple[ShardIndex, ShardManifest]:
    members = index.shards[0].samples[0].members
    return edit_entry(
        index, members={**members, "regions": (members["regions"][0] + 512, 7)}
    ), manifest


def member_missing(index: ShardIndex, manifest: ShardManifest) -> tuple[ShardIndex, ShardManifest]:
    members = dict(index.shards[0].samples[0].members)
    del members["regions"]
    return edit_entry(index, members=members), manifest


def order_wrong(index: ShardIndex, manifest: ShardManifest) -> tuple[ShardIndex, ShardManifest]:
    first = index.shards[0]
    return replace(
        index, shards=[replace(first, samples=first.samples[::-1]), *index.shards[1:]]
    ), manifest


def entry_too_many(index: ShardIndex, manifest: ShardManifest) -> tuple[ShardIndex, ShardManifest]:
    first = index.shards[0]
    more = replace(first.samples[0], key="ghost", patient="ghost")
    facts = replace(manifest.shards[0], samples=3)
    return (
        replace(index, shards=[replace(first, samples=[*first.samples, more]), *index.shards[1:]]),
        replace(manifest, shards=[facts, *manifest.shards[1:]]),
    )


def split_wrong(index: ShardIndex, manifest: ShardManifest) -> tuple[ShardIndex, ShardManifest]:
    return edit_entry(index, split="valid"), manifest


def shard_twice(index: ShardIndex, manifest: ShardManifest) -> tuple[ShardIndex, ShardManifest]:
    return replace(index, shards=[*index.shards, replace(index.shards[0], samples=[])]), manifest


def grid_wrong(index: ShardIndex, manifest: ShardManifest) -> tuple[ShardIndex, ShardManifest]:
    return replace(index, grid=(16, 48, 49)), manifest


def counts_wrong(index: ShardIndex, manifest: ShardManifest) -> tuple[ShardIndex, ShardManifest]:
    lesions = manifest.counts["train"]["lesions"]
    changed = {**lesions, "lung_nodule": {**lesions["lung_nodule"], "present": 2}}
    return index, replace(
        manifest,
        counts={**manifest.counts, "train": {**manifest.counts["train"], "lesions": changed}},
    )


def counts_of_labels_wrong(
    index: ShardIndex, manifest: ShardManifest
) -> tuple[ShardIndex, ShardManifest]:
    absent = {
        name: {"present": 0, "absent": 3, "unknown": 0}
        for name in manifest.counts["train"]["labels"]
    }
    return index, replace(
        manifest,
        counts={**manifest.counts, "train": {**manifest.counts["train"], "labels": absent}},
    )


def samples_wrong(index: ShardIndex, manifest: ShardManifest) -> tuple[ShardIndex, ShardManifest]:
    return index, replace(
        manifest, shards=[replace(manifest.shards[0], samples=3), *manifest.shards[1:]]
    )


def shard_forgotten(index: ShardIndex, manifest: ShardManifest) -> tuple[ShardIndex, ShardManifest]:
    return index, replace(manifest, shards=manifest.shards[:-1])


def checksum_wrong(index: ShardIndex, manifest: ShardManifest) -> tuple[ShardIndex, ShardManifest]:
    return index, replace(
        manifest, shards=[replace(manifest.shards[0], sha256="0" * 64), *manifest.shards[1:]]
    )


def schema_wrong(index: ShardIndex, manifest: ShardManifest) -> tuple[ShardIndex, ShardManifest]:
    return replace(index, schema=1), manifest


EDITS: list[
    tuple[Callable[[ShardIndex, ShardManifest], tuple[ShardIndex, ShardManifest]], str, int]
] = [
    (
        offsets_wrong,
        rf"{SHARDS[0]}, sample small_0: expected members at \(offset, size\) .* as in the index",
        1,
    ),
    (
        member_missing,
        r"index.json, sample small_0: expected offsets of ct, lesions, regions, json",
        2,
    ),
    (
        order_wrong,
        rf"{SHARDS[0]}: expected samples in the index's order small_1, small_0, "
        r"found small_0, small_1",
        1,
    ),
    (entry_too_many, rf"{SHARDS[0]}: expected 3 samples .*, found ghost not, or not whole", 1),
    (
        split_wrong,
        rf"{SHARDS[0]}, sample small_0: expected split 'valid' as in the index, found 'train'",
        4,
    ),
    (shard_twice, rf"index.json: expected each shard once, found {SHARDS[0]} 2 times", 5),
    (
        grid_wrong,
        rf"{SHARDS[0]}, sample small_0: expected volumes of \(16, 48, 49\) voxels, "
        r"found \(16, 48, 48\)",
        5,
    ),
    (
        counts_wrong,
        r"manifest.json: expected train lesions, lung_nodule: "
        r".*'present': 3.* as counted, found .*2",
        1,
    ),
    (
        counts_of_labels_wrong,
        r"expected train labels, Medical material: .*'unknown': 3.* and 17 more labels wrong",
        1,
    ),
    (samples_wrong, rf"manifest.json: expected 3 train samples in {SHARDS[0]}, found 2", 1),
    (
        shard_forgotten,
        rf"manifest.json: expected {SHARDS[2]}, which the index names, found no such shard",
        1,
    ),
    (checksum_wrong, rf"{SHARDS[0]}: expected SHA-256 0000.*, found [0-9a-f]{{64}}", 1),
    (schema_wrong, r"index.json: expected schema 3, found schema 1", 1),
]


@pytest.mark.parametrize(("edit", "words", "most"), EDITS)
def test_an_index_or_manifest_that_does_not_fit_is_found(
    shards: Path,
    edit: Callable[[ShardIndex, ShardManifest], tuple[ShardIndex, ShardManifest]],
    words: str,
    most: int,
) -> None:
    state(shards, *edit(read_index(shards), read_manifest(shards)))
    lines = [str(issue) for issue in faults(shards)]
    assert any(re.search(words, line) for line in lines), lines
    assert len(lines) <= most, lines


def test_a_manifest_of_another_run_is_found(shards: Path) -> None:
    """Sound by itself, with the same shards, but not the one that the index was written with."""
    manifest = read_manifest(shards)
    other = replace(manifest, provenance=replace(manifest.provenance, dropped={"no reason": 7}))
    (shards / "manifest.json").write_bytes(dump_manifest(other))
    (fault,) = faults(shards)
    assert fault.file_name == "manifest.json" and fault.expected.startswith("SHA-256")


def test_other_versions_are_one_note(shards: Path) -> None:
    manifest = read_manifest(shards)
    state(
        shards,
        read_index(shards),
        replace(manifest, versions={**manifest.versions, "numpy": "0.9"}),
    )
    outcome = verify_shards(shards)
    assert outcome.issues.faults == [] and len(outcome.issues.notes) == 1
    assert "in 5 samples" in outcome.issues.notes[0].found


def test_remarks_are_shown_up_to_a_number(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state(shards, *grid_wrong(read_index(shards), read_manifest(shards)))
    assert main([str(shards), "--show", "2"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("fault: ") for line in lines) == 2
    assert lines[2] == "and 3 more faults (--show 5 prints all)" and "5 faults" in lines[3]


# Ways to run


def test_some_samples_only(shards: Path) -> None:
    outcome = verify_shards(shards, sample_count=2)
    assert len(outcome.statistics.sample_summaries) == 2 and outcome.issues.faults == []
    assert outcome.bytes_read < sum(path.stat().st_size for path in shards.glob("*.tar")) / 2
    assert {fact.split for fact in outcome.statistics.sample_summaries} == {"train", "valid"}
    path = shards / SHARDS[0]
    path.write_bytes(path.read_bytes()[:-20000])
    assert [(item.file_name, item.sample_key) for item in faults(shards, sample_count=99)] == [
        (SHARDS[0], "small_1")
    ]
    index, manifest = offsets_wrong(read_index(shards), read_manifest(shards))
    index = edit_entry(index, members={**index.shards[0].samples[0].members, "ct": (0, 1 << 50)})
    state(shards, index, manifest)
    assert any(
        "ct within the" in item.expected and item.sample_key == "small_0"
        for item in faults(shards, sample_count=99)
    )


def test_workers_find_the_same(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shards / SHARDS[1]
    path.write_bytes(path.read_bytes()[:20000])
    rewritten = shards / SHARDS[2]
    rewritten.write_bytes(rewritten.read_bytes()[:-1] + b"x")
    alone = verify_shards(shards)
    monkeypatch.setattr(verify_module, "_MAX_SERIAL_BYTES", 0)
    together = verify_shards(shards, workers=2)
    assert together.issues == alone.issues and len(alone.issues.faults) >= 3
    assert (
        together.statistics.sample_summaries == alone.statistics.sample_summaries
        and together.bytes_read == alone.bytes_read
    )
    np.testing.assert_array_equal(
        together.statistics.hu_histograms["train"], alone.statistics.hu_histograms["train"]
    )


def test_a_killed_worker_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "_MAX_SERIAL_BYTES", 0)
    jobs = {partial(os._exit, number): 1 for number in (1, 2)}
    with pytest.raises(UserError, match="A worker was killed"):
        list(verify_module._run_checks(jobs, 2))  # type: ignore[arg-type]


class Ranged(SimpleHTTPRequestHandler):
    """Serves files and the parts of them that are asked for."""

    def log_message(self, *arguments: object) -> None:
        """Tests are quiet."""

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not path.is_file() or not asked:
            super().do_GET()
            return
        size, start, end = path.stat().st_size, int(asked[1]), int(asked[2])
        if start >= size:
            self.send_error(416)
            return
        data = path.read_bytes()[start : end + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{size}")
        self.end_headers()
        self.wfile.write(data)


class Whole(Ranged):
    """Serves whole files only."""

    def do_GET(self) -> None:
        del self.headers["Range"]
        super().do_GET()


@contextmanager
def served(folder: Path, handler: type[SimpleHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def comparable(outcome: VerificationResult) -> tuple[object, ...]:
    return (
        outcome.issues.faults,
        outcome.statistics.sample_summaries,
        outcome.bytes_read,
        outcome.shards_read,
    )


def test_shards_at_a_url(shards: Path) -> None:
    with served(shards, Ranged) as url:
        assert comparable(verify_shards(url)) == comparable(verify_shards(shards))
        assert main([url, "--sample", "3"]) == 0
        path = shards / SHARDS[0]
        data = bytearray(path.read_bytes())
        data[3000] ^= 1
        path.write_bytes(data)
        (shards / SHARDS[2]).unlink()
        (shards / "train-000009.tar").write_bytes(b"")
        found_issues = faults(url)
        assert found_issues == faults(shards) and {item.file_name for item in found_issues} == {
            SHARDS[0],
            SHARDS[2],
            "train-000009.tar",
        }
    with served(shards, Whole) as url:
        assert any("range requests" in item.found for item in faults(url, sample_count=1))
