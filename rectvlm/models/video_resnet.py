"""Video ResNets, R3D-18 and R(2+1)D-18 (Tran et al., 2018), as encoders: slices are the frames.

Layers and names are those of `torchvision.models.video`, whose Kinetics-400 weights fit. The
package itself is no dependency: its compiled part must match the build of torch, and a CUDA wheel
beside a CPU torch does not even import.

Shapes: B samples, Z × Y × X voxels, W windows (3, in place of red, green and blue), c channels.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from rectvlm.models.image_features import apply_windows
from rectvlm.models.staged_encoder import StagedEncoder, StageLayout

ConvolutionKind = Literal["3d", "2+1d"]
"""Kind of a block's convolutions: one of 3 × 3 × 3, or one in the slice and one across slices."""

KINETICS_MEAN = (0.43216, 0.394666, 0.37645)
"""Mean of red, green and blue in Kinetics-400, from 0 to 1, as torchvision subtracts it."""
KINETICS_STD = (0.22803, 0.22145, 0.216989)
"""Standard deviation of red, green and blue in Kinetics-400, as torchvision divides by it."""
BLOCKS_IN_STAGE = 2
STEM_MIDDLE_CHANNELS = 45
"""Channels between the two convolutions of the stem of R(2+1)D-18."""


class VideoResNetEncoder(StagedEncoder):
    """The stages of a video ResNet of 18 layers."""

    layout = StageLayout(channels=(64, 128, 256, 512), stride=(8, 16, 16), spacing=None, windows=3)
    kind: ClassVar[ConvolutionKind]

    def build_network(self) -> tuple[nn.Module, nn.ModuleList]:
        """Build the stem and four stages, started as torchvision does."""
        stem = _build_stem(self.layout.channels[0], self.kind)
        stages = nn.ModuleList()
        inputs = self.layout.channels[0]
        for channels in self.layout.channels:
            blocks = [VideoBlock(inputs, channels, self.kind)]
            blocks += [VideoBlock(channels, channels, self.kind) for _ in range(1, BLOCKS_IN_STAGE)]
            stages.append(nn.Sequential(*blocks))
            inputs = channels
        for module in [*stem.modules(), *stages.modules()]:
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        return stem, stages

    def prepare_images(self, ct: Tensor) -> Tensor:
        """HU (B, Z, Y, X) to windows (B, 3, Z, Y, X), normalized like the videos."""
        mean, std = torch.tensor([KINETICS_MEAN, KINETICS_STD], device=ct.device)
        channels = apply_windows(ct, self.windows)
        return (channels - mean[:, None, None, None]) / std[:, None, None, None]

    @classmethod
    def rename_tensor(cls, name: str) -> str | None:
        """`layer1.0.conv1.0.weight` is `blocks.0.0.conv1.0.weight` here; the head is not used."""
        if name.startswith("fc."):
            return None
        if name.startswith("layer") and name[5:6].isdigit():
            return f"blocks.{int(name[5]) - 1}{name[6:]}"
        return name


class R3D18Encoder(VideoResNetEncoder):
    """R3D-18: convolutions of 3 × 3 × 3."""

    kind = "3d"


class R2Plus1D18Encoder(VideoResNetEncoder):
    """R(2+1)D-18: convolutions in the slice, then across slices."""

    kind = "2+1d"


class VideoBlock(nn.Module):
    """Two convolutions with a residual connection; where channels grow, all sides are halved."""

    def __init__(self, inputs: int, outputs: int, kind: ConvolutionKind) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        # R(2+1)D has as many weights as R3D with this many channels between its convolutions.
        middle = inputs * outputs * 27 // (inputs * 9 + 3 * outputs)
        self.conv1 = nn.Sequential(
            _build_conv(inputs, outputs, middle, stride, kind),
            nn.BatchNorm3d(outputs),
            nn.ReLU(inplace=True),
        )
        self.conv2 = nn.Sequential(
            _build_conv(outputs, outputs, middle, 1, kind), nn.BatchNorm3d(outputs)
        )
        self.downsample: nn.Module = nn.Identity()
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv3d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm3d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, …) to (B, outputs, …), at half the resolution where channels grow."""
        return torch.relu(self.conv2(self.conv1(x)) + self.downsample(x))


def _build_conv(
    inputs: int, outputs: int, middle: int, stride: int, kind: ConvolutionKind
) -> nn.Module:
    if kind == "3d":
        return nn.Conv3d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    in_slice = nn.Conv3d(
        inputs, middle, (1, 3, 3), stride=(1, stride, stride), padding=(0, 1, 1), bias=False
    )
    across = nn.Conv3d(
        middle, outputs, (3, 1, 1), stride=(stride, 1, 1), padding=(1, 0, 0), bias=False
    )
    return nn.Sequential(in_slice, nn.BatchNorm3d(middle), nn.ReLU(inplace=True), across)


def _build_stem(channels: int, kind: ConvolutionKind) -> nn.Sequential:
    """Three windows to the channels of the first stage, at half the resolution in the slice."""
    if kind == "3d":
        conv = nn.Conv3d(3, channels, (3, 7, 7), stride=(1, 2, 2), padding=(1, 3, 3), bias=False)
        return nn.Sequential(conv, nn.BatchNorm3d(channels), nn.ReLU(inplace=True))
    middle = STEM_MIDDLE_CHANNELS
    return nn.Sequential(
        nn.Conv3d(3, middle, (1, 7, 7), stride=(1, 2, 2), padding=(0, 3, 3), bias=False),
        nn.BatchNorm3d(middle),
        nn.ReLU(inplace=True),
        nn.Conv3d(middle, channels, (3, 1, 1), padding=(1, 0, 0), bias=False),
        nn.BatchNorm3d(channels),
        nn.ReLU(inplace=True),
    )
