"""Files of a ViT: where they are found, and what is no ViT or no safetensors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vit_models import make_vit

from rectvlm.pretrained.vit_file import read_vit_file
from rectvlm.types import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    make_vit("vit").save_pretrained(folder)
    return folder


def test_a_file_a_folder_and_shards_are_the_same(folder: Path, tmp_path: Path) -> None:
    make_vit("vit").save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    file = read_vit_file(str(folder / "model.safetensors"))
    for reference in (folder, tmp_path):
        tensors = read_vit_file(str(reference)).tensors
        assert tensors.keys() == file.tensors.keys()
        assert all(torch.equal(tensors[name], file.tensors[name]) for name in tensors)


def test_the_meta_device_reads_shapes_alone(folder: Path) -> None:
    shapes = {name: x.shape for name, x in read_vit_file(str(folder), "meta").tensors.items()}
    whole = read_vit_file(str(folder)).tensors
    assert shapes == {name: tensor.shape for name, tensor in whole.items()}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pth"])
def test_a_pickle_is_never_read(name: str, tmp_path: Path) -> None:
    torch.save({"cls_token": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(UserError, match="a pickle is never read"):
        read_vit_file(str(tmp_path / name))
    with pytest.raises(UserError, match=f"no weights in safetensors: .*found {name}; a pickle"):
        read_vit_file(str(tmp_path))


def test_a_file_cut_short_is_named(folder: Path, tmp_path: Path) -> None:
    cut = tmp_path / "model.safetensors"
    cut.write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match=rf"{cut} is no safetensors file, or is damaged"):
        read_vit_file(str(cut))


@pytest.mark.parametrize("reference", ["/nowhere/vit", "./vit.safetensors", "vit.safetensors"])
def test_a_path_that_does_not_exist_is_named(reference: str) -> None:
    with pytest.raises(UserError, match=r"No weights at .*vit"):
        read_vit_file(reference)


def test_a_hub_id_that_is_not_here_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="facebook/no-such-vit is neither a folder here nor"):
        read_vit_file("facebook/no-such-vit")


def test_another_model_is_no_vit(tmp_path: Path) -> None:
    save_file({"conv1.weight": torch.zeros(8, 3, 7, 7)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"holds no ViT: .* found conv1\.weight"):
        read_vit_file(str(tmp_path))


def test_two_image_encoders_are_not_chosen_between(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    student = {f"student.{name}": tensor for name, tensor in tensors.items()}
    both = student | {f"teacher.{name}": tensor.clone() for name, tensor in tensors.items()}
    save_file(both, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"holds 2 image encoders, .*'student\.', 'teacher\.'"):
        read_vit_file(str(tmp_path))
