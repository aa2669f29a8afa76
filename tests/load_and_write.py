"""What each of two ranks does in `test_loading.py`.

Each reads a language model under ZeRO-3, writes reports and trains a step. Accelerate starts it as
`tests.load_and_write MODEL OUT QUANTIZATION`. It leaves OUT/rank-N.json, and OUT/alone.json with
the reports that one process writes with the whole model.
"""

import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn

from rectvlm.config import load_config
from rectvlm.models.image_features import ImageFeatures
from rectvlm.models.language_model import load_language_model
from rectvlm.models.report_generator import ReportGenerator
from rectvlm.train.budget import StepBatch
from rectvlm.train.engine.engine import Engine

WIDTH = 48
CUES = (["No findings suggested."], ["Findings suggested: emphysema, lung nodule. " * 4])
MOST = (5, 19)
"""Tokens that each rank may write: rank 0 ends long before rank 1."""
REPORTS = (["Findings: The heart is enlarged."], [None])
WAYS: tuple[dict[str, Any], ...] = ({}, {"num_beams": 2}, {"do_sample": True, "temperature": 0.8})


def live_bytes() -> int:
    """Bytes of all tensors of this process, each storage once, mapped files left out."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            if storage.filename is None:
                storages[storage.data_ptr()] = storage.nbytes()
            held = getattr(thing, "ds_tensor", None)
            if held is not None:
                storages[held.untyped_storage().data_ptr()] = held.untyped_storage().nbytes()
    return sum(storages.values())


def features(rank: int) -> ImageFeatures:
    torch.manual_seed(rank)
    whole, patches, regions = (
        torch.randn(1, *shape, WIDTH).bfloat16() for shape in ((), (12,), (20,))
    )
    return ImageFeatures(whole, patches, regions, (3, 2, 2), patches)


def write(generator: ReportGenerator, rank: int) -> list[str]:
    texts = []
    for options in WAYS:
        torch.manual_seed(rank)
        texts += generator.generate_reports(features(rank), CUES[rank], MOST[rank], **options)
    return texts


def write_alone(generator: ReportGenerator, rank: int) -> list[str]:
    """What `write` writes on a sharded model: in one batch, without a common prefix, since in bf16
    other sums round otherwise, and random weights choose between words by less."""
    texts: list[str] = []
    for options in WAYS:
        torch.manual_seed(rank)
        prompts = generator.make_prompts(features(rank), CUES[rank])
        visual = torch.stack([prompt.visual for prompt in prompts])
        rows = [generator.encode_prompt(prompt.cues) for prompt in prompts]
        options = {"do_sample": False, **options}
        texts += map(str.strip, generator._decode(visual, rows, None, MOST[rank], options))
    return texts


def main(folder: str, out: Path, quantization: str) -> None:
    config = load_config(
        "tiny", ["generator.lora_rank=4", f"generator.quantization={quantization}"]
    )
    engine = Engine(Path("ds_configs/phase3.json"), StepBatch(1, 1, 1), 1.0, out)
    before, peak, largest, shard, whole = live_bytes(), 0, 0, 0, 0

    def settle(module: nn.Module) -> None:
        nonlocal peak, largest, shard, whole
        own = list(module.parameters(recurse=False))
        largest = max(largest, sum(p.numel() * p.element_size() for p in own))
        peak = max(peak, live_bytes() - before)
        engine.shard_module(module)
        for parameter in own:
            held: Any = parameter
            shard += held.ds_tensor.numel() * held.ds_tensor.element_size()
            whole += held.ds_numel * held.ds_tensor.element_size()

    language = load_language_model(config.generator, folder, engine.device, settle)
    kept = live_bytes() - before
    torch.manual_seed(0)
    generator = ReportGenerator(config.generator, WIDTH, language)
    optimizer = torch.optim.AdamW([p for p in generator.parameters() if p.requires_grad], lr=1e-3)
    engine.prepare(generator, optimizer)

    rank = engine.rank
    engine.model.eval()
    texts = write(generator, rank)
    engine.model.train()
    loss = engine.model(features(rank), CUES[rank], REPORTS[rank]).per_sample.sum()
    engine.backward(loss)
    engine.step()
    result = {
        "peak": peak,
        "shard": shard,
        "kept": kept,
        "whole": whole,
        "largest_module": largest,
        "texts": texts,
    }
    result |= {"tokens": MOST[rank], "loss": engine.all_reduce_sum(loss.item())}
    (out / f"rank-{rank}.json").write_text(json.dumps(result))
    engine.barrier()
    if engine.is_main:
        language = load_language_model(config.generator, folder)
        torch.manual_seed(0)
        alone = ReportGenerator(config.generator, WIDTH, language).eval()
        for parameter in alone.resampler.parameters():
            parameter.data = parameter.data.bfloat16()
        for module in alone.modules():
            if isinstance(module, Linear4bit):
                module.support_avx512bf16_for_cpu = False  # other kernels, which round otherwise
        (out / "alone.json").write_text(
            json.dumps({"texts": [write_alone(alone, rank) for rank in (0, 1)]})
        )
    engine.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
