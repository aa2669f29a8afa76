"""Shards: samples come back unchanged, bytes repeat, WebDataset can read them, damage is named."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from rectvlm.data.report_text import join_report_sections, split_report_sections
from rectvlm.data.sample import SAMPLE_MEMBERS, decode_sample, encode_sample
from rectvlm.data.shard_manifest import read_manifest
from rectvlm.data.shards import read_index, read_sample, write_shards
from rectvlm.labels import FINDINGS, LESIONS
from rectvlm.lesion_bits import lesion_mask
from rectvlm.types import GridGeometry, HuConversion, Sample, SampleMeta, Split, UserError

GRID = (4, 6, 8)


def make_sample(number: int, split: Split = "train", **changes: object) -> Sample:
    rng = np.random.default_rng(number)
    meta = SampleMeta(
        key=f"case_{number}",
        split=split,
        source="test",
        patient=f"patient_{number}",
        scan=f"scan_{number}",
        labels={finding: (0, 1, None)[(i + number) % 3] for i, finding in enumerate(FINDINGS)},
        findings="Clear lungs. É ≥ 3 mm.",
        impression=None,
        spacing=(5.0, 1.0, 1.0),
        geometry=GridGeometry(
            np.eye(4).tolist(), (8, 6, 4), np.diag([-1.0, -1.0, 5.0, 1.0]).tolist()
        ),
        hu=HuConversion(1.0, 0.0, "test"),
        lesions_annotated={lesion.key: lesion.bit == number % 5 for lesion in LESIONS},
        regions_source="test",
    )
    return Sample(
        ct=rng.integers(-1024, 3072, GRID).astype(np.int16),
        lesions=rng.integers(0, 32, GRID).astype(np.uint8),
        regions=rng.integers(0, 21, GRID).astype(np.uint8),
        meta=replace(meta, **changes),  # type: ignore[arg-type]
    )


def assert_equal(a: Sample, b: Sample) -> None:
    assert a.meta == b.meta
    for name in ("ct", "lesions", "regions"):
        left, right = getattr(a, name), getattr(b, name)
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


def mixed() -> list[Sample]:
    return [make_sample(n, "valid" if n % 3 == 2 else "train") for n in range(8)]


def test_what_is_written_is_read_by_offset_in_any_order_and_from_threads(tmp_path: Path) -> None:
    samples = mixed()
    written = write_shards(samples, tmp_path, samples_per_shard=2)
    index = read_index(tmp_path)
    assert index == written
    assert [shard.name for shard in index.shards] == [
        "train-000000.tar",
        "train-000001.tar",
        "train-000002.tar",
        "valid-000000.tar",
    ]
    by_key = {sample.meta.key: sample for sample in samples}
    entries = index.select_split(None)
    assert [e.key for e in index.select_split("train")] == [f"case_{n}" for n in (0, 1, 3, 4, 6, 7)]
    assert {e.key for e in entries} == set(by_key)
    with ThreadPoolExecutor(4) as pool:
        order = entries[::-1] * 3
        for entry, sample in zip(
            order, pool.map(lambda e: read_sample(tmp_path, e), order), strict=True
        ):
            assert_equal(sample, by_key[entry.key])


def test_plain_webdataset_reads_the_shards(tmp_path: Path) -> None:
    samples = mixed()
    index = write_shards(samples, tmp_path, samples_per_shard=3)
    urls = [str(tmp_path / shard.name) for shard in index.shards]
    read = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert [record["__key__"] for record in read] == [
        entry.key for entry in index.select_split(None)
    ]
    by_key = {sample.meta.key: sample for sample in samples}
    for record in read:
        assert json.loads(record["json"])["key"] == record["__key__"]
        assert_equal(decode_sample(record), by_key[record["__key__"]])


def test_shards_repeat_byte_for_byte_and_name_their_digest(tmp_path: Path) -> None:
    first = write_shards(mixed(), tmp_path / "a", samples_per_shard=2)
    write_shards(mixed(), tmp_path / "b", samples_per_shard=2)
    for shard in first.shards:
        assert (tmp_path / "a" / shard.name).read_bytes() == (
            tmp_path / "b" / shard.name
        ).read_bytes()
    changed = mixed()
    changed[0].ct[0, 0, 0] ^= 1
    write_shards(changed, tmp_path / "c", samples_per_shard=2)
    of_a, of_c = (read_manifest(tmp_path / name).shards for name in "ac")
    assert (
        of_a[0].sha256 == hashlib.sha256((tmp_path / "a" / of_a[0].name).read_bytes()).hexdigest()
    )
    assert of_a[0].sha256 != of_c[0].sha256 and of_a[1] == of_c[1]


def test_counts_are_by_split(tmp_path: Path) -> None:
    samples = mixed()
    write_shards(samples, tmp_path)
    found = read_manifest(tmp_path).counts
    for split in ("train", "valid"):
        part = [sample for sample in samples if sample.meta.split == split]
        for finding, counts in found[split]["labels"].items():
            values = [sample.meta.labels[finding] for sample in part]
            assert counts == {
                "present": values.count(1),
                "absent": values.count(0),
                "unknown": values.count(None),
            }
        for lesion in LESIONS:
            annotated = sum(sample.meta.lesions_annotated[lesion.key] for sample in part)
            present = sum(bool(lesion_mask(sample.lesions, lesion).any()) for sample in part)
            assert found[split]["lesions"][lesion.key] == {
                "present": present,
                "annotated": annotated,
            }


def test_dev_chooses_checkpoints_and_thresholds_where_there_is_one(tmp_path: Path) -> None:
    splits: list[Split] = ["grounding", "valid", "dev", "train"]
    samples = [make_sample(number, split) for number, split in enumerate(splits)]
    without = write_shards([sample for sample in samples if sample.meta.split != "dev"], tmp_path)
    assert (without.selection_split, without.threshold_split) == ("valid", "train")
    index = write_shards(samples, tmp_path)
    assert (index.selection_split, index.threshold_split) == ("dev", "dev")
    assert [entry.split for entry in index.select_split(None)] == splits[::-1]
    counts = read_manifest(tmp_path).counts
    assert all(sum(counts[split]["labels"]["Emphysema"].values()) == 1 for split in splits)


def test_a_smaller_second_run_leaves_no_stale_shard(tmp_path: Path) -> None:
    write_shards(mixed(), tmp_path, samples_per_shard=1)
    write_shards(mixed()[:2], tmp_path, samples_per_shard=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "index.json",
        "manifest.json",
        "train-000000.tar",
        "train-000001.tar",
    ]


@pytest.mark.parametrize("key", ["train_1.nii", "a/b", "", "x" * 81, "ä"])
def test_keys_that_webdataset_would_cut_are_refused(key: str) -> None:
    with pytest.raises(UserError, match="key"):
        encode_sample(make_sample(0, key=key))


def test_a_patient_in_two_splits_and_a_double_key_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="patient_9 is in train and in valid"):
        write_shards(
            [make_sample(0, patient="patient_9"), make_sample(1, "valid", patient="patient_9")],
            tmp_path,
        )
    with pytest.raises(UserError, match="patient_9 is in dev and in train"):
        write_shards(
            [make_sample(0, "dev", patient="patient_9"), make_sample(1, patient="patient_9")],
            tmp_path,
        )
    with pytest.raises(UserError, match="case_1"):
        write_shards([make_sample(1), make_sample(1)], tmp_path)
    assert not (tmp_path / "index.json").exists()


def test_two_grids_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one grid and spacing"):
        write_shards([make_sample(0), make_sample(1, spacing=(4.0, 1.0, 1.0))], tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tree: tree.update(extra=1), "extra"),
        (lambda tree: tree.pop("versions"), "versions"),
        (lambda tree: tree.pop("patient"), "patient"),
        (lambda tree: tree["hu"].pop("padding_voxels"), "hu.padding_voxels"),
        (lambda tree: tree["labels"].pop("Emphysema"), "Emphysema"),
        (lambda tree: tree["labels"].update(Emphysema=2), "labels"),
        (lambda tree: tree["lesions_annotated"].pop("lung_nodule"), "lung_nodule"),
        (lambda tree: tree["lesions_source"].pop("lung_nodule"), "lung_nodule"),
        (lambda tree: tree.update(lesions_source="phantom"), "make the shards again"),
        (lambda tree: tree.update(schema=1), "schema"),
        (lambda tree: tree.update(split="test"), "split"),
    ],
)
def test_another_schema_is_named(change, named: str) -> None:  # type: ignore[no-untyped-def]
    members = encode_sample(make_sample(0))
    tree = json.loads(members["json"])
    change(tree)
    with pytest.raises(UserError, match=named):
        decode_sample({**members, "json": json.dumps(tree).encode()})


@pytest.mark.parametrize("name", SAMPLE_MEMBERS)
def test_a_damaged_or_missing_member_is_named(name: str) -> None:
    members = encode_sample(make_sample(0))
    with pytest.raises(UserError, match=name):
        decode_sample({k: v for k, v in members.items() if k != name})
    for broken in (b"", members[name][:-3], b"\x80\x04." + members[name], members[name] + b"xx"):
        with pytest.raises(UserError):
            decode_sample({**members, name: broken})


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_flipped_byte_of_a_volume_gives_a_user_error_or_a_volume(data: st.DataObject) -> None:
    members = encode_sample(make_sample(0))
    packed = bytearray(members["ct"])
    packed[data.draw(st.integers(0, min(120, len(packed) - 1)))] ^= data.draw(st.integers(1, 255))
    with suppress(UserError):
        assert decode_sample({**members, "ct": bytes(packed)}).ct.shape == GRID


def test_a_truncated_shard_and_a_missing_folder_are_named(tmp_path: Path) -> None:
    index = write_shards(mixed(), tmp_path)
    shard = tmp_path / index.shards[0].name
    shard.write_bytes(shard.read_bytes()[:2000])
    with pytest.raises(UserError, match="train-000000"):
        read_sample(tmp_path, index.select_split("train")[-1])
    shard.unlink()
    with pytest.raises(UserError, match="train-000000"):
        read_sample(tmp_path, index.select_split("train")[0])
    with pytest.raises(UserError, match="make preprocess"):
        read_index(tmp_path / "nowhere")
    (tmp_path / "index.json").write_text('{"grid": 3}')
    with pytest.raises(UserError, match="damaged"):
        read_index(tmp_path)


# Markup around a heading counts as part of it, so a section that begins with '*' or '#' loses it.
_TEXT = st.none() | st.text(
    st.characters(codec="utf-8", exclude_characters=":\r*#"), min_size=1
).map(str.strip).filter(bool)


@given(_TEXT, _TEXT)
def test_report_text_is_undone(findings: str | None, impression: str | None) -> None:
    text = join_report_sections(findings, impression)
    assert (text is None) == (findings is None and impression is None)
    if text is not None:
        assert split_report_sections(text) == (findings, impression)


@pytest.mark.parametrize(
    ("text", "sections"),
    [
        ("", (None, None)),
        ("No heading at all.", ("No heading at all.", None)),
        ("**Findings:** Clear.\n\n**IMPRESSION:** Normal.", ("Clear.", "Normal.")),
        ("Findings: Clear. Impression: Normal.", ("Clear.", "Normal.")),
        ("Clear.\nImpression: Normal.", ("Clear.", "Normal.")),
        ("Impression: Normal.", (None, "Normal.")),
        ("Findings:\nImpression:", (None, None)),
    ],
)
def test_generated_text_is_split_as_far_as_it_goes(
    text: str, sections: tuple[str | None, str | None]
) -> None:
    assert split_report_sections(text) == sections
