"""The base of encoders from elsewhere: convolutions in stages, each coarser than the one before.

Shapes: B samples, Z × Y × X voxels, W input channels, c channels of a stage, z × y × x patches,
N = z · y · x, R regions (20), C channels of the last stage, which is `encoder.width`.

Patches are the cells of the last stage. The global token is their mean, a region token the mean
over the region, and all pass one layer norm, since the published networks end without a norm.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rectvlm.checkpoint.strict_load import load_tensors, named_tensors
from rectvlm.config import DataConfig, EncoderConfig
from rectvlm.models.attention import pooling_weights
from rectvlm.models.image_features import ImageFeatures
from rectvlm.models.layers import run_layer
from rectvlm.models.published_weights import read_safetensors
from rectvlm.models.slice_region_encoder import compute_region_shares
from rectvlm.pretrained.weight_files import find_weight_files
from rectvlm.types import UserError

OWN_LAYERS = ("norm.", "taps.")
"""Layers that no published network has; they start at random."""


@dataclass(frozen=True)
class StageLayout:
    """The fixed geometry of a published network."""

    channels: tuple[int, ...]
    """Channels of each stage."""
    stride: tuple[int, int, int]
    """Voxels (z, y, x) of the network's own input in a cell of the last stage."""
    spacing: tuple[float, float, float] | None
    """Voxel size (z, y, x) that the network was trained at, mm; None where it has none."""
    windows: int | None
    """Number of CT windows that it reads; None where it has a HU range of its own."""


class StagedEncoder(nn.Module):
    """Features of a network whose stages are `blocks`; a subclass builds and feeds it.

    The batch norms keep the statistics of the weights, in training too: a micro-batch of one or
    two CTs has none of its own, and ranks would drift apart.
    """

    layout: ClassVar[StageLayout]
    blocks: nn.ModuleList

    def __init__(self, config: EncoderConfig, data: DataConfig) -> None:
        super().__init__()
        self._check_fit(config, data)
        self.patch, self.spacing, self.windows = config.patch, data.spacing, data.windows
        self.tap_blocks, self.recompute = config.tap_blocks, config.activation_checkpointing
        self.stem, self.blocks = self.build_network()
        self.taps = nn.ModuleDict()
        for number in config.tap_blocks:
            self.taps[str(number)] = nn.Linear(self.layout.channels[number - 1], config.width)
        self.norm = nn.LayerNorm(config.width)

    def build_network(self) -> tuple[nn.Module, nn.ModuleList]:
        """Build what comes before the first stage, and the stages."""
        raise NotImplementedError

    def prepare_images(self, ct: Tensor) -> Tensor:
        """HU (B, Z, Y, X) to the network's own input (B, W, …), float32."""
        raise NotImplementedError

    @classmethod
    def rename_tensor(cls, name: str) -> str | None:
        """Name here of a tensor of the published file; None for one that is not used. A subclass
        whose names differ from the file's translates them."""
        return name

    def load_starting_weights(self, reference: str) -> str:
        """Take the published weights of the network.

        The norm and the taps are not part of them and stay as they are.

        Args:
            reference: safetensors file, folder or hub id.

        Returns:
            What was taken, what was left and what starts anew, in words.

        Raises:
            UserError: there is no such file, or it does not hold this network.
        """
        files = find_weight_files(reference)
        tensors: dict[str, Tensor] = {}
        unused = []
        for name, tensor in chain.from_iterable(read_safetensors(path).items() for path in files):
            own_name = self.rename_tensor(name)
            if own_name is None:
                unused.append(name)
            else:
                tensors[own_name] = tensor
        where = files[0] if len(files) == 1 else files[0].parent
        expected = [name for name in named_tensors(self) if not name.startswith(OWN_LAYERS)]
        remedy = "give the weights of the network that encoder.name names"
        load_tensors(self, tensors, expected, where, remedy)
        left = f", not its {', '.join(unused)}" if unused else ""
        return (
            f"the encoder takes {len(expected)} tensors of {where}{left}; its last norm and its "
            "taps start anew"
        )

    def compute_stages(self, images: Tensor) -> list[Tensor]:
        """Output (B, c, …) of each stage for the network's own input (B, W, …)."""
        x = self.stem(images.to(self.norm.weight.dtype))
        stages = []
        for block in self.blocks:
            x = run_layer(block, x, recompute=self.recompute)
            stages.append(x)
        return stages

    def forward(self, ct: Tensor, regions: Tensor, regions_known: Tensor) -> ImageFeatures:
        """Encode CTs (B, Z, Y, X); see `ImageEncoder`."""
        stages = self.compute_stages(self.prepare_images(ct))
        z, y, x = (n // side for n, side in zip(ct.shape[1:], self.patch, strict=True))
        last = _resize(stages[-1], (z, y, x)).flatten(2).mT  # (B, N, C), slices outermost

        regions = regions.masked_fill(~regions_known[:, None, None, None], 0)
        shares = compute_region_shares(regions, self.patch)[..., 1:]
        weights = pooling_weights(shares, regions_known).to(last.dtype)  # (B, N, R)
        tokens = torch.cat([last.mean(dim=1, keepdim=True), weights.mT @ last, last], dim=1)
        tokens = self.norm(tokens)
        global_token, region_tokens, patches = tokens.split(
            [1, weights.shape[-1], last.shape[1]], dim=1
        )
        levels = [self._tap(number, stages[number - 1], (z, y, x)) for number in self.tap_blocks]
        return ImageFeatures(
            global_token=global_token[:, 0],
            patches=patches,
            region_tokens=region_tokens,
            patch_grid=(z, y, x),
            multilevel_patches=torch.cat([*levels, patches], dim=-1),
        )

    def train(self, mode: bool = True) -> "StagedEncoder":
        """Set the mode of all modules but the batch norms."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm3d):
                module.eval()
        return self

    def fit_atlas(self, volumes: Iterable[Tensor]) -> NoReturn:
        """Refuse: a published network expects the CT itself."""
        raise AssertionError("encoder.atlas_cases is 0 for this encoder")

    def _tap(self, number: int, stage: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Patches (B, N, C) of an earlier stage, normalized."""
        pooled = F.adaptive_avg_pool3d(stage, grid).flatten(2).mT
        level = self.taps[str(number)](pooled)
        return F.layer_norm(level, level.shape[-1:])

    @classmethod
    def _check_fit(cls, config: EncoderConfig, data: DataConfig) -> None:
        layout = cls.layout
        needed: dict[str, tuple[object, object]] = {
            "encoder.width": (layout.channels[-1], config.width),
            "encoder.depth": (len(layout.channels), config.depth),
            "encoder.atlas_cases": (0, config.atlas_cases),
        }
        if layout.spacing is None:
            needed["encoder.patch"] = (list(layout.stride), list(config.patch))
        if layout.windows is not None:
            needed["the number of data.windows"] = (layout.windows, len(data.windows))
        faults = [
            f"{name} must be {value}, not {found}"
            for name, (value, found) in needed.items()
            if value != found
        ]
        if faults:
            raise UserError(
                f"The encoder {config.name} is a published network of fixed shape: "
                f"{'; '.join(faults)}."
            )


def _resize(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """(B, C, …) on a grid of another resolution."""
    if tuple(x.shape[2:]) == grid:
        return x
    return F.interpolate(x, grid, mode="trilinear", align_corners=False)
