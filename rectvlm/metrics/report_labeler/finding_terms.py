"""Terms of chest-CT reports: the words that name each finding.

The table is meant to be read and amended by someone who reads reports. Every pattern is matched in
lower-case text, inside one clause. The modifiers are in `modifiers`; `rule_labeler` puts all
together.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from rectvlm.labels import LabelConvention

_JOINED = (
    r"(?:\W+(?:and|or|nor|bilateral|left|right|both|sided|minimal|small|mild|moderate|large|"
    r"massive|free|loculated|"
    r"significant|physiologic\w*|pleural|pericardial|peritoneal|spaces?|cavit\w+|leaves|a|"
    r"the))*\W+"
)
"""Words between an adjective and its noun: "pleural or pericardial effusion"."""


def _compile_alternatives(*alternatives: str) -> re.Pattern[str]:
    return re.compile("|".join(f"(?:{text})" for text in alternatives))


@dataclass(frozen=True)
class FindingTerm:
    """One way of naming a finding."""

    finding: str
    name_pattern: re.Pattern[str]
    """Words that name the finding."""
    required_vessel: re.Pattern[str] | None = None
    """Vessel that must be named with it.

    It must be on the same side of a "without", or anywhere in the clause where no vessel is named
    on that side."""
    excluded_in_phrase: re.Pattern[str] | None = None
    """Words that must not be in the same phrase (see `clauses`)."""
    excluded_organs: re.Pattern[str] | None = None
    """Organs that must not be named in its phrase, or else in its clause, unless the lung is."""
    is_device: bool = False
    """Whether it is absent after its removal."""
    is_weak: bool = False
    """Whether other terms win where their words cover it."""
    convention: LabelConvention | None = None
    """Convention in which the words name the finding; None for both."""
    min_short_axis_mm: float | None = None
    """Smallest short axis of a present finding, mm; words without a measurement state nothing."""


_AORTA = _compile_alternatives(
    r"(?<!para)(?<!para-)aort(?!o-?pulm|ico-?pulm)\w*(?!\w*(?:\s+and\s+mitral)?\s+valv)",
    r"\barch\b(?!\s+of)",
    r"supra-?aortic",
    r"brachiocephalic|subclavian|carotid|innominate|iliac|splenic arter|mesenteric arter|celiac",
    r"great vessels?|main vascular|vascular (?:walls?|structures?|calcif\w+)|\bvessel walls?|"
    r"arterial (?:walls?|"
    r"calcif\w+)",
)
_CORONARY = _compile_alternatives(
    r"coronar\w*", r"anterior descending", r"\blad\b|\brca\b|\blcx\b|\bcx\b", r"circumflex"
)
_OTHER_ORGAN = _compile_alternatives(
    r"thyroid\w*|goit\w+|adrenal|surrenal|liver|hepat\w+|spleen|splenic|breast|mamm\w+|"
    r"kidney|renal|pancrea\w*|skin|"
    r"subcutaneous|parotid|prostat\w*|gall-?bladder|vertebra\w*|bones?|abdom\w+|peritone\w+|"
    r"omental|mesenter\w+"
)
LUNG_PATTERN = re.compile(
    r"lung|pulmon|(?<!liver )(?<!hepatic )(?<!splenic )(?<!renal )(?<!breast )(?<!thyroid"
    r" )(?<!pancreatic )parenchyma|"
    r"upper lobe|lower lobe|middle lobe|lingula|pleura|\bapic(?:es|al)\b"
)
_BONE = _compile_alternatives(
    r"\bribs?\b|fractur\w*|vertebra\w*|bones?\b|osse\w+|sternum|clavic\w+|costal|spleen|"
    r"splenic|kidney|renal"
)
_WORD = r"[\w/%'-]+"
_BRONCHIAL_WALL = (
    r"(?:(?:bronch(?:ial|us|iolar|i)|airway)'?s?,? walls?"
    rf"|walls? of(?: (?!and\b){_WORD}){{0,4}}? (?:bronch(?:i|us)\b|airways?))"
)
_NOT_THICKENED = r"(?!(?:pleur|sept|inter-?lob|consolidat|nodul|ground|opacit|densit|esoph))"
"""Before a word between a bronchus and "thickening": the thickening is of something else."""
VESSEL_PATTERN = _compile_alternatives(_AORTA.pattern, _CORONARY.pattern)
_NOT_VASCULAR = (
    rf"(?!(?: (?!(?:and|or|with)\b|{VESSEL_PATTERN.pattern}){_WORD}){{0,4}} "
    r"(?:lymph|nodes?\b|lap\b|nodul|granulom|mass|lesion|pleura|thyroid|trache|bronch|"
    r"ribs?\b|costal|disc\b|valv|annul))"
)
"""After "calcified": the calcified thing is no vessel."""
_CALCIFIED = (
    rf"(?<!pleural )(?<!valve )calcif\w*\b{_NOT_VASCULAR}|"
    rf"(?<!pleural )\bplaques?\b{_NOT_VASCULAR}"
)

_FIBROATELECTATIC = r"\bfibro(?:tic|us)?[ -]?atel[ae]cta\w*"
_OPACITY = (
    r"\w*opacit(?:y|ies)|opacifications?"
    r"|density increases?|increases? in density|increased (?:\w+ )?densit(?:y|ies)"
)
_NO_OPACITY = (
    r"opacification of the (?:pulmonary arter|vessel|aort)|contrast opacif|fatty|fat planes?|muscle"
)
_SEQUELAE = r"sequel\w*|fibro\w*|pleuro-?parenchymal|scar\w*|atel[ae]cta\w*"
_OF_SEQUELAE = rf"(?: {_WORD}){{0,3}}? (?:with|of|to|as)(?: {_WORD}){{0,3}}? (?:{_SEQUELAE})"
"""After "density increases": they are sequelae."""

FINDING_TERMS: tuple[FindingTerm, ...] = (
    FindingTerm(
        "Medical material",
        _compile_alternatives(
            r"pace-?makers?|pacing (?:wire|lead|electrode)s?|\bicds?\b|defibrillators?|"
            r"electrodes?\b|\bbatter(?:y|ies)\b|stimulators?\b",
            r"\bleads?(?= (?:in|within|terminat|extend|are|is|tip))",
            r"port-?a-?cath\w*|\bport catheters?|(?:chest|venous|subclavian|jugular|infusion|"
            r"left|"
            r"right)(?: wall)? port\b|\bport (?:chamber|reservoir)s?\b",
            r"catheters?|cannulas?|\bpicc\b|central (?:venous )?lines?|swan-?ganz|balloon pump",
            r"\bstents?\b|\bstent-?grafts?|bypass grafts?|vascular grafts?|"
            r"embolization coils?|\bfilter\b",
            r"sternotom\w*|sternal (?:wires?|sutures?|cerclage)|cerclage",
            r"sutures?\b|staples?\b|\bclips?\b|"
            r"(?:surgical|surgery|operati(?:on|ve)|metal(?:lic)?|fixation|orthop\w+|"
            r"vertebroplasty|embolization|prosthetic) (?:materials?|devices?|hardware|plates?|"
            r"valves?|objects?)",
            r"prosthe\w+|implants?\b|mechanical valve|valve replacement|osteosynthesis|screws?\b",
            r"(?:endotracheal|tracheostomy|tracheal|nasogastric|feeding|chest|thoracostomy|"
            r"thorax|drainage|enteric|ng|"
            r"et)"
            r" (?:tubes?|cannulas?)",
            r"intubat\w+|tracheostom\w+|gastrostom\w+|\bdrains?\b|medical (?:materials?|"
            r"devices?)",
        ),
        is_device=True,
    ),
    FindingTerm(
        "Arterial wall calcification",
        re.compile(_CALCIFIED),
        required_vessel=_AORTA,
    ),
    FindingTerm(
        "Arterial wall calcification", re.compile(r"ather(?:o|om|os)\w*"), required_vessel=_AORTA
    ),
    FindingTerm(
        "Arterial wall calcification",
        re.compile(r"ather(?:o|om|os)\w*"),
        excluded_in_phrase=_CORONARY,
    ),
    FindingTerm(
        "Coronary artery wall calcification",
        re.compile(rf"{_CALCIFIED}|ather(?:o|om|os)\w*"),
        required_vessel=_CORONARY,
    ),
    FindingTerm(
        "Cardiomegaly",
        _compile_alternatives(
            r"cardiomegaly|megalocardia",
            r"enlarged (?:heart|cardiac silhouette)|(?:cardiac|heart) enlargement",
            r"enlargement (?:\w+ ){0,2}?(?:of|in) (?:the )?(?:heart|cardiac)",
            rf"\b(?:heart|cardiac|cardiothoracic|ct[or])(?: (?!normal|valve|"
            rf"failure){_WORD},?){{0,6}}? "
            r"(?:enlarged|increased?|larger|dilated|above normal|greater than normal|big|wider)",
            r"increased? (?:in )?(?:heart size|heart dimensions|cardiothoracic (?:index|ratio))",
        ),
    ),
    FindingTerm(
        "Pericardial effusion",
        _compile_alternatives(
            rf"pericardi\w+\b(?! recess){_JOINED}(?:effusions?|fluid|collections?)",
            r"pericardi\w+(?:\W+(?:or|and|pleural))*\W+thickening\s*(?:-|/|or|and)\s*effusions?",
            rf"(?:effusions?|fluid|collection)(?: {_WORD}){{0,12}}? (?:in|between|around|"
            rf"surrounding)(?: {_WORD}){{0,3}}? "
            r"(?:pericardi\w+\b(?! recess)|heart)",
            r"pericardi\w+ (?:spaces?|areas?|cavity|region|leaves),?"
            rf"(?: (?!no\b|not\b|without\b|pleur|hemi|thick){_WORD}){{0,6}}? (?:effusions?|fluid)",
            r"hemopericardium",
        ),
    ),
    FindingTerm(
        "Hiatal hernia",
        _compile_alternatives(
            rf"(?:hiat\w+|sliding|para-?esophageal|gastric)(?:[ -]{_WORD}){{0,3}}? hernia\w*",
            r"hernia\w*(?: \w+){0,8}? hiat(?:us|al)\b",
        ),
    ),
    FindingTerm(
        "Lymphadenopathy",
        re.compile(r"\w*adenopath\w*|lymphadenomegal\w*|\blaps?\b"),
    ),
    FindingTerm(
        "Lymphadenopathy",
        re.compile(
            r"(?<!intrapulmonary )\blymph[ -]?nodes?\b(?! dissect)"
            r"|(?<!sinus )(?<!lymph )\bnodes?\b"
        ),
        convention="ct-rate",
    ),
    FindingTerm(
        "Lymphadenopathy",
        _compile_alternatives(
            rf"(?:enlarge\w*|bulky|(?:\bnon-?)?patholog\w+)(?: (?!lymph|"
            rf"node){_WORD},?){{0,5}} (?:lymph[ -]?)?nod(?:e|es|al)\b"
            rf"(?:(?: {_WORD},?){{0,16}}? patholog\w+(?: \w+)?)?",
            rf"(?:lymph[ -]?)nodes?\b(?: (?!nodul){_WORD},?){{0,16}}? (?:enlarge\w*|bulky|"
            rf"patholog\w+)",
            rf"\bnodes?\b(?: {_WORD},?){{0,4}}? (?:enlarged|patholog\w+)",
            r"enlarge\w*(?: \w+){0,3}? (?:lymph[ -]?)?nodes?",
        ),
        excluded_in_phrase=re.compile(r"sinus node"),
        convention="clinical",
    ),
    FindingTerm(
        "Lymphadenopathy",
        re.compile(r"\b(?:lymph[ -]?)?nodes?\b"),
        is_weak=True,
        convention="clinical",
        min_short_axis_mm=10.0,
    ),
    FindingTerm(
        "Emphysema",
        re.compile(
            r"(?<!subcutaneous )(?<!mediastinal )(?<!soft tissue )(?<!surgical )(?<!muscular"
            r" )emphysem\w*\b"
            r"(?! (?:in|of) the (?:subcutaneous|chest wall|soft|mediastin|neck|muscle))"
        ),
    ),
    FindingTerm(
        "Atelectasis",
        _compile_alternatives(
            r"(?<!\bfibro-)(?<!\bfibro )(?<!\bfibrotic )(?<!\bfibrous )"
            r"\b(?!fibro)\w*atel[ae]cta\w*",
            r"(?:lobar|lung|lobe) collapse|collaps\w+ (?:of )?(?:the )?(?:\w+ ){0,3}?(?:lobe|"
            r"lung|parenchyma)",
        ),
    ),
    FindingTerm("Atelectasis", re.compile(_FIBROATELECTATIC), convention="clinical"),
    FindingTerm(
        "Lung nodule",
        _compile_alternatives(
            r"(?:micro)?nodules?\b|nodulo-?(?:infiltrative|ground)",
            r"nodular(?:,? (?:or|and|and/or|solid|\w+ive))* (?:lesions?|opacit\w+|densit\w+|"
            r"formations?|structures?)",
        ),
        excluded_organs=_OTHER_ORGAN,
    ),
    FindingTerm(
        "Lung opacity",
        re.compile(
            r"(?:ground|frosted)[ -]?glass\w*|crazy[ -]?paving|infiltrat(?:es?|ions?|ive)\b"
        ),
        excluded_in_phrase=re.compile(_NO_OPACITY),
        excluded_organs=_OTHER_ORGAN,
    ),
    FindingTerm(
        "Lung opacity",
        re.compile(_OPACITY),
        excluded_in_phrase=re.compile(_NO_OPACITY),
        excluded_organs=_OTHER_ORGAN,
        convention="clinical",
    ),
    FindingTerm(
        "Lung opacity",
        re.compile(rf"(?:{_OPACITY})\b(?!{_OF_SEQUELAE})"),
        excluded_in_phrase=re.compile(rf"{_NO_OPACITY}|{_SEQUELAE}"),
        excluded_organs=_OTHER_ORGAN,
        convention="ct-rate",
    ),
    FindingTerm(
        "Pulmonary fibrotic sequela",
        _compile_alternatives(
            r"sequel\w*\b(?!(?: \w+)? lymph)",
            r"fibro(?:tic|s[ie]s|-?atel\w*|-?linear\w*|-?retract\w*)",
            r"scars?\b|scarring|honeycomb\w*|(?:pleuro-?)?parenchymal bands?|fibrous",
            r"pleuro-?parenchymal (?:\w+ )?(?:densit\w+|recessions?|retractions?)",
        ),
        excluded_in_phrase=re.compile(
            r"surgical scar|incision|cystic fibrosis|retroperitoneal|myocard|infarct"
        ),
        excluded_organs=_compile_alternatives(_BONE.pattern, _OTHER_ORGAN.pattern),
    ),
    FindingTerm(
        "Pleural effusion",
        _compile_alternatives(
            rf"\bpleura\w*{_JOINED}(?:effusions?|fluid|collections?)",
            r"\bpleura\w*(?:\W+(?:or|and|pericardial))*\W+thickening\s*(?:-|/|or|"
            r"and)\s*effusions?",
            rf"(?:effusions?|fluid|collection)(?: {_WORD}){{0,12}}? (?:in|between|"
            rf"within)(?: {_WORD}){{0,4}}? "
            r"(?:pleura\w*|hemi-?thora\w+|fissures?|costophrenic)",
            r"hydro-?thorax|hemothorax|hydropneumothorax|empyema",
        ),
    ),
    FindingTerm(
        "Pleural effusion",
        re.compile(r"(?<!joint )(?<!pericardial )\beffusions?"),
        excluded_in_phrase=re.compile(
            r"perihepatic|perisplenic|ascit|abdom\w+|pelvi[cs]|peritone|intraarticular|subdural|"
            r"pericardi\w+ recess"
        ),
        is_weak=True,
    ),
    FindingTerm("Mosaic attenuation pattern", re.compile(r"\bmosaic\w*")),
    FindingTerm(
        "Peribronchial thickening",
        _compile_alternatives(
            rf"peri-?bronch\w*(?: {_NOT_THICKENED}{_WORD}){{0,5}}? (?:thick\w*|cuff\w*|sheath\w*)",
            rf"{_BRONCHIAL_WALL}(?: {_NOT_THICKENED}{_WORD}){{0,5}}? thick\w*",
            rf"thick\w*(?: (?!and\b|main\b){_NOT_THICKENED}{_WORD}){{0,6}}? "
            rf"(?:peri-?bronch\w*|{_BRONCHIAL_WALL}|around the bronch(?:i|us)\b)",
            r"bronchial thickening",
        ),
    ),
    FindingTerm("Consolidation", re.compile(r"consolidat\w*")),
    FindingTerm(
        "Bronchiectasis",
        _compile_alternatives(
            r"bronchi(?:ol)?ecta\w*",
            r"(?:dilat\w+|ectas\w+|ectati\w+|widen\w+)"
            r"(?: (?:of|in|the|both|some|central|lobar|(?:sub)?segmental))* bronch(?:i|us|ial)\b",
            r"\bbronch(?:i|us|ial)\b(?: (?!and\b|with\b|open\b|esoph|aort)\w+){0,7}? "
            r"(?:dilat\w+|ectas\w+|ectati\w+|enlarge\w+|widen\w+)",
        ),
    ),
    FindingTerm(
        "Interlobular septal thickening",
        _compile_alternatives(
            rf"\b(?:inter-?)?sept(?:a|al|um|ae)?\b(?: {_WORD},?){{0,5}}? thick\w*|kerley|"
            rf"septal lines?",
            rf"thick\w*(?: (?!bronch|pleura){_WORD}){{0,5}}? (?:inter-?lobular|sept(?:a|al|"
            rf"um|ae)?\b)",
            r"inter-?lobular(?: \w+){0,2} thick\w*|crazy[ -]?paving",
            rf"\binter-?lobular sept(?:a|al|um|ae)?\b(?: {_WORD}){{0,3}}? prominen\w+",
            r"prominen\w+(?: (?:of|in|the|both|all))* inter-?lobular sept(?:a|al|um|ae)?\b",
        ),
        excluded_in_phrase=re.compile(r"interatrial|interventricular|nasal|gall"),
    ),
)

IMPLIED_FINDINGS: Mapping[LabelConvention, Mapping[str, str]] = {
    "ct-rate": {},
    "clinical": {"Consolidation": "Lung opacity"},
}
"""Findings that are a kind of another: present or uncertain, they make the other at least that."""


@cache
def select_terms(convention: LabelConvention) -> tuple[FindingTerm, ...]:
    """Terms of a convention, in the order of `FINDING_TERMS`."""
    return tuple(term for term in FINDING_TERMS if term.convention in (None, convention))


@dataclass(frozen=True)
class NormalStructure:
    """A structure whose normal state rules findings out: "heart size is normal".

    A finding's name in the words of its structure ("bronchial wall thickness is normal") is no
    statement of its own.
    """

    structure: re.Pattern[str]
    findings: tuple[str, ...]


_IS_NORMAL = (
    r"(?:normal|natural|unremarkable|clear|open|preserved|regular|not (?:enlarged|dilated|"
    r"increased)|"
    r"within (?:the )?(?:normal|physiologic\w*)(?: limits?| range)?)\b"
)
NORMAL_STRUCTURES: tuple[NormalStructure, ...] = (
    NormalStructure(
        re.compile(
            rf"\b(?:heart|cardiac|cardiothoracic|ct[or])\b(?! (?:valve|"
            rf"failure))(?:,? (?!enlarg|increas|"
            rf"larg){_WORD}){{0,9}}? {_IS_NORMAL}"
            r"|normal(?:[ -]sized)? (?:heart|cardiac)"
        ),
        ("Cardiomegaly",),
    ),
    NormalStructure(
        re.compile(rf"\bpericardium\b(?:,? {_WORD}){{0,5}}? {_IS_NORMAL}|normal pericardium"),
        ("Pericardial effusion",),
    ),
    NormalStructure(
        re.compile(
            rf"\b(?:pleura|pleural (?:spaces?|cavit\w+|surfaces?)|costo-?(?:phrenic|"
            rf"diaphragmatic) (?:angles?|sinuses|"
            rf"recess\w*))"
            rf"\b(?:,? {_WORD}){{0,5}}? {_IS_NORMAL}|clear pleural spaces"
        ),
        ("Pleural effusion",),
    ),
    NormalStructure(
        re.compile(
            r"\b(?:lungs|lung (?:fields|parenchyma))(?: (?:are|is|appears?|remains?|\w+ly|"
            r"otherwise))+ "
            r"(?:clear|normal|unremarkable)\b"
        ),
        ("Lung opacity", "Consolidation", "Lung nodule", "Atelectasis"),
    ),
    NormalStructure(
        re.compile(
            r"(?:\b(?:peri-?bronch\w+|(?:bronch(?:ial|us|i)|airway)'?s?) walls?"
            r"|\b(?:peri-?bronch\w+|bronchial) thickness(?:es)?"
            r"|thickness(?:es)? of (?:(?:the|both|all) )*(?:peri-?bronch\w+|bronch(?:ial|us|i)|"
            r"airway))"
            rf"(?: (?!thicken|increas){_WORD}){{0,4}}? {_IS_NORMAL}"
        ),
        ("Peribronchial thickening",),
    ),
    NormalStructure(
        re.compile(
            rf"(?:thickness(?:es)? of (?:the )?)?\binter-?lobular sept(?:a|al|um)\b"
            rf"(?: (?!thicken|increas){_WORD}){{0,4}}? {_IS_NORMAL}"
        ),
        ("Interlobular septal thickening",),
    ),
)
