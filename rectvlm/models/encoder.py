"""The image encoders that a configuration can name.

An encoder of your own needs a class that satisfies `ImageEncoder` and a line in `ENCODERS`; see
`docs/how-to/own-encoder.md`.
"""

from collections.abc import Callable

from rectvlm.config import DataConfig, EncoderConfig
from rectvlm.models.ct_fm import CtFmEncoder
from rectvlm.models.image_features import ImageEncoder
from rectvlm.models.slice_region_encoder import SliceRegionEncoder
from rectvlm.models.video_resnet import R2Plus1D18Encoder, R3D18Encoder
from rectvlm.types import UserError

ENCODERS: dict[str, Callable[[EncoderConfig, DataConfig], ImageEncoder]] = {
    "slice-region": SliceRegionEncoder,
    "r3d-18": R3D18Encoder,
    "r2plus1d-18": R2Plus1D18Encoder,
    "ct-fm": CtFmEncoder,
}
"""Encoder classes by their `encoder.name`."""


def build_encoder(config: EncoderConfig, data: DataConfig) -> ImageEncoder:
    """Build the encoder that a configuration names, with random weights.

    Raises:
        UserError: no encoder has this name.
    """
    if config.name not in ENCODERS:
        raise UserError(
            f"encoder.name = {config.name!r} is no known encoder: give one of "
            f"{', '.join(ENCODERS)}, or add yours to ENCODERS in rectvlm/models/encoder.py."
        )
    return ENCODERS[config.name](config, data)


def load_starting_weights(encoder: ImageEncoder, config: EncoderConfig) -> str:
    """Give an encoder the weights that `encoder.init` names.

    On the meta device this checks that they fit and reads no weights.

    Returns:
        What was taken, what was left and what starts anew, in words.

    Raises:
        UserError: the weights do not fit, or the encoder cannot start from weights of others.
    """
    assert config.init is not None, "encoder.init is null"
    if not hasattr(encoder, "load_starting_weights"):
        raise UserError(
            f"encoder.init is {config.init!r}, but the encoder {config.name} cannot start from "
            "weights of others: set encoder.init=null or another encoder.name."
        )
    return str(encoder.load_starting_weights(config.init))
