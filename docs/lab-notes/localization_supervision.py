"""An experiment: what a localizer learns from CT-RATE's outlines, on phantoms with known truth.

    python docs/lab-notes/localization_supervision.py [--supervision ct-rate|complete]
        [--cases 64] [--steps 500] [--seed 0] [part.field=value …]

Phantoms of the style `plain` at the size `tiny`. With `ct-rate`, consolidation and ground glass are
outlined in part in 13% of the cases and not at all in the others. It prints, of held-out cases, the
mean volume that is drawn where a lesion is absent and the mean Dice where it is present.
"""

import argparse
import random
from dataclasses import replace

import numpy as np
import torch
from scipy import ndimage

from rectvlm.config import Config, load_config
from rectvlm.data.canonical_grid import canonical_affine, resample_to_grid
from rectvlm.data.dataset import collate_samples
from rectvlm.data.hounsfield import to_hu
from rectvlm.labels import LESIONS
from rectvlm.lesion_bits import lesion_mask
from rectvlm.metrics.lesion_overlap import count_lesion_voxels
from rectvlm.models import RectVLM
from rectvlm.models.prompt_embeddings import PromptEmbeddings
from rectvlm.phantom.patient_plan import PLAIN_STYLE
from rectvlm.phantom.phantom import make_phantom
from rectvlm.pretrained import resolve_model
from rectvlm.train.objectives import combine_losses, compute_losses
from rectvlm.types import Batch, GridGeometry, Sample, SampleMeta, Volume

DRAWN_SHARE = 0.13
MAX_INSTANCES = 3
RARELY_DRAWN = ("consolidation", "ground_glass_opacity")
HELD_OUT_SEED = 100_000


def make_sample(seed: int, config: Config) -> Sample:
    """The phantom of a seed on the grid of a configuration, all lesions outlined."""
    phantom = make_phantom(seed, PLAIN_STYLE)
    grid, spacing, affine = config.data.grid, config.data.spacing, phantom.affine
    hu, decision = to_hu(Volume(phantom.hu, affine, f"phantom {seed}"))
    shape = (hu.shape[0], hu.shape[1], hu.shape[2])
    grid_affine = canonical_affine(affine, shape, hu, grid, spacing)
    meta = SampleMeta(
        key=f"phantom_{seed}",
        split="train",
        source=f"phantom {seed}",
        patient=f"phantom_{seed}",
        scan=f"phantom_{seed}",
        labels=phantom.labels,
        findings=phantom.findings,
        impression=phantom.impression,
        spacing=spacing,
        geometry=GridGeometry(grid_affine.tolist(), shape, affine.tolist()),
        hu=decision,
        lesions_annotated=phantom.lesions_annotated,
        regions_source="phantom",
    )
    return Sample(
        ct=resample_to_grid(hu, affine, grid_affine, grid, "ct"),
        lesions=resample_to_grid(phantom.lesions, affine, grid_affine, grid, "bits"),
        regions=resample_to_grid(phantom.regions, affine, grid_affine, grid, "labels"),
        meta=meta,
    )


def degrade(sample: Sample, is_drawn: bool) -> Sample:
    """Keep at most a few instances of the lesions that CT-RATE rarely outlines, or none."""
    lesions = sample.lesions.copy()
    annotated = dict(sample.meta.lesions_annotated)
    partial = dict.fromkeys(annotated, False)
    for lesion in LESIONS:
        if lesion.key not in RARELY_DRAWN:
            continue
        instances, _ = ndimage.label(lesion_mask(sample.lesions, lesion))
        kept = (instances > 0) & (instances <= MAX_INSTANCES) & is_drawn
        lesions[~kept] &= ~np.uint8(lesion.mask_value)
        partial[lesion.key] = is_drawn and annotated[lesion.key]
        annotated[lesion.key] = False
    meta = replace(sample.meta, lesions_annotated=annotated, lesions_partial=partial)
    return replace(sample, lesions=lesions, meta=meta)


def train(config: Config, samples: list[Sample], steps: int, seed: int) -> RectVLM:
    """Train encoder, classifier and localizer together."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    prompts = PromptEmbeddings.from_text_encoder(
        resolve_model(config.text.model), config.text.max_tokens
    )
    model = RectVLM(config, ("encoder", "classifier", "localizer"), prompts).train()
    if config.encoder.atlas_cases:
        model.encoder.fit_atlas(torch.from_numpy(sample.ct) for sample in samples[:64])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps + 1, pct_start=0.1)
    for step in range(steps):
        batch = collate_samples(draw.sample(samples, 4))
        tasks = ("classification", "localization")
        losses = compute_losses(model(batch), batch, tasks, config.train.localization_loss_weights)
        loss = combine_losses(losses, config.train.loss_weights)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            words = ", ".join(f"{task} {value.value:.3f}" for task, value in losses.items())
            print(f"step {step + 1}: {words}", flush=True)  # noqa: T201
    return model.eval()


@torch.no_grad()
def measure(model: RectVLM, samples: list[Sample]) -> None:
    """Print volumes and Dice by lesion."""
    voxel_ml = float(np.prod(model.config.data.spacing)) / 1000
    counts, annotated = [], []
    for sample in samples:
        batch: Batch = collate_samples([sample])
        drawn = model.predict_batch(batch, generate=False).lesion_probabilities[0] >= 0.5
        counts.append(count_lesion_voxels(drawn.numpy(), sample.lesions))
        annotated.append(batch.lesions_annotated[0].numpy())
    for lesion in LESIONS:
        rows = np.stack(
            [c[lesion.bit] for c, a in zip(counts, annotated, strict=True) if a[lesion.bit]]
        )
        healthy, sick = rows[rows[:, 2] == 0], rows[rows[:, 2] > 0]
        dice = 2 * sick[:, 0] / (sick[:, 1] + sick[:, 2])
        print(  # noqa: T201
            f"{lesion.key:22} absent in {len(healthy)}: {voxel_ml * healthy[:, 1].mean():8.1f} ml "
            f"(largest {voxel_ml * healthy[:, 1].max():.1f}, drawn in "
            f"{(healthy[:, 1] > 0).sum()}); present in {len(sick)}: Dice {dice.mean():.3f}, "
            f"{voxel_ml * sick[:, 1].mean():.0f} of {voxel_ml * sick[:, 2].mean():.0f} ml"
        )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--supervision", choices=("ct-rate", "complete"), default="ct-rate")
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--cases", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=48)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    samples = [make_sample(seed, config) for seed in range(options.cases)]
    held_out = [make_sample(HELD_OUT_SEED + seed, config) for seed in range(options.held_out)]
    if options.supervision == "ct-rate":
        draw = random.Random(options.seed)
        samples = [degrade(sample, draw.random() < DRAWN_SHARE) for sample in samples]
    measure(train(config, samples, options.steps, options.seed), held_out)


if __name__ == "__main__":
    main()
