"""The cases of the demo: the two sample CTs and seeded phantoms."""

from functools import partial
from pathlib import Path

from data_pipeline.cases import Case, CaseData, file_identity
from data_pipeline.sample_cts import OUTLINED_LESION, SAMPLE_CTS, SampleCt, fetch_sample_cts
from rectvlm.data.volume import read_mask, read_volume
from rectvlm.labels import FINDINGS, LESION_BY_KEY
from rectvlm.lesion_bits import pack_lesion
from rectvlm.phantom.patient_plan import PHANTOM_STYLES, VARIED_STYLE
from rectvlm.phantom.phantom import make_phantom
from rectvlm.phantom.supervision import PhantomSupervision, TrainingSupervision
from rectvlm.types import Split, Volume, no_lesions_source

FIRST_VALID_SEED = 100_000
"""First seed of the validation phantoms; the seeds of training phantoms start at 0."""


def list_demo_cases(
    train_count: int,
    valid_count: int,
    sample_ct_folder: Path | None,
    style: str = VARIED_STYLE.name,
    supervision: TrainingSupervision = "complete",
) -> list[Case]:
    """List the two real CTs, then the phantoms of both splits.

    Args:
        train_count: number of training phantoms.
        valid_count: number of validation phantoms.
        sample_ct_folder: folder of the real CTs, which are fetched when they are not there; None
            leaves them out.
        style: one of `patient_plan.PHANTOM_STYLES`.
        supervision: supervision of the training phantoms. With `ct-rate` that of the validation
            phantoms is exhaustive, so that figures are compared with the truth.

    Raises:
        UserError: the CTs cannot be fetched.
    """
    cases: list[Case] = []
    if sample_ct_folder is not None:
        fetch_sample_cts(sample_ct_folder)
        cases += [_sample_ct_case(ct, sample_ct_folder) for ct in SAMPLE_CTS]
    cases += [_phantom_case(seed, "train", style, supervision) for seed in range(train_count)]
    valid_seeds = range(FIRST_VALID_SEED, FIRST_VALID_SEED + valid_count)
    valid_supervision: PhantomSupervision = (
        "exhaustive" if supervision == "ct-rate" else supervision
    )
    cases += [_phantom_case(seed, "valid", style, valid_supervision) for seed in valid_seeds]
    return cases


def _sample_ct_case(ct: SampleCt, folder: Path) -> Case:
    return Case(
        key=ct.name,
        split="valid",  # what a demo shows of it was not learnt from it
        patient=ct.name,
        source=f"pyradiomics 3.0.1 {ct.volume_path(folder).name}",
        load=partial(_load_sample_ct, ct, folder),
        identity=file_identity(ct.volume_path(folder), ct.mask_path(folder)),
    )


def _load_sample_ct(ct: SampleCt, folder: Path) -> CaseData:
    mask = read_mask(ct.mask_path(folder))
    bits = pack_lesion(mask.array > 0, LESION_BY_KEY[OUTLINED_LESION])
    return CaseData(
        volume=read_volume(ct.volume_path(folder)),
        labels={**dict.fromkeys(FINDINGS), "Lung nodule": ct.nodule_label},
        lesions=[Volume(bits, mask.affine, mask.where)],
        lesions_annotated={key: key == OUTLINED_LESION for key in LESION_BY_KEY},
        lesions_source={**no_lesions_source(), OUTLINED_LESION: "pyradiomics"},
    )


def phantom_key(seed: int) -> str:
    """Key of the case of a phantom."""
    return f"phantom_{seed:06d}"


def _phantom_case(seed: int, split: Split, style: str, supervision: PhantomSupervision) -> Case:
    key = phantom_key(seed)
    style_note = "" if style == VARIED_STYLE.name else f", {style}"
    supervision_note = "" if supervision == "complete" else f", supervision {supervision}"
    return Case(
        key=key,
        split=split,
        patient=key,
        source=f"phantom of seed {seed}{style_note}{supervision_note}",
        load=partial(_load_phantom, seed, style, supervision),
        identity=(str(seed), style, supervision),
    )


def _load_phantom(seed: int, style: str, supervision: PhantomSupervision) -> CaseData:
    phantom = make_phantom(seed, PHANTOM_STYLES[style], supervision)
    where = f"phantom of seed {seed}"
    return CaseData(
        volume=Volume(phantom.hu, phantom.affine, where),
        labels=phantom.labels,
        findings=phantom.findings,
        impression=phantom.impression,
        lesions=[Volume(phantom.lesions, phantom.affine, where)],
        lesions_annotated=phantom.lesions_annotated,
        lesions_partial=phantom.lesions_partial,
        lesions_source=phantom.lesions_source,
        regions=Volume(phantom.regions, phantom.affine, where),
        regions_source="phantom",
    )
