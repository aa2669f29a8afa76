"""Options of a CT-RATE download: what of it is used, and how."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data_pipeline.masks.mask_folders import MaskFolders
from rectvlm.cli_options import add_options, argument
from rectvlm.data.kernels import KernelClass
from rectvlm.files import file_sha256
from rectvlm.types import UserError
from rectvlm.volume_names import ReleasedSplit

TreeLayout = Literal["auto", "fixed", "v1"]
TableName = Literal["labels", "reports", "metadata", "no-chest"]


@dataclass(frozen=True)
class CtRateOptions:
    """Options that decide which cases a download gives."""

    splits: tuple[ReleasedSplit, ...] = ("train", "valid")
    """Splits of the data set that are used."""
    dev_share: float = field(default=0.02, metadata=argument(minimum=0))
    """Share of the training patients that choose checkpoints and thresholds instead, by a hash of
    the patient; 0 for none."""
    layout: TreeLayout = "auto"
    """Tree of volumes that is used; auto takes a volume from the fixed tree where it is in both."""
    reconstructions: Literal["one", "all"] = "one"
    """Reconstructions of each scan that are used; one is chosen by kernel and slices."""
    kernel: KernelClass = "soft"
    """Class of the kernel that is preferred where one reconstruction is chosen."""
    grid_spacing_mm: float = 5.0
    """Distance between the slices of the samples' grid, mm, by which a reconstruction is chosen."""
    exclude: tuple[Path, ...] = field(
        default=(), metadata=argument(metavar="FILE", is_repeated=True)
    )
    """List of volumes or scans that are not used, one name a line."""
    hold_out: tuple[Path, ...] = field(
        default=(), metadata=argument(metavar="JSON", is_repeated=True)
    )
    """ReXGroundingCT dataset.json whose validation and test patients stay out of training; with
    `masks.rexgrounding` that folder's tables count as well."""
    labels: tuple[Path, ...] = field(
        default=(), metadata=argument(metavar="FILE", is_repeated=True)
    )
    """CSV with the 18 findings by case, such as refined labels, in place of the download's; may be
    given several times."""
    masks: MaskFolders = field(default_factory=MaskFolders)
    """Folders of masks; where `ts_seg` is None, the download's own is used if there is one."""
    without: tuple[TableName, ...] = ()
    """Tables that may be missing; their content is then unknown."""
    require_all: bool = False
    """Whether volumes that the tables name and the disk lacks become cases, which end in the
    quarantine list."""
    limit: int | None = field(default=None, metadata=argument(metavar="N", minimum=1))
    """Number of cases of each split, the first ones; by default all."""

    def __post_init__(self) -> None:
        """Refuse a share that leaves nothing to learn from."""
        if not self.dev_share < 1:
            raise UserError(
                f"--dev-share {self.dev_share:g} leaves no patient to train on: expected a share "
                "below 1, such as 0.02 for 2%."
            )


def add_ct_rate_options(parser: argparse.ArgumentParser) -> None:
    """Add `--ct-rate` and the fields of `CtRateOptions` to a parser, as a group."""
    group = parser.add_argument_group("CT-RATE", "used with --ct-rate")
    group.add_argument(
        "--ct-rate", type=Path, metavar="ROOT", help="download: the folder that holds dataset/"
    )
    add_options(group, CtRateOptions, exclude=["grid_spacing_mm"])


def options_for_manifest(options: CtRateOptions) -> dict[str, str | float | bool | None]:
    """The options as the manifest of a run keeps them, with names of files but no folders."""
    is_one_chosen = options.reconstructions == "one"
    return {
        "splits": ", ".join(options.splits),
        "dev_share": options.dev_share,
        "layout": options.layout,
        "reconstructions": options.reconstructions,
        "kernel": options.kernel if is_one_chosen else None,
        "grid_spacing": options.grid_spacing_mm if is_one_chosen else None,
        "exclude": ", ".join(path.name for path in options.exclude) or None,
        "hold_out": ", ".join(path.name for path in options.hold_out) or None,
        "labels": ", ".join(_describe_file(path) for path in options.labels) or None,
        "rexgrounding_masks": options.masks.rexgrounding is not None,
        "without": ", ".join(options.without) or None,
        "require_all": options.require_all,
        "limit": options.limit,
    }


def _describe_file(path: Path) -> str:
    return f"{path.name} (SHA-256 {file_sha256(path)})"
