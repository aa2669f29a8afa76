"""Cases that are evaluated in a group have the reports that each would have alone."""

from dataclasses import replace

import pytest
import torch
from conftest import phantom_sample

from rectvlm import pretrained
from rectvlm.config import MODEL_PARTS, Config
from rectvlm.data.dataset import collate_samples
from rectvlm.evaluate.case_evaluation import CaseEvaluator
from rectvlm.evaluate.case_groups import CaseGroup
from rectvlm.evaluate.options import EvaluationOptions
from rectvlm.models import RectVLM
from rectvlm.models.language_model import load_language_model
from rectvlm.models.prompt_embeddings import PromptEmbeddings
from rectvlm.types import Batch

INDICATIONS = (None, "Cough", None, "Fever and weight loss")
GROUP = CaseGroup("evaluate", [[0], [1], [2, 3]])


@pytest.fixture(scope="module")
def model(tiny: Config, models_folder: None) -> RectVLM:
    """In float32, where batches do not round otherwise than single cases."""
    generator = tiny.generator.model_copy(update={"quantization": "none", "max_report_tokens": 12})
    config = tiny.model_copy(update={"generator": generator})
    torch.manual_seed(0)
    prompts = PromptEmbeddings.from_text_encoder(
        pretrained.resolve_model(config.text.model), config.text.max_tokens
    )
    language = load_language_model(generator, pretrained.resolve_model(generator.model))
    return RectVLM(config, MODEL_PARTS, prompts, language).eval().float()


@pytest.fixture(scope="module")
def batches(tiny: Config) -> list[Batch]:
    samples = []
    for seed, indication in enumerate(INDICATIONS):
        sample = phantom_sample(seed, tiny, "valid")
        sample.meta = replace(sample.meta, indication=indication, technique=None)
        samples.append(sample)
    return [collate_samples([samples[i] for i in positions]) for positions in GROUP.batches]


def test_a_group_has_the_reports_of_each_case_and_its_control(
    model: RectVLM, batches: list[Batch]
) -> None:
    encoder_batches: list[int] = []
    handle = model.encoder.register_forward_pre_hook(
        lambda module, arguments: encoder_batches.append(len(arguments[0]))
    )
    try:
        evaluator = CaseEvaluator(model, EvaluationOptions(surface_tolerance=5.0))
        records = evaluator.evaluate_group(GROUP, iter(batches))
        again = evaluator.evaluate_group(GROUP, iter(batches))
    finally:
        handle.remove()
    # The cases of both calls, and one volume of air.
    assert sorted(encoder_batches) == sorted([1, 1, 2, 1, 1, 1, 2])
    assert [record.position for record in records] == [0, 1, 2, 3]
    assert [record.generated for record in again] == [record.generated for record in records]

    generated, controls = [], []
    for batch in batches:
        generated += model.predict_batch(batch).reports or []
        controls += model.predict_batch(batch, ablate_image=True).reports or []
    assert [record.generated for record in records] == generated
    assert [record.without_image for record in records] == controls
    assert len(set(generated)) > 1
    assert controls[0] == controls[2] and len(set(controls)) > 1


def test_beyond_the_limit_of_reports_there_are_none(model: RectVLM, batches: list[Batch]) -> None:
    evaluator = CaseEvaluator(model, EvaluationOptions(report_limit=3))
    records = evaluator.evaluate_group(GROUP, iter(batches))
    assert [record.generated is None for record in records] == [False, False, False, True]
    assert [record.without_image is None for record in records] == [False, False, False, True]
    fitted = CaseEvaluator(model, EvaluationOptions()).evaluate_group(
        replace(GROUP, purpose="fit"), iter(batches)
    )
    assert not any(record.generated or record.without_image for record in fitted)
    assert [record.probabilities for record in fitted] == [
        record.probabilities for record in records
    ]
