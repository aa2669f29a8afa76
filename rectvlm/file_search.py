"""One walk through a folder for every command that searches one.

Links are followed, each folder is read once however many links lead to it, and what is left out is
returned with its reason.
"""

import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class SkippedPath:
    """A path in a folder that is not used."""

    path: str
    reason: str


@dataclass
class FolderContent:
    """The files below a folder, and what was left out."""

    files: list[Path] = field(default_factory=list)
    """Regular files: first those that are reached without a link, each time sorted by path."""
    skipped: list[SkippedPath] = field(default_factory=list)
    """Hidden paths, broken links, circles, folders that were read already or cannot be read, and
    what is neither a file nor a folder."""


@dataclass(frozen=True)
class _Folder:
    path: Path
    real_path: str
    depth: int


def list_files(root: Path, max_depth: int | None = None) -> FolderContent:
    """List the files below a folder and follow its links.

    A folder that is reached twice counts where it lies, not where a link leads to it. A link that
    leads to a folder around `root` is a circle and is left out.

    Args:
        root: the folder.
        max_depth: levels of folders below `root` that are read; None for all.
    """
    walk = _Walk(root, max_depth)
    walk.run()
    return walk.content


class _Walk:
    """State of one walk. Links wait until everything that is no link has been read."""

    def __init__(self, root: Path, max_depth: int | None) -> None:
        self.content = FolderContent()
        self.max_depth = max_depth
        self.real_root = os.path.realpath(root)
        self.folders = deque([_Folder(root, self.real_root, 0)])
        self.links: deque[tuple[Path, int]] = deque()
        self.paths_by_real_folder: dict[str, Path] = {}

    def run(self) -> None:
        """Read all folders, then follow the links, until there are neither."""
        while self.folders or self.links:
            first_new_file = len(self.content.files)
            while self.folders:
                self._read_folder(self.folders.popleft())
            self.content.files[first_new_file:] = sorted(self.content.files[first_new_file:])
            links, self.links = sorted(self.links), deque()
            for path, depth in links:
                self._follow_link(path, depth)

    def _skip(self, path: Path, reason: str) -> None:
        self.content.skipped.append(SkippedPath(str(path), reason))

    def _read_folder(self, folder: _Folder) -> None:
        first_path = self.paths_by_real_folder.setdefault(folder.real_path, folder.path)
        if first_path != folder.path:
            self._skip(folder.path, f"is the same folder as {first_path}, which is read")
            return
        if self.max_depth is not None and folder.depth > self.max_depth:
            self._skip(folder.path, f"lies more than {self.max_depth} folders deep")
            return
        try:
            names = sorted(os.listdir(folder.path))
        except OSError as error:
            self._skip(folder.path, f"is a folder that cannot be read ({error.strerror})")
            return
        for name in names:
            path = folder.path / name
            if name.startswith("."):
                self._skip(path, "is hidden: its name begins with a dot")
            elif path.is_symlink():
                self.links.append((path, folder.depth))
            else:
                self._add(path, os.path.join(folder.real_path, name), folder.depth)

    def _add(self, path: Path, real_path: str, depth: int) -> None:
        if path.is_dir():
            self.folders.append(_Folder(path, real_path, depth + 1))
        elif path.is_file():
            self.content.files.append(path)
        else:
            self._skip(path, "is neither a file nor a folder")

    def _follow_link(self, path: Path, depth: int) -> None:
        try:
            real_path = os.path.realpath(path, strict=True)
        except OSError:
            self._skip(path, f"is a broken link to {os.readlink(path)}")
            return
        is_circle = os.path.commonpath([real_path, self.real_root]) == real_path
        if is_circle and os.path.isdir(real_path):
            self._skip(path, f"is a link to {real_path}, which holds the folder that is searched")
        else:
            self._add(path, real_path, depth)
