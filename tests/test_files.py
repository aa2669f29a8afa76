import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import Timeout

from rectvlm.files import (
    append_json_line,
    atomic_file,
    exclusive_lock,
    file_sha256,
    is_disk_full,
    read_json_object,
    remove_control_characters,
    write_json,
)
from rectvlm.types import UserError


def test_an_atomic_file_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "below" / "file"
    with atomic_file(path) as file:
        file.write(b"old")
        assert not path.exists()
    with pytest.raises(ZeroDivisionError), atomic_file(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_json_comes_back_and_nan_does_not_go_in(tmp_path: Path) -> None:
    path = tmp_path / "tree.json"
    write_json(path, {"a": [1, "ä"]})
    assert read_json_object(path, "nothing") == {"a": [1, "ä"]}
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json_object(path, "nothing") == {"a": [1, "ä"]}


@pytest.mark.parametrize(
    ("text", "reason"), [(None, "cannot be read"), ("{", "is not JSON"), ("[]", "holds a list")]
)
def test_json_that_cannot_be_used_is_one_sentence(
    text: str | None, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "tree.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=rf"tree\.json {reason}.*: export it again\.$"):
        read_json_object(path, "export it again")


def test_every_space_stays_one() -> None:
    """ "Nopleural effusion" would be read as an effusion."""
    text = "No\u00a0pleural\u202feffusion.\tNo\x00 nodule.\nClear."
    assert remove_control_characters(text) == "No pleural effusion. No nodule.\nClear."


def test_lines_of_json_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    for number in range(2):
        append_json_line(path, {"step": number})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 0},
        {"step": 1},
    ]


def test_a_checksum_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert file_sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_full_disk_is_told_from_other_errors() -> None:
    assert is_disk_full(OSError(errno.ENOSPC, "full"))
    assert not is_disk_full(OSError(errno.EACCES, "denied"))


def test_a_lock_keeps_other_processes_out(tmp_path: Path) -> None:
    path = tmp_path / "below" / "lock"
    code = (
        "import sys, pathlib\n"
        "from rectvlm.files import exclusive_lock\n"
        "with exclusive_lock(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(Timeout), exclusive_lock(path, 0.1):
        pass
    holder.kill()  # as the system does: nothing is released by the holder itself
    holder.wait()
    with exclusive_lock(path, 10):
        pass
