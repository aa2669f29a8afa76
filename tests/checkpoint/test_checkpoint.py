"""Checkpoints: found, read strictly, and refused with names."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rectvlm.checkpoint import run_checkpoint
from rectvlm.config import Config
from rectvlm.types import UserError


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(3, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.prompts = nn.Module()
        self.prompts.register_buffer("present", torch.randn(2, 2))


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: own[name].detach().clone() for name in run_checkpoint.checkpoint_tensor_names(model)
    }


def stand(
    phase_folder: Path, step: int, config: Config, tensors: dict[str, Tensor] | None = None
) -> Path:
    """A checkpoint on the disk."""
    folder = run_checkpoint.step_folder(phase_folder, step)
    folder.mkdir(parents=True)
    state = run_checkpoint.TrainingState(
        1, ("encoder", "classifier"), step, step * 4, 2, run_checkpoint.package_versions()
    )
    run_checkpoint.write_checkpoint(folder, tensors or {}, config, state)
    return folder


def test_write_and_read_back(tmp_path: Path, tiny: Config) -> None:
    tensors = {
        "a.weight": torch.randn(3, 4).T,
        "b": torch.randn(2).bfloat16(),
    }  # one is not contiguous
    folder = stand(tmp_path, 7, tiny, tensors)
    found = run_checkpoint.read_weights(folder)
    assert found.keys() == tensors.keys()
    assert all(
        torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype
        for name in found
    )
    assert run_checkpoint.read_config(folder) == tiny
    state = run_checkpoint.read_training_state(folder)
    assert (state.phase, state.step, state.samples_seen, state.world_size) == (1, 7, 28, 2)
    assert (
        state.versions["torch"] == torch.__version__.partition("+")[0]
        or state.versions["torch"] == torch.__version__
    )


def test_the_newest_is_found_and_partial_ones_are_not(tmp_path: Path, tiny: Config) -> None:
    for step in (4, 12, 8):
        stand(tmp_path, step, tiny)
    partial = tmp_path / "checkpoints" / ".step-000016.partial"
    stand(tmp_path, 16, tiny).rename(partial)
    run_checkpoint.step_folder(tmp_path, 20).mkdir()  # without a state: not whole
    assert [path.name for path in run_checkpoint.list_checkpoints(tmp_path)] == [
        "step-000004",
        "step-000008",
        "step-000012",
    ]
    assert run_checkpoint.find_checkpoint(tmp_path, "").name == "step-000012"
    one = run_checkpoint.step_folder(tmp_path, 4)
    assert run_checkpoint.find_checkpoint(one, "") == one
    run_checkpoint.prune_checkpoints(tmp_path, keep=2)
    assert [path.name for path in run_checkpoint.list_checkpoints(tmp_path)] == [
        "step-000008",
        "step-000012",
    ]
    assert partial.is_dir()


def test_the_newest_is_found_beyond_six_digits(tmp_path: Path, tiny: Config) -> None:
    for step in (999_999, 1_000_000):
        stand(tmp_path, step, tiny)
    assert run_checkpoint.find_checkpoint(tmp_path, "").name == "step-1000000"


def test_nothing_there_gives_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="do this instead") as caught:
        run_checkpoint.find_checkpoint(tmp_path / "nowhere", "do this instead")
    assert "nowhere" in str(caught.value)


def test_saved_names_are_what_trains_and_the_prompts() -> None:
    assert set(run_checkpoint.checkpoint_tensor_names(Small())) == {
        "encoder.weight",
        "encoder.bias",
        "prompts.present",
    }


def test_load_is_strict_and_names_every_fault() -> None:
    model = Small()
    tensors = tensors_of(model)
    expected = list(tensors)
    other = Small()
    run_checkpoint.load_weights(other, tensors, expected, Path("here"))
    assert all(torch.equal(tensors_of(other)[name], tensors[name]) for name in tensors)

    wrong = {**tensors, "decoder.weight": torch.zeros(1), "encoder.weight": torch.zeros(5, 3)}
    del wrong["encoder.bias"]
    untouched = Small()
    before = tensors_of(untouched)
    with pytest.raises(UserError) as caught:
        run_checkpoint.load_weights(untouched, wrong, expected, Path("here"))
    message = str(caught.value)
    assert "missing: encoder.bias" in message
    assert "unexpected: decoder.weight" in message
    assert "of another shape: encoder.weight (5, 3) instead of (2, 3)" in message
    assert "here" in message
    assert all(torch.equal(tensors_of(untouched)[name], before[name]) for name in before)


def test_long_lists_are_shortened() -> None:
    tensors = {f"x{k}": torch.zeros(1) for k in range(30)}
    with pytest.raises(UserError, match="and 22 more"):
        run_checkpoint.load_weights(Small(), tensors, [], Path("here"))


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "noise"])
def test_damaged_weights_are_refused(damage: str, tmp_path: Path, tiny: Config) -> None:
    folder = stand(tmp_path, 1, tiny, {"a": torch.randn(100)})
    path = folder / run_checkpoint.WEIGHTS_FILE
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(
            {"cut": content[:-50], "empty": b"", "noise": b"\xff" * len(content)}[damage]
        )
    with pytest.raises(UserError, match=r"weights\.safetensors") as caught:
        run_checkpoint.read_weights(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "{}", '{"phase": "one"}'])
def test_a_damaged_state_is_refused(content: str, tmp_path: Path, tiny: Config) -> None:
    folder = stand(tmp_path, 1, tiny)
    (folder / run_checkpoint.STATE_FILE).write_text(content)
    with pytest.raises(UserError, match=r"state\.json is damaged"):
        run_checkpoint.read_training_state(folder)


@pytest.mark.parametrize("content", [None, "", "- 1", "a: ["])
def test_a_damaged_configuration_is_refused(
    content: str | None, tmp_path: Path, tiny: Config
) -> None:
    folder = stand(tmp_path, 1, tiny)
    (folder / run_checkpoint.CONFIG_FILE).unlink()
    if content is not None:
        (folder / run_checkpoint.CONFIG_FILE).write_text(content)
    with pytest.raises(UserError, match=r"config\.yaml") as caught:
        run_checkpoint.read_config(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_load_model_is_strict(tiny_run: Callable[[int], Path], phase: int) -> None:
    folder = run_checkpoint.find_checkpoint(tiny_run(phase), "")
    model, _ = run_checkpoint.load_model(tiny_run(phase), "cpu")
    assert not model.training
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    saved = load_file(folder / run_checkpoint.WEIGHTS_FILE)
    assert all(torch.equal(own[name], saved[name]) for name in saved)


def test_load_model_refuses_weights_of_another_model(
    tiny_run: Callable[[int], Path], tmp_path: Path
) -> None:
    source = run_checkpoint.find_checkpoint(tiny_run(1), "")
    folder = tmp_path / "step-000001"
    folder.mkdir()
    for name in (run_checkpoint.CONFIG_FILE, run_checkpoint.STATE_FILE):
        (folder / name).write_bytes((source / name).read_bytes())
    saved = load_file(source / run_checkpoint.WEIGHTS_FILE)
    saved.pop("encoder.whole")
    save_file(saved, folder / run_checkpoint.WEIGHTS_FILE)
    with pytest.raises(UserError, match=r"missing: encoder\.whole"):
        run_checkpoint.load_model(folder, "cpu")
    save_file(
        {k: v for k, v in saved.items() if not k.startswith("prompts")},
        folder / run_checkpoint.WEIGHTS_FILE,
    )
    with pytest.raises(UserError, match=r"prompts\.present"):
        run_checkpoint.load_model(folder, "cpu")
