"""What of a CT-RATE download is used, and how: the options, and their command line."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from data_pipeline.ct_rate.series import KernelClass
from data_pipeline.masks.mask_folders import MaskFolders
from rectvlm.types import Split, UserError

TreeLayout = Literal["auto", "fixed", "v1"]
TableName = Literal["labels", "reports", "metadata", "no-chest"]


@dataclass(frozen=True)
class CtRateOptions:
    """What of a download is used, and how."""

    splits: tuple[Split, ...] = ("train", "valid")
    layout: TreeLayout = "auto"
    """`fixed` or `v1` for one tree only; `auto` takes a volume from the fixed tree where it is in both."""
    reconstructions: Literal["one", "all"] = "one"
    """Of a scan."""
    kernel: KernelClass = "soft"
    """The kernel that is wanted where one reconstruction is chosen."""
    grid_spacing_mm: float = 5.0
    """mm between the slices of the samples' grid, which the choice goes by."""
    exclude: tuple[Path, ...] = ()
    """Lists of volumes or scans that are kept out, one a line."""
    hold_out: tuple[Path, ...] = ()
    """ReXGroundingCT tables; patients of their validation and test parts are kept out of training."""
    masks: MaskFolders = field(default_factory=MaskFolders)
    """`ts_seg` None stands for the download's own, where it has one."""
    without: tuple[TableName, ...] = ()
    """Tables that may be missing; their content is then unknown."""
    require_all: bool = False
    """Whether volumes that the tables name but the disk lacks become cases, which end in the quarantine list."""
    limit: int | None = None
    """At most so many cases a split, the first ones."""


def options_for_manifest(options: CtRateOptions) -> dict[str, str | float | bool | None]:
    """The options as a run's manifest keeps them: names of files, no folders of a machine."""
    return {
        "splits": ", ".join(options.splits),
        "layout": options.layout,
        "reconstructions": options.reconstructions,
        "kernel": options.kernel if options.reconstructions == "one" else None,
        "grid_spacing": options.grid_spacing_mm if options.reconstructions == "one" else None,
        "exclude": ", ".join(path.name for path in options.exclude) or None,
        "hold_out": ", ".join(path.name for path in options.hold_out) or None,
        "rexgrounding_masks": options.masks.rexgrounding is not None,
        "without": ", ".join(options.without) or None,
        "require_all": options.require_all,
        "limit": options.limit,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a CT-RATE download, as a group of a command's own."""
    group = parser.add_argument_group("CT-RATE", "used with --ct-rate")
    group.add_argument(
        "--ct-rate", type=Path, metavar="ROOT", help="download: the folder that holds dataset/"
    )
    group.add_argument(
        "--splits", nargs="+", choices=get_args(Split), default=list(get_args(Split))
    )
    group.add_argument(
        "--layout",
        choices=get_args(TreeLayout),
        default="auto",
        help="tree of volumes (default: both)",
    )
    group.add_argument(
        "--reconstructions",
        choices=("one", "all"),
        default="one",
        help="of each scan (default one, by kernel and slices)",
    )
    group.add_argument(
        "--kernel",
        choices=get_args(KernelClass),
        default="soft",
        help="kernel to prefer (default soft)",
    )
    group.add_argument(
        "--exclude",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="volumes to keep out, one name a line",
    )
    group.add_argument(
        "--hold-out",
        type=Path,
        action="append",
        default=[],
        metavar="JSON",
        help="a ReXGroundingCT dataset.json: patients of its val and test parts stay out of training",
    )
    group.add_argument(
        "--rexgrounding",
        type=Path,
        metavar="DIR",
        help="ReXGroundingCT masks; its dataset.json is held out as well",
    )
    group.add_argument(
        "--ts-seg",
        type=Path,
        metavar="DIR",
        help="TotalSegmentator masks (default: dataset/ts_seg)",
    )
    group.add_argument(
        "--lesions", type=Path, metavar="DIR", help="lesion masks, one NIfTI a lesion"
    )
    group.add_argument(
        "--regions", type=Path, metavar="DIR", help="region maps of TotalSegmentator's classes"
    )
    group.add_argument(
        "--without",
        nargs="+",
        choices=get_args(TableName),
        default=[],
        help="tables that may be missing (then unknown)",
    )
    group.add_argument(
        "--require-all",
        action="store_true",
        help="volumes that the tables name and the disk lacks go to the quarantine",
    )
    group.add_argument(
        "--limit", type=int, metavar="N", help="only the first N cases of each split"
    )


def options_from_arguments(
    namespace: argparse.Namespace, grid_spacing_mm: float = 5.0
) -> CtRateOptions:
    """The options that were given.

    Args:
        grid_spacing: mm between the slices of the samples' grid.

    Raises:
        UserError: a limit below 1, or a folder of masks that does not exist.
    """
    if namespace.limit is not None and namespace.limit < 1:
        raise UserError(f"--limit must be at least 1, not {namespace.limit}.")
    folders = {
        name: getattr(namespace, name) for name in ("ts_seg", "rexgrounding", "lesions", "regions")
    }
    return CtRateOptions(
        splits=tuple(namespace.splits),
        layout=namespace.layout,
        reconstructions=namespace.reconstructions,
        kernel=namespace.kernel,
        grid_spacing_mm=grid_spacing_mm,
        exclude=tuple(namespace.exclude),
        hold_out=tuple(namespace.hold_out),
        masks=MaskFolders(**folders),
        without=tuple(namespace.without),
        require_all=namespace.require_all,
        limit=namespace.limit,
    )
