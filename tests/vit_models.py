"""Small 2D vision transformers of Transformers with random weights, as files of each layout."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 48,
    "patch_size": 8,
}
"""Those of the tiny configuration."""
MAE_DECODER = {
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 24,
    "mask_ratio": 0.0,
}


def make_vit(kind: str, **changes: Any) -> nn.Module:
    """A ViT whose weights are large enough that every part of it shows in its features."""
    hidden = {"intermediate_size": 96}
    classes: dict[str, tuple[type, type, dict[str, Any]]] = {
        "vit": (ViTModel, ViTConfig, hidden),
        "vit-classifier": (ViTForImageClassification, ViTConfig, hidden),
        "mae": (ViTMAEModel, ViTMAEConfig, hidden | MAE_DECODER),
        "mae-pretraining": (ViTMAEForPreTraining, ViTMAEConfig, hidden | MAE_DECODER),
        "dinov2": (Dinov2Model, Dinov2Config, {"mlp_ratio": 2}),
        "dinov2-swiglu": (Dinov2Model, Dinov2Config, {"mlp_ratio": 2, "use_swiglu_ffn": True}),
        "dinov2-registers": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, {"mlp_ratio": 2}),
        "dinov3": (DINOv3ViTModel, DINOv3ViTConfig, hidden),
        "siglip": (SiglipVisionModel, SiglipVisionConfig, hidden),
        "clip": (CLIPVisionModel, CLIPVisionConfig, hidden),
    }
    model_class, config_class, more = classes[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**(SIZES | more | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2 if parameter.ndim > 1 else 0.1)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model


@torch.no_grad()
def compute_features(model: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
    """Patches (B, N, C) after the last norm, and the class token (B, C) where there is one."""
    base = getattr(model, "vit", model)
    patch = base.config.patch_size
    count = pixels.shape[2] // patch * (pixels.shape[3] // patch)
    options: dict[str, Any] = {}
    if not isinstance(base, Dinov2Model):  # which always interpolates
        options["interpolate_pos_encoding"] = True
    if isinstance(base, ViTMAEModel):
        # Without this order it shuffles its patches.
        options["noise"] = torch.linspace(0, 1, count).expand(len(pixels), -1)
    hidden = base(pixels, **options).last_hidden_state
    return hidden[:, -count:], hidden[:, 0] if hidden.shape[1] > count else None


def save_as_timm(model: nn.Module, folder: Path, prefix: str = "") -> Path:
    """Save a ViT or DINOv2 with the names of timm: queries, keys and values in one tensor."""
    model.save_pretrained(folder / "transformers")
    renames = {
        r"embeddings\.cls_token": "cls_token",
        r"embeddings\.mask_token": "mask_token",
        r"embeddings\.register_tokens": "reg_token",
        r"embeddings\.position_embeddings": "pos_embed",
        r"embeddings\.patch_embeddings\.projection": "patch_embed.proj",
        r"encoder\.layer": "blocks",
        r"attention\.output\.dense": "attn.proj",
        r"layernorm_before": "norm1",
        r"layernorm_after": "norm2",
        r"intermediate\.dense": "mlp.fc1",
        r"(\d)\.output\.dense": r"\1.mlp.fc2",
        r"layer_scale(\d)\.lambda1": r"ls\1.gamma",
        r"^layernorm": "norm",
    }
    tensors, fused = {}, re.compile(r"(.*)attention\.attention\.query\.(weight|bias)")
    saved = load_file(folder / "transformers" / "model.safetensors")
    for name, tensor in saved.items():
        match = fused.fullmatch(name)
        if match:
            parts = [name.replace("query", part) for part in ("query", "key", "value")]
            tensor = torch.cat([saved[part] for part in parts])
            name = f"{match[1]}attn.qkv.{match[2]}"
        elif "attention.attention." in name:
            continue
        for pattern, replacement in renames.items():
            name = re.sub(pattern, replacement, name)
        tensors[prefix + name] = tensor
    save_file(tensors, folder / "timm.safetensors")
    return folder / "timm.safetensors"
