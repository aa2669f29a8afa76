"""The cases of the demo: the two sample CTs and seeded phantoms."""

import hashlib
from functools import partial
from pathlib import Path

from data_pipeline.cases import Case, CaseData, file_identity
from data_pipeline.sample_cts import OUTLINED_LESION, SAMPLE_CTS, SampleCt, fetch_sample_cts
from rectvlm.data.volume import read_mask, read_volume
from rectvlm.labels import FINDINGS, LESION_BY_KEY
from rectvlm.lesion_bits import pack_lesion
from rectvlm.phantom import phantom
from rectvlm.phantom.patient_plan import PHANTOM_STYLES, VARIED_STYLE
from rectvlm.phantom.phantom import make_phantom
from rectvlm.types import Split, Volume

FIRST_VALID_SEED = 100_000
"""First seed of the validation phantoms; training ones start at 0."""


def list_demo_cases(
    train_count: int,
    valid_count: int,
    sample_ct_folder: Path | None,
    style: str = VARIED_STYLE.name,
) -> list[Case]:
    """The two real CTs (fetched to `samples` when not there; left out when None), then the phantoms of both splits, in
    a style of `phantom_plan.STYLES`.

    Raises:
        UserError: the CTs cannot be fetched.
    """
    real: list[Case] = []
    if sample_ct_folder is not None:
        fetch_sample_cts(sample_ct_folder)
        real = [_sample_ct_case(scan, sample_ct_folder) for scan in SAMPLE_CTS]
    train_phantoms = [_phantom_case(seed, "train", style) for seed in range(train_count)]
    return (
        real
        + train_phantoms
        + [
            _phantom_case(FIRST_VALID_SEED + number, "valid", style)
            for number in range(valid_count)
        ]
    )


def _sample_ct_case(scan: SampleCt, folder: Path) -> Case:
    return Case(
        key=scan.name,
        split=scan.split,
        patient=scan.name,
        source=f"pyradiomics 3.0.1 {scan.volume_path(folder).name}",
        load=partial(_load_sample_ct, scan, folder),
        identity=file_identity(scan.volume_path(folder), scan.mask_path(folder)),
    )


def _load_sample_ct(scan: SampleCt, folder: Path) -> CaseData:
    mask = read_mask(scan.mask_path(folder))
    bits = pack_lesion(mask.array > 0, LESION_BY_KEY[OUTLINED_LESION])
    return CaseData(
        volume=read_volume(scan.volume_path(folder)),
        labels={**dict.fromkeys(FINDINGS), "Lung nodule": scan.nodule_label},
        lesions=[Volume(bits, mask.affine, mask.where)],
        lesions_annotated={key: key == OUTLINED_LESION for key in LESION_BY_KEY},
    )


def _phantom_case(seed: int, split: Split, style: str) -> Case:
    key = f"phantom_{seed:06d}"
    source = (
        f"phantom of seed {seed}"
        if style == VARIED_STYLE.name
        else f"phantom of seed {seed}, {style}"
    )
    return Case(
        key,
        split,
        key,
        source,
        partial(_load_phantom, seed, style),
        (str(seed), style, _phantom_code_digest()),
    )


def _load_phantom(seed: int, style: str) -> CaseData:
    made = make_phantom(seed, PHANTOM_STYLES[style])
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


def _phantom_code_digest() -> str:
    """A phantom is its seed and the code that paints it."""
    files = sorted(Path(phantom.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
