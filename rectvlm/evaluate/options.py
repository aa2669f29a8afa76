"""Options of an evaluation, which are the arguments of `rectvlm evaluate` as well."""

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rectvlm.cli_options import argument
from rectvlm.labels import DEFAULT_CONVENTION, LESIONS, LabelConvention
from rectvlm.metrics.radeval_scores import RadEvalOptions
from rectvlm.metrics.surface_distances import SURFACE_TOLERANCE_MM
from rectvlm.types import Split, UserError

LESION_THRESHOLD = 0.5
"""Smallest probability of a voxel that belongs to a lesion, as in prediction."""


@dataclass(frozen=True)
class EvaluationOptions:
    """What decides a case's results, besides checkpoint and shards, and what is made of them."""

    split: Split = "valid"
    """Split that is evaluated."""
    reports: bool = field(
        default=True, metadata=argument(help="do not generate reports, which take longest")
    )
    """Whether reports are generated, if the model can."""
    report_limit: int | None = field(default=None, metadata=argument(metavar="N", minimum=1))
    """Number of cases with a report, the first ones; by default all."""
    report_server: str | None = field(default=None, metadata=argument(metavar="URL"))
    """vLLM server that writes the reports, http://HOST:PORT; by default this process does."""
    limit: int | None = field(default=None, metadata=argument(metavar="N", minimum=1))
    """Number of cases that are evaluated, the first ones; by default all."""
    batch_size: int = field(default=1, metadata=argument(metavar="B", minimum=1))
    """Number of cases that are predicted together."""
    truth: Path | None = field(default=None, metadata=argument(metavar="DIR"))
    """Folder of lesion outlines as drawn, KEY/LESION.nii.gz; by default those of the shards."""
    labels: Path | None = field(default=None, metadata=argument(metavar="FILE"))
    """CSV with the 18 findings by case, such as refined labels: figures against them stand beside
    those against the labels of the shards."""
    hide_regions: bool = False
    """Treat every region map as unknown, as prediction does; thresholds are fitted so, too."""
    surface_tolerance: float = field(
        default=SURFACE_TOLERANCE_MM, metadata=argument(metavar="MM", minimum=0)
    )
    """Tolerance of the surface Dice, mm."""
    thresholds: Literal["fit", "model"] = "fit"
    """Thresholds of the findings: fitted on the dev split, or on train where there is no dev; or
    those that the model carries."""
    fit_limit: int = field(default=512, metadata=argument(metavar="N", minimum=1))
    """Largest number of cases that thresholds are fitted on, and of training volumes among which
    the baseline of reports finds the nearest one."""
    labeler: str = field(default="rules", metadata=argument(metavar="DIR_OR_ID"))
    """Labeler of findings in reports: `rules`, or the folder or hub id of a classifier."""
    convention: LabelConvention = DEFAULT_CONVENTION
    """What the rules count as a finding: as in CT-RATE's label table, or as a radiologist would."""
    radeval: RadEvalOptions = field(default_factory=RadEvalOptions)
    """Metrics of RadEval."""
    bootstrap: int = field(default=1000, metadata=argument(metavar="N", minimum=0))
    """Number of bootstrap resamples for the intervals, 0 for none."""
    seed: int = 0
    """Seed of the bootstrap resamples."""
    plots: bool = field(default=True, metadata=argument(help="write tables only"))
    """Whether plots are written."""


def require_truth_folder(folder: Path | None) -> None:
    """Check the folder of outlines.

    Raises:
        UserError: it is given and does not exist, or holds no outline.
    """
    if folder is None:
        return
    expected = "--truth expects KEY/LESION.nii.gz in one, as --lesions of preprocessing"
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: {expected}.")
    keys = [lesion.key for lesion in LESIONS]
    files = itertools.chain(folder.glob("*/*.nii.gz"), folder.glob("*/*.nii"))
    if not any(path.name.partition(".")[0] in keys for path in files):
        raise UserError(f"{folder} holds no outline: {expected}, LESION being {', '.join(keys)}.")
