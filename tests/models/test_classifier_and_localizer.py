"""Classifier and localizer: gradients reach everything, text and image decide, noise only in
training."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from rectvlm import pretrained
from rectvlm.config import Config
from rectvlm.data.dataset import ShardDataset, collate_samples
from rectvlm.labels import FINDINGS, LESION_BY_KEY, N_FINDINGS, N_LESIONS
from rectvlm.models import RectVLM
from rectvlm.models.attention_unet import LesionMatch, level_strides
from rectvlm.models.image_features import ImageFeatures
from rectvlm.models.localizer import LesionLocalizer, PatchDenoiser, VolumesToFindings
from rectvlm.models.prompt_embeddings import PromptEmbeddings, embed_texts
from rectvlm.models.tissue_patches import pack_all, pack_patches
from rectvlm.train.objectives import combine_losses, compute_losses
from rectvlm.types import Batch


@pytest.fixture(scope="module")
def prompts(tiny: Config) -> PromptEmbeddings:
    return PromptEmbeddings.from_text_encoder(
        pretrained.resolve_model(tiny.text.model), tiny.text.max_tokens
    )


@pytest.fixture(scope="module")
def batch(tiny: Config, phantom_shards: object) -> Batch:
    """Two phantoms, the second without a region map."""
    data = tiny.data.model_copy(update={"shards": str(phantom_shards)})
    dataset = ShardDataset(data, "train")
    made = collate_samples([dataset[0], dataset[1]])
    made.regions_known[1] = False
    return made


@pytest.fixture
def model(tiny: Config, prompts: PromptEmbeddings) -> RectVLM:
    torch.manual_seed(0)
    return RectVLM(tiny, ("encoder", "classifier", "localizer"), prompts)


def without_gradient(module: nn.Module) -> Iterator[str]:
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any()):
            yield name


def swapped(
    prompts: PromptEmbeddings, lesion_order: list[int], finding_order: list[int]
) -> PromptEmbeddings:
    return PromptEmbeddings(
        prompts.present[finding_order], prompts.absent[finding_order], prompts.lesions[lesion_order]
    )


def test_gradients_reach_every_parameter(model: RectVLM, batch: Batch, tiny: Config) -> None:
    losses = compute_losses(
        model(batch),
        batch,
        ("classification", "localization"),
        tiny.train.localization_loss_weights,
    )
    combine_losses(losses, tiny.train.loss_weights).backward()
    assert list(without_gradient(model)) == []


def test_classification_alone_reaches_encoder_and_classifier(
    tiny: Config, prompts: PromptEmbeddings, batch: Batch
) -> None:
    torch.manual_seed(0)
    model = RectVLM(tiny, ("encoder", "classifier"), prompts)
    compute_losses(model(batch), batch, ("classification",), tiny.train.localization_loss_weights)[
        "classification"
    ].value.backward()
    assert list(without_gradient(model)) == []


def test_prompts_are_frozen_and_differ(prompts: PromptEmbeddings) -> None:
    assert not list(prompts.parameters())
    for embeddings in (prompts.present, prompts.absent, prompts.lesions):
        assert not embeddings.requires_grad
        assert embeddings.isfinite().all()
        assert torch.cdist(embeddings, embeddings).add(torch.eye(len(embeddings)) * 9).min() > 1e-2
    assert prompts.present.shape == prompts.absent.shape == (N_FINDINGS, prompts.embedding_width)
    assert prompts.lesions.shape == (N_LESIONS, prompts.embedding_width)
    assert (prompts.present - prompts.absent).abs().amax(1).min() > 1e-4


def test_padding_does_not_change_an_embedding(tiny: Config) -> None:
    folder = pretrained.resolve_model(tiny.text.model)
    short = "The chest CT shows emphysema."
    alone = embed_texts(folder, [short], 64)
    beside = embed_texts(
        folder,
        [short, "There is no evidence of the lungs are clear. The heart is enlarged. " * 2],
        64,
    )
    torch.testing.assert_close(alone[0], beside[0], rtol=1e-5, atol=1e-5)


def test_findings_depend_on_image_and_prompt(
    model: RectVLM, batch: Batch, prompts: PromptEmbeddings
) -> None:
    model.eval()
    with torch.no_grad():
        features = model.encoder(batch.ct, batch.regions, batch.regions_known)
        logits = model.classifier(features, prompts)
        assert logits.shape == (2, N_FINDINGS)
        assert logits.dtype == torch.float32
        assert (logits[0] - logits[1]).abs().max() > 1e-4
        order = [1, 0, *range(2, N_FINDINGS)]
        swapped_logits = model.classifier(features, swapped(prompts, list(range(N_LESIONS)), order))
    assert (swapped_logits - logits)[:, :2].abs().min() > 0
    torch.testing.assert_close(
        swapped_logits[:, 2:], logits[:, 2:]
    )  # a finding reads its own prompt alone


def test_the_text_decides_the_first_directions_and_findings_differ(
    model: RectVLM, prompts: PromptEmbeddings
) -> None:
    """What all prompts share, above all the word "no", tells no finding from another."""
    difference = prompts.present - prompts.absent
    with torch.no_grad():
        directions = model.classifier.finding_directions(prompts)
        text = model.classifier.text(difference - difference.mean(0))
        lesion_text = model.localizer.text(prompts.lesions + model.localizer.text_offset)
        assert torch.equal(lesion_text, model.localizer.text(prompts.lesions))
    assert torch.cosine_similarity(directions, text).min() > 0.9
    unit = nn.functional.normalize(directions, dim=1)
    cosines = (unit @ unit.T)[~torch.eye(N_FINDINGS, dtype=torch.bool)]
    assert cosines.mean() < 0.1 and cosines.max() < 0.99


def test_localization_shapes(model: RectVLM, batch: Batch, tiny: Config) -> None:
    outputs = model(batch).localization
    assert outputs is not None
    z, y, x = tiny.data.grid
    assert outputs.mask_logits.shape == (2, N_LESIONS, z, y, x)
    assert outputs.half_mask_logits.shape == (2, N_LESIONS, z, y // 2, x // 2)
    assert outputs.patch_logits.shape == (2, N_LESIONS, 4, 6, 6)
    assert {
        outputs.mask_logits.dtype,
        outputs.half_mask_logits.dtype,
        outputs.patch_logits.dtype,
    } == {torch.float32}


@pytest.mark.parametrize(
    ("patch", "wanted"),
    [
        ((4, 8, 8), [(1, 2, 2), (2, 2, 2), (2, 2, 2)]),
        ((4, 16, 16), [(1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2)]),
        ((8, 8, 8), [(2, 2, 2)] * 3),
        ((8, 4, 4), [(2, 1, 1), (2, 2, 2), (2, 2, 2)]),
    ],
)
def test_level_strides(patch: tuple[int, int, int], wanted: list[tuple[int, int, int]]) -> None:
    assert level_strides(patch) == wanted


def test_a_match_is_scaled_by_the_root_of_the_channels() -> None:
    torch.manual_seed(0)
    match = LesionMatch(channels=4, text_width=4)
    nn.init.eye_(match.query.weight)
    nn.init.zeros_(match.query.bias)
    features, tokens = torch.randn(2, 4, 2, 3, 3), torch.randn(2, N_LESIONS, 4)
    wanted = torch.einsum("blc,bczyx->blzyx", tokens, features) / 2
    torch.testing.assert_close(match(features, tokens), wanted)


def test_the_smallest_nodule_that_counts_moves_its_logit_by_a_little() -> None:
    mask_logits = torch.full((2, N_LESIONS, 3, 9, 10), -50.0)
    nodule = LESION_BY_KEY["lung_nodule"].bit
    mask_logits[1, nodule] = 50.0  # 270 voxels of 1 mm³
    without, with_nodule = VolumesToFindings((1.0, 1.0, 1.0))(mask_logits)
    wanted = torch.zeros(N_FINDINGS)
    wanted[FINDINGS.index("Lung nodule")] = math.log(0.57 / 0.3)
    torch.testing.assert_close(with_nodule - without, wanted)


def make_denoiser(tiny: Config, noise: float) -> PatchDenoiser:
    torch.manual_seed(0)
    config = tiny.localizer.model_copy(update={"noise": noise})
    return PatchDenoiser(config, image_width=16, levels=1).train()


def test_the_noise_of_a_case_does_not_depend_on_its_neighbour(tiny: Config) -> None:
    denoiser = make_denoiser(tiny, noise=0.5)
    patches, text = torch.randn(2, 32, 16), torch.randn(2, N_LESIONS, tiny.localizer.width)
    found = []
    for scale in (1.0, 10.0):
        levels = patches * torch.tensor([1.0, scale]).view(2, 1, 1)
        torch.manual_seed(1)
        found.append(denoiser(levels, levels, text, pack_all(levels)).patches)
    torch.testing.assert_close(found[0][0], found[1][0])
    assert not torch.allclose(found[0][1], found[1][1])


def test_samples_weigh_the_same_in_denoising_whatever_their_tissue(tiny: Config) -> None:
    denoiser = make_denoiser(tiny, noise=0.0)
    patches, text = torch.randn(2, 64, 16), torch.randn(2, N_LESIONS, tiny.localizer.width)
    patches[0] *= 3
    is_tissue = torch.arange(64) < torch.tensor([[16], [64]])

    def loss(rows: slice) -> Tensor:
        levels, tissue = patches[rows], pack_patches(is_tissue[rows])
        return denoiser(levels, levels, text[rows], tissue).denoising_loss

    alone = [loss(slice(0, 1)), loss(slice(1, 2))]
    torch.testing.assert_close(loss(slice(0, 2)), (alone[0] + alone[1]) / 2)


def test_noise_only_in_training(model: RectVLM, batch: Batch) -> None:
    def masks() -> torch.Tensor:
        with torch.no_grad():
            outputs = model(batch).localization
        assert outputs is not None
        noisy.append(outputs.denoising_loss.item())
        return outputs.mask_logits

    noisy: list[float] = []
    model.train()
    assert not torch.equal(masks(), masks())
    assert min(noisy) > 0
    model.eval()
    noisy.clear()
    assert torch.equal(masks(), masks())
    assert noisy == [0, 0]


def test_no_noise_when_the_configuration_says_so(
    tiny: Config, prompts: PromptEmbeddings, batch: Batch
) -> None:
    config = tiny.model_copy(update={"localizer": tiny.localizer.model_copy(update={"noise": 0.0})})
    torch.manual_seed(0)
    model = RectVLM(config, ("encoder", "classifier", "localizer"), prompts).train()
    with torch.no_grad():
        first, second = model(batch).localization, model(batch).localization
    assert first is not None
    assert second is not None
    assert torch.equal(first.mask_logits, second.mask_logits)


@pytest.mark.parametrize("resolution", ["mask_logits", "half_mask_logits", "patch_logits"])
def test_another_prompt_draws_another_mask(
    model: RectVLM, batch: Batch, prompts: PromptEmbeddings, resolution: str
) -> None:
    assert model.localizer is not None
    model.eval()
    order = [1, 0, 2, 3, 4]
    with torch.no_grad():
        features = model.encoder(batch.ct, batch.regions, batch.regions_known)
        logits = getattr(model.localizer(batch.ct, features, prompts), resolution)
        swapped_logits = getattr(
            model.localizer(batch.ct, features, swapped(prompts, order, list(range(N_FINDINGS)))),
            resolution,
        )
    assert (logits - swapped_logits)[:, :2].abs().amax(dim=(2, 3, 4)).min() > 1e-5


def test_masks_read_the_ct_at_full_resolution(
    model: RectVLM, batch: Batch, prompts: PromptEmbeddings
) -> None:
    """With the encoder's features held fixed, one changed voxel changes the mask around it."""
    assert model.localizer is not None
    model.eval()
    changed = batch.ct.clone()
    changed[:, 8, 24, 24] += 300
    with torch.no_grad():
        features = model.encoder(batch.ct, batch.regions, batch.regions_known)
        before = model.localizer(batch.ct, features, prompts).mask_logits
        after = model.localizer(changed, features, prompts).mask_logits
    moved = (before - after).abs()[0].amax(0)
    assert moved.max() > 1e-6
    assert moved.argmax() in [moved.flatten().topk(27).indices[k] for k in range(27)]
    z, y, x = torch.unravel_index(moved.argmax(), moved.shape)
    assert max(abs(z - 8), abs(y - 24), abs(x - 24)) <= 4


def test_masks_read_the_features(model: RectVLM, batch: Batch, prompts: PromptEmbeddings) -> None:
    assert model.localizer is not None
    model.eval()
    with torch.no_grad():
        features = model.encoder(batch.ct, batch.regions, batch.regions_known)
        flipped = features._replace(
            patches=features.patches.flip(1), multilevel_patches=features.multilevel_patches.flip(1)
        )
        before, after = (
            model.localizer(batch.ct, f, prompts).mask_logits for f in (features, flipped)
        )
    assert (before - after).abs().max() > 1e-4


def test_recomputing_changes_nothing(tiny: Config, prompts: PromptEmbeddings, batch: Batch) -> None:
    """Outputs and gradients with and without activation checkpointing."""
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        localizer_config = tiny.localizer.model_copy(
            update={"activation_checkpointing": checkpointing}
        )
        localizer = LesionLocalizer(
            localizer_config, tiny.data, tiny.encoder, prompts.embedding_width
        )
        torch.manual_seed(1)
        patches = torch.randn(2, 144, 48)
        features = ImageFeatures(
            torch.randn(2, 48), patches, torch.randn(2, 20, 48), (4, 6, 6), patches
        )
        out = localizer(batch.ct, features, prompts)
        (
            out.mask_logits.square().mean()
            + out.half_mask_logits.square().mean()
            + out.patch_logits.square().mean()
            + out.denoising_loss
        ).backward()
        assert out.recompute is checkpointing
        tensors = list(out._replace(recompute=False))
        results.append((tensors, [p.grad for p in localizer.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_compiles_to_the_same(
    tiny: Config, prompts: PromptEmbeddings, batch: Batch, checkpointing: bool
) -> None:
    """Traced whole; eager kernels below it, so that no compiler is needed."""
    torch._dynamo.reset()
    changed = tiny.localizer.model_copy(
        update={"activation_checkpointing": checkpointing, "noise": 0.0}
    )
    torch.manual_seed(0)
    localizer = LesionLocalizer(changed, tiny.data, tiny.encoder, prompts.embedding_width)
    patches = torch.randn(2, 144, 48)
    features = ImageFeatures(
        torch.randn(2, 48), patches, torch.randn(2, 20, 48), (4, 6, 6), patches
    )
    results = []
    for run in (localizer, torch.compile(localizer, backend="aot_eager", fullgraph=True)):
        localizer.zero_grad()
        out = run(batch.ct, features, prompts)
        (
            out.mask_logits.square().mean()
            + out.half_mask_logits.mean()
            + out.patch_logits.mean()
            + out.alignment_logits.mean()
            + out[4]
        ).backward()
        results.append((list(out), [p.grad for p in localizer.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_the_localizer_is_named(
    model: RectVLM, batch: Batch, prompts: PromptEmbeddings
) -> None:
    assert model.localizer is not None
    with torch.no_grad():
        right = model.encoder(batch.ct, batch.regions, batch.regions_known)
    few = PromptEmbeddings(prompts.present, prompts.absent, prompts.lesions[:3])
    for ct, features, asked, fragment in (
        (batch.ct[0], right, prompts, r"\(B, Z, Y, X\)"),
        (batch.ct[:, :8], right, prompts, "belong to a CT of"),
        (batch.ct, right._replace(patch_grid=(4, 6, 5)), prompts, "belong to a CT of"),
        (batch.ct[:1], right, prompts, "features.patches must be of shape"),
        (
            batch.ct,
            right._replace(multilevel_patches=right.multilevel_patches[..., 1:]),
            prompts,
            "features.multilevel_patches must be of shape",
        ),
        (batch.ct, right, few, "lesion prompts must be of shape"),
        (
            batch.ct,
            right._replace(patches=right.patches.bfloat16()),
            prompts,
            "features must be torch.float32",
        ),
        (batch.ct.to("meta"), right, prompts, "must be on cpu"),
    ):
        with pytest.raises(AssertionError, match=fragment):
            model.localizer(ct, features, asked)


def test_training_keeps_little(tiny: Config, prompts: PromptEmbeddings, batch: Batch) -> None:
    """With checkpointing, what the forward pass leaves for the backward pass is the skips and
    little else."""

    def kept(checkpointing: bool) -> int:
        changed = tiny.localizer.model_copy(update={"activation_checkpointing": checkpointing})
        localizer = LesionLocalizer(changed, tiny.data, tiny.encoder, prompts.embedding_width)
        patches = torch.randn(2, 144, 48)
        features = ImageFeatures(
            torch.randn(2, 48), patches, torch.randn(2, 20, 48), (4, 6, 6), patches
        )
        parameter_storages = {p.untyped_storage().data_ptr() for p in localizer.parameters()}
        found: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameter_storages:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = localizer(batch.ct, features, prompts)
        del out
        return sum(found.values())

    assert kept(True) < 0.25 * kept(False)


def test_predict_refuses_training_mode(model: RectVLM, batch: Batch) -> None:
    with pytest.raises(AssertionError, match="eval"):
        model.train().predict_batch(batch)


def test_predict_gives_probabilities_and_the_ablation_forgets_the_image(
    model: RectVLM, batch: Batch
) -> None:
    model.eval()
    seen, blind = model.predict_batch(batch), model.predict_batch(batch, ablate_image=True)
    for prediction in (seen, blind):
        assert prediction.reports is None
        for values in (prediction.finding_probabilities, prediction.lesion_probabilities):
            assert ((values >= 0) & (values < 1)).all()
    assert not torch.allclose(seen.finding_probabilities[0], seen.finding_probabilities[1])
    assert torch.allclose(blind.finding_probabilities[0], blind.finding_probabilities[1])
    assert torch.allclose(blind.lesion_probabilities[0], blind.lesion_probabilities[1], atol=1e-6)
