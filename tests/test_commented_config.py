"""`rectvlm init`: a shipped configuration with comments, which loads to the same values."""

import pytest

from rectvlm.cli import main
from rectvlm.config import CONFIG_FOLDER, GeneratorConfig, load_config

SHIPPED = sorted(path.stem for path in CONFIG_FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_the_file_loads_to_the_values_of_the_shipped_configuration(name, tmp_path, capsys):
    path = tmp_path / "my.yaml"
    assert main(["init", str(path), "--from", name]) == 0
    assert capsys.readouterr().out == f"{path}\n"
    assert load_config(path) == load_config(name)


def test_every_field_is_explained_once_above_its_first_line(tmp_path):
    path = tmp_path / "my.yaml"
    assert main(["init", str(path)]) == 0
    lines = path.read_text().splitlines()
    keys = [line.strip().partition(":")[0] for line in lines]
    for number, line in enumerate(lines):
        is_first_phase = number < keys.index("phase2-localize")
        is_value = not line.strip().startswith("#")
        if is_value and is_first_phase and keys[number] not in ("phases", "phase1"):
            assert lines[number - 1].strip().startswith("# "), line
    description = str(GeneratorConfig.model_fields["lora_rank"].description)
    assert lines[keys.index("lora_rank") - 1].strip() == f"# {description}"
    comments = [line for line in lines if line.strip().startswith("#")]
    assert sum("Samples of an optimizer step" in line for line in comments) == 1
    assert load_config("small") == load_config(path), "small is the one that init starts from"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{0}/there.yaml"], "there.yaml exists: give another name"),
        (["{0}/my.txt"], "ends with .yaml"),
        (["{0}/my.yaml", "--from", "smal"], "No configuration 'smal'"),
        (["{0}/there.yaml/my.yaml"], "there.yaml is no folder"),
    ],
)
def test_what_cannot_be_written_is_said_and_nothing_changes(arguments, message, tmp_path, capsys):
    (tmp_path / "there.yaml").write_text("name: mine\n")
    assert main(["init", *(text.format(tmp_path) for text in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there.yaml"]
    assert (tmp_path / "there.yaml").read_text() == "name: mine\n"
