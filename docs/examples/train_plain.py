"""Phases 1 and 2 in plain PyTorch: the method in one file, with the real modules and shards.

    python docs/examples/train_plain.py [--config demo] [--steps N] [--out FILE] [part.field=value]

It reads the shards of `make preprocess`. Phase 1 trains encoder and classifier on the labels of 18
findings. Phase 2 adds the localizer and trains all three, on labels and on masks of 5 lesions. Both
are scored on the valid split.

The engine of `rectvlm.train` adds what large runs need: several ranks and ZeRO, bf16, gradient
accumulation, checkpoints and resuming, moving averages, late unfreezing, learned loss weights,
skipped bad steps, and phase 3 with a 4-bit language model.
"""

import argparse
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from rectvlm.config import Config, PhaseConfig, load_config
from rectvlm.data.augment import augment_batch
from rectvlm.data.loader import build_eval_loader, build_train_loader
from rectvlm.labels import N_FINDINGS
from rectvlm.metrics.findings import score_findings
from rectvlm.metrics.lesion_overlap import count_lesion_voxels, score_lesion_overlap
from rectvlm.models import RectVLM
from rectvlm.models.prompt_embeddings import PromptEmbeddings
from rectvlm.pretrained import resolve_model
from rectvlm.train.objectives import combine_losses, compute_losses
from rectvlm.train.optimizer import find_decayed_parameters
from rectvlm.train.phases import PHASES, Phase
from rectvlm.train.starting_weights import set_label_prior

log = logging.getLogger("train_plain")


def build_model(config: Config, phase: Phase, trained: dict[str, Tensor]) -> RectVLM:
    """The parts of a phase, with the weights that an earlier phase has trained."""
    # A frozen text encoder embeds "The chest CT shows …" once; it is not needed afterwards.
    text_encoder = resolve_model(config.text.model)
    prompts = PromptEmbeddings.from_text_encoder(text_encoder, config.text.max_tokens)
    model = RectVLM(config, phase.parts, prompts)
    missing, unexpected = model.load_state_dict(trained, strict=False)
    assert not unexpected, unexpected
    assert not trained or all(name.startswith("localizer.") for name in missing), missing
    return model


def build_optimizer(model: RectVLM, config: Config, settings: PhaseConfig) -> torch.optim.AdamW:
    """AdamW with a learning rate for each part; only weights of layers have weight decay."""
    groups = []
    for part, peak in settings.lr.items():
        module = getattr(model, part)
        decayed_names = find_decayed_parameters(module)
        decayed, others = [], []
        for name, parameter in module.named_parameters():
            (decayed if name in decayed_names else others).append(parameter)
        decay = config.train.weight_decay
        groups.append({"params": decayed, "weight_decay": decay, "peak": peak})
        groups.append({"params": others, "weight_decay": 0.0, "peak": peak})
    return torch.optim.AdamW(groups, betas=config.train.betas)


def learning_rate_factor(step: int, steps: int, settings: PhaseConfig) -> float:
    """Share of the peak learning rate: linear warm-up, then a cosine to `final_lr_ratio`."""
    warmup = round(settings.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup - 1)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return settings.final_lr_ratio + (1 - settings.final_lr_ratio) * cosine


def train_phase(
    config: Config, phase: Phase, steps: int | None, trained: dict[str, Tensor], device: str
) -> RectVLM:
    """Train the parts of a phase on endless, augmented batches."""
    settings = phase.get_settings(config)
    steps = steps or math.ceil(settings.samples / settings.global_batch)
    torch.manual_seed(config.train.seed)
    # Rank 0 of 1: the order of the samples is a function of the seed and the epoch alone.
    loader = build_train_loader(config.data, settings.global_batch, 0, 1, config.train.seed)
    model = build_model(config, phase, trained).to(device).train()
    if config.encoder.atlas_cases and not trained:
        cases = range(min(config.encoder.atlas_cases, len(loader.dataset)))
        model.encoder.fit_atlas(torch.from_numpy(loader.dataset[case].ct) for case in cases)
    if not trained:
        set_label_prior(model, config.data.shards)
    optimizer = build_optimizer(model, config, settings)

    for step, samples in zip(range(steps), loader, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate_factor(step, steps, settings)
        batch = augment_batch(samples.to(device), config.data.augment)
        outputs = model(batch)
        # Each loss is a mean over what is known: an unknown label or a lesion that no one
        # annotated is not negative.
        losses = compute_losses(outputs, batch, phase.tasks, config.train.localization_loss_weights)
        loss = combine_losses(losses, config.train.loss_weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == steps - 1:
            log.info(
                "phase %d step %d of %d: loss %.4f", phase.number, step + 1, steps, loss.item()
            )
    return model


def score_model(model: RectVLM, config: Config, device: str) -> dict[str, float | None]:
    """Macro AUROC of the findings and mean Dice of the lesions over the valid split."""
    model.eval()
    probabilities, labels, known, overlaps, annotated = [], [], [], [], []
    for samples in build_eval_loader(config.data, "valid", batch_size=1):
        prediction = model.predict_batch(samples.to(device), generate=False)
        masks = (prediction.lesion_probabilities[0] >= 0.5).cpu().numpy()
        probabilities.append(prediction.finding_probabilities[0].cpu().numpy())
        labels.append(samples.labels[0].numpy())
        known.append(samples.labels_known[0].numpy())
        overlaps.append(count_lesion_voxels(masks, samples.lesions[0].numpy()))
        annotated.append(samples.lesions_annotated[0].numpy())
    thresholds = np.full(N_FINDINGS, 0.5)
    findings = score_findings(
        np.stack(probabilities), np.stack(labels), np.stack(known), thresholds
    )
    lesions = score_lesion_overlap(np.stack(overlaps), np.stack(annotated))
    return {"macro_auroc": findings["macro"]["auroc"], "mean_dice": lesions["macro"]["dice"]}


def main(argv: Sequence[str] | None = None) -> dict[str, float | None]:
    """Train phases 1 and 2, and return the scores of the second."""
    parser = argparse.ArgumentParser(description="Phases 1 and 2 in plain PyTorch.")
    parser.add_argument("--config", default="demo", help="name or path of a configuration")
    parser.add_argument("--steps", type=int, help="steps of each phase (default: as configured)")
    parser.add_argument("--out", type=Path, help="safetensors file for the trained weights")
    parser.add_argument("overrides", nargs="*", metavar="part.field=value")
    options = parser.parse_args(argv)
    config = load_config(options.config, options.overrides)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    trained: dict[str, Tensor] = {}
    scores: dict[str, float | None] = {}
    for number in (1, 2):
        model = train_phase(config, PHASES[number], options.steps, trained, device)
        trained = model.state_dict()
        scores = score_model(model, config, device)
        log.info("phase %d on the valid split: %s", number, scores)
    if options.out:
        save_file(trained, options.out)
    return scores


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
