"""Build the documentation as a site: `make docs`, or `python docs/build_site.py --help`.

The pages are the Markdown files of the repository, at the places where they are, so a relative
link leads to the same file on the site as in the repository. README.md is the front page,
docs/index.md gives the order of the others. Notebooks are run and become pages with their
outputs; source files and folders that a page links become pages of their own. Zensical builds
with warnings as errors. The result, FOLDER/html, opens from the file system and needs no network.
"""

import argparse
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
import yaml
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from traitlets.config import Config

log = logging.getLogger("build_site")
CHECKOUT = Path(__file__).parents[1]
DOCS = CHECKOUT / "docs"
MAP = DOCS / "index.md"
NOTES = DOCS / "lab-notes/index.md"
LINK = re.compile(r"(?<=\]\()([^)#\s]+)")
"""Target of a Markdown link, without the name of a heading."""
FENCE = re.compile(r"^(`{3,}).*?^\1$", flags=re.M | re.S)
CODE_LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json"}
SECONDS_PER_CELL = 300


def run_notebook(path: Path) -> nbformat.NotebookNode:
    """Run a notebook in this environment; the file stays as it is.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the message has its traceback.
    """
    notebook = nbformat.read(path, as_version=4)
    programs = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": os.pathsep.join([programs, os.environ["PATH"]]),
        "PYTHONPATH": str(CHECKOUT),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }
    # Over TCP any user of the machine could read along.
    settings = Config({"KernelManager": {"transport": "ipc"}})
    client = NotebookClient(notebook, timeout=SECONDS_PER_CELL, config=settings)
    return client.execute(env=environment)


def drop_standard_error(notebook: nbformat.NotebookNode) -> None:
    """Leave progress bars and notes of libraries out of a notebook's outputs."""
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


def write_notebook_page(path: Path, pages: Path, with_outputs: bool) -> None:
    """Write a notebook as Markdown, its pictures beside it."""
    notebook = run_notebook(path) if with_outputs else nbformat.read(path, as_version=4)
    drop_standard_error(notebook)
    page = pages / page_of(path)
    resources = {"unique_key": page.stem, "output_files_dir": f"{page.stem}-pictures"}
    text, resources = MarkdownExporter().from_notebook_node(notebook, resources)
    page.write_text(text)  # before its links are followed, which may lead back here
    page.write_text(point_links(text, path, pages, with_outputs))
    for name, content in resources["outputs"].items():
        (page.parent / name).parent.mkdir(exist_ok=True)
        (page.parent / name).write_bytes(content)


def write_source_page(path: Path, page: Path) -> None:
    """Write a source file as a page with one block of code."""
    name = path.relative_to(CHECKOUT)
    language = CODE_LANGUAGES.get(path.suffix, "text")
    page.write_text(f"# {name}\n\n````{language}\n{path.read_text()}````\n")


def write_folder_page(path: Path, page: Path) -> None:
    """Write a page that lists the pages of a folder, and copy these."""
    lines = [f"# {path.relative_to(CHECKOUT)}", ""]
    for file in sorted(path.glob("*.md")):
        shutil.copy(file, page.parent / file.name)
        lines.append(f"- [{file.stem}]({file.name})")
    page.write_text("\n".join(lines) + "\n")


def page_of(path: Path) -> Path:
    """Place of a file's or folder's page on the site, relative to the site's root."""
    name = path.relative_to(CHECKOUT)
    if path.is_dir():
        return name / "index.md"
    if path.suffix == ".ipynb":
        return name.with_suffix(".md")
    return name if path.suffix in (".md", ".png") else Path(f"{name}.md")


def write_linked_page(path: Path, pages: Path, with_outputs: bool) -> None:
    """Write the page of what another page links, unless it is there."""
    page = pages / page_of(path)
    if page.exists():
        return
    page.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        write_folder_page(path, page)
    elif path.suffix == ".png":
        shutil.copy(path, page)
    elif path.suffix == ".md":
        write_page(path, pages, with_outputs)
    elif path.suffix == ".ipynb":
        write_notebook_page(path, pages, with_outputs)
    else:
        write_source_page(path, page)


def point_links(text: str, path: Path, pages: Path, with_outputs: bool) -> str:
    """Point the links of a page at the pages of what they name, and write these.

    Blocks of code stay as they are.
    """

    def point_to_page(match: re.Match[str]) -> str:
        if "://" in match[1]:
            return match[1]
        linked = (path.parent / match[1]).resolve()
        write_linked_page(linked, pages, with_outputs)
        return os.path.relpath(page_of(linked), path.parent.relative_to(CHECKOUT))

    parts: list[str] = []
    start = 0
    for fence in FENCE.finditer(text):
        parts += [LINK.sub(point_to_page, text[start : fence.start()]), fence[0]]
        start = fence.end()
    return "".join([*parts, LINK.sub(point_to_page, text[start:])])


def write_page(path: Path, pages: Path, with_outputs: bool) -> None:
    """Copy a Markdown page, its links pointed at pages of the site."""
    page = pages / page_of(path)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.touch()  # before its links are followed, which may lead back here
    page.write_text(point_links(path.read_text(), path, pages, with_outputs))


def write_pages(pages: Path, with_outputs: bool) -> None:
    """Write every page of the site as Markdown, with the pictures and pages that these link."""
    for file in DOCS.glob("vendor/*.js"):
        copy = pages / file.relative_to(CHECKOUT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        write_page(CHECKOUT / name, pages, with_outputs)
    for path in sorted(DOCS.rglob("*.md")):
        write_page(path, pages, with_outputs)


def linked_pages(page: Path, text: str) -> list[str]:
    """Places on the site of what a text of a page links, in its order, each once."""
    targets = [target for target in LINK.findall(text) if "://" not in target]
    places = [str(page_of((page.parent / target).resolve())) for target in targets]
    return list(dict.fromkeys(places))


def read_navigation() -> list[Any]:
    """Sections and pages in the order of docs/index.md, then those of lab-notes/index.md."""
    notes = [str(page_of(NOTES)), *linked_pages(NOTES, NOTES.read_text())]
    _, *sections = re.split(r"^## ", MAP.read_text(), flags=re.M)
    navigation: list[Any] = ["README.md", {"Documentation": str(page_of(MAP))}]
    for section in sections:
        title, _, text = section.partition("\n")
        places = [place for place in linked_pages(MAP, text) if place not in notes]
        navigation.append({title: places})
    return [*navigation, {"Lab notes": notes}, "CHANGELOG.md"]


def build_site(folder: Path, with_outputs: bool) -> Path:
    """Write pages and configuration to a folder, and build its `html`.

    Raises:
        subprocess.CalledProcessError: Zensical warned or failed; it has printed why.
    """
    pages = folder / "pages"
    shutil.rmtree(folder, ignore_errors=True)
    write_pages(pages, with_outputs)
    settings = yaml.safe_load((DOCS / "site.yaml").read_text())
    settings |= {"docs_dir": "pages", "site_dir": "html", "nav": read_navigation()}
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(settings, sort_keys=False))
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", "mkdocs.yml"]
    subprocess.run(command, cwd=folder, check=True)
    return folder / "html"


def main(argv: Sequence[str] | None = None) -> int:
    """Build the site; 1 if Zensical found a fault."""
    parser = argparse.ArgumentParser(description="Build the documentation as a site.")
    parser.add_argument("--out", type=Path, default=CHECKOUT / "build/docs", help="its folder")
    parser.add_argument(
        "--without-outputs", action="store_true", help="do not run the notebooks (saves minutes)"
    )
    options = parser.parse_args(argv)
    try:
        html = build_site(options.out.resolve(), not options.without_outputs)
    except subprocess.CalledProcessError:
        return 1
    log.info("Open %s", html / "index.html")
    return 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(main())
