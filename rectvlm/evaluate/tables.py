"""The figures of an evaluation as Markdown, for people, and as rows, for the terminal."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table

from rectvlm.evaluate.region_maps import RegionMapUsage
from rectvlm.labels import FINDINGS, LESION_BY_KEY

FINDING_SCORE_NAMES = {
    "auroc": "AUROC",
    "average_precision": "AP",
    "f1": "F1",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "accuracy",
    "ece": "ECE",
    "brier": "Brier",
}
LESION_SCORE_NAMES = {
    "dice": "Dice",
    "iou": "IoU",
    "dice_where_present": "Dice where present",
    "hd95_mm": "HD95, mm",
    "surface_dice": "surface Dice",
    "sensitivity": "sensitivity",
    "hit_rate": "hit rate",
    "lesion_hit_rate": "lesions hit",
    "instance_precision": "instance precision",
    "instance_recall": "instance recall",
    "instance_f1": "instance F1",
}
MAIN_REPORT_SCORES = (
    "bleu_1",
    "bleu_4",
    "rouge_l",
    "meteor",
    "cider",
    "bertscore_f1",
    "clinical_labels_micro_f1",
    "clinical_labels_macro_f1",
    "clinical_labels_crg",
    "laterality",
)


def format_score(value: float | None) -> str:
    """Three decimals, a dash where there is no value."""
    return "–" if value is None else f"{value:.3f}"


def format_with_interval(row: dict[str, Any], score: str) -> str:
    """A score with its 95% interval, where there is one."""
    return f"{format_score(row[score])} {format_interval(row, score)}".strip()


def format_interval(row: dict[str, Any], score: str) -> str:
    """The 95% interval of a score in brackets; empty where there is none."""
    found = row.get("ci95", {}).get(score)
    return f"[{found[0]:.3f}, {found[1]:.3f}]" if found else ""


def render_markdown(result: dict[str, Any]) -> str:
    """All figures that a report on a model needs, as one page."""
    parts = [
        _render_title(result),
        _render_overview(result),
        "## Findings",
        _render_findings(result["classification"], result["thresholds"]),
    ]
    if result["localization"] is not None:
        parts += ["## Lesions", _render_lesions(result["localization"])]
    if result["reports"] is not None:
        parts += ["## Reports", _render_reports(result["reports"])]
        parts += ["### Findings in the reports", _render_report_findings(result["reports"])]
    return "\n\n".join(parts) + "\n"


def _render_title(result: dict[str, Any]) -> str:
    whose = f"{result['n_scans']:,} scans of {result['n_patients']:,} patients"
    return f"# {result['config']}: {whose}, {result['split']} split"


def _render_overview(result: dict[str, Any]) -> str:
    bootstrap = result["bootstrap"]
    intervals = "No intervals were asked for."
    if bootstrap["resamples"]:
        intervals = (
            f"In brackets: 95% intervals of {bootstrap['resamples']:,} resamples of the patients (percentiles, seed "
            f"{bootstrap['seed']})."
        )
    return (
        f"Checkpoint `{result['checkpoint']}`, step {result['step']}; shards `{result['shards']}`; "
        f"{result['n_cases']:,} volumes. {intervals}{_render_selection_warning(result)}\n\n"
        f"Region maps: {RegionMapUsage.from_dict(result)}."
    )


def _render_selection_warning(result: dict[str, Any]) -> str:
    """What a reader must know of the choice of the checkpoint."""
    selected = result["selected_on_this_split"]
    if selected:
        return (
            " **Validation during training chose this checkpoint on cases of this split, so these figures are "
            "optimistic.**"
        )
    return (
        " Whether the checkpoint was chosen on this split is not known." if selected is None else ""
    )


def _render_findings(found: dict[str, Any], thresholds: dict[str, Any]) -> str:
    head = ["finding", "n", "positive", *FINDING_SCORE_NAMES.values()]
    rows = [
        [
            f"**{kind} mean**",
            "",
            "",
            *(format_with_interval(found[kind], score) for score in FINDING_SCORE_NAMES),
        ]
        for kind in ("macro", "weighted")
    ]
    for name, row in found["per_finding"].items():
        scores = (format_with_interval(row, score) for score in FINDING_SCORE_NAMES)
        rows.append([name, str(row["n_known"]), str(row["n_positive"]), *scores])
    note = f"Thresholds: {thresholds['source']}."
    if thresholds["not_fitted"]:
        note += f" Not fitted, 0.5: {', '.join(thresholds['not_fitted'])}."
    if thresholds["same_data"]:
        note += " **They were fitted on the evaluated split.**"
    return f"{_render_table(head, rows)}\n\n{note}"


def _render_lesions(found: dict[str, Any]) -> str:
    keys = list(found["per_lesion"])
    head = ["", *(LESION_BY_KEY[key].name for key in keys), "mean"]
    columns = [*found["per_lesion"].values(), found["macro"]]
    rows = [
        [name, *(format_with_interval(row, score) for row in columns)]
        for score, name in LESION_SCORE_NAMES.items()
    ]
    grid = found["model_grid"]
    rows.append(
        [
            "Dice, model's grid",
            *(format_score(grid["per_lesion"][key]["dice"]) for key in keys),
            format_score(grid["macro"]["dice"]),
        ]
    )
    counts = {
        "n_annotated": "scans annotated",
        "n_present": "scans with it",
        "n_missed": "missed",
        "n_false_positive": "false positive",
        "n_empty_agreed": "both empty",
        "n_lesions": "lesions",
    }
    rows += [
        [name, *(str(row[count]) for row in found["per_lesion"].values()), ""]
        for count, name in counts.items()
    ]
    truth = ", ".join(
        f"{count} from the {source}s" for source, count in sorted(found["truth"].items())
    )
    note = (
        f"On the native grid, voxels at or above {found['threshold']}; surface Dice at "
        f"{found['surface_tolerance_mm']:g} mm; a hit is a Dice of {found['hit_dice']}, a lesion matches at "
        f"{found['match_dice']}. Outlines: {truth or 'none'}."
    )
    return f"{_render_table(head, rows)}\n\n{note}"


def terminal_table(result: dict[str, Any]) -> Table:
    """The main figures; `air` is the image-ablated control."""
    table = Table(
        title=f"{result['config']}, {result['split']} split, {result['n_scans']} scans",
        title_justify="left",
    )
    for column, justify in (
        ("metric", "left"),
        ("value", "right"),
        ("95%", "right"),
        ("air", "right"),
        ("n", "left"),
    ):
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for kind in ("macro", "weighted"):
        mean = result["classification"][kind]
        for score in ("auroc", "average_precision", "f1", "precision", "recall", "ece"):
            count = f"{mean[f'n_findings_{score}']} of {len(FINDINGS)}"
            table.add_row(
                f"{kind} {FINDING_SCORE_NAMES[score]}",
                format_score(mean[score]),
                format_interval(mean, score),
                "",
                count,
            )
    for key, row in (result["localization"] or {"per_lesion": {}})["per_lesion"].items():
        cases = f"{row['n_cases']}, {row['n_present']} with it"
        table.add_row(
            f"Dice, {LESION_BY_KEY[key].name}",
            format_score(row["dice"]),
            format_interval(row, "dice"),
            "",
            cases,
        )
    if result["reports"]:
        image, air = result["reports"]["image"], result["reports"]["image_ablated"]["scores"]
        for score in MAIN_REPORT_SCORES:
            if score in image["scores"]:
                value = (
                    format_score(image["scores"][score]),
                    format_interval(image, score),
                    format_score(air[score]),
                )
                table.add_row(score.replace("_", " "), *value, str(image["n"]))
    return table


def _render_reports(found: dict[str, Any]) -> str:
    image, air, difference = found["image"], found["image_ablated"], found["difference"]
    rows = []
    for score in image["scores"]:
        between = format_with_interval(difference, score) if score in difference else "–"
        values = (
            f"{format_score(row['scores'][score])} {format_interval(row, score)}".strip()
            for row in (image, air)
        )
        rows.append([score.replace("_", " "), *values, between])
    head = ["", "with the image", "without (air)", "difference"]
    note = f"{image['n']:,} reports. What the control scores was not read from the image."
    return f"{_render_table(head, rows)}\n\n{note}"


def _render_report_findings(found: dict[str, Any]) -> str:
    """Each finding that is read in the reports against the labels, with the image and without (air)."""
    image, air = (found[kind]["clinical"]["labels"] for kind in ("image", "image_ablated"))
    scores = ("precision", "recall", "f1")
    head = ["finding", "n", "positive", "called", "called, air"]
    for score in scores:
        head += [FINDING_SCORE_NAMES[score], f"{FINDING_SCORE_NAMES[score]}, air"]
    rows = [
        [
            f"**{kind}**",
            "",
            "",
            "",
            "",
            *(format_score(one[kind][score]) for score in scores for one in (image, air)),
        ]
        for kind in ("micro", "macro", "weighted")
    ]
    for name, row in image["per_finding"].items():
        other = air["per_finding"][name]
        counts = [row["n_known"], row["n_positive"], row["n_called"], other["n_called"]]
        values = (format_score(one[score]) for score in scores for one in (row, other))
        rows.append([name, *map(str, counts), *values])
    note = (
        f"Against the labels of {image['n_cases']:,} scans; read by {found['image']['signatures']['clinical']}. n: "
        "scans with a known label; called: reports that say it is there; air: without the image."
    )
    return f"{_render_table(head, rows)}\n\n{note}"


def _render_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    rule = "|" + "---|" + "---:|" * (len(head) - 1)
    return "\n".join(["| " + " | ".join(head) + " |", rule, *lines])
