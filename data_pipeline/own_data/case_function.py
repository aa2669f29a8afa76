"""Cases from a function of the user's own, for data that no table can describe.

    python -m data_pipeline.preprocess --cases my_hospital:list_cases --out shards

`my_hospital.py`, in the current folder, holds for example:

    def load_case(path: Path) -> CaseData:
        labels = {**dict.fromkeys(FINDINGS), "Cardiomegaly": 1}
        return CaseData(volume=read_volume(path), labels=labels, findings="The heart is enlarged.")

    def list_cases() -> Iterator[Case]:
        for path in sorted(Path("scans").glob("*.nii.gz")):
            yield Case(
                key=path.name.removesuffix(".nii.gz"),
                split="train",
                patient=path.name,
                source=f"my hospital {path.name}",
                load=partial(load_case, path),
                identity=file_identity(path),
            )

A finding that nobody looked for stays None, and a lesion kind is not annotated because a mask is
empty. `load` runs in a worker process, so it is a module's function or a `functools.partial` of
one. `data_pipeline/demo_cases.py` is the smallest real example.
"""

import importlib
import os
import pickle
import sys

from data_pipeline.cases import Case
from rectvlm.types import UserError


def list_function_cases(reference: str) -> list[Case]:
    """Call a function that yields cases.

    Args:
        reference: `module:function`; the module may lie in the current folder.

    Raises:
        UserError: no such module or function, or it does not yield cases that other processes can
            load.
    """
    module_name, _, function_name = reference.partition(":")
    if not (module_name and function_name) or module_name.endswith(".py"):
        raise UserError(
            f"--cases {reference} names no function: expected module:function, such as "
            f"my_hospital:list_cases for list_cases in my_hospital.py; correct it."
        )
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"--cases {reference} cannot be imported ({error}): expected a module in the current "
            f"folder or an installed one; correct the name, or change to its folder."
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(
            f"--cases {reference} names no function: expected one that yields cases in "
            f"{module.__file__}, found {function!r}; correct the name."
        )
    cases = list(function())
    for number, case in enumerate(cases, start=1):
        if not isinstance(case, Case):
            raise UserError(
                f"--cases {reference} yields something else as number {number}: expected "
                f"data_pipeline.cases.Case, found {type(case).__name__}; correct the function."
            )
        _require_loadable_elsewhere(case, reference)
    if not cases:
        raise UserError(
            f"--cases {reference} yields nothing: expected at least one case; check the folder "
            f"that the function reads."
        )
    return cases


def _require_loadable_elsewhere(case: Case, reference: str) -> None:
    try:
        pickle.dumps(case.load)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(
            f"--cases {reference}: the case {case.key} cannot be sent to a worker process "
            f"({error}): expected load to be a function of a module or a functools.partial of one; "
            f"use no lambda and no inner function."
        ) from None
