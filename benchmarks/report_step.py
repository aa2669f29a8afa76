"""A training step of the report generator at its language model's true geometry.

    python -m benchmarks.report_step [--config large] [--geometry meta-llama/Llama-3.1-70B-Instruct]
        [--layers N]

It runs on one device, without a network or a licence. The language model has random weights and is
made and packed layer by layer, so that it never exists in bfloat16. Then LoRA and resampler train
on random image features: forward, backward, AdamW with float32 masters. Tokens are all positions of
the language model: prompt, visual tokens and report.

Floating-point operations are 2 a parameter and position for a forward pass, as many for the
gradient of the activations and as many for computing again what checkpointing dropped; frozen
weights have no gradient. So useful work is 4N a token and the hardware's 6N, where N are the
decoder's parameters at every position and the output layer's at report positions. Attention's own
products and the trained matrices' gradients (below 1%) are left out.
"""

import argparse
import logging
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.measurements import Comparison, Repetitions, make_table
from benchmarks.publishing import (
    Program,
    add_config_options,
    make_parser,
    positive_int,
    publish_result,
    quiet_main,
)
from benchmarks.timing import SectionTimer, default_device, synchronized_time
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
from rectvlm.types import JsonObject, UserError

log = logging.getLogger(__name__)

STAND_IN_TOKENIZER = "bundled:tiny-llama"
"""Tokenizer whose few tokens are in every vocabulary; which tokens are read changes no shape."""
STEP_SECTIONS = ("forward", "backward", "optimizer")
REPORTED_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


class RandomWeights:
    """A checkpoint that is drawn when it is read."""

    def __contains__(self, name: str) -> bool:
        return True

    def read_tensor(self, name: str, shape: torch.Size | None, device: torch.device) -> Tensor:
        """Draw normal values; norms are 1 and biases 0."""
        assert shape is not None, f"{name} is not packed"
        if len(shape) == 1:
            value = 0.0 if name.endswith("bias") else 1.0
            return torch.full(shape, value, dtype=torch.bfloat16, device=device)
        return torch.randn(shape, dtype=torch.bfloat16, device=device).mul_(0.02)


class MasterWeightAdamW:
    """AdamW on float32 copies of bfloat16 parameters, as the engine keeps them."""

    def __init__(self, parameters: list[nn.Parameter], clip: float | None = None) -> None:
        """Copy the parameters; `clip` is the largest norm of all gradients together."""
        self.parameters, self.clip = parameters, clip
        self.copies = [parameter.detach().float() for parameter in parameters]
        self.optimizer = torch.optim.AdamW(self.copies, lr=1e-4)

    def step(self) -> None:
        """Take a step with the gradients, and drop them."""
        for master, parameter in zip(self.copies, self.parameters, strict=True):
            assert parameter.grad is not None, "a trained parameter got no gradient"
            master.grad, parameter.grad = parameter.grad.float(), None
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.copies, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for master, parameter in zip(self.copies, self.parameters, strict=True):
            parameter.data.copy_(master)


def build_language_model(
    config: Config,
    layers: int | None,
    device: torch.device,
    shard_module: ShardModule | None = None,
) -> tuple[LanguageModel, dict[str, int]]:
    """Build a language model of true geometry with random weights, packed as they are drawn.

    Args:
        config: the configuration, for geometry, packing and LoRA.
        layers: number of layers; None is all.
        device: the device where weights are packed and kept.
        shard_module: shards a module as soon as it is packed, as in `load_language_model`.

    Returns:
        The model; numbers of parameters of the decoder, the output layer and the word embeddings.

    Raises:
        UserError: no such geometry, or a vocabulary smaller than the stand-in tokenizer's.
    """
    geometry = pretrained.read_model_config(config.generator.model)
    tokenizer = load_tokenizer(pretrained.resolve_model(STAND_IN_TOKENIZER))
    if geometry.vocab_size < len(tokenizer):
        raise UserError(
            f"{config.generator.model} has {geometry.vocab_size} tokens, but the benchmark's text "
            f"needs {len(tokenizer)}; choose a larger geometry."
        )
    if layers is not None:
        geometry.num_hidden_layers = layers
        if getattr(geometry, "layer_types", None):
            geometry.layer_types = geometry.layer_types[:layers]
    model = build_meta_causal_lm(geometry)
    words = _count_parameters(model.get_input_embeddings())
    counts = {
        "decoder": _count_parameters(model.base_model) - words,
        "head": _count_parameters(model.get_output_embeddings()),
        "words": words,
    }
    settings = build_quantization_config(config.generator)
    if settings is not None:
        replace_linear_with_4bit(model, settings, None)
    torch.manual_seed(0)
    spread = materialize_and_measure(model, RandomWeights(), device, shard_module)
    adapted = add_lora(model, config.generator)
    return LanguageModel(adapted, tokenizer, geometry.hidden_size, spread), counts


def _count_parameters(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def build_generator(
    config: Config, layers: int | None, device: torch.device
) -> tuple[ReportGenerator, dict[str, int]]:
    """Build the generator around `build_language_model`; count its trained parameters too.

    Raises:
        UserError: as `build_language_model`.
    """
    language_model, counts = build_language_model(config, layers, device)
    generator = ReportGenerator(config.generator, config.encoder.width, language_model).train()
    generator.resampler.to(device, torch.bfloat16)
    counts["trained"] = sum(p.numel() for p in generator.parameters() if p.requires_grad)
    return generator, counts


def make_features(config: Config, micro_batch: int, device: torch.device) -> ImageFeatures:
    """Make random features of the configuration's grid."""
    z, y, x = (n // p for n, p in zip(config.data.grid, config.encoder.patch, strict=True))
    width = config.encoder.width

    def random_tokens(*shape: int) -> Tensor:
        return torch.randn(micro_batch, *shape, width, device=device, dtype=torch.bfloat16)

    global_token, patches = random_tokens(), random_tokens(z * y * x)
    return ImageFeatures(global_token, patches, random_tokens(N_REGIONS), (z, y, x), patches)


def measure_generator(
    config: Config, layers: int | None, micro_batches: Sequence[int], cue_words: int, rounds: int
) -> list[JsonObject]:
    """Build the generator once; for each micro-batch warm up with a step, and time the others."""
    device = default_device()
    reset_peak_memory()
    start_seconds = synchronized_time(device)
    generator, counts = build_generator(config, layers, device)
    loading: JsonObject = {
        "load_seconds": synchronized_time(device) - start_seconds,
        "load_peak_bytes": peak_memory_bytes(),
        "parameters": counts,
        "loaded_bytes": torch.cuda.memory_allocated() if device.type == "cuda" else None,
    }
    trainable = [parameter for parameter in generator.parameters() if parameter.requires_grad]
    optimizer = MasterWeightAdamW(trainable)
    rows: list[JsonObject] = []
    for micro_batch in micro_batches:
        features = make_features(config, micro_batch, device)
        cues = ["Findings suggested:" + " nodule" * cue_words] * micro_batch
        reports = ["The lungs are clear. " * config.generator.max_report_tokens] * micro_batch
        forward = partial(generator, features, cues, reports)
        try:
            figures = _time_steps(config, forward, optimizer, counts, rounds, device)
        except torch.OutOfMemoryError as error:
            if not rows:
                raise UserError(
                    f"A micro-batch of {micro_batch} needs more memory than {device} has."
                ) from error
            log.error(
                "a micro-batch of %d needs more memory than %s has: left out", micro_batch, device
            )
            break
        rows.append(loading | {"micro_batch": micro_batch} | figures)
    return rows


def _time_steps(
    config: Config,
    forward: Callable[[], ReportLoss],
    optimizer: MasterWeightAdamW,
    counts: dict[str, int],
    rounds: int,
    device: torch.device,
) -> JsonObject:
    """Measure seconds, rates, losses and peak memory of some steps after one."""
    timer = SectionTimer(STEP_SECTIONS, device)
    losses: list[float] = []
    reset_peak_memory()
    for turn in range(rounds + 1):
        timer.start_step()
        report_loss = forward()
        timer.end_section("forward")
        report_loss.per_sample.mean().backward()
        timer.end_section("backward")
        optimizer.step()
        timer.end_section("optimizer")
        losses.append(report_loss.per_sample.mean().item())
        if turn == 0:
            timer.drop_steps()  # the first warms up
    positions, report_positions = report_loss.position_count, int(report_loss.token_counts.sum())
    step_seconds = timer.step_seconds
    decoder_work, head_work = counts["decoder"] * positions, counts["head"] * report_positions
    flops_per_weight = 6 if config.generator.activation_checkpointing else 4
    hardware_flops = flops_per_weight * decoder_work + 6 * head_work
    return {
        "seconds": timer.seconds,
        "step_seconds": step_seconds,
        "positions": positions,
        "report_positions": report_positions,
        "tokens_per_second": positions / step_seconds,
        "model_flops_per_second": 4 * (decoder_work + head_work) / step_seconds,
        "hardware_flops_per_second": hardware_flops / step_seconds,
        "peak_bytes": peak_memory_bytes(),
        "losses": losses,
    }


def list_comparisons(result: JsonObject) -> list[Comparison]:
    """List tokens a second, and the sections of a step, by micro-batch."""
    rates, sections = Repetitions(), Repetitions()
    for row in result["rows"]:
        at = str(row["micro_batch"])
        rounds = zip(*(row["seconds"][section] for section in STEP_SECTIONS), strict=True)
        rates.add("report generator", [row["positions"] / sum(step) for step in rounds], at)
        for section in STEP_SECTIONS:
            sections.add(section, row["seconds"][section], f"micro-batch {at}")
    title = f"Report generator, {result['quantization']}, one process without an engine"
    return [
        Comparison(
            f"{title}: speed",
            "tokens/s",
            rates.to_measurements(),
            better="higher",
            plot="lines",
            at_label="micro-batch",
        ),
        Comparison(f"{title}: step", "s", sections.to_measurements(), plot="stack"),
    ]


def write_text(result: JsonObject) -> str:
    """Write circumstances and a table by micro-batch."""
    columns = ["micro-batch", "parameters", "trained", "positions", "of reports", "load s"]
    columns += ["load peak GB", "forward s", "backward s", "optimizer s", "tokens/s"]
    columns += ["useful TFLOP/s", "hardware TFLOP/s", "peak GB"]
    rows: list[list[str]] = []
    for row in result["rows"]:
        counts = row["parameters"]
        parameters = counts["decoder"] + counts["head"]
        cells = [str(row["micro_batch"]), f"{parameters / 1e9:.3f} G"]
        cells += [f"{counts['trained'] / 1e6:.1f} M", str(row["positions"])]
        cells += [str(row["report_positions"]), f"{row['load_seconds']:.1f}"]
        cells.append(f"{row['load_peak_bytes'] / 1e9:.2f}")
        for section in STEP_SECTIONS:
            cells.append(f"{statistics.median(row['seconds'][section]):.3f}")
        cells.append(f"{row['tokens_per_second']:.1f}")
        cells.append(f"{row['model_flops_per_second'] / 1e12:.2f}")
        cells.append(f"{row['hardware_flops_per_second'] / 1e12:.2f}")
        rows.append([*cells, f"{row['peak_bytes'] / 1e9:.2f}"])
    kind = "of the GPU" if result["machine"]["gpus"] else "resident, the process included"
    checkpointing = "on" if result["checkpointing"] else "off"
    return (
        f"Geometry of {result['geometry']}, {result['layers']} layers, "
        f"{result['quantization']}, LoRA rank {result['lora_rank']}, random weights; activation "
        f"checkpointing {checkpointing}, logits of {result['loss_chunk']} positions at once; "
        f"median of {result['rounds']} steps after one. Memory is the peak, {kind}. "
        "Useful work is 4N a token, the hardware's 6N with checkpointing; the docstring of the "
        "script says what N holds.\n\n" + make_table(columns, rows)
    )


PROGRAM = Program("report_step", "A step of the report generator", write_text, list_comparisons)


@quiet_main
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parse_arguments(arguments)
    start_seconds = time.monotonic()
    geometry = [f"generator.model={options.geometry}"] if options.geometry else []
    config = load_config(options.config, [*geometry, *options.overrides])
    generator = config.generator
    layers = options.layers or pretrained.read_model_config(generator.model).num_hidden_layers
    rows = measure_generator(
        config, options.layers, options.micro_batch, options.cue_words, options.rounds
    )
    versions = package_versions()
    facts = {
        "versions": {name: versions[name] for name in versions if name in REPORTED_PACKAGES},
        "config": config.name,
        "geometry": generator.model,
        "layers": layers,
        "quantization": generator.quantization,
        "lora_rank": generator.lora_rank,
        "loss_chunk": generator.loss_chunk,
        "checkpointing": generator.activation_checkpointing,
        "rounds": options.rounds,
        "rows": rows,
    }
    publish_result(options.out, PROGRAM, arguments, start_seconds, facts)
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("report_step", "A training step of the report generator.")
    add_config_options(parser, "tiny")
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
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
