"""How far the words of a generated report overlap with the reference's: BLEU, ROUGE-L, METEOR, CIDEr, BERTScore.

No clinical truth. Each function gives figures by case, in the order of the cases, so that cases can be resampled;
each has a signature that states library, version and tokenization.
"""

import logging
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from nltk.corpus import wordnet
from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import single_meteor_score
from numpy.typing import NDArray
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

MAX_NGRAM = 4
"""Longest n-grams of BLEU and CIDEr."""
CIDER_SIGMA = 6.0
"""Standard deviation of CIDEr-D's length penalty, in bigrams."""
TOKENIZATION = "lower case, words with inner hyphens, numbers, no punctuation"
ROUGE_SIGNATURE = (
    f"rouge-score {version('rouge-score')}, rougeL F-measure, lower case, letters and digits only, no stemming, "
    "mean over cases"
)
CIDER_SIGNATURE = (
    f"CIDEr-D, n-grams 1 to {MAX_NGRAM}, sigma {CIDER_SIGMA:g}, document frequencies of the evaluated references, 0 to 10, "
    f"{TOKENIZATION}, mean over cases; the numbers of pycocoevalcap 1.2's scorer on the same tokens"
)
_TOKEN = re.compile(r"\d+(?:[.,]\d+)*|[a-z]+(?:[-'][a-z]+)*")


def tokenize_text(text: str) -> list[str]:
    """Lower-case words and numbers without punctuation, for METEOR and CIDEr.

    Much as the tokenizer of the COCO caption evaluation, which needs Java.
    """
    return _TOKEN.findall(text.lower())


def bleu_counts(generated: Sequence[str], references: Sequence[str]) -> IntArray:
    """(N, 10) of each case: length of the text and of the reference, right n-grams (1 to 4), all n-grams (1 to 4).

    sacrebleu's counts, lower case, `13a` tokens; all that corpus BLEU-1 to 4 need.
    """
    scorer = BLEU(lowercase=True)
    rows = []
    for text, reference in zip(generated, references, strict=True):
        score = scorer.corpus_score([text], [[reference]])
        rows.append([score.sys_len, score.ref_len, *score.counts, *score.totals])
    return np.array(rows, dtype=np.int64).reshape(-1, 2 + 2 * MAX_NGRAM)


def bleu(counts: IntArray, order: int) -> float:
    """Corpus BLEU with n-grams up to `order`, 0 to 1, of summed `bleu_counts` (10,), with exponential smoothing."""
    system, reference = (int(n) for n in counts[:2])
    right, every = (
        counts[2 : 2 + order].tolist(),
        counts[2 + MAX_NGRAM : 2 + MAX_NGRAM + order].tolist(),
    )
    score = BLEU.compute_bleu(
        right, every, system, reference, smooth_method="exp", max_ngram_order=order
    )
    return float(score.score) / 100


def bleu_signature(order: int) -> str:
    """sacrebleu's own signature."""
    scorer = BLEU(max_ngram_order=order, lowercase=True)
    scorer.corpus_score(["a"], [["a"]])  # a signature knows its number of references only then
    return f"sacrebleu BLEU-{order} / 100, {scorer.get_signature()}"


def rouge_l(generated: Sequence[str], references: Sequence[str]) -> FloatArray:
    """(N,) F-measure of the longest common subsequence."""
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    pairs = zip(generated, references, strict=True)
    return np.array(
        [scorer.score(reference, text)["rougeL"].fmeasure for text, reference in pairs],
        dtype=np.float64,
    )


class _NoSynonyms:
    """Stands in for WordNet where it is not installed: METEOR's third stage then finds nothing."""

    def synsets(self, word: str) -> list[Any]:
        """None."""
        return []


@cache
def _load_wordnet() -> Any:
    """NLTK's WordNet if it is on this machine, else none."""
    try:
        wordnet.ensure_loaded()
        wordnet.synsets("lung")
    except LookupError:
        return _NoSynonyms()
    return wordnet


def meteor(generated: Sequence[str], references: Sequence[str]) -> FloatArray:
    """(N,) METEOR as NLTK computes it (Lavie and Agarwal 2007), with synonyms where NLTK's WordNet is installed."""
    stemmer, synonyms = _CachedStemmer(), _load_wordnet()
    pairs = zip(generated, references, strict=True)
    return np.array(
        [
            single_meteor_score(
                tokenize_text(reference), tokenize_text(text), stemmer=stemmer, wordnet=synonyms
            )
            for text, reference in pairs
        ],
        dtype=np.float64,
    )


class _CachedStemmer(PorterStemmer):
    """Reports repeat their words, and stemming is most of METEOR's time."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[str, str] = {}

    def stem(self, word: str, to_lowercase: bool = True) -> str:
        """The Porter stem of a word."""
        if word not in self._known:
            self._known[word] = super().stem(word, to_lowercase)
        return self._known[word]


def meteor_signature() -> str:
    """Which stages METEOR had."""
    stages = "exact and stem stages only (WordNet is not installed)"
    if not isinstance(_load_wordnet(), _NoSynonyms):
        stages = "exact, stem and WordNet stages"
    return f"nltk {version('nltk')} METEOR, {stages}, alpha 0.9, beta 3, gamma 0.5, {TOKENIZATION}, mean over cases"


def cider(generated: Sequence[str], references: Sequence[str]) -> FloatArray:
    """(N,) CIDEr-D (Vedantam et al., CVPR 2015, arXiv 1411.5726), 0 to 10, one reference a case.

    As the authors' scorer computes it: counts of n-grams weighted by log(N / document frequency) over the references,
    clipped to the reference's, as a cosine for each n, times exp(−Δ² / 2σ²) with Δ the difference in bigrams; the mean
    over n times 10. With one case every weight is 0, and so is the score.
    """
    true, said = (
        [_count_ngrams(text) for text in references],
        [_count_ngrams(text) for text in generated],
    )
    frequency = Counter(ngram for grams in true for ngram in grams)
    n = np.log(max(1, len(true)))
    weight = {ngram: float(n - np.log(count)) for ngram, count in frequency.items()}
    return np.array(
        [_cider_d_score(a, b, weight, float(n)) for a, b in zip(said, true, strict=True)],
        dtype=np.float64,
    )


def _count_ngrams(text: str) -> Counter[tuple[str, ...]]:
    words = tokenize_text(text)
    return Counter(
        tuple(words[i : i + size])
        for size in range(1, MAX_NGRAM + 1)
        for i in range(len(words) - size + 1)
    )


def _cider_d_score(
    said: Counter[tuple[str, ...]],
    true: Counter[tuple[str, ...]],
    weight: dict[tuple[str, ...], float],
    unseen: float,
) -> float:
    """An n-gram that is in no reference counts as if it were in one."""
    dots, said_norm, true_norm, bigrams = (np.zeros(MAX_NGRAM) for _ in range(4))
    for ngram, count in said.items():
        value = count * weight.get(ngram, unseen)
        other = true[ngram] * weight.get(ngram, unseen)
        dots[len(ngram) - 1] += min(value, other) * other
        said_norm[len(ngram) - 1] += value**2
        bigrams[len(ngram) - 1] += count
    for ngram, count in true.items():
        true_norm[len(ngram) - 1] += (count * weight[ngram]) ** 2
        bigrams[len(ngram) - 1] -= count
    norm = np.sqrt(said_norm * true_norm)
    cosines = np.divide(dots, norm, out=np.zeros(MAX_NGRAM), where=norm > 0)
    return float(10.0 * cosines.mean() * np.exp(-(bigrams[1] ** 2) / (2 * CIDER_SIGMA**2)))


def bertscore_by_case(
    generated: Sequence[str], references: Sequence[str], model: str | Path
) -> tuple[FloatArray, str]:
    """(N,) BERTScore F1 (Zhang et al. 2020) from the last layer of an encoder, and its signature.

    Not rescaled with a baseline, and without idf weights. A text longer than the encoder's context is cut there. An
    empty text scores 0, as bert-score's documentation says; its code fails on one with Transformers 5.

    Raises:
        OSError: the encoder cannot be loaded.
    """
    import bert_score  # seconds to import, and not every evaluation has reports
    from transformers import AutoConfig

    settings = AutoConfig.from_pretrained(model)
    layers, context = settings.num_hidden_layers, settings.max_position_embeddings
    scores = np.zeros(len(generated))
    both = enumerate(zip(generated, references, strict=True))
    filled = [i for i, (text, reference) in both if text.strip() and reference.strip()]
    if filled:
        # Transformers reports on every tensor that it loads; that is noise here.
        logging.getLogger("transformers").setLevel(logging.ERROR)
        scorer = bert_score.BERTScorer(
            model_type=str(model), num_layers=layers, nthreads=0, batch_size=16
        )
        # A tokenizer that states no limit has one of 1e30, which bert-score hands on and the tokenizer refuses.
        tokenizer = scorer._tokenizer
        tokenizer.model_max_length = min(tokenizer.model_max_length, context)
        _, _, f1 = scorer.score([generated[i] for i in filled], [references[i] for i in filled])
        scores[filled] = f1.numpy()
    name = Path(model).name if Path(model).is_dir() else str(model)
    library = f"bert-score {version('bert-score')}"
    return scores, f"{library}, {name}, layer {layers}, no idf, no rescaling, mean F1 over cases"
