"""Metrics of generated reports against the radiologist's: overlap of words and of embeddings, not clinical truth."""

import logging
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU

METEOR_LEFT_OUT = "needs Java, or the WordNet corpus, neither of which comes with a Python package"
ROUGE_SIGNATURE = "rouge-score, rougeL F-measure, lower case, letters and digits only, no stemming, mean over cases"


def reports(
    generated: Sequence[str], references: Sequence[str | None], bertscore_model: str | Path | None = None
) -> dict[str, Any]:
    """BLEU-1 to 4, ROUGE-L and, with a model at hand, BERTScore; every score between 0 and 1.

    BLEU is of the corpus (sacrebleu); ROUGE-L and BERTScore are means over cases. A case without a reference report is
    left out and counted. The signatures state tokenization, case and smoothing.

    Args:
        generated: one text a case.
        references: the true report of each case, None where there is none.
        bertscore_model: folder or hub id of an encoder; without one that loads, BERTScore is left out and says why.
    """
    pairs = [(text, reference) for text, reference in zip(generated, references, strict=True) if reference is not None]
    result: dict[str, Any] = {"n": len(pairs), "n_without_reference": len(generated) - len(pairs)}
    signatures = {"rouge_l": ROUGE_SIGNATURE}
    candidates, truths = [text for text, _ in pairs], [reference for _, reference in pairs]
    for order in range(1, 5):
        bleu = BLEU(max_ngram_order=order, lowercase=True)
        score = bleu.corpus_score(candidates, [truths]).score / 100 if pairs else None
        result[f"bleu_{order}"] = score
        if pairs:
            signatures[f"bleu_{order}"] = f"sacrebleu BLEU-{order} / 100, {bleu.get_signature()}"
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    rouge = [scorer.score(reference, text)["rougeL"].fmeasure for text, reference in pairs]
    result["rouge_l"] = float(np.mean(rouge)) if rouge else None
    left_out = {"meteor": METEOR_LEFT_OUT}
    if bertscore_model is None:
        left_out["bertscore_f1"] = "no encoder was given"
    elif pairs:
        try:
            result["bertscore_f1"], signatures["bertscore_f1"] = bertscore(candidates, truths, bertscore_model)
        except OSError as error:
            left_out["bertscore_f1"] = f"{bertscore_model} cannot be loaded: {str(error).splitlines()[0]}"
    return result | {"signatures": signatures, "left_out": left_out}


def bertscore(candidates: Sequence[str], truths: Sequence[str], model: str | Path) -> tuple[float, str]:
    """Mean BERTScore F1 (Zhang et al. 2020) from the last layer of an encoder, and its signature.

    Not rescaled with a baseline, and without idf weights. A text longer than the encoder's context is cut there. An
    empty text scores 0, as bert-score's documentation says; its code fails on one with Transformers 5.

    Raises:
        OSError: the encoder cannot be loaded.
    """
    import bert_score  # seconds to import, and not every evaluation has reports
    from transformers import AutoConfig

    settings = AutoConfig.from_pretrained(model)
    layers, context = settings.num_hidden_layers, settings.max_position_embeddings
    scores = np.zeros(len(candidates))
    both = enumerate(zip(candidates, truths, strict=True))
    filled = [i for i, (text, truth) in both if text.strip() and truth.strip()]
    if filled:
        # Transformers reports on every tensor that it loads; that is noise here.
        logging.getLogger("transformers").setLevel(logging.ERROR)
        scorer = bert_score.BERTScorer(model_type=str(model), num_layers=layers, nthreads=0, batch_size=16)
        # A tokenizer that states no limit has one of 1e30, which bert-score hands on and the tokenizer refuses.
        tokenizer = scorer._tokenizer
        tokenizer.model_max_length = min(tokenizer.model_max_length, context)
        _, _, f1 = scorer.score([candidates[i] for i in filled], [truths[i] for i in filled])
        scores[filled] = f1.numpy()
    name = Path(model).name if Path(model).is_dir() else str(model)
    library = f"bert-score {version('bert-score')}"
    return float(scores.mean()), f"{library}, {name}, layer {layers}, no idf, no rescaling, mean F1 over cases"
