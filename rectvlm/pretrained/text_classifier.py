"""Converter of CT-RATE's official text classifier to a folder that `--labeler` takes.

Its weights are published as a state dict in a `.pth`: an encoder of the RoBERTa architecture
(RadBERT) named `model`, and a linear layer named `classifier` on its pooled first token.
`RobertaForSequenceClassification` computes the same: its head is the pooler's dense layer, a tanh
and the linear layer.
"""

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from rectvlm.files import printable_line, require_writable_folder
from rectvlm.labels import FINDINGS, N_FINDINGS
from rectvlm.types import UserError

MAX_LISTED_NAMES = 3
_PUBLISHED_PREFIXES = {
    "classifier.dense.": "model.pooler.dense.",
    "classifier.out_proj.": "classifier.",
    "roberta.": "model.",
}
"""Prefixes of the published names by those of Transformers."""
_POSITION_COUNTER = re.compile(r"model\.embeddings\.(?:position_ids|token_type_ids)")
"""Buffers that old versions of Transformers stored; they hold no weights."""


def convert_text_classifier(weights: Path, encoder: Path, out: Path) -> Path:
    """Write the folder of a sequence classifier from the published weights.

    Args:
        weights: the published `.pth`.
        encoder: folder with RadBERT's `config.json` and tokenizer.
        out: folder to write; it must not exist, or be empty.

    Raises:
        UserError: A file is missing, the `.pth` holds anything but tensors, or its tensors are not
            those of the encoder with a linear layer of 18 outputs.
    """
    out = out.expanduser().resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already: name a new folder with --out.")
    config, tokenizer = _read_encoder_folder(encoder)
    with torch.device("meta"):
        network = RobertaForSequenceClassification(config)
    tensors = _match_tensors(_read_tensors(weights), network.state_dict(), str(weights))
    network.load_state_dict(tensors, assign=True)

    require_writable_folder(out.parent)
    with tempfile.TemporaryDirectory(prefix=".rectvlm-", dir=out.parent) as folder:
        work = Path(folder) / out.name
        network.save_pretrained(work)
        tokenizer.save_pretrained(work)
        work.replace(out)  # an empty folder gives way
    return out


def _read_encoder_folder(folder: Path) -> tuple[RobertaConfig, PreTrainedTokenizerBase]:
    """Configuration with the 18 findings as its labels, and tokenizer."""
    remedy = "give a folder with config.json and the tokenizer's files of RadBERT"
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json: {remedy}.")
    try:
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = printable_line(error).rstrip(".")
        raise UserError(f"{folder} cannot be read ({reason}): {remedy}.") from None
    if not isinstance(config, RobertaConfig):
        raise UserError(
            f"{folder} holds a {config.model_type}: expected the RoBERTa architecture; {remedy}."
        )
    config.id2label = dict(enumerate(FINDINGS))
    config.label2id = {finding: i for i, finding in enumerate(FINDINGS)}
    config.problem_type = "multi_label_classification"
    return config, tokenizer


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a state dict, read without running any code of the file."""
    if not path.is_file():
        raise UserError(f"{path} is no file: give the .pth of the text classifier.")
    remedy = "give a state dict of tensors, as torch.save(model.state_dict()) writes it"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or hostile pickle can raise any
        reason = printable_line(str(error).partition("\n")[0]).rstrip(".")
        raise UserError(
            f"{path} holds anything but tensors, or is damaged ({reason}); none of its code was "
            f"run: {remedy}."
        ) from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}: {remedy}.")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(
                f"{path} holds more than tensors: found {printable_line(name)!r} of type "
                f"{type(value).__name__}; {remedy}."
            )
    return dict(content)


def _match_tensors(
    published: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str
) -> dict[str, Tensor]:
    """The published tensors by the names of Transformers.

    Args:
        published: tensors by their published names.
        expected: tensors of the network, of which only the shapes are read.
        where: the file, for messages.

    Raises:
        UserError: A tensor is missing, unexpected or of another shape.
    """
    tensors, missing, misshaped = {}, [], []
    unexpected = [name for name in published if not _POSITION_COUNTER.fullmatch(name)]
    for name, parameter in expected.items():
        published_name = _publish_name(name)
        if published_name not in published:
            missing.append(published_name)
            continue
        unexpected.remove(published_name)
        tensor = tensors[name] = published[published_name]
        if tensor.shape != parameter.shape:
            shapes = f"{list(tensor.shape)} instead of {list(parameter.shape)}"
            misshaped.append(f"{published_name} {shapes}")

    faults = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
    listing = [f"{fault} {_list_names(names)}" for fault, names in faults.items() if names]
    if listing:
        raise UserError(
            f"{where} does not hold the text classifier of the encoder's config.json with "
            f"{N_FINDINGS} outputs: {'; '.join(listing)}."
        )
    return tensors


def _publish_name(name: str) -> str:
    """Published name of a tensor of `RobertaForSequenceClassification`."""
    for prefix, published_prefix in _PUBLISHED_PREFIXES.items():
        if name.startswith(prefix):
            return published_prefix + name.removeprefix(prefix)
    raise AssertionError(f"no published name of {name}")


def _list_names(names: Sequence[str]) -> str:
    listed = ", ".join(printable_line(name) for name in names[:MAX_LISTED_NAMES])
    n_left = len(names) - MAX_LISTED_NAMES
    return f"{listed} and {n_left} more" if n_left > 0 else listed
