"""The cases of the demo: the two sample CTs and seeded phantoms."""

import hashlib
from functools import partial
from pathlib import Path

import numpy as np

from data_pipeline.cases import Case, CaseData, file_identity
from data_pipeline.samples import LESION, SCANS, SampleScan, fetch_samples
from rectvlm.data import phantom
from rectvlm.data.phantom import make_phantom
from rectvlm.data.phantom_plan import STYLES, VARIED
from rectvlm.data.volume import Volume, read_mask, read_volume
from rectvlm.labels import FINDINGS, LESION_BY_KEY
from rectvlm.types import Split

VALID_SEEDS = 100_000
"""First seed of the validation phantoms; training ones start at 0."""


def demo_cases(train: int, valid: int, samples: Path | None, style: str = VARIED.name) -> list[Case]:
    """The two real CTs (fetched to `samples` when not there; left out when None), then the phantoms of both splits, in
    a style of `phantom_plan.STYLES`.

    Raises:
        UserError: the CTs cannot be fetched.
    """
    real: list[Case] = []
    if samples is not None:
        fetch_samples(samples)
        real = [_scan_case(scan, samples) for scan in SCANS]
    train_phantoms = [_phantom_case(seed, "train", style) for seed in range(train)]
    return real + train_phantoms + [_phantom_case(VALID_SEEDS + number, "valid", style) for number in range(valid)]


def _scan_case(scan: SampleScan, folder: Path) -> Case:
    return Case(
        key=scan.name,
        split=scan.split,
        patient=scan.name,
        source=f"pyradiomics 3.0.1 {scan.volume(folder).name}",
        load=partial(_load_scan, scan, folder),
        identity=file_identity(scan.volume(folder), scan.mask(folder)),
    )


def _load_scan(scan: SampleScan, folder: Path) -> CaseData:
    mask = read_mask(scan.mask(folder))
    bits = np.where(mask.array > 0, np.uint8(1 << LESION_BY_KEY[LESION].bit), np.uint8(0))
    return CaseData(
        volume=read_volume(scan.volume(folder)),
        labels={**dict.fromkeys(FINDINGS), "Lung nodule": scan.nodule},
        lesions=[Volume(bits, mask.affine, mask.where)],
        lesions_annotated={key: key == LESION for key in LESION_BY_KEY},
    )


def _phantom_case(seed: int, split: Split, style: str) -> Case:
    key = f"phantom_{seed:06d}"
    source = f"phantom of seed {seed}" if style == VARIED.name else f"phantom of seed {seed}, {style}"
    return Case(key, split, key, source, partial(_load_phantom, seed, style), (str(seed), style, _phantom_code()))


def _load_phantom(seed: int, style: str) -> CaseData:
    made = make_phantom(seed, STYLES[style])
    where = f"phantom of seed {seed}"
    return CaseData(
        volume=Volume(made.hu, made.affine, where),
        labels=made.labels,
        findings=made.findings,
        impression=made.impression,
        lesions=[Volume(made.lesions, made.affine, where)],
        lesions_annotated=made.lesions_annotated,
        regions=Volume(made.regions, made.affine, where),
        regions_source="phantom",
    )


def _phantom_code() -> str:
    """A phantom is its seed and the code that paints it."""
    files = sorted(Path(phantom.__file__).parent.glob("phantom*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
