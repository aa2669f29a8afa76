"""The sizes of the configurations: the parts have the parameters that they are planned with."""

import pytest

from rectvlm import pretrained
from rectvlm.config import MODEL_PARTS, load_config
from rectvlm.models.meta_model import build_meta_model

BUDGETS = {"encoder": 88e6, "classifier": 1e6, "localizer": 45e6, "generator": 325e6}
LANGUAGE = {"small": 8.03e9, "medium": 27.2e9, "large": 70.55e9}


@pytest.mark.parametrize("name", LANGUAGE)
def test_parts_have_their_budget(name: str) -> None:
    config = load_config(name)
    text, language = (
        pretrained.read_model_config(config.text.model),
        pretrained.read_model_config(config.generator.model),
    )
    model = build_meta_model(config, MODEL_PARTS, text.hidden_size, language)
    assert all(parameter.is_meta for parameter in model.parameters())
    trainable = {
        part: sum(p.numel() for p in getattr(model, part).parameters() if p.requires_grad)
        for part in MODEL_PARTS
    }
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    budgets = (
        BUDGETS
        if name == "large"
        else {part: n for part, n in BUDGETS.items() if part != "generator"}
    )
    for part, budget in budgets.items():
        assert trainable[part] == pytest.approx(budget, rel=0.03), part
    assert frozen == pytest.approx(LANGUAGE[name], rel=0.005)
    if name == "large":
        assert sum(trainable.values()) == pytest.approx(460e6, rel=0.03)
        assert frozen + sum(trainable.values()) == pytest.approx(70.5e9, rel=0.03)
