"""Which parameters train, at what rate, with what decay."""

import re
from itertools import pairwise

import pytest
import torch
from torch import nn

from rectvlm.config import MODEL_PARTS, Config, PhaseConfig, load_config
from rectvlm.models.meta_model import build_meta_model
from rectvlm.pretrained import read_model_config
from rectvlm.train.budget import PhaseBudget
from rectvlm.train.optimizer import (
    build_optimizer,
    freeze_all_but,
    learning_rate_factor,
    set_learning_rates,
)
from rectvlm.train.phases import PHASES
from rectvlm.types import UserError


class TwoParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
        self.classifier = nn.Linear(4, 2)
        self.prompts = nn.Linear(2, 2)


@pytest.fixture
def model(tiny: Config) -> TwoParts:
    model = TwoParts()
    freeze_all_but(model, tiny.train.phases["phase1"].lr)
    return model


def test_parts_without_a_rate_are_frozen(model: TwoParts) -> None:
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {
        name for name, _ in model.named_parameters() if not name.startswith("prompts")
    }
    freeze_all_but(model, {"classifier": 1e-3})
    assert not any(p.requires_grad for p in model.encoder.parameters())


def test_every_trainable_parameter_once(model: TwoParts, tiny: Config) -> None:
    optimizer = build_optimizer(model, tiny.train, change(tiny), plan(change(tiny)))
    members = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in members} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(members) == len({id(p) for p in members})
    assert all(group["betas"] == tiny.train.betas for group in optimizer.param_groups)


DECAYED = """
encoder.embed encoder.blocks.#.attention.q encoder.blocks.#.attention.kv
encoder.blocks.#.attention.out encoder.blocks.#.mlp.#
classifier.text classifier.query classifier.image
localizer.text localizer.unet.stem.conv localizer.unet.down.#.conv localizer.evidence.map
localizer.denoiser.inputs localizer.denoiser.level.# localizer.denoiser.clean
localizer.denoiser.blocks.#.attention.q localizer.denoiser.blocks.#.attention.kv
localizer.denoiser.blocks.#.attention.out localizer.denoiser.blocks.#.mlp.#
localizer.unet.up.#.reduce localizer.unet.up.#.gate.skip localizer.unet.up.#.gate.rising
localizer.unet.up.#.gate.weight localizer.unet.up.#.merge.conv localizer.unet.up.#.match.query
generator.resampler.inputs generator.resampler.blocks.#.attention.q
generator.resampler.blocks.#.attention.kv generator.resampler.blocks.#.attention.out
generator.resampler.blocks.#.mlp.# generator.resampler.project.#
generator.lora_A generator.lora_B
"""
"""Layers whose weights have weight decay."""

NOT_DECAYED = """
encoder.position_z encoder.position_y encoder.position_x encoder.whole encoder.regions
encoder.unknown_prior encoder.blocks.#.attention.slice_bias
encoder.blocks.#.norm1.weight encoder.blocks.#.norm2.weight encoder.norm.weight
classifier.direction_offset classifier.query_offset classifier.sharpness classifier.norm.weight
localizer.text_offset localizer.unet.mask_bias localizer.unet.stem.norm.weight
localizer.unet.down.#.norm.weight
localizer.unet.up.#.merge.norm.weight localizer.denoiser.blocks.#.norm1.weight
localizer.denoiser.blocks.#.norm2.weight localizer.denoiser.norm.weight localizer.denoiser.scale
generator.resampler.queries generator.resampler.scale.weight generator.resampler.norm.weight
generator.resampler.context_norm.weight generator.resampler.blocks.#.norm1.weight
generator.resampler.blocks.#.norm2.weight
"""
"""Parameters without weight decay that are no bias of a layer."""


def test_weights_of_layers_decay_and_nothing_else_in_a_whole_model() -> None:
    config = load_config("tiny", ["localizer.volumes_to_findings=true"])
    language = read_model_config(config.generator.model)
    model = build_meta_model(config, MODEL_PARTS, 64, language)
    phase = config.train.phases["phase3"].model_copy(update={"lr": dict.fromkeys(MODEL_PARTS, 1.0)})
    names: dict[bool, set[str]] = {True: set(), False: set()}
    for group in build_optimizer(model, config.train, phase, plan(phase)).param_groups:
        assert group["weight_decay"] in (0, config.train.weight_decay)
        for name in group["names"]:
            name = re.sub(r"language_model\..*(lora_[AB])\.default", r"\1", name)
            names[group["weight_decay"] > 0].add(re.sub(r"\.\d+", ".#", name))
    assert names[True] == {f"{layer}.weight" for layer in DECAYED.split()}
    biases = {name for name in names[False] if name.endswith(".bias")}
    assert names[False] - biases == set(NOT_DECAYED.split())


def plan(phase: PhaseConfig, world_size: int = 2) -> PhaseBudget:
    return PhaseBudget.plan(phase, sample_count=6, world_size=world_size)


def change(tiny: Config, **choices: object) -> PhaseConfig:
    """Phase 1 of the tiny size, where a step has 4 samples, with other choices."""
    return tiny.train.phases["phase1"].model_copy(update=choices)


def test_rates_warm_up_and_fall_to_the_last(tiny: Config) -> None:
    phase = change(tiny, samples=400, warmup=0.1, final_lr_ratio=0.1)
    factors = [learning_rate_factor(phase, plan(phase), 4 * step) for step in range(100)]
    assert factors[:10] == pytest.approx([(k + 1) / 10 for k in range(10)])
    assert factors[10] == pytest.approx(1)
    assert factors[99] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(factors[9:]))
    # half-way down the cosine lies the mean of both ends
    assert (factors[54] + factors[55]) / 2 == pytest.approx(0.55, abs=1e-3)


def test_with_another_number_of_ranks_the_schedule_goes_on_where_its_samples_are(
    tiny: Config, model: TwoParts
) -> None:
    """Half of the samples on two ranks, the rest on three, whose steps have two samples more."""
    phase = change(tiny, samples=396, warmup=0, final_lr_ratio=0.0)
    two, three = plan(phase), plan(phase, world_size=3)
    assert (two.step_batch.global_batch, three.step_batch.global_batch) == (4, 6)
    groups = build_optimizer(model, tiny.train, phase, two).param_groups
    before = [set_learning_rates(groups, phase, two, seen)["encoder"] for seen in range(0, 196, 4)]
    rates = [set_learning_rates(groups, phase, three, n)["encoder"] for n in range(196, 396, 6)]
    # A step that is half as large again has rates that are √1.5 times as large.
    assert rates[0] / 1.5**0.5 == pytest.approx(before[-1], rel=0.05)
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert all(a >= b for a, b in pairwise(before)) and all(a >= b for a, b in pairwise(rates))


def test_rates_follow_the_square_root_of_the_global_batch(tiny: Config, model: TwoParts) -> None:
    phase = change(tiny, warmup=0, global_batch=36)
    groups = build_optimizer(model, tiny.train, phase, plan(phase)).param_groups
    rates = set_learning_rates(groups, phase, plan(phase), 0)
    assert rates == pytest.approx({part: 3 * rate for part, rate in phase.lr.items()})


@pytest.mark.parametrize(("samples", "warmup"), [(1, 0), (4, 0.9), (16, 0.99), (11, 0.7), (9, 0.1)])
def test_short_runs_have_sound_rates(tiny: Config, samples: int, warmup: float) -> None:
    phase = change(tiny, samples=samples, warmup=warmup)
    for seen in range(0, samples, 4):
        assert 0 < learning_rate_factor(phase, plan(phase), seen) <= 1


def test_each_part_has_its_own_rate(model: TwoParts) -> None:
    phase = load_config(
        "tiny", ["train.phases.phase1.lr={encoder: 0.5, classifier: 0.25}"]
    ).train.phases["phase1"]
    optimizer = build_optimizer(model, load_config("tiny").train, phase, plan(phase))
    rates = set_learning_rates(optimizer.param_groups, phase, plan(phase), 0)
    factor = 0.5  # two steps of warm-up
    assert rates == {"encoder": 0.5 * factor, "classifier": 0.25 * factor}
    encoder = {id(p) for p in model.encoder.parameters()}
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert group["lr"] == (rates["encoder"] if id(p) in encoder else rates["classifier"])


def test_a_part_that_the_phase_lacks_is_refused() -> None:
    config = load_config("tiny", ["train.phases.phase1.lr={encoder: 0.1, localizer: 0.1}"])
    with pytest.raises(UserError, match="localizer"):
        PHASES[1].get_settings(config)
    with pytest.raises(UserError, match="no part"):
        PHASES[1].get_settings(load_config("tiny", ["train.phases.phase1.lr={}"]))
    with pytest.raises(UserError, match=r"train\.phases\.phase3"):
        PHASES[3].get_settings(
            load_config("tiny", ["train.phases={phase1: " + str(_plain(config)) + "}"])
        )


def _plain(config: Config) -> dict[str, object]:
    return config.train.phases["phase1"].model_dump(mode="json")


def test_phases_follow_each_other() -> None:
    assert [PHASES[n].previous_phase for n in (1, 2, 3)] == [None, 1, 2]
    for n in (2, 3):
        assert set(PHASES[n - 1].parts) < set(PHASES[n].parts)
        assert set(PHASES[n - 1].tasks) < set(PHASES[n].tasks)


def test_a_step_of_the_optimizer_moves_only_what_trains(model: TwoParts, tiny: Config) -> None:
    optimizer = build_optimizer(model, tiny.train, change(tiny), plan(change(tiny)))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.prompts(model.classifier(model.encoder(torch.randn(5, 3)))).square().sum().backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
