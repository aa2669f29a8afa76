"""The documentation agrees with the code: links, names, fields, commands, Python blocks, length."""

import argparse
import ast
import importlib
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from rectvlm.config import load_config
from rectvlm.types import UserError

CHECKOUT = Path(__file__).parents[1]
DOCS = CHECKOUT / "docs"
LAB_NOTES = DOCS / "lab-notes"
PAGES = sorted([*DOCS.rglob("*.md"), CHECKOUT / "README.md", CHECKOUT / "CONTRIBUTING.md"])
CURRENT_PAGES = [page for page in PAGES if LAB_NOTES not in page.parents]
"""Pages that describe the code of today; lab notes may name what is gone."""
MAX_WORDS = 14_600
"""600 of them for the page of error messages."""
SOURCE_FOLDERS = ("rectvlm", "data_pipeline", "launch", "benchmarks", "tests", "ds_configs", "docs")
PACKAGES = ("rectvlm", "data_pipeline", "launch", "benchmarks", "tests")
CONFIG_SECTIONS = ("data", "encoder", "text", "classifier", "localizer", "generator", "train")
OWN_ENCODER = DOCS / "how-to/own-encoder.md"
"""Its code stands in files that the reader writes; tests/models/test_encoder.py runs it."""
FOREIGN_COMMANDS = {".", "cd", "git", "hf", "pip", "sky", "tensorboard", "vllm", "wandb"}
SOURCE_FILE = re.compile(r"[\w./-]+\.(?:py|ya?ml|j2|sh|sbatch|toml)\b")
SOURCE_LINK = re.compile(r"docs/[\w./-]+\.md")


def page_id(page: Path) -> str:
    return str(page.relative_to(CHECKOUT))


every_page = pytest.mark.parametrize("page", PAGES, ids=page_id)
every_current_page = pytest.mark.parametrize("page", CURRENT_PAGES, ids=page_id)


class CodeBlock(NamedTuple):
    language: str
    text: str


def read_code_blocks(page: Path) -> list[CodeBlock]:
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), flags=re.M | re.S)
    return [CodeBlock(language, text) for language, text in fences]


def read_prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)


def read_inline_code(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", read_prose(page))


def heading_anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", read_prose(page), flags=re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.strip().replace(" ", "-") for heading in plain}


def test_the_pages_are_short() -> None:
    pages = [page for page in DOCS.rglob("*.md") if LAB_NOTES not in page.parents]
    assert len(pages) > 20
    count = sum(len(page.read_text().split()) for page in pages)
    assert count <= MAX_WORDS, f"docs/ has {count} words outside lab-notes/: shorten or move some"


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", read_prose(page)):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page_id(page)}: no file {target}"
        if anchor:
            assert anchor in heading_anchors(file), f"{page_id(page)}: no heading {target}"


def test_the_map_leads_to_every_page() -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", (DOCS / "index.md").read_text())
    linked = {(DOCS / target).resolve() for target in targets}
    expected = {page for page in DOCS.rglob("*.md") if LAB_NOTES not in page.parents}
    assert expected - {DOCS / "index.md"} <= linked
    assert set(DOCS.rglob("*.ipynb")) <= linked
    notes = re.findall(r"\]\(([^)#\s]+)", (LAB_NOTES / "index.md").read_text())
    assert {page.name for page in LAB_NOTES.glob("*.md")} - {"index.md"} <= set(notes)


def all_source_files() -> Iterator[Path]:
    for folder in (*SOURCE_FOLDERS, ".ci"):
        yield from (path for path in (CHECKOUT / folder).rglob("*") if path.is_file())


@every_current_page
def test_files_that_are_named_exist(page: Path) -> None:
    names = {path.name for path in all_source_files()} | {"config.yaml"}  # of a run
    for code in read_inline_code(page):
        for word in SOURCE_FILE.findall(code.replace("phaseN", "phase1")):
            if page == OWN_ENCODER and word.endswith("/conv_encoder.py"):
                continue
            if word.split("/")[0] in SOURCE_FOLDERS:
                assert (CHECKOUT / word).exists(), f"{page_id(page)}: no file {word}"
            elif "/" not in word:
                known = word in names or (CHECKOUT / word).exists()
                assert known, f"{page_id(page)}: no file is called {word}"
        if (
            page != OWN_ENCODER
            and code.split("/")[0] in SOURCE_FOLDERS
            and re.fullmatch(r"[\w./-]+", code)
        ):
            path = CHECKOUT / code.replace("phaseN", "phase1")
            assert path.exists(), f"{page_id(page)}: no {code}"


def test_pages_that_the_source_names_exist() -> None:
    for path in all_source_files():
        if path.suffix in (".py", ".yaml", ".sh", ".sbatch", ".j2") and path != Path(__file__):
            for name in SOURCE_LINK.findall(path.read_text()):
                assert (CHECKOUT / name).is_file(), f"{page_id(path)} names {name}"


def resolve_name(dotted: str) -> Any:
    """A module, or what it holds."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            value = getattr(value, name)
        return value
    raise ModuleNotFoundError(dotted)


@every_current_page
def test_modules_that_are_named_exist(page: Path) -> None:
    for code in read_inline_code(page):
        is_dotted = re.fullmatch(rf"({'|'.join(PACKAGES)})(\.\w+)+", code)
        if is_dotted and not SOURCE_FILE.fullmatch(code):
            resolve_name(code)


@every_current_page
def test_configuration_fields_that_are_named_exist(page: Path) -> None:
    tree = load_config("demo").model_dump()
    for code in read_inline_code(page):
        dotted = code.partition("=")[0].partition(":")[0].replace("KEY", "phase1")
        section, _, rest = dotted.partition(".")
        is_file = SOURCE_FILE.fullmatch(dotted)
        is_tensor = rest.endswith((".weight", ".bias"))
        is_field = re.fullmatch(r"[\w.-]+", rest) and not is_file and not is_tensor
        if section not in CONFIG_SECTIONS or not is_field:
            continue
        node: Any = tree
        for name in dotted.split("."):
            assert name in node, f"{page_id(page)}: no configuration field {code}"
            node = node[name]


class ArgumentsParsed(BaseException):
    """The arguments of a command are right; the command itself is not run."""


@pytest.fixture
def stop_after_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command ends when its own parser has accepted its arguments."""
    for method in ("parse_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, method)

        def stop(*arguments: Any, _parse: Callable[..., Any] = parse, **options: Any) -> None:
            _parse(*arguments, **options)
            raise ArgumentsParsed

        monkeypatch.setattr(argparse.ArgumentParser, method, stop)


def parse_with(main: Callable[..., Any], arguments: Sequence[str]) -> None:
    """Let a command parse its arguments.

    Raises:
        AssertionError: the parser did not accept them.
    """
    try:
        main(arguments)
    except ArgumentsParsed:
        return
    except SystemExit as end:
        raise AssertionError(f"{arguments} is not accepted (exit code {end.code})") from None
    raise AssertionError(f"{arguments}: nothing was parsed")


def check_overrides(arguments: Sequence[str]) -> None:
    """Load the configuration that a command names, with its overrides."""
    name = "demo"
    if "--config" in arguments:
        name = arguments[arguments.index("--config") + 1]
    overrides = [word for word in arguments if re.match(r"(\w+\.)*[\w.-]+=", word)]
    try:
        load_config(name, overrides)
    except UserError as error:
        raise AssertionError(str(error)) from None


def check_rectvlm(arguments: Sequence[str]) -> None:
    from rectvlm.cli import main

    if arguments[0] == "preprocess":
        check_module("data_pipeline.preprocess", arguments[1:])
        return
    parse_with(main, arguments)
    if arguments[0] == "plan":
        check_overrides(arguments)


def check_phase(script: str, arguments: Sequence[str]) -> None:
    from rectvlm.train import main

    number = int(script.removeprefix("launch/phase").removesuffix(".py"))
    parse_with(lambda words: main(number, words), arguments)
    check_overrides(arguments)


def check_module(name: str, arguments: Sequence[str]) -> None:
    if name == "rectvlm":
        check_rectvlm(arguments)
    elif name == "data_pipeline.verify":
        from data_pipeline.verify.verify import main

        parse_with(main, arguments)
    else:
        parse_with(importlib.import_module(name).main, arguments)


def check_launcher(launcher: str, words: Sequence[str]) -> None:
    """The launcher's own options, then the program behind it."""
    start = next(
        place for place, word in enumerate(words) if word == "-m" or word.startswith("launch/phase")
    )
    options = list(words[:start])
    if launcher == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        numbers = [word.replace("RANK", "0") for word in options]
        parse_with(launch_command_parser().parse_args, [*numbers, "script.py"])
        for place, word in enumerate(options):
            if word == "--config_file":
                assert (CHECKOUT / options[place + 1]).is_file(), f"no {options[place + 1]}"
    if words[start] == "-m":
        check_module(words[start + 1], words[start + 2 :])
    else:
        check_phase(words[start], words[start + 1 :])


def check_make(words: Sequence[str]) -> None:
    makefile = (CHECKOUT / "Makefile").read_text()
    for word in words:
        name, separator, _ = word.partition("=")
        pattern = rf"^{name} \?=" if separator else rf"^{name}:"
        assert re.search(pattern, makefile, flags=re.M), f"the Makefile knows no {word}"


def check_command(line: str) -> None:
    words = shlex.split(line, comments=True)
    while words and re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if not words:
        return
    program, *arguments = words
    if program == "rectvlm":
        check_rectvlm(arguments)
    elif program == "make":
        check_make(arguments)
    elif program == "accelerate":
        assert arguments[0] == "launch"
        check_launcher(program, arguments[1:])
    elif program == "torchrun":
        check_launcher(program, arguments)
    elif program == "python" and arguments[0] == "-m":
        check_module(arguments[1], arguments[2:])
    elif program == "python":
        assert (CHECKOUT / arguments[0]).is_file(), f"no file {arguments[0]}"
        module = arguments[0].removesuffix(".py").replace("/", ".")
        if module.startswith("launch."):
            check_module(module, arguments[1:])
    elif program == "sbatch":
        assert any((CHECKOUT / word).is_file() for word in arguments)
    else:
        assert program in FOREIGN_COMMANDS, f"unknown command {line!r}"


@every_current_page
@pytest.mark.usefixtures("stop_after_parsing")
def test_commands_are_accepted(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CHECKOUT)
    for language, text in read_code_blocks(page):
        if language == "bash":
            for line in text.splitlines():
                check_command(line)


@every_current_page
@pytest.mark.usefixtures("stop_after_parsing")
def test_commands_in_the_text_exist(page: Path) -> None:
    from data_pipeline.preprocess import main as preprocess_main
    from rectvlm.cli import main

    for code in read_inline_code(page):
        words = code.split()
        if words[0] == "make":
            check_make([word for word in words[1:] if re.match(r"[a-z-]+$|[A-Z_]+=", word)])
        elif words[0] == "rectvlm" and len(words) > 1 and words[1].isalpha() and words[1].islower():
            depth = 3 if words[1] in ("runs", "weights") and len(words) > 2 else 2
            with pytest.raises(SystemExit) as end:
                if words[1] == "preprocess":
                    preprocess_main(["--help"])
                main([*words[1:depth], "--help"])
            assert end.value.code == 0, f"{page_id(page)}: {code}"


def test_fences_name_a_known_language() -> None:
    for page in CURRENT_PAGES:
        for language, _ in read_code_blocks(page):
            assert language in ("", "bash", "python", "yaml"), f"{page_id(page)}: {language}"


PYTHON_BLOCKS = [
    pytest.param(block.text, id=f"{page_id(page)}-{number}")
    for page in CURRENT_PAGES
    for number, block in enumerate(read_code_blocks(page))
    if block.language == "python" and page != OWN_ENCODER
]


@pytest.mark.parametrize("text", PYTHON_BLOCKS)
def test_python_blocks_run(
    text: str, phantom_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks run as they stand, in a folder with shards where the demo has them."""
    ast.parse(text)
    (tmp_path / "data/shards").mkdir(parents=True)
    (tmp_path / "data/shards/demo").symlink_to(phantom_shards)
    monkeypatch.chdir(tmp_path)
    exec(compile(text, "block", "exec"), {"__name__": "documentation"})


def test_yaml_blocks_are_sections_of_a_phase() -> None:
    from rectvlm.config import PhaseConfig

    phase = load_config("demo").train.phases["phase1"].model_dump(mode="json")
    for page in CURRENT_PAGES:
        for language, text in read_code_blocks(page):
            if language == "yaml":
                PhaseConfig.model_validate({**phase, **yaml.safe_load(text)})


def test_the_bits_of_the_masks_are_those_of_the_code() -> None:
    from rectvlm.labels import LESIONS

    text = (DOCS / "how-to/predict.md").read_text()
    for lesion in LESIONS:
        assert f"{1 << lesion.bit} {lesion.name}" in text


def test_exit_codes_are_those_of_the_code() -> None:
    from rectvlm.train.recovery.exit_codes import ExitCode

    rows = re.findall(r"\| (\d+) \| `(\w+)` \|", (DOCS / "reference/exit-codes.md").read_text())
    assert {name: int(code) for code, name in rows} == {code.name: code.value for code in ExitCode}


def test_environment_variables_that_are_named_are_read() -> None:
    sources = [path for path in all_source_files() if path.suffix in (".py", ".sh", ".yaml")]
    text = "\n".join(path.read_text() for path in sources if path != Path(__file__))
    for page in CURRENT_PAGES:
        for name in re.findall(r"\bRECTVLM_[A-Z_]+", page.read_text()):
            assert name in text, f"{page_id(page)}: no code reads {name}"
