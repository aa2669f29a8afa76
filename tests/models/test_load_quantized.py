"""A language model read module by module: the tensors of Transformers, in a rank's share of the
memory."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from rectvlm import pretrained
from rectvlm.config import Config, GeneratorConfig
from rectvlm.models.language_model import (
    build_quantization_config,
    load_language_model,
    resolve_device,
)
from rectvlm.models.load_quantized import (
    SafetensorsCheckpoint,
    build_meta_causal_lm,
    has_all_tensors,
    materialize_weights,
    replace_linear_with_4bit,
)
from rectvlm.types import UserError
from tests.launches import TWO, environment, metrics, run, settings

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def llama(models_folder: None) -> str:
    return pretrained.resolve_model("bundled:tiny-llama")


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor: packed weights, what bitsandbytes keeps beside them, buffers."""
    return {**model.state_dict(), **dict(model.named_buffers())}


def ours(
    config: GeneratorConfig,
    folder: str | Path,
    settle: Callable[[nn.Module], None] = lambda _: None,
) -> Any:
    """The model as it is read here, without its adapter."""
    source, settings = (
        SafetensorsCheckpoint.from_reference(str(folder)),
        build_quantization_config(config),
    )
    assert source is not None
    model = build_meta_causal_lm(AutoConfig.from_pretrained(folder))
    assert has_all_tensors(model, source)
    if settings is not None:
        replace_linear_with_4bit(model, settings, source.packed_weights)
    materialize_weights(model, source, torch.device("cpu"), settle)
    return model


def same(mine: nn.Module, theirs: nn.Module) -> None:
    tensors, wanted = state(mine), state(theirs)
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensors[name].dtype == tensor.dtype, name
        assert tensors[name].shape == tensor.shape, name
        mine_bytes, their_bytes = (
            x.contiguous().view(-1).view(torch.uint8) for x in (tensors[name], tensor)
        )
        assert torch.equal(mine_bytes, their_bytes), (
            name
        )  # packed bits may look like NaN, which equals nothing


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("storage", ["bfloat16", "uint8"])
def test_packed_as_transformers_packs_bit_for_bit(
    tiny: Config, llama: str, storage: str, double: bool
) -> None:
    config = tiny.generator.model_copy(
        update={"quant_storage": storage, "double_quantization": double}
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        llama, dtype=torch.bfloat16, quantization_config=build_quantization_config(config)
    )
    mine = ours(config, llama)
    assert sum(isinstance(module, Linear4bit) for module in mine.modules()) == 14
    same(mine, theirs)
    same(ours(config, llama), mine)
    assert not mine.training


def test_unpacked_as_transformers_loads(tiny: Config, llama: str) -> None:
    mine = ours(tiny.generator.model_copy(update={"quantization": "none"}), llama)
    same(mine, AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16))


@pytest.mark.parametrize("stored", ["uint8", "bfloat16", "float16"])
def test_from_weights_that_were_packed_before(
    tiny: Config, llama: str, stored: str, tmp_path: Path
) -> None:
    """Whatever dtype they are stored as, they end as the configuration stores them, equal to
    packing them now."""
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_quant_storage=getattr(torch, stored),
    )
    AutoModelForCausalLM.from_pretrained(
        llama, dtype=torch.bfloat16, quantization_config=settings
    ).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path)
    assert any(
        "absmax" in name
        for name in SafetensorsCheckpoint.from_reference(str(tmp_path)).file_by_tensor
    )  # type: ignore[union-attr]
    same(ours(tiny.generator, tmp_path), ours(tiny.generator, llama))
    language = load_language_model(tiny.generator, tmp_path)
    ids = torch.randint(5, 500, (1, 20))
    with torch.no_grad():
        wanted = load_language_model(tiny.generator, llama).model.train()(ids).logits
        assert torch.equal(language.model.train()(ids).logits, wanted)
    with pytest.raises(UserError, match=r"quantized already \(nf4\).*set it to nf4"):
        load_language_model(tiny.generator.model_copy(update={"quantization": "none"}), tmp_path)


def test_tied_words_stay_tied_and_shards_are_read(tiny: Config, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=256, tie_word_embeddings=True, **sizes)
    ).bfloat16()
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    mine = ours(tiny.generator, tmp_path)
    assert mine.lm_head.weight is mine.model.embed_tokens.weight
    settings = build_quantization_config(tiny.generator)
    same(
        mine,
        AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.bfloat16, quantization_config=settings
        ),
    )


def test_a_module_is_whole_when_it_settles_and_the_next_is_not_read(
    tiny: Config, llama: str
) -> None:
    order: list[nn.Module] = []

    def settle(module: nn.Module) -> None:
        order.append(module)
        assert all(p.device.type == "cpu" for p in module.parameters(recurse=False))
        for parameter in module.parameters(recurse=False):
            parameter.data = torch.empty(0, dtype=parameter.dtype)  # as sharding does

    model = ours(tiny.generator, llama, settle)
    assert order == [
        module for module in model.modules() if dict(module.named_parameters(recurse=False))
    ]
    assert sum(p.numel() for p in model.parameters()) == 0


def test_a_damaged_or_unfit_checkpoint_is_one_sentence(
    tiny: Config, llama: str, tmp_path: Path
) -> None:
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path)
    geometry = json.loads((Path(llama) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(geometry | {"intermediate_size": 256}))
    original = (Path(llama) / "model.safetensors").read_bytes()
    for data, fragment in ((original, "asks for"), (original[:-64], "cannot be read")):
        (tmp_path / "model.safetensors").write_bytes(data)
        with pytest.raises(UserError, match=fragment) as caught:
            load_language_model(tiny.generator, tmp_path)
        assert "\n" not in str(caught.value)


def sharded(llama: str, folder: Path) -> list[Path]:
    """The same model in several files; these."""
    AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).save_pretrained(
        folder, max_shard_size="100KB"
    )
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 1
    return files


def test_a_file_that_the_index_names_must_be_there(
    tiny: Config, llama: str, tmp_path: Path
) -> None:
    gone = sharded(llama, tmp_path)[1]
    gone.unlink()
    with pytest.raises(UserError) as caught:
        load_language_model(tiny.generator, tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert all(
        fragment in message for fragment in (str(tmp_path), gone.name, "rectvlm weights pull")
    )


def test_the_index_decides_what_is_read(llama: str, tmp_path: Path) -> None:
    """On the Hub a variant of the weights may lie beside the shards, and an index may name the
    single file alone."""
    files = sharded(llama, tmp_path)
    shutil.copyfile(files[0], tmp_path / "model.safetensors")
    checkpoint = SafetensorsCheckpoint.from_reference(str(tmp_path))
    assert checkpoint is not None
    assert set(checkpoint.file_by_tensor.values()) == {str(file) for file in files}
    shutil.copyfile(Path(llama) / "model.safetensors", tmp_path / "model.safetensors")
    index = {"weight_map": dict.fromkeys(checkpoint.file_by_tensor, "model.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = SafetensorsCheckpoint.from_reference(str(tmp_path))
    assert checkpoint is not None
    assert set(checkpoint.file_by_tensor.values()) == {str(tmp_path / "model.safetensors")}


@pytest.mark.parametrize("kind", ["nf4", "none"])
def test_names_that_transformers_converts_load_to_the_device_asked_for(
    tiny: Config, llama: str, kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    renamed = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    places: list[Any] = []
    load = AutoModelForCausalLM.from_pretrained

    def noted(*args: Any, **options: Any) -> Any:
        places.append(options["device_map"])
        assert options["use_safetensors"]
        return load(*args, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", noted)
    config = tiny.generator.model_copy(update={"quantization": kind})
    cpu, ids = torch.device("cpu"), torch.randint(5, 500, (1, 20))
    model = load_language_model(config, tmp_path, cpu).model.eval()
    load_language_model(config, tmp_path, cpu, shard_module=lambda _: None)
    assert places == [cpu, None]  # an engine places the model itself
    with torch.no_grad():
        assert torch.equal(
            model(ids).logits, load_language_model(config, llama).model.eval()(ids).logits
        )


def test_a_language_model_in_pickles_alone_is_refused(
    tiny: Config, llama: str, tmp_path: Path
) -> None:
    shutil.copytree(llama, tmp_path, dirs_exist_ok=True)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"in pytorch_model\.bin and not in safetensors"):
        load_language_model(tiny.generator, tmp_path)


def test_a_gpu_has_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert [
        str(resolve_device(asked)) for asked in (None, "cuda", "cuda:1", torch.device("cpu"))
    ] == [
        "cuda:3",
        "cuda:3",
        "cuda:1",
        "cpu",
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(resolve_device(None)) == "cpu"


@pytest.mark.slow
@pytest.mark.parametrize("source", ["bf16", "packed", "none"])
def test_two_ranks_hold_a_share_each_and_write_together(
    tiny: Config, source: str, tmp_path: Path
) -> None:
    """Two processes, ZeRO-3: bytes of live parameters while loading, then reports of unequal length
    by all ranks."""
    torch.manual_seed(0)
    folder = tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(pretrained.resolve_model("bundled:tiny-llama"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=896,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    if source == "packed":
        packed = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16,
            quantization_config=build_quantization_config(tiny.generator),
        )
        folder = tmp_path / "packed"
        packed.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    out = tmp_path / "out"
    out.mkdir()
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "launch/accelerate/cpu2.yaml",
    ]
    kind = "none" if source == "none" else "nf4"
    command += ["--module", "tests.load_and_write", str(folder), str(out), kind]
    done = subprocess.run(
        command,
        cwd=CHECKOUT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads((out / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    alone = json.loads((out / "alone.json").read_text())
    for rank in ranks:
        assert rank["shard"] == pytest.approx(rank["whole"] / 2, rel=0.01)
        assert rank["peak"] <= rank["shard"] + rank["largest_module"] + 64 * 1024
        assert rank["loss"] > 0
    assert [rank["texts"] for rank in ranks] == alone["texts"]
    assert ranks[0]["tokens"] < ranks[1]["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ds_config", "kind", "stage"),
    [("phase3_zero2", "nf4", 2), ("phase3", "none", 3), ("phase3_zero2", "none", 2)],
)
def test_other_ways_to_hold_the_language_model_train(
    tiny_run: Callable[[int], Path],
    phantom_shards: Path,
    ds_config: str,
    kind: str,
    stage: int,
    tmp_path: Path,
) -> None:
    """4-bit under ZeRO-2 and bf16 LoRA under both, on two processes from phase 2's weights."""
    shutil.copytree(tiny_run(2), tmp_path / "tiny" / "phase2")
    command = [*TWO, "launch/phase3.py", *settings(3, phantom_shards, tmp_path, steps=6)]
    command += ["--ds-config", f"ds_configs/{ds_config}.json", f"generator.quantization={kind}"]
    run(command, tmp_path)
    engine = json.loads((tmp_path / "tiny" / "phase3" / "engine.json").read_text())
    assert (engine["zero_stage"], engine["world_size"], engine["llm_quantization"]) == (
        stage,
        2,
        kind,
    )
    losses = [line["losses"]["report"] for line in metrics(tmp_path / "tiny" / "phase3")]
    assert losses[-1] < losses[0]
