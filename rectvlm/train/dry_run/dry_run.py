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
from rectvlm.models.meta_model import build_meta_model
from rectvlm.train.dry_run.kernel_workspace import KernelWorkspaceMeter
from rectvlm.train.dry_run.memory_tracker import MemoryTracker, OperationCosts, StepPass
from rectvlm.train.dry_run.meta_ops import replace_meta_ops
from rectvlm.train.objectives import combine_losses, compute_losses
from rectvlm.train.optimizer import freeze_all_but, set_training_modes
from rectvlm.train.phases import Phase
from rectvlm.types import Batch

PROMPT_TOKENS = 192
"""Length of the chat template, request and cues. SmolLM2's tokenizer makes 75 to 150 tokens of a phantom's, and 240 of
every finding with every lesion in three places."""
VISION_PARTS = ("encoder", "classifier", "localizer")


@dataclass
class DryRunResult:
    """What a micro-batch needs beside parameters, gradients and optimizer state."""

    peak_bytes: int
    """Bytes of activations and inputs when most are alive."""
    peak_bytes_by_kind: dict[str, int]
    """The same by kind."""
    saved_bytes_by_part: dict[str, int]
    """Bytes that each part has left for the backward pass when the forward pass ends."""
    costs: dict[tuple[str, StepPass], OperationCosts]
    patches: int
    """Of the micro-batch."""
    positions: int
    """Those and language positions."""


class LengthOnlyTokenizer:
    """A tokenizer without a vocabulary: only lengths matter."""

    pad_token_id, eos_token_id, bos_token_id = 0, 0, 0
    padding_side = "left"

    def __init__(self, report_tokens: int) -> None:
        """`report`: tokens of a report."""
        self.report_tokens = report_tokens

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        """The user's turn, which carries the marker."""
        return messages[-1]["content"]

    def encode(self, text: str, **_: Any) -> list[int]:
        """Half a prompt, or a whole report."""
        return [0] * (self.report_tokens if text == REPORT_PLACEHOLDER else PROMPT_TOKENS // 2)


REPORT_PLACEHOLDER = "report"


def build_phase_meta_model(
    config: Config, phase: Phase, text_width: int, language_config: PretrainedConfig | None
) -> RectVLM:
    """The skeleton as it trains in a phase: bf16, frozen where nothing learns."""
    return apply_phase_settings(
        build_meta_model(config, phase.parts, text_width, language_config), config, phase
    )


def apply_phase_settings(model: RectVLM, config: Config, phase: Phase) -> RectVLM:
    """A skeleton, changed in place: bf16, frozen and in eval mode where nothing learns. A part that begins later is not
    frozen, since a step needs most then."""
    settings = phase.get_settings(config)
    freeze_all_but(model, settings.lr, settings.unfreeze)
    set_training_modes(model, settings)
    return model.to(torch.bfloat16)


def find_quantized_layers(model: RectVLM, config: Config) -> list[nn.Linear]:
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


def make_meta_batch(config: Config, size: int) -> Batch:
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
        reports=[REPORT_PLACEHOLDER] * size,
        spacing=config.data.spacing,
        metas=[meta] * size,
    )


def dry_run_micro_batch(
    config: Config,
    phase: Phase,
    model: RectVLM,
    micro_batch: int,
    workspace_meter: KernelWorkspaceMeter | None = None,
) -> DryRunResult:
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
        model.generator.tokenizer = LengthOnlyTokenizer(config.generator.max_report_tokens)
    ledger = MemoryTracker(
        [*model.parameters(), *model.buffers()], vocabulary, workspace_meter=workspace_meter
    )
    packed = {id(layer.weight) for layer in find_quantized_layers(model, config)}
    hooks = _register_hooks(model, ledger)
    try:
        with replace_meta_ops(ledger, packed, is_padded=micro_batch > 1), ledger:
            with ledger.attribute_to("inputs"):
                batch = make_meta_batch(config, micro_batch)
            outputs = model(batch)
            with ledger.attribute_to("losses"):
                loss = combine_losses(
                    compute_losses(
                        outputs, batch, phase.tasks, config.train.localization_loss_weights
                    ),
                    config.train.loss_weights,
                )
                ledger.claim_graph_nodes([loss])
            positions = outputs.token_count
            patches = positions - (
                0 if outputs.report_loss is None else outputs.report_loss.position_count
            )
            del outputs
            kept = {part: size for part, size in ledger.live_bytes_by_kind.items() if size}
            ledger.is_backward = True
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return DryRunResult(
        ledger.peak_bytes, ledger.peak_bytes_by_kind, kept, dict(ledger.costs), patches, positions
    )


def _register_hooks(model: RectVLM, ledger: MemoryTracker) -> list[Any]:
    """Hooks that tell the ledger which part runs, and that take gradients away as the engine does."""
    parts: dict[str, nn.Module] = {
        name: getattr(model, name) for name in VISION_PARTS if getattr(model, name, None)
    }
    if model.generator is not None:
        parts["language model"], parts["resampler"] = model.generator, model.generator.resampler
    stack: list[str] = []
    hooks: list[Any] = []

    def enter(name: str) -> None:
        stack.append(ledger.current_part)
        ledger.current_part = name

    def leave(out: Any) -> None:
        ledger.claim_graph_nodes(
            tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor)
        )
        ledger.current_part = stack.pop()

    for name, module in parts.items():
        hooks.append(module.register_forward_pre_hook(lambda *_, name=name: enter(name)))
        hooks.append(module.register_forward_hook(lambda *seen: leave(seen[-1])))
    for parameter in model.parameters():
        if parameter.requires_grad:
            # The engine moves each gradient to its bucket, which is counted by itself.
            hooks.append(parameter.register_post_accumulate_grad_hook(_drop_gradient))
    return hooks


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
