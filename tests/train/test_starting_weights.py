"""A phase starts from any model of ours: it takes the parts that it needs, and says so."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import hub_server
import pytest
import torch
from conftest import phantom_sample
from huggingface_hub import constants
from launches import CHECKOUT, LAUNCH, TIMEOUT, environment, settings
from safetensors.torch import load_file
from vit_models import make_vit

from rectvlm.checkpoint import Checkpoint
from rectvlm.checkpoint.export import export_checkpoint
from rectvlm.config import Config, load_config
from rectvlm.data.dataset import ShardDataset
from rectvlm.data.shards import read_sample_meta, write_shards
from rectvlm.labels import FINDINGS
from rectvlm.models import RectVLM
from rectvlm.models.meta_model import build_meta_model
from rectvlm.models.prompt_embeddings import PromptEmbeddings
from rectvlm.pretrained.pull import copy_model
from rectvlm.train.phases import PHASES
from rectvlm.train.recovery.resume import find_source_checkpoint
from rectvlm.train.starting_weights import (
    check_encoder_init,
    check_image_parts,
    choose_parts,
    set_label_prior,
    start_encoder,
)
from rectvlm.types import UserError

MakeRun = Callable[[int], Path]


@pytest.fixture(scope="module")
def exported(tiny_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of phase 3 as it is published: without the optimizer's state."""
    return export_checkpoint(tiny_run(3), tmp_path_factory.mktemp("exported") / "model")


def train(
    phase: int, source: Path, shards: Path, folder: Path, *more: str
) -> subprocess.CompletedProcess[str]:
    """Two steps of a phase on one process."""
    return subprocess.run(
        [
            *LAUNCH,
            *("--num_processes", "1", f"launch/phase{phase}.py", "--from", str(source)),
            *settings(phase, shards, folder, 2),
            *more,
        ],
        cwd=CHECKOUT,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def assert_same_part(checkpoint: Path, source: Path, part: str) -> None:
    """Compare the frozen tensors of a part in two checkpoints."""
    tensors = Checkpoint.open(checkpoint).read_tensors()
    for name, tensor in Checkpoint.open(source).read_tensors([part]).items():  # type: ignore[list-item]
        assert torch.equal(tensors[name], tensor.to(tensors[name].dtype)), name


def test_phase_1_starts_from_the_pulled_encoder_of_a_phase_3_model(
    exported: Path, phantom_shards: Path, tmp_path: Path
) -> None:
    pulled = copy_model(exported, tmp_path / "pulled", ["encoder"])
    frozen_encoder = "train.phases.phase1.lr={classifier: 0.001}"
    done = train(1, pulled, phantom_shards, tmp_path, frozen_encoder)
    assert done.returncode == 0, done.stderr[-3000:]
    words = " ".join(done.stderr.split())
    assert "with its encoder; classifier with random weights" in words
    assert_same_part(tmp_path / "tiny/phase1", pulled, "encoder")


@pytest.mark.slow
@pytest.mark.parametrize("phase", [1, 2])
def test_earlier_phases_start_from_a_phase_3_model(
    phase: int, exported: Path, phantom_shards: Path, tmp_path: Path
) -> None:
    done = train(phase, exported, phantom_shards, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"is left: phase {phase} has none" in " ".join(done.stderr.split())
    assert Checkpoint.open(tmp_path / f"tiny/phase{phase}").parts == PHASES[phase].parts


@pytest.mark.parametrize(
    ("pulled_parts", "phase", "taken"),
    [
        ((), 1, ("encoder", "classifier")),
        ((), 2, ("encoder", "classifier", "localizer")),
        (("encoder",), 1, ("encoder",)),
        (("classifier", "localizer"), 3, ("classifier", "localizer")),
        (("generator",), 3, ("generator",)),
    ],
)
def test_a_phase_takes_the_parts_that_are_there(
    pulled_parts: Sequence[str],
    phase: int,
    taken: Sequence[str],
    exported: Path,
    tmp_path: Path,
) -> None:
    folder = copy_model(exported, tmp_path / "pulled", pulled_parts)  # type: ignore[arg-type]
    checkpoint = Checkpoint.open(folder)
    assert choose_parts(PHASES[phase], checkpoint) == taken
    assert checkpoint.read_tensors(choose_parts(PHASES[phase], checkpoint))


def test_a_model_with_nothing_that_the_phase_needs_is_refused(
    exported: Path, tmp_path: Path
) -> None:
    folder = copy_model(exported, tmp_path / "pulled", ["generator"])
    with pytest.raises(UserError, match=r"holds generator, of which phase 1 needs nothing"):
        choose_parts(PHASES[1], Checkpoint.open(folder))


@pytest.mark.parametrize(
    "overrides",
    [
        ["encoder.width=96"],
        ["encoder.depth=3", "encoder.tap_blocks=[1, 2]"],
        ["classifier.width=8"],
    ],
)
def test_another_size_is_refused_with_the_settings_that_differ(
    overrides: list[str], exported: Path
) -> None:
    checkpoint = Checkpoint.open(exported)
    tensors = checkpoint.read_tensors(["encoder", "classifier"])
    check_image_parts(load_config("tiny"), checkpoint, tensors)
    config = load_config("tiny", overrides)
    with pytest.raises(UserError) as caught:
        check_image_parts(config, checkpoint, tensors)
    setting = overrides[0].partition("=")[0]
    assert "does not fit the configuration tiny" in str(caught.value)
    assert f"{setting} is" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_of_another_size_leaves_the_earlier_run_in_its_place(
    exported: Path, phantom_shards: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny" / "phase1"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    command = [sys.executable, "launch/phase1.py", "--restart", "--from", str(exported)]
    command += [*settings(1, phantom_shards, tmp_path, 2), "encoder.width=96"]
    process = subprocess.run(
        command,
        cwd=CHECKOUT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert process.returncode == 2
    assert "encoder.width is 48 there and 96 here" in process.stderr
    assert (folder / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_an_encoder_starts_from_a_vit_and_says_so(
    phantom_shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_vit("vit").save_pretrained(tmp_path)
    config = load_config("tiny", [f"encoder.init={tmp_path}", f"data.shards={phantom_shards}"])
    check_encoder_init(config)
    prompts = PromptEmbeddings(torch.randn(18, 16), torch.randn(18, 16), torch.randn(5, 16))
    model = RectVLM(config, PHASES[1].parts, prompts)
    with caplog.at_level("INFO", logger="rectvlm"):
        start_encoder(model, config, ShardDataset(config.data, "train"))
    assert "not used: pooler.dense.bias, pooler.dense.weight" in caplog.text
    wanted = load_file(tmp_path / "model.safetensors")["layernorm.weight"]
    assert torch.equal(model.encoder.norm.weight, wanted)


def test_weights_of_others_and_an_atlas_exclude_each_other() -> None:
    with pytest.raises(UserError, match=r"set init to null or atlas_cases to 0"):
        load_config("tiny", ["encoder.init=vit.safetensors", "encoder.atlas_cases=2"])


@pytest.mark.slow
def test_phases_after_the_first_leave_the_vit_alone(phantom_shards: Path, tmp_path: Path) -> None:
    vit = tmp_path / "vit"
    make_vit("vit").save_pretrained(vit)
    init = f"encoder.init={vit}"
    for phase in (1, 2):
        command = [sys.executable, f"launch/phase{phase}.py"]
        command += [*settings(phase, phantom_shards, tmp_path, 2), init]
        done = launch(command, tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stderr.count("encoder from") == (phase == 1)
        shutil.rmtree(vit, ignore_errors=True)  # nor does a run that goes on need it
        again = launch([*command, "--resume"], tmp_path)
        assert again.returncode == 0, again.stderr[-3000:]
    without = launch([*command[:-1], "--restart"], tmp_path)
    assert without.returncode == 2
    assert f"encoder.init is {vit} there and None here" in without.stderr


def launch(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=CHECKOUT,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def test_other_findings_are_refused_by_name(exported: Path, tmp_path: Path) -> None:
    folder = copy_model(exported, tmp_path / "other")
    path = folder / "config.json"
    tree = json.loads(path.read_text())
    replaced, tree["labels"]["findings"][0] = tree["labels"]["findings"][0], "Pneumothorax"
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=rf"also Pneumothorax; not {replaced}"):
        Checkpoint.open(folder)


def test_a_hub_id_is_fetched_without_the_parts_that_the_phase_lacks(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_server.running() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        hub.add("clinic/model", hub_server.read_files(exported))
        config = load_config("tiny", [f"train.runs={tmp_path}"])
        folder = find_source_checkpoint(PHASES[2], config, "clinic/model")
        assert folder is not None
        checkpoint = Checkpoint.open(folder)
        assert choose_parts(PHASES[2], checkpoint) == PHASES[2].parts
        assert checkpoint.read_tensors(PHASES[2].parts)
        assert not hub.sent["generator.safetensors"]
        with pytest.raises(UserError, match="No repository clinic/none"):
            find_source_checkpoint(PHASES[2], config, "clinic/none")


def test_the_first_bias_is_the_log_odds_of_the_known_labels(
    launched_phase1: Path, phantom_shards: Path
) -> None:
    """Six steps later it is still near: -0.5, the first bias of all findings once, is not."""
    data = load_config("tiny", [f"data.shards={phantom_shards}"]).data
    train_set = ShardDataset(data, "train")
    bias = Checkpoint.open(launched_phase1).read_tensors()["classifier.bias"].float()
    log_odds = []
    for finding in FINDINGS:
        labels = [
            read_sample_meta(train_set.store, at).labels[finding] for at in train_set.locations
        ]
        log_odds.append(math.log((labels.count(1) + 0.5) / (labels.count(0) + 0.5)))
    assert bias.tolist() == pytest.approx(log_odds, abs=0.05)
    assert max(log_odds) - min(log_odds) > 1


def test_unknown_labels_do_not_count_and_no_count_is_infinite(tiny: Config, tmp_path: Path) -> None:
    samples = [phantom_sample(seed, tiny) for seed in range(3)]
    values = {FINDINGS[0]: (1, 0, None), FINDINGS[1]: (0, 0, 0), FINDINGS[2]: (None, None, None)}
    for i, sample in enumerate(samples):
        labels = sample.meta.labels | {finding: row[i] for finding, row in values.items()}
        samples[i] = replace(sample, meta=replace(sample.meta, labels=labels))
    write_shards(samples, tmp_path)
    model = build_meta_model(tiny, ("encoder", "classifier"), 8, None).to_empty(device="cpu")
    set_label_prior(model, tmp_path)
    assert model.classifier.bias[:3].tolist() == pytest.approx([0, math.log(0.5 / 3.5), 0])
