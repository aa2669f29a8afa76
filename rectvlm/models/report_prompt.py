"""The report prompt: the language model's own chat template around a marker, the cues and the request.

The marker stands in the user's turn, where the visual tokens go. Whether a tokenizer can do all that is asked before
weights are read.
"""

from typing import Any

from jinja2 import TemplateError

from rectvlm.types import UserError

VOLUME_MARKER = "<volume>"
SYSTEM_TEXT = "You are a radiologist. You write truthful, concise reports of chest CT scans."
REQUEST_TEXT = "Write the Findings and Impression sections of the report."
PromptTokens = tuple[list[int], list[int]]
"""Token ids before and after the visual tokens."""


def encode_report_prompt(tokenizer: Any, cues: str) -> PromptTokens:
    """Token ids of the prompt around the visual tokens."""
    before, marker, after = _render_prompt(tokenizer, cues).partition(VOLUME_MARKER)
    assert marker, "the chat template dropped the user's turn"
    encode = tokenizer.encode
    return encode(before, add_special_tokens=False), encode(after, add_special_tokens=False)


def _render_prompt(tokenizer: Any, cues: str) -> str:
    """The prompt with its marker."""
    turn = f"{VOLUME_MARKER}\n{cues}\n{REQUEST_TEXT}"
    try:
        return _apply_chat_template(
            tokenizer,
            [{"role": "system", "content": SYSTEM_TEXT}, {"role": "user", "content": turn}],
        )
    except TemplateError:  # Gemma's template knows no system role
        return _apply_chat_template(
            tokenizer, [{"role": "user", "content": f"{SYSTEM_TEXT}\n\n{turn}"}]
        )


def _apply_chat_template(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def check_tokenizer(tokenizer: Any, embedding_count: int, where: object) -> None:
    """See whether reports can be asked for and ended.

    Args:
        tokenizer: of the language model.
        rows: word embeddings that the language model has.
        where: the language model, for the message.

    Raises:
        UserError: a chat template that cannot render the prompt, or token ids that the language model lacks.
    """
    cues = "No findings suggested."
    try:
        if VOLUME_MARKER not in _render_prompt(tokenizer, cues):
            raise TemplateError("the text of the user's turn is not in what it makes")
    except (TemplateError, TypeError) as error:
        raise UserError(
            f"The chat template of the language model {where} cannot make the report prompt, a system and a user turn "
            f"of plain text ({str(error).splitlines()[0]}); mend `chat_template` in its tokenizer_config.json, or "
            "choose another model."
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
                f"The tokenizer of the language model {where} uses the token {number} ({name}), but the model has word "
                f"embeddings for 0 to {embedding_count - 1} alone; give the model and the tokenizer that belong together."
            )
