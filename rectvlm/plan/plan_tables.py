"""A plan for people: tables on the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from rectvlm.plan.hardware import RATE_SOURCES, HardwareRates, describe_assumed_rates
from rectvlm.plan.memory_savings import MemorySaving
from rectvlm.plan.planner import SECONDS_PER_DAY, ResourcePlan
from rectvlm.plan.speedups import Speedup
from rectvlm.terminal_tables import FoldingTable

MEMORY_KIND_LABELS = {
    "weights_4bit": "4-bit weights",
    "weights_frozen": "frozen bf16 weights",
    "weights_trainable": "trainable bf16 weights",
    "weights_resident": "small weights that stay whole",
    "weights_in_node": "copy within the node (hpZ)",
    "quantization_state": "scales of the 4-bit weights",
    "buffers": "buffers of modules",
    "gradients": "gradients",
    "optimizer": "fp32 weights and Adam",
    "reduce_buckets": "reduce buckets",
    "gather_buffers": "gathered weights",
    "activations": "activations",
    "logits": "logits",
    "inputs": "inputs",
    "workspace": "work areas of kernels",
    "optimizer_step": "optimizer step, beyond activations",
    "context": "CUDA context and NCCL",
    "waste": "allocator's waste",
}
MIN_SHOWN_GB = 0.0005


def print_plan(plan: ResourcePlan, console: Console) -> None:
    """Print a plan's memory, parameters and time."""
    console.print(_make_memory_table(plan))
    figures = FoldingTable(show_header=False)
    figures.add_column()
    figures.add_column(justify="right")
    for label, figure in _list_figures(plan):
        figures.add_row(label, figure)
    console.print(figures)
    for decision in plan.auto_decisions:
        console.print(decision)
    console.print(_describe_hardware(plan))
    _print_generation(plan, console)


def _print_generation(plan: ResourcePlan, console: Console) -> None:
    """Print how long the reports of CT-RATE's validation volumes take."""
    generation = plan.generation
    if generation is None:
        return
    console.print(
        f"Reports of CT-RATE's {generation.volumes:,} validation volumes and of their control, "
        f"{generation.reports:,}: {generation.hours:.2f} h on {plan.gpus} GPUs, not measured on a "
        f"GPU. {generation.reports_at_once} at once on a GPU that holds the whole model, each to "
        f"the end of {generation.report_tokens} tokens; {generation.step_seconds * 1e3:.0f} ms a "
        f"token of all ({generation.tokens_per_second_per_gpu:,.0f} tokens/s a GPU), bound by "
        f"{generation.bound}, {generation.prompt_seconds:.1f} s for their prompts, "
        f"{generation.image_seconds:.2f} s for each image; metrics on the host are left out."
    )


def _describe_phase(plan: ResourcePlan) -> str:
    return f"{plan.config}, phase {plan.phase}" + (f" ({plan.stage})" if plan.stage else "")


def _make_memory_table(plan: ResourcePlan) -> Table:
    verdict = "fits" if plan.fits else "does not fit"
    machines = f"ZeRO-{plan.zero_stage}, {plan.gpus} GPUs of {plan.capacity_gb:g} GB"
    table = FoldingTable(
        title=f"{_describe_phase(plan)}, {machines}: {verdict}", title_justify="left"
    )
    table.add_column("memory of a GPU")
    table.add_column("GB", justify="right")
    for kind, size_gb in plan.gpu_memory_gb.items():
        if kind in MEMORY_KIND_LABELS and size_gb >= MIN_SHOWN_GB:
            table.add_row(MEMORY_KIND_LABELS[kind], f"{size_gb:.2f}")
    table.add_section()
    table.add_row("total", f"{plan.gpu_memory_gb['total']:.2f}")
    table.add_row("while loading", f"{plan.loading_peak_gb:.2f}")
    return table


def _list_figures(plan: ResourcePlan) -> list[tuple[str, str]]:
    """List labels and figures of parameters, disk, FLOPs and time."""
    counts, flops, step, speed = plan.parameters, plan.flops_per_step, plan.time, plan.speed
    language_speed = speed.language_positions_per_second_per_gpu
    return [
        ("encoder", f"{counts.encoder / 1e6:.1f} M"),
        ("classifier", f"{counts.classifier_trainable / 1e6:.2f} M"),
        ("localizer", f"{counts.localizer / 1e6:.1f} M"),
        ("report generator, trainable", f"{counts.generator_trainable / 1e6:.1f} M"),
        ("trainable", f"{counts.trainable / 1e6:.1f} M"),
        ("all", f"{counts.total / 1e9:.3f} G"),
        ("host memory of a node", f"{plan.host_memory_gb:.0f} GB"),
        ("a checkpoint", f"{plan.checkpoint_gb:.1f} GB"),
        ("disk for checkpoints", f"{plan.checkpoint_disk_gb:.1f} GB"),
        ("model FLOPs of a step and GPU", f"{flops.model:.0f} T"),
        ("with recomputation", f"{flops.hardware:.0f} T"),
        ("estimated step", f"{step.total:.2f} s"),
        ("  computation, gathers behind it", f"{step.compute:.2f} s, {step.gathers:.2f} s"),
        ("  hooks of ZeRO-3, optimizer", f"{step.hooks:.2f} s, {step.optimizer:.2f} s"),
        ("tokens a second and GPU, patches and words", f"{speed.tokens_per_second_per_gpu:,.0f}"),
        ("  of the language model", f"{language_speed:,.0f}"),
        ("samples a day", f"{speed.samples_per_day:,.0f}"),
        ("samples of a step", _describe_step(plan)),
        (
            f"{speed.steps:,.0f} steps",
            f"{_format_days(speed.days)}, {speed.epochs:.1f} epochs",
        ),
    ]


def _format_days(days: float) -> str:
    """A duration in the largest unit of which it has at least one."""
    for unit, in_a_day in (("days", 1), ("h", 24), ("min", 24 * 60)):
        if days * in_a_day >= 1:
            return f"{days * in_a_day:.1f} {unit}"
    return f"{days * SECONDS_PER_DAY:.1f} s"


def _describe_step(plan: ResourcePlan) -> str:
    speed = plan.speed
    text = f"{speed.samples_per_step:,} = {speed.accumulation} × {speed.micro_batch} a GPU"
    return text if speed.lr_factor == 1 else f"{text}, rates × {speed.lr_factor:.2f}"


def _describe_hardware(plan: ResourcePlan) -> str:
    rates = plan.hardware
    assumed = describe_assumed_rates(rates, plan.gpus, plan.capacity_gb)
    card = "on an H200 SXM" if rates == HardwareRates() else "at these rates"
    text = (
        f"Time is an estimate {card}: {rates.tflops:g} TFLOP/s × {rates.efficiency:g} "
        f"(convolutions {rates.convolution_efficiency:g}), memory "
        f"{rates.bandwidth:g} TB/s × {rates.bandwidth_efficiency:g}, {rates.gpus_per_node:g} GPUs "
        f"a node, {rates.intra:g} GB/s within and {rates.inter:g} GB/s a GPU between nodes."
    )
    usual = plan.usual_case
    if usual.tissue_share < 1:
        text += f" Time counts {usual.tissue_share:.0%} of the patches, the rest being air"
        if usual.report_tokens is not None:
            text += f", and reports of {usual.report_tokens} tokens"
        text += " (assumed); memory suffices for any case."
    if card == "on an H200 SXM":
        text = f"{text} {RATE_SOURCES}"
    return text if assumed is None else f"{text} {assumed}"


def print_memory_savings(
    plan: ResourcePlan, savings: Sequence[MemorySaving], console: Console
) -> None:
    """Print what can be changed where a plan does not fit."""
    title = f"{plan.gpus} GPUs: what to change, each by itself"
    table = FoldingTable(title=title, title_justify="left", id_columns=(0,))
    table.add_column("change")
    for name in ("saves GB", "total GB", "fits"):
        table.add_column(name, justify="right")
    for saving in savings:
        fits = "yes" if saving.fits else "no"
        table.add_row(saving.change, f"{saving.saved_gb:.1f}", f"{saving.total_gb:.1f}", fits)
    console.print(table)
    if any("data.grid" in saving.change for saving in savings):
        console.print(
            "Another data.grid needs shards that were made with it: `make preprocess` with the "
            "same values."
        )


def print_speedups(plan: ResourcePlan, speedups: Sequence[Speedup], console: Console) -> None:
    """Print what makes a step faster where memory is idle."""
    title = f"{plan.gpus} GPUs: faster, each by itself ({plan.time.total:.2f} s a step now)"
    table = FoldingTable(title=title, title_justify="left", id_columns=(0,))
    table.add_column("change")
    for name in ("saves s a step", "step s", "GB a GPU"):
        table.add_column(name, justify="right")
    for speedup in speedups:
        figures = (speedup.saved_seconds, speedup.step_seconds, speedup.total_gb)
        table.add_row(speedup.change, *(f"{figure:.2f}" for figure in figures))
    console.print(table)


def print_all_phases(plans_by_phase: Sequence[Sequence[ResourcePlan]], console: Console) -> None:
    """Print each phase's time and memory, and the time of all, for each number of GPUs.

    Args:
        plans_by_phase: for each phase, its plan for each number of GPUs.
        console: where to print.
    """
    title = f"{plans_by_phase[0][0].config}, all phases"
    table = FoldingTable(title=title, title_justify="left", id_columns=(0, 1))
    for name in ("GPUs", "phase", "samples", "a step", "step s", "GB a GPU", "fits", "h", "days"):
        table.add_column(name, justify="right")
    for plans in zip(*plans_by_phase, strict=True):
        for plan in plans:
            table.add_row(*_list_phase_cells(plan))
        days = sum(plan.speed.days for plan in plans)
        table.add_row(f"{plans[0].gpus:,}", "all", *[""] * 5, f"{24 * days:.1f}", f"{days:.2f}")
        table.add_section()
    console.print(table)
    for plan in (plans[0] for plans in plans_by_phase):
        for decision in plan.auto_decisions:
            console.print(f"phase {plan.phase}, {plan.gpus} GPUs, {decision}")
    console.print(_describe_hardware(plans_by_phase[-1][-1]))
    for plan in plans_by_phase[-1]:
        _print_generation(plan, console)


def _list_phase_cells(plan: ResourcePlan) -> list[str]:
    speed = plan.speed
    return [
        f"{plan.gpus:,}",
        str(plan.phase),
        f"{speed.steps * speed.samples_per_step:,}",
        f"{speed.samples_per_step:,} = {plan.gpus:,} × {speed.accumulation} × {speed.micro_batch}",
        f"{plan.time.total:.2f}",
        f"{plan.gpu_memory_gb['total']:.1f}",
        "yes" if plan.fits else "no",
        f"{24 * speed.days:.1f}",
        f"{speed.days:.2f}",
    ]


def print_scaling(plans: Sequence[ResourcePlan], console: Console) -> None:
    """Print one row for each number of GPUs."""
    table = FoldingTable(title=_describe_phase(plans[0]), title_justify="left")
    for name in ("GPUs", "GB a GPU", "fits", "step s", "tokens/s"):
        table.add_column(name, justify="right")
    for name in ("a GPU", "samples/step", "duration", "epochs"):
        table.add_column(name, justify="right")
    for plan in plans:
        speed = plan.speed
        table.add_row(
            f"{plan.gpus:,}",
            f"{plan.gpu_memory_gb['total']:.1f}",
            "yes" if plan.fits else "no",
            f"{plan.time.total:.2f}",
            f"{speed.tokens_per_second:,.0f}",
            f"{speed.tokens_per_second_per_gpu:,.0f}",
            f"{speed.samples_per_step:,.0f}",
            _format_days(speed.days),
            f"{speed.epochs:.1f}",
        )
    console.print(table)
