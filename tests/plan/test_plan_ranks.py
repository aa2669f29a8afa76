"""The plan against two real processes: what each rank holds, by kind, at CPU-sized scale."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from conftest import phantom_sample
from launches import LAUNCH, TWO, run, settings

from rectvlm import pretrained
from rectvlm.checkpoint import run_folder
from rectvlm.config import CONFIG_FOLDER, load_config
from rectvlm.data.shards import write_shards
from rectvlm.plan.planner import ResourcePlanner
from tests.plan.checkpoint_size import check_checkpoint_size

CHECKOUT = Path(__file__).parents[2]


def scaled_large(folder: Path) -> Path:
    """`large` on a small grid, with an eighth of every width.

    The language model has an eighth of its layers, too; every other part has all of them.
    """
    tree = yaml.safe_load((CONFIG_FOLDER / "large.yaml").read_text())
    tree["name"] = "large-eighth"
    tree["data"] |= {"grid": [16, 64, 64], "spacing": [16.0, 5.5, 5.5], "workers": 0}
    tree["text"]["model"] = "bundled:tiny-bert"
    for part in ("encoder", "classifier", "localizer", "generator"):
        tree[part]["width"] //= 8
    tree["localizer"]["channels"] = [n // 8 for n in tree["localizer"]["channels"]]
    for name in ("queries", "lora_rank", "lora_alpha", "max_report_tokens"):
        tree["generator"][name] //= 8
    tree["generator"]["model"] = str(_language_model(folder / "llama"))
    for phase in tree["train"]["phases"].values():
        phase |= {"samples": 4, "save_every": 1, "warmup": 0, "micro_batch": 1, "global_batch": 2}
        phase["validation"]["every"] = 0  # the shards hold no case for it
    path = folder / "large-eighth.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def _language_model(folder: Path) -> Path:
    """An eighth of Llama-3.1-70B's widths, heads and layers, with the tiny model's tokenizer."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(pretrained.resolve_model("bundled:tiny-llama"))
    geometry = pretrained.read_model_config("meta-llama/Llama-3.1-70B-Instruct")
    heads = ("num_attention_heads", "num_key_value_heads")
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", *heads):
        setattr(geometry, name, getattr(geometry, name) // 8)
    geometry.vocab_size = len(tokenizer)
    geometry.pad_token_id = geometry.eos_token_id = tokenizer.eos_token_id
    geometry.bos_token_id = None
    torch.manual_seed(0)
    LlamaForCausalLM(geometry).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def agree(config_path: str, overrides: list[str], phase: int, described: Path) -> None:
    """Every kind that a rank reports is within 1% of the plan, and the checkpoint is as planned."""
    found = json.loads(described.read_text())
    plan = ResourcePlanner(
        load_config(config_path, overrides), phase, CHECKOUT / "ds_configs"
    ).make_plan(found["world_size"], 141.0)
    for rank in found["ranks"]:
        for kind, size in rank["bytes"].items():
            predicted = plan.gpu_memory_gb.get(kind, 0.0) * 1e9
            assert predicted == pytest.approx(size, rel=0.01, abs=64), (
                f"{kind} on rank {rank['rank']}"
            )
        assert sum(rank["bytes"].values()) > 0
    check_checkpoint_size(run_folder.find_checkpoint(described.parent, ""), plan)


@pytest.mark.slow
def test_every_phase_holds_what_was_planned(tmp_path: Path, phantom_shards: Path) -> None:
    for phase in (1, 2, 3):
        run(
            [*TWO, f"launch/phase{phase}.py", *settings(phase, phantom_shards, tmp_path, steps=2)],
            tmp_path,
        )
        agree("tiny", [], phase, tmp_path / "tiny" / f"phase{phase}" / "engine.json")


@pytest.mark.slow
def test_a_scaled_down_large_holds_what_was_planned(tmp_path: Path) -> None:
    path = scaled_large(tmp_path)
    config = load_config(path)
    shards = tmp_path / "shards"
    write_shards((phantom_sample(seed, config) for seed in range(4)), shards)
    common = ["--config", str(path), f"data.shards={shards}", f"train.runs={tmp_path / 'runs'}"]
    for phase in (1, 2):
        run([*LAUNCH, "--num_processes", "1", f"launch/phase{phase}.py", *common], tmp_path)
    run([*TWO, "launch/phase3.py", *common], tmp_path)
    described = tmp_path / "runs" / "large-eighth" / "phase3" / "engine.json"
    agree(str(path), common[2:], 3, described)
