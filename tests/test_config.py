"""The configuration: what is written reads back, and every mistake is one sentence that names
it."""

from pathlib import Path

import pytest
import yaml

from rectvlm.config import CONFIG_FOLDER, Config, load_config, parse_config
from rectvlm.types import UserError

NAMES = sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))


def test_tiny_and_demo_are_there() -> None:
    assert {"tiny", "demo"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_size_loads_under_its_own_name_and_reads_back(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert config.name == name
    written = tmp_path / "written.yaml"
    written.write_text(config.to_yaml())
    assert load_config(written) == config
    assert load_config(str(written), ["train.seed=5"]) != config


def test_overrides_change_their_value_alone() -> None:
    config = load_config(
        "tiny",
        ["train.phases.phase1.samples=11", "data.windows=[bone]", "generator.quantization=none"],
    )
    assert config.train.phases["phase1"].samples == 11
    assert config.data.windows == ("bone",)
    assert config.generator.quantization == "none"
    tree = config.model_dump()
    plain = load_config("tiny").model_dump()
    tree["train"]["phases"]["phase1"]["samples"] = plain["train"]["phases"]["phase1"]["samples"]
    tree["data"]["windows"] = plain["data"]["windows"]
    tree["generator"]["quantization"] = plain["generator"]["quantization"]
    assert tree == plain


OUTSIDE = ["../x", "a/b", "/x", "..", ".", ".x", "-x", "a\\\\b", "''", "' x'", '"a\\nb"', '"a\\0b"']
"""Names that would lead out of the folder of runs, hide there, or look like an option."""


def test_names_and_paths_as_users_write_them() -> None:
    overrides = ["name=Büro 2.1_x", "train.runs=~/runs", "data.shards=s3://bucket/shards"]
    config = load_config("tiny", overrides)
    assert config.name == "Büro 2.1_x"
    assert config.train.runs == str(Path.home() / "runs")
    assert config.data.shards == "s3://bucket/shards"


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        ("encoder.witdh=64", "unknown key 'encoder.witdh', did you mean 'width'"),
        ("encodr.width=64", "unknown key 'encodr', did you mean 'encoder'"),
        ("train.phases.4.samples=1", "unknown key 'train.phases.4'"),
        ("train.phases.one.samples=1", "unknown key 'train.phases.one'"),
        ("train.seed.more=1", "unknown key"),
        ("train.seed", "not of the form part.field=value"),
        ("=3", "unknown key"),
        ("train.seed=[", "not a YAML value"),
        ("train.phases.phase1.samples=many", "train.phases.phase1.samples = 'many'"),
        ("train.phases.phase1.samples=0", "greater than 0"),
        ("train.phases.phase1.steps=8", "unknown key 'train.phases.phase1.steps'"),
        ("train.phases.phase1.samples=1.5", "train.phases.phase1.samples"),
        ("train.phases.phase1.warmup=1", "train.phases.phase1.warmup = 1: input should be less"),
        ("train.phases.phase1.save_every=500", "train.phases.phase1.save_every = 500"),
        ("train.phases.phase1.validation.every=500", "validation.every = 500"),
        ("train.gradient_clipping=0", "train.gradient_clipping"),
        ("train.gradient_clipping=.nan", "train.gradient_clipping"),
        ("train.phases.phase1.lr.encodr=0.1", "encodr"),
        ("train.phases.phase1.lr={encodr: 0.1}", "encodr"),
        ("train.phases.phase1.lr={encoder: fast}", "train.phases.phase1.lr.encoder"),
        ("generator.quant_storage=float16", "generator.quant_storage = 'float16'"),
        ("generator.quantization=fp4", "generator.quantization"),
        ("data.windows=[lungs]", "data.windows"),
        ("data.grid=[16, 48]", "data.grid"),
        ("data.grid=[16, 48, 50]", "does not tile data.grid"),
        ("data.spacing=[1, 1, -1]", "data.spacing"),
        ("encoder.heads=5", "encoder.width 48 is not a multiple of encoder.heads 5"),
        ("localizer.heads=5", "localizer.width 48 is not a multiple of localizer.heads 5"),
        ("generator.heads=5", "generator.width 48 is not a multiple of generator.heads 5"),
        ("localizer.channels=[4, 8]", "localizer.channels"),
        ("encoder.volume_every=3", "no block would attend over the volume"),
        ("encoder.patch=[4, 6, 6]", "power"),
        ("encoder.patch=[2, 2, 2]", "localizer.channels"),
        *((f"name={name}", "a run's name is one folder's name") for name in OUTSIDE),
        (f"name={'x' * 300}", "at most 200 bytes"),
        ("train.runs=''", "train.runs = '': expected a path"),
        ("train.loss_weights.report=-1", "train.loss_weights.report"),
        ("train.phases.phase1.lr.encoder=-1", "train.phases.phase1.lr.encoder"),
    ],
)
def test_mistakes_are_one_sentence(override: str, fragment: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config("tiny", [override])
    message = str(caught.value)
    assert fragment in message
    assert "\n" not in message
    assert message.endswith(".")


def test_every_fault_is_named_at_once() -> None:
    with pytest.raises(
        UserError,
        match=r"train\.seed.*train\.gradient_clipping|train\.gradient_clipping.*train\.seed",
    ):
        load_config("tiny", ["train.seed=x", "train.gradient_clipping=-1"])


def test_a_file_must_name_every_value(tmp_path: Path) -> None:
    tree = yaml.safe_load((CONFIG_FOLDER / "tiny.yaml").read_text())
    del tree["encoder"]["depth"]
    with pytest.raises(UserError, match=r"missing key 'encoder\.depth'"):
        parse_config(tree, "here")
    tree["encoder"] |= {"depth": 2, "dropout": 0.1}
    with pytest.raises(UserError, match=r"here: unknown key 'encoder\.dropout'"):
        parse_config(tree, "here")


@pytest.mark.parametrize("text", ["- a list", "", "a: [", "just words"])
def test_files_that_hold_no_settings(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=r"bad\.yaml") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)


def test_no_such_configuration_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'huge'.*demo.*tiny"):
        load_config("huge")
    with pytest.raises(UserError, match="nowhere"):
        load_config(tmp_path / "nowhere.yaml")


def test_values_cannot_be_changed_afterwards() -> None:
    config: Config = load_config("tiny")
    with pytest.raises(ValueError, match="frozen"):
        config.train.seed = 3


@pytest.mark.parametrize("name", NAMES)
def test_the_yaml_of_a_configuration_is_its_file(name: str) -> None:
    written = yaml.safe_load(load_config(name).to_yaml())
    assert written == yaml.safe_load((CONFIG_FOLDER / f"{name}.yaml").read_text())


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        (
            "train.phases.phase1.unfreeze=[{part: localizer, last_blocks: null, start: 0.3}]",
            "no learning rate",
        ),
        (
            "train.phases.phase1.unfreeze=[{part: classifier, last_blocks: 1, start: 0.3}]",
            "for the encoder",
        ),
        (
            "train.phases.phase1.unfreeze=[{part: classifier, start: 0.3}]",
            "train.phases.phase1.unfreeze.0.last_blocks",
        ),
        (
            "train.phases.phase1.unfreeze=[{part: encoder, last_blocks: 1, start: 0.3, stop: 4}]",
            "train.phases.phase1.unfreeze.0.stop",
        ),
        (
            "train.phases.phase1.unfreeze=[{part: classifier, last_blocks: null, start: 0.8}]",
            "unfreeze starts classifier after 0.8 of the phase, so its warm-up of 0.25 does not",
        ),
        (
            "train.phases.phase1.validation.best_metric=accuracy",
            "train.phases.phase1.validation.best_metric",
        ),
        ("train.phases.phase1.ema_decay=1.0", "train.phases.phase1.ema_decay"),
        ("train.phases.phase3-align.lr.encodr=1", "did you mean 'encoder'|unknown key"),
    ],
)
def test_mistakes_in_the_choices_of_a_phase(override: str, fragment: str) -> None:
    with pytest.raises(UserError, match=fragment) as caught:
        load_config("tiny", [override])
    assert "\n" not in str(caught.value)
