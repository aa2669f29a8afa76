"""A real vLLM server on loopback, for the time of a `with` block."""

import contextlib
import os
import shlex
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from orthanc import free_port

START_SECONDS = 300


@contextlib.contextmanager
def running_vllm(folder: Path, start_command: str) -> Iterator[str]:
    """Run a command that starts vLLM, in float32; yield the address.

    Tests are skipped where neither `$VLLM` nor PATH has the program `vllm`.
    """
    program = os.environ.get("VLLM") or shutil.which("vllm")
    if program is None:
        pytest.skip("vLLM is not installed: name its program in $VLLM")
    port = free_port()
    command = [program, *shlex.split(start_command)[1:], "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "1024", "--enforce-eager"]
    folder.mkdir(parents=True)
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_up(process, url, folder / "log")
        yield url
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def _wait_until_up(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-4000:]
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])
