import os
from pathlib import Path

from rectvlm.file_search import list_files


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def names(root, **options):
    return [str(path.relative_to(root)) for path in list_files(root, **options).files]


def reasons(root, **options):
    skipped = list_files(root, **options).skipped
    return {os.path.relpath(path.path, root): path.reason for path in skipped}


def test_linked_folders_and_files_are_followed(tmp_path):
    root = tmp_path / "cohort"
    touch(root / "P1" / "ct.nii")
    touch(tmp_path / "elsewhere" / "P2" / "deep" / "ct.nii")
    touch(tmp_path / "archive" / "17.nii")
    (root / "P2").symlink_to(tmp_path / "elsewhere" / "P2")
    (root / "P3.nii").symlink_to(os.path.relpath(tmp_path / "archive" / "17.nii", root))
    assert names(root) == ["P1/ct.nii", "P3.nii", "P2/deep/ct.nii"]
    assert reasons(root) == {}
    (tmp_path / "link to all").symlink_to(root)
    assert names(tmp_path / "link to all") == names(root)


def test_a_folder_is_read_once_and_where_it_lies(tmp_path):
    touch(tmp_path / "z" / "ct.nii")
    (tmp_path / "a").symlink_to("z")
    (tmp_path / "b").symlink_to("a")
    assert names(tmp_path) == ["z/ct.nii"]
    assert reasons(tmp_path).keys() == {"a", "b"}
    assert all(f"same folder as {tmp_path / 'z'}" in text for text in reasons(tmp_path).values())


def test_links_in_a_circle_end_the_walk(tmp_path):
    root = tmp_path / "in"
    touch(root / "P1" / "ct.nii")
    touch(tmp_path / "other" / "ct.nii")
    (root / "P1" / "up").symlink_to(root)
    (root / "P1" / "far up").symlink_to(tmp_path)
    (root / "self").symlink_to("self")
    (root / "out").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(root / "P1")
    assert names(root) == ["P1/ct.nii", "out/ct.nii"]
    found = reasons(root)
    assert found.keys() == {"P1/up", "P1/far up", "self", "out/back"}
    assert "holds the folder that is searched" in found["P1/up"]
    assert "holds the folder that is searched" in found["P1/far up"]
    assert "broken link" in found["self"] and "same folder as" in found["out/back"]


def test_what_is_left_out_is_named_with_its_reason(tmp_path):
    touch(tmp_path / ".DS_Store")
    touch(tmp_path / ".cache" / "ct.nii")
    touch(tmp_path / "P1" / "._ct.nii")
    touch(tmp_path / "P1" / "ct.nii")
    touch(tmp_path / "P1" / "deep" / "deeper" / "ct.nii")
    (tmp_path / "gone.nii").symlink_to("nowhere.nii")
    os.mkfifo(tmp_path / "pipe.nii")
    assert names(tmp_path, max_depth=2) == ["P1/ct.nii"]
    found = reasons(tmp_path, max_depth=2)
    assert found.pop("gone.nii") == "is a broken link to nowhere.nii"
    assert found.pop("pipe.nii") == "is neither a file nor a folder"
    assert found.pop("P1/deep/deeper") == "lies more than 2 folders deep"
    assert found.keys() == {".DS_Store", ".cache", "P1/._ct.nii"}


def test_names_that_are_no_utf8_are_found(tmp_path):
    folder = os.fsencode(tmp_path) + b"/M\xfcller"
    os.mkdir(folder)
    touch(Path(os.fsdecode(folder + b"/r\xf6.nii")))
    (path,) = list_files(tmp_path).files
    assert os.fsencode(path) == folder + b"/r\xf6.nii"
