"""The documentation as a site: its navigation, and what the built pages link, load and find."""

import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from test_examples import load_program

CHECKOUT = Path(__file__).parents[1]
DOCS = CHECKOUT / "docs"
SITE_PROGRAM = DOCS / "build_site.py"


class PageReader(HTMLParser):
    """Links, loaded files, names of places and paragraphs of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.names: set[str] = set()
        self.paragraphs: list[str] = []
        self._in_paragraph = False
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.names.add(values.get("id", ""))
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        self.loaded.extend(
            values[name] for name in ("src", "srcset") if tag != "a" and name in values
        )
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.loaded.append(values["href"])
        self._in_paragraph = tag == "p" or (self._in_paragraph and tag not in ("ul", "ol", "pre"))
        if tag == "p":
            self.paragraphs.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "p":
            self._in_paragraph = False

    def handle_data(self, data: str) -> None:
        if self._in_paragraph:
            self.paragraphs[-1] += data


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with warnings as errors; notebooks are not run."""
    folder = tmp_path_factory.mktemp("site")
    program = load_program(SITE_PROGRAM)
    assert program.main(["--without-outputs", "--out", str(folder / "docs")]) == 0
    return folder / "docs/html"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, PageReader]:
    paths = [path for path in site.rglob("*.html") if path.name != "404.html"]
    return {path: PageReader(path) for path in paths}


def test_the_navigation_has_every_page_once_in_the_order_of_the_map() -> None:
    program = load_program(SITE_PROGRAM)
    places: list[str] = []
    for part in program.read_navigation():
        value = part if isinstance(part, str) else next(iter(part.values()))
        places.extend([value] if isinstance(value, str) else value)
    assert len(places) == len(set(places))
    written = {str(path.relative_to(CHECKOUT)) for path in DOCS.rglob("*.md")}
    written |= {
        str(path.relative_to(CHECKOUT).with_suffix(".md")) for path in DOCS.rglob("*.ipynb")
    }
    assert written <= set(places)
    text = (DOCS / "index.md").read_text()
    linked = [place.removeprefix("docs/") for place in places if place.startswith("docs/how-to/")]
    assert linked == sorted(linked, key=text.index) and len(linked) > 10


def test_links_of_the_site_lead_to_a_page_and_a_place(pages: dict[Path, PageReader]) -> None:
    assert len(pages) > 50
    for path, page in pages.items():
        for link in [*page.links, *page.loaded]:
            name, _, anchor = link.partition("#")
            if "://" in link:
                continue
            target = (path.parent / name).resolve() if name else path
            assert target.is_file(), f"{path}: {link}"
            if anchor and target in pages:
                assert anchor in pages[target].names, f"{path}: {link}"


def test_the_site_loads_nothing_from_another_host(pages: dict[Path, PageReader]) -> None:
    for path, page in pages.items():
        assert page.loaded
        assert not [file for file in page.loaded if "//" in file], path


def test_no_list_of_the_pages_is_shown_as_a_paragraph(pages: dict[Path, PageReader]) -> None:
    """GitHub shows a list without an empty line before it as one; Python-Markdown does not."""
    for path, page in pages.items():
        lines = [line for text in page.paragraphs for line in text.splitlines()[1:]]
        assert not [line for line in lines if line.startswith(("- ", "* ", "1. "))], path


@pytest.fixture
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    opened = Browser(width=1300, height=900)
    yield opened
    opened.close()


def wait_for(browser: Browser, expression: str) -> None:
    """Wait until an expression in the page is true."""
    for _ in range(300):
        if browser.run(expression):
            return
        time.sleep(0.1)
    raise AssertionError(f"never true: {expression}")


def test_the_search_finds_a_page_without_a_server(site: Path, browser: Browser) -> None:
    browser.send("Page.navigate", url=(site / "index.html").as_uri())
    wait_for(browser, "!!document.querySelector('.md-search__button')")
    results = "document.activeElement.shadowRoot?.textContent ?? ''"
    # The button works once the page's script has run.
    click = "document.querySelector('.md-search__button')"
    x, y = browser.run(f"(b => [b.x + 20, b.y + 15])({click}.getBoundingClientRect())")
    for _ in range(60):
        browser.mouse("mousePressed", x, y, "left")
        browser.mouse("mouseReleased", x, y, "left")
        time.sleep(0.5)
        if browser.run("!!document.activeElement.shadowRoot"):
            break
    browser.send("Input.insertText", text="exit codes")
    wait_for(browser, f"({results}).includes('rectvlm/train/recovery/exit_codes.py')")
    requests = [message for message in browser.messages if message.startswith("request of")]
    assert not requests, "something beyond the site's own files is asked for"
