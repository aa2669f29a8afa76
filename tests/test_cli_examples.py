"""Every command's help ends with examples, and every example is a command that is accepted."""

import re
import shlex

import pytest
from test_docs import check_rectvlm, stop_after_parsing  # noqa: F401 - a fixture

from rectvlm.cli import main
from rectvlm.cli_examples import EXAMPLES


def read_help(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    return capsys.readouterr().out


def list_commands(help_text: str) -> list[str]:
    return re.findall(r"^    ([a-z][\w-]*)", help_text.partition("examples:")[0], flags=re.M)


def test_every_help_has_its_examples(capsys):
    """Of each command and each action, so of one that is new as well."""
    commands = list_commands(read_help(capsys))
    assert len(commands) > 14
    for command in {*commands} - {"preprocess"}:  # whose help is another program's
        text = read_help(capsys, command)
        assert EXAMPLES[f"rectvlm {command}"][0] in text.partition("examples:")[2]
        actions = list_commands(text) if "ACTION" in text.partition("\n")[0] else []
        assert (command in ("runs", "weights")) == bool(actions)
        for action in actions:
            example = EXAMPLES[f"rectvlm {command} {action}"][0]
            assert example in read_help(capsys, command, action).partition("examples:")[2]


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
@pytest.mark.usefixtures("stop_after_parsing")
def test_every_example_is_accepted(line):
    _, _, arguments = line.partition("rectvlm ")  # a variable may stand before it
    check_rectvlm(shlex.split(arguments.partition(" > ")[0]))
