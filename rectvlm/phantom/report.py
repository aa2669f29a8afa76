"""Radiology report of a phantom: side and lobe of each finding, in one of several phrasings.

Every sentence comes from the plan that is painted, so that text and image cannot disagree. Only
incidental findings, none of the 18, are not painted.
"""

from collections.abc import Callable

from rectvlm.lesion_places import describe_lobes_with_article, join_words
from rectvlm.phantom.patient_plan import PatientPlan

PhraseVariants = tuple[str, ...]

_DEVICE_SENTENCES = {
    "pacemaker": "Left chest wall pacemaker with a lead in the right ventricle.",
    "port": "Right chest port with its catheter tip in the superior vena cava.",
    "sternal wires": "Median sternotomy wires.",
}
_PRESENT_PHRASES: dict[str, PhraseVariants] = {
    "Arterial wall calcification": (
        "Calcified plaques in the aortic wall.",
        "Aortic wall calcification is seen.",
        "There are atheromatous calcifications of the aorta.",
    ),
    "Cardiomegaly": ("The heart is enlarged.", "Cardiomegaly.", "Heart size is increased."),
    "Coronary artery wall calcification": (
        "Coronary artery calcification.",
        "Calcified plaques in the left anterior descending artery.",
    ),
    "Hiatal hernia": (
        "Hiatal hernia behind the heart.",
        "A hiatal hernia with an air-fluid level is present.",
    ),
    "Emphysema": ("Emphysema in both upper lobes.", "Emphysematous changes in the upper lobes."),
    "Mosaic attenuation pattern": (
        "Mosaic attenuation of both lungs.",
        "Mosaic attenuation pattern in the lungs.",
    ),
    "Interlobular septal thickening": (
        "Interlobular septal thickening at both bases.",
        "Thickened interlobular septa in the lower zones.",
    ),
}
_LOBAR_PHRASES: dict[str, PhraseVariants] = {
    "Atelectasis": ("Linear atelectasis in the {}.", "Band atelectasis is seen in the {}."),
    "Bronchiectasis": (
        "Bronchiectasis in the {}.",
        "Dilated bronchi in the {}, in keeping with bronchiectasis.",
    ),
    "Peribronchial thickening": (
        "Peribronchial thickening in the {}.",
        "Bronchial walls are thickened in the {}.",
    ),
    "Pulmonary fibrotic sequela": (
        "Fibrotic sequela at the apex of the {}.",
        "Apical fibrotic bands in the {}.",
    ),
}
_CONSOLIDATION_PHRASES: PhraseVariants = (
    "Consolidation in {}.",
    "Patchy consolidation is seen in {}.",
    "There is airspace consolidation in {}.",
)
_GROUND_GLASS_PHRASES: PhraseVariants = (
    "Ground-glass opacity in {}.",
    "There is ground-glass opacity in {}.",
    "Hazy ground-glass opacity is seen in {}.",
)
_NODULE_PHRASES: PhraseVariants = (
    "{size} mm nodule in {place}.",
    "A {size} mm solid nodule in {place}.",
)
_EFFUSION_PHRASES: PhraseVariants = ("{} pleural effusion.", "{} pleural effusion is present.")
_PERICARDIAL_PHRASES: PhraseVariants = (
    "Pericardial effusion measuring {} mm.",
    "Pericardial effusion up to {} mm thick.",
)
_LYMPH_NODE_PHRASES: PhraseVariants = (
    "Enlarged {} lymph nodes.",
    "Lymphadenopathy in the {} region.",
)
_ABSENT_PHRASES: dict[str, PhraseVariants] = {
    "Pleural effusion": ("No pleural effusion.", "The pleural spaces are clear."),
    "Pericardial effusion": ("No pericardial effusion.",),
    "Consolidation": ("No consolidation.",),
    "Lung nodule": ("No lung nodule.", "No nodule in either lung."),
    "Lymphadenopathy": ("No enlarged lymph nodes.", "No mediastinal lymphadenopathy."),
    "Cardiomegaly": ("Heart size is normal.", "The heart is not enlarged."),
}
_MAX_ABSENT_MENTIONED = 3
"""Largest number of absent findings that a report mentions."""
_MANY_FINDINGS = 9
"""Number of present findings from which on a report has the shortest phrasings and no absent
findings: a small language model has room for about 140 tokens."""


class _PhraseChooser:
    """Choice of a phrasing by the plan's random numbers, or of the shortest one."""

    def __init__(self, numbers: list[int], is_terse: bool) -> None:
        self.numbers, self.is_terse = iter(numbers), is_terse

    def __call__(self, phrases: PhraseVariants) -> str:
        number = next(self.numbers)
        return min(phrases, key=len) if self.is_terse else phrases[number % len(phrases)]


def write_report(plan: PatientPlan) -> tuple[str, str]:
    """Write the findings and the impression of a plan."""
    is_terse = plan.style.is_terse or sum(plan.present.values()) >= _MANY_FINDINGS
    choose = _PhraseChooser(plan.phrase_numbers, is_terse)
    lungs, chest = _write_lung_sentences(plan, choose), _write_chest_sentences(plan, choose)
    is_chest_first = next(choose.numbers) % 2 and not plan.style.is_terse
    sentences = chest + lungs if is_chest_first else lungs + chest
    if not is_terse:
        candidates = [finding for finding in _ABSENT_PHRASES if not plan.present[finding]]
        start = next(choose.numbers) % max(1, len(candidates))
        candidates = candidates[start:] + candidates[:start]
        for finding in candidates[:_MAX_ABSENT_MENTIONED]:
            sentences.append(choose(_ABSENT_PHRASES[finding]))
        sentences += plan.incidental_sentences
    impression = _write_impression(plan, choose, max_statements=2 if is_terse else 3)
    return " ".join(sentences), impression


def _write_lung_sentences(plan: PatientPlan, choose: Callable[[PhraseVariants], str]) -> list[str]:
    sentences = []
    if plan.consolidations:
        lobes = describe_lobes_with_article(plan.consolidations)
        sentences.append(choose(_CONSOLIDATION_PHRASES).format(lobes))
    if plan.ground_glass:
        lobes = describe_lobes_with_article(plan.ground_glass)
        sentences.append(choose(_GROUND_GLASS_PHRASES).format(lobes))
    for nodule in plan.nodules:
        size, place = round(nodule.diameter_mm), f"the {nodule.lobe}"
        sentences.append(choose(_NODULE_PHRASES).format(size=size, place=place))
    for finding, phrases in _LOBAR_PHRASES.items():
        if plan.present[finding]:
            sentences.append(choose(phrases).format(plan.lobe_by_finding[finding]))
    for finding in ("Emphysema", "Mosaic attenuation pattern", "Interlobular septal thickening"):
        if plan.present[finding]:
            sentences.append(choose(_PRESENT_PHRASES[finding]))
    return sentences


def _write_chest_sentences(plan: PatientPlan, choose: Callable[[PhraseVariants], str]) -> list[str]:
    sentences = []
    if plan.pleural_effusions_mm:
        side = _describe_effusion_side(plan).capitalize()
        sentences.append(choose(_EFFUSION_PHRASES).format(side))
    if plan.present["Pericardial effusion"]:
        thickness_mm = round(plan.build.pericardial_effusion_mm)
        sentences.append(choose(_PERICARDIAL_PHRASES).format(thickness_mm))
    for finding in (
        "Cardiomegaly",
        "Arterial wall calcification",
        "Coronary artery wall calcification",
        "Hiatal hernia",
    ):
        if plan.present[finding]:
            sentences.append(choose(_PRESENT_PHRASES[finding]))
    if plan.present["Lymphadenopathy"]:
        sentences.append(choose(_LYMPH_NODE_PHRASES).format(join_words(plan.enlarged_stations)))
    if plan.present["Medical material"]:
        sentences.append(_DEVICE_SENTENCES[plan.device])
    return sentences


def _describe_effusion_side(plan: PatientPlan) -> str:
    sides = list(plan.pleural_effusions_mm)
    return "bilateral" if len(sides) == 2 else sides[0]


def _write_impression(
    plan: PatientPlan, choose: Callable[[PhraseVariants], str], max_statements: int
) -> str:
    """Write the most important findings."""
    points = []
    if plan.consolidations:
        words = choose(("consolidation in {}, suggesting pneumonia", "consolidation in {}"))
        points.append(words.format(describe_lobes_with_article(plan.consolidations)))
    if plan.pleural_effusions_mm:
        points.append(f"{_describe_effusion_side(plan)} pleural effusion")
    if plan.present["Pericardial effusion"]:
        points.append("pericardial effusion")
    if plan.nodules:
        lobes = describe_lobes_with_article([nodule.lobe for nodule in plan.nodules])
        noun = "nodules" if len(plan.nodules) > 1 else "nodule"
        points.append(choose(("{} in {}, follow-up advised", "{} in {}")).format(noun, lobes))
    if plan.ground_glass:
        points.append(f"ground-glass opacity in {describe_lobes_with_article(plan.ground_glass)}")
    for finding in ("Lymphadenopathy", "Cardiomegaly", "Emphysema", "Hiatal hernia"):
        if plan.present[finding]:
            points.append(finding.lower())
    if not points:
        return choose(("No acute finding in the chest.", "No acute cardiopulmonary abnormality."))
    return " ".join(f"{point[0].upper()}{point[1:]}." for point in points[:max_statements])
