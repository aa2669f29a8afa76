"""Each part learns alone.

One batch is learned to near-zero loss, and the gradient reaches every trainable parameter.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import phantom_sample
from launches import TWO, length, run
from torch import Tensor, nn

from rectvlm import pretrained
from rectvlm.checkpoint import Checkpoint, run_folder
from rectvlm.config import Config, load_config
from rectvlm.data.dataset import collate_samples
from rectvlm.labels import LESION_BY_KEY, N_FINDINGS, N_LESIONS, N_REGIONS
from rectvlm.models import RectVLM
from rectvlm.models.image_features import ImageFeatures
from rectvlm.models.language_model import load_language_model
from rectvlm.models.localizer import LesionLocalizer
from rectvlm.models.prompt_embeddings import PromptEmbeddings
from rectvlm.models.report_generator import ReportGenerator
from rectvlm.train.lesion_targets import LesionPresence, LesionTargets
from rectvlm.train.localization_loss import localization_loss
from rectvlm.train.objectives import (
    combine_losses,
    compute_losses,
)
from rectvlm.train.phases import PHASES
from rectvlm.train.task_loss import TargetCounts
from rectvlm.types import Batch

NODULE = LESION_BY_KEY["lung_nodule"].bit
WIDTH = 48
REPORTS = ["The lungs are clear. The heart is enlarged.", "A nodule in the right upper lobe."]


@pytest.fixture(scope="module")
def prompts(tiny: Config) -> PromptEmbeddings:
    return PromptEmbeddings.from_text_encoder(
        pretrained.resolve_model(tiny.text.model), tiny.text.max_tokens
    )


@pytest.fixture(scope="module")
def batch(tiny: Config) -> Batch:
    """Two phantoms, everything known of the first.

    The second has no region map, and labels where it has no outlines.
    """
    made = collate_samples([phantom_sample(seed, tiny) for seed in (0, 3)])
    made.regions_known[1] = False
    made.lesions_annotated[1] = False
    return made


def learn(
    parameters: Iterable[Tensor], loss_of: Callable[[], Tensor], steps: int, rate: float
) -> float:
    """Adam for some steps, the rate falling to 0; the last loss."""
    trained = list(parameters)
    optimizer = torch.optim.Adam(trained, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps + 1, pct_start=0.1
    )
    loss = torch.zeros(())
    for _ in range(steps):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    return loss.item()


def test_encoder_and_classifier_learn_one_batch(tiny: Config, prompts: PromptEmbeddings) -> None:
    torch.manual_seed(0)
    four = collate_samples([phantom_sample(seed, tiny) for seed in range(4)])
    model = RectVLM(tiny, ("encoder", "classifier"), prompts)
    known = four.labels_known
    assert 0.1 < four.labels[known].mean() < 0.9

    def loss() -> Tensor:
        return compute_losses(
            model(four), four, ("classification",), tiny.train.localization_loss_weights
        )["classification"].value

    assert loss().item() > 0.4
    assert learn(model.parameters(), loss, 160, 5e-3) < 0.02


def small_case(
    grid: tuple[int, int, int], centre: tuple[int, int, int], other: tuple[int, int, int]
) -> Batch:
    """A lung of noise with a nodule of 3 × 3 × 3 voxels.

    Beside it is a vessel's cross-section that is as bright.
    """
    torch.manual_seed(0)
    ct = -850 + 40 * torch.randn(1, *grid)
    bits = torch.zeros(1, *grid, dtype=torch.uint8)
    for (z, y, x), half, is_nodule in ((centre, 1, True), (other, 0, False)):
        at = (0, slice(z - half, z + half + 1), slice(y - 1, y + 2), slice(x - 1, x + 2))
        at = at if is_nodule else (0, slice(None), *at[2:])  # a vessel runs through all slices
        ct[at] = 20 + 30 * torch.randn(ct[at].shape)
        if is_nodule:
            bits[at] = 1 << NODULE
    labels = torch.zeros(1, N_FINDINGS)
    return Batch(
        keys=["small"],
        ct=ct.round().to(torch.int16),
        lesions=bits,
        regions=torch.randint(0, N_REGIONS + 1, (1, *grid), dtype=torch.uint8),
        regions_known=torch.zeros(1, dtype=torch.bool),
        lesions_annotated=torch.ones(1, N_LESIONS, dtype=torch.bool),
        lesions_partial=torch.zeros(1, N_LESIONS, dtype=torch.bool),
        labels=labels,
        labels_known=torch.ones_like(labels, dtype=torch.bool),
        reports=[None],
        spacing=(2.0, 2.0, 2.0),
        metas=[],
    )


@pytest.mark.slow
def test_a_nodule_smaller_than_a_patch_is_drawn(tiny: Config, prompts: PromptEmbeddings) -> None:
    """27 voxels, a tenth of a patch; what is as bright but no nodule stays empty."""
    config = load_config("tiny", ["data.grid=[8, 32, 32]"])
    one = small_case((8, 32, 32), (4, 12, 20), (4, 22, 9))
    assert one.lesions.count_nonzero() == 27
    torch.manual_seed(0)
    model = RectVLM(config, ("encoder", "classifier", "localizer"), prompts)

    def loss() -> Tensor:
        return compute_losses(
            model(one), one, ("localization",), config.train.localization_loss_weights
        )["localization"].value

    learn(model.parameters(), loss, 100, 6e-3)
    with torch.no_grad():
        masks = model.eval()(one).localization.mask_logits > 0  # type: ignore[union-attr]
    truth = one.lesions.bool()
    dice = 2 * (masks[:, NODULE] & truth).sum() / (masks[:, NODULE].sum() + truth.sum())
    assert dice > 0.8
    assert not masks[:, :NODULE].any()


@pytest.mark.slow
def test_encoder_and_localizer_learn_one_batch(tiny: Config, prompts: PromptEmbeddings) -> None:
    torch.manual_seed(0)
    quiet = tiny.model_copy(update={"localizer": tiny.localizer.model_copy(update={"noise": 0.0})})
    one = collate_samples([phantom_sample(3, tiny)])
    model = RectVLM(quiet, ("encoder", "classifier", "localizer"), prompts)

    def loss() -> Tensor:
        return compute_losses(
            model(one), one, ("localization",), tiny.train.localization_loss_weights
        )["localization"].value

    first = loss().item()
    assert learn(model.parameters(), loss, 500, 6e-3) < 0.02 * first


def test_generator_learns_one_batch(tiny: Config) -> None:
    """In NF4: resampler and LoRA alone make a frozen language model write two reports.

    They are told apart by the image.
    """
    torch.manual_seed(0)
    settings = tiny.generator.model_copy(update={"lora_rank": 32, "lora_targets": "all-linear"})
    language = load_language_model(settings, pretrained.resolve_model(settings.model))
    generator = ReportGenerator(settings, WIDTH, language).train()
    whole, patches, regions = (torch.randn(2, *shape, WIDTH) for shape in ((), (12,), (N_REGIONS,)))
    image = ImageFeatures(whole, patches, regions, (3, 2, 2), patches)
    trained = [p for p in generator.parameters() if p.requires_grad]
    with torch.no_grad():
        # No hidden state makes the head of a random language model sure of a word: widen what it
        # reads.
        last = [
            p
            for name, p in generator.language_model.named_parameters()
            if name.endswith("model.norm.weight")
        ]
        last[0].mul_(20)

    def loss() -> Tensor:
        return generator(image, ["No findings suggested."] * 2, REPORTS).per_sample.mean()

    assert loss().item() > 3
    assert learn(trained, loss, 150, 5e-3) < 0.05
    generator.eval()
    with torch.no_grad():
        image = ImageFeatures(*(t.flip(0) if isinstance(t, Tensor) else t for t in image))
        assert loss().item() > 1  # the other image calls for the other report


def without_gradient(module: nn.Module) -> list[str]:
    """Trainable parameters that no gradient reached."""
    return [
        n
        for n, p in module.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any())
    ]


def test_the_gradient_reaches_every_trainable_parameter(
    tiny: Config, prompts: PromptEmbeddings, batch: Batch
) -> None:
    """All parts and tasks together, activations recomputed. LoRA's A gets one once B has left 0."""
    changes = [
        "encoder.activation_checkpointing=true",
        "localizer.activation_checkpointing=true",
        "encoder.tap_blocks=[1]",
    ]
    config = load_config("tiny", changes)
    torch.manual_seed(0)
    language = load_language_model(
        config.generator, pretrained.resolve_model(config.generator.model)
    )
    model = RectVLM(config, PHASES[3].parts, prompts, language).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    combine_losses(
        compute_losses(
            model(batch), batch, PHASES[3].tasks, config.train.localization_loss_weights
        ),
        config.train.loss_weights,
    ).backward()
    assert without_gradient(model) == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_batch_in_which_nothing_is_known_reaches_them_too(
    tiny: Config, prompts: PromptEmbeddings, batch: Batch
) -> None:
    """As zeros: what a rank does must not hang on what its batch holds."""
    nothing = replace(
        batch,
        labels_known=torch.zeros_like(batch.labels_known),
        lesions_annotated=torch.zeros_like(batch.lesions_annotated),
    )
    torch.manual_seed(0)
    model = RectVLM(tiny, ("encoder", "classifier", "localizer"), prompts).eval()
    found = compute_losses(
        model(nothing), nothing, PHASES[2].tasks, tiny.train.localization_loss_weights
    )
    assert all((loss.value, loss.count) == (0, 0) for loss in found.values())
    combine_losses(found, tiny.train.loss_weights).backward()
    # The head that gives clean features back runs in training alone.
    for name, p in model.named_parameters():
        assert name.startswith("localizer.denoiser.clean") or (
            p.grad is not None and not p.grad.any()
        ), name


@pytest.mark.slow
def test_labels_alone_teach_where_a_lesion_is(prompts: PromptEmbeddings) -> None:
    """Weak supervision: half of the patients, always new ones, have one patch unlike the rest.

    They have the label, too, but no one drew the patch. The localizer comes to point at it, and
    draws there sooner than elsewhere.
    """
    torch.manual_seed(0)
    config = load_config("tiny", ["data.grid=[8, 16, 32]", "localizer.noise=0"])
    localizer = LesionLocalizer(
        config.localizer, config.data, config.encoder, prompts.embedding_width
    )
    count, grid = 8, (2, 2, 4)
    sick = torch.arange(count) % 2 == 0
    sign = 2 * torch.randn(config.encoder.width)
    ct = torch.full((count, 8, 16, 32), -800, dtype=torch.int16)
    none = torch.zeros(count, N_LESIONS, dtype=torch.bool)
    known = none.clone()
    known[:, NODULE] = True
    labelled = LesionPresence(known & sick[:, None], known)
    anywhere = torch.ones_like(ct, dtype=torch.bool)
    outlines = torch.zeros_like(ct, dtype=torch.uint8)
    targets = LesionTargets(outlines, none, none, labelled, anywhere, voxel_ml=0.01)
    counts = TargetCounts(labels=0, lesions=count, reports=0, outlined=(0,) * N_LESIONS)

    def patients() -> tuple[ImageFeatures, Tensor]:
        patches = torch.randn(count, 16, config.encoder.width)
        where = torch.randint(0, 16, (count,))
        patches[sick, where[sick]] += sign
        return ImageFeatures(
            patches.mean(1), patches, patches[:, :1].expand(-1, N_REGIONS, -1), grid, patches
        ), where[sick]

    def loss() -> Tensor:
        found = localizer(ct, patients()[0], prompts)
        return localization_loss(
            found, targets, config.train.localization_loss_weights, counts
        ).value

    learn(localizer.parameters(), loss, 80, 5e-3)
    features, where = patients()
    with torch.no_grad():
        found = localizer.eval()(ct, features, prompts)
    marked = found.patch_logits[:, NODULE].flatten(1)
    assert torch.equal(marked[sick].argmax(1), where)
    assert marked[sick].amax(1).min() > marked[~sick].amax(1).max()
    assert (found.alignment_logits[sick, NODULE] > 0).all()
    assert (found.alignment_logits[~sick, NODULE] < 0).all()
    masks = (
        found.mask_logits[:, NODULE]
        .unflatten(3, (4, -1))
        .unflatten(2, (2, -1))
        .unflatten(1, (2, -1))
    )
    assert torch.equal(masks.mean((2, 4, 6)).flatten(1)[sick].argmax(1), where)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_trainable_tensor_moves_under_zero3(
    checkpointing: bool, phantom_shards: Path, tmp_path: Path
) -> None:
    """Two real processes.

    Without weight decay Adam moves what has a gradient and nothing else, by about its rate: by more
    than bfloat16 rounds away.
    """
    recompute = str(checkpointing).lower()
    shared = [
        *(
            "--config",
            "tiny",
            f"data.shards={phantom_shards}",
            f"train.runs={tmp_path}",
            "train.weight_decay=0",
        ),
        *("data.augment.probability=1", "data.augment.hide_regions=0.5", "encoder.tap_blocks=[1]"),
        *(
            f"encoder.activation_checkpointing={recompute}",
            f"localizer.activation_checkpointing={recompute}",
            "train.keep_checkpoints=9",
        ),
    ]
    for phase in (1, 2):
        run(
            [*TWO, f"launch/phase{phase}.py", *shared, *length(f"phase{phase}", 2)],
            tmp_path,
        )
    rates = ", ".join(f"{part}: 2.0e-2" for part in PHASES[3].parts)
    plan = ("warmup=0", "final_lr_ratio=1", f"lr={{{rates}}}")
    run(
        [
            *TWO,
            "launch/phase3.py",
            *shared,
            *length("phase3", 3, save_every=1),
            *(f"train.phases.phase3.{value}" for value in plan),
        ],
        tmp_path,
    )
    saved = run_folder.list_checkpoints(tmp_path / "tiny" / "phase3")
    assert [path.name for path in saved] == ["step-000001", "step-000002", "step-000003"]
    first, last = (Checkpoint.open(path).read_tensors() for path in (saved[0], saved[-1]))
    still = [
        name
        for name in first
        if not name.startswith("prompts.") and torch.equal(first[name], last[name])
    ]
    assert still == []
    assert any("lora_A" in name for name in first)
