"""The model card says what the folder holds, and what no one stated is not claimed."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from rectvlm import RectVLM
from rectvlm.checkpoint import Checkpoint
from rectvlm.checkpoint.export import export_checkpoint
from rectvlm.labels import FINDINGS
from rectvlm.types import UserError

MakeFolder = Callable[[int], Path]


def test_the_card_says_what_it_is(trained_checkpoint: MakeFolder, tmp_path: Path) -> None:
    scores = ("auroc", "f1", "precision", "recall")
    macro = dict.fromkeys(scores, 0.61) | {f"n_findings_{score}": 17 for score in scores}
    against_people = {"n_cases": 9, "n_present": 4, "dice": 0.25}
    against_network = {"n_cases": 3, "n_present": 2, "dice": None}
    lesions = {
        "lung_nodule": {
            "per_source": {"own masks": against_people, "TotalSegmentator": against_network}
        },
        "consolidation": {"per_source": {}},
    }
    metrics = {
        "classification": {"macro": macro},
        "localization": {
            "per_lesion": lesions,
            "rexgrounding": {
                "dice": 0.125,
                "hit_rate": 0.5,
                "instance_f1": None,
                "n_findings": 8,
                "n_scans": 5,
            },
        },
        "reports": {"image": {"n": 5, "bleu_1": 0.5}, "image_ablated": {"n": 5, "bleu_1": 0.25}},
        "n_cases": 13,
        "split": "valid",
        "selected_on_this_split": True,
        "labels": "refined.csv (SHA-256 ab)",
        "step": 7,
    }
    path = tmp_path / "metrics.json"
    path.write_text(json.dumps(metrics))
    folder = export_checkpoint(
        trained_checkpoint(3),
        tmp_path / "model",
        base_model="owner/language-model",
        license_id="llama3.1",
        datasets=["owner/data"],
        metrics=path,
    )
    card = ModelCard.load(folder / "README.md")
    metadata = card.data.to_dict()
    assert metadata["license"] == "llama3.1"
    assert metadata["datasets"] == ["owner/data"]
    assert metadata["base_model"] == "owner/language-model"
    assert metadata["library_name"] == "rectvlm"
    assert metadata["pipeline_tag"] == "image-to-text"
    for words in (
        "Research use only",
        "0.610 | 17 of 18",
        "Dice against own masks, lung nodule | 0.250 | 9 cases, 4 with it",
        "Dice against TotalSegmentator, lung nodule | – | 3 cases",
        "Dice, consolidation | – | no outlines",
        "ReXGroundingCT dice | 0.125 | 8 findings of 5 scans",
        "ReXGroundingCT instance f1 | – |",
        "0.500 (0.250 without the image)",
        "at step 7.\nLabels: refined.csv (SHA-256 ab).\nValidation during training chose",
        "these figures are optimistic.\n\n| | metric",
        "Phase 3, 7 steps, 28 samples seen by\n1 process.",
    ):
        assert words in card.content
    assert all(finding.lower() in card.content for finding in FINDINGS)
    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "owner/language-model"
    assert Checkpoint.open(folder).config.generator.model == "owner/language-model"
    RectVLM.from_pretrained(folder, "cpu", parts=("encoder", "classifier"))

    plain = ModelCard.load(
        export_checkpoint(trained_checkpoint(1), tmp_path / "plain") / "README.md"
    )
    assert not {"license", "datasets", "base_model"} & plain.data.to_dict().keys()
    assert "peft" not in plain.data.tags
    assert "PeftModel" not in plain.content


def test_metrics_of_another_kind_are_refused(full_model: RectVLM, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"classification": 3}')
    with pytest.raises(UserError, match="rectvlm evaluate"):
        full_model.save_pretrained(tmp_path / "out", metrics=tmp_path / "metrics.json")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
