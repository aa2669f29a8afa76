"""`auto`: the fastest setting that fits, and the same gradient whatever is chosen."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import phantom_sample
from torch import Tensor

from rectvlm import pretrained
from rectvlm.config import Config, load_config
from rectvlm.data.dataset import collate_samples
from rectvlm.models import RectVLM
from rectvlm.models.language_model import load_language_model
from rectvlm.models.prompt_embeddings import PromptEmbeddings
from rectvlm.plan.auto_settings import (
    MEMORY_SHARE,
    SettingsSearch,
    list_auto_parts,
    list_micro_batches,
    resolve_auto_settings,
    set_checkpointing,
)
from rectvlm.plan.planner import ResourcePlan, ResourcePlanner
from rectvlm.train.objectives import combine_losses, compute_losses
from rectvlm.train.phases import PHASES
from rectvlm.train.task_loss import TargetCounts
from rectvlm.types import Sample

DS_CONFIG = Path(__file__).parents[2] / "ds_configs" / "phase2.json"
PHASE = PHASES[2]
AUTO = ["encoder.activation_checkpointing=auto", "localizer.activation_checkpointing=auto"]
WITHOUT_GPU = pytest.mark.skipif(
    torch.cuda.is_available(), reason="says what happens without a GPU"
)


def make_planner(config: Config) -> ResourcePlanner:
    return ResourcePlanner(config, 2, DS_CONFIG)


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config("tiny", AUTO)


@pytest.fixture(scope="module")
def search(config: Config) -> SettingsSearch:
    return SettingsSearch(config, PHASE, make_planner)


@pytest.fixture(scope="module")
def plans(config: Config) -> list[ResourcePlan]:
    """The plan of every setting on two GPUs."""
    made = []
    for encoder, localizer in itertools.product((True, False), repeat=2):
        planner = make_planner(
            set_checkpointing(config, {"encoder": encoder, "localizer": localizer})
        )
        made += [planner.with_micro_batch(size).make_plan(2, 1000.0) for size in (1, 2)]
    return made


def total_gb(plan: ResourcePlan) -> float:
    return plan.gpu_memory_gb["total"]


@pytest.mark.slow
def test_the_fastest_setting_that_fits_is_chosen(
    search: SettingsSearch, plans: list[ResourcePlan]
) -> None:
    """With room for all settings, and for all but the n that need most."""
    sizes = sorted(map(total_gb, plans), reverse=True)
    assert len(set(sizes)) == 8
    for most in sizes:
        capacity = (most + 1e-6) / MEMORY_SHARE
        choice = search.choose(2, capacity)
        fitting = [plan for plan in plans if total_gb(plan) <= most + 1e-6]
        assert total_gb(choice.plan) <= most + 1e-6
        fastest = min(plan.time.total for plan in fitting)
        assert choice.plan.time.total == pytest.approx(fastest, rel=0.01)
        assert not list_auto_parts(PHASE, choice.config)
        assert choice.planner.config == choice.config


def test_each_decision_is_a_sentence_with_its_reason(search: SettingsSearch) -> None:
    encoder, localizer, micro_batch = search.choose(2, 1000.0).plan.auto_decisions
    assert "encoder.activation_checkpointing=false: recomputing takes" in encoder
    assert "localizer.activation_checkpointing=false: recomputing takes" in localizer
    assert "micro_batch=2 of at most 2" in micro_batch and "900.0 GB" in micro_batch
    *_, micro_batch, warning = search.choose(2, 0.5).plan.auto_decisions
    assert "micro_batch=1 of at most 2" in micro_batch and "nothing fits" in warning


@pytest.mark.parametrize(
    ("global_batch", "limit", "gpus", "sizes"),
    [(16, 8, 2, [1, 2, 4, 8]), (16, 8, 3, [1, 2, 3, 6]), (10, 4, 2, [2, 3]), (4, 8, 8, [1])],
)
def test_micro_batches_keep_the_samples_of_a_step(
    global_batch: int, limit: int, gpus: int, sizes: list[int]
) -> None:
    section = "train.phases.phase2"
    batch = [f"{section}.global_batch={global_batch}", f"{section}.micro_batch={limit}"]
    assert list_micro_batches(PHASE, load_config("tiny", batch), gpus) == sizes


@WITHOUT_GPU
def test_without_a_gpu_the_smallest_setting_is_taken(config: Config) -> None:
    resolved = resolve_auto_settings(PHASE, config, DS_CONFIG)
    smallest = set_checkpointing(config, {"encoder": True, "localizer": True})
    assert resolved == PHASE.set_micro_batch(smallest, 1)
    assert resolve_auto_settings(PHASE, resolved, DS_CONFIG) is resolved


def build_model(config: Config) -> RectVLM:
    """Phase 3 in float32, without dropout and noise."""
    torch.manual_seed(0)
    language = load_language_model(
        config.generator, pretrained.resolve_model(config.generator.model)
    )
    prompts = PromptEmbeddings.from_text_encoder(
        pretrained.resolve_model(config.text.model), config.text.max_tokens
    )
    return RectVLM(config, PHASES[3].parts, prompts, language).float().train()


def compute_gradients(model: RectVLM, samples: list[Sample], size: int) -> dict[str, Tensor]:
    """Gradients of a step that is cut into micro-batches of `size` samples."""
    parts = [samples[first : first + size] for first in range(0, len(samples), size)]
    whole = TargetCounts.of_batch(collate_samples(samples)).to_list()
    counts = TargetCounts.from_list([count / len(parts) for count in whole])
    weights = model.config.train.localization_loss_weights
    model.zero_grad()
    for part in parts:
        batch = collate_samples(part)
        losses = compute_losses(model(batch), batch, PHASES[3].tasks, weights, counts)
        (combine_losses(losses, model.config.train.loss_weights) / len(parts)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.slow
def test_gradients_depend_neither_on_the_cut_nor_on_recomputation() -> None:
    plain = ["generator.quantization=none", "generator.lora_dropout=0", "localizer.noise=0"]
    # Every prompt tells the truth: what an untrained model predicts would turn with rounding.
    plain += ["generator.true_cue_share=1", "generator.cue_noise=0"]
    keep = {"encoder": False, "localizer": False, "generator": False}
    kept = set_checkpointing(load_config("tiny", plain), keep)
    recomputed = set_checkpointing(kept, dict.fromkeys(keep, True))
    samples = [phantom_sample(seed, kept) for seed in range(4)]
    short = replace(samples[1].meta, findings=None, impression="No nodule.")
    samples[1] = replace(samples[1], meta=short)
    model = build_model(kept)
    expected = compute_gradients(model, samples, 4)
    assert {name.partition(".")[0] for name in expected} >= set(PHASES[3].parts)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for config, size in ((recomputed, 4), (recomputed, 1), (kept, 2)):
        twin = build_model(config)
        # The first model of a process starts from other random numbers.
        twin.load_state_dict(model.state_dict())
        gradients = compute_gradients(twin, samples, size)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            # A bias before a norm has no gradient but rounding.
            atol = 1e-3 * expected[name].abs().max().item() + 1e-5 * largest
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=atol, msg=name)
