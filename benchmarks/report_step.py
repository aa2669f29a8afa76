"""A training step of the report generator at the true geometry of its language model, with random weights.

    python -m benchmarks.report_step [--config large] [--geometry meta-llama/Llama-3.1-70B-Instruct] [--layers N]

On one device, without a network or a licence: the language model is made and packed layer by layer, so that it never
exists in bfloat16, then LoRA and resampler train on random image features: forward, backward, AdamW with float32
masters. Tokens are all positions of the language model: prompt, visual tokens and report.

Floating-point operations are 2 a parameter and position for a forward pass, as many for the gradient of the activations
and as many for computing again what checkpointing dropped; frozen weights have no gradient. So useful work is 4N a
token and the hardware's 6N, where N are the decoder's parameters at every position and the output layer's at report
positions. Attention's own products and the trained matrices' gradients (below 1%) are left out. Results go to
benchmarks/results/report-step-MACHINE-DATE.json and .md.
"""

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.publishing import (
    RESULTS_FOLDER,
    make_page_header,
    positive_int,
    publish_result,
    quiet_main,
)
from rectvlm import pretrained
from rectvlm.config import Config, load_config
from rectvlm.labels import N_REGIONS
from rectvlm.machine import package_versions
from rectvlm.models.image_features import ImageFeatures
from rectvlm.models.language_model import (
    LanguageModel,
    add_lora,
    build_quantization_config,
    load_tokenizer,
    materialize_and_measure,
)
from rectvlm.models.load_quantized import (
    ShardModule,
    build_meta_causal_lm,
    replace_linear_with_4bit,
)
from rectvlm.models.report_generator import ReportGenerator, ReportLoss
from rectvlm.train.engine.peak_memory import peak_memory_bytes, reset_peak_memory
from rectvlm.types import UserError

log = logging.getLogger(__name__)

STAND_IN_TOKENIZER = "bundled:tiny-llama"
"""Its few tokens are in every vocabulary; which tokens are read changes no shape."""


class RandomWeights:
    """A checkpoint that is drawn when it is read."""

    def __contains__(self, name: str) -> bool:
        return True

    def read_tensor(self, name: str, shape: torch.Size | None, device: torch.device) -> Tensor:
        """Normal values; norms are 1 and biases 0."""
        assert shape is not None, f"{name} is not packed"
        if len(shape) == 1:
            return torch.full(
                shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16, device=device
            )
        return torch.randn(shape, dtype=torch.bfloat16, device=device).mul_(0.02)


class MasterWeightAdamW:
    """AdamW on float32 copies of bfloat16 parameters, as the engine keeps them."""

    def __init__(self, parameters: list[nn.Parameter], clip: float | None = None) -> None:
        """`clip` is the largest norm of all gradients together."""
        self.parameters, self.clip = parameters, clip
        self.copies = [parameter.detach().float() for parameter in parameters]
        self.optimizer = torch.optim.AdamW(self.copies, lr=1e-4)

    def step(self) -> None:
        """Take a step with the gradients, and drop them."""
        for own, parameter in zip(self.copies, self.parameters, strict=True):
            assert parameter.grad is not None, "a trained parameter got no gradient"
            own.grad, parameter.grad = parameter.grad.float(), None
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.copies, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for own, parameter in zip(self.copies, self.parameters, strict=True):
            parameter.data.copy_(own)


def build_language_model(
    config: Config,
    layers: int | None,
    device: torch.device,
    shard_module: ShardModule | None = None,
) -> tuple[LanguageModel, dict[str, int]]:
    """A language model of true geometry with random weights, packed as they are drawn; and its parameters: of the
    decoder, of the output layer, of the word embeddings.

    Args:
        config: names the geometry, the packing and LoRA.
        layers: instead of all.
        device: where weights are packed and kept.
        settle: as in `load_language_model`.

    Raises:
        UserError: no such geometry, or a vocabulary smaller than the stand-in tokenizer's.
    """
    geometry = pretrained.read_model_config(config.generator.model)
    tokenizer = load_tokenizer(pretrained.resolve_model(STAND_IN_TOKENIZER))
    if geometry.vocab_size < len(tokenizer):
        raise UserError(
            f"{config.generator.model} has {geometry.vocab_size} tokens, but the benchmark's text needs "
            f"{len(tokenizer)}; choose a larger geometry."
        )
    if layers is not None:
        geometry.num_hidden_layers = layers
        if getattr(geometry, "layer_types", None):
            geometry.layer_types = geometry.layer_types[:layers]
    model = build_meta_causal_lm(geometry)
    words, head = (sum(p.numel() for p in part.parameters()) for part in _embedding_layers(model))
    counts = {
        "decoder": sum(p.numel() for p in model.base_model.parameters()) - words,
        "head": head,
        "words": words,
    }
    settings = build_quantization_config(config.generator)
    if settings is not None:
        replace_linear_with_4bit(model, settings, None)
    torch.manual_seed(0)
    spread = materialize_and_measure(model, RandomWeights(), device, shard_module)
    return LanguageModel(
        add_lora(model, config.generator), tokenizer, geometry.hidden_size, spread
    ), counts


def build_generator(
    config: Config, layers: int | None, device: torch.device
) -> tuple[ReportGenerator, dict[str, int]]:
    """The generator around `language_model`; and its parameters, with those that are trained.

    Raises:
        UserError: as `language_model`.
    """
    language, counts = build_language_model(config, layers, device)
    generator = ReportGenerator(config.generator, config.encoder.width, language).train()
    generator.resampler.to(device, torch.bfloat16)
    counts["trained"] = sum(p.numel() for p in generator.parameters() if p.requires_grad)
    return generator, counts


def _embedding_layers(model: Any) -> tuple[nn.Module, nn.Module]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def make_features(config: Config, micro_batch: int, device: torch.device) -> ImageFeatures:
    """Random features of the configuration's grid."""
    z, y, x = (n // p for n, p in zip(config.data.grid, config.encoder.patch, strict=True))
    width = config.encoder.width
    whole, patches, regions = (
        torch.randn(micro_batch, *shape, width, device=device, dtype=torch.bfloat16)
        for shape in ((), (z * y * x,), (N_REGIONS,))
    )
    return ImageFeatures(whole, patches, regions, (z, y, x), patches)


def measure_generator(
    config: Config, layers: int | None, micro_batches: Sequence[int], cue_words: int, rounds: int
) -> list[dict[str, Any]]:
    """Build once; for each micro-batch warm up with one step, and time the others."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reset_peak_memory()
    begin = _synchronized_time(device)
    generator, counts = build_generator(config, layers, device)
    loading = {
        "load_seconds": _synchronized_time(device) - begin,
        "load_peak_bytes": peak_memory_bytes(),
        "parameters": counts,
    }
    loading["loaded_bytes"] = torch.cuda.memory_allocated() if device.type == "cuda" else None
    optimizer = MasterWeightAdamW([p for p in generator.parameters() if p.requires_grad])
    rows: list[dict[str, Any]] = []
    for micro_batch in micro_batches:
        image = make_features(config, micro_batch, device)
        cues = ["Findings suggested:" + " nodule" * cue_words] * micro_batch
        reports = ["The lungs are clear. " * config.generator.max_report_tokens] * micro_batch

        def step(
            image: ImageFeatures = image, cues: list[str] = cues, reports: list[str] = reports
        ) -> ReportLoss:
            found: ReportLoss = generator(image, cues, reports)
            return found

        try:
            timed = _time_steps(config, step, optimizer, counts, rounds, device)
        except torch.OutOfMemoryError as error:
            if not rows:
                raise UserError(
                    f"A micro-batch of {micro_batch} needs more memory than {device} has."
                ) from error
            log.error(
                "a micro-batch of %d needs more memory than %s has: left out", micro_batch, device
            )
            break
        rows.append(loading | {"micro_batch": micro_batch} | timed)
    return rows


def _time_steps(
    config: Config,
    forward: Callable[[], ReportLoss],
    optimizer: MasterWeightAdamW,
    counts: dict[str, int],
    rounds: int,
    device: torch.device,
) -> dict[str, Any]:
    """Seconds, rates, losses and peak memory of some steps after one."""
    seconds: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}
    losses = []
    reset_peak_memory()
    for turn in range(rounds + 1):
        times = [_synchronized_time(device)]
        found = forward()
        times.append(_synchronized_time(device))
        found.per_sample.mean().backward()
        times.append(_synchronized_time(device))
        optimizer.step()
        times.append(_synchronized_time(device))
        losses.append(found.per_sample.mean().item())
        if turn:  # the first warms up
            for name, first, last in zip(seconds, times, times[1:], strict=False):
                seconds[name].append(last - first)
    positions, report_positions = found.position_count, int(found.token_counts.sum())
    step = sum(statistics.median(values) for values in seconds.values())
    again = 6 if config.generator.activation_checkpointing else 4
    body, head = counts["decoder"] * positions, counts["head"] * report_positions
    return {
        "seconds": seconds,
        "step_seconds": step,
        "positions": positions,
        "report_positions": report_positions,
        "tokens_per_second": positions / step,
        "model_flops_per_second": 4 * (body + head) / step,
        "hardware_flops_per_second": (again * body + 6 * head) / step,
        "peak_bytes": peak_memory_bytes(),
        "losses": losses,
    }


def _synchronized_time(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def to_markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    kind = "of the GPU" if result["machine"]["gpus"] else "resident, the process included"
    lines = [
        make_page_header(
            "A step of the report generator", "python -m benchmarks.report_step", result
        ),
        f"Geometry of {result['geometry']}, {result['layers']} layers, {result['quantization']}, LoRA rank "
        f"{result['lora_rank']}, random weights; activation checkpointing "
        f"{'on' if result['checkpointing'] else 'off'}, logits of {result['loss_chunk']} positions at once; median of "
        f"{result['rounds']} steps after one. Memory is "
        f"the peak, {kind}. Useful work is 4N a token, the hardware's 6N with checkpointing; the docstring of the "
        "script says what N holds.\n\n"
        "| micro-batch | parameters | trained | positions | of reports | load s | load peak GB | forward s "
        "| backward s | optimizer s | tokens/s | useful TFLOP/s | hardware TFLOP/s | peak GB |\n"
        + "|---" * 14
        + "|\n",
    ]
    for row in result["rows"]:
        counts = row["parameters"]
        parts = " | ".join(
            f"{statistics.median(row['seconds'][n]):.3f}"
            for n in ("forward", "backward", "optimizer")
        )
        lines.append(
            f"| {row['micro_batch']} | {(counts['decoder'] + counts['head']) / 1e9:.3f} G | "
            f"{counts['trained'] / 1e6:.1f} M | {row['positions']} | {row['report_positions']} | "
            f"{row['load_seconds']:.1f} | {row['load_peak_bytes'] / 1e9:.2f} | {parts} | "
            f"{row['tokens_per_second']:.1f} | {row['model_flops_per_second'] / 1e12:.2f} | "
            f"{row['hardware_flops_per_second'] / 1e12:.2f} | {row['peak_bytes'] / 1e9:.2f} |\n"
        )
    return "".join(lines)


@quiet_main
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    options = _parse_arguments(arguments)
    begin = time.monotonic()
    geometry = [f"generator.model={options.geometry}"] if options.geometry else []
    config = load_config(options.config, [*geometry, *options.overrides])
    layers = (
        options.layers or pretrained.read_model_config(config.generator.model).num_hidden_layers
    )
    rows = measure_generator(
        config, options.layers, options.micro_batch, options.cue_words, options.rounds
    )
    chosen = config.generator
    facts = {
        "versions": {
            name: version
            for name, version in package_versions().items()
            if name in ("torch", "transformers", "peft", "bitsandbytes")
        },
        "config": config.name,
        "geometry": chosen.model,
        "layers": layers,
        "quantization": chosen.quantization,
        "lora_rank": chosen.lora_rank,
        "loss_chunk": chosen.loss_chunk,
        "checkpointing": chosen.activation_checkpointing,
        "rounds": options.rounds,
        "rows": rows,
    }
    publish_result(options.out, "report-step", begin, facts, to_markdown)
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report_step", description=(__doc__ or "").split("\n")[0]
    )
    default = "large" if torch.cuda.is_available() else "tiny"
    parser.add_argument("--config", default=default, help="default: large on a GPU, else tiny")
    parser.add_argument(
        "--geometry", metavar="MODEL", help="language model, instead of the configuration's"
    )
    parser.add_argument(
        "--layers", type=positive_int, metavar="N", help="of the language model, instead of all"
    )
    parser.add_argument("--micro-batch", type=positive_int, nargs="+", default=[1])
    parser.add_argument(
        "--cue-words",
        type=positive_int,
        default=100,
        help="length of the prompt's cues (default 100)",
    )
    parser.add_argument(
        "--rounds", type=positive_int, default=3, help="steps that count (default 3)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS_FOLDER, metavar="DIR")
    parser.add_argument(
        "overrides", nargs="*", metavar="part.field=value", help="changes of the configuration"
    )
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
