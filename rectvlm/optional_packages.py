"""Extras of the distribution: groups of packages that only some commands need."""

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from rectvlm.types import UserError


def missing_packages(extra: str) -> list[str]:
    """Names of the packages of an extra that are not installed.

    Args:
        extra: name in `[project.optional-dependencies]` of pyproject.toml.
    """
    names = []
    for requirement in map(Requirement, requires("rectvlm") or []):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            continue  # every installation has it
        if marker.evaluate({"extra": extra}) and not _is_installed(requirement.name):
            names.append(requirement.name)
    return names


def require_extra(extra: str) -> None:
    """Make sure that the packages of an extra are installed.

    Raises:
        UserError: one is not.
    """
    missing = missing_packages(extra)
    if missing:
        raise UserError(
            f"This command needs packages that are not installed ({', '.join(missing)}): "
            f'pip install "rectvlm[{extra}]".'
        )


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
