import os
import re
import subprocess
import sys

import pytest
from launches import CHECKOUT
from rich.console import Console

from rectvlm.terminal_tables import PIPE_WIDTH, FoldingTable

IDENTIFIERS = ("rectvlm/rectvlm-small", "meta-llama/Llama-3.1-70B-Instruct")


def list_weights(**variables: str) -> str:
    """What `rectvlm weights list` prints to a pipe."""
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return subprocess.run(
        [sys.executable, "-m", "rectvlm", "weights", "list"],
        cwd=CHECKOUT,
        env=environment | {"HF_HUB_OFFLINE": "1"} | variables,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_ids_are_unbroken_in_a_pipe() -> None:
    printed = list_weights()
    assert all(identifier in printed for identifier in IDENTIFIERS)
    assert max(map(len, printed.splitlines())) <= PIPE_WIDTH


def test_ids_are_whole_where_there_are_60_columns() -> None:
    printed = list_weights(COLUMNS="60")
    table = [line for line in printed.splitlines() if line.startswith("│")]
    repositories = "".join(line.split("│")[2].strip() for line in table)
    assert max(map(len, table)) <= 60 and "…" not in printed
    assert all(identifier in repositories for identifier in IDENTIFIERS)


def test_ids_are_unbroken_where_there_are_80_columns() -> None:
    printed = list_weights(COLUMNS="80")
    assert max(map(len, printed.split("No weights")[0].splitlines())) <= 80
    assert all(identifier in printed for identifier in IDENTIFIERS)


@pytest.mark.parametrize("width", [20, 40, 80])
def test_a_table_loses_no_character(width: int) -> None:
    table = FoldingTable("run", "a")
    table.add_column("value", justify="right")
    words = ("runs/a_very_long_name_of_a_run/phase3-align", "b" * 50, "0.123456789012345678901")
    table.add_row(*words)
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table)
    assert "…" not in capture.get()
    columns: list[str] = ["", "", ""]
    for line in capture.get().splitlines():
        if line.startswith("│"):
            cells = [cell.strip() for cell in line.split("│")[1:-1]]
            columns = [old + new for old, new in zip(columns, cells, strict=True)]
    assert columns == list(words)


def test_every_table_of_the_suite_folds() -> None:
    for folder in ("rectvlm", "data_pipeline", "launch", "benchmarks"):
        for path in (CHECKOUT / folder).rglob("*.py"):
            if path.name != "terminal_tables.py":
                text = path.read_text()
                assert not re.search(r"(?<![\w.])Table\(", text), f"{path} makes a table that cuts"
                assert "no_wrap=True" not in text, f"{path} has a column that cuts"
