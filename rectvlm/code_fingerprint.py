"""Fingerprint of code: a module together with all of our modules that it imports, directly or not.

Results that are kept are made anew when the code that decides them has changed. Source is read and
never imported for this: some of it takes seconds to import and is not run here.
"""

import ast
import hashlib
import sys
from collections.abc import Collection, Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path


def find_imported_modules(
    roots: Iterable[str], packages: Collection[str] = ("rectvlm",)
) -> tuple[str, ...]:
    """Names of the root modules and of all modules that they import, directly or not, sorted.

    The `__init__` of a package counts where a name is imported from the package itself.

    Args:
        roots: dotted names of modules.
        packages: top-level packages whose modules are followed; others are left out.
    """
    waiting = set(roots)
    modules: set[str] = set()
    while waiting:
        module = waiting.pop()
        modules.add(module)
        waiting |= _find_imports(module, tuple(packages)) - modules
    return tuple(sorted(modules))


@cache
def hash_modules(modules: tuple[str, ...]) -> str:
    """SHA-256 of the source of modules, as they are on this machine."""
    return hashlib.sha256(b"".join(map(_read_source, modules))).hexdigest()


@cache
def _find_imports(module: str, packages: tuple[str, ...]) -> frozenset[str]:
    """Names of the packages' modules that a module imports, anywhere in it, by absolute imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(_read_source(module))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    own_names = {name for name in names if name.partition(".")[0] in packages}
    return frozenset(filter(_is_module, own_names))


def _is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):
        return False  # a name inside a module, such as a class


def _read_source(module: str) -> bytes:
    loaded = sys.modules.get(module)
    if loaded is not None:
        return Path(str(loaded.__file__)).read_bytes()
    spec = find_spec(module)
    return Path(str(spec and spec.origin)).read_bytes()
