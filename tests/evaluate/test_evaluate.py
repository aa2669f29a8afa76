import copy
import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from conftest import phantom_sample, write_nifti
from rich.console import Console
from sacrebleu.metrics import BLEU

from rectvlm.checkpoint import Checkpoint, run_folder
from rectvlm.data.dataset import ShardDataset
from rectvlm.data.shard_manifest import read_manifest
from rectvlm.data.shards import read_index, write_shards
from rectvlm.evaluate import report_tables, tables
from rectvlm.evaluate.comparison import compare_evaluations
from rectvlm.evaluate.comparison_options import ComparisonOptions
from rectvlm.evaluate.options import EvaluationOptions
from rectvlm.evaluate.run import evaluate_checkpoint
from rectvlm.finding_thresholds import THRESHOLDS_FILE
from rectvlm.labels import FINDINGS, LESIONS
from rectvlm.lesion_bits import lesion_mask
from rectvlm.types import OWN_OUTLINES, PHANTOM_OUTLINES, REXGROUNDING_OUTLINES, UserError


@pytest.fixture(scope="module", autouse=True)
def thresholds_of_few_cases():
    """The shards of these tests have too few cases for thresholds that mean anything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rectvlm.evaluate.thresholds.MIN_CASES_TO_FIT", 1)
        yield


@pytest.fixture(scope="module")
def evaluation(tiny_run, tmp_path_factory):
    """Result of an evaluation and the file of its metrics."""
    out = tmp_path_factory.mktemp("evaluation") / "metrics.json"
    options = EvaluationOptions(batch_size=2)
    return evaluate_checkpoint(tiny_run(3), out=out, device="cpu", options=options), out


@pytest.fixture
def evaluated(evaluation):
    result, out = evaluation
    return result.as_dict(), out


def test_the_file_holds_what_is_returned_and_where_it_came_from(evaluated, tiny_run):
    result, out = evaluated
    assert json.loads(out.read_text()) == result
    assert result["n_cases"] == 3 and result["split"] == "valid" and result["config"] == "tiny"
    assert result["checkpoint"] == str(run_folder.find_checkpoint(tiny_run(3), ""))
    assert (
        result["machine"]["cores"] >= 1
        and result["device"] == "cpu"
        and result["versions"]["torch"]
    )
    assert set(result["classification"]["per_finding"]) == set(FINDINGS)
    assert set(result["localization"]["per_lesion"]) == {lesion.key for lesion in LESIONS}


def test_a_model_does_not_differ_from_itself(evaluated):
    result, out = evaluated
    options = ComparisonOptions(out.parent, out, bootstrap=10, permutations=100)
    comparison = compare_evaluations(options)
    assert comparison.verdict.startswith("No difference")
    assert comparison.n_scans == comparison.n_reports == 3
    for path, figure in comparison.figures.items():
        value = result
        for name in path.split("."):
            value = value[name]
        assert figure.a == figure.b == pytest.approx(value), path
    assert "reports.image.scores.rouge_l" in comparison.figures


def test_unknown_labels_and_unannotated_lesions_are_not_counted(evaluated, phantom_shards):
    counts = read_manifest(phantom_shards).counts["valid"]
    result, _ = evaluated
    for name, row in result["classification"]["per_finding"].items():
        known = counts["labels"][name]
        assert (row["n_known"], row["n_positive"]) == (
            known["present"] + known["absent"],
            known["present"],
        )
    for key, row in result["localization"]["per_lesion"].items():
        assert row["n_annotated"] == counts["lesions"][key]["annotated"]
    annotated = [row["n_annotated"] for row in result["localization"]["per_lesion"].values()]
    assert min(annotated) < 3, "the phantoms should hold a lesion that was not annotated"


def test_thresholds_come_from_the_train_split_and_lie_beside_the_metrics(evaluated, tiny_run):
    result, out = evaluated
    thresholds = result["thresholds"]
    assert (
        thresholds["n_cases"] == 6
        and "train split" in thresholds["source"]
        and not thresholds["same_data"]
    )
    stored = json.loads(out.with_name(THRESHOLDS_FILE).read_text())
    assert stored | {"same_data": False} == thresholds
    folder = run_folder.find_checkpoint(tiny_run(3), "")
    assert not (folder / THRESHOLDS_FILE).exists(), "a model changes by training alone"
    used = {name: row["threshold"] for name, row in result["classification"]["per_finding"].items()}
    assert used == thresholds["values"] and len(set(used.values())) > 2


def test_reports_stand_beside_their_references_and_the_control(evaluated, phantom_shards):
    result, out = evaluated
    rows = [json.loads(line) for line in out.with_name("reports.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == [
        entry.key for entry in read_index(phantom_shards).select_split("valid")
    ]
    assert all(row["reference"].startswith("Findings: ") for row in rows)
    # Air looks the same in all cases. An untrained model may write that on any image, too.
    assert len({row["generated_without_image"] for row in rows}) == 1
    image, ablated = result["reports"]["image"], result["reports"]["image_ablated"]
    assert image["n"] == ablated["n"] == 3
    assert 0 < image["bertscore_f1"] < 1 and "tiny-bert" in image["signatures"]["bertscore_f1"]
    assert image["convention"] == "ct-rate" == ablated["convention"]
    assert "read by the rules in the ct-rate convention" in out.with_name("metrics.md").read_text()
    assert image["clinical"]["labels"]["n_labels"] == sum(
        row["n_known"] for row in result["classification"]["per_finding"].values()
    )
    difference = result["reports"]["difference"]
    for name in ("bleu_1", "rouge_l", "cider", "clinical_labels_micro_f1"):
        assert difference[name] == image["scores"][name] - ablated["scores"][name]
        low, high = difference["ci95"][name]
        assert low <= high


def test_baselines_stand_beside_the_reports_of_the_same_cases(evaluated, tiny, phantom_shards):
    result, out = evaluated
    data = tiny.data.model_copy(update={"shards": str(phantom_shards)})
    train = ShardDataset(data, "train").read_batch(range(6))
    cases = [json.loads(line) for line in out.with_name("cases.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in out.with_name("reports.jsonl").read_text().splitlines()]
    assert "features" not in cases[0]
    (journal,) = out.parent.glob("cases/*/rank-0000.jsonl")
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    train_features = [row["features"] for row in records if row["purpose"] == "fit"]
    features = {row["key"]: row["features"] for row in records if row["purpose"] == "evaluate"}
    for case, row in zip(cases, rows, strict=True):
        called = np.array(case["probabilities"]) >= list(result["thresholds"]["values"].values())
        agreeing = [
            sum(meta.labels[name] == int(called[i]) for i, name in enumerate(FINDINGS))
            for meta in train.metas
        ]
        assert row["table"] == train.reports[agreeing.index(max(agreeing))]
        angles = [
            np.dot(features[row["key"]], other) / np.linalg.norm(other) for other in train_features
        ]
        assert row["nearest"] == train.reports[int(np.argmax(angles))]
    assert len({row["prevalence"] for row in rows}) == 1

    image, baselines = result["reports"]["image"], result["reports"]["baselines"]
    assert set(baselines) == {"table", "prevalence", "nearest"}
    assert result["reports"]["left_out_baselines"] == {}
    whole_page = out.with_name("metrics.md").read_text()
    page = whole_page.split("### Baselines\n\n")[1]
    for name, baseline in baselines.items():
        texts, references = ([row[kind] for row in rows] for kind in (name, "reference"))
        bleu = BLEU(lowercase=True).corpus_score(texts, [references]).score / 100
        assert baseline["scores"]["bleu_4"] == pytest.approx(bleu)
        difference = baseline["difference"]
        assert difference["bleu_4"] == image["scores"]["bleu_4"] - baseline["scores"]["bleu_4"]
        low, high = difference["ci95"]["clinical_labels_micro_f1"]
        assert low <= high
        assert f"{baseline['scores']['bleu_4']:.3f} [{baseline['ci95']['bleu_4'][0]:.3f}, " in page
        assert baseline["source"] in page
    assert baselines["prevalence"]["diversity"]["n_distinct"] == 1
    assert result["reports"]["reference_diversity"]["n_distinct"] == 3
    assert whole_page.count(report_tables.describe_table_comparison(result["reports"])) == 1
    console = Console(width=200, file=io.StringIO(), color_system=None)
    console.print(report_tables.make_baseline_table(result["reports"]))
    printed = console.file.getvalue()
    assert "classifier and table" in printed and "distinct reports, share" in printed


def test_a_limit_cuts_a_batch_and_the_batch_size_changes_nothing(tiny_run, tmp_path):
    def run(**options):
        result = evaluate_checkpoint(
            tiny_run(2),
            out=tmp_path / "m.json",
            device="cpu",
            options=EvaluationOptions(**options),
        )
        assert result.reports is None
        return result.as_dict()

    by_one, by_two = run(limit=2, batch_size=1), run(limit=2, batch_size=3)
    assert by_one["n_cases"] == by_two["n_cases"] == 2
    assert by_one["localization"] == by_two["localization"]
    for name in FINDINGS:
        one, two = (r["classification"]["per_finding"][name]["auroc"] for r in (by_one, by_two))
        assert one == two
    assert not (tmp_path / "reports.jsonl").exists()


def test_a_model_without_localizer_has_no_localization(tiny_run, tmp_path):
    assert (
        evaluate_checkpoint(tiny_run(1), out=tmp_path / "m.json", device="cpu").localization is None
    )


def test_without_a_train_split_thresholds_stay_at_one_half(tiny_run, tiny, tmp_path):
    sample = phantom_sample(8, tiny, "valid")
    no_report = replace(
        sample.meta, key="silent", patient="silent", scan="silent", findings=None, impression=None
    )
    write_shards([sample, replace(sample, meta=no_report)], tmp_path / "shards")
    folder = tmp_path / "checkpoint"
    shutil.copytree(run_folder.find_checkpoint(tiny_run(3), ""), folder)
    result = evaluate_checkpoint(
        folder, tmp_path / "shards", tmp_path / "m.json", device="cpu"
    ).as_dict()
    assert set(result["thresholds"]["values"].values()) == {0.5}
    assert (
        "none was fitted" in result["thresholds"]["source"]
        and len(result["thresholds"]["not_fitted"]) == 18
    )
    assert (result["reports"]["image"]["n"], result["reports"]["image"]["n_without_reference"]) == (
        1,
        1,
    )
    assert result["reports"]["baselines"] == {}
    reasons = result["reports"]["left_out_baselines"]
    assert all("holds no training case" in reason for reason in reasons.values()) and reasons


def test_thresholds_come_from_the_dev_split_where_there_is_one(tiny_run, tiny, tmp_path):
    splits = ["train", "dev", "dev", "dev", "valid"]
    samples = [phantom_sample(seed, tiny, split) for seed, split in enumerate(splits)]
    write_shards(samples, tmp_path / "shards")
    folder = tmp_path / "checkpoint"
    shutil.copytree(run_folder.find_checkpoint(tiny_run(1), ""), folder)
    options = EvaluationOptions(plots=False, bootstrap=0)

    def run(split):
        out = tmp_path / split / "m.json"
        chosen = replace(options, split=split)
        return evaluate_checkpoint(folder, tmp_path / "shards", out, options=chosen).as_dict()

    valid, dev = run("valid"), run("dev")
    assert valid["threshold_split"] == "dev" and valid["n_cases"] == 1
    assert "3 scans of the dev split" in valid["thresholds"]["source"]
    assert (valid["thresholds"]["same_data"], dev["thresholds"]["same_data"]) == (False, True)
    assert run("train")["thresholds"]["same_data"] is False


def test_the_grounding_split_is_scored_by_its_own_protocol(tiny_run, tiny, tmp_path):
    samples = []
    for seed in (0, 1):
        sample = phantom_sample(seed, tiny, "grounding")
        sources = {
            key: source and REXGROUNDING_OUTLINES
            for key, source in sample.meta.lesions_source.items()
        }
        samples.append(replace(sample, meta=replace(sample.meta, lesions_source=sources)))
    write_shards(samples, tmp_path / "shards")
    options = EvaluationOptions(split="grounding", bootstrap=20)
    folder = tiny_run(2)
    out = tmp_path / "m.json"
    result = evaluate_checkpoint(folder, tmp_path / "shards", out, device="cpu", options=options)

    grounding = result.localization["rexgrounding"]
    per_lesion = result.localization["per_lesion"].values()
    # An outline without a voxel is no finding, though the lesion was looked for.
    assert grounding["n_findings"] == sum(row["n_present"] for row in per_lesion) > 0
    assert grounding["n_scans"] == 2 and result.split == "grounding"
    assert sum(row["n_annotated"] for row in per_lesion) > grounding["n_findings"]
    count = f"{grounding['n_findings']} findings, 2 scans"
    page = (tmp_path / "metrics.md").read_text()
    assert f"| {count} | against people |" in page and "| ReXGroundingCT hit rate |" in page
    console = Console(width=120, file=io.StringIO(), color_system=None)
    console.print(tables.terminal_table(result))
    assert count in console.file.getvalue()


def test_evaluation_leaves_the_weights_alone(tiny_run, tmp_path):
    folder = run_folder.find_checkpoint(tiny_run(1), "")
    before = Checkpoint.open(folder).read_tensors()
    evaluate_checkpoint(
        folder,
        out=tmp_path / "m.json",
        device="cpu",
        options=EvaluationOptions(split="train", limit=1),
    )
    after = Checkpoint.open(folder).read_tensors()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_bad_inputs_give_one_clear_sentence(tiny_run, tmp_path):
    with pytest.raises(UserError, match="No checkpoint in"):
        evaluate_checkpoint(tmp_path)
    with pytest.raises(UserError, match="No shards in"):
        evaluate_checkpoint(tiny_run(1), tmp_path / "none", device="cpu")
    with pytest.raises(UserError, match=r"labeler .* cannot be loaded"):
        evaluate_checkpoint(
            tiny_run(3),
            out=tmp_path / "new" / "m.json",
            device="cpu",
            options=EvaluationOptions(labeler=str(tmp_path / "none")),
        )
    assert not list(tmp_path.rglob("*.jsonl")), (
        "it should be found out before the cases are predicted"
    )
    folder = tmp_path / "copy"
    shutil.copytree(run_folder.find_checkpoint(tiny_run(1), ""), folder)
    (folder / THRESHOLDS_FILE).write_text("[]")
    with pytest.raises(UserError, match="damaged"):
        evaluate_checkpoint(folder, device="cpu")


def test_tables_and_plots_lie_beside_the_metrics(evaluated):
    result, out = evaluated
    page = out.with_name("metrics.md").read_text()
    assert f"{result['n_scans']} scans of {result['n_patients']} patients" in page
    auroc = result["classification"]["macro"]
    low, high = auroc["ci95"]["auroc"]
    assert f"{auroc['auroc']:.3f} [{low:.3f}, {high:.3f}]" in page
    assert all(f"| {name} |" in page for name in FINDINGS) and "without (air)" in page
    by_protocol = page.split("### By VLM3D's protocol")[1]
    assert f"| BLEU-1 | {result['reports']['image']['vlm3d']['bleu_1']:.3f} |" in by_protocol
    assert "Sizes within 2 mm or 20%: " in page and "Recall of the rare findings (" in page
    for name in ("roc", "precision_recall", "calibration", "dice"):
        assert out.with_name(f"{name}.png").read_bytes().startswith(b"\x89PNG")
    rows = [json.loads(line) for line in out.with_name("cases.jsonl").read_text().splitlines()]
    assert len(rows) == 3 and all(len(row["probabilities"]) == 18 for row in rows)


def test_the_page_shows_each_finding_that_is_read_in_reports_beside_the_control(evaluation):
    result, out = evaluation
    assert tables.render_markdown(result) == out.with_name("metrics.md").read_text()
    given = copy.deepcopy(result)  # an untrained model's figures are mostly 0
    image, air = (
        given.reports[kind]["clinical"]["labels"]["per_finding"]
        for kind in ("image", "image_ablated")
    )
    for i, name in enumerate(FINDINGS):
        image[name] |= {
            "precision": i / 100,
            "recall": i / 100 + 0.2,
            "f1": None if i == 3 else i / 100 + 0.4,
        }
        air[name] |= {"precision": i / 200, "recall": i / 200 + 0.5, "f1": i / 200 + 0.7}
    section = (
        tables.render_markdown(given).split("### Findings in the reports\n\n")[1].split("\n\n")[0]
    )
    head, _, *lines = (line.strip("| ").split(" | ") for line in section.splitlines())
    rows = {cells[0]: dict(zip(head, cells, strict=True)) for cells in lines}
    assert set(rows) == {*FINDINGS, "**micro**", "**macro**", "**weighted**"}
    for name in FINDINGS:
        assert (rows[name]["n"], rows[name]["positive"]) == (
            str(image[name]["n_known"]),
            str(image[name]["n_positive"]),
        )
        for score, title in (("precision", "precision"), ("recall", "recall"), ("f1", "F1")):
            for row, column in ((image[name], title), (air[name], f"{title}, air")):
                assert rows[name][column] == ("–" if row[score] is None else f"{row[score]:.3f}")


def test_the_language_model_is_part_of_the_fingerprint_where_reports_are_written(
    evaluated, tiny_run, tmp_path
):
    found = evaluated[0]["fingerprint"]["language_model"]
    assert found["reference"] == "bundled:tiny-llama" and len(found["contents"]) == 64
    options = EvaluationOptions(plots=False, bootstrap=0, limit=1)
    without = evaluate_checkpoint(
        tiny_run(2), out=tmp_path / "m.json", device="cpu", options=options
    )
    assert without.fingerprint["language_model"] is None


def test_figures_at_the_models_thresholds_stand_beside_the_others(tiny_run, tiny, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(run_folder.find_checkpoint(tiny_run(1), ""), folder)
    write_shards([phantom_sample(8, tiny, "valid")], tmp_path / "shards")
    own = {
        "source": "elsewhere",
        "n_cases": 9,
        "not_fitted": [],
        "values": dict.fromkeys(FINDINGS, 0.0),  # calls everything
    }
    (folder / THRESHOLDS_FILE).write_text(json.dumps(own))

    def evaluated(shards=None, **options):
        return evaluate_checkpoint(
            folder,
            shards,
            tmp_path / "m.json",
            device="cpu",
            options=EvaluationOptions(plots=False, **options),
        ).as_dict()

    # Nothing to fit on; and these are no cases of the run that fitted them.
    assert evaluated(shards=tmp_path / "shards")["thresholds"] == own | {"same_data": False}
    by_model = evaluated(thresholds="model", limit=2)
    assert by_model["thresholds"] == own | {"same_data": True}  # validation fitted them
    assert by_model["classification"]["macro"]["recall"] == 1
    fitted = evaluated(fit_limit=4, limit=2)
    assert fitted["thresholds"]["n_cases"] == 4 and not fitted["thresholds"]["same_data"]
    for result in (by_model, fitted):
        others = result["other_thresholds"]
        assert others["model"]["source"] == "elsewhere" and others["0.5"]["n_cases"] == 0
        assert others["model"]["macro"]["recall"] == 1
        assert others["0.5"]["macro"]["recall"] < 1
    page = (tmp_path / "metrics.md").read_text()
    assert "**macro mean** at the model's thresholds" in page
    assert "**macro mean** at 0.5" in page
    assert json.loads((folder / THRESHOLDS_FILE).read_text()) == own


def test_outlines_as_drawn_are_the_truth_when_they_are_given(
    tiny_run, phantom_shards, phantoms, tmp_path
):
    key, seed = "phantom_8", 8
    (tmp_path / "drawn" / key).mkdir(parents=True)
    bits, affine = phantoms(seed).lesions, phantoms(seed).affine
    for lesion in LESIONS:
        mask = lesion_mask(bits, lesion).astype(np.uint8)
        write_nifti(mask, affine, tmp_path / "drawn" / key / f"{lesion.key}.nii.gz")
    options = EvaluationOptions(truth=tmp_path / "drawn", plots=False, bootstrap=0, reports=False)
    result = evaluate_checkpoint(
        tiny_run(2), out=tmp_path / "m.json", device="cpu", options=options
    )
    annotated = sum(phantoms(seed).lesions_annotated.values())
    assert result.localization["truth"]["file"] == annotated
    rows = [json.loads(line) for line in (tmp_path / "cases.jsonl").read_text().splitlines()]
    (row,) = (row for row in rows if row["key"] == key)
    for lesion in LESIONS:
        if phantoms(seed).lesions_annotated[lesion.key]:
            assert row["lesions"][lesion.bit]["native"]["truth"] == np.count_nonzero(
                lesion_mask(bits, lesion)
            )
    drawn = [key for key, is_annotated in phantoms(seed).lesions_annotated.items() if is_annotated]
    for key in drawn:
        figures = result.localization["per_lesion"][key]
        assert figures["sources"][OWN_OUTLINES] == 1 and PHANTOM_OUTLINES in figures["sources"]
    # No table averages over sources without a word.
    page = (tmp_path / "metrics.md").read_text()
    assert f"| Dice, against {OWN_OUTLINES} |" in page
    assert f"| {OWN_OUTLINES} 1, {PHANTOM_OUTLINES} " in page
    console = Console(width=120, file=io.StringIO(), color_system=None)
    console.print(tables.terminal_table(result))
    assert console.file.getvalue().count(f"  against {OWN_OUTLINES}") == len(drawn)
    (tmp_path / "misspelled" / "case").mkdir(parents=True)
    (tmp_path / "misspelled" / "case" / "lung_nodul.nii.gz").touch()
    for name in ("none", "misspelled"):
        with pytest.raises(UserError, match="--truth"):
            evaluate_checkpoint(
                tiny_run(2),
                out=tmp_path / "m.json",
                device="cpu",
                options=replace(options, truth=tmp_path / name),
            )
