"""Shards at a URL give the batches of a disk; a failing server is retried or named in one error."""

import re
import threading
from collections.abc import Iterator
from dataclasses import fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import fsspec
import pytest
import torch

from rectvlm.config import Config, DataConfig
from rectvlm.data import store
from rectvlm.data.dataset import ShardDataset
from rectvlm.data.loader import build_eval_loader, build_train_loader
from rectvlm.types import Batch, UserError


class _Server(ThreadingHTTPServer):
    """A folder served with range requests, and with failures on demand."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.asked = folder, list[str]()
        self.fault, self.failures = "", 0
        """What is done wrong with tars, and how many times."""
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/shards"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        name = self.path.removeprefix("/shards/")
        fault = ""
        if name.endswith(".tar"):
            self.server.asked.append(self.headers.get("Range", ""))
            if self.server.failures:
                self.server.failures -= 1
                fault = self.server.fault
        path = self.server.folder / name
        if not path.is_file() or fault.isdigit():
            self.send_error(int(fault or 404))
            return
        data, status = path.read_bytes(), 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted and fault != "no ranges":
            data, status = data[int(wanted[1]) : int(wanted[2]) + 1], 206
        if fault == "dropped":
            self.close_connection = True
            return
        if fault == "short":
            data = data[: len(data) // 2]
        if fault == "garbled":
            data = bytes(byte ^ 0x55 for byte in data)
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault in ("cut", "silent"):
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            if fault == "silent":
                self.server.released.wait(60)
            return
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Not to the terminal."""


@pytest.fixture
def server(phantom_shards: Path) -> Iterator[_Server]:
    with _Server(phantom_shards) as running:
        threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
        yield running
        running.released.set()
        running.shutdown()


@pytest.fixture(autouse=True)
def in_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_FIRST_RETRY_SECONDS", 0.01)


def at(tiny: Config, place: object, workers: int = 0) -> DataConfig:
    return tiny.data.model_copy(update={"shards": str(place), "workers": workers})


def same(a: Batch, b: Batch) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(Batch)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def first(data: DataConfig, count: int = 4) -> list[Batch]:
    return list(islice(build_train_loader(data, 2, 0, 1, seed=5), count))  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_server_gives_the_batches_of_the_disk(
    server: _Server, tiny: Config, phantom_shards: Path, workers: int
) -> None:
    batches = first(at(tiny, server.url, workers))
    assert len(batches) == 4
    assert all(same(a, b) for a, b in zip(batches, first(at(tiny, phantom_shards)), strict=True))
    assert len(server.asked) >= 8 and all(server.asked), "each sample by one range, no whole shard"


def test_memory_gives_the_batches_of_the_disk(tiny: Config, phantom_shards: Path) -> None:
    memory = fsspec.filesystem("memory")
    try:
        memory.put(str(phantom_shards), "/loader-test", recursive=True)
        data = at(tiny, "memory://loader-test")
        assert all(
            same(a, b) for a, b in zip(first(data), first(at(tiny, phantom_shards)), strict=True)
        )
        keys = [key for batch in build_eval_loader(data, "valid", 2) for key in batch.keys]  # type: ignore[attr-defined]
        assert keys == ["phantom_6", "phantom_7", "phantom_8"]
        with pytest.raises(UserError, match=r"No shards in memory://elsewhere"):
            first(at(tiny, "memory://elsewhere"))
        memory.rm("/loader-test/train-000000.tar")
        with pytest.raises(
            UserError, match=r"memory://loader-test/train-000000.tar cannot be read \(No such file"
        ):
            first(data)
    finally:
        memory.rm("/loader-test", recursive=True)


@pytest.mark.parametrize("fault", ["500", "503", "429", "dropped", "cut", "silent"])
def test_a_failure_that_passes_is_outlived(
    server: _Server, tiny: Config, phantom_shards: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_READ_TIMEOUT_SECONDS", 0.3)
    server.fault, server.failures = fault, 2
    found = ShardDataset(at(tiny, server.url), "train").read_batch([4, 1])
    assert server.failures == 0
    assert same(found, ShardDataset(at(tiny, phantom_shards), "train").read_batch([4, 1]))


@pytest.mark.parametrize(
    ("fault", "said", "requests"),
    [
        ("404", r"cannot be read \(No such file or directory\)", 1),
        ("403", r"cannot be read \(.*403", 4),
        ("500", r"cannot be read \(.*500", 4),
        ("dropped", r"cannot be read \(.*[Dd]isconnected", 4),
        ("cut", r"cannot be read \(.*payload", 4),
        ("silent", r"cannot be read \(.*[Tt]imeout", 4),
        ("no ranges", r"must support range requests", 1),
        ("short", r"is cut short", 1),
        ("garbled", r"is damaged", 1),
    ],
)
def test_a_failure_that_stays_is_one_sentence(
    server: _Server,
    tiny: Config,
    fault: str,
    said: str,
    requests: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store, "_READ_TIMEOUT_SECONDS", 0.3)
    dataset = ShardDataset(at(tiny, server.url), "train")
    server.fault, server.failures = fault, 10**6
    with pytest.raises(UserError) as raised:
        dataset.read_batch([0])
    message = str(raised.value)
    assert re.search(said, message) and f"{server.url}/train-000000.tar" in message
    assert "\n" not in message and message.endswith(".")
    # Where a connection that was kept open drops, aiohttp itself asks once more.
    assert requests <= len(server.asked) <= 2 * requests


def test_a_failure_in_a_worker_is_the_same_sentence(server: _Server, tiny: Config) -> None:
    server.fault, server.failures = "short", 10**6
    with pytest.raises(UserError, match=rf"^Shard {server.url}/train-000000.tar is cut short"):
        first(at(tiny, server.url, workers=1))


def test_no_server_and_no_index_are_one_sentence(server: _Server, tiny: Config) -> None:
    with pytest.raises(UserError, match=r"No shards in .*/other"):
        first(at(tiny, f"{server.url}/other"))
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"index.json cannot be read \(.*check the place"):
        first(at(tiny, server.url))
