"""`rectvlm embed`: features of shards and of files, in both formats, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from broken_cts import BROKEN
from conftest import write_nifti
from narrow_encoders import NARROW, OVERRIDES, NarrowR3D18Encoder, published_names
from safetensors.torch import save_file

from rectvlm.checkpoint import Checkpoint
from rectvlm.cli import main
from rectvlm.config import load_config
from rectvlm.data.dataset import ShardDataset
from rectvlm.embed.features import FeatureTable, join_tables, read_features, write_features
from rectvlm.models import load_part
from rectvlm.models.encoder import ENCODERS
from rectvlm.types import UserError
from tests.small_cases import AFFINE, body

BROKEN_KIND = next(iter(BROKEN))


def embed(source: object, out: Path, *words: object) -> int:
    return main(["embed", str(source), "--out", str(out), "--device", "cpu", *map(str, words)])


@pytest.fixture(scope="module")
def chest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nifti(body(1)[0], AFFINE, tmp_path_factory.mktemp("chest") / "chest.nii.gz")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_features_of_shards_are_the_global_tokens_with_keys_and_labels(
    suffix: str,
    tiny_run: Callable[[int], Path],
    phantom_shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / f"features{suffix}"
    checkpoint = tiny_run(1)
    assert embed(phantom_shards, out, "--checkpoint", checkpoint, "--batch-size", 2) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    table = read_features(out)
    assert table.splits == ["train"] * 6 + ["valid"] * 3
    assert table.keys == table.patients == table.scans == [f"phantom_{n}" for n in range(9)]
    assert table.features.shape == (9, 48) and table.features.dtype == np.float32
    assert table.labels.shape == (9, 18) and "slice-region" in table.encoder

    batch = ShardDataset(Checkpoint.open(checkpoint).config.data, "valid").read_batch([1])
    encoder = load_part(checkpoint, "encoder", "cpu")
    with torch.no_grad():
        token = encoder(batch.ct, batch.regions, batch.regions_known).global_token
    np.testing.assert_allclose(table.features[7], token[0].numpy(), rtol=1e-4, atol=1e-5)
    labels = np.where(batch.labels_known, batch.labels, np.nan)
    np.testing.assert_array_equal(table.labels[7], labels[0])


def test_hidden_regions_and_a_limit_change_the_features(
    tiny_run: Callable[[int], Path], phantom_shards: Path, tmp_path: Path
) -> None:
    words = ["--checkpoint", tiny_run(1), "--limit", 1]
    assert embed(phantom_shards, tmp_path / "with.npz", *words) == 0
    assert embed(phantom_shards, tmp_path / "without.npz", *words, "--hide-regions") == 0
    shown, hidden = (read_features(tmp_path / f"{name}.npz") for name in ("with", "without"))
    assert shown.keys == hidden.keys == ["phantom_0", "phantom_6"]
    assert not np.allclose(shown.features, hidden.features)


def test_a_folder_is_walked_and_broken_files_end_nothing(
    tiny_run: Callable[[int], Path], chest: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cohort"
    (folder / "P1").mkdir(parents=True)
    hu, _ = body(1)
    write_nifti(hu, AFFINE, folder / "P1" / "ct.nii.gz")
    BROKEN[BROKEN_KIND](hu, AFFINE, folder / "broken.nii.gz")
    out = tmp_path / "features.safetensors"
    assert embed(folder, out, "--checkpoint", tiny_run(1)) == 0
    table = read_features(out)
    assert table.keys == ["ct"] and table.splits == [""] and np.isnan(table.labels).all()
    rows = (tmp_path / "features.safetensors.failed.jsonl").read_text().splitlines()
    assert len(rows) == 1 and "broken.nii.gz" in json.loads(rows[0])["file"]

    assert embed(chest, tmp_path / "one.npz", "--checkpoint", tiny_run(1)) == 0
    alone = read_features(tmp_path / "one.npz")
    np.testing.assert_allclose(alone.features, table.features, rtol=1e-4, atol=1e-5)


def test_a_single_file_that_cannot_be_used_is_an_error(
    tiny_run: Callable[[int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    BROKEN[BROKEN_KIND](body(1)[0], AFFINE, tmp_path / "broken.nii.gz")
    out = tmp_path / "features.npz"
    assert embed(tmp_path / "broken.nii.gz", out, "--checkpoint", tiny_run(1)) == 2
    error = capsys.readouterr().err
    assert "rectvlm: " in error and "broken.nii.gz" in error and not out.exists()


def test_another_file_is_not_replaced(
    tiny_run: Callable[[int], Path],
    chest: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "model.safetensors"
    out.write_bytes(b"a model")
    assert embed(chest, out, "--checkpoint", tiny_run(1)) == 2
    assert "holds no features" in capsys.readouterr().err and out.read_bytes() == b"a model"


def make_table(n: int, first: int = 0, encoder: str = "e") -> FeatureTable:
    names = [f"case {number}" for number in range(first, first + n)]
    features = np.random.default_rng(first).normal(size=(n, 4)).astype(np.float32)
    labels = np.full((n, 18), np.nan, np.float32)
    labels[:, 0] = 1
    return FeatureTable(features, labels, names, names, names, ["train"] * n, encoder)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_a_table_comes_back_as_it_was_written(suffix: str, tmp_path: Path) -> None:
    table = make_table(3)
    write_features(table, tmp_path / f"t{suffix}")
    again = read_features(tmp_path / f"t{suffix}")
    np.testing.assert_array_equal(again.features, table.features)
    np.testing.assert_array_equal(again.labels, table.labels)
    assert (again.keys, again.splits, again.encoder) == (table.keys, table.splits, table.encoder)


def test_tables_of_two_encoders_or_of_one_ct_twice_are_not_joined() -> None:
    files = [Path("a.npz"), Path("b.npz")]
    assert len(join_tables([make_table(3), make_table(2, first=3)], files)) == 5
    with pytest.raises(UserError, match=r"b\.npz holds features of another encoder"):
        join_tables([make_table(3), make_table(2, 3, "other")], files)
    with pytest.raises(UserError, match="2 CTs are in the features more than once"):
        join_tables([make_table(3), make_table(2, first=1)], files)


def test_an_encoder_from_elsewhere_embeds_without_training(
    phantom_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENCODERS, "r3d-18", NarrowR3D18Encoder)
    overrides = [*OVERRIDES["r3d-18"], NARROW, f"data.shards={phantom_shards}"]
    config = load_config("tiny", overrides)
    encoder = NarrowR3D18Encoder(config.encoder, config.data).eval()
    tensors = [t for name, t in encoder.state_dict().items() if not name.startswith("norm.")]
    weights = dict(zip(published_names(encoder), tensors, strict=False))
    save_file(weights, tmp_path / "kinetics.safetensors")

    words = ["--limit", 1, "--config", "tiny", *overrides]
    init = f"encoder.init={tmp_path}/kinetics.safetensors"
    assert embed(phantom_shards, tmp_path / "kinetics.npz", *words, init) == 0
    assert embed(phantom_shards, tmp_path / "random.npz", *words) == 0
    table, control = (read_features(tmp_path / f"{n}.npz") for n in ("kinetics", "random"))
    batch = ShardDataset(config.data, "valid").read_batch([0])
    with torch.no_grad():
        token = encoder(batch.ct, batch.regions, batch.regions_known).global_token
    np.testing.assert_allclose(table.features[1], token[0].numpy(), rtol=1e-3, atol=1e-4)
    assert not np.allclose(table.features, control.features)
    assert "kinetics.safetensors" in table.encoder and "random weights" in control.encoder
