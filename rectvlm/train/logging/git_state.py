"""The code that ran: its git commit, and a patch with everything that was not committed."""

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAX_UNTRACKED_NAMES = 200
"""Number of untracked files that are named at most."""
MAX_PATCHED_FILES = 50
"""Number of untracked files that the patch contains at most."""
MAX_PATCHED_FILE_BYTES = 100_000
"""Size of an untracked file in the patch, bytes at most."""
CODE_SUFFIXES = {".py", ".sh", ".sbatch", ".j2"}
"""Suffixes of untracked files that the patch contains."""
CONFIG_SUFFIXES = {".json", ".yaml", ".yml", ".toml"}
"""Suffixes of untracked files that the patch contains in `PROJECT_FOLDERS` only: elsewhere they may
be credentials, or tables of patients."""
PROJECT_FOLDERS = {"rectvlm", "launch", "ds_configs"}

_DIFF = ("diff", "--binary", "--no-color", "--no-ext-diff")
"""A plain diff, whatever tools or colours the user has configured."""


@dataclass(frozen=True)
class GitState:
    """The commit of a checkout and what is not committed."""

    commit: str | None
    """Hash of the commit; None if there is no checkout."""
    reason: str | None = None
    """Why there is no commit."""
    branch: str | None = None
    untracked: tuple[str, ...] = ()
    """Names of all untracked files."""
    patch: bytes = b""
    """Patch of what is not committed, untracked code included; empty if there is none."""

    def to_json(self) -> dict[str, Any]:
        """The state as `run.json` holds it."""
        if self.commit is None:
            return {"commit": None, "reason": self.reason}
        return {
            "commit": self.commit,
            "branch": self.branch,
            "dirty": bool(self.patch),
            "untracked": list(self.untracked[:MAX_UNTRACKED_NAMES]),
            "untracked_files": len(self.untracked),
        }


def read_git_state(checkout: Path = Path(__file__).parents[3]) -> GitState:
    """Read the state of the checkout that this code is in.

    Code installed as a package has no checkout, even where its folder is in another project's.
    """
    try:
        _run_git(checkout, "ls-files", "--error-unmatch", "rectvlm/__init__.py")
        commit = _run_git(checkout, "rev-parse", "HEAD").decode().strip()
        branch = _run_git(checkout, "rev-parse", "--abbrev-ref", "HEAD").decode().strip()
        patch = _run_git(checkout, *_DIFF, "HEAD")
        names = _run_git(checkout, "ls-files", "--others", "--exclude-standard")
        untracked = names.decode(errors="replace").splitlines()
        for name in _choose_patched_files(checkout, untracked):
            command = (*_DIFF, "--no-index", "/dev/null", name)
            patch += _run_git(checkout, *command, expected_codes=(0, 1))
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        return GitState(None, reason=lines[0] if lines else "git failed")
    except (OSError, subprocess.TimeoutExpired) as error:
        return GitState(None, reason=str(error))
    return GitState(commit, None, branch, tuple(untracked), patch)


def _run_git(checkout: Path, *arguments: str, expected_codes: tuple[int, ...] = (0,)) -> bytes:
    command = ["git", "-c", "core.quotePath=false", *arguments]
    done = subprocess.run(
        command, cwd=checkout, capture_output=True, timeout=60, stdin=subprocess.DEVNULL
    )
    if done.returncode not in expected_codes:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stdout


def _choose_patched_files(checkout: Path, untracked: list[str]) -> list[str]:
    """Untracked files that the patch contains: small ones of code and of the project's settings."""
    chosen = [name for name in untracked if _is_small_code(checkout, name)]
    return chosen[:MAX_PATCHED_FILES]


def _is_small_code(checkout: Path, name: str) -> bool:
    relative, path = Path(name), checkout / name
    is_setting = relative.suffix in CONFIG_SUFFIXES and relative.parts[0] in PROJECT_FOLDERS
    if relative.suffix not in CODE_SUFFIXES and not is_setting:
        return False
    return path.is_file() and path.stat().st_size <= MAX_PATCHED_FILE_BYTES
