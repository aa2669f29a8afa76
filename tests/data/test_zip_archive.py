"""Archives that would harm the disk are refused, and nothing is left of those that are read."""

import tempfile
import zipfile
from pathlib import Path

import dicom_files
import numpy as np
import pytest

from rectvlm.data.volume import read_volume
from rectvlm.types import InputError
from tests.data.chest_volume import RAS, chest


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def write_archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def series_members(folder: Path) -> dict[str, bytes]:
    dicom_files.write_series(chest()[0], RAS, folder)
    return {f"a/b/{file.name}": file.read_bytes() for file in sorted(folder.iterdir())}


def test_a_read_archive_leaves_nothing(tmp_path: Path, temporary: Path) -> None:
    path = write_archive(tmp_path / "a.zip", series_members(tmp_path / "s"))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, chest()[0])
    assert volume.where.startswith(str(path)) and not list(temporary.iterdir())


@pytest.mark.parametrize("name", ["../evil.dcm", "/tmp/evil.dcm", "a/../../evil.dcm", "C:\\e.dcm"])
def test_an_archive_that_leads_outside_is_refused(
    tmp_path: Path, temporary: Path, name: str
) -> None:
    members = series_members(tmp_path / "s")
    members[name] = next(iter(members.values()))
    path = write_archive(tmp_path / "a.zip", members)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="names a file outside itself"):
        read_volume(path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, temporary: Path) -> None:
    bomb = b"\0" * 128 + b"DICM" + bytes(200 << 20)
    path = write_archive(tmp_path / "bomb.zip", {"a.dcm": bomb})
    assert path.stat().st_size < 1 << 20
    with pytest.raises(InputError, match=r"too large when unpacked.*times its"):
        read_volume(path)
    assert not list(temporary.iterdir())


def test_a_size_that_lies_is_found_out(tmp_path: Path, temporary: Path) -> None:
    """The central directory says 100 bytes; the member has more."""
    content = b"\0" * 128 + b"DICM" + np.random.default_rng(0).bytes(5000)
    path = write_archive(tmp_path / "a.zip", {"a.dcm": content})
    data = bytearray(path.read_bytes())
    place = data.rindex(b"PK\x01\x02")
    data[place + 24 : place + 28] = (200).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(InputError, match="is a damaged archive"):
        read_volume(path)
    assert not list(temporary.iterdir())


def test_other_archives_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "text.zip").write_text("no archive")
    with pytest.raises(InputError, match=r"text.zip is a damaged archive"):
        read_volume(tmp_path / "text.zip")
    path = write_archive(tmp_path / "papers.zip", {"report.pdf": b"%PDF"})
    with pytest.raises(InputError, match=r"without a DICOM series of a CT.*no DICOM files"):
        read_volume(path)
    path = write_archive(tmp_path / "locked.zip", {"a.dcm": b"x"})
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="is encrypted"):
        read_volume(path)
