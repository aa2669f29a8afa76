"""A training step on the meta device: the real modules, losses and backward pass, without numbers."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from rectvlm.config import Config
from rectvlm.labels import N_FINDINGS, N_LESIONS
from rectvlm.models import RectVLM
from rectvlm.models.skeleton import skeleton
from rectvlm.plan.ledger import Ledger, Stage, Work
from rectvlm.plan.standins import stand_ins
from rectvlm.plan.workarea import WorkAreas
from rectvlm.train.objectives import losses, total
from rectvlm.train.optim import freeze_all_but, set_modes
from rectvlm.train.phases import Phase
from rectvlm.types import Batch

PROMPT_TOKENS = 192
"""Length of the chat template, request and cues. SmolLM2's tokenizer makes 75 to 150 tokens of a phantom's, and 240 of
every finding with every lesion in three places."""
TOWER_PARTS = ("encoder", "classifier", "localizer")


@dataclass
class Rehearsal:
    """What a micro-batch needs beside parameters, gradients and optimizer state."""

    peak: int
    """Bytes of activations and inputs when most are alive."""
    at_peak: dict[str, int]
    """The same by kind."""
    kept: dict[str, int]
    """Bytes that each part has left for the backward pass when the forward pass ends."""
    work: dict[tuple[str, Stage], Work]
    patches: int
    """Of the micro-batch."""
    positions: int
    """Those and language positions."""


class Words:
    """A tokenizer without a vocabulary: only lengths matter."""

    pad_token_id, eos_token_id, bos_token_id = 0, 0, 0
    padding_side = "left"

    def __init__(self, report: int) -> None:
        """`report`: tokens of a report."""
        self.report = report

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        """The user's turn, which carries the marker."""
        return messages[-1]["content"]

    def encode(self, text: str, **_: Any) -> list[int]:
        """Half a prompt, or a whole report."""
        return [0] * (self.report if text == REPORT else PROMPT_TOKENS // 2)


REPORT = "report"


def build(config: Config, phase: Phase, text_width: int, language: PretrainedConfig | None) -> RectVLM:
    """The skeleton as it trains in a phase: bf16, frozen where nothing learns."""
    return as_trained(skeleton(config, phase.parts, text_width, language), config, phase)


def as_trained(model: RectVLM, config: Config, phase: Phase) -> RectVLM:
    """A skeleton, changed in place: bf16, frozen and in eval mode where nothing learns. A part that begins later is not
    frozen, since a step needs most then."""
    settings = phase.settings(config)
    freeze_all_but(model, settings.lr, settings.unfreeze)
    set_modes(model, settings)
    return model.to(torch.bfloat16)


def packed_layers(model: RectVLM, config: Config) -> list[nn.Linear]:
    """Linear layers that bitsandbytes packs: all of the language model's but the output layer and the adapters."""
    if model.generator is None or config.generator.quantization == "none":
        return []
    language: Any = model.generator.language_model
    output = language.get_output_embeddings()
    return [
        module
        for name, module in language.named_modules()
        if isinstance(module, nn.Linear) and module is not output and ".lora_" not in name
    ]


def meta_batch(config: Config, size: int) -> Batch:
    """Samples without numbers: full volumes, every label and lesion known, a report of the greatest length."""
    grid = config.data.grid

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    meta: Any = SimpleNamespace(regions_source="rehearsal")
    return Batch(
        keys=["rehearsal"] * size,
        ct=empty(size, *grid, dtype=torch.int16),
        lesions=empty(size, *grid, dtype=torch.uint8),
        regions=empty(size, *grid, dtype=torch.uint8),
        regions_known=empty(size, dtype=torch.bool),
        lesions_annotated=empty(size, N_LESIONS, dtype=torch.bool),
        lesions_partial=empty(size, N_LESIONS, dtype=torch.bool),
        labels=empty(size, N_FINDINGS, dtype=torch.float32),
        labels_known=empty(size, N_FINDINGS, dtype=torch.bool),
        reports=[REPORT] * size,
        spacing=config.data.spacing,
        meta=[meta] * size,
    )


def rehearse(
    config: Config, phase: Phase, model: RectVLM, micro_batch: int, areas: WorkAreas | None = None
) -> Rehearsal:
    """Run one micro-batch forward and backward.

    Args:
        config: of the model.
        phase: which losses.
        model: from `build`.
        micro_batch: samples.
        areas: of kernels, as measured; without them the peak is that of the tensors.
    """
    vocabulary = None
    if model.generator is not None:
        language: Any = model.generator.language_model
        vocabulary = language.get_output_embeddings().weight.shape[0]
        model.generator.tokenizer = Words(config.generator.max_report_tokens)
    ledger = Ledger([*model.parameters(), *model.buffers()], vocabulary, areas=areas)
    packed = {id(layer.weight) for layer in packed_layers(model, config)}
    hooks = _follow(model, ledger)
    try:
        with stand_ins(ledger, packed, padded=micro_batch > 1), ledger:
            with ledger.within("inputs"):
                batch = meta_batch(config, micro_batch)
            outputs = model(batch)
            with ledger.within("losses"):
                loss = total(losses(outputs, batch, phase.tasks, config.train.localization), config.train.losses)
                ledger.sign([loss])
            positions = outputs.tokens
            patches = positions - (0 if outputs.report is None else outputs.report.positions)
            del outputs
            kept = {part: size for part, size in ledger.live.items() if size}
            ledger.in_backward = True
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return Rehearsal(ledger.peak, ledger.at_peak, kept, dict(ledger.work), patches, positions)


def _follow(model: RectVLM, ledger: Ledger) -> list[Any]:
    """Hooks that tell the ledger which part runs, and that take gradients away as the engine does."""
    parts: dict[str, nn.Module] = {name: getattr(model, name) for name in TOWER_PARTS if getattr(model, name, None)}
    if model.generator is not None:
        parts["language model"], parts["resampler"] = model.generator, model.generator.resampler
    stack: list[str] = []
    hooks: list[Any] = []

    def enter(name: str) -> None:
        stack.append(ledger.part)
        ledger.part = name

    def leave(out: Any) -> None:
        ledger.sign(tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor))
        ledger.part = stack.pop()

    for name, module in parts.items():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: enter(name)))
        hooks.append(module.register_forward_hook(lambda *seen: leave(seen[-1])))
    for parameter in model.parameters():
        if parameter.requires_grad:
            # The engine moves each gradient to its bucket, which is counted by itself.
            hooks.append(parameter.register_post_accumulate_grad_hook(_drop))
    return hooks


def _drop(parameter: Tensor) -> None:
    parameter.grad = None
