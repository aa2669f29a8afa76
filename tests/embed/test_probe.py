"""`rectvlm probe`: it finds what features hold, only that, and never scores a patient it saw."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from rectvlm.cli import main
from rectvlm.embed.features import FeatureTable, write_features
from rectvlm.embed.options import ProbeOptions
from rectvlm.embed.probe import LinearProbe, probe_features
from rectvlm.labels import FINDINGS

SCORES_FILE = "features.probe-valid.json"


def make_features(n_train: int = 80, n_valid: int = 60, channels: int = 12) -> FeatureTable:
    """Finding 0 is written in channel 0, finding 1 is noise, finding 2 is never there, and the
    other labels are unknown. Two CTs of each scan, two scans of each patient."""
    random = np.random.default_rng(0)
    n = n_train + n_valid
    labels = np.full((n, 18), np.nan, np.float32)
    truth = random.integers(0, 2, (n // 2, 2)).repeat(2, axis=0)
    labels[:, :2], labels[:, 2] = truth, 0
    features = random.normal(size=(n, channels)).astype(np.float32)
    features[:, 0] += 4 * truth[:, 0]
    features *= np.geomspace(0.01, 100, channels, dtype=np.float32)
    return FeatureTable(
        features=features,
        labels=labels,
        keys=[f"case {i}" for i in range(n)],
        patients=[f"patient {i // 4}" for i in range(n)],
        scans=[f"scan {i // 2}" for i in range(n)],
        splits=["train"] * n_train + ["valid"] * n_valid,
        encoder="slice-region of a test",
    )


def probe(table: FeatureTable, folder: Path, *words: str) -> int:
    write_features(table, folder / "features.safetensors")
    return main(["probe", str(folder / "features.safetensors"), *words])


def test_the_probe_finds_what_the_features_hold_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert probe(make_features(), tmp_path, "--bootstrap", "50") == 0
    printed = capsys.readouterr().out
    path = tmp_path / SCORES_FILE
    assert printed.splitlines()[-1] == str(path)
    assert all(word in printed for word in FINDINGS[0].split())  # narrow tables fold names
    result = json.loads(path.read_text())
    rows = list(result["classification"]["per_finding"].values())
    assert rows[0]["auroc"] > 0.95 and rows[0]["ci95"]["auroc"][0] > 0.8
    assert 0.2 < rows[1]["auroc"] < 0.8
    assert rows[2]["auroc"] is None and rows[2]["n_known"] == 0
    assert FINDINGS[2] in result["not_fitted"] and FINDINGS[0] not in result["not_fitted"]
    assert (result["n_train"], result["n_scans"], result["n_patients"]) == (80, 30, 15)
    best = max(result["macro_auroc_by_c"].values())
    assert result["macro_auroc_by_c"][f"{result['c']:g}"] == best


def test_reconstructions_of_a_scan_count_once(tmp_path: Path) -> None:
    table = make_features()
    counts = []
    for splits in (table.splits, ["train"] * 80 + ["valid", ""] * 30):
        out = tmp_path / "out.json"
        assert probe(replace(table, splits=splits), tmp_path, "--bootstrap=0", f"--out={out}") == 0
        result = json.loads(out.read_text())
        counts.append(result["classification"]["per_finding"][FINDINGS[0]]["n_known"])
    assert counts == [30, 30]


def test_features_without_information_give_chance(tmp_path: Path) -> None:
    table = make_features()
    noise = np.random.default_rng(1).normal(size=table.features.shape).astype(np.float32)
    assert probe(replace(table, features=noise), tmp_path, "--bootstrap", "0") == 0
    result = json.loads((tmp_path / SCORES_FILE).read_text())
    assert 0.2 < result["classification"]["macro"]["auroc"] < 0.8


def test_scores_equal_scikit_learns_on_means_over_reconstructions(tmp_path: Path) -> None:
    table = make_features()
    write_features(table, tmp_path / "f.npz")
    options = ProbeOptions((tmp_path / "f.npz",), bootstrap=0)
    result = probe_features(options)
    assert result.as_dict() == probe_features(options).as_dict()
    linear = LinearProbe(table.select_rows(np.arange(80)), result.c)
    probabilities = linear.predict(table.features[80:])[:, 0].reshape(-1, 2).mean(axis=1)
    expected = roc_auc_score(table.labels[80::2, 0], probabilities)
    auroc = result.classification["per_finding"][FINDINGS[0]]["auroc"]
    assert auroc == pytest.approx(expected)


def spoil(table: FeatureTable, how: str) -> FeatureTable:
    if how == "patients":
        return replace(table, patients=[f"patient {i % 7}" for i in range(len(table))])
    if how == "labels":
        return replace(table, labels=np.full_like(table.labels, np.nan))
    if how == "split":
        return replace(table, splits=["train"] * len(table))
    return replace(table, patients=["a"] * 80 + ["b"] * 60)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("patients", "7 patients, such as patient 0, are in train and in valid"),
        ("labels", "'train' has no labels"),
        ("split", "'valid' has no CT"),
        ("few", "has 1 patients with labels"),
    ],
)
def test_features_that_cannot_be_probed_are_refused(
    how: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert probe(spoil(make_features(), how), tmp_path) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("*.json"))
