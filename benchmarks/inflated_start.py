"""Steps of phase 1 to an AUROC: random weights beside those of an inflated 2D ViT.

    python -m benchmarks.inflated_start [--config learn] [--phantoms 160] [--valid-phantoms 64]
        [--pretext outlines|masked] [--pretraining-steps 600] [--steps 600] [--every 25]
        [--auroc 0.9] [--seeds 1] [part.field=value …]

A small ViT of Transformers, of the encoder's sizes, first learns from axial slices of phantoms of
the style `plain`: which lesions each patch shows, or what masked patches look like, without any
label. It is saved as safetensors. Then phase 1 trains on the same phantoms from three starts, with
the same batches, rates and seeds:

    random    encoder.init=null
    atlas     encoder.init=null and the configuration's encoder.atlas_cases
    inflated  encoder.init=FOLDER

The rate warms up and stays. Every few steps the macro AUROC of held-out phantoms is taken, and a
run ends when it reaches `--auroc`.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

from benchmarks.measurements import Comparison, Repetitions, make_table
from benchmarks.publishing import (
    Program,
    make_parser,
    positive_int,
    publish_result,
    quiet_main,
)
from data_pipeline.cases import case_to_sample
from data_pipeline.demo_cases import list_demo_cases
from rectvlm import pretrained
from rectvlm.config import Config, load_config
from rectvlm.data.dataset import collate_samples
from rectvlm.files import write_json
from rectvlm.labels import N_FINDINGS, N_LESIONS
from rectvlm.machine import package_versions
from rectvlm.metrics.findings import score_findings
from rectvlm.models import RectVLM
from rectvlm.models.encoder import load_starting_weights
from rectvlm.models.image_features import apply_windows
from rectvlm.models.prompt_embeddings import PromptEmbeddings
from rectvlm.phantom.patient_plan import PLAIN_STYLE
from rectvlm.pretrained.weight_files import SETTINGS_FILES
from rectvlm.train.budget import PhaseBudget
from rectvlm.train.objectives import combine_losses, compute_losses
from rectvlm.train.optimizer import build_optimizer
from rectvlm.train.phases import PHASES
from rectvlm.types import Batch, JsonObject

STARTS = ("random", "atlas", "inflated")
SLICES_A_STEP = 32
PRETRAINING_RATE = 1e-3
MASKED_SHARE = 0.6
NORMALIZATION = 0.5
"""Mean and standard deviation of the ViT's input channels."""


def make_cases(config: Config, train: int, valid: int) -> tuple[list[Batch], Batch]:
    """Make the training phantoms as batches, and the held-out ones as one batch."""
    samples = [
        case_to_sample(case, config.data.grid, config.data.spacing)
        for case in list_demo_cases(train, valid, None, PLAIN_STYLE.name)
    ]
    size = PHASES[1].get_settings(config).global_batch
    batches = [collate_samples(samples[i : i + size]) for i in range(0, train, size)]
    return batches, collate_samples(samples[train:])


def cut_into_slices(batches: Sequence[Batch], config: Config) -> tuple[Tensor, Tensor]:
    """Square slices (S, W, side, side), normalized, and their lesion bits (S, side, side)."""
    side = max(config.data.grid[1:])
    ct = torch.cat([batch.ct for batch in batches])
    bits = torch.cat([batch.lesions for batch in batches]).flatten(0, 1)
    channels = apply_windows(ct, config.data.windows).transpose(1, 2).flatten(0, 1)
    _, y, x = config.data.grid
    margins = (0, side - x, 0, side - y)
    return (F.pad(channels, margins) - NORMALIZATION) / NORMALIZATION, F.pad(bits, margins)


def mark_patches(bits: Tensor, patch: int) -> Tensor:
    """Whether each patch of slices (S, side, side) shows each lesion, (S, N, lesions) float."""
    shown = torch.stack([(bits >> bit & 1).float() for bit in range(N_LESIONS)], dim=1)
    return F.max_pool2d(shown, patch).flatten(2).mT


def pretrain_vit(
    config: Config, batches: Sequence[Batch], pretext: str, steps: int, folder: Path
) -> list[float]:
    """Train a ViT of the encoder's sizes on slices and save it; return the loss of each step."""
    encoder = config.encoder
    slices, bits = cut_into_slices(batches, config)
    sizes: dict[str, Any] = {
        "hidden_size": encoder.width,
        "num_hidden_layers": encoder.depth,
        "num_attention_heads": encoder.heads,
        "intermediate_size": int(encoder.width * encoder.mlp_ratio),
        "image_size": slices.shape[-1],
        "patch_size": encoder.patch[1],
        "num_channels": slices.shape[1],
    }
    torch.manual_seed(config.train.seed)
    head = nn.Linear(encoder.width, N_LESIONS)
    model: nn.Module
    if pretext == "masked":
        decoder: dict[str, Any] = {
            "decoder_hidden_size": encoder.width,
            "decoder_num_hidden_layers": 1,
        }
        decoder["decoder_num_attention_heads"] = encoder.heads
        decoder["decoder_intermediate_size"] = 2 * encoder.width
        model = ViTMAEForPreTraining(ViTMAEConfig(**sizes, **decoder, mask_ratio=MASKED_SHARE))
    else:
        model = ViTModel(ViTConfig(**sizes), add_pooling_layer=False)

    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], PRETRAINING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PRETRAINING_RATE, steps)
    losses = []
    for _ in range(steps):
        chosen = torch.randint(0, len(slices), (SLICES_A_STEP,))
        if pretext == "masked":
            loss = model(slices[chosen]).loss
        else:
            hidden = model(slices[chosen]).last_hidden_state
            marks = mark_patches(bits[chosen], encoder.patch[1])
            of_slice = marks.amax(dim=1, keepdim=True)  # the class token's
            wanted = torch.cat([of_slice, marks], dim=1)
            loss = F.binary_cross_entropy_with_logits(head(hidden), wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.save_pretrained(folder)
    channels = [NORMALIZATION] * slices.shape[1]
    write_json(folder / SETTINGS_FILES[1], {"image_mean": channels, "image_std": channels})
    return losses


def compute_auroc(model: RectVLM, batch: Batch) -> float:
    """Macro AUROC of a batch's findings."""
    model.eval()
    probabilities = model.predict_batch(batch, generate=False).finding_probabilities
    scores = score_findings(
        probabilities.numpy(),
        batch.labels.numpy(),
        batch.labels_known.numpy(),
        np.full(N_FINDINGS, 0.5),
    )
    model.train()
    return float(scores["macro"]["auroc"])


def train_to_auroc(
    config: Config, prompts: PromptEmbeddings, cases: tuple[list[Batch], Batch], options: JsonObject
) -> JsonObject:
    """Train phase 1 until the held-out AUROC is reached; return it by step."""
    phase, (batches, held_out) = PHASES[1], cases
    settings = phase.get_settings(config)
    budget = PhaseBudget.plan(settings, sample_count=len(batches), world_size=1)
    warmup_steps = budget.samples_after(settings.warmup) / settings.global_batch
    torch.manual_seed(config.train.seed)
    model = RectVLM(config, phase.parts, prompts)
    if config.encoder.init is not None:
        load_starting_weights(model.encoder, config.encoder)
    if config.encoder.atlas_cases:
        volumes = [ct for batch in batches for ct in batch.ct]
        model.encoder.fit_atlas(volumes[: config.encoder.atlas_cases])
    optimizer = build_optimizer(model, config.train, settings, budget)
    generator = torch.Generator().manual_seed(config.train.seed)
    aurocs = {0: compute_auroc(model, held_out)}
    order: list[int] = []
    for step in range(1, options["steps"] + 1):
        order = order or torch.randperm(len(batches), generator=generator).tolist()
        batch = batches[order.pop()]
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * min(1, step / warmup_steps)
        losses = compute_losses(
            model(batch), batch, phase.tasks, config.train.localization_loss_weights
        )
        optimizer.zero_grad()
        combine_losses(losses, config.train.loss_weights).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.train.gradient_clipping)
        optimizer.step()
        if step % options["every"] == 0:
            aurocs[step] = compute_auroc(model, held_out)
            if aurocs[step] >= options["auroc"]:
                break
    reached = [step for step, auroc in aurocs.items() if auroc >= options["auroc"]]
    return {"aurocs": aurocs, "steps": min(reached, default=None)}


def list_comparisons(result: JsonObject) -> list[Comparison]:
    """List the AUROC by step of every start, one repetition a seed."""
    aurocs = Repetitions()
    for run in result["runs"]:
        for step, auroc in run["aurocs"].items():
            aurocs.add(run["start"], auroc, step)
    title, measurements = "Macro AUROC of held-out phantoms", aurocs.to_measurements()
    label = "steps of phase 1"
    return [Comparison(title, "AUROC", measurements, "higher", plot="lines", at_label=label)]


def write_text(result: JsonObject) -> str:
    """Write circumstances and a table by run."""
    rows = []
    for run in result["runs"]:
        last = max(run["aurocs"])
        steps = f"more than {last}" if run["steps"] is None else str(run["steps"])
        curve = ", ".join(f"{step}: {auroc:.3f}" for step, auroc in run["aurocs"].items())
        rows.append([run["start"], str(run["seed"]), steps, f"{run['aurocs'][last]:.3f}", curve])
    losses = result["pretraining_losses"]
    return (
        f"Configuration {result['config']}, {result['phantoms']} phantoms to train on, "
        f"{result['valid_phantoms']} held out. Pretext: {result['pretext']}, {len(losses)} steps "
        f"of {SLICES_A_STEP} slices, loss {losses[0]:.3f} to {losses[-1]:.3f}. Steps of phase 1 "
        f"until the macro AUROC is {result['auroc']}:\n\n"
        + make_table(["start", "seed", "steps", "last AUROC", "AUROC by step"], rows)
    )


PROGRAM = Program("inflated_start", "Inflated start", write_text, list_comparisons)


@quiet_main
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parse_arguments(arguments)
    start_seconds = time.monotonic()
    config = load_config(options.config, options.overrides)
    prompts = PromptEmbeddings.from_text_encoder(
        pretrained.resolve_model(config.text.model), config.text.max_tokens
    )
    cases = make_cases(config, options.phantoms, options.valid_phantoms)
    choices = {name: getattr(options, name) for name in ("steps", "every", "auroc")}
    runs = []
    with tempfile.TemporaryDirectory() as work:
        losses = pretrain_vit(
            config, cases[0], options.pretext, options.pretraining_steps, Path(work)
        )
        starts = {
            "random": ["encoder.atlas_cases=0"],
            "atlas": [],
            "inflated": ["encoder.atlas_cases=0", f"encoder.init={work}"],
        }
        for seed in range(options.seeds):
            for start in options.starts:
                changes = [*options.overrides, *starts[start], f"train.seed={seed}"]
                run = train_to_auroc(load_config(options.config, changes), prompts, cases, choices)
                runs.append({"start": start, "seed": seed} | run)
    facts = choices | {
        "versions": package_versions("transformers"),
        "config": config.name,
        "phantoms": options.phantoms,
        "valid_phantoms": options.valid_phantoms,
        "pretext": options.pretext,
        "pretraining_losses": losses,
        "runs": runs,
    }
    publish_result(options.out, PROGRAM, arguments, start_seconds, facts)
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("inflated_start", "Steps to an AUROC from random and inflated weights.")
    parser.add_argument("--config", default="learn")
    parser.add_argument("--phantoms", type=positive_int, default=160)
    parser.add_argument("--valid-phantoms", type=positive_int, default=64)
    parser.add_argument("--pretext", choices=["outlines", "masked"], default="outlines")
    parser.add_argument("--pretraining-steps", type=positive_int, default=600)
    parser.add_argument("--steps", type=positive_int, default=600, help="most steps of a run")
    parser.add_argument("--every", type=positive_int, default=25, help="steps between AUROCs")
    parser.add_argument("--auroc", type=float, default=0.9, help="macro AUROC to reach")
    parser.add_argument("--seeds", type=positive_int, default=1)
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument(
        "overrides", nargs="*", metavar="part.field=value", help="changes of the configuration"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
