"""The challenge's figures of reports: equal to what its evaluation's package computes.

`vlm3d_report_vectors.json` holds texts and the figures of pycocoevalcap 1.2 for them, METEOR's Java
program included, after the challenge's own replacements.
"""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rectvlm.labels import FINDINGS
from rectvlm.metrics.vlm3d_report_protocol import (
    REPORT_PROTOCOL_SCORES,
    MeteorProgram,
    clean_generated_text,
    score_reports_by_protocol,
)

VECTORS: dict[str, Any] = json.loads(
    Path(__file__).with_name("vlm3d_report_vectors.json").read_text(encoding="utf-8")
)


class _NoMeteor(MeteorProgram):
    """A machine without the program."""

    def __init__(self) -> None:
        self._process, self.missing = None, "not here"


@pytest.mark.parametrize("name", VECTORS)
def test_bleu_rouge_and_cider_are_those_of_the_challenge(name: str) -> None:
    row = VECTORS[name]
    scores = score_reports_by_protocol(row["generated"], row["references"], None, _NoMeteor())
    for score in REPORT_PROTOCOL_SCORES:
        if score != "meteor":
            assert scores[score] == pytest.approx(row["scores"][score], rel=1e-9, abs=1e-15), score


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("pycocoevalcap") is None or shutil.which("java") is None,
    reason="needs pycocoevalcap (the extra `challenge`) and Java",
)
def test_meteor_is_that_of_the_challenge() -> None:
    with MeteorProgram() as meteor:
        for row in VECTORS.values():
            texts = row["generated"], row["references"]
            scores = score_reports_by_protocol(*texts, None, meteor)
            assert scores["meteor"] == pytest.approx(row["scores"]["meteor"], rel=1e-9)
            assert scores["left_out"] == {}


def test_meteor_without_its_program_is_left_out_with_the_reason() -> None:
    scores = score_reports_by_protocol(["a b"], ["a b"], None, _NoMeteor())
    assert scores["meteor"] is None and scores["left_out"] == {"meteor": "not here"}
    assert scores["rouge_l"] == pytest.approx(1)


def test_a_program_that_stops_costs_meteor_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # A Java that ends at once, as one without memory does.
    monkeypatch.setattr(
        "rectvlm.metrics.vlm3d_report_protocol._find_meteor_jar", lambda: (Path("x.jar"), None)
    )
    program = Path(shutil.which("false") or "/bin/false")
    real_popen = __import__("subprocess").Popen
    monkeypatch.setattr(
        "rectvlm.metrics.vlm3d_report_protocol.subprocess.Popen",
        lambda command, **settings: real_popen([str(program)], **settings),
    )
    with MeteorProgram() as meteor:
        scores = score_reports_by_protocol(["a b"], ["a b"], None, meteor)
    assert scores["left_out"] == {"meteor": "the Java program stopped"}
    assert scores["bleu_1"] == pytest.approx(1)


def test_texts_are_cleaned_as_the_challenge_does() -> None:
    assert clean_generated_text('No "effusion" .\nA_b . C<|eot_id|>') == "No effusion.Ab.C"


def test_cases_without_a_reference_take_part_in_findings_alone() -> None:
    counts = np.zeros((2, len(FINDINGS), 4), np.int64)
    counts[:, :, 3] = 1
    counts[0, 0, 0] = 1  # one hit
    counts[1, 1, 2] = 1  # one miss, of the case without a reference
    scores = score_reports_by_protocol(["a b", "c"], ["a b", None], counts, _NoMeteor())
    assert scores["n"] == 1 and scores["bleu_1"] == pytest.approx(1)
    macro = scores["findings"]["macro"]
    assert macro["recall"] == pytest.approx(1 / 18) and macro["f1"] == pytest.approx(1 / 18)
    assert score_reports_by_protocol(["a"], [None], None, _NoMeteor())["bleu_1"] is None
