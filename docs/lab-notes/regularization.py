"""An experiment: what keeps a classifier that is trained for long from learning its labels' noise.

    python docs/lab-notes/regularization.py [--config learn] [--cases 240] [--held-out 200]
        [--steps 900] [--seeds 0 1 2] [--methods plain ema drop-path …] [part.field=value …]

Encoder and classifier learn phantoms under CT-RATE's supervision: its prevalences, 4% of the labels
wrong, each case seen 30 times. Held-out labels are true. It prints the macro AUROC, the macro
average precision and the macro F1 at thresholds fitted to one half of the held-out cases and
measured on the other.
"""

import argparse
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from data_pipeline.cases import case_to_sample
from data_pipeline.demo_cases import list_demo_cases
from rectvlm.config import Config, load_config
from rectvlm.data.dataset import collate_samples
from rectvlm.labels import N_FINDINGS
from rectvlm.metrics.findings import fit_thresholds, score_findings
from rectvlm.models import RectVLM
from rectvlm.models.prompt_embeddings import PromptEmbeddings
from rectvlm.pretrained import resolve_model
from rectvlm.types import Batch, Sample

METHODS = ("plain", "ema", "drop-path", "layer-decay", "rare-weights", "asymmetric", "ema+drop")
EMA_DECAY = 0.99
DROP_PATH = 0.2
LAYER_DECAY = 0.65
"""Factor of the rate from one block to the one before (Bao et al., 2022, "BEiT")."""
ASYMMETRIC_GAMMA, ASYMMETRIC_MARGIN = 4.0, 0.05
"""Of the negatives (Ridnik et al., 2021, "Asymmetric loss for multi-label classification")."""


def drop_residual_branches(blocks: nn.ModuleList) -> None:
    """Leave out what a block adds to the stream, for some samples; later blocks more often."""
    last = max(1, len(blocks) - 1)
    for number, block in enumerate(blocks):
        rate = DROP_PATH * number / last if len(blocks) > 1 else DROP_PATH

        def hook(module: nn.Module, inputs: tuple, outputs: tuple, rate: float = rate) -> tuple:
            if not module.training or rate == 0:
                return outputs
            kept = torch.rand(len(outputs[0]), 1, 1) >= rate
            scale = kept / (1 - rate)
            return tuple(
                before + scale * (after - before)
                for before, after in zip(inputs[:2], outputs, strict=True)
            )

        block.register_forward_hook(hook)


def group_by_depth(model: RectVLM, rate: float) -> list[dict]:
    """Parameter groups whose rates fall from the encoder's end to its beginning."""
    depth = len(model.encoder.blocks)
    rates_by_depth: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        words = name.split(".")
        if words[0] != "encoder" or words[1] == "norm":
            distance = 0
        elif words[1] == "blocks":
            distance = depth - int(words[2])
        else:
            distance = depth + 1
        rates_by_depth.setdefault(rate * LAYER_DECAY**distance, []).append(parameter)
    return [{"params": params, "lr": rate} for rate, params in rates_by_depth.items()]


def compute_loss(method: str, logits: Tensor, batch: Batch, prevalence: Tensor) -> Tensor:
    """Mean loss of the known labels."""
    labels, known = batch.labels, batch.labels_known
    loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    if method == "rare-weights":  # the square root of the odds, at most 5
        weight = ((1 - prevalence) / prevalence).sqrt().clamp(1, 5)
        loss = loss * torch.where(labels > 0, weight, 1.0)
    if method == "asymmetric":
        shifted = (logits.sigmoid() - ASYMMETRIC_MARGIN).clamp(min=0)
        negative = -(shifted**ASYMMETRIC_GAMMA) * torch.log1p(-shifted)
        loss = torch.where(labels > 0, loss, negative)
    return loss[known].mean()


def train(config: Config, samples: list[Sample], method: str, steps: int, seed: int) -> RectVLM:
    """Train encoder and classifier; the averaged weights where a method keeps some."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    prompts = PromptEmbeddings.from_text_encoder(
        resolve_model(config.text.model), config.text.max_tokens
    )
    model = RectVLM(config, ("encoder", "classifier"), prompts).train()
    if config.encoder.atlas_cases:
        model.encoder.fit_atlas(torch.from_numpy(sample.ct) for sample in samples[:64])
    if "drop" in method:
        drop_residual_branches(model.encoder.blocks)
    everyone = collate_samples(samples)
    present = (everyone.labels * everyone.labels_known).sum(0)
    known = everyone.labels_known.sum(0)
    model.classifier.set_prior(present, known - present)
    prevalence = (present + 0.5) / (known + 1)
    rate = config.train.phases["phase1"].lr["encoder"]
    groups = [{"params": list(model.parameters()), "lr": rate}]
    if method == "layer-decay":
        groups = group_by_depth(model, rate)
    optimizer = torch.optim.AdamW(groups, betas=config.train.betas, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [group["lr"] for group in groups], steps + 1, pct_start=0.05
    )
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    order: list[Sample] = []
    for _ in range(steps):
        if len(order) < 8:
            order = draw.sample(samples, len(samples))
        batch = collate_samples([order.pop() for _ in range(8)])
        loss = compute_loss(method, model(batch).finding_logits, batch, prevalence)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if "ema" in method:
            average.update_parameters(model)
    return (average.module if "ema" in method else model).eval()


@torch.no_grad()
def measure(model: RectVLM, samples: list[Sample]) -> dict[str, float]:
    """Macro AUROC, average precision and F1 of held-out cases."""
    probabilities, labels, known = [], [], []
    for start in range(0, len(samples), 20):
        batch = collate_samples(samples[start : start + 20])
        probabilities.append(model(batch).finding_logits.sigmoid().numpy())
        labels.append(batch.labels.numpy())
        known.append(batch.labels_known.numpy())
    rows = [np.concatenate(values) for values in (probabilities, labels, known)]
    halves = [[values[start::2] for values in rows] for start in (0, 1)]
    scores = score_findings(*rows, np.full(N_FINDINGS, 0.5))["macro"]
    f1s = []
    for fitted, measured in (halves, halves[::-1]):
        f1s.append(
            score_findings(*measured, fit_thresholds(*fitted, "the other half").values)["macro"][
                "f1"
            ]
        )
    return {
        "AUROC": scores["auroc"],
        "average precision": scores["average_precision"],
        "F1": float(np.mean(f1s)),
    }


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="learn")
    parser.add_argument("--cases", type=int, default=240)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    cases = list_demo_cases(options.cases, options.held_out, None, "ct-rate", "ct-rate")
    samples = [case_to_sample(case, config.data.grid, config.data.spacing) for case in cases]
    training, held_out = samples[: options.cases], samples[options.cases :]
    for method in options.methods:
        for seed in options.seeds:
            scores = measure(train(config, training, method, options.steps, seed), held_out)
            words = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
            print(f"{method}, seed {seed}: {words}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
