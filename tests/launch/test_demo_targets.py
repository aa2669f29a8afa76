"""Targets of each size and supervision: what they ask for, and that a figure can miss them."""

from dataclasses import replace

import pytest

from launch.demo_targets import (
    DemoFigures,
    DemoTarget,
    LesionScores,
    list_targets,
)
from rectvlm.labels import LESION_BY_KEY
from rectvlm.phantom.supervision import TrainingSupervision

GOOD_LESION = LesionScores(
    dice_where_present=0.75, dice=0.72, sensitivity=0.8, instance_f1=0.85, false_positive_ml=5.0
)
GOOD = DemoFigures(
    auroc_by_finding={"Lung nodule": 0.96, "Hiatal hernia": 0.95},
    lesions=dict.fromkeys(LESION_BY_KEY, GOOD_LESION),
    report_f1=0.92,
    report_f1_without_image=0.4,
    laterality=0.95,
    minutes=19.0,
)
SUPERVISIONS: tuple[TrainingSupervision, ...] = ("complete", "ct-rate")


def missed(figures: DemoFigures, supervision: TrainingSupervision) -> set[str]:
    return {
        target.name for target in list_targets(figures, supervision, "learn") if not target.is_met
    }


def with_lesion(key: str, **scores: float | None) -> DemoFigures:
    """Good figures, save for some scores of one lesion."""
    return replace(GOOD, lesions={**GOOD.lesions, key: replace(GOOD_LESION, **scores)})


def test_a_target_that_was_not_measured_is_not_met() -> None:
    assert DemoTarget("a", 0.9, 0.9).is_met and not DemoTarget("a", 0.9, 0.89).is_met
    assert not DemoTarget("a", 0.9, None).is_met
    assert not DemoTarget("minutes", 20, None, at_most=True).is_met
    assert DemoTarget("minutes", 20, 19.0, at_most=True).is_met
    assert not DemoTarget("minutes", 20, 21.0, at_most=True).is_met


@pytest.mark.parametrize("supervision", SUPERVISIONS)
def test_good_figures_meet_all_targets_and_each_bad_one_misses_its_own(
    supervision: TrainingSupervision,
) -> None:
    assert not missed(GOOD, supervision)
    for bad, name in (
        (replace(GOOD, auroc_by_finding={"Lung nodule": 0.9}), "macro AUROC of the findings"),
        (replace(GOOD, laterality=0.8), "laterality of the lesions in the reports"),
        (replace(GOOD, laterality=None), "laterality of the lesions in the reports"),
        (replace(GOOD, report_f1_without_image=0.6), "F1 lost without the image"),
        (replace(GOOD, report_f1_without_image=None), "F1 lost without the image"),
        (replace(GOOD, minutes=21.0), "minutes"),
    ):
        assert missed(bad, supervision) == {name}


def test_complete_outlines_must_be_learned_without_drawing_what_is_not_there() -> None:
    empty_drawn = with_lesion("consolidation", dice=0.1)
    drawn = "mean Dice, 0 where a lesion is drawn that is not there"
    assert missed(empty_drawn, "complete") == {drawn}
    assert not missed(empty_drawn, "ct-rate")
    specks = with_lesion("lung_nodule", instance_f1=0.3)
    assert missed(specks, "complete") == {"instance F1 of the lesions"}
    assert missed(replace(GOOD, report_f1=0.87), "complete") == {
        "F1 of the findings in the reports"
    }


def test_outlines_like_those_of_ct_rate_must_not_flood_healthy_cases() -> None:
    assert not missed(replace(GOOD, report_f1=0.87), "ct-rate")
    for key in LESION_BY_KEY:
        name = f"ml of {key.replace('_', ' ')} where there is none"
        assert missed(with_lesion(key, false_positive_ml=16_000.0), "ct-rate") == {name}
        assert missed(with_lesion(key, false_positive_ml=None), "ct-rate") == {name}
    for key in ("consolidation", "ground_glass_opacity"):
        name = f"Dice of {key.replace('_', ' ')}"
        assert missed(with_lesion(key, dice_where_present=0.49), "ct-rate") == {name}
        assert not missed(with_lesion(key, dice_where_present=0.51), "ct-rate")
    poor_nodules = with_lesion("lung_nodule", dice_where_present=0.5)
    assert missed(poor_nodules, "ct-rate") == {"mean Dice of the other lesions"}


def test_minutes_of_training_have_targets_of_their_own() -> None:
    short = replace(GOOD, minutes=9.5, outside_chest_ml=0.0)

    def missed_names(**figures: object) -> set[str]:
        targets = list_targets(replace(short, **figures), "complete", "demo")  # type: ignore[arg-type]
        return {target.name for target in targets if not target.is_met}

    assert not missed_names() and not missed_names(report_f1=0.81, laterality=0.5)
    outside = "ml outlined outside the chest in the real CTs"
    assert missed_names(outside_chest_ml=1.1) == {outside}
    assert missed_names(outside_chest_ml=None) == {outside}
    assert missed_names(minutes=11.0) == {"minutes"}
    assert missed_names(report_f1_without_image=0.7) == {"F1 lost without the image"}
    assert missed_names(report_f1=None) == {
        "F1 of the findings in the reports",
        "F1 lost without the image",
    }
    poor = {key: replace(GOOD_LESION, dice_where_present=0.5) for key in LESION_BY_KEY}
    assert missed_names(lesions=poor) == {"mean Dice of the lesions"}
