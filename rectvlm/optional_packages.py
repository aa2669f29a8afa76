"""Extras of the distribution: groups of packages that only some commands need."""

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from rectvlm.types import UserError


def missing_packages(extra: str) -> list[str]:
    """Names of the packages of an extra that are not installed.

    Args:
        extra: name in `[project.optional-dependencies]` of pyproject.toml.

    Raises:
        UserError: rectvlm itself is not installed, so nothing declares what it needs.
    """
    try:
        requirements = requires("rectvlm") or []
    except PackageNotFoundError:
        raise UserError(
            "rectvlm runs from a folder but is not installed: expected an installation, which "
            "brings the packages that it needs; in the checkout: pip install -e ."
        ) from None
    names = []
    for requirement in map(Requirement, requirements):
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": ""}):
            continue  # every installation has it
        if marker.evaluate({"extra": extra}) and not _is_installed(requirement.name):
            names.append(requirement.name)
    return names


def require_extra(*extras: str) -> None:
    """Make sure that the packages of extras are installed.

    Raises:
        UserError: one is not.
    """
    missing = [name for extra in extras for name in missing_packages(extra)]
    if missing:
        raise UserError(
            f"This command needs packages that are not installed ({', '.join(missing)}): "
            f'pip install "rectvlm[{",".join(extras)}]".'
        )


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
