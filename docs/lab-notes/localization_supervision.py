"""An experiment: what a localizer learns from CT-RATE's outlines, on phantoms with known truth.

    python docs/lab-notes/localization_supervision.py [--supervision ct-rate|complete]
        [--style plain] [--config tiny] [--cases 64] [--held-out 48] [--steps 500] [--seed 0]
        [part.field=value …]

It prints, of held-out cases, the
mean volume that is drawn where a lesion is absent and the mean Dice where it is present.
"""

import argparse
import random

import numpy as np
import torch

from data_pipeline.cases import case_to_sample
from data_pipeline.demo_cases import list_demo_cases
from rectvlm.config import Config, load_config
from rectvlm.data.dataset import collate_samples
from rectvlm.labels import LESIONS
from rectvlm.metrics.lesion_overlap import count_lesion_voxels
from rectvlm.models import RectVLM
from rectvlm.models.prompt_embeddings import PromptEmbeddings
from rectvlm.phantom.patient_plan import PLAIN_STYLE
from rectvlm.pretrained import resolve_model
from rectvlm.train.objectives import combine_losses, compute_losses
from rectvlm.types import Batch, Sample


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
    parser.add_argument("--style", default=PLAIN_STYLE.name)
    parser.add_argument("--config", default="tiny")
    parser.add_argument("--cases", type=int, default=64)
    parser.add_argument("--held-out", type=int, default=48)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    cases = list_demo_cases(
        options.cases, options.held_out, None, options.style, options.supervision
    )
    samples = [case_to_sample(case, config.data.grid, config.data.spacing) for case in cases]
    held_out = samples[options.cases :]
    samples = samples[: options.cases]
    measure(train(config, samples, options.steps, options.seed), held_out)


if __name__ == "__main__":
    main()
