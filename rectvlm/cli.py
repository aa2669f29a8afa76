"""The command `rectvlm`: its subcommands, from `preprocess` and `train` to `version`.

Heavy modules are imported when a command needs them, so that `rectvlm --help` answers at once.
"""

import argparse
import logging
import os
import re
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import rectvlm
from rectvlm.cli_options import (
    CommandParser,
    add_options,
    options_from_namespace,
    print_names_as_bytes,
    read_path,
)

log = logging.getLogger("rectvlm.cli")  # also where the module is run as `__main__`

DEVICE_PATTERN = r"(cpu|cuda|mps|xpu)(:\d+)?"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. A user's error is one sentence on stderr and exit code 2."""
    _replace_closed_streams()
    print_names_as_bytes()
    options = _build_parser().parse_args(arguments)
    if options.run is not _run_train:  # a phase has a log of its own
        _start_logging(options.verbose, getattr(options, "progress", False))
    from rectvlm.files import explain_os_error, printable_text
    from rectvlm.optional_packages import require_extra
    from rectvlm.types import UserError

    try:
        if hasattr(options, "extra"):
            require_extra(options.extra)
        options.run(options)
    except UserError as error:
        sys.stderr.write(f"rectvlm: {printable_text(error)}\n")
        return 2
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        sys.stderr.write(f"rectvlm: {printable_text(explain_os_error(error))}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("rectvlm: stopped\n")
        return 130
    return 0


def _replace_closed_streams() -> None:
    """Let a command that was started without stdout or stderr (`>&-`) write to nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - open until the end


def _build_parser() -> CommandParser:
    parser = CommandParser(prog="rectvlm", description="3D chest-CT vision-language models.")
    parser.add_argument("--verbose", action="store_true", help="log details")
    parser.add_argument("--version", action="version", version=f"rectvlm {rectvlm.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    commands.add_parser(
        "predict",
        help="findings, lesion masks, report and a page for a CT or a folder",
        add_arguments=_add_predict_arguments,
    )
    commands.add_parser(
        "serve",
        help="a page and an HTTP API that take CTs and show their cases",
        add_arguments=_add_serve_arguments,
    )
    commands.add_parser(
        "challenge",
        help="results.json of a folder of CTs for a task of the VLM3D challenge",
        add_arguments=_add_challenge_arguments,
    )
    commands.add_parser(
        "evaluate",
        help="metrics of a checkpoint on shards: JSON, tables and plots",
        add_arguments=_add_evaluate_arguments,
    )

    commands.add_parser(
        "embed",
        help="features of CTs or shards by an encoder, for models of your own",
        add_arguments=_add_embed_arguments,
    )
    commands.add_parser(
        "probe",
        help="a linear probe of features: which findings an encoder tells apart",
        add_arguments=_add_probe_arguments,
    )

    _add_programs(commands)
    _add_weights_actions(
        commands.add_parser("weights", help="fetch, publish, check and list weights")
    )

    commands.add_parser(
        "export",
        help="a checkpoint as a folder to publish, without its optimizer state",
        add_arguments=_add_export_arguments,
    )
    commands.add_parser(
        "plan",
        help="memory, FLOPs and time of a configuration, before a GPU is rented",
        add_arguments=_add_plan_arguments,
    )

    runs = commands.add_parser("runs", help="list, compare and plot runs; test two evaluations")
    _add_runs_actions(runs)

    commands.add_parser(
        "init",
        help="a configuration to edit, with a comment on each field",
        add_arguments=_add_init_arguments,
    )
    completion = commands.add_parser(
        "completion", help="a script that lets a shell complete commands and options"
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))
    completion.set_defaults(run=_run_completion)
    commands.add_parser(
        "doctor", help="what this machine has and lacks, and what to do about each"
    ).set_defaults(run=_run_doctor)
    commands.add_parser("version", help="versions of rectvlm, Python and torch").set_defaults(
        run=_print_versions
    )
    return parser


def _add_predict_arguments(predict: argparse.ArgumentParser) -> None:
    predict.add_argument(
        "source",
        metavar="FILE_FOLDER_OR_URL",
        help="a CT (DICOM, .nii.gz, .mha, .nrrd, .npz, .zip of DICOM), a folder of them, or "
        "dicomweb[s]://HOST:PORT/PATH/studies/UID[/series/UID] of a PACS",
    )
    predict.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="a run's phase folder"
    )
    predict.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the results"
    )
    predict.add_argument(
        "--device", help="cpu, cuda, cuda:1, …; by default the GPU if there is one"
    )
    predict.add_argument(
        "--thresholds",
        type=Path,
        metavar="FILE",
        help="thresholds.json for calls and prompts; by default the model's own thresholds",
    )
    predict.add_argument(
        "--series",
        metavar="NUMBER_OR_UID",
        help="DICOM series of each study; by default the chest CT is chosen",
    )
    predict.add_argument(
        "--keys",
        nargs="+",
        metavar="KEY",
        help="cases of the folder or URL of shards that is given: their pages show the truth too",
    )
    predict.add_argument(
        "--store",
        metavar="URL",
        help="dicomweb[s]://HOST:PORT/PATH of a PACS that gets the DICOM objects of the results",
    )
    predict.set_defaults(run=_run_predict)


def _add_serve_arguments(serve: argparse.ArgumentParser) -> None:
    from rectvlm.serve.options import ServeOptions

    add_options(serve, ServeOptions)
    serve.set_defaults(run=_run_serve)


def _add_challenge_arguments(challenge: argparse.ArgumentParser) -> None:
    challenge.add_argument(
        "source", type=Path, metavar="FILE_OR_FOLDER", help="a folder of CTs, which is only read"
    )
    challenge.add_argument(
        "--task", choices=("classification", "localization", "reports"), required=True
    )
    challenge.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="a run's phase folder, or an exported model",
    )
    challenge.add_argument(
        "--out", type=Path, default=Path("results.json"), metavar="FILE", help="file to write"
    )
    challenge.add_argument(
        "--device", help="cpu, cuda, cuda:1, …; by default the GPU if there is one"
    )
    challenge.set_defaults(run=_run_challenge)


def _add_programs(commands: "argparse._SubParsersAction[Any]") -> None:
    """Add the commands that hand all their words on to another program."""
    # Every word is the program's, also `--help`: no prefix makes an option here.
    preprocess = commands.add_parser(
        "preprocess",
        help="shards of your own cases (--table), of CT-RATE or of phantoms",
        add_help=False,
        prefix_chars="\0",
    )
    preprocess.add_argument("arguments", nargs=argparse.REMAINDER)
    preprocess.set_defaults(run=_run_preprocess, extra="train")

    train = commands.add_parser(
        "train",
        help="train a phase, on one process or several; `rectvlm train N --help` has its options",
    )
    train.add_argument("phase", type=int, choices=(1, 2, 3), metavar="N", help="1, 2 or 3")
    train.add_argument("arguments", nargs=argparse.REMAINDER, metavar="…", help="of the phase")
    train.set_defaults(run=_run_train, extra="train")


def _add_export_arguments(export: argparse.ArgumentParser) -> None:
    export.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="a run's phase folder"
    )
    export.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the folder to write"
    )
    export.add_argument(
        "--base-model",
        metavar="ID",
        help="how others find the language model, if not as configured",
    )
    export.add_argument(
        "--license", metavar="ID", help="for the model card, for example apache-2.0"
    )
    export.add_argument(
        "--dataset",
        action="append",
        default=[],
        metavar="ID",
        help="for the model card; repeatable",
    )
    export.add_argument(
        "--metrics", type=Path, metavar="FILE", help="by default those of `evaluate`, if it has run"
    )
    export.add_argument(
        "--overwrite", action="store_true", help="replace the model in a folder that is there"
    )
    export.set_defaults(run=_run_export)


def _add_plan_arguments(plan: argparse.ArgumentParser) -> None:
    from rectvlm.plan.hardware import MEASURED_RATES, HardwareRates
    from rectvlm.plan.options import PlanOptions

    add_options(plan, PlanOptions)
    add_options(plan, HardwareRates, exclude=MEASURED_RATES)
    plan.set_defaults(run=_run_plan)


def _add_init_arguments(init: argparse.ArgumentParser) -> None:
    init.add_argument("path", type=Path, metavar="FILE.yaml", help="file to write")
    init.add_argument(
        "--from",
        dest="config",
        default="small",
        metavar="NAME",
        help="configuration to start from: tiny, demo, learn, small, medium, large, or a YAML file "
        "(default: small)",
    )
    init.set_defaults(run=_run_init)


def _add_runs_actions(parser: argparse.ArgumentParser) -> None:
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


def _add_evaluate_arguments(evaluate: argparse.ArgumentParser) -> None:
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


def _add_embed_arguments(embed: argparse.ArgumentParser) -> None:
    from rectvlm.embed.options import EmbedOptions

    add_options(embed, EmbedOptions)
    embed.add_argument("--device", help="cpu, cuda, cuda:1, …; by default the GPU if there is one")
    embed.set_defaults(run=_run_embed)


def _add_probe_arguments(probe: argparse.ArgumentParser) -> None:
    from rectvlm.embed.options import ProbeOptions

    add_options(probe, ProbeOptions)
    probe.set_defaults(run=_run_probe, extra="train")


def _add_weights_actions(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    origin: dict[str, Any] = {"dest": "where", "metavar": "URL_OR_FOLDER"}
    pull = actions.add_parser(
        "pull", help="bring models here; what is there is checked, completed and repaired"
    )
    pull.add_argument(
        "names", nargs="+", metavar="NAME", help="a name of `rectvlm weights list`, or OWNER/NAME"
    )
    _add_part_option(pull)
    pull.add_argument("--from", **origin, help="a mirror or a folder instead of the hub")
    pull.add_argument("--repo", metavar="OWNER/NAME", help="take it from this repository")
    pull.add_argument("--revision", default="main", metavar="REV", help="branch, tag or commit")
    pull.add_argument("--out", type=Path, metavar="DIR", help="folder of the files")
    pull.set_defaults(run=_run_weights_pull, progress=True)

    push = actions.add_parser(
        "push", help="publish a checkpoint or an exported model, privately by default"
    )
    push.add_argument("folder", type=Path, metavar="FOLDER")
    push.add_argument("--repo", required=True, metavar="OWNER/NAME")
    _add_part_option(push)
    push.add_argument("--to", **origin, help="another hub or a folder instead of the hub")
    push.add_argument("--public", action="store_true", help="anyone may read it")
    push.add_argument("--message", metavar="TEXT", help="of the commit")
    push.set_defaults(run=_run_weights_push, progress=True)

    verify = actions.add_parser(
        "verify", help="recompute all checksums; name what differs or is missing"
    )
    verify.add_argument("targets", nargs="+", metavar="NAME_OR_FOLDER")
    verify.set_defaults(run=_run_weights_verify)

    packer = actions.add_parser(
        "pack", help="write a language model packed to 4 bits, which training need not pack again"
    )
    packer.add_argument("model", metavar="MODEL", help="folder, hub id or bundled:NAME")
    packer.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder")
    packer.set_defaults(run=_run_weights_pack)

    converter = actions.add_parser(
        "convert-labeler",
        help="CT-RATE's official text classifier as a folder for `rectvlm evaluate --labeler`",
    )
    converter.add_argument("weights", type=Path, metavar="FILE.pth", help="its published weights")
    converter.add_argument(
        "--encoder",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder with RadBERT's config.json and tokenizer",
    )
    converter.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="new folder of the classifier"
    )
    converter.set_defaults(run=_run_weights_convert_labeler)

    lister = actions.add_parser("list", help="all names, and what can be had of them now")
    lister.add_argument("--from", **origin, help="ask this mirror, or look into this folder")
    lister.set_defaults(run=_run_weights_list)


def _add_part_option(parser: argparse.ArgumentParser) -> None:
    parts = ("encoder", "classifier", "localizer", "generator")
    parser.add_argument(
        "--part", action="append", choices=parts, help="this part alone; may be given several times"
    )


def _start_logging(verbose: bool, progress: bool = False) -> None:
    from rich.console import Console
    from rich.logging import RichHandler

    handler = RichHandler(console=Console(stderr=True), show_path=False, log_time_format="%H:%M:%S")
    # Libraries warn about kernels and layers that the user of a command cannot act upon.
    library_level = logging.WARNING if verbose else logging.ERROR
    logging.basicConfig(level=library_level, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("rectvlm").setLevel(logging.DEBUG if verbose else logging.INFO)
    if not verbose:
        warnings.filterwarnings("ignore", category=FutureWarning)
        # Progress bars of weights that load in a second are noise between two log lines.
        if not (progress and sys.stderr.isatty()):
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _run_preprocess(options: argparse.Namespace) -> None:
    from rectvlm.checkout_program import run_preprocessing

    sys.exit(run_preprocessing(options.arguments))


def _run_train(options: argparse.Namespace) -> None:
    from rectvlm.plan.auto_settings import resolve_auto_settings
    from rectvlm.train import main as train_phase

    train_phase(options.phase, options.arguments, resolve_auto_settings)


def _run_predict(options: argparse.Namespace) -> None:
    from rectvlm.predict.dicomweb import read_service_address, read_study_address

    store = read_service_address(options.store) if options.store is not None else None
    address = read_study_address(options.source) if options.keys is None else None
    if address is None and options.keys is None:
        options.source = _existing_path(options.source)
    _check_checkpoint(options.checkpoint)
    _check_device(options.device)
    from rectvlm.predict.pacs import predict_from_pacs
    from rectvlm.predict.run import predict_cases

    inputs = (options.checkpoint, options.out, options.device, options.thresholds, options.series)
    if options.keys is not None:
        from rectvlm.predict.shard_case import predict_shard_cases

        folders = predict_shard_cases(options.source, options.keys, *inputs[:4])
    elif address is None:
        folders = predict_cases(options.source, *inputs)
    else:
        folders = predict_from_pacs(address, *inputs)
    for folder in folders:
        sys.stdout.write(f"{folder / 'index.html'}\n")
    if store is not None:
        from rectvlm.predict.dicomweb import store_results

        store_results(folders, store)


def _existing_path(text: str) -> Path:
    from rectvlm.types import UserError

    path = read_path(text)
    if not path.exists():
        raise UserError(
            f"{path} does not exist: give a CT (DICOM, .nii.gz, …) or a folder of them."
        )
    return path


def _run_serve(namespace: argparse.Namespace) -> None:
    from rectvlm.serve.options import ServeOptions, read_token, require_server_packages

    options = options_from_namespace(ServeOptions, namespace)
    require_server_packages()
    token = read_token(options.host)
    _check_checkpoint(options.checkpoint)
    _check_device(options.device)
    from rectvlm.serve.run import serve

    serve(options, token)


def _run_challenge(options: argparse.Namespace) -> None:
    _check_checkpoint(options.checkpoint)
    _check_device(options.device)
    from rectvlm.predict.challenge import write_challenge_results

    write_challenge_results(
        options.source, options.checkpoint, options.out, options.task, options.device
    )
    sys.stdout.write(f"{options.out}\n")


def _run_evaluate(namespace: argparse.Namespace) -> None:
    from rectvlm.data.shards import read_index
    from rectvlm.evaluate.options import EvaluationOptions, require_truth_folder
    from rectvlm.metrics.radeval_scores import require_radeval

    options = options_from_namespace(EvaluationOptions, namespace)
    require_truth_folder(options.truth)
    require_radeval(options.radeval)
    _check_checkpoint(namespace.checkpoint)
    if namespace.shards is not None:
        read_index(namespace.shards)
    _check_device(namespace.device)

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
        _check_checkpoint(options.checkpoint)
    else:
        load_config(options.config[0], options.config[1:])
    _check_device(namespace.device)
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


def _run_export(options: argparse.Namespace) -> None:
    from rectvlm.checkpoint.export import export_checkpoint

    _check_checkpoint(options.checkpoint)
    chosen = {
        "base_model": options.base_model,
        "license_id": options.license,
        "datasets": options.dataset,
        "overwrite": options.overwrite,
    }
    if options.metrics is not None:
        chosen["metrics"] = options.metrics
    sys.stdout.write(f"{export_checkpoint(options.checkpoint, options.out, **chosen)}\n")


def _check_checkpoint(folder: Path) -> None:
    """Find a checkpoint and read its `config.json` before seconds go into imports."""
    from rectvlm.checkpoint import Checkpoint

    Checkpoint.open(folder)


def _check_device(name: str | None) -> None:
    """Import torch and try a device; from here on a command is known to be right."""
    from rectvlm.types import UserError

    if name is not None and not re.fullmatch(DEVICE_PATTERN, name):
        raise UserError(f"Device {name!r} is unknown: give cpu, cuda, cuda:1, or leave it out.")
    if os.environ.get("RANK", "0") == "0":
        log.info("loading torch, transformers and the model")
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(
            f"Device {name!r} cannot be used ({reason}): give cpu, or leave --device out."
        ) from None


def _run_weights_pull(options: argparse.Namespace) -> None:
    from rectvlm.pretrained.pull import pull_model
    from rectvlm.types import UserError

    if len(options.names) > 1 and (options.out or options.repo):
        raise UserError("--out and --repo are for one name: pull the models one by one.")
    for name in options.names:
        folder = pull_model(
            name, options.part or (), options.where, options.repo, options.revision, options.out
        )
        sys.stdout.write(f"{folder}\n")


def _run_weights_push(options: argparse.Namespace) -> None:
    from rectvlm.pretrained.push import push_model

    place = push_model(
        options.folder,
        options.repo,
        options.part or (),
        options.where,
        options.public,
        options.message,
    )
    sys.stdout.write(f"{place}\n")


def _run_weights_verify(options: argparse.Namespace) -> None:
    from rectvlm.pretrained.verify import find_model_faults
    from rectvlm.types import UserError

    damaged_count = 0
    for target in options.targets:
        folder, faults = find_model_faults(target)
        sys.stdout.writelines(f"{folder}: {fault}\n" for fault in faults or ["intact"])
        damaged_count += bool(faults)
    if damaged_count:
        raise UserError(
            f"{damaged_count} of {len(options.targets)} do not verify: pull again to repair what "
            "was pulled."
        )


def _run_weights_pack(options: argparse.Namespace) -> None:
    from rectvlm.models.pack_language_model import pack_language_model
    from rectvlm.pretrained import resolve_model

    folder = pack_language_model(resolve_model(options.model), options.out)
    sys.stdout.write(f"{folder}\n")


def _run_weights_convert_labeler(options: argparse.Namespace) -> None:
    from rectvlm.pretrained.text_classifier import convert_text_classifier

    folder = convert_text_classifier(options.weights, options.encoder, options.out)
    sys.stdout.write(f"{folder}\n")


def _run_weights_list(options: argparse.Namespace) -> None:
    from rectvlm.pretrained.catalog import PUBLISHED_SIZES
    from rectvlm.pretrained.verify import list_available_models
    from rectvlm.terminal_tables import FoldingTable, make_stdout_console

    table = FoldingTable("name", "repository", "state", id_columns=(0, 1))
    for row in list_available_models(options.where):
        table.add_row(row.name, row.repository, f"{row.kind}; {row.availability}")
    make_stdout_console().print(table)
    if not PUBLISHED_SIZES:
        sys.stdout.write(
            "No weights of rectvlm are published yet. Sizes can be pulled from a repository that "
            "you name (--repo), a "
            "mirror or a folder (--from).\n"
        )


def _run_plan(options: argparse.Namespace) -> None:
    from rectvlm.plan.command import run

    run(options)


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


def _run_init(options: argparse.Namespace) -> None:
    from rectvlm.commented_config import write_commented_config

    write_commented_config(options.config, options.path)
    sys.stdout.write(f"{options.path}\n")


def _run_completion(options: argparse.Namespace) -> None:
    from rectvlm.shell_completion import make_completion_script

    sys.stdout.write(make_completion_script(_build_parser(), options.shell))


def _run_doctor(_options: argparse.Namespace) -> None:
    from rectvlm.doctor.checks import run_checks
    from rectvlm.doctor.table import make_doctor_table
    from rectvlm.terminal_tables import make_stdout_console

    checks = run_checks()
    make_stdout_console().print(make_doctor_table(checks))
    if any(check.state == "failed" for check in checks):
        sys.exit(1)


def _print_versions(_options: argparse.Namespace) -> None:
    for name in ("rectvlm", "torch"):
        sys.stdout.write(f"{name} {version(name)}\n")
    sys.stdout.write(f"python {sys.version.split()[0]}\n")


if __name__ == "__main__":
    sys.exit(main())
