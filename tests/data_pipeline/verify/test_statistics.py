"""Figures of shards against computations of their own, and pictures with something in them."""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from rich.console import Console

from data_pipeline.verify.contact_sheet import draw_contact_sheet, read_sheet_samples
from data_pipeline.verify.statistics import (
    DatasetStatistics,
    NativeSampling,
    count_hu,
    measure_native_sampling,
    pick_evenly,
)
from data_pipeline.verify.statistics_figures import write_statistics
from data_pipeline.verify.statistics_tables import build_tables
from data_pipeline.verify.verify import main, verify_shards
from rectvlm.data.shards import read_index, read_sample, write_shards
from rectvlm.data.store import ShardStore
from rectvlm.labels import FINDINGS, LESIONS
from rectvlm.types import GridGeometry, Sample, Split

PICTURES = {"labels.png", "sampling.png", "hu.png", "lesions.png", "contact_sheet.png"}


@pytest.fixture(scope="module")
def samples(phantom_shards: Path) -> list[Sample]:
    """Phantoms; two share a scan, two lack labels, one its report; one was outlined in part and one
    not at all."""
    made = [
        read_sample(phantom_shards, entry)
        for entry in read_index(phantom_shards).select_split(None)
    ]
    unknown = dict.fromkeys(FINDINGS)
    made[1].meta = replace(made[1].meta, labels=unknown, findings=None, impression=None)
    made[2].meta = replace(made[2].meta, labels={**made[2].meta.labels, "Emphysema": None})
    made[2].meta = replace(made[2].meta, indication="Cough.")
    twin = replace(made[3], meta=replace(made[3].meta, key="phantom_3_soft"))
    padded = replace(made[4].meta.hu, padding_voxels=9, slope=1.0, intercept=-1024.0)
    nothing = dict.fromkeys((lesion.key for lesion in LESIONS), False)
    made[4].meta = replace(
        made[4].meta,
        hu=padded,
        lesions_annotated=nothing,
        lesions_partial=dict.fromkeys(nothing, True),
    )
    made[6].lesions[:] = 0
    made[6].meta = replace(made[6].meta, lesions_annotated=nothing)
    return [*made, twin]


@pytest.fixture(scope="module")
def shards(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(samples, folder, samples_per_shard=3)
    return folder


@pytest.fixture(scope="module")
def statistics(shards: Path) -> DatasetStatistics:
    outcome = verify_shards(shards)
    assert outcome.issues.faults == []
    return outcome.statistics


def of(samples: Sequence[Sample], split: Split) -> list[Sample]:
    return [sample for sample in samples if sample.meta.split == split]


@pytest.mark.parametrize("split", ["train", "valid"])
def test_labels_are_counted_with_the_unknown_apart(
    split: Split, statistics: DatasetStatistics, samples: list[Sample]
) -> None:
    counted = statistics.to_dict()[split]["labels"]
    assert list(counted) == list(FINDINGS)
    for finding in FINDINGS:
        values = [sample.meta.labels[finding] for sample in of(samples, split)]
        assert counted[finding] == {
            "present": values.count(1),
            "absent": values.count(0),
            "unknown": values.count(None),
        }
    unknown = [numbers["unknown"] for numbers in statistics.to_dict()["train"]["labels"].values()]
    assert min(unknown) == 1 and counted["Emphysema"]["unknown"] == (2 if split == "train" else 0)


@pytest.mark.parametrize("split", ["train", "valid"])
def test_lesions_are_counted_and_measured(
    split: Split, statistics: DatasetStatistics, samples: list[Sample]
) -> None:
    counted = statistics.to_dict()[split]["lesions"]
    for lesion in LESIONS:
        part = of(samples, split)
        ml = [
            (np.bitwise_and(one.lesions, 2**lesion.bit) > 0).sum() * 16.0 * 7.2 * 7.2 / 1000
            for one in part
        ]
        ml = sorted(value for value in ml if value)
        annotated = sum(one.meta.lesions_annotated[lesion.key] for one in part)
        partial = sum(one.meta.lesions_partial[lesion.key] for one in part)
        found = counted[lesion.key]
        assert (found["present"], found["annotated"], found["partial"]) == (
            len(ml),
            annotated,
            partial,
        )
        assert found["not annotated"] == len(part) - annotated - partial
        if not ml:
            assert found["ml"] is None
            continue
        assert found["ml"]["min"] == pytest.approx(ml[0], abs=1e-4)
        assert found["ml"]["max"] == pytest.approx(ml[-1], abs=1e-4)
        assert found["ml"]["median"] == pytest.approx(np.median(ml), abs=1e-4)
    train = statistics.to_dict()["train"]["lesions"]
    assert any(one["present"] for one in train.values()) and all(
        one["partial"] == 1 for one in train.values()
    )
    valid = statistics.to_dict()["valid"]["lesions"]["lung_nodule"]
    assert valid["not annotated"] == 1
    assert valid["sources"] == {"phantom": valid["annotated"] + valid["partial"]}


def test_cases_reports_and_decisions(statistics: DatasetStatistics, samples: list[Sample]) -> None:
    train, valid = statistics.to_dict()["train"], statistics.to_dict()["valid"]
    assert (train["samples"], train["scans"], train["patients"]) == (7, 6, 6)
    assert (valid["samples"], valid["scans"], valid["patients"]) == (3, 3, 3)
    assert train["reconstructions of a scan"] == {1: 5, 2: 1}
    assert train["reports"] == 6 and valid["reports"] == 3
    assert (train["indications"], train["techniques"], valid["indications"]) == (1, 0, 0)
    assert (
        train["HU decisions"] == {"stored as HU": 6, "1 × stored − 1024": 1}
        and train["with padding"] == 1
    )
    assert train["region sources"] == {"phantom": 7}
    texts = [f"{one.meta.findings} {one.meta.impression}" for one in of(samples, "valid")]
    # The two headings of the report's text, a word each.
    assert valid["report words"]["max"] == max(len(text.split()) for text in texts) + 2


def test_sampling_is_that_of_the_files(
    statistics: DatasetStatistics, samples: list[Sample]
) -> None:
    for sample, facts in (
        (one, {f.key: f for f in statistics.sample_summaries}[one.meta.key]) for one in samples
    ):
        sizes = nib.affines.voxel_sizes(np.array(sample.meta.geometry.native_affine))
        # Phantoms have thick slices of many voxels: the axis with the fewest voxels is the one
        # between slices.
        along = int(np.argmin(sample.meta.geometry.native_shape))
        assert facts.native_sampling.slice_count == min(sample.meta.geometry.native_shape)
        assert facts.native_sampling.matrix_size == max(sample.meta.geometry.native_shape)
        assert facts.native_sampling.slice_spacing_mm == pytest.approx(sizes[along])
        assert facts.native_sampling.in_plane_mm == pytest.approx((sizes.sum() - sizes[along]) / 2)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_slices_are_counted_from_feet_to_head_whatever_the_order_of_axes(
    order: tuple[int, int, int],
) -> None:
    turn = nib.affines.from_matvec(nib.eulerangles.euler2mat(x=np.deg2rad(20)), (5, 5, 5))
    affine = (turn @ np.diag([-0.7, 0.9, 3.0, 1.0]))[:, [*order, 3]]
    shape = tuple(np.array([512, 400, 90])[list(order)].tolist())
    geometry = GridGeometry(np.eye(4).tolist(), shape, affine.tolist())  # type: ignore[arg-type]
    assert measure_native_sampling(geometry) == NativeSampling(
        pytest.approx(0.8), pytest.approx(3.0), 512, 90
    )


def test_hu_is_counted_by_split(statistics: DatasetStatistics, samples: list[Sample]) -> None:
    for split in ("train", "valid"):
        voxels = np.concatenate([one.ct.ravel() for one in of(samples, split)])  # type: ignore[arg-type]
        values, numbers = np.unique(voxels, return_counts=True)
        counts = statistics.hu_histograms[split]
        assert counts.shape == (4096,) and counts.sum() == voxels.size
        assert dict(
            zip((np.flatnonzero(counts) - 1024).tolist(), counts[counts > 0].tolist(), strict=True)
        ) == dict(zip(values.tolist(), numbers.tolist(), strict=True))
        figures = statistics.to_dict()[split]["HU"]
        assert figures["mean"] == pytest.approx(voxels.mean(), abs=0.06)
        assert figures["share at -1024"] == pytest.approx((voxels == -1024).mean(), abs=1e-4)
        soft = ((voxels >= -150) & (voxels <= 150)).mean()
        assert figures["share −150 to 150"] == pytest.approx(soft, abs=1e-4)
        air = ((voxels > -1024) & (voxels <= -700)).mean()
        assert figures["share above it to −700"] == pytest.approx(air, abs=1e-4)


def test_hu_beyond_the_range_counts_at_its_ends() -> None:
    counts = count_hu(np.array([[[-32768, -1024, 0, 3071, 32767]]], np.int16))
    assert (counts[0], counts[1024], counts[4095], counts.sum()) == (2, 1, 2, 5)


def test_items_are_spread_evenly() -> None:
    assert pick_evenly(range(5), 9) == [0, 1, 2, 3, 4]
    assert pick_evenly(range(100), 4) == [12, 37, 62, 87]
    assert pick_evenly([], 3) == []


def test_the_command_writes_figures_and_pictures(
    shards: Path, tmp_path: Path, statistics: DatasetStatistics, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "stats"
    assert main([str(shards), "--stats", str(out), "--workers", "1"]) == 0
    assert {path.name for path in out.iterdir()} == PICTURES | {"stats.json"}
    assert json.loads((out / "stats.json").read_text()) == json.loads(
        json.dumps(statistics.to_dict())
    )
    for name in PICTURES:
        pixels = matplotlib.image.imread(out / name)[..., :3]
        assert min(pixels.shape[:2]) > 400
        # More than text on a ground: the most common colour leaves room, and there are many.
        colours, counts = np.unique(
            (pixels * 255).astype(int) @ (1 << 16, 1 << 8, 1), return_counts=True
        )
        assert len(colours) > 60 and counts.max() < 0.98 * counts.sum(), name
        # Nothing is cut off: the outermost pixels are ground.
        edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (edges == pixels[0, 0]).all(), name
    printed = capsys.readouterr().out
    assert "Interlobular septal thickening" in printed and f"figures and pictures: {out}" in printed


def test_tables_fit_a_terminal_and_hold_the_figures(statistics: DatasetStatistics) -> None:
    console = Console(width=80, file=io.StringIO(), color_system=None)
    for table in build_tables(statistics):
        console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in text
    row = next(line for line in lines if line.lstrip().startswith("Emphysema")).split()[1:]
    found = statistics.to_dict()
    words = ("present", "absent", "unknown")
    assert [int(cell) for cell in row] == [
        found[s]["labels"]["Emphysema"][w] for s in ("train", "valid") for w in words
    ]
    assert (
        sum(line.lstrip().startswith(("lung nodule", "ground-glass opacity")) for line in lines)
        == 6
    )
    nodules = next(line for line in reversed(lines) if line.lstrip().startswith("lung nodule"))
    counts = [found[s]["lesions"]["lung_nodule"]["sources"]["phantom"] for s in ("train", "valid")]
    assert nodules.split()[2:] == ["phantom:", str(counts[0]), "phantom:", str(counts[1])]


def test_pictures_of_one_split_and_of_a_sample_that_cannot_be_read(
    shards: Path, tmp_path: Path, statistics: DatasetStatistics
) -> None:
    valid = DatasetStatistics(
        statistics.of_split("valid"), {"valid": statistics.hu_histograms["valid"]}
    )
    gone = replace(valid.sample_summaries[0], key="gone")
    written = write_statistics(
        DatasetStatistics([*valid.sample_summaries, gone], valid.hu_histograms),
        shards,
        tmp_path / "some",
    )
    assert {path.name for path in written} == PICTURES | {"stats.json"}
    assert read_sheet_samples([gone], ShardStore(shards)) == []


def test_the_contact_sheet_has_right_at_the_left_and_each_outline_in_its_colour(
    shards: Path,
) -> None:
    """A CT bright in the patient's left half alone, with a nodule there: both must be at the right
    of the picture."""
    index = read_index(shards)
    sample = read_sample(shards, index.select_split("train")[0])
    middle = sample.ct.shape[2] // 2
    sample.ct[:] = -1000
    sample.ct[:, :, middle:] = 300  # index x grows towards the patient's left
    sample.lesions[:] = 0
    sample.lesions[6:10, 20:28, 34:40] = 1 << 4
    sample.lesions[6:10, 20:28, 6:14] = 1 << 1
    looked = dict.fromkeys(sample.meta.lesions_annotated, True)
    sample.meta = replace(
        sample.meta, lesions_annotated=looked, lesions_partial=dict.fromkeys(looked, False)
    )
    figure = draw_contact_sheet([sample])
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    file.seek(0)
    pixels = matplotlib.image.imread(file)[..., :3]
    height = pixels.shape[0]
    for axes in figure.axes:
        box = axes.get_position()
        rows = slice(round((1 - box.y1) * height), round((1 - box.y0) * height))
        columns = slice(round(box.x0 * pixels.shape[1]), round(box.x1 * pixels.shape[1]))
        view = pixels[rows, columns]
        half = view.shape[1] // 2
        assert np.median(view[:, half + 5 :]) > 0.9 and np.median(view[:, : half - 5]) < 0.4
        for lesion, on_right in ((LESIONS[4], True), (LESIONS[1], False)):
            like = (np.abs(view - to_rgb(lesion.colour)).max(axis=-1) < 0.08).nonzero()[1]
            assert like.size > 20 and ((like > half) == on_right).all(), lesion
        marks = {text.get_text(): text.get_position()[0] for text in axes.texts}
        assert marks["R"] < 0.1 and marks["L"] > 0.9


def test_the_head_is_at_the_top_of_a_coronal_slice(shards: Path) -> None:
    sample = read_sample(shards, read_index(shards).select_split("train")[0])
    sample.ct[:] = -1000
    sample.ct[sample.ct.shape[0] // 2 :] = 300  # index z grows towards the head
    sample.lesions[:] = 0
    figure = draw_contact_sheet([sample])
    coronal = figure.axes[1].images[0].get_array()
    assert coronal is not None and (coronal[0] == 300).all() and (coronal[-1] == -1000).all()
    assert [text.get_text() for text in figure.axes[1].texts] == ["R", "L", "H", "mediastinal"]
