"""Terms of findings beyond the 18: what else chest-CT reports name, in the bones, neck and abdomen.

No label knows them, so a table of texts by label cannot place them. The table is read and amended
like `finding_terms`: patterns are matched in lower-case text.
"""

import re

from rectvlm.metrics.report_labeler.finding_terms import FindingTerm

_WORD = r"(?:\d+[.,]\d+|[\w/%'-]+)"
_NOT_IN_GAP = r"(?!(?:and (?!is\b)|or|no|not|without|normal|nor|but|than)\b)"
_GAP = rf"(?:(?:(?<=mm),|(?<=cm),)? {_NOT_IN_GAP}{_WORD}){{0,12}}?(?:(?<=mm),|(?<=cm),)? "
"""Words between an organ and what is there: "cyst in the right lobe of the liver"."""

_BONE = r"(?:bones?|osseous|vertebra\w*|ribs?|stern\w+|clavic\w+|humer\w+|scapula\w*|iliac)"
_KIDNEY = r"(?:kidneys?|renal)\b"
_LIVER = r"(?:liver|hepatic)\b"
_LESION = r"(?:lesions?|mass(?:es)?|nodules?|hypodensit(?:y|ies)|metasta\w+|hemangioma\w*)\b"


def _organ_with(organ: str, finding: str) -> str:
    """Pattern of an organ and a finding in either order, close to each other."""
    return rf"\b{organ}{_GAP}{finding}|\b{finding}{_GAP}{organ}"


def _name(entity: str, *alternatives: str, is_device: bool = False) -> FindingTerm:
    pattern = re.compile("|".join(alternatives))
    return FindingTerm(entity, pattern, is_device=is_device)


ENTITY_TERMS: tuple[FindingTerm, ...] = (
    # Bones
    _name("Fracture", r"\bfractur\w*"),
    _name(
        "Degenerative spine",
        r"\bdegenerati(?:ve|on)\w*|\bosteophyt\w*|\bspondylo(?!list)\w+|\bspur(?:s|ring)?\b",
    ),
    _name("Spinal curvature", r"\bscolio\w+|\b(?:hyper)?kypho(?!plast)\w+"),
    _name(
        "Vertebral height loss",
        _organ_with(r"vertebra\w*", r"(?:height loss|loss of height|decreased height|compression)"),
        r"\bheight loss(?:es)?\b",
    ),
    _name(
        "Bone lesion",
        _organ_with(_BONE, r"(?:lytic|sclerotic|blastic)(?: (?:lesions?|areas?|foci|focus))?\b"),
        _organ_with(_BONE, r"metasta\w+"),
        r"\b(?:lytic|blastic|sclerotic)(?:-\w+)? (?:bone )?lesions?\b",
    ),
    _name("Osteopenia", r"\bosteopeni\w*|\bosteoporo\w*|\bbone densit\w+ (?:is |has )?decreased"),
    # Devices and operations
    _name(
        "Sternotomy",
        r"\bsternotom\w*|\bsternal (?:wires?|sutures?|cerclage)|\bcerclage\b",
        is_device=True,
    ),
    _name(
        "Catheter or port",
        r"\bcatheters?\b|\bport-?a-?cath\w*|\bpicc\b|\bcentral (?:venous )?lines?\b"
        r"|\b(?:chest|venous|infusion|subclavian|jugular) port\b",
        is_device=True,
    ),
    _name("Pacemaker", r"\bpace-?makers?\b|\bpacing leads?\b|\bdefibrillat\w+", is_device=True),
    _name("Stent", r"\bstents?\b|\bstent-?grafts?\b", is_device=True),
    _name(
        "Tube or drain",
        r"\b(?:endotracheal|tracheostomy|nasogastric|feeding|chest|thorax|drainage) tubes?\b"
        r"|\btracheostom\w+|\bintubat\w+|\bdrains?\b",
        is_device=True,
    ),
    _name(
        "Valve prosthesis",
        r"\b(?:prosthetic|mechanical|artificial) (?:\w+ )?valves?\b",
        r"\bvalve (?:prosthe\w+|replac\w+)",
    ),
    _name("Mastectomy", r"\bmastectom\w+"),
    _name("Lung resection", r"\blobectom\w+|\bpneumonectom\w+|\bwedge resection|\bsegmentectom\w+"),
    # Neck and chest wall
    _name(
        "Thyroid nodule",
        _organ_with(r"thyroid\w*", r"(?:nodul\w+|hypodens\w+|cysts?|lesions?)\b"),
        r"\b(?:multi)?nodular goit\w+",
    ),
    _name("Goitre", r"\bgoit\w+|\bthyromegaly", _organ_with(r"thyroid\w*", r"enlarge\w*")),
    _name("Gynecomastia", r"\bgyna?ecomast\w+"),
    _name("Breast lesion", _organ_with(r"breasts?\b", _LESION)),
    # Vessels and esophagus
    _name(
        "Aortic dilatation",
        _organ_with(r"aort\w+", r"(?:aneurysm\w*|ectasi\w+|ectatic|dilat\w+|wider\b)"),
    ),
    _name(
        "Pulmonary artery dilatation",
        _organ_with(r"pulmonary (?:arter\w+|trunk|conus)", r"(?:dilat\w+|enlarge\w*|ectasi\w+)"),
    ),
    _name("Pulmonary embolism", r"\b(?:pulmonary|lung) (?:thrombo)?embol\w+|\bfilling defects?\b"),
    _name(
        "Esophageal dilatation", _organ_with(r"o?esophag\w+", r"(?:dilat\w+|ectasi\w+|distend\w*)")
    ),
    # Lungs and pleura
    _name("Pneumothorax", r"\b(?:hydro)?pneumothora\w+"),
    _name("Pleural thickening", r"\bpleural(?: (?!effusion)[\w-]+){0,2} thick\w+|\bpachypleur\w+"),
    _name("Cavitation", r"\bcavit(?:ation|ary|ated|ating)\w*"),
    _name("Bulla", r"\bbull(?:a|ae|ous|as)\b|\bblebs?\b"),
    _name("Tree-in-bud", r"\btree[- ](?:in[- ])?bud\w*|\bbudding tree"),
    _name("Mucus plug", r"\bmuc(?:us|oid|ous) (?:plug\w*|impact\w*)|\bmucus retention"),
    _name(
        "Elevated diaphragm",
        _organ_with(r"(?:hemi)?diaphragm\w*", r"(?:elevat\w+|eventrat\w+)"),
    ),
    # Abdomen
    _name(
        "Fatty liver",
        r"\b(?:hepato)?steato(?:sis|tic)\b|\bfatty liver|\bhepatosteat\w+",
        _organ_with(_LIVER, r"(?:fatty|adipos\w+|fat infiltration)"),
    ),
    _name("Hepatomegaly", r"\bhepato(?:spleno)?megal\w+", _organ_with(_LIVER, r"enlarge\w*")),
    _name(
        "Splenomegaly",
        r"\b(?:hepato)?splenomegal\w+",
        _organ_with(r"(?:spleen|splenic)\b(?! (?:vein|artery|flexure))", r"enlarge\w*"),
    ),
    _name("Liver cyst", _organ_with(_LIVER, r"cysts?\b")),
    _name("Liver lesion", _organ_with(_LIVER, _LESION)),
    _name(
        "Gallstones",
        r"\bgall-?stones?\b|\bchole(?:cysto)?lithiasis",
        _organ_with(r"gall-?bladder\b", r"(?:stones?|calcul(?:us|i))\b"),
    ),
    _name("Renal cyst", _organ_with(_KIDNEY, r"(?:cysts?|cortical hypodens\w+)\b")),
    _name(
        "Renal stone",
        r"\bnephrolithiasis",
        _organ_with(_KIDNEY, r"(?:stones?|calcul(?:us|i))\b"),
    ),
    _name(
        "Adrenal lesion",
        _organ_with(
            r"(?:adrenal|surrenal)(?: glands?)?",
            r"(?:adenomas?|nodul\w+|lesions?|mass(?:es)?|thick\w+|hyperplas\w+|metasta\w+)\b",
        ),
    ),
    _name(
        "Ascites",
        r"\bascites\b",
        _organ_with(r"(?:abdom\w+|perihepatic|perisplenic|peritone\w+)", r"(?:free )?fluid"),
    ),
)
ENTITIES = tuple(dict.fromkeys(term.finding for term in ENTITY_TERMS))
"""Names of the findings beyond the 18, E in all."""
