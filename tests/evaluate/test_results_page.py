"""The results page: the figures of the metrics, disagreements with links, nothing unescaped."""

import copy
import html
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rectvlm.data.shards import read_index
from rectvlm.evaluate.case_records import CaseRecord
from rectvlm.evaluate.headline import list_headline_columns, list_headline_rows
from rectvlm.evaluate.options import EvaluationOptions
from rectvlm.evaluate.result import EvaluationResult
from rectvlm.evaluate.results_page import (
    MAX_DISAGREEMENTS_OF_FINDING,
    find_disagreements,
    render_results_page,
)
from rectvlm.evaluate.run import evaluate_checkpoint
from rectvlm.evaluate.scans import ScanResults, group_by_scan
from rectvlm.evaluate.tables import render_markdown
from rectvlm.labels import FINDINGS, N_FINDINGS


def make_scans(n: int = 6) -> ScanResults:
    records = []
    for i in range(n):
        records.append(
            CaseRecord(
                purpose="evaluate",
                position=i,
                key=f"case_{i}_1",
                scan=f"case_{i}",
                patient=f"patient_{i}",
                probabilities=[0.1] * N_FINDINGS,
                labels=[0] * N_FINDINGS,
                lesions=[],
                reference=None,
                generated=None,
                without_image=None,
                regions=None,
            )
        )
    return group_by_scan(records)


def test_the_farthest_known_labels_come_first_and_no_finding_fills_the_list(
    tmp_path: Path,
) -> None:
    scans = make_scans()
    probabilities, labels, known = scans.probabilities, scans.labels, scans.known
    probabilities[:, 3] = 0.8  # six false alarms of one finding
    probabilities[4, 3] = 0.9
    labels[2, 5] = 1  # missed at 0.1
    probabilities[1, 7], known[1, 7] = 1.0, False
    rows = find_disagreements(scans, tmp_path)
    assert (rows[0].scan, rows[0].finding, rows[0].label) == ("case_2", FINDINGS[5], 1)
    assert rows[0].probability == pytest.approx(0.1) == rows[0].probability
    assert {row.scan for row in rows[1:]} >= {"case_4"} and rows[1].scan == "case_4"
    assert [row.finding for row in rows].count(FINDINGS[3]) == MAX_DISAGREEMENTS_OF_FINDING
    assert FINDINGS[7] not in {row.finding for row in rows}


def test_case_pages_beside_the_metrics_are_linked(tmp_path: Path) -> None:
    scans = make_scans(2)
    scans.probabilities[:, 0] = 0.9
    page = tmp_path / "pages" / "case_1_1" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text("a page")
    pages = {row.scan: row.page for row in find_disagreements(scans, tmp_path)}
    assert pages == {"case_0": None, "case_1": "pages/case_1_1/index.html"}


def write_labels(shards: Path, path: Path) -> Path:
    """Another table of labels, in which every finding is present in every scan of valid."""
    rows = [",".join(["VolumeName", *FINDINGS])]
    for location in read_index(shards).select_split("valid"):
        rows.append(",".join([location.key, *["1"] * N_FINDINGS]))
    path.write_text("\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def evaluation(
    tiny_run: Callable[[int], Path],
    phantom_shards: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[EvaluationResult, Path]:
    out = tmp_path_factory.mktemp("page") / "metrics.json"
    labels = write_labels(phantom_shards, out.with_name("refined.csv"))
    options = EvaluationOptions(bootstrap=20, report_limit=2, labels=labels)
    result = evaluate_checkpoint(tiny_run(3), out=out, device="cpu", options=options)
    assert result is not None
    return result, out.with_name("results.html")


def test_the_page_lies_beside_the_metrics_and_loads_nothing(
    evaluation: tuple[EvaluationResult, Path],
) -> None:
    result, path = evaluation
    page = path.read_text(encoding="utf-8")
    assert result.reports is not None
    auroc = result.classification["macro"]
    assert f"<td>{auroc['auroc']:.3f}<small>[{auroc['ci95']['auroc'][0]:.3f}, " in page
    for finding in FINDINGS:
        assert f"<td>{finding}</td>" in page
    bleu = result.reports["image"]["vlm3d"]["bleu_1"]
    assert f"<tr><td>BLEU-1</td><td>{bleu:.3f}</td>" in page
    distinct = result.reports["image"]["diversity"]["distinct_share"]
    assert f"<tr><td>distinct reports, share</td><td>{distinct:.3f}</td>" in page
    assert page.count("data:image/svg+xml;base64,") == 4
    assert not re.search(r'(?:src|href)="(?!data:|pages/)', page) and "url(" not in page


def page_of(result: EvaluationResult, path: Path) -> str:
    return render_results_page(result, make_scans(1), {}, path.parent)


def test_baselines_and_both_sets_of_labels_stand_beside_the_model(
    evaluation: tuple[EvaluationResult, Path],
) -> None:
    result, path = evaluation
    page, tables = path.read_text(encoding="utf-8"), path.with_name("metrics.md").read_text()
    assert result.reports is not None and result.other_labels is not None
    prevalence = result.classification["prevalence"]["macro"]["average_precision"]
    assert f"<td>{prevalence:.3f}</td>" in page and f"| {prevalence:.3f} |" in tables
    difference = result.reports["baselines"]["table"]["difference"]
    bleu, interval = difference["bleu_1"], difference["ci95"]["bleu_1"]
    assert f"{bleu:+.3f}<small>[{interval[0]:.3f}, {interval[1]:.3f}]</small>" in page
    assert "<th>model − table</th>" in page and "with a table of texts" in page
    given = replace(result, labels="Rad-ChestCT's label tables")
    labels = ". Labels: Rad-ChestCT's label tables; beside them those of refined.csv."
    assert "resamples of the patients" + labels in html.unescape(page_of(given, path))
    labels = labels.removeprefix(". ")
    assert labels in render_markdown(given)
    assert result.other_labels["sha256"] in page and "<th>AUROC, file</th>" in page


def test_tables_and_page_begin_with_the_model_beside_all_baselines(
    evaluation: tuple[EvaluationResult, Path],
) -> None:
    result, path = evaluation
    assert result.reports is not None
    columns = ["model", "prevalence", "classifier and table", "nearest report", "without the image"]
    assert list_headline_columns(result) == columns
    rows = {row.name: row.figures for row in list_headline_rows(result)}
    assert set(rows["findings: macro AUROC"]) == {"model", "prevalence"}
    assert rows["findings: macro AUROC"]["prevalence"].value == "0.500"
    bleu = rows["reports: BLEU-4"]
    scores = {
        "model": result.reports["image"],
        "without the image": result.reports["image_ablated"],
    }
    scores["nearest report"] = result.reports["baselines"]["nearest"]
    for column, kind in scores.items():
        assert bleu[column].value == f"{kind['scores']['bleu_4']:.3f}", column
    tables, page = path.with_name("metrics.md").read_text(), path.read_text(encoding="utf-8")
    assert tables.index("## In short") < tables.index("| reports: BLEU-4 |")
    assert tables.index("| reports: BLEU-4 |") < tables.index("## Findings")
    assert page.index("<td>reports: BLEU-4</td>") < page.index("<h2>Findings, other means</h2>")
    alone = replace(result, reports=None, localization=None)
    assert list_headline_columns(alone) == ["model", "prevalence"]
    assert "In short" in render_markdown(alone)


def test_a_mean_of_the_protocol_counts_the_findings_that_have_it(
    evaluation: tuple[EvaluationResult, Path],
) -> None:
    result, path = evaluation
    rows = result.classification["vlm3d"]["per_finding"].values()
    n_findings = sum(row["auroc"] is not None for row in rows)
    assert 0 < n_findings < N_FINDINGS
    page = path.read_text(encoding="utf-8")
    row = page[page.index("<td>AUROC by VLM3D’s protocol</td>") :].partition("</tr>")[0]
    assert f'<td class="quiet">{n_findings} findings</td>' in row


def test_the_page_says_how_the_missing_case_pages_are_made(
    evaluation: tuple[EvaluationResult, Path], tmp_path: Path
) -> None:
    result, _ = evaluation
    scans = make_scans(2)
    scans.probabilities[:, 0] = 0.9
    page = render_results_page(result, scans, {}, tmp_path)
    (command,) = re.findall(r"<code>(rectvlm predict .*?)</code>", page)
    words = shlex.split(html.unescape(command))
    assert words[2:6] == [result.shards, "--keys", "case_0_1", "case_1_1"]
    assert words[-1] == str(tmp_path / "pages")
    for key in ("case_0_1", "case_1_1"):
        (tmp_path / "pages" / key).mkdir(parents=True)
        (tmp_path / "pages" / key / "index.html").write_text("a page")
    assert "rectvlm predict" not in render_results_page(result, scans, {}, tmp_path)


def test_names_from_outside_are_text_on_the_page(
    evaluation: tuple[EvaluationResult, Path], tmp_path: Path
) -> None:
    result, _ = evaluation
    scans = make_scans(1)
    scans.names[0], scans.probabilities[0, 0] = "<script>x</script>", np.float64(0.9)
    given = replace(copy.deepcopy(result), config="<b>", shards="<i>", selected_on_this_split=True)
    page = render_results_page(given, scans, {}, tmp_path)
    assert "<script>" not in page and "<b>" not in page and "<i>" not in page
    assert "&lt;script&gt;x" in page and "optimistic" in page and "Curves" not in page
    without = replace(given, reports=None, localization=None)
    text = render_results_page(without, scans, {}, tmp_path)
    assert "Reports" not in text and "Lesions" not in text
