"""The commands `predict`, `serve` and `challenge`."""

import argparse
import sys
from pathlib import Path

from rectvlm.cli.checks import (
    check_checkpoint,
    end_by_sigterm_as_by_ctrl_c,
    existing_path,
    prepare_device,
)
from rectvlm.cli_options import add_options, options_from_namespace


def add_predict_arguments(predict: argparse.ArgumentParser) -> None:
    """Add the options of `predict`."""
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


def add_serve_arguments(serve: argparse.ArgumentParser) -> None:
    """Add the options of `serve`."""
    from rectvlm.serve.options import ServeOptions

    add_options(serve, ServeOptions)
    serve.set_defaults(run=_run_serve)


def add_challenge_arguments(challenge: argparse.ArgumentParser) -> None:
    """Add the options of `challenge`."""
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


def _run_predict(options: argparse.Namespace) -> None:
    from rectvlm.predict.dicomweb import read_service_address, read_study_address

    store = read_service_address(options.store) if options.store is not None else None
    address = read_study_address(options.source) if options.keys is None else None
    if address is None and options.keys is None:
        options.source = existing_path(options.source)
    check_checkpoint(options.checkpoint)
    prepare_device(options.device)
    end_by_sigterm_as_by_ctrl_c()
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


def _run_serve(namespace: argparse.Namespace) -> None:
    from rectvlm.serve.options import ServeOptions, read_token, require_server_packages

    options = options_from_namespace(ServeOptions, namespace)
    require_server_packages()
    token = read_token(options.host)
    check_checkpoint(options.checkpoint)
    prepare_device(options.device)
    from rectvlm.serve.run import serve

    serve(options, token)


def _run_challenge(options: argparse.Namespace) -> None:
    check_checkpoint(options.checkpoint)
    prepare_device(options.device)
    end_by_sigterm_as_by_ctrl_c()
    from rectvlm.predict.challenge import write_challenge_results

    write_challenge_results(
        options.source, options.checkpoint, options.out, options.task, options.device
    )
    sys.stdout.write(f"{options.out}\n")
