"""How fast a CT file becomes a sample, against the bare work that it holds and against CT-CLIP's published recipe.

    python -m benchmarks.preprocess [--volumes 2] [--rounds 5] [--cases 10] [--slices 300]

All ways take the same 512 × 512 volumes (`.nii.gz`, int16) to the grid of 64 × 512 × 512 voxels of 5 × 0.75 × 0.75 mm,
in one process pinned to one core, in turns, so that a slow minute of the machine meets all of them. The volumes are the
demo's two real CTs, interpolated to thin slices, with noise. Then the pipeline itself makes shards of copies with one
worker and with two. Results go to benchmarks/results/preprocess-MACHINE-DATE.json and .md.
"""

import argparse
import gzip
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import deflate
import nibabel as nib
import numpy as np
import psutil
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage

from benchmarks.publishing import (
    CHECKOUT,
    RESULTS_FOLDER,
    make_page_header,
    positive_int,
    publish_result,
    quiet_main,
)
from data_pipeline.cases import Case, CaseData, case_to_sample, file_identity
from data_pipeline.sample_cts import SAMPLE_CTS, fetch_sample_cts
from rectvlm.data.canonical_grid import canonical_affine, resample_to_grid
from rectvlm.data.hounsfield import to_hu
from rectvlm.data.sample import encode_sample, preprocessing_versions
from rectvlm.data.volume import read_volume
from rectvlm.data.volume_codec import encode_volume

GRID, SPACING = (64, 512, 512), (5.0, 0.75, 0.75)
WORKER_COUNTS = (1, 2)
_POLL_SECONDS = 0.05


def make_volumes(folder: Path, count: int, slices: int) -> list[Path]:
    """CTs of 512 × 512 × `slices` voxels: a real one on thin slices, with the noise that thin slices have."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = CHECKOUT / "data" / "samples"
    fetch_sample_cts(samples)
    paths = []
    for number in range(count):
        image = nib.nifti1.load(SAMPLE_CTS[number % len(SAMPLE_CTS)].volume_path(samples))
        thick = np.asanyarray(image.dataobj)
        factor = slices / thick.shape[2]
        thin = ndimage.zoom(thick.astype(np.float32), (1, 1, factor), order=1)
        thin += np.random.default_rng(number).normal(0, 12, thin.shape).astype(np.float32)
        affine = image.affine.copy()
        affine[:3, 2] /= factor
        path = folder / f"ct_{number}.nii.gz"
        nib.save(
            nib.Nifti1Image(np.clip(np.rint(thin), -1024, 3071).astype(np.int16), affine), path
        )
        paths.append(path)
    return paths


def load_ct(path: Path) -> CaseData:
    """A case of a CT and nothing else."""
    return CaseData(volume=read_volume(path))


def run_pipeline(path: Path) -> bytes:
    """A file to the members of a sample, as the pipeline does it."""
    case = Case(
        path.name.partition(".")[0],
        "train",
        "patient",
        path.name,
        partial(load_ct, path),
        file_identity(path),
    )
    return b"".join(encode_sample(case_to_sample(case, GRID, SPACING)).values())


def run_ct_clip_recipe(path: Path, slope: float = 1.0, intercept: float = 0.0) -> torch.Tensor:
    """CT-CLIP's recipe, to our grid instead of its own: float64 from the file to the trilinear resampling.

    After what its public code does with a volume of CT-RATE: rescale, clip to ±1000 HU, resample to the spacing,
    divide by 1000, crop or pad around the centre.
    """
    image = nib.nifti1.load(path)
    hu = np.clip(slope * image.get_fdata() + intercept, -1000, 1000)
    native = np.linalg.norm(image.affine[:3, :3], axis=0)[::-1]
    voxels = torch.tensor(hu.transpose(2, 1, 0))[None, None]
    shape = [
        int(n * old / new) for n, old, new in zip(voxels.shape[2:], native, SPACING, strict=True)
    ]
    resized = F.interpolate(voxels, size=shape, mode="trilinear", align_corners=False)[0, 0].numpy()
    values = torch.tensor((resized / 1000).astype(np.float32))
    pads: list[int] = []
    for axis in (2, 1, 0):
        missing = GRID[axis] - values.shape[axis]
        pads += [missing // 2, missing - missing // 2]  # a negative pad crops
    return F.pad(values, pads, value=-1.0)


def measure_one_core(paths: Sequence[Path], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every way, one number for each volume and round."""
    torch.set_num_threads(1)
    files = {path: path.read_bytes() for path in paths}
    grids: dict[Path, tuple[NDArray[np.int16], Any, Any, NDArray[np.int16]]] = {}
    for path in paths:
        volume = read_volume(path)
        hu, _ = to_hu(volume)
        target = canonical_affine(volume.affine, hu.shape, hu, GRID, SPACING)
        grids[path] = (
            hu,
            volume.affine,
            target,
            resample_to_grid(hu, volume.affine, target, GRID, "ct"),
        )
    ways: dict[str, Callable[[Path], Any]] = {
        "the pipeline": run_pipeline,
        "bare decompression": lambda path: deflate.gzip_decompress(files[path]),
        "bare resampling": lambda path: resample_to_grid(*grids[path][:3], GRID, "ct"),
        "bare encoding": lambda path: encode_volume(grids[path][3]),
        "CT-CLIP's recipe": run_ct_clip_recipe,
        **{
            f"decompression by {name}": partial(_apply_to_file, call, files)
            for name, call in find_decompressors().items()
        },
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for path in paths:
            for name, way in ways.items():
                begin = time.process_time()
                way(path)
                if turn:  # the first turn warms up
                    seconds[name].append(time.process_time() - begin)
    return seconds


def _apply_to_file(call: Callable[[bytes], Any], files: dict[Path, bytes], path: Path) -> Any:
    return call(files[path])


def find_decompressors() -> dict[str, Callable[[bytes], Any]]:
    """Other readers of gzip, where they are installed."""
    found: dict[str, Callable[[bytes], Any]] = {"gzip": gzip.decompress}
    try:
        from isal import igzip

        found["isal"] = igzip.decompress
    except ImportError:
        pass
    try:
        from zlib_ng import gzip_ng

        found["zlib-ng"] = gzip_ng.decompress
    except ImportError:
        pass
    return found


def measure_with_workers(
    paths: Sequence[Path], cases: int, workers: int, work: Path
) -> dict[str, float]:
    """The pipeline over copies of the volumes in its own processes: cases a second and the largest worker's memory.

    The time is that between the first and the last finished shard of one case, so starting the processes is left out.
    """
    folder, out = work / f"cases-{workers}", work / f"shards-{workers}"
    folder.mkdir()
    for number in range(cases):
        os.link(paths[number % len(paths)], folder / f"case_{number}.nii.gz")
    command = [
        sys.executable,
        "-m",
        "benchmarks.preprocess",
        "--make",
        str(folder),
        str(out),
        str(workers),
    ]
    peak = 0
    with subprocess.Popen(command, cwd=CHECKOUT, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            try:
                family = psutil.Process(process.pid).children(recursive=True) or [
                    psutil.Process(process.pid)
                ]
                peak = max([peak, *(one.memory_info().rss for one in family)])
            except psutil.Error:
                continue
    assert process.returncode == 0, "the pipeline failed"
    ends = sorted(path.stat().st_mtime for path in out.glob("*.tar"))
    assert len(ends) == cases
    shutil.rmtree(out)
    # The first `workers` cases end with the start-up in them; from then on all workers are busy.
    counted = cases - workers
    return {"cases_per_second": counted / (ends[-1] - ends[workers - 1]), "peak_worker_bytes": peak}


def make_case_shards(folder: Path, out: Path, workers: int) -> None:
    """Shards of one case each, from every file of a folder."""
    from data_pipeline.make_shards.shard_folder import preprocess

    cases = [
        Case(
            path.name.partition(".")[0],
            "train",
            path.name,
            path.name,
            partial(load_ct, path),
            file_identity(path),
        )
        for path in sorted(folder.iterdir())
    ]
    preprocess(cases, out, GRID, SPACING, samples_per_shard=1, workers=workers)


def summarize_ratios(
    seconds: dict[str, list[float]], workers: dict[int, dict[str, float]]
) -> dict[str, Any]:
    """Ratios, each of paired measurements of one volume in one round, by their median."""
    bare = [
        sum(parts) for parts in zip(*(seconds[f"bare {part}"] for part in BARE_STEPS), strict=True)
    ]
    pairs = list(zip(seconds["the pipeline"], seconds["CT-CLIP's recipe"], bare, strict=True))
    one, two = (workers[n]["cases_per_second"] for n in WORKER_COUNTS)
    return {
        "times_ct_clip": statistics.median(recipe / own for own, recipe, _ in pairs),
        "over_bare_sum": statistics.median(own / parts for own, _, parts in pairs),
        "two_workers_over_one": two / one,
        "peak_worker_gb": max(run["peak_worker_bytes"] for run in workers.values()) / 1e9,
    }


BARE_STEPS = ("decompression", "resampling", "encoding")


def to_markdown(result: dict[str, Any]) -> str:
    """The result as a page."""
    ratios = result["ratios"]
    lines = [
        make_page_header("Preprocessing", "python -m benchmarks.preprocess", result),
        f"{result['volumes']} volumes of 512 × 512 × {result['slices']} int16 voxels "
        f"({', '.join(f'{size / 1e6:.0f} MB' for size in result['file_bytes'])} as .nii.gz, in the page cache) to "
        f"{' × '.join(map(str, GRID))}; CPU seconds on one core over {result['rounds']} rounds.\n\n",
        "| way | minimum | median | maximum |\n|---|---|---|---|\n",
    ]
    for name, taken in result["cpu_seconds"].items():
        lines.append(
            f"| {name} | {min(taken):.3f} | {statistics.median(taken):.3f} | {max(taken):.3f} |\n"
        )
    lines.append("\n| workers | cases/s | memory of the largest, GB |\n|---|---|---|\n")
    for number, run in result["workers"].items():
        lines.append(
            f"| {number} | {run['cases_per_second']:.2f} | {run['peak_worker_bytes'] / 1e9:.2f} |\n"
        )
    lines.append(
        f"\nThe pipeline takes {ratios['over_bare_sum']:.2f} times the sum of bare decompression, resampling and "
        f"encoding (aim: at most 1.3) and is {ratios['times_ct_clip']:.1f} times as fast as CT-CLIP's recipe (aim: at "
        f"least 4). Two workers do {ratios['two_workers_over_one']:.2f} times the work of one (aim: at least 1.8); a "
        f"worker holds at most {ratios['peak_worker_gb']:.2f} GB (aim: below 1.5).\n"
    )
    return "".join(lines)


@quiet_main
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""
    options = _parse_arguments(arguments)
    if options.make:
        folder, out, workers = options.make
        make_case_shards(Path(folder), Path(out), int(workers))
        return 0
    begin = time.monotonic()
    cores = os.sched_getaffinity(0)
    with tempfile.TemporaryDirectory(prefix="rectvlm-bench-") as temporary:
        work = Path(temporary)
        paths = make_volumes(work / "volumes", options.volumes, options.slices)
        os.sched_setaffinity(0, {min(cores)})
        seconds = measure_one_core(paths, options.rounds)
        os.sched_setaffinity(0, cores)
        workers = {
            number: measure_with_workers(paths, options.cases, number, work)
            for number in WORKER_COUNTS
        }
        sizes = [path.stat().st_size for path in paths]
    facts = {
        "versions": preprocessing_versions() | {"torch": torch.__version__},
        "volumes": options.volumes,
        "slices": options.slices,
        "rounds": options.rounds,
        "file_bytes": sizes,
        "cpu_seconds": seconds,
        "workers": workers,
        "ratios": summarize_ratios(seconds, workers),
    }
    publish_result(options.out, "preprocess", begin, facts, to_markdown)
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.preprocess", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--volumes", type=positive_int, default=2, help="different volumes (default 2)"
    )
    parser.add_argument(
        "--slices", type=positive_int, default=300, help="slices of each (default 300)"
    )
    parser.add_argument(
        "--rounds",
        type=positive_int,
        default=5,
        help="measurements of each way and volume (default 5)",
    )
    parser.add_argument(
        "--cases", type=positive_int, default=10, help="cases that the pipeline makes (default 10)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS_FOLDER, metavar="DIR")
    parser.add_argument(
        "--make", nargs=3, metavar=("FOLDER", "OUT", "WORKERS"), help=argparse.SUPPRESS
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
