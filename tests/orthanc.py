"""A real Orthanc on loopback, with its DICOMweb plugin, for the time of a `with` block."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
USER, PASSWORD = "reader", "secret-of-reader"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running_orthanc(folder: Path) -> Iterator[int]:
    """Start Orthanc with its data in a folder; yield its port.

    It asks for `USER` and `PASSWORD`. Tests are skipped where it is not installed.
    """
    program = shutil.which("Orthanc", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None or not PLUGIN.is_file():
        pytest.skip("Orthanc is not installed: apt-get install orthanc orthanc-dicomweb")
    port = free_port()
    settings = {
        "Name": "test",
        "HttpPort": port,
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "Plugins": [str(PLUGIN)],
        "DicomServerEnabled": False,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": True,
        "RegisteredUsers": {USER: PASSWORD},
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "orthanc.json").write_text(json.dumps(settings))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, str(folder / "orthanc.json")], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        _wait_until_up(process, port, folder / "log")
        yield port
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_up(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    for _ in range(300):
        if process.poll() is not None:
            break
        with contextlib.suppress(requests.ConnectionError):
            if requests.get(f"http://127.0.0.1:{port}/system", auth=(USER, PASSWORD), timeout=5).ok:
                return
        time.sleep(0.1)
    raise AssertionError(f"Orthanc did not start: {log.read_text()[-2000:]}")
