"""The report prompt: cues and request in the chat template of the language model.

The cues begin with what was known before the CT, the indication and the technique, where a sample
has them.

A marker in the user's turn stands where the visual tokens go. `check_tokenizer` finds out whether a
tokenizer can render such a prompt before any weights are read.
"""

import textwrap
from typing import Any

from jinja2 import TemplateError

from rectvlm.types import UserError

VOLUME_MARKER = "<volume>"
SYSTEM_TEXT = "You are a radiologist. You write truthful, concise reports of chest CT scans."
REQUEST_TEXT = "Write the Findings and Impression sections of the report."
MAX_CONTEXT_CHARACTERS = 160
"""Characters at which an indication and a technique are cut, each; about 35 tokens."""
PromptTokens = tuple[list[int], list[int]]
"""Token ids before and after the visual tokens."""


def encode_report_prompt(tokenizer: Any, cues: str) -> PromptTokens:
    """Token ids of the prompt before and after the visual tokens."""
    before, marker, after = _render_prompt(tokenizer, cues).partition(VOLUME_MARKER)
    assert marker, "the chat template dropped the user's turn"
    encode = tokenizer.encode
    return encode(before, add_special_tokens=False), encode(after, add_special_tokens=False)


def describe_examination(indication: str | None, technique: str | None) -> str:
    """Sentences with the indication and the technique, on one line; empty without either."""
    sentences = []
    for title, text in (("Indication", indication), ("Technique", technique)):
        words = " ".join((text or "").replace(VOLUME_MARKER, " ").split())
        if words:
            cut = textwrap.shorten(words, MAX_CONTEXT_CHARACTERS, placeholder=" …")
            end = "" if cut[-1] in ".?!…" else "."
            sentences.append(f"{title}: {cut}{end}")
    return " ".join(sentences)


def _render_prompt(tokenizer: Any, cues: str) -> str:
    turn = f"{VOLUME_MARKER}\n{cues}\n{REQUEST_TEXT}"
    messages = [{"role": "system", "content": SYSTEM_TEXT}, {"role": "user", "content": turn}]
    try:
        return _apply_chat_template(tokenizer, messages)
    except TemplateError:  # Gemma's template knows no system role
        messages = [{"role": "user", "content": f"{SYSTEM_TEXT}\n\n{turn}"}]
        return _apply_chat_template(tokenizer, messages)


def _apply_chat_template(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def check_tokenizer(tokenizer: Any, embedding_count: int, where: object) -> None:
    """Check that a tokenizer can render the report prompt and end a report.

    Args:
        tokenizer: tokenizer of the language model.
        embedding_count: number of word embeddings of the language model.
        where: the language model, for the message.

    Raises:
        UserError: the chat template cannot render the prompt, or the tokenizer uses token ids that
            the language model lacks.
    """
    cues = "No findings suggested."
    try:
        if VOLUME_MARKER not in _render_prompt(tokenizer, cues):
            raise TemplateError("the text of the user's turn is not in its output")
    except (TemplateError, TypeError) as error:
        raise UserError(
            f"The chat template of the language model {where} cannot make the report prompt, a "
            f"system and a user turn of plain text ({str(error).splitlines()[0]}); mend "
            "`chat_template` in its tokenizer_config.json, or choose another model."
        ) from error

    before, after = encode_report_prompt(tokenizer, cues)
    ids = {
        "prompt": max(before + after),
        "end": tokenizer.eos_token_id,
        "padding": tokenizer.pad_token_id,
    }
    for name, number in ids.items():
        if number >= embedding_count:
            raise UserError(
                f"The tokenizer of the language model {where} uses the token {number} ({name}), "
                f"but the model has word embeddings for 0 to {embedding_count - 1} alone; give "
                "the model and the tokenizer that belong together."
            )
