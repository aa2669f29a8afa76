"""What a demo came to: targets, figures and real CTs, read from the files of its run."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path

from rich.table import Table

from data_pipeline.sample_cts import SAMPLE_CT_FOLDER, SAMPLE_CTS, SampleCt
from launch.commands import FinishedCommand
from launch.demo_targets import DemoFigures, DemoSize, DemoTarget, LesionScores, list_targets
from rectvlm.data.hounsfield import to_hu
from rectvlm.data.shards import read_index
from rectvlm.data.volume import read_mask, read_volume
from rectvlm.data.voxel_size import voxel_volume_ml
from rectvlm.evaluate.report_tables import describe_table_comparison, format_main_scores
from rectvlm.evaluate.score_format import render_table
from rectvlm.files import read_json_object
from rectvlm.phantom.patient_plan import PhantomStyle
from rectvlm.phantom.supervision import TrainingSupervision
from rectvlm.predict.chest_limits import clear_outside_chest
from rectvlm.runs.phase_summary import PhaseSummary, summarize_phase
from rectvlm.runs.run_files import ENGINE_FILE
from rectvlm.runs.run_tables import format_number
from rectvlm.terminal_tables import FoldingTable
from rectvlm.types import JsonObject

EVALUATION_FILE = "evaluation/metrics.json"
"""Metrics of the evaluation, in the run's folder."""
SUMMARY_FILE, TABLES_FILE = "summary.json", "summary.md"
RUN_AGAIN = "run the demo again"
_SCORES = fields(LesionScores)
_LESION_COLUMNS = (
    "Dice where present",
    "Dice",
    "sensitivity",
    "instance F1",
    "ml where there is none",
)
"""Columns of the fields of `LesionScores`."""


@dataclass(frozen=True)
class CaseCounts:
    """Numbers of cases."""

    train: int
    valid: int
    reports: int
    """Number of held-out cases with a report."""


@dataclass(frozen=True)
class RealCt:
    """A real CT that was predicted and not trained on."""

    case: str
    outlined_ml: float
    """Volume of all outlines, ml."""
    outside_chest_ml: float
    """Volume of outlines where no lesion can be: chest wall, neck, abdomen and outside, ml."""
    tumour_ml: float
    """Volume of the tumour that people outlined, ml."""
    tumour_share_found: float
    """Share of the tumour inside the outline of any lesion."""

    def describe(self) -> str:
        """Word the result in a sentence."""
        return (
            f"Real CT {self.case}: {self.outlined_ml:.0f} ml outlined, "
            f"{self.outside_chest_ml:.1f} ml of them outside the chest; "
            f"{self.tumour_share_found:.0%} of its tumour of {self.tumour_ml:.1f} ml is outlined."
        )


@dataclass(frozen=True)
class DemoSummary:
    """What a demo came to; RUN/summary.json."""

    config: str
    size: DemoSize
    supervision: TrainingSupervision
    """Supervision of the training cases."""
    engine: JsonObject
    """What really ran in the last phase: distributed_type, zero_stage, world_size,
    llm_quantization."""
    targets: list[DemoTarget]
    beside: dict[str, float | None]
    """Figures that belong to the targets, by name."""
    report_scores: dict[str, dict[str, str]]
    """Scores of the language model's reports, of each baseline and of the control, with 95%
    intervals, by score and set of reports."""
    table_comparison: str
    """Whether the language model's reports beat a table of texts, in words."""
    findings: dict[str, float | None]
    """AUROC by finding, of those that the synthesis draws."""
    lesions: dict[str, LesionScores]
    cases: CaseCounts
    real_cts: list[RealCt]
    pages: list[str]
    """Pages of predicted cases, for a browser: the held-out phantom first, with its truth."""
    phases: list[PhaseSummary]
    evaluation: str
    """Path of the file that holds all figures of the evaluation."""
    machine: JsonObject
    versions: dict[str, str]
    stages: list[FinishedCommand]
    seconds: float
    """Duration of all commands, seconds."""

    def to_json(self) -> JsonObject:
        """Return the summary as plain values."""
        targets = [asdict(target) | {"met": target.is_met} for target in self.targets]
        return asdict(self) | {"targets": targets}


def summarize_demo(
    folder: Path,
    phases: Sequence[int],
    commands: Sequence[FinishedCommand],
    size: DemoSize,
    supervision: TrainingSupervision,
    style: PhantomStyle,
) -> DemoSummary:
    """Summarize a demo from the files that it wrote.

    Args:
        folder: the run's folder.
        phases: numbers of the phases that were trained, in order.
        commands: the commands that ran.
        size: which targets are asked for.
        supervision: labels and outlines of the cases to learn from.
        style: style of the synthetic cases.
    """
    metrics = read_json_object(folder / EVALUATION_FILE, RUN_AGAIN)
    engine = read_json_object(folder / f"phase{phases[-1]}" / ENGINE_FILE, RUN_AGAIN)
    engine_keys = ("distributed_type", "zero_stage", "world_size", "llm_quantization")
    seconds_by_command = {command.name: command.seconds for command in commands}
    seconds = round(sum(seconds_by_command.values()), 1)
    phase_summaries = []
    for phase in phases:
        phase_seconds = seconds_by_command[f"phase {phase}"]
        phase_summaries.append(summarize_phase(folder / f"phase{phase}", phase, phase_seconds))
    real_cts = measure_real_cts(folder / "predictions")
    figures = _select_figures(metrics, seconds / 60, style, real_cts)
    reports = metrics["reports"]
    return DemoSummary(
        config=metrics["config"],
        size=size,
        supervision=supervision,
        engine={key: engine[key] for key in engine_keys},
        targets=list_targets(figures, supervision, size),
        beside=_select_beside(metrics),
        report_scores={} if reports is None else format_main_scores(reports),
        table_comparison="" if reports is None else describe_table_comparison(reports),
        findings=dict(figures.auroc_by_finding),
        lesions=dict(figures.lesions),
        cases=CaseCounts(
            train=len(read_index(Path(metrics["shards"])).select_split("train")),
            valid=metrics["n_cases"],
            reports=0 if reports is None else reports["image"]["n"],
        ),
        real_cts=real_cts,
        pages=_list_pages(folder / "predictions"),
        phases=phase_summaries,
        evaluation=str(folder / EVALUATION_FILE),
        machine=metrics["machine"],
        versions=metrics["versions"],
        stages=list(commands),
        seconds=seconds,
    )


def _list_pages(predictions: Path) -> list[str]:
    """List the pages of predicted cases, those of real CTs last."""
    real = {ct.name for ct in SAMPLE_CTS}
    folders = [path.parent for path in predictions.glob("*/index.html")]
    folders.sort(key=lambda folder: (folder.name in real, folder.name))
    return [str(folder / "index.html") for folder in folders]


def measure_real_cts(predictions: Path, samples: Path = SAMPLE_CT_FOLDER) -> list[RealCt]:
    """Measure the predictions of the sample CTs that a folder holds."""
    cts = []
    for ct in SAMPLE_CTS:
        folder = predictions / ct.name
        if (folder / "lesions.nii.gz").is_file():
            cts.append(_measure_real_ct(ct, folder, samples))
    return cts


def _measure_real_ct(ct: SampleCt, folder: Path, samples: Path) -> RealCt:
    volume, tumour = read_volume(ct.volume_path(samples)), read_mask(ct.mask_path(samples))
    bits = read_mask(folder / "lesions.nii.gz").array
    assert bits.shape == volume.array.shape == tumour.array.shape, "one grid for all volumes"
    voxel_ml = voxel_volume_ml(volume.affine)
    is_tumour = tumour.array > 0
    outside = clear_outside_chest(bits.copy(), to_hu(volume)[0], volume.affine)
    return RealCt(
        case=ct.name,
        outlined_ml=round(float((bits > 0).sum() * voxel_ml), 1),
        outside_chest_ml=round(outside * voxel_ml, 2),
        tumour_ml=round(float(is_tumour.sum() * voxel_ml), 2),
        tumour_share_found=round(float((bits[is_tumour] > 0).mean()), 3),
    )


def _select_beside(metrics: JsonObject) -> dict[str, float | None]:
    macro_f1 = metrics["classification"]["macro"]["f1"]
    beside = {"macro F1 of the findings, thresholds fitted on other cases": macro_f1}
    reports = metrics["reports"]
    if reports is None:
        return beside
    image, ablated = reports["image"]["scores"], reports["image_ablated"]["scores"]
    f1 = "F1 of the findings in the reports"
    beside[f"{f1}, mean of the findings"] = image["clinical_labels_macro_f1"]
    beside[f"{f1} without the image"] = ablated["clinical_labels_micro_f1"]
    return beside | {"BLEU-4 of the reports": image["bleu_4"]}


def _select_figures(
    metrics: JsonObject, minutes: float, style: PhantomStyle, real_cts: Sequence[RealCt]
) -> DemoFigures:
    """Select the figures that targets are made of."""
    per_finding = metrics["classification"]["per_finding"]
    auroc_by_finding = {name: per_finding[name].get("auroc") for name in style.findings}
    lesions: dict[str, LesionScores] = {}
    for lesion, scores in (metrics["localization"] or {"per_lesion": {}})["per_lesion"].items():
        lesions[lesion] = LesionScores(**{score.name: scores[score.name] for score in _SCORES})
    reports: JsonObject = metrics["reports"] or {}
    image = reports.get("image", {"scores": {}})["scores"]
    ablated = reports.get("image_ablated", {"scores": {}})["scores"]
    outside_ml = sum(ct.outside_chest_ml for ct in real_cts)
    return DemoFigures(
        auroc_by_finding=auroc_by_finding,
        lesions=lesions,
        report_f1=image.get("clinical_labels_micro_f1"),
        report_f1_without_image=ablated.get("clinical_labels_micro_f1"),
        laterality=image.get("laterality"),
        minutes=minutes,
        outside_chest_ml=outside_ml if len(real_cts) == len(SAMPLE_CTS) else None,
    )


def to_markdown(summary: DemoSummary) -> str:
    """Write targets, findings, lesions, real CTs and commands as tables."""
    cases, machine = summary.cases, summary.machine
    lines = [
        f"{cases.valid} held-out cases ({cases.reports} with reports), {cases.train} to learn "
        f"from, supervision {summary.supervision}; {machine['cores']} cores, {machine['cpu']}.",
    ]
    lines += ["", "| target | wanted | found | met |", "|---|---|---|---|"]
    for target in summary.targets:
        wanted = f"{'≤' if target.at_most else '≥'} {target.wanted:g}"
        met = "yes" if target.is_met else "no"
        lines.append(f"| {target.name} | {wanted} | {format_number(target.found, 3)} | {met} |")
    lines += ["", "| beside them | found |", "|---|---|"]
    lines += [*_figure_rows(summary.beside), *_report_lines(summary)]
    lines += [ct.describe() for ct in summary.real_cts]
    lines += ["", "| finding | AUROC |", "|---|---|"]
    lines += _figure_rows(summary.findings)

    lines += ["", f"| lesion | {' | '.join(_LESION_COLUMNS)} |", "|---" * 6 + "|"]
    for lesion, scores in summary.lesions.items():
        cells = " | ".join(format_number(figure, 3) for figure in astuple(scores))
        lines.append(f"| {lesion.replace('_', ' ')} | {cells} |")
    lines += ["", "| stage | seconds | seconds of CPU |", "|---|---|---|"]
    for command in summary.stages:
        lines.append(f"| {command.name} | {command.seconds:.0f} | {command.cpu_seconds:.0f} |")
    cpu_seconds = sum(command.cpu_seconds for command in summary.stages)
    lines += [f"| all | {summary.seconds:.0f} | {cpu_seconds:.0f} |", ""]
    return "\n".join(lines)


def _report_lines(summary: DemoSummary) -> list[str]:
    """The reports beside their baselines as a table, and whether they beat a table of texts."""
    lines = [""]
    if summary.report_scores:
        kinds = next(iter(summary.report_scores.values()))
        rows = [[name, *cells.values()] for name, cells in summary.report_scores.items()]
        lines += [render_table(["reports", *kinds], rows), ""]
    return [*lines, summary.table_comparison]


def _figure_rows(figures: Mapping[str, float | None]) -> list[str]:
    return [f"| {name} | {format_number(value, 3)} |" for name, value in figures.items()]


def make_result_tables(summary: DemoSummary) -> list[Table]:
    """Make the tables that end a demo, for the terminal: its training, reports and targets."""
    tables = [_make_training_table(summary)]
    if summary.report_scores:
        tables.append(_make_report_table(summary))
    return [*tables, _make_target_table(summary)]


def _make_report_table(summary: DemoSummary) -> Table:
    table = FoldingTable(title="Reports and their baselines", title_justify="left")
    table.add_column("metric")
    for kind in next(iter(summary.report_scores.values())):
        table.add_column(kind, justify="right")
    for name, cells in summary.report_scores.items():
        table.add_row(name, *cells.values())
    return table


def _make_training_table(summary: DemoSummary) -> Table:
    engine = summary.engine
    title = (
        f"{engine['world_size']} processes, {engine['distributed_type']}, "
        f"ZeRO-{engine['zero_stage']}"
    )
    if engine["llm_quantization"]:
        title += f", language model in {engine['llm_quantization']}"
    table = FoldingTable(title=title, title_justify="left")
    for column in ("phase", "steps", "loss, first", "loss, last", "seconds"):
        table.add_column(column, justify="right")
    for phase in summary.phases:
        table.add_row(
            str(phase.phase),
            str(phase.steps),
            format_number(phase.loss_first, 3),
            format_number(phase.loss_last, 3),
            f"{phase.seconds:.0f}",
        )
    return table


def _make_target_table(summary: DemoSummary) -> Table:
    title = f"{summary.cases.valid} held-out cases, {summary.cases.train} to learn from"
    table = FoldingTable(title=title, title_justify="left")
    table.add_column("target")
    for column in ("wanted", "found", "met"):
        table.add_column(column, justify="right")
    for target in summary.targets:
        wanted = f"{'at most' if target.at_most else 'at least'} {target.wanted:g}"
        met = "[green]yes[/]" if target.is_met else "[red]no[/]"
        table.add_row(target.name, wanted, format_number(target.found, 3), met)
    return table
