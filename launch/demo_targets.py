"""Targets of `launch.demo`: figures on held-out cases, and the values that they have to reach.

The size `demo` has one list. In the size `learn` each supervision of the training cases has its
own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rectvlm.finite import mean_of_finite
from rectvlm.phantom.supervision import PARTIAL_LESIONS, SEGMENTED_LESIONS, TrainingSupervision

DemoSize = Literal["demo", "learn"]
"""Minutes of training, or a proof of learning."""
MAX_MINUTES = {"demo": 10, "learn": 20}
"""Time that all commands together may take on two CPU cores by size, minutes."""
MAX_OUTSIDE_CHEST_ML = 1
"""Volume of outlines that may lie outside the chest, ml. On the model's grid it is 0; brought to
the finer voxels of the CT, an outline at the border crosses it by parts of a voxel."""
MAX_FALSE_POSITIVE_ML = 20
"""Mean volume of a lesion that may be drawn in cases without it, ml."""


@dataclass(frozen=True)
class DemoTarget:
    """A figure, and the value that it has to reach."""

    name: str
    wanted: float
    found: float | None
    """Measured value; None where there was nothing to measure."""
    at_most: bool = False
    """Whether the value must not exceed `wanted`, instead of reaching it."""

    @property
    def is_met(self) -> bool:
        """Whether the figure was measured and is good enough."""
        if self.found is None:
            return False
        return self.found <= self.wanted if self.at_most else self.found >= self.wanted


@dataclass(frozen=True)
class LesionScores:
    """How well a lesion was outlined on the held-out cases."""

    dice_where_present: float | None
    """Mean Dice of the cases that have the lesion."""
    dice: float | None
    """Mean Dice, 0 for a case where the lesion was drawn and is not there."""
    sensitivity: float | None
    """Share of the lesion's outlines that were detected."""
    instance_f1: float | None
    """F1 of the lesion's components."""
    false_positive_ml: float | None
    """Mean volume that was drawn in the cases without the lesion, ml."""


@dataclass(frozen=True)
class DemoFigures:
    """Figures of an evaluation that targets are made of; None where there was nothing to measure.

    Reports are compared by the findings that the labeler reads in them.
    """

    auroc_by_finding: Mapping[str, float | None]
    lesions: Mapping[str, LesionScores]
    """Scores by lesion key."""
    report_f1: float | None
    """Micro F1 of the findings in the reports."""
    report_f1_without_image: float | None
    """Micro F1 of the findings in reports on a volume of air."""
    laterality: float | None
    """Share of the lesions in the reports whose side is right."""
    minutes: float
    """Duration of all commands, minutes."""
    outside_chest_ml: float | None = None
    """Volume of outlines outside the chest in the real CTs, ml; None without real CTs."""

    @property
    def f1_lost_without_image(self) -> float | None:
        """How much lower the F1 of the reports is on a volume of air."""
        if self.report_f1 is None or self.report_f1_without_image is None:
            return None
        return self.report_f1 - self.report_f1_without_image


def list_targets(
    figures: DemoFigures, supervision: TrainingSupervision, size: DemoSize
) -> list[DemoTarget]:
    """List the targets of a size and a supervision."""
    if size == "demo":
        return _list_short_targets(figures)
    if supervision == "ct-rate":
        lesions, report_f1 = _list_ct_rate_lesion_targets(figures.lesions), 0.85
    else:
        lesions, report_f1 = _list_complete_lesion_targets(figures.lesions), 0.90
    mean_auroc = mean_of_finite(figures.auroc_by_finding.values())
    return [
        DemoTarget("macro AUROC of the findings", 0.95, mean_auroc),
        *lesions,
        DemoTarget("F1 of the findings in the reports", report_f1, figures.report_f1),
        DemoTarget("laterality of the lesions in the reports", 0.90, figures.laterality),
        DemoTarget("F1 lost without the image", 0.40, figures.f1_lost_without_image),
        DemoTarget("minutes", MAX_MINUTES["learn"], figures.minutes, at_most=True),
    ]


def _list_short_targets(figures: DemoFigures) -> list[DemoTarget]:
    """List the targets of minutes of training."""
    mean_auroc = mean_of_finite(figures.auroc_by_finding.values())
    dice = mean_of_finite(lesion.dice_where_present for lesion in figures.lesions.values())
    targets = [
        DemoTarget("macro AUROC of the findings", 0.90, mean_auroc),
        DemoTarget("mean Dice of the lesions", 0.60, dice),
        DemoTarget("F1 of the findings in the reports", 0.80, figures.report_f1),
        DemoTarget("F1 lost without the image", 0.30, figures.f1_lost_without_image),
    ]
    outside = DemoTarget(
        "ml outlined outside the chest in the real CTs",
        MAX_OUTSIDE_CHEST_ML,
        figures.outside_chest_ml,
        at_most=True,
    )
    minutes = DemoTarget("minutes", MAX_MINUTES["demo"], figures.minutes, at_most=True)
    return [*targets, outside, minutes]


def _list_complete_lesion_targets(lesions: Mapping[str, LesionScores]) -> list[DemoTarget]:
    """List the targets of outlines that were learned from complete ones."""
    scores = lesions.values()
    where_present = mean_of_finite(lesion.dice_where_present for lesion in scores)
    over_all = mean_of_finite(lesion.dice for lesion in scores)
    instance_f1 = mean_of_finite(lesion.instance_f1 for lesion in scores)
    return [
        DemoTarget("mean Dice of the lesions", 0.70, where_present),
        DemoTarget("mean Dice, 0 where a lesion is drawn that is not there", 0.70, over_all),
        DemoTarget("instance F1 of the lesions", 0.80, instance_f1),
    ]


def _list_ct_rate_lesion_targets(lesions: Mapping[str, LesionScores]) -> list[DemoTarget]:
    """List the targets of outlines that were learned from few, partial and imprecise ones."""
    targets = []
    for key, scores in lesions.items():
        name = f"ml of {key.replace('_', ' ')} where there is none"
        volume_ml = scores.false_positive_ml
        targets.append(DemoTarget(name, MAX_FALSE_POSITIVE_ML, volume_ml, at_most=True))
    for key in PARTIAL_LESIONS:
        dice = lesions[key].dice_where_present
        targets.append(DemoTarget(f"Dice of {key.replace('_', ' ')}", 0.50, dice))
    segmented = mean_of_finite(lesions[key].dice_where_present for key in SEGMENTED_LESIONS)
    targets.append(DemoTarget("mean Dice of the other lesions", 0.70, segmented))
    return targets
