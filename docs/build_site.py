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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
import yaml
from nbclient import NotebookClient
from nbconvert import MarkdownExporter

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
    """Run a notebook in its own folder; it is not written back.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; the message has its traceback.
    """
    notebook = nbformat.read(path, as_version=4)
    # The kernel is this environment's, with its checkout, whatever kernels the machine has.
    os.environ["PYTHONPATH"] = str(CHECKOUT)
    client = NotebookClient(
        notebook,
        timeout=SECONDS_PER_CELL,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    )
    return client.execute()


def write_notebook_page(path: Path, page: Path, with_outputs: bool) -> None:
    """Write a notebook as Markdown, its pictures beside it."""
    notebook = run_notebook(path) if with_outputs else nbformat.read(path, as_version=4)
    resources = {"unique_key": page.stem, "output_files_dir": f"{page.stem}-pictures"}
    text, resources = MarkdownExporter().from_notebook_node(notebook, resources)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text)
    for name, content in resources["outputs"].items():
        (page.parent / name).parent.mkdir(exist_ok=True)
        (page.parent / name).write_bytes(content)


def write_source_page(path: Path, page: Path) -> None:
    """Write a source file as a page with one block of code."""
    page.parent.mkdir(parents=True, exist_ok=True)
    name = path.relative_to(CHECKOUT)
    language = CODE_LANGUAGES.get(path.suffix, "text")
    page.write_text(f"# {name}\n\n````{language}\n{path.read_text()}````\n")


def write_folder_page(path: Path, page: Path) -> None:
    """Write a page that lists the pages of a folder, and copy these."""
    page.parent.mkdir(parents=True, exist_ok=True)
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


def write_linked_page(path: Path, page: Path, with_outputs: bool) -> None:
    """Write the page of what another page links, unless it is there."""
    if page.exists() or path.suffix in (".md", ".png"):
        return
    if path.is_dir():
        write_folder_page(path, page)
    elif path.suffix == ".ipynb":
        write_notebook_page(path, page, with_outputs)
    else:
        write_source_page(path, page)


def write_page(path: Path, pages: Path, with_outputs: bool) -> None:
    """Copy a Markdown page, its links pointed at the pages of what they name."""

    def point_to_page(match: re.Match[str]) -> str:
        target = match[1]
        if "://" in target:
            return target
        linked = (path.parent / target).resolve()
        place = page_of(linked)
        write_linked_page(linked, pages / place, with_outputs)
        return os.path.relpath(place, path.parent.relative_to(CHECKOUT))

    def point_prose(text: str) -> Iterator[str]:
        start = 0
        for fence in FENCE.finditer(text):
            yield LINK.sub(point_to_page, text[start : fence.start()])
            yield fence[0]
            start = fence.end()
        yield LINK.sub(point_to_page, text[start:])

    page = pages / page_of(path)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("".join(point_prose(path.read_text())))


def write_pages(pages: Path, with_outputs: bool) -> None:
    """Write every page of the site as Markdown."""
    for file in [*DOCS.rglob("*.png"), *DOCS.glob("vendor/*.js")]:
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
