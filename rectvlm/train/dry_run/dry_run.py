"""A training step on the meta device: the real modules, losses and backward pass, no numbers."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from rectvlm.config import Config
from rectvlm.labels import N_FINDINGS, N_LESIONS
from rectvlm.models import RectVLM
from rectvlm.models.meta_model import build_meta_model
from rectvlm.models.tissue_patches import TYPICAL_TISSUE_SHARE, assume_tissue_share
from rectvlm.train.dry_run.kernel_workspace import KernelWorkspaceMeter
from rectvlm.train.dry_run.memory_tracker import MemoryTracker, OperationCosts, StepPass
from rectvlm.train.dry_run.meta_ops import replace_meta_ops
from rectvlm.train.objectives import combine_losses, compute_losses
from rectvlm.train.optimizer import freeze_all_but, set_training_modes
from rectvlm.train.phases import Phase
from rectvlm.train.task_loss import TargetCounts
from rectvlm.types import Batch

PROMPT_TOKENS = 192
"""Assumed length of chat template, request and cues. SmolLM2's tokenizer makes 75 to 155 tokens of
a phantom's prompt, and 245 of a prompt with every finding and with every lesion in three places. An
indication and a technique as long as they may be (`MAX_CONTEXT_CHARACTERS`) add about 70."""
REPORT_PLACEHOLDER = "report"
VISION_PARTS = ("encoder", "classifier", "localizer")


@dataclass
class DryRunResult:
    """Memory and FLOPs of a micro-batch, without parameters, gradients and optimizer state."""

    peak_bytes: int
    """Bytes of activations and inputs at the moment when most are alive."""
    peak_bytes_by_kind: dict[str, int]
    """Bytes at that moment by kind: a part, inputs, logits, backward pass, kernel workspace."""
    saved_bytes_by_part: dict[str, int]
    """Bytes saved by each part for the backward pass when the forward pass ends."""
    costs: dict[tuple[str, StepPass], OperationCosts]
    """Costs of the operations, by part and pass of the step."""
    patches: int
    """Number of image patches of the micro-batch."""
    positions: int
    """Number of image patches and language-model positions of the micro-batch."""


class CaseSize(NamedTuple):
    """Size of the cases in a dry run."""

    tissue_share: float = 1.0
    """Share of the CT's patches that are no air, of encoders that leave out air."""
    report_tokens: int | None = None
    """Tokens of a report; None or more than the configuration allows: as many as it allows."""


LARGEST_CASE = CaseSize()
"""What memory must suffice for."""
USUAL_CASE = CaseSize(TYPICAL_TISSUE_SHARE, report_tokens=400)
"""What a step takes its time for: assumed. The median of CT-RATE's reports is about 330 tokens of
Llama's, and a micro-batch is as long as its longest."""


class LengthOnlyTokenizer:
    """A tokenizer without a vocabulary, for a dry run in which only lengths matter."""

    pad_token_id, eos_token_id, bos_token_id = 0, 0, 0
    padding_side = "left"

    def __init__(self, report_tokens: int) -> None:
        """Make a tokenizer that gives `report_tokens` tokens for every report."""
        self.report_tokens = report_tokens

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        """Return the user's turn, which carries the marker of the image."""
        return messages[-1]["content"]

    def encode(self, text: str, **_: Any) -> list[int]:
        """Return the tokens of half a prompt or of a complete report, all 0."""
        is_report = text == REPORT_PLACEHOLDER
        return [0] * (self.report_tokens if is_report else PROMPT_TOKENS // 2)


def build_phase_meta_model(
    config: Config, phase: Phase, text_width: int, language_config: PretrainedConfig | None
) -> RectVLM:
    """Build the model on the meta device as it trains in a phase."""
    model = build_meta_model(config, phase.parts, text_width, language_config)
    return apply_phase_settings(model, config, phase)


def apply_phase_settings(model: RectVLM, config: Config, phase: Phase) -> RectVLM:
    """Change a meta model in place: bf16, frozen and in eval mode where nothing learns.

    A part that begins to learn later is not frozen, since a step needs most memory then.
    """
    settings = phase.get_settings(config)
    freeze_all_but(model, settings.lr, settings.unfreeze)
    set_training_modes(model, settings)
    return model.to(torch.bfloat16)


def find_quantized_layers(model: RectVLM, config: Config) -> list[nn.Linear]:
    """List the linear layers that bitsandbytes packs to 4 bits.

    These are all of the language model's but the output layer and the LoRA adapters.
    """
    if model.generator is None or config.generator.quantization == "none":
        return []
    language_model: Any = model.generator.language_model
    output_layer = language_model.get_output_embeddings()
    layers: list[nn.Linear] = []
    for name, module in language_model.named_modules():
        is_adapter = ".lora_" in name
        if isinstance(module, nn.Linear) and module is not output_layer and not is_adapter:
            layers.append(module)
    return layers


def make_meta_batch(config: Config, size: int) -> Batch:
    """Make a batch without numbers that needs the most memory that one can.

    It has full volumes, every label and lesion known, and reports of the greatest length.
    """
    grid = config.data.grid

    def empty_tensor(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    meta: Any = SimpleNamespace(regions_source="dry run", indication=None, technique=None)
    return Batch(
        keys=["dry run"] * size,
        ct=empty_tensor(size, *grid, dtype=torch.int16),
        lesions=empty_tensor(size, *grid, dtype=torch.uint8),
        regions=empty_tensor(size, *grid, dtype=torch.uint8),
        regions_known=empty_tensor(size, dtype=torch.bool),
        lesions_annotated=empty_tensor(size, N_LESIONS, dtype=torch.bool),
        lesions_partial=empty_tensor(size, N_LESIONS, dtype=torch.bool),
        labels=empty_tensor(size, N_FINDINGS, dtype=torch.float32),
        labels_known=empty_tensor(size, N_FINDINGS, dtype=torch.bool),
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
    case: CaseSize = LARGEST_CASE,
) -> DryRunResult:
    """Run one micro-batch forward and backward on the meta device.

    Args:
        config: the configuration that the model was built from.
        phase: the phase, whose tasks give the losses.
        model: a model from `build_phase_meta_model`.
        micro_batch: number of samples.
        workspace_meter: measures the workspace of kernels; without it the peak is that of the
            tensors alone.
        case: size of the cases.
    """
    vocabulary_size = None
    if model.generator is not None:
        language_model: Any = model.generator.language_model
        vocabulary_size = language_model.get_output_embeddings().weight.shape[0]
        longest = config.generator.max_report_tokens
        report_tokens = min(longest, case.report_tokens or longest)
        model.generator.tokenizer = LengthOnlyTokenizer(report_tokens)
    tracker = MemoryTracker(
        [*model.parameters(), *model.buffers()], vocabulary_size, workspace_meter=workspace_meter
    )
    quantized_weight_ids = {id(layer.weight) for layer in find_quantized_layers(model, config)}

    hooks = _register_hooks(model, tracker)
    try:
        with replace_meta_ops(tracker, quantized_weight_ids, is_padded=micro_batch > 1), tracker:
            with tracker.attribute_to("inputs"):
                batch = make_meta_batch(config, micro_batch)
            with assume_tissue_share(case.tissue_share):
                outputs = model(batch)
            with tracker.attribute_to("losses"):
                loss = _compute_total_loss(outputs, batch, phase, config)
                tracker.claim_graph_nodes([loss])
            positions, report_loss = outputs.token_count, outputs.report_loss
            patches = positions - (0 if report_loss is None else report_loss.position_count)
            del outputs, report_loss
            saved_bytes = {part: size for part, size in tracker.live_bytes_by_kind.items() if size}
            tracker.is_backward = True
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
    return DryRunResult(
        peak_bytes=tracker.peak_bytes,
        peak_bytes_by_kind=tracker.peak_bytes_by_kind,
        saved_bytes_by_part=saved_bytes,
        costs=dict(tracker.costs),
        patches=patches,
        positions=positions,
    )


def _compute_total_loss(outputs: Any, batch: Batch, phase: Phase, config: Config) -> Tensor:
    """Compute the weighted loss of a phase; the losses by task are freed on return."""
    localization_weights = config.train.localization_loss_weights
    # The batch has no values to count.
    counts = TargetCounts(labels=1, lesions=1, reports=1, outlined=(1,) * N_LESIONS)
    losses_by_task = compute_losses(outputs, batch, phase.tasks, localization_weights, counts)
    return combine_losses(losses_by_task, config.train.loss_weights)


def _register_hooks(model: RectVLM, tracker: MemoryTracker) -> list[Any]:
    """Register hooks that tell the tracker which part runs and that drop gradients as they come."""
    modules: dict[str, nn.Module] = {}
    for part in VISION_PARTS:
        if getattr(model, part, None):
            modules[part] = getattr(model, part)
    if model.generator is not None:
        modules["language model"] = model.generator
        modules["resampler"] = model.generator.resampler
    outer_parts: list[str] = []
    hooks: list[Any] = []

    def enter_part(part: str) -> None:
        outer_parts.append(tracker.current_part)
        tracker.current_part = part

    def leave_part(output: Any) -> None:
        leaves = tree_leaves(output)
        tracker.claim_graph_nodes(leaf for leaf in leaves if isinstance(leaf, Tensor))
        tracker.current_part = outer_parts.pop()

    for part, module in modules.items():
        hooks.append(module.register_forward_pre_hook(lambda *_, part=part: enter_part(part)))
        hooks.append(module.register_forward_hook(lambda *inputs: leave_part(inputs[-1])))
    for parameter in model.parameters():
        if parameter.requires_grad:
            # The engine moves each gradient to its bucket, which is counted by itself.
            hooks.append(parameter.register_post_accumulate_grad_hook(_drop_gradient))
    return hooks


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None
