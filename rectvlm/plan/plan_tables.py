"""A plan for people: tables on the terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from rectvlm.plan.planner import MemorySaving, ResourcePlan

MEMORY_KIND_LABELS = {
    "weights_4bit": "4-bit weights",
    "weights_frozen": "frozen bf16 weights",
    "weights_trainable": "trainable bf16 weights",
    "weights_resident": "small weights that stay whole",
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


def print_plan(plan: ResourcePlan, console: Console) -> None:
    """Parameters, memory and time."""
    verdict = "fits" if plan.fits else "does not fit"
    title = f"{_describe_phase(plan)}, ZeRO-{plan.zero_stage}, {plan.gpus} GPUs of {plan.capacity_gb:g} GB"
    memory = Table(title=f"{title}: {verdict}", title_justify="left")
    memory.add_column("memory of a GPU")
    memory.add_column("GB", justify="right")
    for kind, size in plan.gpu_memory_gb.items():
        if kind in MEMORY_KIND_LABELS and size >= 0.0005:
            memory.add_row(MEMORY_KIND_LABELS[kind], f"{size:.2f}")
    memory.add_section()
    memory.add_row("total", f"{plan.gpu_memory_gb['total']:.2f}")
    memory.add_row("while loading", f"{plan.loading_peak_gb:.2f}")
    console.print(memory)

    speed, step = plan.speed, plan.time
    facts = Table(show_header=False)
    facts.add_column()
    facts.add_column(justify="right")
    counts = plan.parameters
    rows = [
        ("encoder", f"{counts['encoder'] / 1e6:.1f} M"),
        ("classifier", f"{counts['classifier_trainable'] / 1e6:.2f} M"),
        ("localizer", f"{counts['localizer'] / 1e6:.1f} M"),
        ("report generator, trainable", f"{counts['generator_trainable'] / 1e6:.1f} M"),
        ("trainable", f"{counts['trainable'] / 1e6:.1f} M"),
        ("all", f"{counts['total'] / 1e9:.3f} G"),
        ("host memory of a node", f"{plan.host_memory_gb:.0f} GB"),
        ("a checkpoint", f"{plan.checkpoint_gb:.1f} GB"),
        ("disk for checkpoints", f"{plan.checkpoint_disk_gb:.1f} GB"),
        ("model FLOPs of a step and GPU", f"{plan.flops_per_step['model']:.0f} T"),
        ("with recomputation", f"{plan.flops_per_step['hardware']:.0f} T"),
        ("estimated step", f"{step['total']:.2f} s"),
        ("  computation, gathers behind it", f"{step['compute']:.2f} s, {step['gathers']:.2f} s"),
        ("  hooks of ZeRO-3, optimizer", f"{step['hooks']:.2f} s, {step['optimizer']:.2f} s"),
        (
            "tokens a second and GPU, patches and words",
            f"{speed['tokens_per_second_per_gpu']:,.0f}",
        ),
        ("  of the language model", f"{speed['language_positions_per_second_per_gpu']:,.0f}"),
        ("samples a day", f"{speed['samples_per_day']:,.0f}"),
        (f"{speed['steps']:,.0f} steps", f"{speed['days']:.1f} days, {speed['epochs']:.1f} epochs"),
    ]
    for row in rows:
        facts.add_row(*row)
    console.print(facts)
    hardware = plan.hardware
    console.print(
        f"Time is an estimate: {hardware['tflops']:g} TFLOP/s × {hardware['efficiency']:g} (convolutions "
        f"{hardware['convolution_efficiency']:g}), memory "
        f"{hardware['bandwidth']:g} TB/s × {hardware['bandwidth_efficiency']:g}, {hardware['gpus_per_node']:g} GPUs a "
        f"node, {hardware['intra']:g} GB/s within and {hardware['inter']:g} GB/s a GPU between nodes."
    )


def _describe_phase(plan: ResourcePlan) -> str:
    return f"{plan.config}, phase {plan.phase}" + (f" ({plan.stage})" if plan.stage else "")


def print_memory_savings(
    plan: ResourcePlan, savings: Sequence[MemorySaving], console: Console
) -> None:
    """What to change where a plan does not fit."""
    table = Table(title=f"{plan.gpus} GPUs: what to change, each by itself", title_justify="left")
    table.add_column("change")
    for name in ("saves GB", "total GB", "fits"):
        table.add_column(name, justify="right")
    for knob in savings:
        table.add_row(
            knob.change,
            f"{knob.saved_gb:.1f}",
            f"{knob.total_gb:.1f}",
            "yes" if knob.fits else "no",
        )
    console.print(table)
    if any("data.grid" in knob.change for knob in savings):
        console.print(
            "Another data.grid needs shards that were made with it: `make preprocess` with the same values."
        )


def print_scaling(plans: Sequence[ResourcePlan], console: Console) -> None:
    """One row for each number of GPUs."""
    table = Table(title=_describe_phase(plans[0]), title_justify="left")
    for name in (
        "GPUs",
        "GB a GPU",
        "fits",
        "step s",
        "tokens/s",
        "a GPU",
        "samples/step",
        "days",
        "epochs",
    ):
        table.add_column(name, justify="right")
    for plan in plans:
        speed = plan.speed
        table.add_row(
            f"{plan.gpus:,}",
            f"{plan.gpu_memory_gb['total']:.1f}",
            "yes" if plan.fits else "no",
            f"{plan.time['total']:.2f}",
            f"{speed['tokens_per_second']:,.0f}",
            f"{speed['tokens_per_second_per_gpu']:,.0f}",
            f"{speed['samples_per_step']:,.0f}",
            f"{speed['days']:.1f}",
            f"{speed['epochs']:.1f}",
        )
    console.print(table)
