"""Command-line options declared once: a dataclass's fields are a command's arguments.

    @dataclass(frozen=True)
    class ScaleOptions:
        gpus: int = field(default=2, metadata=argument(metavar="N", minimum=1))
        \"""Number of GPUs.\"""

    add_options(parser, ScaleOptions)  # --gpus N, help "number of GPUs (default: 2)"
    options = options_from_namespace(ScaleOptions, parser.parse_args())

A field's type decides how its argument is read: `str`, `int`, `float`, `Path` and `Literal` as one
value, with or without `| None`; `tuple[X, ...]` as several values; `bool` as a flag, `--no-NAME`
where the default is True; another dataclass as its own fields. A field without a default is
required. The field's docstring is the help.
"""

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import io
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from rectvlm.cli_examples import EXAMPLES

OptionsT = TypeVar("OptionsT")
_METADATA_KEY = "command_line"


@dataclass(frozen=True)
class ArgumentSettings:
    """What the command line needs beyond a field's type, default and docstring."""

    flag: str | None = None
    """Name on the command line, `--NAME`; by default the field's name with hyphens."""
    metavar: str | None = None
    """Placeholder of the value in the help."""
    help: str | None = None
    """Help text in place of the field's docstring."""
    minimum: float | None = None
    """Smallest number that is accepted."""
    is_positional: bool = False
    """Whether the argument has no flag."""
    is_repeated: bool = False
    """Whether each value of a tuple has its own flag."""
    exclusive_group: str | None = None
    """Name of a group of arguments of which at most one may be given."""


def argument(**settings: Any) -> dict[str, Any]:
    """Metadata of a dataclass field that carries settings of its command-line argument.

    Args:
        settings: fields of `ArgumentSettings`.
    """
    return {_METADATA_KEY: ArgumentSettings(**settings)}


def add_options(
    parser: "argparse.ArgumentParser | argparse._ArgumentGroup",
    options_class: type,
    exclude: Sequence[str] = (),
) -> None:
    """Add an argument for each field of a dataclass to a parser or to a group of its arguments.

    Args:
        parser: receives the arguments.
        options_class: a dataclass.
        exclude: names of fields that are no arguments.
    """
    field_types = typing.get_type_hints(options_class)
    docstrings = _field_docstrings(options_class)
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(options_class):
        if field.name in exclude:
            continue
        if is_dataclass(field_types[field.name]):
            add_options(parser, field_types[field.name])
            continue
        settings = field.metadata.get(_METADATA_KEY, ArgumentSettings())
        target: Any = parser
        if settings.exclusive_group is not None:
            if settings.exclusive_group not in groups:
                groups[settings.exclusive_group] = parser.add_mutually_exclusive_group()
            target = groups[settings.exclusive_group]
        names, keywords = _add_argument_parameters(
            field, field_types[field.name], settings, docstrings.get(field.name, "")
        )
        target.add_argument(*names, **keywords)


def options_from_namespace(
    options_class: type[OptionsT], namespace: argparse.Namespace, **values: Any
) -> OptionsT:
    """Build a dataclass from parsed arguments.

    Args:
        options_class: the dataclass that was given to `add_options`.
        namespace: parsed arguments.
        values: fields that do not come from the command line.
    """
    field_types = typing.get_type_hints(options_class)
    for field in dataclasses.fields(options_class):  # type: ignore[arg-type]
        if field.name in values:
            continue
        field_type = field_types[field.name]
        if is_dataclass(field_type):
            values[field.name] = options_from_namespace(typing.cast(type, field_type), namespace)
        elif hasattr(namespace, field.name):
            value = getattr(namespace, field.name)
            values[field.name] = tuple(value) if isinstance(value, list) else value
    return options_class(**values)


def read_path(text: str) -> Path:
    """Read an argument that is a path; `~` is the home folder, also in `--out=~/x`.

    Raises:
        ArgumentTypeError: the path is empty, or begins with the `~name` of an unknown user.
    """
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found nothing")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise argparse.ArgumentTypeError(
            f"{text}: no home folder is known of that user; write ./{text} for a folder of that "
            "name"
        ) from None


def print_names_as_bytes() -> None:
    """Let standard output take file names that are no UTF-8: they are printed as they are."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")


class CommandParser(argparse.ArgumentParser):
    """A parser that adds its arguments when its command is chosen, and guesses what was meant.

    `rectvlm --help` then imports none of the modules in which options are declared. A word that is
    no command, option or choice is answered with the nearest one that is. Arguments of the type
    `Path` are read by `read_path`.
    """

    def __init__(
        self,
        *args: Any,
        add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
        is_command: bool = False,
        **settings: Any,
    ) -> None:
        """Take the arguments of `argparse.ArgumentParser`.

        Args:
            args: positional arguments of `argparse.ArgumentParser`.
            add_arguments: called once with this parser before it reads its arguments.
            is_command: whether this is the parser of a command of another parser.
            settings: keyword arguments of `argparse.ArgumentParser`.
        """
        super().__init__(*args, **settings)
        self.register("type", Path, read_path)
        self._is_command = is_command
        self._words: list[str] = []
        self._add_arguments = add_arguments

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Add the arguments, then parse as `argparse.ArgumentParser` does.

        Without any argument a command that has commands below it prints its help.
        """
        self.add_own_arguments()
        self._words = sys.argv[1:] if args is None else list(args)
        if self._subparsers is not None and not self._words:
            self.print_help(sys.stderr)
            self.exit(2)
        namespace, unknown = super().parse_known_args(args, namespace)
        if self._is_command and unknown:  # here its options are known, in the parser above not
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return namespace, unknown

    def add_own_arguments(self) -> None:
        """Add the arguments that are added when the command is chosen, unless they are there."""
        add_arguments, self._add_arguments = self._add_arguments, None
        if add_arguments is not None:
            add_arguments(self)

    def format_help(self) -> str:
        """The help as `argparse.ArgumentParser` writes it, followed by the command's examples."""
        examples = "".join(f"  {line}\n" for line in EXAMPLES.get(self.prog, ()))
        text = super().format_help()
        return f"{text}\nexamples:\n{examples}" if examples else text

    def add_subparsers(self, **settings: Any) -> Any:
        """Add commands as `argparse.ArgumentParser` does."""
        command_parser = functools.partial(type(self), is_command=True)
        return super().add_subparsers(**({"parser_class": command_parser} | settings))

    def error(self, message: str) -> NoReturn:
        """Print usage, error and the options that were probably meant; exit with code 2."""
        super().error(message + "".join(map(self._suggest_option, self._own_options())))

    def _own_options(self) -> list[str]:
        """Options among the words, without those that belong to a command below this one."""
        options: list[str] = []
        for word in self._words:
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                break
            if word.startswith("--"):
                options.append(word.partition("=")[0])
        return options

    def _suggest_option(self, option: str) -> str:
        known_options = list(self._option_string_actions)
        if any(known.startswith(option) for known in known_options):
            return ""
        near_options = difflib.get_close_matches(option, known_options, n=1)
        return f"; did you mean {near_options[0]} instead of {option}?" if near_options else ""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            choices = list(map(str, action.choices or ()))
            near_choices = difflib.get_close_matches(str(value), choices, n=1)
            if near_choices:
                error.message += f"; did you mean {near_choices[0]}?"
            raise


def _add_argument_parameters(
    field: "Field[Any]", field_type: Any, settings: ArgumentSettings, docstring: str
) -> tuple[list[str], dict[str, Any]]:
    """Names and keyword arguments of `add_argument` for one field."""
    default = field.default if field.default_factory is MISSING else field.default_factory()
    value_type, is_tuple = _value_type(field_type)
    keywords: dict[str, Any] = {"help": settings.help or _as_help(docstring)}
    flag = settings.flag or "--" + field.name.replace("_", "-")

    if value_type is bool:
        keywords |= {"dest": field.name, "default": default}
        if default is True:
            flag = settings.flag or "--no-" + field.name.replace("_", "-")
        return [flag], keywords | {"action": "store_false" if default is True else "store_true"}

    if typing.get_origin(value_type) is Literal:
        keywords["choices"] = typing.get_args(value_type)
        value_type = type(keywords["choices"][0])
    keywords["type"] = _number_reader(value_type, settings.minimum)
    if settings.metavar is not None:
        keywords["metavar"] = settings.metavar
    if is_tuple and settings.is_repeated:
        keywords["action"] = "append"
    elif is_tuple:
        keywords["nargs"] = "+" if default is MISSING or not settings.is_positional else "*"

    if default is not MISSING:
        keywords["default"] = list(default) if is_tuple else default
        if default not in (None, ()) and settings.help is None:
            shown = " ".join(map(str, default)) if is_tuple else default
            keywords["help"] = f"{keywords['help']} (default: {shown})".strip()
    if settings.is_positional:
        return [field.name], keywords
    return [flag], keywords | {"dest": field.name, "required": default is MISSING}


def _value_type(field_type: Any) -> tuple[Any, bool]:
    """Type of one value of a field, and whether the field holds a tuple of them."""
    members = [field_type]
    if typing.get_origin(field_type) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(field_type) if member is not type(None)]
    if len(members) != 1:
        raise TypeError(f"{field_type} is no type of an option: expected one type, or it and None.")
    if typing.get_origin(members[0]) is tuple:
        return typing.get_args(members[0])[0], True
    return members[0], False


def _number_reader(value_type: Callable[[str], Any], minimum: float | None) -> Callable[[str], Any]:
    """The function by which argparse reads a value."""
    if minimum is None:
        return value_type

    def read_number(text: str) -> Any:
        number = value_type(text)
        if not minimum <= number < float("inf"):
            raise argparse.ArgumentTypeError(f"must be at least {minimum}, not {text}")
        return number

    read_number.__name__ = getattr(value_type, "__name__", "value")
    return read_number


def _field_docstrings(options_class: type) -> dict[str, str]:
    """The string under each field of a dataclass and of its bases, read from their source."""
    docstrings: dict[str, str] = {}
    for base in reversed(options_class.__mro__):
        if not is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
        for statement, following in pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                docstrings[ast.unparse(statement.target)] = ast.literal_eval(following.value)
    return docstrings


def _as_help(docstring: str) -> str:
    """A docstring as argparse's help: one line, a small first letter, no full stop, `%` doubled."""
    text = " ".join(docstring.split()).removesuffix(".").replace("%", "%%")
    starts_with_name = text[:2].isupper() or text[:1] == "`"
    return text if starts_with_name else text[:1].lower() + text[1:]
