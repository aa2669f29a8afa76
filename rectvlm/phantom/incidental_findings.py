"""Incidental findings of a report: the long tail that is none of the 18 findings.

They are drawn by chance alone, so a model can learn how often reports say them, never when.
"""

import numpy as np

INCIDENTAL_SENTENCES = (
    "Degenerative changes are seen in the thoracic spine.",
    "The trachea and both main bronchi are open.",
    "Osteophytes at the vertebral corners.",
    "The gallbladder was not observed.",
    "Millimetric calculi in the gallbladder.",
    "Hypodense cyst in the right lobe of the liver.",
    "The liver parenchyma is diffusely hypodense, in keeping with steatosis.",
    "Bone structures in the study area are natural.",
    "The thyroid gland is enlarged and heterogeneous.",
    "Cortical cyst in the upper pole of the left kidney.",
    "Millimetric calculus in the right kidney.",
    "Thoracic kyphosis is increased.",
    "The left adrenal gland is thickened.",
    "Accessory spleen at the splenic hilum.",
    "Hemangioma in a thoracic vertebral body.",
    "Bilateral gynecomastia.",
    "Old healed rib fracture on the left.",
    "Hypodense area in the right thyroid lobe, ultrasound is recommended.",
    "Scoliosis of the thoracic spine with convexity to the right.",
    "Adenoma of the right adrenal gland.",
    "The spleen is larger than normal.",
    "Schmorl impressions on the vertebral end plates.",
    "Height loss of a thoracic vertebral body.",
    "The diameter of the ascending aorta is 42 mm.",
    "The main pulmonary artery is 32 mm wide.",
    "Bone density is decreased.",
    "The left hemidiaphragm is elevated.",
    "Azygos lobe on the right.",
    "Tracheal diverticulum on the right.",
    "Diastasis of the rectus muscles.",
    "Lipoma in the right chest wall.",
    "Hypodense cyst in the spleen.",
    "The pancreas is atrophic.",
    "Angiomyolipoma of the left kidney.",
    "Right-sided aortic arch.",
    "Aberrant right subclavian artery.",
    "Cervical rib on the left.",
    "Pectus excavatum.",
    "Fatty replacement of the pancreas.",
    "Sclerotic focus in a rib, in keeping with a bone island.",
)
"""Sentences, most frequent first."""
ZIPF_EXPONENT = 1.0
"""Frequency of the nth sentence: 1 / n to this power (Zipf 1949)."""
MAX_INCIDENTAL_SENTENCES = 3
"""Largest number of incidental sentences of a report."""


def draw_incidental_sentences(rng: np.random.Generator) -> list[str]:
    """Draw none to `MAX_INCIDENTAL_SENTENCES` different sentences by Zipf's law."""
    frequencies = 1 / np.arange(1, len(INCIDENTAL_SENTENCES) + 1) ** ZIPF_EXPONENT
    count = int(rng.integers(MAX_INCIDENTAL_SENTENCES + 1))
    numbers = rng.choice(
        len(INCIDENTAL_SENTENCES), count, replace=False, p=frequencies / frequencies.sum()
    )
    return [INCIDENTAL_SENTENCES[number] for number in numbers]
