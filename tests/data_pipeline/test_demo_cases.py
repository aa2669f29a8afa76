"""The demo's cases: their supervision, and that a change of it makes them again."""

from data_pipeline.cases import case_to_sample
from data_pipeline.demo_cases import list_demo_cases
from rectvlm.phantom.supervision import PARTIAL_LESIONS, SEGMENTED_LESIONS
from tests.small_cases import GRID, SPACING


def test_style_and_supervision_are_part_of_a_case_identity() -> None:
    identities = set()
    for style in ("plain", "ct-rate"):
        for supervision in ("complete", "ct-rate"):
            cases = list_demo_cases(1, 1, None, style, supervision)  # type: ignore[arg-type]
            identities |= {case.identity for case in cases}
    assert len(identities) == 8


def test_training_cases_have_the_supervision_of_ct_rate_and_held_out_ones_the_truth() -> None:
    train, valid = list_demo_cases(1, 1, None, "ct-rate", "ct-rate")
    learned_from = case_to_sample(train, GRID, SPACING).meta
    annotated = {key for key, flag in learned_from.lesions_annotated.items() if flag}
    assert annotated == set(SEGMENTED_LESIONS)
    assert not any(learned_from.lesions_partial[key] for key in SEGMENTED_LESIONS)
    sources = {learned_from.lesions_source[key] for key in SEGMENTED_LESIONS}
    assert sources == {"simulated TotalSegmentator"}
    assert learned_from.regions_source == "phantom"
    held_out = case_to_sample(valid, GRID, SPACING).meta
    assert all(held_out.lesions_annotated[key] for key in (*SEGMENTED_LESIONS, *PARTIAL_LESIONS))
    assert set(held_out.lesions_source.values()) == {"phantom"}
    assert "supervision ct-rate" in learned_from.source and "exhaustive" in held_out.source
