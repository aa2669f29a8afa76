"""The VLM3D challenge's figures of reports, so that they compare with its leaderboard.

Source: `nlg_metrics.py`, `calc_scores.py` and `crg_score.py` of github.com/forithmus/VLM3D-Dockers.
The challenge scores words by pycocoevalcap 1.2 on text that it cuts at white space: upper and lower
case differ, and punctuation stays at its word. So these figures differ from those of
`text_overlap`. Shape: N cases.
"""

import importlib.util
import math
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import Tokenizer
from sacrebleu.metrics.helpers import extract_all_word_ngrams

from rectvlm.metrics.arrays import CountArray
from rectvlm.metrics.text_overlap import MAX_NGRAM, cider
from rectvlm.metrics.vlm3d_protocol import score_protocol_calls
from rectvlm.types import JsonObject

ROUGE_BETA = 1.2
"""Weight of recall in ROUGE-L."""
GENERATED_TEXT_CUTS = ("<|eot_id|>", '"', "_")
"""Strings that the challenge deletes from generated reports."""
REPORT_PROTOCOL_SCORES = (
    *(f"bleu_{order}" for order in range(1, MAX_NGRAM + 1)),
    "bleu_mean",
    "rouge_l",
    "meteor",
    "cider",
)
METEOR_JAR = "meteor/meteor-1.5.jar"
"""The METEOR program in the package pycocoevalcap, beside its paraphrases."""
METEOR_JAVA_OPTIONS = ("-Xmx2G", "-Dfile.encoding=UTF-8")
METEOR_OPTIONS = ("-", "-", "-stdio", "-l", "en", "-norm")
"""Options with which pycocoevalcap starts the program."""
_NO_TEXT, _NO_GUESS = 1e-15, 1e-9
"""Numbers that pycocoevalcap adds to numerators and denominators of BLEU."""


class MeteorProgram:
    """METEOR 1.5 (Denkowski and Lavie 2014), the authors' Java program with its paraphrases.

    Use it in a `with` statement. `missing` says why there is no program, else it is None.
    """

    def __init__(self) -> None:
        jar, self.missing = _find_meteor_jar()
        self._process: subprocess.Popen[str] | None = None
        if self.missing is None:
            self._process = subprocess.Popen(
                ["java", *METEOR_JAVA_OPTIONS, "-jar", str(jar), *METEOR_OPTIONS],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
            )

    def __enter__(self) -> "MeteorProgram":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def score(self, generated: Sequence[str], references: Sequence[str]) -> float | None:
        """METEOR of the corpus, 0 to 1; None where there is no program, or where it stops."""
        if self._process is None or not generated:
            return None
        try:
            statistics = []
            for text, reference in zip(generated, references, strict=True):
                # As pycocoevalcap: bars separate the fields of a line.
                text = text.replace("|||", "").replace("  ", " ")
                self._write(f"SCORE ||| {_one_line(reference)} ||| {_one_line(text)}")
                statistics.append(self._read())
            self._write(" ||| ".join(["EVAL", *statistics]))
            scores = [float(self._read()) for _ in range(len(statistics) + 1)]
        except (OSError, ValueError):
            self.missing = "the Java program stopped"
            return None
        return scores[-1]

    def _write(self, line: str) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _read(self) -> str:
        assert self._process is not None and self._process.stdout is not None
        return self._process.stdout.readline().strip()


def _find_meteor_jar() -> tuple[Path | None, str | None]:
    """The program's file; where it cannot run, the reason."""
    package = importlib.util.find_spec("pycocoevalcap")
    if package is None or not package.submodule_search_locations:
        return None, "needs the package pycocoevalcap: pip install 'rectvlm[challenge]'"
    if shutil.which("java") is None:
        return None, "needs Java: install a Java runtime, such as Debian's default-jre-headless"
    return Path(package.submodule_search_locations[0]) / METEOR_JAR, None


def _one_line(text: str) -> str:
    """A text whose line ends, which would begin another request of the program, are spaces."""
    return " ".join(text.splitlines())


class _SpaceTokenizer(Tokenizer):
    """Words between single spaces; two spaces have an empty word between them."""

    def tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        return text.split(" ")


def score_reports_by_protocol(
    generated: Sequence[str],
    references: Sequence[str | None],
    label_counts: CountArray | None,
    meteor: MeteorProgram,
) -> JsonObject:
    """Score reports as the challenge does; cases without a reference report take no part in words.

    Args:
        generated: generated report of each case, (N,).
        references: true report of each case, (N,); None where there is none.
        label_counts: counts of `count_confusions` of the findings in the reports against the
            labels, (N, 18, 4); None without labels.
        meteor: program that computes METEOR.

    Returns:
        `n`, the figures of `REPORT_PROTOCOL_SCORES` (None where there is none), `findings` with the
        means over the 18 findings and CRG, and `left_out` with reasons by score.
    """
    texts, truths = [], []
    for text, reference in zip(generated, references, strict=True):
        if reference is not None:
            texts.append(clean_generated_text(text))
            truths.append(clean_reference_text(reference))

    scores: dict[str, float | None] = dict.fromkeys(REPORT_PROTOCOL_SCORES)
    if texts:
        bleus = corpus_bleu(texts, truths)
        for order, value in enumerate(bleus, start=1):
            scores[f"bleu_{order}"] = value
        scores["bleu_mean"] = sum(bleus) / MAX_NGRAM
        scores["rouge_l"] = mean_rouge_l(texts, truths)
        scores["meteor"] = meteor.score(texts, truths)
        scores["cider"] = float(cider(texts, truths, tokenize=str.split).mean())
    findings = None
    if label_counts is not None:
        findings = score_protocol_calls(label_counts.sum(axis=0))
    left_out = {} if meteor.missing is None else {"meteor": meteor.missing}
    return {"n": len(texts), **scores, "findings": findings, "left_out": left_out}


def clean_reference_text(text: str) -> str:
    """A reference report as the challenge compares it: in one line, no space before a full stop.

    The sentences of a text that is cut into tokens are joined without a space, "a . b" to "a.b".
    """
    return text.replace("\n", "").replace(" . ", ".").replace(" .", ".")


def clean_generated_text(text: str) -> str:
    """A generated report as the challenge compares it."""
    text = text.replace("\n", "")
    for cut in GENERATED_TEXT_CUTS:
        text = text.replace(cut, "")
    return clean_reference_text(text)


def corpus_bleu(generated: Sequence[str], references: Sequence[str]) -> list[float]:
    """BLEU-1 to 4 of the corpus as pycocoevalcap computes it, 0 to 1, without smoothing."""
    matches, totals = np.zeros(MAX_NGRAM), np.zeros(MAX_NGRAM)
    text_length = reference_length = 0
    for text, reference in zip(generated, references, strict=True):
        ngrams, n_words = extract_all_word_ngrams(text, 1, MAX_NGRAM)
        true_ngrams, n_true_words = extract_all_word_ngrams(reference, 1, MAX_NGRAM)
        text_length += n_words
        reference_length += n_true_words
        for ngram, count in ngrams.items():
            totals[len(ngram) - 1] += count
            matches[len(ngram) - 1] += min(count, true_ngrams[ngram])

    precisions = (matches + _NO_TEXT) / (totals + _NO_GUESS)
    bleus = np.cumprod(precisions) ** (1 / np.arange(1, MAX_NGRAM + 1))
    ratio = (text_length + _NO_TEXT) / (reference_length + _NO_GUESS)
    brevity_penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return [float(value) for value in bleus * brevity_penalty]


def mean_rouge_l(generated: Sequence[str], references: Sequence[str]) -> float:
    """Mean over cases of ROUGE-L's F with `ROUGE_BETA`, as pycocoevalcap computes it."""
    scorer = RougeScorer(["rougeL"], tokenizer=_SpaceTokenizer())
    values = []
    for text, reference in zip(generated, references, strict=True):
        score = scorer.score(reference, text)["rougeL"]
        weighted = score.recall + ROUGE_BETA**2 * score.precision
        both = (1 + ROUGE_BETA**2) * score.precision * score.recall
        values.append(both / weighted if weighted else 0.0)
    return float(np.mean(values))
