"""CT-FM (Pai et al., 2025, arXiv 2501.09001) as an encoder: MONAI's SegResEncoder, trained on
148,000 CTs without labels.

Weights: `model.safetensors` of `project-lighter/ct_fm_feature_extractor`. It was trained in the
orientation SPL, which is the canonical one here, on voxels of 3 × 1 × 1 mm, at one HU range. A CT
at another spacing is resampled to that, and its features to the patches.

Shapes: B samples, Z × Y × X voxels.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from rectvlm.models.staged_encoder import StagedEncoder, StageLayout

BLOCKS_IN_STAGES = (1, 2, 2, 4, 4)
HU_RANGE = (-1024.0, 2048.0)
"""HU that become 0 and 1; values beyond are clipped."""


class CtFmEncoder(StagedEncoder):
    """The stages of CT-FM."""

    layout = StageLayout(
        channels=(32, 64, 128, 256, 512), stride=(16, 16, 16), spacing=(3.0, 1.0, 1.0), windows=None
    )

    def build_network(self) -> tuple[nn.Module, nn.ModuleList]:
        """Build MONAI's network; the convolution that halves the sides begins a stage here."""
        from monai.networks.nets.segresnet_ds import SegResEncoder  # MONAI takes its time

        network = SegResEncoder(init_filters=self.layout.channels[0], blocks_down=BLOCKS_IN_STAGES)
        stages = nn.ModuleList()
        downsample: nn.Module = nn.Identity()
        for level in network.layers:
            assert isinstance(level, nn.ModuleDict)
            stage = nn.Sequential()
            stage.add_module("downsample", downsample)
            stage.add_module("blocks", level["blocks"])
            stages.append(stage)
            downsample = level["downsample"]
        return network.conv_init, stages

    def prepare_images(self, ct: Tensor) -> Tensor:
        """HU (B, Z, Y, X) to one channel from 0 to 1 on voxels of 3 × 1 × 1 mm."""
        low, high = HU_RANGE
        images = ((ct.float() - low) / (high - low)).clamp(0, 1)[:, None]
        own_spacing = self.layout.spacing
        assert own_spacing is not None
        sizes = [
            max(1, round(count * spacing / own))
            for count, spacing, own in zip(ct.shape[1:], self.spacing, own_spacing, strict=True)
        ]
        if sizes == list(ct.shape[1:]):
            return images
        return F.interpolate(images, sizes, mode="trilinear", align_corners=False)

    @classmethod
    def rename_tensor(cls, name: str) -> str | None:
        """`layers.0.downsample.weight` is `blocks.1.downsample.weight` here, and so on."""
        parts = name.split(".")
        if parts[0] == "conv_init":
            return ".".join(["stem", *parts[1:]])
        if parts[0] == "layers" and len(parts) > 2 and parts[1].isdigit():
            number = int(parts[1]) + (parts[2] == "downsample")
            return ".".join(["blocks", str(number), *parts[2:]])
        return name
