"""Text overlap of generated reports with their references: BLEU, ROUGE-L, METEOR, CIDEr, BERTScore.

These measure wording, not clinical truth. Each function returns figures by case, in the order of
the cases, so that cases can be resampled; each has a signature that states library, version and
tokenization. Shape: N cases.
"""

import logging
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
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

from rectvlm.metrics.arrays import CountArray
from rectvlm.pretrained import require_safetensors
from rectvlm.pretrained.catalog import MODEL_FILE_PATTERNS

_NGram = tuple[str, ...]

MAX_NGRAM = 4
"""Length of the longest n-grams of BLEU and CIDEr, words."""
CIDER_SIGMA = 6.0
"""Standard deviation of CIDEr-D's length penalty, bigrams."""
TOKENIZATION = "lower case, words with inner hyphens, numbers, no punctuation"
ROUGE_SIGNATURE = (
    f"rouge-score {version('rouge-score')}, rougeL F-measure, lower case, letters and digits only, "
    "no stemming, mean over cases"
)
CIDER_SIGNATURE = (
    f"CIDEr-D, n-grams 1 to {MAX_NGRAM}, sigma {CIDER_SIGMA:g}, document frequencies of the "
    f"evaluated references, 0 to 10, {TOKENIZATION}, mean over cases; the numbers of pycocoevalcap "
    "1.2's scorer on the same tokens"
)
_TOKEN = re.compile(r"\d+(?:[.,]\d+)*|[a-z]+(?:[-'][a-z]+)*")


def tokenize_text(text: str) -> list[str]:
    """Split a text into lower-case words and numbers without punctuation, for METEOR and CIDEr.

    The tokenizer of the COCO caption evaluation does much the same and needs Java.
    """
    return _TOKEN.findall(text.lower())


def bleu_counts(generated: Sequence[str], references: Sequence[str]) -> CountArray:
    """Count n-grams of each case: all that corpus BLEU-1 to 4 need.

    The counts are sacrebleu's, lower case, with `13a` tokens.

    Returns:
        Length of the text, length of the reference, matching n-grams (1 to 4) and n-grams of the
        text (1 to 4), (N, 10).
    """
    scorer = BLEU(lowercase=True)
    rows = []
    for text, reference in zip(generated, references, strict=True):
        score = scorer.corpus_score([text], [[reference]])
        rows.append([score.sys_len, score.ref_len, *score.counts, *score.totals])
    return np.array(rows, dtype=np.int64).reshape(-1, 2 + 2 * MAX_NGRAM)


def bleu(counts: CountArray, order: int) -> float:
    """Corpus BLEU, 0 to 1, with exponential smoothing.

    Args:
        counts: sum over cases of `bleu_counts`, (10,).
        order: length of the longest n-grams, words.
    """
    text_length, reference_length = int(counts[0]), int(counts[1])
    matches, totals = counts[2 : 2 + MAX_NGRAM], counts[2 + MAX_NGRAM :]
    score = BLEU.compute_bleu(
        matches[:order].tolist(),
        totals[:order].tolist(),
        text_length,
        reference_length,
        smooth_method="exp",
        max_ngram_order=order,
    )
    return float(score.score) / 100


def bleu_signature(order: int) -> str:
    """Signature of BLEU as sacrebleu states it."""
    scorer = BLEU(max_ngram_order=order, lowercase=True)
    scorer.corpus_score(["a"], [["a"]])  # a signature knows its number of references only then
    return f"sacrebleu BLEU-{order} / 100, {scorer.get_signature()}"


def rouge_l(generated: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
    """F-measure of the longest common subsequence, (N,)."""
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    scores = np.zeros(len(generated))
    for i, (text, reference) in enumerate(zip(generated, references, strict=True)):
        scores[i] = scorer.score(reference, text)["rougeL"].fmeasure
    return scores


class _NoSynonyms:
    """Replacement of WordNet where it is not installed: METEOR's third stage then finds nothing."""

    def synsets(self, word: str) -> list[Any]:
        """No synonyms."""
        return []


@cache
def _load_wordnet() -> Any:
    """NLTK's WordNet if it is on this machine, else its replacement."""
    try:
        wordnet.ensure_loaded()
        wordnet.synsets("lung")
    except LookupError:
        return _NoSynonyms()
    return wordnet


def meteor(generated: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
    """METEOR as NLTK computes it (Lavie and Agarwal 2007), (N,).

    Synonyms count where NLTK's WordNet is installed.
    """
    stemmer, synonyms = _CachedStemmer(), _load_wordnet()
    scores = np.zeros(len(generated))
    for i, (text, reference) in enumerate(zip(generated, references, strict=True)):
        scores[i] = single_meteor_score(
            tokenize_text(reference), tokenize_text(text), stemmer=stemmer, wordnet=synonyms
        )
    return scores


class _CachedStemmer(PorterStemmer):
    """Stemmer that remembers words: reports repeat them, and stemming is most of METEOR's time."""

    def __init__(self) -> None:
        super().__init__()
        self._stems: dict[str, str] = {}

    def stem(self, word: str, to_lowercase: bool = True) -> str:
        """The Porter stem of a word."""
        if word not in self._stems:
            self._stems[word] = super().stem(word, to_lowercase)
        return self._stems[word]


def meteor_signature() -> str:
    """Signature of METEOR with the stages that it has on this machine."""
    stages = "exact and stem stages only (WordNet is not installed)"
    if not isinstance(_load_wordnet(), _NoSynonyms):
        stages = "exact, stem and WordNet stages"
    return (
        f"nltk {version('nltk')} METEOR, {stages}, alpha 0.9, beta 3, gamma 0.5, {TOKENIZATION}, "
        "mean over cases"
    )


def cider(
    generated: Sequence[str],
    references: Sequence[str],
    tokenize: Callable[[str], list[str]] = tokenize_text,
) -> NDArray[np.float64]:
    """CIDEr-D (Vedantam et al., CVPR 2015, arXiv 1411.5726), 0 to 10, one reference a case, (N,).

    As the authors' scorer computes it: counts of n-grams weighted by log(N / document frequency)
    over the references, clipped to the reference's, as a cosine for each n, times exp(−Δ² / 2σ²)
    with Δ the difference in bigrams; the mean over n times 10. With one case every weight is 0,
    and so is the score.

    Args:
        generated: generated reports, (N,).
        references: reference reports, (N,).
        tokenize: splits a text into words.
    """
    text_ngrams = [_count_ngrams(tokenize(text)) for text in generated]
    true_ngrams = [_count_ngrams(tokenize(reference)) for reference in references]
    document_frequency: Counter[_NGram] = Counter()
    for ngrams in true_ngrams:
        document_frequency.update(ngrams.keys())

    # An n-gram that is in no reference counts as if it were in one.
    log_n = float(np.log(max(1, len(true_ngrams))))
    weights: defaultdict[_NGram, float] = defaultdict(lambda: log_n)
    for ngram, frequency in document_frequency.items():
        weights[ngram] = float(log_n - np.log(frequency))
    scores = np.zeros(len(text_ngrams))
    for i, (ngrams, true) in enumerate(zip(text_ngrams, true_ngrams, strict=True)):
        scores[i] = _cider_d_score(ngrams, true, weights)
    return scores


def _count_ngrams(words: Sequence[str]) -> Counter[_NGram]:
    counts: Counter[_NGram] = Counter()
    for size in range(1, MAX_NGRAM + 1):
        for start in range(len(words) - size + 1):
            counts[tuple(words[start : start + size])] += 1
    return counts


def _cider_d_score(
    ngrams: Counter[_NGram], true_ngrams: Counter[_NGram], weights: Mapping[_NGram, float]
) -> float:
    """CIDEr-D of one text.

    Args:
        ngrams: counts of the text's n-grams.
        true_ngrams: counts of the reference's n-grams.
        weights: inverse document frequency of every n-gram.
    """
    products, squares, true_squares = (np.zeros(MAX_NGRAM) for _ in range(3))
    for ngram, count in ngrams.items():
        value, true_value = count * weights[ngram], true_ngrams[ngram] * weights[ngram]
        products[len(ngram) - 1] += min(value, true_value) * true_value
        squares[len(ngram) - 1] += value**2
    for ngram, count in true_ngrams.items():
        true_squares[len(ngram) - 1] += (count * weights[ngram]) ** 2

    extra_bigrams = _count_bigrams(ngrams) - _count_bigrams(true_ngrams)
    norms = np.sqrt(squares * true_squares)
    cosines = np.divide(products, norms, out=np.zeros(MAX_NGRAM), where=norms > 0)
    length_penalty = np.exp(-(float(extra_bigrams) ** 2) / (2 * CIDER_SIGMA**2))
    return float(10.0 * cosines.mean() * length_penalty)


def _count_bigrams(ngrams: Counter[_NGram]) -> int:
    return sum(count for ngram, count in ngrams.items() if len(ngram) == 2)


def bertscore_by_case(
    generated: Sequence[str], references: Sequence[str], model: str | Path
) -> tuple[NDArray[np.float64], str]:
    """BERTScore F1 (Zhang et al. 2020) from the last layer of an encoder, (N,), and its signature.

    It is not rescaled with a baseline, and has no idf weights. A text longer than the encoder's
    context is cut there. An empty text scores 0, as bert-score's documentation says; its code fails
    on one with Transformers 5.

    Args:
        generated: generated reports.
        references: reference reports.
        model: folder or hub id of the encoder.

    Raises:
        OSError: The encoder cannot be loaded.
        UserError: Its weights are pickles.
    """
    import bert_score  # seconds to import, and not every evaluation has reports
    from huggingface_hub import snapshot_download
    from transformers import AutoConfig

    folder = str(model)
    if not Path(model).is_dir():
        folder = snapshot_download(folder, allow_patterns=list(MODEL_FILE_PATTERNS))
    # bert-score would take a pickle where a folder has nothing else.
    require_safetensors(folder)
    encoder_config = AutoConfig.from_pretrained(folder)
    n_layers = encoder_config.num_hidden_layers
    scores = np.zeros(len(generated))
    filled = []
    for i, (text, reference) in enumerate(zip(generated, references, strict=True)):
        if text.strip() and reference.strip():
            filled.append(i)
    if filled:
        # Transformers reports on every tensor that it loads; that is noise here.
        logging.getLogger("transformers").setLevel(logging.ERROR)
        scorer = bert_score.BERTScorer(
            model_type=folder, num_layers=n_layers, nthreads=0, batch_size=16
        )
        # A tokenizer that states no limit has one of 1e30, which bert-score hands on and the
        # tokenizer refuses.
        tokenizer = scorer._tokenizer
        max_tokens = encoder_config.max_position_embeddings
        tokenizer.model_max_length = min(tokenizer.model_max_length, max_tokens)
        _, _, f1 = scorer.score([generated[i] for i in filled], [references[i] for i in filled])
        scores[filled] = f1.numpy()
    name = Path(model).name if Path(model).is_dir() else str(model)
    library = f"bert-score {version('bert-score')}"
    return scores, f"{library}, {name}, layer {n_layers}, no idf, no rescaling, mean F1 over cases"
