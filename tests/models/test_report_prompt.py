"""The report prompt in words."""

from rectvlm.models.report_prompt import (
    MAX_CONTEXT_CHARACTERS,
    VOLUME_MARKER,
    describe_examination,
)


def test_an_examination_is_one_line_and_empty_without_words() -> None:
    assert describe_examination(None, " \n") == ""
    assert describe_examination("Cough,\n\tfever", None) == "Indication: Cough, fever."
    assert describe_examination(None, "Low dose.") == "Technique: Low dose."
    both = describe_examination("Pneumonia?", "Low dose")
    assert both == "Indication: Pneumonia? Technique: Low dose."


def test_long_texts_are_cut_between_words_and_none_moves_the_image() -> None:
    text = describe_examination("cough and fever " * 40 + VOLUME_MARKER, "x" * 1000)
    indication, technique = text.split(" Technique: ")
    assert indication.endswith(("fever …", "and …", "cough …"))
    assert len(indication) <= MAX_CONTEXT_CHARACTERS + len("Indication: ")
    assert len(technique) <= MAX_CONTEXT_CHARACTERS
    assert VOLUME_MARKER not in describe_examination(f"a {VOLUME_MARKER} b", None)
