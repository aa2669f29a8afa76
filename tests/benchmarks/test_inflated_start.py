"""The experiment of inflated weights: it pretrains a ViT, and phase 1 starts from its file."""

from pathlib import Path

import pytest
import torch

from benchmarks.inflated_start import (
    cut_into_slices,
    mark_patches,
    pretrain_vit,
    train_to_auroc,
    write_text,
)
from rectvlm.config import load_config
from rectvlm.data.dataset import ShardDataset, collate_samples
from rectvlm.models.prompt_embeddings import PromptEmbeddings
from rectvlm.pretrained.vit_file import read_vit_file
from rectvlm.types import Batch


@pytest.fixture(scope="module")
def batches(phantom_shards: Path) -> list[Batch]:
    config = load_config("tiny", [f"data.shards={phantom_shards}"])
    samples = list(ShardDataset(config.data, "train"))  # type: ignore[call-overload]
    return [collate_samples(samples[:2]), collate_samples(samples[2:4])]


def test_marks_of_patches_are_those_of_the_slice(batches: list[Batch]) -> None:
    config = load_config("tiny")
    slices, bits = cut_into_slices(batches, config)
    assert slices.shape == (4 * 16, 3, 48, 48) and bits.shape == (64, 48, 48)
    assert slices.min() == -1 and slices.max() == 1
    marks = mark_patches(bits, 8)
    number = int(bits.flatten(1).bool().sum(1).argmax())
    patch = bits[number].view(6, 8, 6, 8).transpose(1, 2).flatten(2).flatten(0, 1)
    for bit in range(5):
        assert torch.equal(marks[number, :, bit].bool(), (patch >> bit & 1).bool().any(1))


@pytest.mark.parametrize("pretext", ["outlines", "masked"])
def test_phase_1_starts_from_the_pretrained_file(
    pretext: str, batches: list[Batch], tmp_path: Path
) -> None:
    config = load_config("tiny")
    losses = pretrain_vit(config, batches, pretext, 3, tmp_path)
    assert len(losses) == 3
    assert read_vit_file(str(tmp_path)).mean == (0.5, 0.5, 0.5)
    config = load_config("tiny", [f"encoder.init={tmp_path}"])
    prompts = PromptEmbeddings(torch.randn(18, 16), torch.randn(18, 16), torch.randn(5, 16))
    options = {"steps": 2, "every": 1, "auroc": 1.1}
    run = train_to_auroc(config, prompts, (batches, batches[0]), options)
    assert list(run["aurocs"]) == [0, 1, 2] and run["steps"] is None
    easy = train_to_auroc(config, prompts, (batches, batches[0]), options | {"auroc": 0.0})
    assert easy["steps"] == 0 and len(easy["aurocs"]) == 2


def test_the_page_says_how_many_steps_each_start_took() -> None:
    runs = [
        {"start": "random", "seed": 0, "aurocs": {0: 0.5, 25: 0.8}, "steps": None},
        {"start": "inflated", "seed": 0, "aurocs": {0: 0.5, 25: 0.92}, "steps": 25},
    ]
    machine = {"cpu": "Some CPU", "cores": 2, "memory_gb": 24.0, "gpus": []}
    result = {
        "date": "2026-01-02",
        "machine": machine,
        "versions": {"torch": "2.13.0"},
        "seconds": 9.0,
        "config": "learn",
        "phantoms": 96,
        "valid_phantoms": 48,
        "pretext": "masked",
        "pretraining_losses": [0.6, 0.2],
        "auroc": 0.9,
        "runs": runs,
    }
    page = write_text(result)
    assert "| random | 0 | more than 25 | 0.800 |" in page
    assert "| inflated | 0 | 25 | 0.920 |" in page
    assert "Pretext: masked, 2 steps" in page
