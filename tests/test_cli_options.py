import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from rectvlm.cli_options import CommandParser, add_options, argument, options_from_namespace


@dataclass(frozen=True)
class MaskOptions:
    masks: Path | None = field(default=None, metadata=argument(metavar="DIR"))
    """Folder of the masks."""


@dataclass(frozen=True)
class ExampleOptions:
    names: tuple[str, ...] = field(metadata=argument(is_positional=True))
    """Names of the models."""
    split: Literal["train", "valid"] = "valid"
    reports: bool = True
    """Whether reports are generated."""
    strict: bool = False
    limit: int | None = field(default=None, metadata=argument(metavar="N", minimum=1))
    """Number of cases that are
    read, at most 100%."""
    rate: float = field(default=0.5, metadata=argument(flag="--learning-rate", minimum=0))
    exclude: tuple[Path, ...] = field(default=(), metadata=argument(is_repeated=True))
    """CSV files of cases that are left out."""
    kinds: tuple[Literal[1, 2], ...] = (1, 2)
    gpus: int = field(default=2, metadata=argument(exclusive_group="size"))
    nodes: int | None = field(default=None, metadata=argument(exclusive_group="size"))
    mask_options: MaskOptions = field(default_factory=MaskOptions)
    spacing_mm: float = 5.0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_options(parser, ExampleOptions, exclude=["spacing_mm"])
    return parser


def parse(*arguments: str, **values: Any) -> ExampleOptions:
    return options_from_namespace(ExampleOptions, build_parser().parse_args(arguments), **values)


def test_without_arguments_the_fields_have_their_defaults() -> None:
    assert parse("a", "b") == ExampleOptions(names=("a", "b"))
    assert parse("a", spacing_mm=1.0) == ExampleOptions(names=("a",), spacing_mm=1.0)


def test_every_kind_of_field_is_read_from_its_argument() -> None:
    options = parse(
        *["a", "--split", "train", "--no-reports", "--strict", "--limit", "3"],
        *["--learning-rate", "1", "--exclude", "x.csv", "--exclude", "y.csv"],
        *["--kinds", "2", "--nodes", "4", "--masks", "m"],
    )
    assert options == ExampleOptions(
        names=("a",),
        split="train",
        reports=False,
        strict=True,
        limit=3,
        rate=1.0,
        exclude=(Path("x.csv"), Path("y.csv")),
        kinds=(2,),
        nodes=4,
        mask_options=MaskOptions(Path("m")),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: names"),
        (["a", "--limit", "0"], "must be at least 1, not 0"),
        (["a", "--limit", "many"], "invalid int value: 'many'"),
        (["a", "--learning-rate", "nan"], "must be at least 0, not nan"),
        (["a", "--split", "test"], "invalid choice: 'test'"),
        (["a", "--kinds", "3"], "invalid choice: 3"),
        (["a", "--gpus", "1", "--nodes", "1"], "not allowed with argument"),
    ],
)
def test_a_wrong_argument_is_named(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args(arguments)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_the_help_is_the_fields_docstring_with_its_default() -> None:
    page = " ".join(build_parser().format_help().split())
    assert "--limit N number of cases that are read, at most 100% --learning-rate" in page
    assert "CSV files of cases that are left out --kinds" in page
    assert "--split {train,valid} (default: valid)" in page
    assert "--kinds {1,2} [{1,2} ...] (default: 1 2)" in page
    assert "names names of the models" in page and "spacing" not in page


def test_a_field_of_two_types_is_refused() -> None:
    @dataclass
    class Ambiguous:
        value: int | str = 1

    with pytest.raises(TypeError, match=r"int \| str"):
        add_options(argparse.ArgumentParser(), Ambiguous)


def test_a_command_adds_its_arguments_when_it_is_chosen() -> None:
    added: list[str] = []

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        added.append(parser.prog)
        parser.add_argument("--x", type=int, required=True)

    parser = CommandParser(prog="tool")
    commands = parser.add_subparsers(dest="command")
    for name in ("first", "second"):
        commands.add_parser(name, help=name, add_arguments=add_arguments)
    assert "second" in parser.format_help() and not added
    for _ in range(2):
        assert parser.parse_args(["second", "--x", "3"]).x == 3
    assert added == ["tool second"]
