"""The commands `evaluate`, `embed`, `probe` and `runs`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from rectvlm.cli.checks import check_checkpoint, prepare_device
from rectvlm.cli_options import add_options, options_from_namespace


def add_evaluate_arguments(evaluate: argparse.ArgumentParser) -> None:
    """Add the options of `evaluate`."""
    from rectvlm.evaluate.options import EvaluationOptions

    evaluate.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="a run's phase folder"
    )
    evaluate.add_argument(
        "--shards", metavar="DIR_OR_URL", help="by default those the checkpoint was trained on"
    )
    evaluate.add_argument(
        "--out", type=Path, metavar="FILE", help="by default in the checkpoint's folder"
    )
    evaluate.add_argument(
        "--device", help="cpu, cuda, cuda:1, …; by default a GPU for each process if there is one"
    )
    add_options(evaluate, EvaluationOptions)
    evaluate.set_defaults(run=_run_evaluate, extra="train")


def add_embed_arguments(embed: argparse.ArgumentParser) -> None:
    """Add the options of `embed`."""
    from rectvlm.embed.options import EmbedOptions

    add_options(embed, EmbedOptions)
    embed.add_argument("--device", help="cpu, cuda, cuda:1, …; by default the GPU if there is one")
    embed.set_defaults(run=_run_embed)


def add_probe_arguments(probe: argparse.ArgumentParser) -> None:
    """Add the options of `probe`."""
    from rectvlm.embed.options import ProbeOptions

    add_options(probe, ProbeOptions)
    probe.set_defaults(run=_run_probe, extra="train")


def add_runs_actions(parser: argparse.ArgumentParser) -> None:
    """Add the actions of `runs`."""
    parser.set_defaults(run=_run_runs)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    several: dict[str, Any] = {"type": Path, "metavar": "FOLDER"}
    listed = actions.add_parser(
        "list", help="state, steps, loss, best validation, speed of each phase's run"
    )
    listed.add_argument(
        "folders",
        nargs="*",
        default=[Path("runs")],
        help="where to look (default: runs)",
        **several,
    )
    listed.add_argument("--json", action="store_true", help="for programs")
    compared = actions.add_parser("compare", help="what sets runs apart, and how they did")
    compared.add_argument(
        "folders", nargs="+", help="of a phase, of a run, or of several", **several
    )
    compared.add_argument("--json", action="store_true", help="for programs")
    plotted = actions.add_parser(
        "plot", help="losses, learning rate, validation and throughput as a PNG"
    )
    plotted.add_argument(
        "folders", nargs="+", help="of a phase, of a run, or of several", **several
    )
    plotted.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="by default curves.png in the folder of a single run",
    )
    plotted.set_defaults(extra="train")
    actions.add_parser(
        "test",
        help="is A better than B? Two evaluations of the same cases, by patient",
        add_arguments=_add_comparison_arguments,
    )


def _add_comparison_arguments(parser: argparse.ArgumentParser) -> None:
    from rectvlm.evaluate.comparison_options import ComparisonOptions

    add_options(parser, ComparisonOptions)
    parser.set_defaults(run=_run_comparison)


def _run_evaluate(namespace: argparse.Namespace) -> None:
    from rectvlm.data.shards import read_index
    from rectvlm.evaluate.options import EvaluationOptions, require_truth_folder
    from rectvlm.metrics.radeval_scores import require_radeval

    options = options_from_namespace(EvaluationOptions, namespace)
    require_truth_folder(options.truth)
    require_radeval(options.radeval)
    check_checkpoint(namespace.checkpoint)
    if namespace.shards is not None:
        read_index(namespace.shards)
    prepare_device(namespace.device)

    from rectvlm.evaluate.radeval_tables import describe_radeval, make_radeval_table
    from rectvlm.evaluate.report_tables import describe_table_comparison, make_baseline_table
    from rectvlm.evaluate.run import evaluate_checkpoint, output_path
    from rectvlm.evaluate.tables import terminal_table
    from rectvlm.terminal_tables import make_stdout_console

    result = evaluate_checkpoint(
        namespace.checkpoint,
        namespace.shards,
        namespace.out,
        device=namespace.device,
        options=options,
    )
    if result is not None:  # the first of several processes
        console = make_stdout_console()
        console.print(terminal_table(result))
        if result.reports is not None:
            if result.reports["baselines"]:
                console.print(make_baseline_table(result.reports))
            if result.reports["radeval"] is not None:
                console.print(make_radeval_table(result.reports["radeval"]))
                console.print(describe_radeval(result.reports["radeval"]))
            console.print(describe_table_comparison(result.reports))
        sys.stdout.write(f"{output_path(namespace.checkpoint, options.split, namespace.out)}\n")


def _run_embed(namespace: argparse.Namespace) -> None:
    from rectvlm.config import load_config
    from rectvlm.embed.features import require_feature_path
    from rectvlm.embed.options import EmbedOptions

    options = options_from_namespace(EmbedOptions, namespace)
    options.require_source_and_encoder()
    require_feature_path(options.out)
    if options.checkpoint is not None:
        check_checkpoint(options.checkpoint)
    else:
        load_config(options.config[0], options.config[1:])
    prepare_device(namespace.device)
    from rectvlm.embed.run import embed_cts

    sys.stdout.write(f"{embed_cts(options, namespace.device)}\n")


def _run_probe(namespace: argparse.Namespace) -> None:
    from rectvlm.embed.features import read_features
    from rectvlm.embed.options import ProbeOptions

    options = options_from_namespace(ProbeOptions, namespace)
    for file in options.features:
        read_features(file)
    from rectvlm.embed.probe import probe_features
    from rectvlm.embed.probe_table import make_probe_table
    from rectvlm.terminal_tables import make_stdout_console

    make_stdout_console().print(make_probe_table(probe_features(options)))
    sys.stdout.write(f"{options.output_path}\n")


def _run_runs(options: argparse.Namespace) -> None:
    from rectvlm.runs.command import run

    run(options)


def _run_comparison(namespace: argparse.Namespace) -> None:
    from rectvlm.evaluate.comparison import compare_evaluations
    from rectvlm.evaluate.comparison_options import ComparisonOptions
    from rectvlm.evaluate.comparison_table import describe_comparison, make_comparison_table
    from rectvlm.terminal_tables import make_stdout_console

    comparison = compare_evaluations(options_from_namespace(ComparisonOptions, namespace))
    make_stdout_console().print(make_comparison_table(comparison))
    sys.stdout.writelines(f"{line}\n" for line in describe_comparison(comparison))
