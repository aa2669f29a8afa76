"""Layouts of 2D vision transformers in files: names of their tensors, and what they mean.

A layout is recognized by the name of its patch kernel, whatever prefix a file puts before it
(`vit.`, `vision_model.`, `visual.trunk.`). Names are the files' own; `VIT_NAMES` are those that
`rectvlm.models.inflate_vit` reads:

    patch.weight (C, channels, y, x), patch.bias (C,)
    cls (C,), positions (tokens, C), norm.weight and norm.bias (C,)
    blocks.N.{norm1, norm2, q, k, v or qkv, out, fc1, fc2}.{weight, bias}, blocks.N.{scale1, scale2}
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from rectvlm.types import UserError

MAX_LISTED_NAMES = 8

IMAGENET_NORMALIZATION = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF_NORMALIZATION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class VitLayout:
    """Names of one family of files."""

    name: str
    """Name for messages."""
    patch: str
    """Module of the patch kernel."""
    blocks: str
    """What stands before the number of a block."""
    tensors: dict[str, str]
    """Names outside the blocks, and ours."""
    modules: dict[str, str]
    """Modules of a block, and ours."""
    normalization: tuple[tuple[float, ...], tuple[float, ...]]
    """Mean and standard deviation of each input channel, where no file beside the weights says
    them; of images in [0, 1]."""
    resizes_with_antialias: bool = False
    """Whether its own implementation filters positions before it makes their grid smaller."""


_TIMM = VitLayout(
    "timm",
    patch="patch_embed.proj",
    blocks="blocks.",
    tensors={"cls_token": "cls", "pos_embed": "positions"},
    modules={
        "norm1": "norm1",
        "norm2": "norm2",
        "attn.qkv": "qkv",
        "attn.proj": "out",
        "mlp.fc1": "fc1",
        "mlp.fc2": "fc2",
        "ls1.gamma": "scale1",
        "ls2.gamma": "scale2",
    },
    normalization=IMAGENET_NORMALIZATION,
    resizes_with_antialias=True,
)
_TRANSFORMERS = VitLayout(
    "Transformers",
    patch="embeddings.patch_embeddings.projection",
    blocks="encoder.layer.",
    tensors={
        "embeddings.cls_token": "cls",
        "embeddings.position_embeddings": "positions",
        "layernorm.weight": "norm.weight",
        "layernorm.bias": "norm.bias",
    },
    modules={
        "attention.attention.query": "q",
        "attention.attention.key": "k",
        "attention.attention.value": "v",
        "attention.output.dense": "out",
        # ViT and MAE.
        "layernorm_before": "norm1",
        "layernorm_after": "norm2",
        "intermediate.dense": "fc1",
        "output.dense": "fc2",
        # DINOv2.
        "norm1": "norm1",
        "norm2": "norm2",
        "mlp.fc1": "fc1",
        "mlp.fc2": "fc2",
        "layer_scale1.lambda1": "scale1",
        "layer_scale2.lambda1": "scale2",
    },
    normalization=IMAGENET_NORMALIZATION,
)
_SIGLIP = VitLayout(
    "SigLIP",
    patch="embeddings.patch_embedding",
    blocks="encoder.layers.",
    tensors={
        "embeddings.class_embedding": "cls",
        "embeddings.position_embedding.weight": "positions",
        "post_layernorm.weight": "norm.weight",
        "post_layernorm.bias": "norm.bias",
    },
    modules={
        "layer_norm1": "norm1",
        "layer_norm2": "norm2",
        "mlp.fc1": "fc1",
        "mlp.fc2": "fc2",
        "self_attn.q_proj": "q",
        "self_attn.k_proj": "k",
        "self_attn.v_proj": "v",
        "self_attn.out_proj": "out",
    },
    normalization=HALF_NORMALIZATION,
)
_DINOV3 = VitLayout(
    "DINOv3", "embeddings.patch_embeddings", "layer.", {}, {}, normalization=IMAGENET_NORMALIZATION
)
LAYOUTS = (_TIMM, _TRANSFORMERS, _SIGLIP, _DINOV3)

_UNUSED = re.compile(
    r"(.*\.)?(head|head_dist|classifier|pooler|attn_pool|pre_logits|mask_token|position_ids"
    r"|text|text_model|text_projection|visual_projection|logit_scale|logit_bias"
    r"|decoder|decoder_\w+)(\.|$)"
)
"""Heads, text towers, decoders and mask tokens, which no feature of an image depends on."""
_UNSUPPORTED = {
    r"(register_tokens|reg_token)$": "register tokens",
    r"dist_token$": "a distillation token",
    r"(^|\.)(pre_layrnorm|norm_pre|ln_pre)\.": "a norm before its first block",
    r"\.(q_norm|k_norm)\.": "norms of queries and keys",
    r"\.(w12|w3|weights_in|gate_proj|fc1_g)\.": "a gated MLP (SwiGLU)",
    r"relative_position": "relative position biases",
    r"(^|\.)(rope|rope_embed|rotary\w*)(\.|$)": "rotary positions",
    r"(^|\.)fc_norm\.": "a norm after pooling in place of the last norm",
}
"""Names of what a ViT may have and our encoder has not, and the words for it."""


def find_layout(names: Collection[str], where: str) -> tuple[VitLayout, str]:
    """Recognize the layout of a file, and the prefix of its names.

    Raises:
        UserError: no layout is recognized, or there are several ViTs in the file.
    """
    matches = [
        (layout, name.removesuffix(f"{layout.patch}.weight"))
        for layout in LAYOUTS
        for name in names
        if re.search(rf"(^|\.){re.escape(layout.patch)}\.weight$", name)
    ]
    if len(matches) == 1:
        return matches[0]
    known = ", ".join(f"{layout.patch}.weight ({layout.name})" for layout in LAYOUTS)
    if matches:
        prefixes = ", ".join(repr(prefix) for _, prefix in matches)
        raise UserError(
            f"{where} holds {len(matches)} image encoders, with the prefixes {prefixes}: give a "
            "file that holds one."
        )
    raise UserError(
        f"{where} holds no ViT: expected a patch kernel named {known}, found "
        f"{join_names(sorted(names))}; give a ViT in one of these layouts."
    )


def translate_names(
    names: Iterable[str], layout: VitLayout, prefix: str, where: str
) -> tuple[dict[str, str], list[str]]:
    """Translate the names of a file.

    Args:
        names: names of tensors that are not empty.
        layout: the file's layout.
        prefix: the file's prefix.
        where: the file, for messages.

    Returns:
        Our name of each tensor of the ViT, and the names of the file that an encoder does not need.

    Raises:
        UserError: the ViT has what our encoder has not, or names that are not known.
    """
    translated, unused, unknown = {}, [], []
    for name in names:
        ours = _translate(name.removeprefix(prefix), layout) if name.startswith(prefix) else None
        if ours is not None:
            translated[name] = ours
        elif _UNUSED.match(name):
            unused.append(name)
        else:
            unknown.append(name)
    _refuse_other_architectures(names, layout, where)
    if unknown:
        raise UserError(
            f"{where} has tensors that are not known in the layout of {layout.name}: "
            f"{join_names(sorted(unknown))}; give a plain ViT, or a file without them."
        )
    return translated, sorted(unused)


def _translate(name: str, layout: VitLayout) -> str | None:
    """Our name of a tensor, given without the prefix; None if the layout has no such name."""
    own_names = {f"{layout.patch}.{kind}": f"patch.{kind}" for kind in ("weight", "bias")}
    own_names |= {f"norm.{kind}": f"norm.{kind}" for kind in ("weight", "bias")}
    own_names |= layout.tensors
    if name in own_names:
        return own_names[name]
    match = re.fullmatch(rf"{re.escape(layout.blocks)}(\d+)\.(.+)", name)
    if match is None:
        return None
    number, rest = match.groups()
    module, _, kind = rest.rpartition(".")
    if rest in layout.modules:
        return f"blocks.{number}.{layout.modules[rest]}"
    if module in layout.modules and kind in ("weight", "bias"):
        return f"blocks.{number}.{layout.modules[module]}.{kind}"
    return None


def _refuse_other_architectures(names: Iterable[str], layout: VitLayout, where: str) -> None:
    features = {"rotary positions"} if layout is _DINOV3 else set()
    for pattern, feature in _UNSUPPORTED.items():
        if any(re.search(pattern, name) and not _UNUSED.match(name) for name in names):
            features.add(feature)
    if features:
        raise UserError(
            f"{where} holds a ViT with {' and '.join(sorted(features))}, which the encoder "
            "slice-region has not, so that its features would differ: give a plain ViT."
        )


def join_names(names: Collection[str]) -> str:
    """The first names, and the number of the others."""
    rest = len(names) - MAX_LISTED_NAMES
    listed = ", ".join(list(names)[:MAX_LISTED_NAMES]) or "nothing"
    return listed + (f" and {rest} more" if rest > 0 else "")
