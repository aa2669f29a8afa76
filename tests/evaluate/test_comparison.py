"""Is A better than B: equal models are not told apart, a planted difference is, bad pairs are
refused."""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from rectvlm.cli import main
from rectvlm.evaluate.case_records import CaseRecord, LesionRecord
from rectvlm.evaluate.comparison import compare_evaluations, compare_pair
from rectvlm.evaluate.comparison_options import ComparisonOptions
from rectvlm.evaluate.comparison_table import describe_comparison, make_comparison_table
from rectvlm.evaluate.options import EvaluationOptions
from rectvlm.evaluate.pairing import pair_evaluations
from rectvlm.evaluate.scans import group_by_scan
from rectvlm.evaluate.stored_evaluation import (
    CASES_FILE,
    OMITTED_FIELDS,
    REPORTS_FILE,
    STATISTICS_FILE,
    StoredEvaluation,
    read_stored_evaluation,
    write_report_statistics,
)
from rectvlm.evaluate.summary import draw_resamples, summarize_findings, summarize_lesions
from rectvlm.files import write_json
from rectvlm.finding_thresholds import NOT_FITTED
from rectvlm.labels import FINDINGS, LESIONS, N_FINDINGS
from rectvlm.metrics.lesions import LesionComparison
from rectvlm.metrics.reports import compute_report_statistics, headline_scores, summarize_reports
from rectvlm.types import REXGROUNDING_OUTLINES, JsonObject, UserError

Records = list[CaseRecord]
TEXTS = ["Findings: left pleural effusion.", "Findings: no effusion. There is a nodule."]
OPTIONS = EvaluationOptions(bootstrap=0)


def make_records(
    seed: int, n: int = 60, skill: float = 1.0, cases_seed: int = 0, texts: bool = False
) -> Records:
    """Cases of n scans, two of each patient, as a model of some skill answers them."""
    cases, model = np.random.default_rng(cases_seed), np.random.default_rng(1000 + seed)
    labels = cases.random((n, N_FINDINGS)) < 0.4
    hardness = cases.normal(size=(n, N_FINDINGS))
    logits = skill * (2 * labels - 1) + hardness + model.normal(size=(n, N_FINDINGS))
    true_sizes = cases.integers(50, 100, n).tolist()
    records = []
    for i in range(n):
        both = int(model.integers(10, 50))
        native = LesionComparison(both, 60, true_sizes[i], 3.0, 0.5, 1, 1, 1, 1, 0.1)
        lesion = LesionRecord(native, (1, 2, 2), "shard", REXGROUNDING_OUTLINES)
        text = TEXTS[(i + seed) % 2] if texts else None
        records.append(
            CaseRecord(
                purpose="evaluate",
                position=i,
                key=f"case_{i}_1",
                scan=f"case_{i}",
                patient=f"patient_{i // 2}",
                probabilities=(1 / (1 + np.exp(-logits[i]))).tolist(),
                labels=[int(value) if j else None for j, value in enumerate(labels[i])],
                lesions=[lesion, None, None, None, None],
                reference=TEXTS[i % 2] if texts else None,
                generated=text,
                without_image=text,
                regions=None,
            )
        )
    return records


def make_metrics(records: Records) -> JsonObject:
    """The keys of `metrics.json` that a comparison reads, by the functions of the evaluation."""
    scans = group_by_scan(records)
    return {
        "checkpoint": "runs/x",
        "config": "tiny",
        "step": 7,
        "split": "valid",
        "n_cases": len(records),
        "classification": summarize_findings(scans, NOT_FITTED, None),
        "localization": summarize_lesions(scans, draw_resamples(scans.patients, OPTIONS), OPTIONS),
        "reports": None,
    }


def write_evaluation(folder: Path, records: Records) -> Path:
    """A folder as `rectvlm evaluate` writes it; reports where the records have some."""
    metrics = make_metrics(records)
    folder.mkdir()
    with_report = [record for record in records if record.generated is not None]
    if with_report:
        statistics = compute_report_statistics(
            [record.generated or "" for record in with_report],
            [record.reference for record in with_report],
            labels=np.array([[value or 0 for value in record.labels] for record in with_report]),
        )
        scores = headline_scores(statistics)
        metrics["reports"] = {"image": summarize_reports(statistics) | {"scores": scores}}
        write_report_statistics(folder / STATISTICS_FILE, statistics)
        lines = [json.dumps({"key": record.key}) + "\n" for record in with_report]
        (folder / REPORTS_FILE).write_text("".join(lines))
    rows = [asdict(record) for record in records]
    for row in rows:
        for name in OMITTED_FIELDS:
            del row[name]
    (folder / CASES_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_json(folder / "metrics.json", metrics)
    return folder


def stored(records: Records) -> StoredEvaluation:
    """An evaluation of findings alone, at thresholds of 0.5."""
    per_finding = {finding: {"threshold": 0.5} for finding in FINDINGS}
    metrics: JsonObject = {"split": "valid", "classification": {"per_finding": per_finding}}
    metrics |= {"localization": None, "reports": None}
    return StoredEvaluation(Path("x"), metrics, group_by_scan(records), None)


def test_scans_of_b_come_into_the_order_of_a() -> None:
    a, b = make_records(1, n=3), make_records(2, n=3)
    wanted = pair_evaluations(stored(a), stored(b)).scans_b
    turned = [replace(b[number], position=i) for i, number in enumerate((1, 2, 0))]
    pair = pair_evaluations(stored(a), stored(turned))
    assert pair.scans_b.names == pair.scans_a.names
    assert np.array_equal(pair.scans_b.probabilities, wanted.probabilities)


def look_up(tree: JsonObject, path: str) -> float:
    for name in path.split("."):
        tree = tree[name]
    return float(tree)  # type: ignore[arg-type]


@pytest.mark.slow
def test_equal_models_are_told_apart_in_at_most_five_of_a_hundred_repetitions() -> None:
    options = ComparisonOptions(Path("a"), Path("b"), bootstrap=1, permutations=100)
    n_different = 0
    for repetition in range(100):
        a, b = (make_records(2 * repetition + i, 40, cases_seed=repetition) for i in range(2))
        figures = compare_pair(pair_evaluations(stored(a), stored(b)), options)
        n_different += any(figure.better for figure in figures.values())
    assert n_different <= 5


def test_a_planted_difference_is_found_in_favour_of_the_better_model(tmp_path: Path) -> None:
    a = write_evaluation(tmp_path / "a", make_records(0, skill=2.0))
    b = write_evaluation(tmp_path / "b", make_records(1))
    comparison = compare_evaluations(ComparisonOptions(a, b, permutations=400))
    auroc = comparison.figures["classification.macro.auroc"]
    assert auroc.better == "A" and auroc.ci95 is not None and auroc.ci95[0] > 0
    assert comparison.figures["classification.macro.brier"].better == "A", "lower is better"
    assert comparison.figures["localization.macro.dice"].better is None
    assert comparison.verdict.startswith("A is better than B in ")
    main = [path for path in comparison.figures if path.endswith((".auroc", ".f1"))]
    n_rows = make_comparison_table(comparison).row_count
    assert len(main) < n_rows < len(comparison.figures) - 20
    n_different = sum(figure.better is not None for figure in comparison.figures.values())
    assert n_different > 30
    _, hidden, *_ = describe_comparison(comparison)
    n_more, n_alike = map(int, re.findall(r"\d+", hidden))
    assert n_more > 0 and n_more + n_alike + n_rows == len(comparison.figures)


def test_the_answer_is_the_same_whichever_model_is_named_first(tmp_path: Path) -> None:
    a = write_evaluation(tmp_path / "a", make_records(0, skill=1.6, texts=True))
    b = write_evaluation(tmp_path / "b", make_records(1, texts=True)[::-1])
    one, other = (
        compare_evaluations(ComparisonOptions(*pair, bootstrap=50, permutations=100))
        for pair in ((a, b), (b, a))
    )
    assert one.figures.keys() == other.figures.keys()
    for name, figure in one.figures.items():
        mirrored = other.figures[name]
        assert figure.difference == pytest.approx(-mirrored.difference)
        assert figure.p == mirrored.p and figure.p_corrected == mirrored.p_corrected, name
        assert {figure.better, mirrored.better} in ({None}, {"A", "B"})


def test_figures_are_those_of_the_metrics_and_stand_in_table_and_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # no cell of the table is folded
    a = write_evaluation(tmp_path / "a", make_records(0, texts=True))
    b = write_evaluation(tmp_path / "b", make_records(1, texts=True))
    out = tmp_path / "comparison.json"
    words = ["runs", "test", str(a), str(b / "metrics.json"), "--out", str(out)]
    assert main([*words, "--bootstrap=20", "--permutations=100"]) == 0
    result = json.loads(out.read_text())
    metrics = json.loads((a / "metrics.json").read_text())
    for path, figure in result["figures"].items():
        assert figure["a"] == pytest.approx(look_up(metrics, path)), path
    groups = {path.rpartition(".")[0] for path in result["figures"]}
    assert {
        "classification.macro",
        "classification.per_finding.Lung nodule",
        f"localization.per_lesion.{LESIONS[0].key}",
        "localization.rexgrounding",
        "reports.image.scores",
    } <= groups
    assert result["n_tested"] > 150 and result["n_reports"] == 60
    text = capsys.readouterr().out
    assert result["verdict"] in text and "macro AUROC" in text and "reports, ROUGE-L" in text


def _rename_first_case(folder: Path) -> None:
    for name in (CASES_FILE, REPORTS_FILE):
        text = (folder / name).read_text()
        (folder / name).write_text(text.replace("case_0", "case_x"))


def _edit_metrics(folder: Path, edit: Callable[[JsonObject], object]) -> None:
    tree = json.loads((folder / "metrics.json").read_text())
    edit(tree)
    write_json(folder / "metrics.json", tree)


def _edit_first_case(folder: Path, edit: Callable[[JsonObject], object]) -> None:
    first, *others = (folder / CASES_FILE).read_text().splitlines(keepends=True)
    row = json.loads(first)
    edit(row)
    (folder / CASES_FILE).write_text("".join([json.dumps(row) + "\n", *others]))


def _edit_image(folder: Path, edit: Callable[[JsonObject], object]) -> None:
    _edit_metrics(folder, lambda tree: edit(tree["reports"]["image"]))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "other cases": (
        _rename_first_case,
        "same scans, found 1 in the first alone and 1 in the second alone, such as case_0",
    ),
    "other labels": (
        lambda folder: _edit_first_case(folder, lambda row: row["labels"].__setitem__(9, None)),
        f"same labels, found 1 that differ, the first one {FINDINGS[9]!r} of scan case_0",
    ),
    "other outlines": (
        lambda folder: _edit_first_case(
            folder, lambda row: row["lesions"][0]["native"].update(truth=49)
        ),
        "the voxels of the true pericardial effusion of scan case_0",
    ),
    "another split": (
        lambda folder: _edit_metrics(folder, lambda tree: tree.update(split="dev")),
        "the split to be the same, found valid and dev",
    ),
    "another convention": (
        lambda folder: _edit_image(folder, lambda tree: tree.update(convention="clinical")),
        "found ct-rate and clinical; evaluate one of them again with the other's --convention",
    ),
    "another labeler": (
        lambda folder: _edit_image(folder, lambda tree: tree["signatures"].update(clinical="x")),
        "with the other's --labeler",
    ),
    "no records": (lambda folder: (folder / CASES_FILE).unlink(), "holds no records by case"),
    "no report records": (
        lambda folder: (folder / STATISTICS_FILE).unlink(),
        f"{STATISTICS_FILE} holds no records by case",
    ),
    "records of another evaluation": (
        lambda folder: _edit_metrics(folder, lambda tree: tree.update(n_cases=3)),
        "is of another evaluation",
    ),
    "no evaluation": (lambda folder: (folder / "metrics.json").unlink(), "metrics.json"),
    "another file": (
        lambda folder: write_json(folder / "metrics.json", {"losses": 1}),
        "is no result of an evaluation",
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A folder of an evaluation, and the files of another one."""
    root = tmp_path_factory.mktemp("pair")
    a = write_evaluation(root / "a", make_records(0, 6, texts=True))
    b = write_evaluation(root / "b", make_records(1, 6, texts=True))
    return a, {path.name: path.read_bytes() for path in b.iterdir()}


@pytest.mark.parametrize("fault", FAULTS)
def test_evaluations_that_cannot_be_compared_are_refused_by_one_sentence(
    folders: tuple[Path, dict[str, bytes]], tmp_path: Path, fault: str
) -> None:
    a, files_b = folders
    for name, content in files_b.items():
        (tmp_path / name).write_bytes(content)
    break_folder, sentence = FAULTS[fault]
    break_folder(tmp_path)
    with pytest.raises(UserError) as error:
        compare_evaluations(ComparisonOptions(a, tmp_path, bootstrap=1, permutations=100))
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_a_run_stands_for_its_only_evaluation(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(UserError, match=r"run/metrics\.json"):
        read_stored_evaluation(run)
    (run / "phase3").mkdir()
    first = write_evaluation(run / "phase3" / "evaluation-valid", make_records(0, 6))
    assert read_stored_evaluation(run).path == first / "metrics.json"
    write_evaluation(run / "evaluation", make_records(0, 6))
    with pytest.raises(UserError, match=r"several.* found evaluation, phase3/evaluation-valid;"):
        read_stored_evaluation(run)
    assert read_stored_evaluation(run / "evaluation").path.parent == run / "evaluation"


def test_one_patient_is_too_few(tmp_path: Path) -> None:
    records = [replace(record, patient="p") for record in make_records(0, 4)]
    a = write_evaluation(tmp_path / "a", records)
    with pytest.raises(UserError, match="expected at least two"):
        compare_evaluations(ComparisonOptions(a, copy.copy(a)))


def test_parts_that_only_one_model_has_are_named_and_left_out(tmp_path: Path) -> None:
    a = write_evaluation(tmp_path / "a", make_records(0, 6, texts=True))
    bare = [replace(record, lesions=[]) for record in make_records(1, 6)]
    b = write_evaluation(tmp_path / "b", bare)
    _edit_metrics(b, lambda tree: tree.update(localization=None))
    comparison = compare_evaluations(ComparisonOptions(a, b, bootstrap=1, permutations=100))
    assert comparison.left_out.keys() == {"localization", "reports"}
    assert all(path.startswith("classification.") for path in comparison.figures)
