"""Published encoders with an eighth of their channels, and configurations that they fit."""

from dataclasses import replace

from rectvlm.models.ct_fm import CtFmEncoder
from rectvlm.models.staged_encoder import StagedEncoder
from rectvlm.models.video_resnet import R3D18Encoder

WIDE = ["encoder.width=512", "encoder.heads=8", "localizer.channels=[4,4,8,8]"]
NARROW = "encoder.width=64"
VIDEO = [*WIDE, "encoder.depth=4", "encoder.patch=[8,16,16]"]
OVERRIDES = {
    "r3d-18": [*VIDEO, "encoder.name=r3d-18"],
    "r2plus1d-18": [*VIDEO, "encoder.name=r2plus1d-18"],
    "ct-fm": [
        *WIDE,
        "encoder.name=ct-fm",
        "encoder.depth=5",
        "encoder.patch=[2,16,8]",
        "data.spacing=[3.0,1.2,1.0]",
    ],
}


class NarrowCtFmEncoder(CtFmEncoder):
    """CT-FM with an eighth of the channels."""

    layout = replace(CtFmEncoder.layout, channels=(4, 8, 16, 32, 64))


class NarrowR3D18Encoder(R3D18Encoder):
    """R3D-18 with an eighth of the channels."""

    layout = replace(R3D18Encoder.layout, channels=(8, 16, 32, 64))


NARROW_ENCODERS = {"r3d-18": NarrowR3D18Encoder, "ct-fm": NarrowCtFmEncoder}


def published_names(encoder: StagedEncoder) -> list[str]:
    """Names of the tensors in torchvision's files, by what is known of its modules."""
    names = []
    for own_name in encoder.state_dict():
        part, _, rest = own_name.partition(".")
        if part == "blocks":
            names.append(f"layer{int(rest[0]) + 1}{rest[1:]}")
        elif part == "stem":
            names.append(own_name)
    return [*names, "fc.weight", "fc.bias"]
