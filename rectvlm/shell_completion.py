"""Scripts with which a shell completes the commands, options and files of `rectvlm`."""

import argparse
from pathlib import Path

import shtab

from rectvlm.cli_options import CommandParser


def make_completion_script(parser: CommandParser, shell: str) -> str:
    """Make the script that a shell reads once, by shtab.

    Args:
        parser: parser of the command; its commands get all their arguments.
        shell: bash, zsh or fish.
    """
    _prepare(parser)
    script: str = shtab.complete(parser, shell)
    return script


def _prepare(parser: CommandParser) -> None:
    """Add the arguments of all commands, and complete files where an argument is a path."""
    parser.add_own_arguments()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _prepare(command)
        elif action.choices is None and (action.type is Path or not action.option_strings):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
