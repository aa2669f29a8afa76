"""Fixtures that are made once a session: phantoms, samples, shards, checkpoints, trained phases."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from rectvlm.config import Config, ModelPart, load_config
from rectvlm.data.canonical_grid import canonical_affine, resample_to_grid
from rectvlm.data.hounsfield import to_hu
from rectvlm.data.shards import write_shards
from rectvlm.phantom.phantom import PhantomCase, make_phantom
from rectvlm.types import PHANTOM_OUTLINES, GridGeometry, Sample, SampleMeta, Split, Volume


def phantom_sample(seed: int, config: Config, split: Split = "train") -> Sample:
    """Sample of a phantom on the grid of a configuration."""
    phantom = make_phantom(seed)
    shape = (phantom.hu.shape[0], phantom.hu.shape[1], phantom.hu.shape[2])
    hu, decision = to_hu(Volume(phantom.hu, phantom.affine, f"phantom {seed}"))
    grid, spacing = config.data.grid, config.data.spacing
    grid_affine = canonical_affine(phantom.affine, shape, hu, grid, spacing)
    meta = SampleMeta(
        key=f"phantom_{seed}",
        split=split,
        source=f"phantom {seed}",
        patient=f"phantom_{seed}",
        scan=f"phantom_{seed}",
        labels=phantom.labels,
        findings=phantom.findings,
        impression=phantom.impression,
        spacing=spacing,
        geometry=GridGeometry(grid_affine.tolist(), shape, phantom.affine.tolist()),
        hu=decision,
        lesions_annotated=phantom.lesions_annotated,
        lesions_source={
            key: PHANTOM_OUTLINES if is_annotated else None
            for key, is_annotated in phantom.lesions_annotated.items()
        },
        regions_source="phantom",
    )
    affine = phantom.affine
    return Sample(
        ct=resample_to_grid(hu, affine, grid_affine, grid, "ct"),
        lesions=resample_to_grid(phantom.lesions, affine, grid_affine, grid, "bits"),
        regions=resample_to_grid(phantom.regions, affine, grid_affine, grid, "labels"),
        meta=meta,
    )


@pytest.fixture(scope="session", autouse=True)
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Bundled models that tests build go to a folder of the session, unless one is given."""
    os.environ.setdefault("RECTVLM_MODELS", str(tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="session")
def tiny() -> Config:
    """The tiny configuration."""
    return load_config("tiny")


@pytest.fixture(scope="session")
def phantom_shards(tmp_path_factory: pytest.TempPathFactory, tiny: Config) -> Path:
    """Shards of the tiny grid: six phantoms to train on and three to validate."""
    folder = tmp_path_factory.mktemp("shards")
    splits: list[Split] = ["train"] * 6 + ["valid"] * 3
    write_shards((phantom_sample(seed, tiny, split) for seed, split in enumerate(splits)), folder)
    return folder


@pytest.fixture(scope="session")
def phantoms() -> Callable[[int], PhantomCase]:
    """Phantoms by seed, each made once."""
    made: dict[int, PhantomCase] = {}
    return lambda seed: made[seed] if seed in made else made.setdefault(seed, make_phantom(seed))


@pytest.fixture(scope="session")
def tiny_run(
    tmp_path_factory: pytest.TempPathFactory, tiny: Config, phantom_shards: Path
) -> Callable[[int], Path]:
    """The phase folder of an untrained tiny model with the parts of a phase."""
    from rectvlm import pretrained
    from rectvlm.checkpoint import TrainingState, run_folder
    from rectvlm.models import RectVLM
    from rectvlm.models.language_model import load_language_model
    from rectvlm.models.prompt_embeddings import PromptEmbeddings

    parts: dict[int, tuple[ModelPart, ...]] = {
        1: ("encoder", "classifier"),
        2: ("encoder", "classifier", "localizer"),
        3: ("encoder", "classifier", "localizer", "generator"),
    }
    made: dict[int, Path] = {}

    def build(phase: int) -> Path:
        if phase not in made:
            config = load_config("tiny", [f"data.shards={phantom_shards}"])
            torch.manual_seed(0)
            prompts = PromptEmbeddings.from_text_encoder(
                pretrained.resolve_model(config.text.model), config.text.max_tokens
            )
            language = None
            if phase == 3:
                language = load_language_model(
                    config.generator, pretrained.resolve_model(config.generator.model)
                )
            model = RectVLM(config, parts[phase], prompts, language)
            run = tmp_path_factory.mktemp("run") / f"phase{phase}"
            folder = run_folder.step_folder(run, 0)
            model.save_pretrained(folder, training=TrainingState(phase, 0, 0, 1))
            made[phase] = run
        return made[phase]

    return build


@pytest.fixture(scope="session")
def trained(
    tmp_path_factory: pytest.TempPathFactory, phantom_shards: Path
) -> Callable[[int], Path]:
    """The folder of a phase, trained on two processes after the phases before it."""
    from launches import TWO, run, settings

    folder = tmp_path_factory.mktemp("trained")
    done: set[int] = set()

    def train(phase: int) -> Path:
        for number in range(1, phase + 1):
            if number not in done:
                run(
                    [*TWO, f"launch/phase{number}.py", *settings(number, phantom_shards, folder)],
                    folder,
                )
                done.add(number)
        return folder / "tiny" / f"phase{phase}"

    return train


def named(model: torch.nn.Module, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a model by some of their names."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensors[name].detach() for name in names}


def write_nifti(array: np.ndarray, affine: np.ndarray, path: Path) -> Path:
    """Write a NIfTI file with its sform and its qform."""
    import nibabel as nib

    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    nib.save(image, path)
    return path


@pytest.fixture(scope="session")
def launched_phase1(tmp_path_factory: pytest.TempPathFactory, phantom_shards: Path) -> Path:
    """The folder of a run of phase 1 at `tiny`: six steps, one process, started as a user does."""
    import subprocess
    import sys

    runs = tmp_path_factory.mktemp("launched")
    checkout = Path(__file__).resolve().parents[1]
    command = [
        str(Path(sys.executable).parent / "accelerate"),
        "launch",
        "--num_processes",
        "1",
        "launch/phase1.py",
    ]
    short = [
        "train.phases.phase1.samples=12",
        "train.phases.phase1.global_batch=2",
        "train.phases.phase1.save_every=1",
        f"data.shards={phantom_shards}",
    ]
    done = subprocess.run(
        [*command, "--config", "tiny", f"train.runs={runs}", *short],
        cwd=checkout,
        env={
            **os.environ,
            "RECTVLM_TRACKERS": "none",
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return runs / "tiny" / "phase1"
