"""Findings beyond the 18: which sentences name them, and which deny them."""

import pytest

from rectvlm.metrics.report_labeler.entity_terms import ENTITIES
from rectvlm.metrics.report_labeler.finding_states import FindingState
from rectvlm.metrics.report_labeler.rule_labeler import label_entities
from rectvlm.metrics.reports import compute_report_statistics, headline_scores, summarize_reports

PRESENT, ABSENT, UNCERTAIN = FindingState.PRESENT, FindingState.ABSENT, FindingState.UNCERTAIN
SENTENCES: list[tuple[str, dict[str, FindingState]]] = [
    ("Degenerative changes are observed in the bone structures.", {"Degenerative spine": PRESENT}),
    ("Osteophytes bridging with each other.", {"Degenerative spine": PRESENT}),
    ("No lytic-destructive lesion was detected in the bones.", {"Bone lesion": ABSENT}),
    ("Sclerotic lesion in the T8 vertebra, metastasis?", {"Bone lesion": PRESENT}),
    ("No fracture line is seen.", {"Fracture": ABSENT}),
    ("Old fracture lines in the left 5th and 6th ribs.", {"Fracture": PRESENT}),
    ("Height losses are observed in the T8 vertebra.", {"Vertebral height loss": PRESENT}),
    ("Scoliosis with left-facing opening.", {"Spinal curvature": PRESENT}),
    ("Sternotomy sutures are seen.", {"Sternotomy": PRESENT}),
    ("A port catheter is seen on the right.", {"Catheter or port": PRESENT}),
    ("The nasogastric tube has been removed.", {"Tube or drain": ABSENT}),
    ("Thyroid gland has a hypodense nodule in the right lobe.", {"Thyroid nodule": PRESENT}),
    ("The thyroid gland is normal and a nodule is seen in the lung.", {}),
    ("Thyroid gland is enlarged.", {"Goitre": PRESENT}),
    ("Bilateral gynecomastia.", {"Gynecomastia": PRESENT}),
    ("Ascending aorta is 45 mm and is aneurysmatic.", {"Aortic dilatation": PRESENT}),
    ("Ascending aortic diameter is 42 mm, wider than normal.", {"Aortic dilatation": PRESENT}),
    ("Aorta and pulmonary artery calibres are normal. Dilated bronchi.", {}),
    ("The pulmonary trunk is dilated with 34 mm.", {"Pulmonary artery dilatation": PRESENT}),
    ("No pneumothorax.", {"Pneumothorax": ABSENT}),
    ("Minimal pleural thickening in both apices.", {"Pleural thickening": PRESENT}),
    ("Hepatosteatosis.", {"Fatty liver": PRESENT}),
    ("Liver density has decreased in line with adiposity.", {"Fatty liver": PRESENT}),
    ("There is a cyst of 2 cm in segment 6 of the liver.", {"Liver cyst": PRESENT}),
    ("A 1.5 cm cyst in the liver and a nodule in the left lung.", {"Liver cyst": PRESENT}),
    ("No space-occupying lesion was detected in the liver.", {"Liver lesion": ABSENT}),
    ("Possible hypodense lesion in the liver.", {"Liver lesion": UNCERTAIN}),
    ("Liver, gallbladder and spleen are normal.", {}),
    ("Gallbladder contains calculi.", {"Gallstones": PRESENT}),
    ("A cortical cyst of 3 cm in the upper pole of the left kidney.", {"Renal cyst": PRESENT}),
    ("A stone in the right kidney, no hydronephrosis.", {"Renal stone": PRESENT}),
    ("Adenoma in the left adrenal gland.", {"Adrenal lesion": PRESENT}),
    ("Both adrenal glands are normal and no lesion was detected.", {}),
    ("Free fluid in the abdomen.", {"Ascites": PRESENT}),
    ("History: fracture of the hip. Findings: No nodule.", {}),
]


@pytest.mark.parametrize(("sentence", "states"), SENTENCES)
def test_entities_are_read_with_the_labelers_modifiers(
    sentence: str, states: dict[str, FindingState]
) -> None:
    row = label_entities([sentence])[0]
    assert {name: state for name, state in zip(ENTITIES, row, strict=True) if state} == states


def test_entities_are_scored_against_the_reference_report() -> None:
    statistics = compute_report_statistics(
        ["Gallstones. Fracture of a rib.", "No fracture.", "Gallstones."],
        ["Gallstones.", "Fracture of a rib. Gallstones.", None],
    )
    figures = summarize_reports(statistics)["other_findings"]
    rows = figures["per_finding"]
    assert set(rows) == {"Gallstones", "Fracture"}
    assert rows["Gallstones"]["precision"] == 1 and rows["Gallstones"]["recall"] == 0.5
    assert rows["Fracture"]["f1"] == 0 and rows["Fracture"]["n_called"] == 1
    # One hit, one false alarm, two misses.
    assert figures["micro"]["f1"] == pytest.approx(2 / (2 + 1 + 2))
    assert headline_scores(statistics)["other_findings_f1"] == figures["micro"]["f1"]
