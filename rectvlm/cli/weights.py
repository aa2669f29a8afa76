"""The commands `weights` and `export`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from rectvlm.cli.checks import check_checkpoint


def add_weights_actions(parser: argparse.ArgumentParser) -> None:
    """Add the actions of `weights`."""
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


def add_export_arguments(export: argparse.ArgumentParser) -> None:
    """Add the options of `export`."""
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


def _run_export(options: argparse.Namespace) -> None:
    from rectvlm.checkpoint.export import export_checkpoint

    check_checkpoint(options.checkpoint)
    chosen = {
        "base_model": options.base_model,
        "license_id": options.license,
        "datasets": options.dataset,
        "overwrite": options.overwrite,
    }
    if options.metrics is not None:
        chosen["metrics"] = options.metrics
    sys.stdout.write(f"{export_checkpoint(options.checkpoint, options.out, **chosen)}\n")
