"""Cases that are quick to make and real enough to be taken for CTs.

Each is a body with two lungs and a nodule, in noise.
"""

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from data_pipeline.cases import Case, CaseData
from rectvlm.labels import LESION_BY_KEY
from rectvlm.types import Split, UserError, Volume

if TYPE_CHECKING:
    from tests.ct_rate_tree import Tree

GRID, SPACING = (16, 48, 48), (16.0, 7.2, 7.2)
"""Those of the `tiny` configuration."""
AFFINE = np.array([[-14.0, 0, 0, 161], [0, -14.0, 0, 161], [0, 0, 20.0, -900], [0, 0, 0, 1]])


def body(seed: int) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """HU and a nodule's mask, (i, j, k) on `AFFINE`."""
    rng = np.random.default_rng(seed)
    x, y, _ = np.indices((24, 24, 12)) - 11.5
    hu = np.where(x**2 / 100 + y**2 / 60 < 1, 40.0, -1000.0)
    hu[((abs(x) - 4.5) / 3.5) ** 2 + (y / 5) ** 2 < 1] = -850
    mask = np.zeros(hu.shape, np.uint8)
    mask[5:8, 9:13, 2 : 4 + seed % 5] = 1
    return (hu + rng.normal(0, 20, hu.shape)).astype(np.int16), mask


def load_small(seed: int) -> CaseData:
    hu, mask = body(seed)
    return CaseData(
        volume=Volume(hu, AFFINE, f"small {seed}"),
        lesions=[Volume(mask << 4, AFFINE, f"small {seed}")],
        lesions_annotated={key: key == "lung_nodule" for key in LESION_BY_KEY},
    )


def small_case(seed: int, split: Split = "train") -> Case:
    return Case(
        f"small_{seed}",
        split,
        f"small_{seed}",
        f"small {seed}",
        partial(load_small, seed),
        (str(seed),),
    )


def small_cases(train: int, valid: int) -> list[Case]:
    splits: list[Split] = ["train"] * train + ["valid"] * valid
    return [small_case(seed, split) for seed, split in enumerate(splits)]


def small_tree(root: Path, train: int, valid: int) -> "Tree":
    """A CT-RATE download of small bodies; the tables are written.

    Each has the mask of a nodule in `root/lesions`.
    """
    # Workers import this module for their cases, and it should take them no time.
    import nibabel as nib

    from tests.ct_rate_tree import Tree

    tree = Tree(root)
    for seed in range(train + valid):
        name = f"train_{seed + 1}_a_1" if seed < train else f"valid_{seed + 1 - train}_a_1"
        tree.add(name, layout=None)
        hu, mask = body(seed)
        for array, path in (
            (hu, tree.path(name)),
            (mask, root / "lesions" / name / "lung_nodule.nii.gz"),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(array, AFFINE), path)
    tree.write()
    return tree


def contents(folder: Path) -> dict[str, bytes]:
    """The files right in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def raise_bug() -> CaseData:
    raise ZeroDivisionError("a bug")


def say_what_is_wrong() -> CaseData:
    raise UserError("This format needs pynrrd: install it.")


def ask_for_all_memory() -> CaseData:
    np.empty(1 << 62, np.uint8)
    raise AssertionError("granted")


def never_end() -> CaseData:
    while True:
        signal.pause()


def never_end_at_all() -> CaseData:
    """Deaf to the alarm, as a read from a disk that has gone is."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    return never_end()


def die() -> CaseData:
    """Kills its process, as the memory killer would."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def die_once(flag: Path, seed: int) -> CaseData:
    """Kills its process on the first call."""
    if not flag.exists():
        flag.touch()
        die()
    return load_small(seed)


def _lose(folder: Path, seed: int) -> CaseData:
    shutil.rmtree(folder)
    return load_small(seed)


def lose_folder(case: Case, folder: Path) -> Case:
    """The case, but a folder is gone once it is loaded."""
    return replace(case, load=partial(_lose, folder, int(case.identity[0])))


def load_on_ray(folder: Path, seed: int, seconds: float) -> CaseData:
    """Takes its time, and leaves a note of the node that it ran on."""
    import ray

    note = json.dumps([seed, ray.get_runtime_context().get_node_id()])
    (folder / f"{time.time_ns()}-{os.getpid()}").write_text(note)
    time.sleep(seconds)
    return load_small(seed)
