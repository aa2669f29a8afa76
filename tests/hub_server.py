"""A stand-in for the Hugging Face Hub on this machine: what huggingface_hub asks for, and faults.

Faults come on demand. Large files answer with a redirect to another path, as the Hub's do to its
storage. Every byte of a file that is sent is counted, so that a test can tell whether a transfer
went on or began again.
"""

import base64
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_stand_in"
LARGE = (".safetensors", ".bin", ".pth")


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def read_files(folder: Path) -> dict[str, bytes]:
    """Contents of the files of a folder by path.

    The records that huggingface_hub keeps of its downloads are left out.
    """
    contents = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not name.startswith(".cache/"):
            contents[name] = path.read_bytes()
    return contents


@dataclass
class Repository:
    files: dict[str, bytes] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        seed = json.dumps(
            [len(self.commits), branch, sorted((n, sha256(d)) for n, d in files.items())]
        )
        name = hashlib.sha1(seed.encode()).hexdigest()
        self.files, self.commits[name], self.branches[branch] = dict(files), dict(files), name
        return name


@dataclass
class Faults:
    broken: Counter = field(default_factory=Counter)
    """Answers of 500 that are left, by the end of a path."""
    cut: dict[str, list[int]] = field(default_factory=dict)
    """Bytes after which the connection ends, one transfer after the other, by file."""
    hold: dict[str, int] = field(default_factory=dict)
    """Bytes after which a transfer waits for `released`, by file."""
    held: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    wrong: dict[str, bytes] = field(default_factory=dict)
    """Other bytes that are sent in place of a file's."""
    lie: dict[str, int] = field(default_factory=dict)
    """Sizes that the listing says in place of a file's."""


class Hub:
    """The state behind the server."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.granted: set[str] = set()
        self.faults = Faults()
        self.sent: Counter = Counter()
        self.stored: dict[str, bytes] = {}
        self.uploads = 0
        self.url = ""

    def add(self, repository: str, files: dict[str, bytes], **kind: bool) -> Repository:
        self.repositories[repository] = Repository(**kind)
        self.repositories[repository].commit(files)
        return self.repositories[repository]


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
    )
    thread.start()
    try:
        yield hub
    finally:
        hub.faults.released.set()
        server.shutdown()
        server.server_close()


class _Refused(Exception):
    def __init__(self, status: int, code: str = "") -> None:
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else self._chunks()
        path = unquote(urlsplit(self.path).path)
        try:
            for ending, left in self.hub.faults.broken.items():
                if left and path.endswith(ending):
                    self.hub.faults.broken[ending] -= 1
                    raise _Refused(500)
            self._route(path)
        except _Refused as refused:
            self._send(
                refused.status, b"{}", {"X-Error-Code": refused.code} if refused.code else {}
            )
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _chunks(self) -> bytes:
        data = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return data

    def _route(self, path: str) -> None:
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._api("/".join(parts[2:4]), parts[4:])
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(self.body))
        elif parts[0] == "storage" and self.command == "PUT":
            self._require_token()
            if sha256(self.body) != parts[1]:
                raise _Refused(400)
            self.hub.stored[parts[1]] = self.body
            self.hub.uploads += 1
            self._send(200)
        elif parts[0] == "storage":
            if self._token():
                raise _Refused(
                    400
                )  # signed addresses on another host: the token must not travel there
            self._file(parts[2], self.hub.stored[parts[1]], {"ETag": f'"{parts[1]}"'})
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(self.body))
        elif len(parts) > 4 and parts[2] == "resolve":
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            raise _Refused(404)

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _require_token(self) -> None:
        # Storage is asked with signed addresses, without a token.
        if not self.path.startswith("/storage/") and self._token() != TOKEN:
            raise _Refused(401)

    def _repository(self, name: str) -> Repository:
        token = self._token()
        if token not in (None, TOKEN):
            raise _Refused(401)
        found = self.hub.repositories.get(name)
        if found is None or (found.private and token is None):
            raise _Refused(404 if token else 401, "RepoNotFound")
        return found

    def _commit(self, repository: Repository, revision: str) -> str:
        revision = repository.branches.get(revision, revision)
        if revision not in repository.commits:
            raise _Refused(404, "RevisionNotFound")
        return revision

    def _api(self, name: str, rest: list[str]) -> None:
        repository = self._repository(name)
        verb = rest[0] if rest else "revision"
        revision = "/".join(rest[1:]) if rest[1:] else "main"
        if verb == "revision":
            commit = self._commit(repository, revision)
            files = repository.commits[commit]
            self._json(
                {
                    "id": name,
                    "sha": commit,
                    "tags": [],
                    "siblings": [self._sibling(path, data) for path, data in files.items()],
                    "private": repository.private,
                    "gated": "manual" if repository.gated else False,
                }
            )
        elif verb == "tree":
            files = repository.commits[self._commit(repository, revision)]
            self._json([self._row(path, data) for path, data in sorted(files.items())])
        elif verb == "preupload":
            self._require_token()
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(self.body)["files"]
            ]
            self._json({"files": modes})
        elif verb == "commit":
            self._require_token()
            self._take(name, repository)
        else:
            raise _Refused(404)

    def _sibling(self, path: str, data: bytes) -> dict[str, Any]:
        row = self._row(path, data)
        sibling: dict[str, Any] = {"rfilename": path, "size": row["size"], "blobId": row["oid"]}
        if "lfs" in row:
            sibling["lfs"] = {"sha256": row["lfs"]["oid"], "size": row["size"], "pointerSize": 130}
        return sibling

    def _row(self, path: str, data: bytes) -> dict[str, Any]:
        size = self.hub.faults.lie.get(path, len(data))
        row: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": git_sha1(data)}
        if path.endswith(LARGE):
            row["lfs"] = {"oid": sha256(data), "size": size, "pointerSize": 130}
        return row

    def _create(self, wanted: dict[str, Any]) -> None:
        self._require_token()
        name = f"{wanted['organization']}/{wanted['name']}"
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        self._json({"url": f"{self.hub.url}/{name}"})

    def _batch(self, wanted: dict[str, Any]) -> None:
        self._require_token()
        rows = []
        for row in wanted["objects"]:
            upload = {"href": f"{self.hub.url}/storage/{row['oid']}", "header": {}}
            rows.append(
                dict(row)
                if row["oid"] in self.hub.stored
                else {**row, "actions": {"upload": upload}}
            )
        self._json({"transfer": "basic", "objects": rows})

    def _take(self, name: str, repository: Repository) -> None:
        files = dict(repository.files)
        for line in self.body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files)
        address = f"{self.hub.url}/{name}/commit/{commit}"
        self._json(
            {"success": True, "commitOid": commit, "commitUrl": address, "pullRequestUrl": None}
        )

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repository = self._repository(name)
        if repository.gated and name not in self.hub.granted:
            raise _Refused(403 if self._token() else 401, "GatedRepo")
        commit = self._commit(repository, revision)
        data = repository.commits[commit].get(path)
        if data is None:
            raise _Refused(404, "EntryNotFound")
        headers = {"X-Repo-Commit": commit}
        if path.endswith(LARGE):
            digest = sha256(data)
            self.hub.stored[digest] = data
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))}
            storage = self.hub.url.replace("127.0.0.1", "localhost") + "/storage"
            location = f"{storage}/{digest}/{path.replace('/', '_')}"
            self._send(302, headers={**headers, "Location": location})
        else:
            self._file(path, data, {**headers, "ETag": f'"{git_sha1(data)}"'})

    def _file(self, name: str, data: bytes, headers: dict[str, str]) -> None:
        data = self.hub.faults.wrong.get(name, data)
        begin, status = 0, 200
        wanted = self.headers.get("Range")
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last) + 1 if last else len(data), len(data))
            if begin >= len(data):
                raise _Refused(416)
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
            data, status = data[begin:end], 206
        self.send_response(status)
        for key, value in {
            **headers,
            "Content-Length": str(len(data)),
            "Accept-Ranges": "bytes",
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        stops = self.hub.faults.cut.get(name)
        if stops:
            self._write(name, data[: stops.pop(0)])
            self.close_connection = True
            return
        if name in self.hub.faults.hold:
            most = self.hub.faults.hold.pop(name)
            self._write(name, data[:most])
            self.hub.faults.held.set()
            self.hub.faults.released.wait(60)
            data = data[most:]
        self._write(name, data)

    def _write(self, name: str, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()
        self.hub.sent[name] += len(data)

    def _json(self, tree: Any) -> None:
        self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
