"""How fast a CT file becomes a sample, against its bare work and against the recipes of others.

    python -m benchmarks.preprocess [--volumes 2] [--rounds 5] [--cases 10] [--slices 300]
        [--workers 1 2]

All ways take the same 512 × 512 volumes (`.nii.gz`, int16) to the grid of 64 × 512 × 512 voxels of
5 × 0.75 × 0.75 mm, in one process pinned to one core, in turns, so that a slow minute of the
machine meets all of them: the pipeline, its stages alone, CT-CLIP's recipe, and the transforms of
MONAI and of TorchIO where these are installed. The volumes are the demo's two real CTs,
interpolated to thin slices, with noise. Then the pipeline itself makes shards of copies with
several workers.
"""

import argparse
import contextlib
import gzip
import importlib.util
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

from benchmarks.measurements import Comparison, Repetitions
from benchmarks.publishing import (
    CHECKOUT,
    Program,
    find_missing_peers,
    make_parser,
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
from rectvlm.types import JsonObject

GRID, SPACING = (64, 512, 512), (5.0, 0.75, 0.75)
PIPELINE, CT_CLIP = "the pipeline", "CT-CLIP's recipe"
BARE_STEPS = ("decompression", "resampling", "encoding")
_POLL_SECONDS = 0.05


def make_volumes(folder: Path, count: int, slices: int) -> list[Path]:
    """Write CTs of 512 × 512 × `slices` voxels: real ones on thin slices, with their noise."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = CHECKOUT / "data" / "samples"
    fetch_sample_cts(samples)
    paths: list[Path] = []
    for number in range(count):
        image = nib.nifti1.load(SAMPLE_CTS[number % len(SAMPLE_CTS)].volume_path(samples))
        thick = np.asanyarray(image.dataobj)
        factor = slices / thick.shape[2]
        thin = ndimage.zoom(thick.astype(np.float32), (1, 1, factor), order=1)
        thin += np.random.default_rng(number).normal(0, 12, thin.shape).astype(np.float32)
        affine = image.affine.copy()
        affine[:3, 2] /= factor
        path = folder / f"ct_{number}.nii.gz"
        hu = np.clip(np.rint(thin), -1024, 3071).astype(np.int16)
        nib.save(nib.Nifti1Image(hu, affine), path)
        paths.append(path)
    return paths


def load_ct(path: Path) -> CaseData:
    """Load a case of a CT and nothing else."""
    return CaseData(volume=read_volume(path))


def name_case(path: Path, patient: str, load: Callable[[], CaseData]) -> Case:
    """Make a training case of a CT file, with the file's name as its key."""
    key = path.name.partition(".")[0]
    return Case(key, "train", patient, path.name, load, file_identity(path))


def run_pipeline(path: Path) -> bytes:
    """Turn a file into the members of a sample, as the pipeline does it."""
    case = name_case(path, "patient", partial(load_ct, path))
    return b"".join(encode_sample(case_to_sample(case, GRID, SPACING)).values())


def run_ct_clip_recipe(path: Path, slope: float = 1.0, intercept: float = 0.0) -> torch.Tensor:
    """Follow CT-CLIP's recipe, in float64 from the file to the trilinear resampling.

    As its public code does with a volume of CT-RATE, but to our grid: rescale, clip to ±1000 HU,
    resample to the spacing, divide by 1000, crop or pad around the centre.
    """
    image = nib.nifti1.load(path)
    hu = np.clip(slope * image.get_fdata() + intercept, -1000, 1000)
    native = np.linalg.norm(image.affine[:3, :3], axis=0)[::-1]
    voxels = torch.tensor(hu.transpose(2, 1, 0))[None, None]
    sides = zip(voxels.shape[2:], native, SPACING, strict=True)
    shape = [int(size * old / new) for size, old, new in sides]
    resized = F.interpolate(voxels, size=shape, mode="trilinear", align_corners=False)[0, 0].numpy()
    values = torch.tensor((resized / 1000).astype(np.float32))
    pads: list[int] = []
    for axis in (2, 1, 0):
        missing = GRID[axis] - values.shape[axis]
        pads += [missing // 2, missing - missing // 2]  # a negative pad crops
    return F.pad(values, pads, value=-1.0)


def build_monai_recipe() -> Callable[[Path], Any]:
    """MONAI's transforms from the file to our grid and to values between −1 and 1."""
    from monai.transforms.compose import Compose
    from monai.transforms.croppad.array import ResizeWithPadOrCrop
    from monai.transforms.intensity.array import ScaleIntensityRange
    from monai.transforms.io.array import LoadImage
    from monai.transforms.spatial.array import Orientation, Spacing

    return Compose(
        [
            LoadImage(image_only=True, ensure_channel_first=True),
            Orientation(axcodes="RAS"),
            Spacing(pixdim=SPACING[::-1], mode="bilinear"),
            ScaleIntensityRange(-1000, 1000, -1, 1, clip=True),
            ResizeWithPadOrCrop(GRID[::-1], value=-1),
        ]
    )


def build_torchio_recipe() -> Callable[[Path], Any]:
    """TorchIO's transforms from the file to our grid and to values between −1 and 1."""
    import torchio

    transform = torchio.Compose(
        [
            torchio.ToCanonical(),
            torchio.Resample(SPACING[::-1]),
            torchio.RescaleIntensity((-1, 1), in_min_max=(-1000, 1000)),
            torchio.CropOrPad(GRID[::-1], padding_mode=-1),
        ]
    )
    return lambda path: transform(torchio.ScalarImage(path)).data


PEER_RECIPES: dict[str, tuple[str, Callable[[], Callable[[Path], Any]]]] = {
    "monai": ("MONAI's transforms", build_monai_recipe),
    "torchio": ("TorchIO's transforms", build_torchio_recipe),
}
"""Name and maker of the recipe, by the module that it needs."""


def measure_one_core(paths: Sequence[Path], rounds: int) -> dict[str, list[float]]:
    """Measure the CPU seconds of every way, one number for each volume and round."""
    torch.set_num_threads(1)
    files = {path: path.read_bytes() for path in paths}
    grids: dict[Path, tuple[NDArray[np.int16], Any, Any, NDArray[np.int16]]] = {}
    for path in paths:
        volume = read_volume(path)
        hu, _ = to_hu(volume)
        target = canonical_affine(volume.affine, hu.shape, hu, GRID, SPACING)
        resampled = resample_to_grid(hu, volume.affine, target, GRID, "ct")
        grids[path] = (hu, volume.affine, target, resampled)
    ways: dict[str, Callable[[Path], Any]] = {
        PIPELINE: run_pipeline,
        "bare decompression": lambda path: deflate.gzip_decompress(files[path]),
        "bare resampling": lambda path: resample_to_grid(*grids[path][:3], GRID, "ct"),
        "bare encoding": lambda path: encode_volume(grids[path][3]),
        CT_CLIP: run_ct_clip_recipe,
    }
    for module, (name, build_recipe) in PEER_RECIPES.items():
        if importlib.util.find_spec(module) is not None:
            ways[name] = build_recipe()
    for name, decompress in find_decompressors().items():
        ways[f"decompression by {name}"] = partial(_apply_to_file, decompress, files)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for path in paths:
            for name, run_way in ways.items():
                start_seconds = time.process_time()
                run_way(path)
                if turn:  # the first turn warms up
                    seconds[name].append(time.process_time() - start_seconds)
    return seconds


def _apply_to_file(decompress: Callable[[bytes], Any], files: dict[Path, bytes], path: Path) -> Any:
    return decompress(files[path])


def find_decompressors() -> dict[str, Callable[[bytes], Any]]:
    """Find other readers of gzip that are installed."""
    decompressors: dict[str, Callable[[bytes], Any]] = {"gzip": gzip.decompress}
    with contextlib.suppress(ImportError):
        from isal import igzip

        decompressors["isal"] = igzip.decompress
    with contextlib.suppress(ImportError):
        from zlib_ng import gzip_ng

        decompressors["zlib-ng"] = gzip_ng.decompress
    return decompressors


def measure_with_workers(
    paths: Sequence[Path], cases: int, workers: int, work: Path
) -> dict[str, float]:
    """Run the pipeline over copies of the volumes in its own processes.

    The time is that between the first and the last finished shard of one case, so starting the
    processes is left out.

    Returns:
        Cases a second, and peak memory of the largest worker in bytes.
    """
    folder, out = work / f"cases-{workers}", work / f"shards-{workers}"
    folder.mkdir()
    for number in range(cases):
        os.link(paths[number % len(paths)], folder / f"case_{number}.nii.gz")
    module = [sys.executable, "-m", "benchmarks.preprocess"]
    command = [*module, "--make", str(folder), str(out), str(workers)]
    peak_bytes = 0
    with subprocess.Popen(command, cwd=CHECKOUT, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            with contextlib.suppress(psutil.Error):
                peak_bytes = max(peak_bytes, _largest_worker_bytes(process.pid))
    assert process.returncode == 0, "the pipeline failed"
    end_times = sorted(path.stat().st_mtime for path in out.glob("*.tar"))
    assert len(end_times) == cases
    shutil.rmtree(out)
    # The first `workers` cases end with the start-up in them; from then on all workers are busy.
    seconds = end_times[-1] - end_times[workers - 1]
    return {"cases_per_second": (cases - workers) / seconds, "peak_worker_bytes": peak_bytes}


def _largest_worker_bytes(process_id: int) -> int:
    parent = psutil.Process(process_id)
    workers = parent.children(recursive=True) or [parent]
    return max(worker.memory_info().rss for worker in workers)


def make_case_shards(folder: Path, out: Path, workers: int) -> None:
    """Write shards of one case each, from every file of a folder."""
    from data_pipeline.make_shards.shard_folder import preprocess

    paths = sorted(folder.iterdir())
    cases = [name_case(path, path.name, partial(load_ct, path)) for path in paths]
    preprocess(cases, out, GRID, SPACING, samples_per_shard=1, workers=workers)


def summarize_ratios(
    seconds: dict[str, list[float]], workers: dict[int, dict[str, float]]
) -> JsonObject:
    """Compute ratios, each the median over pairs of measurements of one volume in one round."""
    pipeline, recipe = seconds[PIPELINE], seconds[CT_CLIP]
    bare_seconds = [seconds[f"bare {step}"] for step in BARE_STEPS]
    bare_sums = [sum(steps) for steps in zip(*bare_seconds, strict=True)]
    recipe_ratios = [a / b for a, b in zip(recipe, pipeline, strict=True)]
    bare_ratios = [a / b for a, b in zip(pipeline, bare_sums, strict=True)]
    speeds = {count: run["cases_per_second"] for count, run in workers.items()}
    return {
        "times_ct_clip": statistics.median(recipe_ratios),
        "over_bare_sum": statistics.median(bare_ratios),
        "most_workers_over_fewest": speeds[max(speeds)] / speeds[min(speeds)],
        "peak_worker_gb": max(run["peak_worker_bytes"] for run in workers.values()) / 1e9,
    }


def list_comparisons(result: JsonObject) -> list[Comparison]:
    """List the CPU seconds of every way, and the pipeline's speed over workers."""
    seconds, speed, memory = Repetitions(), Repetitions(), Repetitions()
    for name, values in result["cpu_seconds"].items():
        seconds.add(name, values)
    for count, run in result["workers"].items():
        speed.add(PIPELINE, run["cases_per_second"], count)
        memory.add(PIPELINE, run["peak_worker_bytes"] / 1e9, count)
    shared: dict[str, Any] = {"at_label": "workers"}
    return [
        Comparison(
            "A volume from the file to a sample",
            "CPU s",
            seconds.to_measurements(),
            baseline=PIPELINE,
        ),
        Comparison(
            "The pipeline with workers",
            "cases/s",
            speed.to_measurements(),
            better="higher",
            plot="lines",
            **shared,
        ),
        Comparison("Memory of the largest worker", "GB", memory.to_measurements(), **shared),
    ]


def write_text(result: JsonObject) -> str:
    """Write the circumstances and the ratios."""
    ratios = result["ratios"]
    sizes = ", ".join(f"{size / 1e6:.0f} MB" for size in result["file_bytes"])
    counts = [int(count) for count in result["workers"]]
    return (
        f"{result['volumes']} volumes of 512 × 512 × {result['slices']} int16 voxels ({sizes} as "
        f".nii.gz, in the page cache) to {' × '.join(map(str, GRID))}; CPU seconds on one core "
        f"over {result['rounds']} rounds.\n"
        f"\nThe pipeline takes {ratios['over_bare_sum']:.2f} times the sum of bare "
        f"decompression, resampling and encoding (aim: at most 1.3) and is "
        f"{ratios['times_ct_clip']:.1f} times as fast as CT-CLIP's recipe (aim: at "
        f"least 5). {max(counts)} workers do {ratios['most_workers_over_fewest']:.2f} times the "
        f"work of {min(counts)}; a worker holds at most {ratios['peak_worker_gb']:.2f} GB (aim: "
        "below 1.5).\n"
    )


PROGRAM = Program("preprocess", "Preprocessing", write_text, list_comparisons)


@quiet_main
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = _parse_arguments(arguments)
    if options.make:
        folder, out, workers = options.make
        make_case_shards(Path(folder), Path(out), int(workers))
        return 0
    start_seconds = time.monotonic()
    cores = os.sched_getaffinity(0)
    speed_by_workers: dict[int, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="rectvlm-bench-") as temporary:
        work = Path(temporary)
        paths = make_volumes(work / "volumes", options.volumes, options.slices)
        os.sched_setaffinity(0, {min(cores)})
        seconds = measure_one_core(paths, options.rounds)
        os.sched_setaffinity(0, cores)
        for count in options.workers:
            speed_by_workers[count] = measure_with_workers(paths, options.cases, count, work)
        file_bytes = [path.stat().st_size for path in paths]
    facts = {
        "versions": preprocessing_versions() | {"torch": torch.__version__},
        "volumes": options.volumes,
        "slices": options.slices,
        "rounds": options.rounds,
        "file_bytes": file_bytes,
        "cpu_seconds": seconds,
        "workers": speed_by_workers,
        "ratios": summarize_ratios(seconds, speed_by_workers),
    }
    missing = find_missing_peers({module: module for module in PEER_RECIPES})
    publish_result(options.out, PROGRAM, arguments, start_seconds, facts, missing)
    return 0


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("preprocess", "How fast a CT file becomes a sample.")
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
    parser.add_argument(
        "--workers",
        type=positive_int,
        nargs="+",
        default=[1, 2],
        help="numbers of processes of the pipeline, fewer than the cases (default 1 and 2)",
    )
    parser.add_argument(
        "--make", nargs=3, metavar=("FOLDER", "OUT", "WORKERS"), help=argparse.SUPPRESS
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
