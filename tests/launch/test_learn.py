"""`make learn` in small: its phantoms, and that held-out cases are learned too."""

import json
from functools import cache
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from sklearn.metrics import roc_auc_score

from data_pipeline.cases import case_to_sample
from data_pipeline.demo_cases import list_demo_cases
from launch.demo import main
from rectvlm import pretrained
from rectvlm.config import Config, load_config
from rectvlm.data.dataset import collate_samples
from rectvlm.data.shards import read_index, read_sample
from rectvlm.labels import FINDINGS, LESION_FINDING_INDEXES, N_LESIONS
from rectvlm.metrics.clinical_efficacy import count_confusions, score_clinical_efficacy
from rectvlm.metrics.report_labeler.finding_states import FindingState
from rectvlm.metrics.report_labeler.labeler import load_labeler
from rectvlm.metrics.report_labeler.laterality import count_side_outcomes, score_laterality
from rectvlm.models import RectVLM
from rectvlm.models.language_model import load_language_model
from rectvlm.models.prompt_embeddings import PromptEmbeddings
from rectvlm.phantom.patient_plan import PLAIN_STYLE, draw_patient_plan
from rectvlm.phantom.phantom import PhantomCase, make_phantom
from rectvlm.train.objectives import combine_losses, compute_losses
from rectvlm.train.optimizer import freeze_all_but
from rectvlm.train.phases import PHASES
from rectvlm.types import Batch, BatchPrediction

SEEDS = range(10)


@cache
def plain(seed: int) -> PhantomCase:
    return make_phantom(seed, PLAIN_STYLE)


def canonical(phantom: PhantomCase, name: str) -> np.ndarray:
    """An array in (superior, posterior, left) order, by nibabel."""
    turn = ornt_transform(io_orientation(phantom.affine), axcodes2ornt(("S", "P", "L")))
    return np.asarray(apply_orientation(getattr(phantom, name), turn))


def test_plain_phantoms_show_one_patient_in_many_file_orders() -> None:
    codes = {nib.aff2axcodes(plain(seed).affine) for seed in SEEDS}
    assert len(codes) >= 6
    hu = np.stack([canonical(plain(seed), "hu") for seed in SEEDS]).astype(float)
    spine = np.stack([canonical(plain(seed), "regions") == 13 for seed in SEEDS])
    assert (spine == spine[0]).mean() > 0.999
    # Noise has at most 20 HU; another patient's bones would differ by hundreds.
    assert np.median(hu.std(0)[spine.all(0)]) < 30


def test_plain_phantoms_draw_only_their_findings_and_say_nothing_else() -> None:
    drawn = {
        finding
        for seed in range(60)
        for finding, there in draw_patient_plan(seed, PLAIN_STYLE).present.items()
        if there
    }
    assert drawn == set(PLAIN_STYLE.findings)
    for seed in SEEDS:
        assert all(
            plain(seed).labels[finding] in (0, None)
            for finding in set(FINDINGS) - set(PLAIN_STYLE.findings)
        )
        assert " no " not in f" {plain(seed).findings} {plain(seed).impression} ".lower().replace(
            "no acute", ""
        )
        assert len(plain(seed).findings.split()) < 80


def test_one_phantom_does_not_change_the_next() -> None:
    """The healthy chest is kept; what is painted must not stay on it."""
    make_phantom(5, PLAIN_STYLE)
    for name in ("hu", "lesions", "regions"):
        assert np.array_equal(getattr(make_phantom(3, PLAIN_STYLE), name), getattr(plain(3), name))


def cases(config: Config, train: int, valid: int) -> tuple[list[Batch], Batch]:
    """Training samples as batches of 4, and the held-out ones as one."""
    made = [
        case_to_sample(case, config.data.grid, config.data.spacing)
        for case in list_demo_cases(train, valid, None, "plain")
    ]
    return [collate_samples(made[i : i + 4]) for i in range(0, train, 4)], collate_samples(
        made[train:]
    )


def fit(
    model: RectVLM,
    config: Config,
    batches: list[Batch],
    phase: int,
    steps: int,
    rates: dict[str, float],
) -> None:
    """Adam over the batches in turn, the rates falling to 0."""
    groups = [
        {
            "params": [p for p in model.get_submodule(part).parameters() if p.requires_grad],
            "lr": rate,
        }
        for part, rate in rates.items()
    ]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, list(rates.values()), total_steps=steps + 1, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    for step in range(steps):
        batch = batches[step % len(batches)]
        found = compute_losses(
            model(batch), batch, PHASES[phase].tasks, config.train.localization_loss_weights
        )
        optimizer.zero_grad()
        combine_losses(found, config.train.loss_weights).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def aurocs(probabilities: torch.Tensor, batch: Batch) -> dict[str, float]:
    """Of the findings of which some cases have it and some have not."""
    found = {}
    for n, finding in enumerate(FINDINGS):
        known = batch.labels_known[:, n]
        truth = batch.labels[known, n]
        if 0 < truth.sum() < len(truth):
            found[finding] = float(roc_auc_score(truth, probabilities[known, n]))
    return found


@pytest.fixture(scope="module")
def learnt() -> tuple[RectVLM, BatchPrediction, list[Batch], Batch]:
    """The model, what it predicted before training, its training cases and the held-out ones.

    Phases 1 and 2 in four minutes, of the half hour that `make learn` takes on two cores.
    """
    config = load_config("learn")
    torch.manual_seed(0)
    train, held_out = cases(config, 96, 32)
    prompts = PromptEmbeddings.from_text_encoder(
        pretrained.resolve_model(config.text.model), config.text.max_tokens
    )
    model = RectVLM(config, ("encoder", "classifier", "localizer"), prompts)
    model.encoder.fit_atlas(ct for batch in train[:16] for ct in batch.ct)
    before = model.eval().predict_batch(held_out, generate=False)
    rates = {"encoder": 2e-3, "classifier": 2e-3}
    first = RectVLM(config, ("encoder", "classifier"), prompts)
    first.load_state_dict(
        {k: v for k, v in model.state_dict().items() if not k.startswith("localizer.")}
    )
    fit(first, config, train, 1, 200, rates)
    model.load_state_dict(first.state_dict(), strict=False)
    fit(model, config, train, 2, 120, {"encoder": 1e-3, "classifier": 1e-3, "localizer": 4e-3})
    return model, before, train, held_out


@pytest.mark.slow
def test_findings_and_outlines_of_held_out_cases_are_learnt(learnt: tuple) -> None:
    model, before, _, held_out = learnt
    after = model.predict_batch(held_out, generate=False)
    had, has = (
        aurocs(before.finding_probabilities, held_out),
        aurocs(after.finding_probabilities, held_out),
    )
    assert set(has) <= set(PLAIN_STYLE.findings) and len(has) >= 7
    assert np.mean(list(has.values())) > max(0.8, np.mean(list(had.values())) + 0.15)
    dice = []
    for bit in range(N_LESIONS):
        truth = (held_out.lesions >> bit & 1).bool() & held_out.lesions_annotated[
            :, bit, None, None, None
        ]
        drawn = after.lesion_probabilities[:, bit] >= 0.5
        there = truth.flatten(1).any(1)
        overlap = (
            2
            * (truth & drawn).flatten(1).sum(1)
            / (truth.flatten(1).sum(1) + drawn.flatten(1).sum(1)).clamp_min(1)
        )
        dice.append(float(overlap[there].mean()))
    assert np.mean(dice) > 0.35


@pytest.mark.slow
def test_reports_of_held_out_cases_say_what_the_image_shows(learnt: tuple) -> None:
    """Phase 3 in five minutes: findings and sides in the reports.

    And what is left of them without the image.
    """
    vision, _, train, held_out = learnt
    config = vision.config
    language = load_language_model(
        config.generator, pretrained.resolve_model(config.generator.model)
    )
    model = RectVLM(config, PHASES[3].parts, vision.prompts, language)
    model.load_state_dict(vision.state_dict(), strict=False)
    freeze_all_but(model, {"generator": 2e-3})
    fit(model, config, train, 3, 72, {"generator": 2e-3})

    labeler = load_labeler("rules", "clinical")
    present, known = held_out.labels.bool().numpy(), held_out.labels_known.numpy()

    def measured(ablate_image: bool) -> tuple[float, float | None]:
        """F1 of the findings, and laterality of the lesions."""
        reports = model.predict_batch(held_out, ablate_image=ablate_image).reports
        assert reports is not None
        called = labeler.label_reports(reports) >= FindingState.UNCERTAIN
        f1 = score_clinical_efficacy(count_confusions(called, present, known))["micro"]["f1"]
        return f1, score_laterality(count_side_outcomes(reports, held_out.reports))["accuracy"]

    (f1, sides), (without, _) = measured(False), measured(True)
    assert f1 > 0.6 and f1 > without + 0.2, f"F1 {f1:.2f}, {without:.2f} without the image"
    assert sides is not None and sides > 0.6


@pytest.mark.slow
def test_a_run_with_the_supervision_of_ct_rate_says_what_it_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    steps = [f"train.phases.phase{phase}.samples=2" for phase in PHASES]
    batches = [f"train.phases.phase{phase}.global_batch=2" for phase in PHASES]
    warmups = [f"train.phases.phase{phase}.warmup=0" for phase in PHASES]
    small = ["encoder.atlas_cases=4", "generator.max_report_tokens=16"]
    folders = [f"data.shards={tmp_path}/shards", f"train.runs={tmp_path}"]
    options = ["--config", "learn", "--supervision", "ct-rate", "--strict"]
    options += ["--phantoms", "16", "--valid-phantoms", "4"]
    assert main([*options, *folders, *small, *steps, *batches, *warmups]) == 1
    summary = json.loads((tmp_path / "learn-ct-rate" / "summary.json").read_text())
    assert summary["supervision"] == "ct-rate"
    assert (summary["cases"]["train"], summary["cases"]["valid"]) == (16, 4)
    targets = {target["name"]: target for target in summary["targets"]}
    assert "ml of ground glass opacity where there is none" in targets
    assert not targets["macro AUROC of the findings"]["met"]
    index = read_index(tmp_path / "shards")
    held_out = next(iter(index.select_split("valid")))
    assert "exhaustive" in read_sample(tmp_path / "shards", held_out).meta.source


def test_masks_inform_the_findings_that_they_imply(prompts: PromptEmbeddings) -> None:
    """More of a lesion supports its finding and no other; the finding's loss reaches the masks."""
    config = load_config("tiny", ["data.grid=[8, 16, 16]", "localizer.volumes_to_findings=true"])
    torch.manual_seed(0)
    model = RectVLM(config, ("encoder", "classifier", "localizer"), prompts)
    evidence = model.localizer.evidence  # type: ignore[union-attr]
    assert evidence is not None
    none = torch.full((1, N_LESIONS, 8, 16, 16), -9.0)
    for bit in range(N_LESIONS):
        some = none.clone()
        some[:, bit, 2:4, 4:8, 4:8] = 9.0
        some.requires_grad_()
        change = evidence(some) - evidence(none)
        assert change[0, LESION_FINDING_INDEXES[bit]] > 1
        others = [n for n in range(len(FINDINGS)) if n != LESION_FINDING_INDEXES[bit]]
        assert torch.allclose(change[0, others], torch.zeros(len(others)), atol=1e-5)
        change[0, LESION_FINDING_INDEXES[bit]].backward()
        assert some.grad is not None and (some.grad[:, bit] > 0).all()


@pytest.fixture(scope="module")
def prompts(tiny: Config) -> PromptEmbeddings:
    return PromptEmbeddings.from_text_encoder(
        pretrained.resolve_model(tiny.text.model), tiny.text.max_tokens
    )


def test_findings_are_the_same_with_and_without_masks_asked_for(prompts: PromptEmbeddings) -> None:
    config = load_config("learn", ["encoder.atlas_cases=0"])
    _, batch = cases(config, 0, 2)
    torch.manual_seed(0)
    small = PromptEmbeddings(*(getattr(prompts, name) for name in ("present", "absent", "lesions")))
    model = RectVLM(config, ("encoder", "classifier", "localizer"), small).eval()
    with_masks, without = (
        model.predict_batch(batch, generate=False, localize=one) for one in (True, False)
    )
    assert torch.equal(with_masks.finding_probabilities, without.finding_probabilities)
    assert not without.lesion_probabilities.any() and with_masks.lesion_probabilities.any()
    assert torch.allclose(model(batch).finding_logits.sigmoid(), with_masks.finding_probabilities)


def test_the_atlas_is_the_mean_of_the_cases_and_travels_with_the_weights(
    prompts: PromptEmbeddings,
) -> None:
    config = load_config("tiny", ["data.grid=[8, 16, 16]", "encoder.atlas_cases=2"])
    torch.manual_seed(0)
    model = RectVLM(config, ("encoder", "classifier"), prompts).eval()
    volumes = torch.tensor([-2000, 3071], dtype=torch.int16)[:, None, None, None].expand(
        2, 8, 16, 16
    )
    model.encoder.fit_atlas(volumes)
    assert torch.equal(model.encoder.atlas, torch.full((3, 8, 16, 16), 0.5))
    assert "encoder.atlas" in model.checkpoint_tensor_names()
    plain = RectVLM(load_config("tiny"), ("encoder", "classifier"), prompts)
    assert "encoder.atlas" not in plain.checkpoint_tensor_names()
