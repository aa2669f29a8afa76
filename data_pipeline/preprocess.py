"""Command that brings cases to shards.

    python -m data_pipeline.preprocess [--config demo] [--out DIR_OR_URL] [part.field=value …]
    python -m data_pipeline.preprocess --config large --ct-rate /data/CT-RATE --out /data/shards
    python -m data_pipeline.preprocess --table cases.csv --out shards
    python -m data_pipeline.preprocess --rad-chestct /data/Rad-ChestCT --out shards

With no arguments it takes two real chest CTs and seeded phantoms to the grid and the folder of the
`demo` configuration. Shards are made in parallel, each by one process. A finished shard is recorded
in `.parts/`, so a run that was stopped continues where it was, and a run without changes has
nothing to do. A case that cannot be used is listed in `quarantine.jsonl` with its reason, and the
rest goes on.
"""

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from data_pipeline.cases import Case
from data_pipeline.ct_rate.cases import list_ct_rate_cases
from data_pipeline.ct_rate.options import CtRateOptions, add_ct_rate_options
from data_pipeline.demo_cases import list_demo_cases
from data_pipeline.make_shards.progress import print_run_summary
from data_pipeline.make_shards.shard_folder import preprocess
from data_pipeline.make_shards.shard_plan import estimate_samples_per_shard
from data_pipeline.make_shards.workers import TaskRunner
from data_pipeline.masks.mask_folders import MaskFolders
from data_pipeline.own_data.case_function import list_function_cases
from data_pipeline.own_data.options import OwnDataOptions, add_own_data_options
from data_pipeline.own_data.table_cases import list_table_cases
from data_pipeline.rad_chestct import ABNORMALITIES_BY_FINDING, list_rad_chestct_cases
from data_pipeline.sample_cts import SAMPLE_CT_FOLDER
from rectvlm.cli_options import CommandParser, add_options, argument, options_from_namespace
from rectvlm.config import load_config
from rectvlm.data.store import ShardStore
from rectvlm.files import require_writable_folder
from rectvlm.optional_packages import require_extra
from rectvlm.phantom.patient_plan import PHANTOM_STYLES, PLAIN_STYLE, VARIED_STYLE
from rectvlm.phantom.supervision import TrainingSupervision
from rectvlm.types import UserError

log = logging.getLogger(__name__)

_DEMO_TRAIN_PHANTOMS, _DEMO_VALID_PHANTOMS = 320, 48


def _count_usable_cpus() -> int:
    """Number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class PreprocessOptions:
    """Options of the command that do not belong to a data set."""

    config: str = "demo"
    """Configuration whose grid, spacing and folder are used."""
    out: str | None = None
    """Folder or fsspec URL of the shards; by default data.shards of the configuration."""
    phantoms: int | None = field(default=None, metadata=argument(minimum=0))
    """Number of synthetic training cases; by default 320, or none with other cases."""
    valid_phantoms: int | None = field(default=None, metadata=argument(minimum=0))
    """Number of synthetic validation cases; by default 48, or none with other cases."""
    phantom_style: str | None = None
    """Look of the phantoms; by default plain, or varied with other cases."""
    phantom_supervision: TrainingSupervision = "complete"
    """Labels and outlines of the training phantoms."""
    sample_cts: bool = field(
        default=True,
        metadata=argument(
            flag="--no-samples", help="leave the two real CTs out, which needs no network"
        ),
    )
    """Whether the two real CTs are used."""
    workers: int = field(default_factory=_count_usable_cpus, metadata=argument(minimum=0))
    """Number of worker processes; 0 works in this process."""
    ray: str | None = field(default=None, metadata=argument(metavar="ADDRESS"))
    """Ray cluster that works instead: its address, auto, or local."""
    samples_per_shard: int = field(
        default=8, metadata=argument(minimum=1, exclusive_group="shard size")
    )
    """Number of cases of one shard."""
    shard_mb: float | None = field(
        default=None, metadata=argument(minimum=0.1, exclusive_group="shard size")
    )
    """Approximate size of a shard, MiB, in place of the number of its cases."""
    timeout: float = field(default=600.0, metadata=argument(minimum=0))
    """Seconds after which a case is set aside; 0 for never."""
    coarse_regions: bool = False
    """Whether a region map is estimated from the CT where a case has none."""
    retry: bool = False
    """Whether cases that an earlier run set aside are tried again."""
    strict: bool = False
    """Whether to exit with 1 when a case was set aside, after all others are done."""
    overrides: tuple[str, ...] = field(
        default=(), metadata=argument(metavar="part.field=value", is_positional=True)
    )
    """Changes of the configuration."""


@dataclass(frozen=True)
class CaseSelection:
    """The cases of a run, and what its manifest says of their choice."""

    cases: list[Case]
    labels: str
    """Origin of the labels, in words."""
    policy: dict[str, Any] = field(default_factory=dict)
    """Options by which each data set chose its cases, and counts of what it found."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Number of volumes that became no case, by reason."""


def _list_demo_selection(options: PreprocessOptions) -> CaseSelection:
    train_count, valid_count = options.phantoms, options.valid_phantoms
    style = options.phantom_style or PLAIN_STYLE.name
    cases = list_demo_cases(
        _DEMO_TRAIN_PHANTOMS if train_count is None else train_count,
        _DEMO_VALID_PHANTOMS if valid_count is None else valid_count,
        SAMPLE_CT_FOLDER if options.sample_cts else None,
        style,
        options.phantom_supervision,
    )
    return CaseSelection(cases, _describe_phantom_labels(style))


def _list_ct_rate_selection(
    root: Path, ct_rate_options: CtRateOptions, options: PreprocessOptions
) -> CaseSelection:
    """List the cases of a CT-RATE download and the phantoms that are asked for; log the counts."""
    log.info("reading the tables of %s", root)
    ct_rate = list_ct_rate_cases(root, ct_rate_options)
    dropped = {reason: len(names) for reason, names in sorted(ct_rate.dropped.items())}
    for reason, count in dropped.items():
        log.info("left out %d: %s", count, reason)
    for subject, count in ct_rate.counts.items():
        if count:
            log.info("%s: %d", subject, count)
    policy = {"CT-RATE": {**ct_rate.policy, "counts": ct_rate.counts}}
    labels = str(ct_rate.policy["labels"] or "CT-RATE's label tables")
    phantoms = _list_extra_phantoms(options)
    return CaseSelection(
        ct_rate.cases + phantoms, _add_phantom_labels(labels, options), policy, dropped
    )


def _list_rad_chestct_selection(folder: Path, options: PreprocessOptions) -> CaseSelection:
    """List the cases of a Rad-ChestCT download and the phantoms that are asked for."""
    rad_chestct = list_rad_chestct_cases(folder)
    for subject, count in rad_chestct.counts.items():
        log.info("%s: %d", subject, count)
    policy = {"labels": ABNORMALITIES_BY_FINDING, "counts": rad_chestct.counts}
    labels = f"Rad-ChestCT's label tables, {len(ABNORMALITIES_BY_FINDING)} findings mapped"
    phantoms = _list_extra_phantoms(options)
    return CaseSelection(
        rad_chestct.cases + phantoms,
        _add_phantom_labels(labels, options),
        {"Rad-ChestCT": policy},
    )


def _list_own_selection(
    own_data: OwnDataOptions, masks: MaskFolders, options: PreprocessOptions
) -> CaseSelection:
    """List the cases of a table or of a function and the phantoms that are asked for."""
    phantoms = _list_extra_phantoms(options)
    if own_data.table is None:
        assert own_data.cases is not None
        cases = list_function_cases(own_data.cases)
        labels = _add_phantom_labels(f"the function {own_data.cases}", options)
        return CaseSelection(cases + phantoms, labels, {"cases": {"function": own_data.cases}})
    mapping = own_data.mapping and own_data.mapping.expanduser()
    own = list_table_cases(own_data.table.expanduser(), mapping, masks)
    for subject, count in own.counts.items():
        log.info("%s: %d", subject, count)
    policy = {"table": {"name": own_data.table.name, "counts": own.counts}}
    labels = _add_phantom_labels(f"the table {own_data.table.name}", options)
    return CaseSelection(own.cases + phantoms, labels, policy)


def _list_extra_phantoms(options: PreprocessOptions) -> list[Case]:
    """List the phantoms that are asked for beside other cases."""
    return list_demo_cases(
        options.phantoms or 0,
        options.valid_phantoms or 0,
        None,
        options.phantom_style or VARIED_STYLE.name,
        options.phantom_supervision,
    )


def _describe_phantom_labels(style: str) -> str:
    return f"phantoms in the style {style}"


def _add_phantom_labels(labels: str, options: PreprocessOptions) -> str:
    """Origin of the labels of a data set, and of the phantoms beside it."""
    if not options.phantoms and not options.valid_phantoms:
        return labels
    return f"{labels}; {_describe_phantom_labels(options.phantom_style or VARIED_STYLE.name)}"


def _list_selection(
    namespace: argparse.Namespace, options: PreprocessOptions, grid_spacing_mm: float
) -> CaseSelection:
    """List the cases of the data set that the command names.

    Raises:
        UserError: two data sets, options of another one, or cases that cannot be listed.
    """
    own_data = options_from_namespace(OwnDataOptions, namespace)
    ct_rate = options_from_namespace(CtRateOptions, namespace)
    data_sets = {"--ct-rate": namespace.ct_rate, "--table": own_data.table}
    data_sets |= {"--cases": own_data.cases, "--rad-chestct": namespace.rad_chestct}
    named = [flag for flag, value in data_sets.items() if value is not None]
    if len(named) > 1:
        raise UserError(
            f"{' and '.join(named)} name two data sets: expected one; make shards of each."
        )
    if "--ct-rate" not in named:
        _require_defaults(ct_rate, "--ct-rate", [] if "--table" not in named else ["masks"])
    if "--table" not in named:
        _require_defaults(replace(own_data, cases=None), "--table", [])
    if "--ct-rate" in named:
        ct_rate = replace(ct_rate, grid_spacing_mm=grid_spacing_mm)
        return _list_ct_rate_selection(namespace.ct_rate, ct_rate, options)
    if "--rad-chestct" in named:
        return _list_rad_chestct_selection(namespace.rad_chestct, options)
    if named:
        return _list_own_selection(own_data, ct_rate.masks, options)
    return _list_demo_selection(options)


def _require_defaults(data_set_options: Any, flag: str, shared: Sequence[str]) -> None:
    """Refuse options of a data set that is not used: without a word they would do nothing."""
    defaults = type(data_set_options)()
    for option in fields(data_set_options):
        value = getattr(data_set_options, option.name)
        if option.name in shared or value == getattr(defaults, option.name):
            continue
        given = option.name
        if is_dataclass(value):
            given = next(part.name for part in fields(value) if getattr(value, part.name))
        raise UserError(
            f"--{given.replace('_', '-')} belongs to {flag}, which is not given: expected both or "
            f"neither; correct the command."
        )


def _connect_to_ray(address: str | None) -> TaskRunner | None:
    if address is None:
        return None
    from data_pipeline.make_shards.ray_workers import RayRunner

    return RayRunner(address)


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m data_pipeline.preprocess", description="Make shards from cases."
    )
    add_options(parser, PreprocessOptions, exclude=["phantom_style", "coarse_regions"])
    parser.add_argument(
        "--coarse-regions",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="estimate a region map from the CT where a case has none (default: no)",
    )
    parser.add_argument(
        "--phantom-style",
        choices=PHANTOM_STYLES,
        help="look of the phantoms (default: plain, or varied with other cases)",
    )
    parser.add_argument(
        "--rad-chestct",
        type=Path,
        metavar="DIR",
        help="Rad-ChestCT download: volumes and label tables, an external test set",
    )
    add_own_data_options(parser)
    add_ct_rate_options(parser)
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    namespace = _parse_arguments(arguments)
    options = options_from_namespace(PreprocessOptions, namespace)
    start = time.monotonic()
    try:
        require_extra("train")
        data_config = load_config(options.config, options.overrides).data
        folder = options.out or str(data_config.shards)
        local_folder = ShardStore(folder).local_folder
        if local_folder is not None:
            require_writable_folder(local_folder)
        selection = _list_selection(namespace, options, data_config.spacing[0])
        samples_per_shard = options.samples_per_shard
        if options.shard_mb is not None:
            samples_per_shard = estimate_samples_per_shard(options.shard_mb, data_config.grid)
        result = preprocess(
            selection.cases,
            folder,
            data_config.grid,
            data_config.spacing,
            coarse_regions=options.coarse_regions,
            samples_per_shard=samples_per_shard,
            workers=options.workers,
            runner=_connect_to_ray(options.ray),
            timeout_seconds=options.timeout or None,
            retry_rejected=options.retry,
            labels=selection.labels,
            policy=selection.policy,
            dropped=selection.dropped,
        )
    except UserError as error:
        log.error("%s", error)
        return 2
    except KeyboardInterrupt:
        log.error("stopped; finished shards are kept, and the same command goes on with the rest")
        return 130
    seconds = time.monotonic() - start
    print_run_summary(folder, result.manifest, result.rejected, result.shards_made, seconds)
    if options.strict and result.rejected:
        log.error("--strict: exit status 1, since cases were set aside")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
